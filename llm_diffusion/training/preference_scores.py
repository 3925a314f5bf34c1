"""Scores of whole texts, in the shape in which TRL's trainers read log-probabilities.

Trade-off: a table with a value for every token, so that the host can sum it, average it and mask it as it does with autoregressive
log-probabilities. Alternative: one number a text, which its supervised term could not use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from .scoring import Scores, score


@dataclass
class DiffusionScore:
    """Under the names of the host's fused head, each (R, L - 1) for the tokens behind the first.

    `log_probs` sum to a row's score, in nats; `entropy` and `mean_logits` are averages over noise levels; `is_top1` is true where the
    model was right in more than half of the draws that asked it. `n_draws` is how many forwards it took.
    """

    log_probs: torch.Tensor
    entropy: torch.Tensor
    mean_logits: torch.Tensor
    is_top1: torch.Tensor
    n_draws: int


def score_draw(
    model: torch.nn.Module, inputs: dict[str, Any], noisy: dict[str, Any]
) -> tuple[torch.Tensor, Scores, Callable[[torch.Tensor], torch.Tensor]]:
    """w_i log p(x_i | visible) of every token of every row under one draw.

    Args:
        model: called with `inputs`; `add_row_scores` has seen it.
        noisy: what the collator laid out: `targets`, `weights`, `tokens` (R, M), `masked` (R, L).

    Returns:
        (R, L) fp32, 0 where nothing was asked; what the model said; and what puts values of asked tokens, (n,), in their places (R, L).
    """
    scores = score(model, inputs, noisy["targets"])
    empty = torch.zeros(noisy["masked"].shape, device=noisy["masked"].device)
    place = (scores.at[0], noisy["tokens"][scores.at])

    def table(values: torch.Tensor) -> torch.Tensor:
        return empty.index_put(place, values.float(), accumulate=True)

    return table(-scores.nll * noisy["weights"][scores.at]), scores, table


def compute_diffusion_score(
    model: torch.nn.Module,
    draws: Iterable[dict[str, Any]],
    inputs: Callable[[dict[str, Any]], dict[str, Any]] = lambda noisy: noisy["inputs"],
) -> DiffusionScore:
    """The score of every row of a batch: the mean over draws, one forward each.

    Args:
        model: a diffusion model that `add_row_scores` has seen, bare or wrapped.
        draws: of `DataCollatorForDiffusionPreference.corrupt`, whose `score` decides what is estimated: -NELBO, or the log-likelihood
            along one denoising trajectory.
        inputs: makes the model's keywords of what the collator laid out.
    """
    sums: dict[str, Any] = {"log_probs": 0.0, "entropy": 0.0, "mean_logits": 0.0, "right": 0.0}
    n_draws = 0
    for noisy in draws:
        n_draws += 1
        log_probs, scores, table = score_draw(model, inputs(noisy), noisy)
        weights = noisy["weights"][scores.at]
        new = {"log_probs": log_probs, "right": table(2.0 * scores.right - 1)}
        new |= {name: table(getattr(scores, name) * weights) for name in ("entropy", "mean_logits")}
        sums = {name: sums[name] + value for name, value in new.items()}
    mean = {name: sums[name][:, 1:] / n_draws for name in ("log_probs", "entropy", "mean_logits")}
    return DiffusionScore(**mean, is_top1=sums["right"][:, 1:] > 0, n_draws=n_draws)
