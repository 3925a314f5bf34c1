"""How well a model says, before anything is written, where its answers will end: a table, a picture.

Purpose: seed of every length rule of decoding; a model that is wrong here wastes its canvas or cuts its answers off.
Trade-off: the place is judged, not the word: a model that says "end" everywhere has the word right at every place. Alternative: the rank of
the end token among all words at the true place, which such a model wins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from .. import UserError
from ..generation.config import DiffusionGenerationConfig
from ..generation.lengths import end_ids, end_metrics, end_probabilities
from ..objective.noise import (
    uniform,
)
from .answers import BATCH_SIZE, encode_prompts, prompt_and_reference

REVEALED = (0.0, 0.25, 0.5, 0.75)
COLUMNS = ("probability", "top1", "reciprocal_rank", "error", "over", "under")


@dataclass
class EndReport:
    """What was foreseen, by the share of the answer's tokens that were shown.

    Args:
        canvas: tokens of the canvas.
        examples: answers judged; those longer than the canvas are left out.
        table: share shown -> means: `probability` of an end at the true place, `top1` and `reciprocal_rank` of the true place among all
            places, `error` of the median length (absolute, in tokens), shares of answers foreseen too long (`over`) and too short (`under`).
        curves: (n, canvas) P(end <= place) of the first examples with nothing shown, and their true lengths.
    """

    canvas: int
    examples: int
    table: dict[float, dict[str, float]] = field(default_factory=dict)
    curves: list[tuple[list[float], int]] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"end foreseen at the first step, canvas of {self.canvas}, {self.examples} answers"]
        lines.append("shown   " + "".join(f"{name:>17}" for name in COLUMNS))
        for share, row in self.table.items():
            lines.append(f"{share:<8.0%}" + "".join(f"{row[name]:>17.3f}" for name in COLUMNS))
        return "\n".join(lines)


def foresee_ends(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[dict],
    canvas: int = 64,
    revealed: Sequence[float] = REVEALED,
    seed: int = 0,
) -> EndReport:
    """Asks a bidirectional model where answers end, on an empty canvas and with shares of the answer shown.

    Args:
        examples: of any trainable shape, see `evaluation.prompt_and_reference`.
        revealed: shares of the answer's tokens that are shown, the end token never; which ones is seeded.

    Raises:
        ValueError: no answer fits the canvas.
    """
    pairs = [prompt_and_reference(example) for example in examples]
    answers = [[*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id] for _, text in pairs]
    kept = [i for i, answer in enumerate(answers) if len(answer) <= canvas]
    if not kept:
        raise UserError(f"`canvas`={canvas}: every one of the {len(answers)} answers is longer; raise it.")
    settings = DiffusionGenerationConfig(eos_token_id=tokenizer.eos_token_id, mask_token_id=tokenizer.mask_token_id)
    report, device = EndReport(canvas, len(kept)), next(model.parameters()).device
    training = model.training
    model.eval()
    try:
        for share in revealed:
            parts = []
            for start in range(0, len(kept), BATCH_SIZE):
                rows = kept[start : start + BATCH_SIZE]
                batch = encode_prompts(tokenizer, [pairs[row][0] for row in rows])
                shown = _canvas([answers[row] for row in rows], torch.tensor(rows), canvas, share, seed, tokenizer)
                ids = torch.cat([batch["input_ids"], shown], -1).to(device)
                mask = torch.nn.functional.pad(batch["attention_mask"], (0, canvas), value=1).to(device)
                first = batch["input_ids"].shape[1]
                said = end_probabilities(model, ids, mask, first, end_ids(model, settings, device)).cpu()
                lengths = torch.tensor([len(answers[row]) for row in rows])
                parts.append(end_metrics(said, lengths))
                if share == 0 and start == 0:
                    report.curves = [(row.tolist(), int(n)) for row, n in zip(said[:8], lengths[:8], strict=True)]
            report.table[share] = _means(parts)
    finally:
        model.train(training)
    return report


def _canvas(
    answers: list[list[int]],
    rows: torch.Tensor,
    canvas: int,
    share: float,
    seed: int,
    tokenizer: PreTrainedTokenizerBase,
) -> torch.Tensor:
    """(B, canvas) masks, a share of the answers' tokens in their places."""
    ids = torch.full((len(answers), canvas), tokenizer.mask_token_id)
    for row, answer in enumerate(answers):
        ids[row, : len(answer) - 1] = torch.tensor(answer[:-1], dtype=torch.long)
    hidden = uniform(seed, rows[:, None], torch.arange(canvas)) >= share
    return ids.masked_fill(hidden, tokenizer.mask_token_id)


def _means(parts: list[dict[str, torch.Tensor]]) -> dict[str, float]:
    whole = {name: torch.cat([part[name] for part in parts]).float() for name in parts[0]}
    error = whole["error"]
    whole |= {"error": error.abs(), "over": (error > 0).float(), "under": (error < 0).float()}
    return {name: whole[name].mean().item() for name in COLUMNS}


def plot_ends(report: EndReport, path: Path) -> None:
    """Saves what was foreseen of single answers, and how it gets better as they are shown, as a PNG."""
    from matplotlib.figure import Figure  # slow to import, needed once; `Figure` alone touches no display

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for number, (curve, length) in enumerate(report.curves):
        left.plot(range(1, len(curve) + 1), curve, color=f"C{number}")
        left.axvline(length, color=f"C{number}", linestyle=":", linewidth=1)
    left.set(xlabel="tokens", ylabel="P(answer has ended)", title="Empty canvas (dotted: the true end)")
    shares = [100 * share for share in report.table]
    for name in ("top1", "probability", "reciprocal_rank"):
        right.plot(shares, [row[name] for row in report.table.values()], "o-", label=name.replace("_", " "))
    right.set(xlabel="answer shown, %", ylim=(0, 1.02), title="The true end")
    right.grid(alpha=0.3)
    right.legend()
    figure.savefig(path, dpi=120)
