"""Everything measured of one model or several, their AR base beside them: `evaluate`, and `run`, the command of that name.

What only needs reading is checked before a model is loaded, and a judge is tried once before it is needed: an error after hours of
answering helps nobody.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import KW_ONLY, asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import fmean
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from loguru import logger
from peft import PeftModel
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from .. import UserError
from ..config import read_mapping
from ..data.datasets import PLAIN_CHAT_TEMPLATE, load_examples
from ..generation.config import DiffusionGenerationConfig, check_one_answer, check_room, decoding_settings
from ..models.checkpoints import best_device, is_adapter, resolve_path
from ..models.loading import load_diffusion_model
from ..models.patching import base_of
from ..models.record import layered, record_of
from ..models.smollm2 import answering
from ..objective.estimators import REPLICATES, check_estimator
from ..objective.settings import read_path, redacted, user_settings
from ..reasoning.pairs import LLMJudge
from ..reasoning.problems import load_records
from .answers import (
    AnswerReport,
    as_example,
    as_problem,
    default_grid,
    evaluate_answers,
    grid,
    place,
    prompt_and_reference,
    question_of,
    sweep,
)
from .likelihood import is_diffusion, likelihood, window_length
from .metrics import calibration, check_references, denoising_trace, eos_positions, overlap, reference_rows, variety
from .report import show, write_report
from .statistics import Judge, answer_tables

CONVERTED, BASE, SAME_WEIGHTS = "converted", "AR base", "AR, same weights"
PACKAGES = ("llm_diffusion", "torch", "transformers", "trl", "peft", "datasets", "lm_eval", "sacrebleu", "rouge_score")
BOUND, SHARED = ("estimator", "n_samples", "seed"), ("batch_size", "max_length", "split", "progress")
OF_TASKS = ("data", "limit", "num_fewshot", "chat_template")
Loaded = tuple[torch.nn.Module, PreTrainedTokenizerBase]


def evaluate(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, **options: Any) -> dict[str, Any]:
    """Measures a converted model and, beside it, its AR base and other models; `options` are the fields of `Evaluation`.

    Returns:
        What goes into `results.json`: `settings`, `provenance`, `models` (figures by model), and what the page shows beside.
    """
    return Evaluation(model, tokenizer, **options).run()


@dataclass
class Evaluation:
    """What is to be measured, and what is found of one model after the other."""

    model: torch.nn.Module
    tokenizer: PreTrainedTokenizerBase
    _: KW_ONLY
    texts: Sequence[str] = ()  # for likelihood, in windows of `max_length`
    examples: Sequence[dict] = ()  # prompts with references, of a trainable shape or of any form that `problems` reads
    tasks: Sequence[str] = ()  # of lm-evaluation-harness, on files in `data` where it has them; the next three as there
    data: str | None = None
    limit: int | None = None
    num_fewshot: int | None = None
    chat_template: bool = False
    decoding: dict[str, Any] | None = None  # settings of `generate`; without `max_new_tokens` tasks set it
    axes: dict[str, Sequence[Any]] | None = None  # decoding settings to sweep, `{}` for a default; None: no sweep
    base: Loaded | None = None  # default: the same weights, adapters off and causal, which under LoRA is the base
    estimator: str = "exact_count"
    n_samples: int = 128
    seed: int = 0
    batch_size: int = 16
    max_length: int | None = None
    judge: Judge | None = None  # reads every worked answer, beside its re-evaluation; see `statistics.judged_steps`
    split: bool = False  # between all processes, each of which must call this; only the first has the whole results
    progress: bool = False
    name: str = CONVERTED  # of the model in the results
    others: Iterable[tuple[str, Loaded, dict[str, Any]]] = ()  # name, model, decoding; taken one after the other

    def __post_init__(self) -> None:
        if not (self.texts or self.examples or self.tasks):
            raise UserError("nothing to measure: give tasks, texts, or prompts with references.")
        records, self.examples = self.examples, [as_example(record, row) for row, record in enumerate(self.examples)]
        self.references = [prompt_and_reference(example, row)[1] for row, example in enumerate(self.examples)]
        check_references(self.references)  # before hours of answering
        check_one_answer(self.decoding or {})
        self.problems = [as_problem(record) for record in records]
        self.harness = load_harness() if self.tasks else None
        self.reports: dict[str, AnswerReport] = {}
        self.samples: dict[str, dict[str, list[dict]]] = {}  # of the harness, by model, then by task
        self.record, base = record_of(self.model), base_of(self.model)
        settings = {
            **self.options(*BOUND, *OF_TASKS, "batch_size", "tasks"),
            "processes": place()[1] if self.split else 1,
            "window": window_length(base, self.max_length),
            "decoding": self.whole_decoding(self.decoding),
            "sweep": self.axes,
            "diffusion": self.record.to_dict(),
            "dtype": str(base.dtype),
        }
        self.results = {"settings": settings, "provenance": provenance(base.device), "models": {}, "notes": []}

    def run(self) -> dict[str, Any]:
        loaded, trained = (self.model, self.tokenizer), self.record.trained
        title = BASE if self.base or isinstance(self.model, PeftModel) or not trained else SAME_WEIGHTS
        self.measure(title, self.base or loaded, self.decoding, autoregressive=True if self.base or trained else None)
        if self.base or trained:
            self.measure(self.name, loaded, self.decoding)
        for other in self.others:
            self.measure(*other)
        if not self.split or place()[0] == 0:
            self.compare()
            if self.examples and trained:
                self.look_inside()
        return self.results

    def options(self, *names: str) -> dict[str, Any]:
        return {name: getattr(self, name) for name in names}

    def whole_decoding(self, chosen: dict[str, Any] | None) -> dict[str, Any]:
        return {"max_new_tokens": 128, "seed": self.seed, **(chosen or {})}

    def note(self, text: str) -> None:
        if text not in self.results["notes"]:
            logger.warning(text)
            self.results["notes"].append(text)

    def measure(
        self, name: str, loaded: Loaded, chosen: dict[str, Any] | None, autoregressive: bool | None = None
    ) -> None:
        """Adds the figures of a model with its decoding; `autoregressive` None: where it was not trained to be anything else."""
        if autoregressive is None and (autoregressive := not record_of(loaded[0]).trained):
            who = "The model" if name in (BASE, CONVERTED) else name
            self.note(f"{who} is not trained as a diffusion model: it is evaluated as the autoregressive model it is.")
        figures = self.results["models"][name] = {}
        if self.texts:
            figures["likelihood"] = self.likelihood(loaded, chosen or {}, autoregressive)
        if self.examples:
            settings = self.whole_decoding(chosen)
            settings = {"max_new_tokens": settings["max_new_tokens"]} if autoregressive else settings
            settings |= {"autoregressive": autoregressive, "split": self.split}
            self.reports[name] = evaluate_answers(*loaded, self.examples, **settings)
            figures["answers"] = self.answers(self.reports[name])
        if self.tasks:
            options = {**(chosen or {}), **self.options(*BOUND, *SHARED), "autoregressive": autoregressive}
            lm = self.harness.DiffusionLM(*loaded, **options)
            found = self.harness.run_tasks(lm, self.tasks, **self.options(*OF_TASKS))
            self.samples[name] = found["samples"] if found else {}  # the first process's alone
            if found:
                figures["tasks"] = task_figures(found["results"])
                figures["harness"] = {"model": lm.get_model_info(), **{k: found[k] for k in ("versions", "n-shot")}}

    def likelihood(self, loaded: Loaded, chosen: dict[str, Any], autoregressive: bool) -> dict[str, Any]:
        exact, options = autoregressive or not is_diffusion(loaded[0]), self.options(*SHARED)
        if not exact:
            options |= self.options(*BOUND)
            options |= {"block_length": chosen.get("block_length")} if self.estimator == "per_block" else {}
        elif not autoregressive:
            self.note("A drafter's text is its base's own: its likelihood is the base's, exact.")
        found = likelihood(*loaded, self.texts, autoregressive=exact, **options)
        self.results["levels"] = self.results.get("levels") or found.levels
        return found.summary()

    def answers(self, report: AnswerReport) -> dict[str, Any]:
        figures = {f"exact match, {kind}, %": value for kind, value in report.exact_match.items()}
        figures |= {
            "exact match, mean, %": report.mean,
            "tokens per forward": report.tokens_per_forward,
            "tokens a second": report.tokens_per_second,
            "ended, %": 100 * fmean(report.ended),
            **variety(report.answers),
        }
        try:
            figures |= overlap(report.answers, self.references)
        except ImportError as error:
            self.note(f"No BLEU and ROUGE: {error}; run `pip install 'llm-diffusion[eval]'`.")
        return figures

    def compare(self) -> None:
        """All models, answer by answer."""
        answers = {name: report.answers for name, report in self.reports.items()}
        self.results |= answer_tables(self.problems, answers, self.samples, self.judge, self.seed)
        if self.examples:
            self.results["samples"] = [
                {"prompt": question_of(example), "reference": self.references[i]}
                | {name: texts[i] for name, texts in answers.items()}
                for i, example in enumerate(self.examples)
            ]

    def look_inside(self) -> None:
        """Ends, a trace, calibration and a sweep of the first model."""
        model, tokenizer, examples, results = self.model, self.tokenizer, self.examples, self.results
        decoding = self.whole_decoding(self.decoding)
        results["eos"] = eos_positions(tokenizer, examples, self.reports[self.name])
        results["trace"] = denoising_trace(model, tokenizer, examples[0], decoding)
        if is_diffusion(model):
            rows = reference_rows(tokenizer, examples, window_length(model, None))
            results["calibration"] = asdict(calibration(model, rows, **self.options("batch_size", "seed")))
        if self.axes is not None:
            points = grid(self.axes) if self.axes else default_grid(model)
            results["frontier"] = [asdict(p) for p in sweep(model, tokenizer, examples, decoding, points, self.base)]


def task_figures(found: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Metrics of all tasks with their standard errors, as plain numbers: `gsm8k, exact_match (strict-match)`."""
    figures = {}
    for task, metrics in found.items():
        for name, value in metrics.items():
            metric, _, kind = name.partition(",")
            if kind and isinstance(value, int | float):
                figures[f"{task}, {metric}{'' if kind == 'none' else f' ({kind})'}"] = float(value)
    return figures


def provenance(device: torch.device | str) -> dict[str, Any]:
    """Versions, git revision of the package where it is a checkout, and the machine."""
    versions = {}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    git = subprocess.run(command, capture_output=True, text=True, check=False)
    return {
        "git_revision": git.stdout.strip() or None,
        **versions,
        "python": sys.version.split()[0],
        "device": torch.cuda.get_device_name() if torch.device(device).type == "cuda" else str(device),
        "threads": torch.get_num_threads(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def load_harness() -> ModuleType:
    """The module of lm-evaluation-harness, which the extra `eval` brings."""
    try:
        from . import harness
    except ImportError as error:
        raise UserError(
            f"`tasks`: lm-evaluation-harness is not installed ({error}); run `pip install 'llm-diffusion[eval]'`."
        ) from error
    return harness


# -- the command


def read_texts(name: str, limit: int | None) -> list[str]:
    """A text file as one text, or the `text` of every line of a JSONL file."""
    path = read_path("--text", name)
    if not path.is_file():
        raise UserError(f"`--text`: {name!r} is not a file.")
    if path.suffix != ".jsonl":
        with user_settings(f"`--text`: {name!r}", UnicodeDecodeError):
            return [path.read_text(encoding="utf-8-sig")]
    examples = load_examples(name, limit)
    if "text" not in examples[0]:
        raise UserError(f"`--text`: {name!r} has no `text` in its lines, but {sorted(examples[0])}.")
    return [example["text"] for example in examples]


def read_prompts(name: str, limit: int | None) -> list[dict]:
    """Examples of a trainable shape, or records of any form that `problems` reads (GSM8K, countdown …)."""
    first = load_records(name, 1, "test")[0]
    return load_examples(name, limit) if as_example(first) is first else load_records(name, limit, "test")


def _load(name: str, chosen: dict[str, Any], trust_remote_code: bool) -> tuple[Loaded, dict[str, Any]]:
    """A model and its decoding."""
    name, dtype = answering(name, "auto", best_device())
    model, tokenizer = load_diffusion_model(name, dtype=dtype, trust_remote_code=trust_remote_code)
    tokenizer.chat_template = tokenizer.chat_template or PLAIN_CHAT_TEMPLATE
    decoding = decoding_settings(model, chosen)
    check_room(model, 1, chosen.get("max_new_tokens") or 1)
    if "max_new_tokens" not in chosen:
        del decoding["max_new_tokens"]  # tasks have their own
    return (model, tokenizer), decoding


def run(names: Sequence[str], folder: Path, console: Console, **options: Any) -> bool:
    """The command, with its options by their names: loads the models, measures them, writes the report and prints its figures.

    Returns:
        Whether this is the process that wrote it, the first one.
    """
    given = SimpleNamespace(**options)
    tasks = [task.strip() for task in given.tasks.split(",") if task.strip()]
    chosen = read_mapping(given.settings, "--settings")
    axes = None if given.sweep is None else read_mapping(given.sweep, "--sweep")
    for point in [{}, *grid(axes or {})]:
        DiffusionGenerationConfig(**layered(chosen, point))
    check_estimator(given.estimator, given.samples, REPLICATES)
    texts = read_texts(given.text, given.limit) if given.text else []
    examples = read_prompts(given.prompts, given.limit) if given.prompts else []
    if not (tasks or texts or examples):
        raise UserError("nothing to measure: give `--tasks`, `--text` or `--prompts`.")
    if len(set(names)) < len(names):
        raise UserError(f"`models` must differ from each other, got {list(names)}.")
    for name in names:
        is_adapter(resolve_path(name))  # refuses what is not there
    if tasks and given.data:
        load_harness().local_tasks(Path(given.data))
    first = place()[0] == 0
    if not first:
        logger.remove()
    judge = LLMJudge(given.judge, given.judge_model or "") if given.judge else None
    if judge and first:
        judge("What is 1 + 1?", "1+1=2.\n#### 2", "#### 2")  # nobody there is found out now, not after the answers
    loaded, decoding = _load(names[0], chosen, given.trust_remote_code)
    results = evaluate(
        *loaded,
        texts=texts,
        examples=examples,
        tasks=tasks,
        decoding=decoding,
        axes=axes,
        base=_load(given.base, {}, given.trust_remote_code)[0] if given.base else None,
        n_samples=given.samples,
        judge=judge,
        split=True,
        progress=first,
        name=CONVERTED if len(names) == 1 else names[0],
        others=((name, *_load(name, chosen, given.trust_remote_code)) for name in names[1:]),
        **{name: options[name] for name in (*OF_TASKS, "estimator", "seed", "batch_size", "max_length")},
    )
    if not first:
        return False
    named = redacted({name: options[name] for name in ("base", "text", "prompts", "judge", "judge_model")})
    results["settings"] = {"model": names[0], "others": list(names[1:]), **named, **results["settings"]}
    write_report(results, folder)
    show(results, console)
    return True
