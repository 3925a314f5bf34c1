"""The command `evaluate`: loads what is named, checks it before anything long begins, measures, writes the report.

Trade-off: settings that only need reading are checked before a model is loaded, a judge is asked once before it is needed. Alternative: an
error after hours of answering.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from loguru import logger
from transformers import PreTrainedTokenizerBase

from .. import UserError
from ..config import read_mapping
from ..data.datasets import PLAIN_CHAT_TEMPLATE, load_examples
from ..generation.config import DiffusionGenerationConfig
from ..generation.inference import default_decoding
from ..models.loading import load_diffusion_model
from ..objective.estimators import REPLICATES, check_estimator
from ..reasoning.judge import LLMJudge
from ..reasoning.problems import load_records
from .answer_tables import as_example
from .processes import place
from .report import evaluate, load_harness, write_report
from .speed import grid


def read_texts(name: str, limit: int | None) -> list[str]:
    """A text file as one text, or the `text` of every line of a JSONL file.

    Raises:
        ValueError, OSError: no such file, or nothing in it.
    """
    path = Path(name).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"`--text`: {name!r} is not a file.")
    if path.suffix != ".jsonl":
        return [path.read_text()]
    examples = load_examples(name, limit)
    if "text" not in examples[0]:
        raise UserError(f"`--text`: {name!r} has no `text` in its lines, but {sorted(examples[0])}.")
    return [example["text"] for example in examples]


def read_prompts(name: str, limit: int | None) -> list[dict]:
    """Examples of a trainable shape, or records of any form that `problems` reads (GSM8K, countdown …).

    Raises:
        ValueError, OSError: nothing there, or nothing in it that can be asked.
    """
    first = load_records(name, 1, "test")[0]
    return load_examples(name, limit) if as_example(first) is first else load_records(name, limit, "test")


def _judge(url: str, model: str | None, first: bool) -> LLMJudge:
    judge = LLMJudge(url, model or "")
    if first:
        judge("What is 1 + 1?", "1+1=2.\n#### 2", "#### 2")  # nobody there is found out now, not after the answers
    return judge


def _loaded(name: str, trust_remote_code: bool) -> tuple[torch.nn.Module, PreTrainedTokenizerBase]:
    model, tokenizer = load_diffusion_model(name, trust_remote_code=trust_remote_code)
    if tokenizer.chat_template is None:
        tokenizer.chat_template = PLAIN_CHAT_TEMPLATE
    return model, tokenizer


def run(
    name: str,
    folder: Path,
    *,
    tasks: str = "",
    data: str | None = None,
    limit: int | None = None,
    text: str | None = None,
    prompts: str | None = None,
    sweep: str | None = None,
    settings: str = "{}",
    base: str | None = None,
    judge: str | None = None,
    judge_model: str | None = None,
    samples: int = 128,
    trust_remote_code: bool = False,
    **options: Any,
) -> bool:
    """The command: loads what is named, measures, writes the report. Arguments as on the command line.

    Returns:
        Whether this is the process that wrote it, the first one.
    """
    names = [task.strip() for task in tasks.split(",") if task.strip()]
    chosen = read_mapping(settings, "--settings")
    DiffusionGenerationConfig(**chosen)
    axes = None if sweep is None else read_mapping(sweep, "--sweep")
    for point in grid(axes or {}):
        DiffusionGenerationConfig(**chosen | point)
    check_estimator(options["estimator"], samples, REPLICATES)
    texts = read_texts(text, limit) if text else []
    examples = read_prompts(prompts, limit) if prompts else []
    if not (names or texts or examples):
        raise UserError("nothing to measure: give `--tasks`, `--text` or `--prompts`.")
    if names:
        harness = load_harness()  # before the model is
        if data:
            harness.local_tasks(Path(data).expanduser())
    first = place()[0] == 0
    if not first:
        logger.remove()
    asked = _judge(judge, judge_model, first) if judge else None
    model, tokenizer = _loaded(name, trust_remote_code)
    beside = _loaded(base, trust_remote_code) if base else None
    decoding = default_decoding(model, chosen)
    if "max_new_tokens" not in chosen:
        del decoding["max_new_tokens"]  # tasks have their own
    results = evaluate(
        model,
        tokenizer,
        texts=texts,
        examples=examples,
        tasks=names,
        data=data,
        limit=limit,
        decoding=decoding,
        axes=axes,
        base=beside,
        n_samples=samples,
        judge=asked,
        split=True,
        progress=first,
        **options,
    )
    if not first:
        return False
    given = {"model": name, "base": base, "text": text, "prompts": prompts, "judge": judge, "judge_model": judge_model}
    results["settings"] = given | results["settings"]
    write_report(results, folder)
    for title, figures in results["models"].items():
        for kind in ("likelihood", "answers", "tasks"):
            for metric, value in figures.get(kind, {}).items():
                logger.info(f"{title:>16}  {metric}: {value if isinstance(value, str) else format(value, '.4g')}")
    return True
