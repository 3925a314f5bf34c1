"""What the main job shows at its end: tables, sample answers, one answer as it forms, and how to load the result.

Trade-off: rich tables on a terminal and the same, without control characters, in a log. Alternative: a tracker, for those who ask
for one.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from ..config import HyperParameters
from ..models.record import record_of
from .answers import AnswerReport, evaluate_answers, prompt_and_reference
from .metrics import denoising_trace


def decoding(hp: HyperParameters, model: torch.nn.Module) -> dict[str, Any]:
    """Decoding settings; `diffusion_steps` are the steps of a block unless a threshold decides."""
    settings, own_block = dict(hp.generation), record_of(model).block_length
    if own_block:
        settings["block_length"] = own_block
    if settings.get("threshold") is None and "steps" not in settings:
        block = settings.get("block_length") or settings["max_new_tokens"]
        settings["steps"] = hp.diffusion_steps * -(-settings["max_new_tokens"] // block)
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
    """The end of the job: table, sample answers, one answer as it forms, and how to load the result."""
    console = Console(width=None if sys.stdout.isatty() else 110, highlight=False)
    console.print(training_table(histories, model))
    if reports:
        first, *others = reports.values()
        converted = others[-1]
        table = Table(title=f"Exact match on {len(first.answers)} held-out prompts, %")
        for column in ("kind of task", *reports, "kept"):
            table.add_column(column, justify="left" if column == "kind of task" else "right")
        for kind in first.exact_match:
            add_row(table, kind, [report.exact_match[kind] for report in reports.values()])
        table.add_section()
        add_row(table, "mean", [report.mean for report in reports.values()])
        table.add_section()
        speeds, times = (
            [f"{getattr(r, name):.{n}f}" for r in reports.values()]
            for name, n in (("tokens_per_forward", 2), ("seconds", 1))
        )
        table.add_row("tokens per forward", *speeds, "")
        table.add_row("seconds", *times, "")
        if converted.accepted:
            same = sum(a == b for a, b in zip(first.answers, converted.answers, strict=True))
            table.add_row("same answers as the base", "", f"{same} of {len(first.answers)}", "")
        console.print(table)
        if converted.accepted:
            console.print(accepted_table(converted.accepted))
    report = evaluate_answers(model, tokenizer, samples, **decoding(hp, model))
    for example, answer in zip(samples, report.answers, strict=True):
        prompt, reference = prompt_and_reference(example)
        question = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        for label, text in (("prompt", question), ("answer", answer), ("reference", reference)):
            console.print(f"{label:>9}  ", end="", style="bold")
            console.print(" / ".join(text.strip().splitlines()) or "(empty)", markup=False)
        console.print()
    show_denoising(console, model, tokenizer, samples[0], decoding(hp, model))
    console.print(f"loss curve: {final.parent / 'loss.png'}; done in {seconds:.0f} s. Load the result:\n", markup=False)
    quantized = ', quantization="nf4"' if hp.use_qlora else ""
    call = f'DiffusionInference.from_pretrained("{final}"{quantized})'
    console.print(f"    inference = llm_diffusion.{call}", markup=False, soft_wrap=True)
    console.print('    print(inference.chat([{"role": "user", "content": "…"}]))', markup=False)


def training_table(histories: dict[str, list[dict]], model: torch.nn.Module) -> Any:
    """Steps, seconds, held-out bound of every phase; of preferences the share of held-out pairs in which the chosen one gained more."""
    table = Table(title=f"Training: {record_of(model).training_tokens:,} tokens")
    prefers = any("eval_rewards/accuracies" in row for history in histories.values() for row in history)
    for column in ("phase", "steps", "seconds", "nats/token", "held-out nats/token", *["preferred"] * prefers):
        table.add_column(column, justify="left" if column == "phase" else "right")
    for phase, history in histories.items():
        last = {name: row[name] for row in history for name in row}
        # What a drafter says to whole blocks bounds nothing; its loss is shown.
        last = {
            **{f"{kind}nelbo": last[f"{kind}masked_nll"] for kind in ("", "eval_") if f"{kind}masked_nll" in last},
            **last,
        }
        figures = [f"{last[name]:.3f}" if name in last else "-" for name in ("nelbo", "eval_nelbo")]
        if prefers:
            share = last.get("eval_rewards/accuracies")
            figures.append("-" if share is None else f"{100 * share:.0f} %")
        table.add_row(phase, str(last["step"]), f"{last['train_runtime']:.0f}", *figures)
    return table


def accepted_table(accepted: dict[int, int]) -> Any:
    """Tokens that a verification yielded, as a histogram."""
    table, total = Table(title="Tokens that a verified draft yielded"), sum(accepted.values())
    for column in ("tokens", "share", ""):
        table.add_column(column, justify="left" if not column else "right")
    for tokens, count in accepted.items():
        table.add_row(str(tokens), f"{100 * count / total:.0f} %", "█" * round(40 * count / total))
    return table


def add_row(table: Any, name: str, figures: list[float]) -> None:
    """The figures of all models, and what the last one keeps of the first one's."""
    kept = f"{100 * figures[-1] / figures[0]:.0f} %" if figures[0] else "-"
    table.add_row(name, *(f"{figure:.1f}" for figure in figures), kept)


def show_denoising(
    console: Any, model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, example: dict, settings: dict
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
