"""What a model says to the targets of noisy rows: their likelihood, and what metrics and teachers want beside it.

Only rows with a target meet the vocabulary. Trade-off: two ways, one that takes them a few at a time and one that keeps the logits of
the targets, which teachers need. Alternative: full logits, (B, M, V), which are what memory is spent on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel

from ..models.lm_head import scores_of_logits
from ..objective.modes import IGNORE_INDEX
from ..speculative.training import draft_logits
from .distillation import asked, head_inputs, unsaid


@dataclass
class Scores:
    """What the model says to n targets: which hidden states have one (B, M), NLL, whether the best guess was right, entropy (n,)."""

    keep: torch.Tensor
    nll: torch.Tensor
    right: torch.Tensor
    entropy: torch.Tensor
    at: tuple[torch.Tensor, ...]  # rows and places of these, (n,) each
    logits: torch.Tensor | None = None  # (n, V)
    hidden: torch.Tensor | None = None  # (n, D), inputs of the head
    teacher: torch.Tensor | None = None  # (n, V) logits of the AR model, where it was heard already
    mean_logits: torch.Tensor | None = None  # (n,), where the host's metrics want it


def _scores(keep: torch.Tensor, logits: torch.Tensor, targets: torch.Tensor) -> Scores:
    return Scores(keep, at=keep.nonzero(as_tuple=True), **scores_of_logits(logits, targets))


def score(model: torch.nn.Module, inputs: dict[str, Any], targets: torch.Tensor, with_teacher: bool = False) -> Scores:
    """What `model(**inputs)` says to `targets` (B, M), -100 where there is none; `with_teacher` keeps its logits and hidden states.

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
    """As `score`, the clean half through the base, whose word on every target comes with it.

    Args:
        model: called; `adapted` or a wrapper of it.
        inputs: of the noisy and the clean half, see `draft_logits`.
        noisy: what `corrupt` made: `targets` and `tokens` (B, N + L), `masked` (B, L).
    """
    keep, wanted, place = noisy["targets"] != IGNORE_INDEX, None, None
    if with_teacher:
        wanted, place = asked(noisy["masked"], keep.nonzero()[:, 0], noisy["tokens"][keep] - 1)
    logits, said = draft_logits(model, adapted, inputs, noisy["masked"].shape[1], keep, wanted)
    scores = _scores(keep, logits, noisy["targets"][keep])
    if with_teacher:
        scores.logits, scores.teacher = logits, unsaid(said[place], adapted)
    return scores
