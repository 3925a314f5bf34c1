"""Models side by side, each decoded from left to right and by unmasking; the first one, from left to right, judges the answers.

Low figures alone prove little: text that repeats itself is likely too.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from ..generation.inference import DiffusionInference, continue_autoregressive
from ..models.loading import autoregressive_base, load_autoregressive

# Decoding settings that both pipelines know; the others are of unmasking alone.
SHARED_SETTINGS = ("max_new_tokens", "do_sample", "temperature", "top_k", "top_p", "repetition_penalty", "seed")


@dataclass
class Continuations:
    """What one model answers by one pipeline; tokens per forward are the mean over answers, 1 from left to right."""

    model: str
    pipeline: str
    texts: list[str] = field(default_factory=list)
    tokens_per_forward: float = 1.0
    seconds: float = 0.0
    nll_per_token: float = float("inf")  # under the judge, prompts given


def side_by_side(
    models: list[str],
    prompts: list[str],
    load: Callable[[str], DiffusionInference],
    settings: dict[str, Any],
    chat: bool = False,
) -> list[Continuations]:
    """Every model by both pipelines.

    Args:
        models: hub names or folders, of AR or diffusion models.
        load: of a name, how it is decoded by unmasking.
        settings: left to right takes those of `SHARED_SETTINGS`.
        chat: whether the prompts are questions, to be put by every model's chat template.
    """
    shared = {name: value for name, value in settings.items() if name in SHARED_SETTINGS}
    judge, judges_tokenizer = load_autoregressive(autoregressive_base(models[0]))
    rows = []
    for number, name in enumerate(models):
        base = autoregressive_base(name)
        model, tokenizer = (judge, judges_tokenizer) if number == 0 else load_autoregressive(base)
        started = time.perf_counter()
        texts = continue_autoregressive(model, tokenizer, templated(prompts, tokenizer, chat), **shared)
        rows.append(Continuations(name, "arm", texts, seconds=time.perf_counter() - started))
        inference = load(name)
        rows.append(_by_diffusion(name, inference, templated(prompts, inference.tokenizer, chat)))
    prompts = templated(prompts, judges_tokenizer, chat)
    for row in rows:
        row.nll_per_token = nll_per_token(judge, judges_tokenizer, prompts, row.texts)
    return rows


def templated(prompts: list[str], tokenizer: PreTrainedTokenizerBase, chat: bool) -> list[str]:
    """The prompts as they are, or as questions in a conversation."""
    if not chat:
        return prompts
    turns = ([{"role": "user", "content": prompt}] for prompt in prompts)
    return [tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True) for turn in turns]


def _by_diffusion(name: str, inference: DiffusionInference, prompts: list[str]) -> Continuations:
    started = time.perf_counter()
    batch = inference.tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt").to(inference.device)
    output = inference.model.generate(**batch, **{**inference.settings, "return_dict_in_generate": True})
    answers = output.sequences[:, batch["input_ids"].shape[1] :]
    texts = inference.tokenizer.batch_decode(answers, skip_special_tokens=True)
    per_forward = output.tokens_per_forward.float().mean().item()
    return Continuations(name, "diffusion", texts, per_forward, time.perf_counter() - started)


@torch.no_grad()
def nll_per_token(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, prompts: list[str], answers: list[str]
) -> float:
    """Nats a token that a causal model needs for the answers, prompts given; infinite if all answers are empty."""
    total, count = 0.0, 0
    for prompt, answer in zip(prompts, answers, strict=True):
        start = tokenizer(prompt)["input_ids"]
        ids = torch.tensor([start + tokenizer(answer, add_special_tokens=False)["input_ids"]], device=model.device)
        logits = model(input_ids=ids).logits[0, len(start) - 1 : -1].float()
        total += torch.nn.functional.cross_entropy(logits, ids[0, len(start) :], reduction="sum").item()
        count += ids.shape[1] - len(start)
    return total / count if count else float("inf")


def show_side_by_side(console: Console, rows: list[Continuations], prompts: list[str]) -> None:
    """A table of the figures, and the answers below each prompt."""
    table = Table(title=f"{len(prompts)} text(s) continued")
    for column in ("model", "pipeline", "nats/token, judged by the first", "tokens/forward", "seconds"):
        table.add_column(column, justify="left" if column in ("model", "pipeline") else "right")
    for row in rows:
        judged = f"{row.nll_per_token:.2f}" if any(row.texts) else "empty"
        table.add_row(row.model, row.pipeline, judged, f"{row.tokens_per_forward:.2f}", f"{row.seconds:.1f}")
    console.print(table)
    for number, prompt in enumerate(prompts):
        console.print(f"\n{prompt!r}", style="bold", markup=False)
        for row in rows:
            console.print(f"  {row.model}, {row.pipeline}: {row.texts[number]!r}", markup=False, soft_wrap=True)
