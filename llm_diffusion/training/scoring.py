"""What a model predicts at the targets of noisy rows, the scores of whole texts, and the metrics of a logging period.

Only hidden states with a target meet the vocabulary: a few at a time, or, where a teacher needs their logits, all at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel

from ..models.lm_head import scores_of_logits
from ..objective.modes import IGNORE_INDEX
from ..speculative.training import draft_logits
from .distillation import head_inputs, positions_mask, without_mask_token


@dataclass
class Scores:
    """What the model predicts at n targets: which hidden states have one (B, M), NLL, whether the best guess was right, entropy (n,)."""

    keep: torch.Tensor
    nll: torch.Tensor
    right: torch.Tensor
    entropy: torch.Tensor
    at: tuple[torch.Tensor, ...]  # rows and places of these, (n,) each
    logits: torch.Tensor | None = None  # (n, V)
    hidden: torch.Tensor | None = None  # (n, D), inputs of the head
    teacher: torch.Tensor | None = None  # (n, V) logits of the AR model, where it ran already
    mean_logits: torch.Tensor | None = None  # (n,), where TRL's metrics want it


def _scores(keep: torch.Tensor, logits: torch.Tensor, targets: torch.Tensor) -> Scores:
    return Scores(keep, at=keep.nonzero(as_tuple=True), **scores_of_logits(logits, targets))


def score(model: torch.nn.Module, inputs: dict[str, Any], targets: torch.Tensor, with_teacher: bool = False) -> Scores:
    """What `model(**inputs)` predicts at `targets` (B, M), -100 where there is none; `with_teacher` keeps its logits and hidden states.

    `model`: one that `add_row_scores` has seen, bare or wrapped.
    """
    keep = targets != IGNORE_INDEX
    if not with_teacher:
        return Scores(keep, **model(**inputs, score_targets=targets))
    with head_inputs(model) as caught:
        logits = model(**inputs, logits_to_keep=keep).logits
    scores = _scores(keep, logits, targets[keep])
    scores.logits = logits
    scores.hidden = caught[-1] if caught[-1].dim() == 2 else caught[-1][keep]
    return scores


def score_drafts(
    model: torch.nn.Module,
    adapted: PeftModel,
    inputs: dict[str, Any],
    noisy: dict[str, Any],
    with_teacher: bool = False,
) -> Scores:
    """As `score`, the clean half through the base, whose prediction of every target comes with it.

    Args:
        model: called; `adapted` or a wrapper of it.
        inputs: of the noisy and the clean half, see `draft_logits`.
        noisy: what `corrupt` made: `targets` and `tokens` (B, N + L), `masked` (B, L).
    """
    keep, wanted, place = noisy["targets"] != IGNORE_INDEX, None, None
    if with_teacher:
        wanted, place = positions_mask(noisy["masked"], keep.nonzero()[:, 0], noisy["tokens"][keep] - 1)
    logits, base_logits = draft_logits(model, adapted, inputs, noisy["masked"].shape[1], keep, wanted)
    scores = _scores(keep, logits, noisy["targets"][keep])
    if with_teacher:
        scores.logits, scores.teacher = logits, without_mask_token(base_logits[place], adapted)
    return scores


@dataclass
class DiffusionScore:
    """Under the names of TRL's fused head, each (R, L - 1) for the tokens behind the first.

    `log_probs` sum to a row's score, in nats; `entropy` and `mean_logits` are averages over noise levels; `is_top1` is true where the
    model was right in more than half of the draws that scored it. `n_draws` is how many forwards it took; `n_scored` (R,)
    counts a row's scored tokens.
    """

    log_probs: torch.Tensor
    entropy: torch.Tensor
    mean_logits: torch.Tensor
    is_top1: torch.Tensor
    n_draws: int
    n_scored: torch.Tensor


def score_draw(
    model: torch.nn.Module, inputs: dict[str, Any], noisy: dict[str, Any]
) -> tuple[torch.Tensor, Scores, Callable[[torch.Tensor], torch.Tensor]]:
    """w_i log p(x_i | visible) of every token of every row under one draw.

    Args:
        model: called with `inputs`; `add_row_scores` has seen it.
        noisy: what the collator laid out: `targets`, `weights`, `tokens` (R, M), `masked` (R, L).

    Returns:
        (R, L) fp32, 0 where nothing was scored; what the model predicts; and what puts values of scored tokens, (n,), in their places (R, L).
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
    return DiffusionScore(**mean, is_top1=sums["right"][:, 1:] > 0, n_draws=n_draws, n_scored=noisy["n_scored"])


LEVELS = ("low", "middle", "high")  # thirds of the mask probability


def by_level(terms: torch.Tensor, levels: torch.Tensor) -> dict[str, torch.Tensor]:
    """Sum and count of the NLL in each third of the noise, (n,) each; what was read from clean text has none."""
    third = torch.where(levels > 0, (levels * len(LEVELS)).long().clamp(max=len(LEVELS) - 1), -1)
    sums = {f"nll_{name}": (terms * (third == i)).sum() for i, name in enumerate(LEVELS)}
    return sums | {f"n_{name}": (third == i).sum() for i, name in enumerate(LEVELS)}


def metric_values(sums: dict[str, float], bounded: bool) -> dict[str, float]:
    """Metrics by name; those that nothing was counted for are left out.

    Args:
        sums: what the trainer added up, over all processes.
        bounded: whether the terms make a bound on the text's NLL; those of a drafter, of whole blocks, do not.
    """
    ratios = {
        "nelbo": ("nll", "maskable"),
        "masked_accuracy": ("right", "scored"),
        "masked_nll": ("terms", "scored"),
        "masked_entropy": ("entropy", "scored"),
        "mask_ratio": ("masked", "maskable"),
        **{f"masked_nll_{name}_noise": (f"nll_{name}", f"n_{name}") for name in LEVELS},
        "distillation_loss": ("distillation", "from_teacher"),
        "teacher_ratio": ("from_teacher", "targets"),
        "accepted_length": ("accepted", "blocks"),
    }
    values = {name: sums[over] / sums[under] for name, (over, under) in ratios.items() if sums.get(under)}
    own = {"entropy": "masked_entropy", "mean_token_accuracy": "masked_accuracy"}
    values |= {theirs: values[ours] for theirs, ours in own.items() if ours in values}  # by TRL's names too
    if not bounded:
        values.pop("nelbo", None)
    if "nelbo" in values:
        values["perplexity_bound"] = math.exp(min(values["nelbo"], 700.0))
    return values
