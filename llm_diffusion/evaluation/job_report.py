"""What the main job shows at its end: tables, sample answers, one answer as it forms, and how to load the result."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from loguru import logger
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from ..config import HyperParameters
from ..generation.config import decoding_settings
from ..generation.inference import continue_autoregressive
from ..models.decoding_defaults import RULES
from ..models.record import record_of
from .answers import AnswerReport, evaluate_answers, prompt_and_reference
from .metrics import denoising_trace, foresee_ends, plot_ends


def decoding(hp: HyperParameters, model: torch.nn.Module) -> dict[str, Any]:
    """The job's settings over the model's own; `diffusion_steps` are those of a block, unless another rule is set."""
    chosen, own_block = dict(hp.generation), record_of(model).block_length
    if own_block:
        chosen.pop("block_length", None)
    settings = decoding_settings(model, chosen)
    if hp.diffusion_steps and all(chosen.get(rule) is None for rule in RULES):
        block = own_block or settings.get("block_length") or settings["max_new_tokens"]
        steps = hp.diffusion_steps * -(-settings["max_new_tokens"] // block)
        settings = decoding_settings(model, {**chosen, "steps": steps})
    return settings


def show(
    hp: HyperParameters,
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    samples: list[dict],
    reports: dict[str, AnswerReport],
    histories: dict[str, list[dict]],
    final: Path,
    seconds: float,
) -> None:
    """The end of the job: tables, sample answers, one answer as it forms, and how to load the result."""
    console = Console(width=None if sys.stdout.isatty() else 110, highlight=False)
    console.print(training_table(histories, model))
    if reports:
        first, *_, last = reports.values()
        console.print(answers_table(reports))
        if last.accepted:
            console.print(accepted_table(last.accepted))
    settings = decoding(hp, model)
    answers = evaluate_answers(model, tokenizer, samples, **settings).answers
    for example, answer in zip(samples, answers, strict=True):
        prompt, reference = prompt_and_reference(example)
        question = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        for label, text in (("prompt", question), ("answer", answer), ("reference", reference)):
            console.print(f"{label:>9}  ", end="", style="bold")
            console.print(" / ".join(text.strip().splitlines()) or "(empty)", markup=False)
        console.print()
    show_denoising(console, model, tokenizer, samples[0], settings)
    console.print(f"loss curve: {final.parent / 'loss.png'}; done in {seconds:.0f} s. Load the result:\n", markup=False)
    quantized = ', quantization="nf4"' if hp.use_qlora else ""
    call = f'DiffusionInference.from_pretrained("{final}"{quantized})'
    console.print(f"    inference = llm_diffusion.{call}", markup=False, soft_wrap=True)
    console.print('    print(inference.chat([{"role": "user", "content": "…"}]))', markup=False)


def training_table(histories: dict[str, list[dict]], model: torch.nn.Module) -> Table:
    """Steps, seconds, held-out bound of every phase; of preferences the share of held-out pairs in which the chosen one gained more."""
    table = Table(title=f"Training: {record_of(model).training_tokens:,} tokens")
    prefers = any("eval_rewards/accuracies" in row for history in histories.values() for row in history)
    for column in ("phase", "steps", "seconds", "nats/token", "held-out nats/token", *["preferred"] * prefers):
        table.add_column(column, justify="left" if column == "phase" else "right")
    for phase, history in histories.items():
        last = {name: row[name] for row in history for name in row}
        # What a drafter predicts of whole blocks bounds nothing; its loss is shown.
        figures = [last.get(f"{kind}nelbo", last.get(f"{kind}masked_nll")) for kind in ("", "eval_")]
        cells = ["-" if figure is None else f"{figure:.3f}" for figure in figures]
        if prefers:
            share = last.get("eval_rewards/accuracies")
            cells.append("-" if share is None else f"{100 * share:.0f} %")
        table.add_row(phase, str(last["step"]), f"{last['train_runtime']:.0f}", *cells)
    return table


def answers_table(reports: dict[str, AnswerReport]) -> Table:
    """Exact match of every model by kind of task, and what the last one keeps of the first one's."""
    first, *_, last = all_reports = list(reports.values())
    table = Table(title=f"Exact match on {len(first.answers)} held-out prompts, %")
    for column in ("kind of task", *reports, "kept"):
        table.add_column(column, justify="left" if column == "kind of task" else "right")

    def add_row(name: str, figures: list[float]) -> None:
        kept = f"{100 * figures[-1] / figures[0]:.0f} %" if figures[0] else "-"
        table.add_row(name, *(f"{figure:.1f}" for figure in figures), kept)

    for kind in first.exact_match:
        add_row(kind, [report.exact_match[kind] for report in all_reports])
    table.add_section()
    add_row("mean", [report.mean for report in all_reports])
    table.add_section()
    table.add_row("tokens per forward", *(f"{report.tokens_per_forward:.2f}" for report in all_reports), "")
    table.add_row("seconds", *(f"{report.seconds:.1f}" for report in all_reports), "")
    if last.accepted:
        same = sum(a == b for a, b in zip(first.answers, last.answers, strict=True))
        table.add_row("same answers as the base", "", f"{same} of {len(first.answers)}", "")
    return table


def accepted_table(accepted: dict[int, int]) -> Table:
    """Tokens that a verification yielded, as a histogram."""
    table, total = Table(title="Tokens that a verified draft yielded"), sum(accepted.values())
    for column in ("tokens", "share", ""):
        table.add_column(column, justify="left" if not column else "right")
    for tokens, count in accepted.items():
        table.add_row(str(tokens), f"{100 * count / total:.0f} %", "█" * round(40 * count / total))
    return table


def show_denoising(
    console: Console, model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, example: dict, settings: dict
) -> None:
    """One answer after every step: masks grey, tokens committed in this step green."""
    console.print("one answer as it is denoised, step by step:", style="bold")
    styles = {"mask": "bright_black", "new": "bold green", "old": ""}
    for step, words in enumerate(denoising_trace(model, tokenizer, example, settings), start=1):
        line = Text(f"{step:>4}  ")
        for word, state in words:
            line.append(word, style=styles[state])
        console.print(line, soft_wrap=True)
    console.print()


def show_ends(
    arguments: Sequence[Any],
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: list[dict],
    picture: Path,
) -> None:
    """Where the model predicts the ends of held-out answers, if a stage trained it to (`max_canvas`)."""
    canvases = [getattr(stage, "max_canvas", None) for stage in arguments]
    canvas = max((size for size in canvases if size is not None), default=None)
    if canvas is not None:
        report = foresee_ends(model, tokenizer, examples, canvas)
        plot_ends(report, picture)
        print(f"{report}\npicture: {picture}\n")


def show_autoregressive(hp: HyperParameters, load: Callable[[], Any], histories: dict[str, list[dict]]) -> None:
    """The end of the job from left to right: held-out perplexity of every stage, and the continuations of `prompts`."""
    for stage, history in histories.items():
        losses = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
        if losses:
            logger.info(f"{stage}: {losses[-1]:.3f} nats a held-out token, perplexity {math.exp(losses[-1]):.2f}")
    if hp.prompts:
        for answer in continue_autoregressive(*load(), hp.prompts, **hp.generation):
            logger.info(f"continued: {answer!r}")
