"""Everything measured of one model, its AR base beside it, with every setting, seed and version: `results.json` and one HTML page.

Trade-off: one function that measures what it is given data for. Alternative: a script a figure, whose settings end up in nobody's file.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from loguru import logger
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from .. import UserError
from ..models.patching import base_of
from ..models.record import record_of
from .answer_tables import (
    Judge,
    answer_tables,
    as_example,
    as_problem,
)
from .answers import AnswerReport, evaluate_answers, prompt_and_reference
from .calibration import (
    calibration,
    denoising_trace,
    eos_positions,
    reference_rows,
)
from .html_report import render
from .likelihood import is_diffusion, likelihood
from .metrics import check_references, overlap, variety
from .processes import place
from .speed import default_grid, grid, sweep
from .windows import window_length

CONVERTED, BASE, SAME_WEIGHTS = "converted", "AR base", "AR, same weights"
PACKAGES = ("llm_diffusion", "torch", "transformers", "trl", "peft", "datasets", "lm_eval", "sacrebleu", "rouge_score")
SAMPLES = 12


def provenance(device: torch.device | str) -> dict[str, Any]:
    """Versions, git revision of the package where it is a checkout, and the machine."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    git = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"],
        capture_output=True,
        text=True,
        check=False,
    )
    return {
        "git_revision": git.stdout.strip() or None,
        **versions,
        "python": sys.version.split()[0],
        "device": torch.cuda.get_device_name() if torch.device(device).type == "cuda" else str(device),
        "threads": torch.get_num_threads(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def load_harness() -> ModuleType:
    """The module of lm-evaluation-harness.

    Raises:
        ImportError: the extra `eval` is not installed.
    """
    try:
        from ..evaluation import harness
    except ImportError as error:
        raise ImportError(
            f"`tasks`: lm-evaluation-harness is not installed ({error}); run `pip install 'llm-diffusion[eval]'`."
        ) from error
    return harness


def evaluate(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    *,
    texts: Sequence[str] = (),
    examples: Sequence[dict] = (),
    tasks: Sequence[str] = (),
    data: str | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    chat_template: bool = False,
    decoding: dict[str, Any] | None = None,
    axes: dict[str, Sequence[Any]] | None = None,
    base: tuple[torch.nn.Module, PreTrainedTokenizerBase] | None = None,
    estimator: str = "exact_count",
    n_samples: int = 128,
    seed: int = 0,
    batch_size: int = 16,
    max_length: int | None = None,
    judge: Judge | None = None,
    split: bool = False,
    progress: bool = False,
) -> dict[str, Any]:
    """Measures a converted model and, beside it, an AR model.

    Args:
        texts: for likelihood.
        examples: prompts with references, of a trainable shape or of any form that `problems` reads: exact match, overlap, calibration,
            ends, a trace, samples.
        tasks: names of lm-evaluation-harness, on files in `data` where it has them; `limit`, `num_fewshot`, `chat_template` as there.
        decoding: settings of `generate`; tasks say how long their answers may be, where `max_new_tokens` is not among them.
        axes: decoding settings to sweep, `{}` for a default; None: no sweep.
        base: the AR model; default: the same weights, adapters off and causal, which under LoRA is the base.
        split: deal texts, prompts and tasks out to all processes, each of which must call this; the first one alone draws traces,
            calibrates, sweeps and asks the judge, so its results are the whole ones.
        judge: asked of every worked answer, beside its re-evaluation; see `judge`.
        estimator, n_samples, max_length: of the likelihood; the blocks of "per_block" are those of `decoding`.

    Returns:
        What goes into `results.json`: `settings`, `provenance`, `models` (figures by model), and what the page shows beside.

    Raises:
        ValueError: nothing to measure, or one of the settings is wrong.
    """
    if not (texts or examples or tasks):
        raise UserError("nothing to measure: give tasks, texts, or prompts with references.")
    records, examples = examples, [as_example(record) for record in examples]
    check_references([prompt_and_reference(example)[1] for example in examples])  # before hours of answering
    problems = [as_problem(record) for record in records]
    harness = load_harness() if tasks else None
    given = decoding or {}
    decoding = {"max_new_tokens": 128, "seed": seed, **given}
    bound = {"estimator": estimator, "n_samples": n_samples, "seed": seed}
    blocks = {"block_length": given.get("block_length")} if estimator == "per_block" else {}
    trained, beside = record_of(model).trained, base or (model, tokenizer)
    results: dict[str, Any] = {
        "settings": {
            **bound,
            "batch_size": batch_size,
            "processes": place()[1] if split else 1,
            "window": window_length(model, max_length, None)[0],
            "decoding": decoding,
            "sweep": axes,
            "tasks": list(tasks),
            "data": data,
            "limit": limit,
            "num_fewshot": num_fewshot,
            "chat_template": chat_template,
            "diffusion": record_of(model).to_dict(),
            "dtype": str(base_of(model).dtype),
        },
        "provenance": provenance(base_of(model).device),
        "models": {},
        "notes": [],
    }
    ways = {BASE if base or isinstance(model, PeftModel) or not trained else SAME_WEIGHTS: (*beside, True)}
    if trained:
        ways[CONVERTED] = (model, tokenizer, False)
    else:
        _note(
            results, "The model is not trained as a diffusion model: it is evaluated as the autoregressive model it is."
        )
    reports, samples = {}, {}
    for name, (mine, its_tokenizer, is_ar) in ways.items():
        figures: dict[str, Any] = {}
        if texts:
            exact = is_ar or not is_diffusion(mine)
            options = {"max_length": max_length, "batch_size": batch_size, "split": split, "progress": progress}
            found = likelihood(
                mine, its_tokenizer, texts, autoregressive=exact, **options, **({} if exact else bound | blocks)
            )
            figures["likelihood"] = found.summary()
            results["levels"] = found.levels or results.get("levels", [])
            if exact and not is_ar:
                _note(results, "A drafter's text is its base's own: its likelihood is the base's, exact.")
        if examples:
            settings = {"max_new_tokens": decoding["max_new_tokens"]} if is_ar else decoding
            reports[name] = evaluate_answers(
                mine, its_tokenizer, examples, autoregressive=is_ar, split=split, **settings
            )
            figures["answers"] = _answer_figures(results, examples, reports[name])
        if tasks:
            own = {"batch_size": batch_size, "max_length": max_length, "split": split, "progress": progress, **bound}
            lm = harness.DiffusionLM(mine, its_tokenizer, autoregressive=is_ar, **{**given, **own})
            asked = {"data": data, "limit": limit, "num_fewshot": num_fewshot, "chat_template": chat_template}
            samples[name] = _run_tasks(harness, lm, tasks, asked, figures)
        results["models"][name] = figures
    answers = {name: report.answers for name, report in reports.items()}
    if split and place()[0] > 0:
        return results
    results |= answer_tables(problems, answers, samples, judge, seed)
    if examples:
        results["samples"] = _samples(examples, reports)
    if examples and trained:
        _look_inside(results, model, tokenizer, examples, reports[CONVERTED], decoding, batch_size, seed)
        if axes is not None:
            points = grid(axes) if axes else default_grid(model)
            results["frontier"] = [asdict(p) for p in sweep(model, tokenizer, examples, decoding, points, base)]
    return results


def _run_tasks(
    harness: ModuleType, lm: Any, tasks: Sequence[str], asked: dict[str, Any], figures: dict[str, Any]
) -> dict[str, list[dict]]:
    """Adds the figures of tasks, and returns their samples; both are the first process's alone."""
    found = harness.run_tasks(lm, tasks, **asked)
    if found is None:
        return {}
    figures["tasks"] = task_figures(found["results"])
    figures["harness"] = {"model": lm.get_model_info(), "versions": found["versions"], "n-shot": found["n-shot"]}
    return found["samples"]


def _note(results: dict[str, Any], text: str) -> None:
    if text not in results["notes"]:
        logger.warning(text)
        results["notes"].append(text)


def _answer_figures(results: dict[str, Any], examples: Sequence[dict], report: AnswerReport) -> dict[str, Any]:
    figures = {f"exact match, {kind}, %": value for kind, value in report.exact_match.items()}
    figures |= {
        "exact match, mean, %": report.mean,
        "tokens per forward": report.tokens_per_forward,
        "tokens a second": sum(report.tokens) / report.seconds,
        "ended, %": 100 * sum(report.ended) / len(report.ended),
        **variety(report.answers),
    }
    try:
        figures |= overlap(report.answers, [prompt_and_reference(example)[1] for example in examples])
    except ImportError as error:
        _note(results, f"No BLEU and ROUGE: {error}")
    return figures


def _look_inside(
    results: dict[str, Any],
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[dict],
    report: AnswerReport,
    decoding: dict[str, Any],
    batch_size: int,
    seed: int,
) -> None:
    results["eos"] = eos_positions(tokenizer, examples, report)
    results["trace"] = denoising_trace(model, tokenizer, examples[0], decoding)
    if is_diffusion(model):
        rows = reference_rows(tokenizer, examples, window_length(model, None, None)[0])
        results["calibration"] = asdict(calibration(model, rows, batch_size=batch_size, seed=seed))


def _samples(examples: Sequence[dict], reports: dict[str, AnswerReport]) -> list[dict[str, str]]:
    sheet = []
    for i, example in enumerate(examples[:SAMPLES]):
        prompt, reference = prompt_and_reference(example)
        question = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        answers = {name: report.answers[i] for name, report in reports.items()}
        sheet.append({"prompt": question, "reference": reference, **answers})
    return sheet


def task_figures(found: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Metrics of all tasks with their standard errors, as plain numbers: `gsm8k, exact_match (strict-match)`."""
    figures = {}
    for task, metrics in found.items():
        for name, value in metrics.items():
            metric, _, kind = name.partition(",")
            if kind and isinstance(value, int | float):
                figures[f"{task}, {metric}{'' if kind == 'none' else f' ({kind})'}"] = float(value)
    return figures


def write_report(results: dict[str, Any], folder: Path) -> None:
    """`results.json` and `report.html` in a folder, which is made."""
    page, text = render(results), json.dumps(results, indent=1) + "\n"  # both, before anything is written
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(text)
    (folder / "report.html").write_text(page)
