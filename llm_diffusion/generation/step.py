"""From the settings to the rule: what is proposed for the positions of a window, and which of them change in this step.

Trade-off: one function with a branch for each rule, over the pure rules of `commit_rules`. Alternative: an object for each rule, which
would have to be built, named and saved with the settings.
"""

from __future__ import annotations

import torch
from transformers import LogitsProcessorList

from ..models.sampling import ban, sample, warped
from ..objective.noise import (
    ORDER_STREAM,
    TOKEN_STREAM,
    uniform,
)
from .commit_rules import (
    REMDM_LOOP,
    commit_entropy_bound,
    commit_factor,
    commit_quota,
    commit_threshold,
    confidence,
    edits,
    perturb,
    revise_p2,
    revise_remdm,
    step_quota,
)
from .config import DiffusionGenerationConfig
from .logits import Window, apply_processors, ban_words, penalise_repetition, without_bad_words


def by_rule(
    logits: torch.Tensor, score: torch.Tensor, window: Window, settings: DiffusionGenerationConfig
) -> torch.Tensor:
    """(B, k) bool: the masked positions to commit now, by the one rule that is set."""
    if settings.threshold is not None:
        return commit_threshold(score, window.masked, settings.threshold)
    if settings.factor is not None:
        return commit_factor(score, window.masked, settings.factor)
    if settings.entropy_bound is not None:
        entropy = score.neg()
        if settings.remasking != "entropy":
            entropy = confidence(logits, window.ids, "entropy").neg()
        return commit_entropy_bound(score, window.masked, entropy, settings.entropy_bound)
    masks = window.masked.sum(-1)
    quota = step_quota(masks, window.steps_left) if settings.steps else torch.ones_like(masks)
    return commit_quota(score, window.masked, quota)


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
        kind = settings.revision.removeprefix("remdm").removeprefix("-") or "cap"
        loop = settings.remdm_loop or REMDM_LOOP
        marks = window.masked, window.open, noise
        chosen, back = revise_remdm(window.steps_left, steps, settings.eta, *marks, kind, window.confidence, loop)
    else:
        judged = torch.where(window.masked, tokens, window.ids)
        score = confidence(logits, judged, settings.remasking)
        n_masked = window.open.sum(-1) * (window.steps_left - 1).clamp(min=0) // steps
        chosen, back = revise_p2(score, window.masked, window.open, n_masked)
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


def commit(
    logits: torch.Tensor,
    window: Window,
    settings: DiffusionGenerationConfig,
    processors: LogitsProcessorList | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Proposes a token for every position of a window and picks those to commit, replace or take back.

    Args:
        logits: (B, k, V) fp32, as the model gave them.

    Returns:
        `(changed, tokens, probability)`, all (B, k): the last is that of the tokens, before temperature.
    """
    if settings.repetition_penalty not in (None, 1.0):
        logits = penalise_repetition(logits, window, settings.repetition_penalty)
    if processors:
        logits = apply_processors(logits, window, processors)
    words = settings.bad_words_ids or []
    logits = ban_words(ban(logits, settings), window, words)
    tokens = _propose(logits, window.keys, window.places, window.step, settings)
    noise = uniform(settings.seed, window.step[:, None], window.keys[:, None], window.places, ORDER_STREAM)
    probability = confidence(logits, tokens, "low_confidence")
    if settings.revision is not None:
        return revise(logits, tokens, probability, noise, window, settings)
    score = probability
    if settings.remasking != "low_confidence":
        score = confidence(logits, tokens, settings.remasking, noise)
    if settings.alg_temp:
        score = perturb(score, settings.alg_temp, noise)
    chosen = by_rule(logits, score, window, settings)
    if len(words):
        chosen = without_bad_words(chosen, tokens, score, window, words)
    if settings.editing_threshold is not None:
        editable = window.open & ~window.masked
        chosen = chosen | edits(probability, tokens, window.ids, editable, settings.editing_threshold)
    return chosen, tokens, probability


def _propose(
    logits: torch.Tensor,
    keys: torch.Tensor,
    places: torch.Tensor,
    step: torch.Tensor,
    settings: DiffusionGenerationConfig,
) -> torch.Tensor:
    """(B, k, V) logits -> (B, k) proposed tokens: the best ones, or a sample."""
    if settings.temperature == 0:
        return logits.argmax(-1)
    # One uniform number a place; the Gumbel rule would need one for every word of the vocabulary.
    noise = uniform(settings.seed, step[:, None], keys[:, None], places, TOKEN_STREAM)
    return sample(warped(logits, settings).softmax(-1), noise)
