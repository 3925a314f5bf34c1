"""Looks inside a converted model: is its confidence deserved, do its answers end where they should, how does an answer form.

Trade-off: calibration is measured on references under the noise of training, where what is right is known, not on the model's own
drafts. Alternative: grading drafts, which mixes the confidence of a token with the errors before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from ..generation.generate import generate
from ..models.patching import base_of
from ..models.sampling import BANNED
from ..objective.modes import IGNORE_INDEX
from .answers import AnswerReport, encode_prompts, prompt_and_reference
from .likelihood import (
    in_batches,
    kept_logits,
    padded,
    plain_collator,
)
from .windows import Row, pair_row

BINS = 10


@dataclass
class Calibration:
    """How often tokens of a given confidence are right.

    Args:
        bins: (mean confidence, share that was right, tokens) of every tenth of the confidence that has tokens, rising.
        error: expected calibration error, mean over tokens of |confidence - accuracy| of their bin.
    """

    bins: list[tuple[float, float, int]]
    error: float


def reference_rows(tokenizer: PreTrainedTokenizerBase, examples: Sequence[dict], max_length: int) -> list[Row]:
    """References behind their prompts, with the end token of the answer; rows that are too long keep their ends."""
    rows = []
    for number, example in enumerate(examples):
        row = pair_row(tokenizer, *prompt_and_reference(example), number)
        ids = (*row.ids, tokenizer.eos_token_id)[-max_length:]
        rows.append(Row(ids, max(1, len(ids) - (len(row.ids) + 1 - row.first)), number))
    return rows


@torch.no_grad()
def calibration(
    model: torch.nn.Module, rows: Sequence[Row], *, n_draws: int = 4, batch_size: int = 16, seed: int = 0
) -> Calibration:
    """Confidence in the best token against whether it is the reference's, over masked tokens at all noise levels.

    Args:
        n_draws: of noise, a row each; the same noise in every call.

    References: expected calibration error (arXiv 1706.04599, section 2).
    """
    collator, found = plain_collator(model), torch.zeros(3, BINS, dtype=torch.float64)
    training = model.training
    model.eval()
    try:
        for batch in in_batches(rows, batch_size):
            clean = {name: value.to(base_of(model).device) for name, value in padded(batch, collator).items()}
            for number in range(n_draws):
                noisy = collator.corrupt(clean, seed=seed, step=number)
                keep = (noisy["targets"] != IGNORE_INDEX) & (noisy["levels"] > 0)
                logits = kept_logits(model, noisy["inputs"], keep).float()
                logits[:, collator.record.mask_token_id] = BANNED  # never proposed
                confidence, best = logits.softmax(-1).double().max(-1)
                right = (best == noisy["targets"][keep]).double()
                index = (confidence * BINS).long().clamp(max=BINS - 1).cpu()
                found.index_add_(1, index, torch.stack([confidence, right, torch.ones_like(right)]).cpu())
    finally:
        model.train(training)
    bins = [(float(c / n), float(r / n), int(n)) for c, r, n in found.T if n]
    total = sum(n for _, _, n in bins)
    return Calibration(bins, sum(abs(c - r) * n for c, r, n in bins) / max(total, 1))


def eos_positions(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[dict], report: AnswerReport
) -> dict[str, object]:
    """Where answers end beside where their references do, in tokens with the end token.

    Returns:
        `pairs`, a list of (reference, answer), the answer's None where it did not end; `accuracy`, percent of answers that end exactly
        where the reference does; `ended`, percent that end at all.
    """
    pairs = []
    for example, length, ended in zip(examples, report.tokens, report.ended, strict=True):
        row = pair_row(tokenizer, *prompt_and_reference(example))
        pairs.append((len(row.ids) - row.first + 1, length if ended else None))
    n = max(len(pairs), 1)
    return {
        "pairs": pairs,
        "accuracy": 100 * sum(a == b for a, b in pairs) / n,
        "ended": 100 * sum(b is not None for _, b in pairs) / n,
    }


def denoising_trace(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, example: dict, settings: dict
) -> list[list[tuple[str, str]]]:
    """One answer after every step: words with their state, "mask", "new" (committed in this step) or "old"."""
    batch = encode_prompts(tokenizer, [prompt_and_reference(example)[0]]).to(base_of(model).device)
    start, mask = batch["input_ids"].shape[1], tokenizer.mask_token_id
    output = generate(model, **batch, **{**settings, "output_history": True, "return_dict_in_generate": True})
    steps, before = [], torch.full_like(output.history[0], mask) if output.history else None
    for canvas in output.history or []:
        words = []
        for place in range(start, output.sequences.shape[1]):
            token = int(canvas[0, place])
            state = "mask" if token == mask else "new" if int(before[0, place]) != token else "old"
            words.append(("_" if state == "mask" else tokenizer.decode([token]).replace("\n", " / "), state))
        steps.append(words)
        before = canvas
    return steps
