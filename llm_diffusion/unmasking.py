"""Commit rules: given how confident the model is about every masked position, which positions are unmasked now.

Pure functions on (B, L) tensors, vectorised over ragged rows, without a loop over rows and without a host synchronisation.
Ties go to the leftmost position (stable sort). Confidence is fp32: bf16 leaves some 170 distinct values in 256 positions and
the order to chance.

References: LLaDA (arXiv 2502.09992, algorithm 5), Dream (arXiv 2508.15487), Fast-dLLM (arXiv 2505.22618, section 3.3).
"""

from __future__ import annotations

import torch

CONFIDENCES = ("low_confidence", "random", "entropy", "margin")


def confidence(
    logits: torch.Tensor, tokens: torch.Tensor, kind: str, random: torch.Tensor | None = None
) -> torch.Tensor:
    """How sure the model is of the proposed tokens; higher is committed earlier.

    Args:
        logits: (..., V) after bans and temperature-free, any float type.
        tokens: (...) proposed token ids.
        kind: "low_confidence" (probability of the token; the least confident stay masked), "entropy" (negative entropy),
            "margin" (probability gap of the two best) or "random".
        random: (...) uniform numbers, for "random".

    Returns:
        (...) fp32.
    """
    if kind == "random":
        if random is None:
            raise ValueError("`random` confidence needs uniform numbers.")
        return random
    if kind not in CONFIDENCES:
        raise ValueError(f"`remasking` must be one of {CONFIDENCES}, got {kind!r}.")
    log_probs = logits.float().log_softmax(-1)
    if kind == "entropy":
        return torch.special.entr(log_probs.exp()).sum(-1).neg()
    if kind == "margin":
        best, second = log_probs.topk(2, dim=-1).values.exp().unbind(-1)
        return best - second
    return log_probs.gather(-1, tokens[..., None]).squeeze(-1).exp()


def ranks(score: torch.Tensor, eligible: torch.Tensor) -> torch.Tensor:
    """(B, L) rank of every position among the eligible ones of its row, 0 = highest score; ineligible ones come last."""
    # Two stable sorts, the second by eligibility: even a score of -inf stands before the ineligible ones.
    order = score.argsort(dim=-1, descending=True, stable=True)
    order = order.gather(-1, eligible.gather(-1, order).long().argsort(dim=-1, descending=True, stable=True))
    return order.argsort(dim=-1)


def commit_quota(score: torch.Tensor, eligible: torch.Tensor, quota: torch.Tensor) -> torch.Tensor:
    """The `quota` (B,) best positions of every row: (B, L) bool."""
    return (ranks(score, eligible) < quota[:, None]) & eligible


def commit_threshold(score: torch.Tensor, eligible: torch.Tensor, threshold: float) -> torch.Tensor:
    """All positions at or above `threshold`, and always the best one of a row that has any: (B, L) bool."""
    return ((score >= threshold) | (ranks(score, eligible) == 0)) & eligible


def step_quota(masks: torch.Tensor, steps_left: torch.Tensor) -> torch.Tensor:
    """Positions to commit now so that `masks` (B,) are gone after `steps_left` (B,) steps: ceil(masks / steps_left).

    Dealing out n masks over S steps this way gives every step floor(n/S) or ceil(n/S), the larger ones first: LLaDA's quota.
    """
    return -(-masks // steps_left.clamp(min=1))
