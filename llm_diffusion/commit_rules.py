"""From the settings to the rule: which positions of a window change in this step.

Trade-off: one function with a branch for each rule, over the pure rules of `unmasking`. Alternative: an object for each rule, which
would have to be built, named and saved with the settings.
"""

from __future__ import annotations

import torch

from . import unmasking
from .generation_config import DiffusionGenerationConfig
from .logit_rules import Window


def by_rule(
    logits: torch.Tensor, score: torch.Tensor, window: Window, settings: DiffusionGenerationConfig
) -> torch.Tensor:
    """(B, k) bool: the masked positions to commit now, by the one rule that is set."""
    if settings.threshold is not None:
        return unmasking.commit_threshold(score, window.masked, settings.threshold)
    if settings.factor is not None:
        return unmasking.commit_factor(score, window.masked, settings.factor)
    if settings.entropy_bound is not None:
        entropy = score.neg()
        if settings.remasking != "entropy":
            entropy = unmasking.confidence(logits, window.ids, "entropy").neg()
        return unmasking.commit_entropy_bound(score, window.masked, entropy, settings.entropy_bound)
    masks = window.masked.sum(-1)
    quota = unmasking.step_quota(masks, window.steps_left) if settings.steps else torch.ones_like(masks)
    return unmasking.commit_quota(score, window.masked, quota)


def revise(
    logits: torch.Tensor,
    tokens: torch.Tensor,
    probability: torch.Tensor,
    noise: torch.Tensor,
    window: Window,
    settings: DiffusionGenerationConfig,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`commit` under a rule that also masks committed tokens again."""
    steps = window.block_steps
    if settings.revision != "p2":
        kind, loop = settings.revision.removeprefix("remdm-"), settings.remdm_loop or unmasking.REMDM_LOOP
        marks = window.masked, window.open, noise
        chosen, back = unmasking.revise_remdm(
            window.steps_left, steps, settings.eta, *marks, kind, window.certainty, loop
        )
    else:
        judged = torch.where(window.masked, tokens, window.ids)
        score = unmasking.confidence(logits, judged, settings.remasking)
        n_masked = window.open.sum(-1) * (window.steps_left - 1).clamp(min=0) // steps
        chosen, back = unmasking.revise_p2(score, window.masked, window.open, n_masked)
    return (
        chosen | back,
        torch.where(back, settings.mask_token_id, tokens),
        probability.masked_fill(back, 0.0),
    )


def still_busy(
    window: Window, changed: torch.Tensor, tokens: torch.Tensor, settings: DiffusionGenerationConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """Whether a block may still change after its last mask is gone, (B,) bool, and the steps it had without one, (B,).

    Remasking takes all its steps. Editing goes on while it changes something, `max_post_steps` at most.
    """
    if settings.revision is not None:
        return window.steps_left > 1, window.post_steps
    if settings.editing_threshold is None:
        return torch.zeros_like(window.step, dtype=torch.bool), window.post_steps
    had_masks = window.masked.any(-1)
    masks_left = (window.masked & ~changed).any(-1)
    post = window.post_steps + (~had_masks).long()
    more = (had_masks | changed.any(-1)) & (post < settings.max_post_steps)
    busy = masks_left | more
    return busy, torch.where(busy, post, 0)
