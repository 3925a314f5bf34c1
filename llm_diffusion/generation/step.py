"""One denoising step over a window of positions: logits are changed, tokens proposed, and some of them committed or taken back.

1. `penalise_repetition`, processors of transformers, `ban_words`, in this order; then the mask token and `suppress_tokens` are banned.
2. Proposed are the best token of every position, or a sample (temperature, top-k, top-p).
3. `_by_rule` or `_revise`: which positions change in this step, by the pure rules of `commit_rules`.

A position may be filled before those on its left, so "the text so far" is what is committed anywhere, masks and padding left out.

References: classifier-free guidance as in LLaDA (arXiv 2502.09992, appendix A.2, eq. 16), CTRL (arXiv 1909.05858) for the penalty.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch.nn.functional import pad
from transformers import LogitsProcessorList

from .. import UserError
from ..models.sampling import BANNED, ban, sample, warped
from ..objective.noise import ORDER_STREAM, TOKEN_STREAM, uniform
from . import commit_rules as rules
from .config import DiffusionGenerationConfig


@dataclass
class Rows:
    """The rows still being decoded; all tensors lose a row together when it is finished."""

    ids: torch.Tensor  # (B, L)
    attention_mask: torch.Tensor  # (B, L)
    open: torch.Tensor  # (B, L) bool, positions that held a mask at the start
    confidence: torch.Tensor  # (B, L) probability that every token had when it was committed
    places: torch.Tensor  # (B, L) positions in the text, below 0 in padding on the left
    block: torch.Tensor  # (B, L) block of every open position, counted from the left
    keys: torch.Tensor  # (B,) of the noise
    index: torch.Tensor  # (B,) place in the batch as given
    active: torch.Tensor  # (B,) block being filled
    steps_left: torch.Tensor  # (B,) steps left for that block, this one included; used where `steps` is set
    steps_done: torch.Tensor  # (B,) steps so far
    busy: torch.Tensor  # (B,) bool, whether revision of the active block goes on
    post_steps: torch.Tensor  # (B,) steps over the active block without a mask

    @property
    def given(self) -> torch.Tensor:
        """(B, L) bool, text that was there at the start."""
        return self.attention_mask.bool() & ~self.open

    def select(self, rows: torch.Tensor) -> Rows:
        return Rows(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})


@dataclass
class Window:
    """The positions scored by one forward pass, k of every row, in text order."""

    rows: Rows
    columns: torch.Tensor  # (B, k) in the canvas
    open: torch.Tensor  # (B, k) bool, positions that may change
    pending: torch.Tensor  # (B, L) bool, all masks
    working: torch.Tensor  # (B,) bool, rows that take part; the others wait
    block: int  # the furthest one being filled
    block_steps: torch.Tensor  # (B,) steps of a block, where `steps` is set

    def __post_init__(self) -> None:
        self.ids = self.rows.ids.gather(-1, self.columns)  # (B, k) tokens there now
        self.masked = self.open & self.pending.gather(-1, self.columns)
        self.places = self.rows.places.gather(-1, self.columns)
        self.confidence = self.rows.confidence.gather(-1, self.columns)
        self.visible = self.rows.attention_mask.bool() & ~self.pending  # (B, L) committed: neither padding nor mask

    def noise(self, seed: int, stream: int) -> torch.Tensor:
        """(B, k) uniform numbers."""
        return uniform(seed, self.rows.steps_done[:, None], self.rows.keys[:, None], self.places, stream)


def commit(
    logits: torch.Tensor,
    window: Window,
    settings: DiffusionGenerationConfig,
    processors: LogitsProcessorList | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Proposes tokens for a window, by the model's logits (B, k, V) in fp32, and picks those to commit, replace or take back.

    Returns:
        `(changed, tokens, probability)`, all (B, k): the last is that of the tokens, before temperature. `window.failed`, () bool, says
        whether a mask was given no token: its logits are not finite, or all of them banned.
    """
    words = settings.bad_words_ids or []
    if settings.repetition_penalty not in (None, 1.0):
        logits = penalise_repetition(logits, window, settings.repetition_penalty)
    if processors:
        logits = apply_processors(logits, window, processors)
    logits = ban_words(ban(logits, settings), window, words)
    if settings.temperature == 0:
        tokens = logits.argmax(-1)
    else:  # one uniform number a place; the Gumbel rule would need one for every token of the vocabulary
        tokens = sample(warped(logits, settings).softmax(-1), window.noise(settings.seed, TOKEN_STREAM))
    score = probability = rules.confidence(logits, tokens, "low_confidence")
    usable = probability.isfinite() & (logits.gather(-1, tokens[..., None]).squeeze(-1) > BANNED)
    window.failed = (window.masked & window.working[:, None] & ~usable).any()
    noise = window.noise(settings.seed, ORDER_STREAM)
    if settings.revision is not None:
        chosen, back = _revise(logits, tokens, noise, window, settings)
        return chosen | back, tokens.masked_fill(back, settings.mask_token_id), probability.masked_fill(back, 0.0)
    if settings.remasking != "low_confidence":
        score = rules.confidence(logits, tokens, settings.remasking, noise)
    if settings.alg_temp:
        score = rules.perturb(score, settings.alg_temp, noise)
    chosen = _by_rule(logits, score, window, settings)
    if words:
        chosen = without_bad_words(chosen, tokens, score, window, words)
    if settings.editing_threshold is not None:
        editable = window.open & ~window.masked
        chosen = chosen | rules.edits(probability, tokens, window.ids, editable, settings.editing_threshold)
    return chosen, tokens, probability


def _by_rule(
    logits: torch.Tensor, score: torch.Tensor, window: Window, settings: DiffusionGenerationConfig
) -> torch.Tensor:
    """(B, k) bool: the masked positions to commit now, by the one rule that is set."""
    if settings.threshold is not None:
        return rules.commit_threshold(score, window.masked, settings.threshold)
    if settings.factor is not None:
        return rules.commit_factor(score, window.masked, settings.factor)
    if settings.entropy_bound is not None:
        entropy = score.neg()
        if settings.remasking != "entropy":
            entropy = rules.confidence(logits, window.ids, "entropy").neg()
        return rules.commit_entropy_bound(score, window.masked, entropy, settings.entropy_bound)
    masks = window.masked.sum(-1)
    quota = rules.step_quota(masks, window.rows.steps_left) if settings.steps else torch.ones_like(masks)
    return rules.commit_quota(score, window.masked, quota)


def _revise(
    logits: torch.Tensor, tokens: torch.Tensor, noise: torch.Tensor, window: Window, settings: DiffusionGenerationConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, k) bool each: the masked positions to commit now, and the committed ones to mask again."""
    steps_left, steps = window.rows.steps_left, window.block_steps
    if settings.revision == "p2":
        score = rules.confidence(logits, torch.where(window.masked, tokens, window.ids), settings.remasking)
        n_masked = window.open.sum(-1) * (steps_left - 1).clamp(min=0) // steps
        return rules.revise_p2(score, window.masked, window.open, n_masked)
    kind = settings.revision.removeprefix("remdm").removeprefix("-") or "cap"
    marks, loop = (window.masked, window.open, noise), settings.remdm_loop or rules.REMDM_LOOP
    return rules.revise_remdm(steps_left, steps, settings.eta, *marks, kind, window.confidence, loop)


def still_busy(
    window: Window, changed: torch.Tensor, settings: DiffusionGenerationConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """Whether a block may still change after its last mask is gone, (B,) bool, and the steps it had without one, (B,).

    Remasking takes all its steps. Editing goes on while it changes something, `max_post_steps` at most.
    """
    if settings.revision is not None:
        return window.rows.steps_left > 1, window.rows.post_steps
    if settings.editing_threshold is None:
        return torch.zeros_like(window.working), window.rows.post_steps
    had_masks, masks_left = window.masked.any(-1), (window.masked & ~changed).any(-1)
    post = window.rows.post_steps + (~had_masks).long()
    busy = masks_left | ((had_masks | changed.any(-1)) & (post < settings.max_post_steps))
    return busy, torch.where(busy, post, 0)


def with_unconditional(
    inputs: dict[str, torch.Tensor], given: torch.Tensor, settings: DiffusionGenerationConfig
) -> dict[str, torch.Tensor]:
    """Under guidance, below every row of a forward pass the same without its prompt, whose tokens `given` (B, L) bool are masks."""
    if not settings.guided:
        return inputs
    inputs = {name: torch.cat([value, value]) for name, value in inputs.items()}
    inputs["input_ids"][len(given) :].masked_fill_(given, settings.mask_token_id)
    return inputs


def guide(logits: torch.Tensor, scale: float | None) -> torch.Tensor:
    """(2B, k, V), with the prompt and without -> (B, k, V): away from what the model predicts without the prompt.

    LLaDA writes l_u + (w + 1) (l_c - l_u); `scale` is its w + 1, as in transformers: 1 (or None) is no guidance.
    """
    if scale in (None, 1):
        return logits
    conditional, unconditional = logits.chunk(2)
    return unconditional + scale * (conditional - unconditional)


def penalise_repetition(logits: torch.Tensor, window: Window, penalty: float) -> torch.Tensor:
    """Makes tokens that stand in the committed text less likely: (B, k, V) -> (B, k, V); no position counts itself."""
    weight = window.visible.to(logits.dtype)
    counts = logits.new_zeros(logits.shape[0], logits.shape[-1]).scatter_add(-1, window.rows.ids, weight)
    lower = torch.where(logits < 0, logits * penalty, logits / penalty)
    penalised = torch.where(counts[:, None] > 0, lower, logits)
    own = window.ids
    alone = (counts.gather(-1, own) == 1) & ~window.masked & window.open
    mine = torch.where(alone[..., None], logits.gather(-1, own[..., None]), penalised.gather(-1, own[..., None]))
    return penalised.scatter(-1, own[..., None], mine)


def apply_processors(logits: torch.Tensor, window: Window, processors: LogitsProcessorList) -> torch.Tensor:
    """transformers' processors, each position with the text on its left, in which what is open still holds the mask token.

    One call for every column: they were written for text that ends where it predicts.
    """
    logits = logits.clone()
    for column in window.columns.unique().tolist():
        row, place = (window.columns == column).nonzero(as_tuple=True)
        scores = processors(window.rows.ids[row, :column], logits[row, place])
        if not isinstance(scores, torch.Tensor) or scores.shape != (len(row), logits.shape[-1]):
            found = tuple(scores.shape) if isinstance(scores, torch.Tensor) else type(scores).__name__
            raise UserError(f"`logits_processor` must return scores {(len(row), logits.shape[-1])}, got {found}.")
        logits[row, place] = scores
    return logits


def _matches(canvas: torch.Tensor, visible: torch.Tensor, word: list[int]) -> torch.Tensor:
    """(B, S, n) bool, whether a sequence of n tokens that starts in a column has its i-th token in the committed text."""
    starts = canvas.shape[1] - len(word) + 1
    there = [(canvas[:, i : i + starts] == token) & visible[:, i : i + starts] for i, token in enumerate(word)]
    return torch.stack(there, -1)


def ban_words(logits: torch.Tensor, window: Window, words: list[list[int]]) -> torch.Tensor:
    """Puts out of reach, in place, every token that would complete a forbidden sequence with the committed text around it."""
    for word in (word for word in words if len(word) <= window.rows.ids.shape[1]):
        match = _matches(window.rows.ids, window.visible, word)
        for i, token in enumerate(word):
            others = match[..., [j for j in range(len(word)) if j != i]].all(-1)
            completes = pad(others, (i, len(word) - 1 - i)).gather(-1, window.columns)
            logits[..., token] = torch.where(completes, BANNED, logits[..., token])
    return logits


def without_bad_words(
    chosen: torch.Tensor, tokens: torch.Tensor, score: torch.Tensor, window: Window, words: list[list[int]]
) -> torch.Tensor:
    """Takes back commits (B, k) that would write a forbidden sequence together; the best commit of a row always stays."""
    canvas = window.rows.ids.scatter(-1, window.columns, torch.where(chosen, tokens, window.ids))
    new = torch.zeros_like(window.visible).scatter(-1, window.columns, chosen)
    conflict = torch.zeros_like(new)
    for word in (word for word in words if 1 < len(word) <= canvas.shape[1]):
        written = _matches(canvas, window.visible | new, word).all(-1)
        for i in range(len(word)):
            conflict |= pad(written, (i, len(word) - 1 - i))
    return chosen & (~conflict.gather(-1, window.columns) | (rules.ranks(score, chosen) == 0))


def fill_behind_ends(
    ids: torch.Tensor,
    was_open: torch.Tensor,
    eos: torch.Tensor,
    settings: DiffusionGenerationConfig,
    busy: torch.Tensor,
) -> torch.Tensor:
    """A canvas (B, L), in which the masks behind an end token that no mask is left before have become that token.

    Only where a mask `was_open` at the start, (B, L) bool, and not in `busy` rows, (B,) bool, whose tokens may still be revised.
    """
    if not settings.eos_early_stop:
        return ids
    pending, length = (ids == settings.mask_token_id) & was_open, ids.shape[1]
    ends = was_open & torch.isin(ids, eos)
    end = torch.where(ends.any(-1), ends.long().argmax(-1), length)
    first_mask = torch.where(pending.any(-1), pending.long().argmax(-1), length)
    stopped = (first_mask > end) & ~busy
    filled = pending & stopped[:, None]
    if settings.length_quantile is not None and not settings.revises:
        # A sized canvas shrinks to its first end: nothing behind it will be read.
        filled = pending & (torch.arange(length, device=ids.device) > end[:, None])
    return torch.where(filled, ids.gather(-1, end.clamp(max=length - 1)[:, None]), ids)
