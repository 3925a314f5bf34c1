"""The forward process: clean rows become noisy rows, targets and weights.

1. times      every text, or block, gets a time t
2. rates      the schedule makes of it each token's mask probability and weight in the bound
3. masks      tokens are masked by chance, or an exact number of them
4. weights    the loss's own weighting, and that of the tail of end tokens
5. additions  rows masked whole, drafts, replaced tokens
6. teacher    which tokens an autoregressive teacher can predict
7. layout     what the model sees, by the mode of attention (`modes`)

    text     p  a  b  c  d  E  E        bidirectional: p a M M d M M   teacher "causal":  -  -  -  -  -  x  -
    masked         x  x     x  x        blocks of 3:  (p a M)(M d M) M                    -  -  x  -  -  x  -

References: MDLM (arXiv 2406.07524), LLaDA (arXiv 2502.09992), BD3LM (arXiv 2503.09573).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.functional import pad

from .. import UserError
from .attention_masks import column_index, segments
from .losses import WEIGHTS, loss_weights
from .modes import IGNORE_INDEX, Bidirectional, NoisyRows
from .noise import (
    FIRST_STEP_STREAM,
    FIRST_STREAM,
    FULL_STREAM,
    MIN_TIME,
    NOISE_SCHEDULES,
    OFFSET_STREAM,
    ORDER_STREAM,
    REPLACE_STREAM,
    TIME_STREAM,
    content_keys,
    draw_exact_mask,
    draw_mask,
    draw_tokens,
    get_noise_schedule,
    hash_keys,
    stratified_times,
    times_of_segments,
    uniform,
)
from .settings import check_settings, check_value, setting

TEACHER_TARGETS = ("causal", "all")


@dataclass
class NoiseSettings:
    """Settings of the forward process and of the canvas that answers are put on."""

    noise_schedule: str | None = setting(
        None, "Mask probability over time; None: the one the model was converted with.", choices=tuple(NOISE_SCHEDULES)
    )
    loss_weight: str = setting(
        "elbo",
        "Weight of a masked token: `elbo` is w(t), an unbiased bound; see `losses.loss_weights`.",
        choices=WEIGHTS,
    )
    min_mask_probability: float = setting(0.0, "Lowest mask probability; above 0 is not the ELBO.", min=0, below=1)
    max_mask_probability: float = setting(1.0, "Highest mask probability; below 1 is not the ELBO.", above=0, max=1)
    exact_mask_count: bool = setting(
        False, "Draw how many tokens are masked, then which: the same bound with less noise."
    )
    random_replacement: float = setting(
        0.0, "Probability that a trained token that is seen is replaced by a random one; still a bound.", min=0, below=1
    )
    ar_loss_weight: float = setting(
        0.0, "Weight of next-token prediction on the clean half, beside the bound (block attention).", min=0
    )
    full_mask_share: float = setting(
        0.7, "Share of lossless drafts that are masked whole; the others as in diffusion.", min=0, max=1
    )
    draft_decay: float = setting(
        1.0,
        "Weight of a lossless draft's token over that of the one before it: the first wrong one ends a draft, so with a share p of right "
        "ones the k-th matters in proportion to p^k.",
        above=0,
        max=1,
    )
    distillation_targets: str = setting(
        "causal",
        "Tokens that the teacher predicts: those whose right-hand context is hidden, or all masked ones.",
        choices=TEACHER_TARGETS,
    )
    eos_tail: int = setting(16, "Longest tail of end tokens after an answer.", min=0, max=65536)
    random_canvas: float = setting(
        0.5, "Share of answers cut at a random place, so that a canvas may end before its answer.", min=0, max=1
    )
    max_canvas: int | None = setting(
        None,
        "Tokens of a canvas, whatever the answer's length (in a share `random_canvas` of rows 1 to this many), which teaches "
        "where answers end; None: answer and tail.",
        min=1,
        max=65536,
    )
    text_tails: bool = setting(False, "Give whole texts that come to their end tails and canvases too.")
    tail: str = setting(
        "eos", "What stands behind the end: the end token again, or the padding token.", choices=("eos", "pad")
    )
    eos_tail_weight: float = setting(1.0, "Weight of a token of the tail.", min=0)
    pad_mask_ratio: float = setting(1.0, "Mask rate of the tail over that of the text.", above=0, max=1)
    pad_annealing_steps: int | None = setting(
        None, "Optimiser steps in which that ratio grows from 0; None: it starts at `pad_mask_ratio`.", min=1
    )
    first_step_share: float = setting(
        0.0, "Share of rows masked whole, as at the first step of decoding, beside the bound.", min=0, max=1
    )


def check_noise(settings: Any) -> None:
    """Raises UserError for an object whose attributes are none of `NoiseSettings`."""
    check_settings(settings, NoiseSettings)
    low, high = settings.min_mask_probability, settings.max_mask_probability
    if low > high:
        raise UserError(f"`min_mask_probability` ({low}) must not be above `max_mask_probability` ({high}).")


def check_key(seed: int, rows: torch.Tensor | None, n_rows: int | None, n: int) -> None:
    """Raises UserError for a key that noise of `n` rows cannot be drawn from, see `ForwardProcess.corrupt`."""
    check_value("seed", seed, int, {"min": 0})
    if rows is not None and (rows.shape != (n,) or n_rows is None):
        raise UserError(
            f"`rows` must be {n} places of the `n_rows` in the global batch, got {tuple(rows.shape)} of {n_rows}."
        )


@dataclass
class ForwardProcess:
    """Corrupts batches.

    Args:
        mode: how the model attends.
        mask_token_id: id of the mask.
        settings: see `NoiseSettings`; any object with its attributes.
        noise_schedule: that of the model, where the settings name none.
        end_token_ids: tokens of which a second one in a row is the tail of an answer and no text.
        vocab_size: ids below it are drawn as replacements, the mask left out.
        packing: whether rows hold several texts.
        time_embedding: whether the model is told the mask probability.
    """

    mode: Bidirectional
    mask_token_id: int
    settings: Any = field(default_factory=NoiseSettings)
    noise_schedule: str = "linear"
    end_token_ids: tuple[int, ...] = ()
    vocab_size: int | None = None
    packing: bool = False
    time_embedding: bool = False

    def corrupt(
        self,
        batch: dict[str, torch.Tensor],
        *,
        seed: int,
        step: int,
        rows: torch.Tensor | None = None,
        n_rows: int | None = None,
        block_length: int | None = None,
        complement: bool = False,
    ) -> dict[str, torch.Tensor]:
        """Draws noise and lays out the model's inputs and targets.

        Args:
            batch: `input_ids`, `labels` (-100 = never masked), `attention_mask` (0 at padding, else the number of the text),
                each (B, L).
            seed, step: key of the noise; `step` is the optimiser step.
            rows: (B,) places of these rows in the global batch. None: of evaluation; noise is keyed by every row's content, with
                nothing replaced, one mask rate and no first steps.
            n_rows: rows of the global batch, for the strata of the times.
            block_length: of this batch, while blocks still grow; None: the model's.
            complement: mask exactly what the same draw without it leaves visible; the mean of the two estimates is unbiased too.

        Returns:
            Of the model's length M (L, or up to 2L with blocks): `inputs`, the model's keywords; `targets` (B, M), the token that
            each hidden state must predict, -100 = none; `weights` (B, M) fp32 of these terms in the objective, and
            `extra_weights` (B, M) beside the bound; `levels` (B, M), the mask probability they were seen under, 0 on clean text;
            `tokens` (B, M), the column of the token that each predicts; `teacher_mask` (B, M) bool, whether the teacher can
            predict it. Further `masked` and `times` (B, L), `first_step` (B,) bool.
        """
        check_key(seed, rows, n_rows, len(batch["input_ids"]))
        mode = self.mode if block_length is None else dataclasses.replace(self.mode, block_length=block_length)
        training = rows is not None
        keys = rows if training else content_keys(batch["input_ids"], batch["attention_mask"])
        noise = (seed, step, keys)
        noisy, tail = self._clean_rows(batch, mode, noise)
        # 1. times
        times = (
            stratified_times(*noise, n_rows) if training else MIN_TIME + (1 - MIN_TIME) * uniform(*noise, TIME_STREAM)
        )
        times = times_of_segments(times, noisy.segment_ids)
        # 2. rates
        noisy.probability, noisy.weights = self._rates(times, tail, step if training else None)
        # 3. masks
        self._mask(noisy, noise, times)
        if complement:
            self._take_complement(noisy)
        # 4. weights
        kind, document_ids = self.settings.loss_weight, noisy.document_ids
        noisy.weights = loss_weights(kind, noisy.weights, noisy.probability, noisy.masked, document_ids)
        tail_weight = torch.where(tail, self.settings.eos_tail_weight if training else 1.0, 1.0)
        # 5. additions
        first_step = self._add_first_steps(noisy, noise, tail_weight, training)
        noisy.hidden = noisy.masked
        if mode.drafts:
            self._draft(noisy, noise)
        if training and self.settings.random_replacement:
            self._replace(noisy, noise)
        # 6. teacher
        noisy.teacher_mask = self._teacher_mask(noisy)
        # 7. layout
        return {**self._lay_out(noisy, mode), "masked": noisy.masked, "times": times, "first_step": first_step}

    def lay_out(
        self, batch: dict[str, torch.Tensor], masked: torch.Tensor, weights: torch.Tensor, probability: torch.Tensor
    ) -> dict[str, Any]:
        """`corrupt` with given noise: `masked`, `weights` and mask `probability`, each (B, L)."""
        noisy, _ = self._clean_rows(batch, self.mode)
        noisy.masked, noisy.weights, noisy.probability, noisy.hidden = masked, weights, probability, masked
        noisy.teacher_mask = noisy.maskable
        return {**self._lay_out(noisy, self.mode), "masked": masked}

    def _lay_out(self, noisy: NoisyRows, mode: Bidirectional) -> dict[str, Any]:
        laid_out = mode.lay_out(noisy, self.mask_token_id, self.settings.ar_loss_weight, self.packing)
        levels = laid_out.pop("noise_levels")
        if self.time_embedding:
            # Not the time but the mask probability, which is what a sampler knows; clean context has none.
            laid_out["inputs"]["timesteps"] = levels
        return laid_out

    def _clean_rows(
        self, batch: dict[str, torch.Tensor], mode: Bidirectional, noise: tuple | None = None
    ) -> tuple[NoisyRows, torch.Tensor]:
        """Rows without noise, and which of their tokens are a tail, (B, L) bool."""
        ids, document_ids = batch["input_ids"], batch["attention_mask"]
        maskable = (batch["labels"] != IGNORE_INDEX) & document_ids.bool()
        # An end token that follows another one is the tail of a canvas.
        ends = torch.isin(ids, ids.new_tensor(self.end_token_ids)) & maskable
        tail = maskable & ends & pad(ends[:, :-1], (1, 0), value=False)
        offset: torch.Tensor | int = 0
        if mode.drafts and noise is not None:  # drafts start anywhere
            offset = (hash_keys(*noise, OFFSET_STREAM) % mode.block_length)[:, None]
        none, zero = torch.zeros_like(maskable), torch.zeros(ids.shape, device=ids.device)
        segment_ids = segments(document_ids, mode.block_length if mode.has_blocks else None, offset)
        text = maskable & ~tail
        rows = NoisyRows(
            ids, document_ids, segment_ids, maskable, text, none, zero, zero, zero, ids, none, none, offset
        )
        return rows, tail

    def _rates(self, times: torch.Tensor, tail: torch.Tensor, step: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Mask probability and weight of every token, (B, L) each; `step` None: of evaluation.

        The tail, padding in all but name, may have a rate of its own, `pad_mask_ratio` times the text's, which grows within
        `pad_annealing_steps`: so the model first reads where a text ends, and later predicts it.
        """
        settings = self.settings
        probability, weights = get_noise_schedule(settings.noise_schedule or self.noise_schedule)(times)
        low, high = settings.min_mask_probability, settings.max_mask_probability
        if (low, high) != (0.0, 1.0):
            probability = low + (high - low) * probability
            weights = 1 / probability
        if step is None:
            return probability, weights
        grown = 1.0 if settings.pad_annealing_steps is None else min(1.0, step / settings.pad_annealing_steps)
        ratio = settings.pad_mask_ratio * grown
        # At a ratio of 0 the tail is never masked, and its weight never used.
        own = weights / max(ratio, MIN_TIME)
        return torch.where(tail, ratio * probability, probability), torch.where(tail, own, weights)

    def _mask(self, noisy: NoisyRows, noise: tuple, times: torch.Tensor) -> None:
        if not self.settings.exact_mask_count:
            noisy.masked = draw_mask(*noise, noisy.probability, noisy.maskable)
            return
        noisy.masked, noisy.probability = draw_exact_mask(*noise, times, noisy.maskable, noisy.segment_ids)
        noisy.weights = 1 / noisy.probability

    def _take_complement(self, noisy: NoisyRows) -> None:
        # Substitute q = 1 - p in the bound's integral: dq = -p'(t) dt, so 1 / q weighs p'(t) / (1 - p) in t.
        p = noisy.probability
        noisy.weights = noisy.weights * p / (1 - p).clamp(min=1e-6)
        noisy.masked, noisy.probability = noisy.maskable & ~noisy.masked, 1 - p

    def _add_first_steps(
        self, noisy: NoisyRows, noise: tuple, tail_weight: torch.Tensor, training: bool
    ) -> torch.Tensor:
        """Rows of which nothing is seen, every token weighing 1 beside the bound; returns which, (B,) bool.

        Of a text without a prompt nothing is seen behind a random place.
        """
        first_step = uniform(*noise, FIRST_STEP_STREAM) < training * self.settings.first_step_share
        columns, real = column_index(noisy.document_ids), noisy.document_ids > 0
        whole = noisy.maskable | (columns == 0)  # a first token may have nothing to be read from
        has_prompt = ~(real <= whole).all(-1)
        cut = uniform(*noise, ORDER_STREAM) * real.sum(-1)
        row = first_step[:, None]
        unseen = row & noisy.maskable & (has_prompt[:, None] | (columns >= cut[:, None]))
        noisy.masked = torch.where(row, unseen, noisy.masked)
        noisy.probability = torch.where(row, torch.ones_like(noisy.probability), noisy.probability)
        noisy.weights, noisy.extra_weights = noisy.weights * tail_weight * ~row, unseen * tail_weight
        return first_step

    def _draft(self, noisy: NoisyRows, noise: tuple) -> None:
        """Masks as drafting meets them: most blocks whole, the first token of half of these known."""
        seed, step, keys = noise
        of_segments = (seed, step, keys[:, None], noisy.segment_ids)
        full = uniform(*of_segments, FULL_STREAM) < self.settings.full_mask_share
        known = uniform(*of_segments, FIRST_STREAM) < 0.5
        first = pad(noisy.segment_ids[:, 1:] != noisy.segment_ids[:, :-1], (1, 0), value=True)
        noisy.masked = torch.where(full, noisy.maskable & ~(first & known), noisy.masked)
        noisy.probability = torch.where(full, torch.ones_like(noisy.probability), noisy.probability)
        # Its first token is the base's own, at place 0, and not scored.
        column = column_index(noisy.segment_ids)
        place = column - torch.where(first, column, 0).cummax(-1).values
        noisy.weights = torch.full_like(noisy.weights, self.settings.draft_decay) ** (place - 1)
        # A draft sees nothing behind its first token, neither the next question.
        behind = ~noisy.maskable & (noisy.document_ids > 0) & behind_first(noisy.maskable, noisy.segment_ids)
        noisy.hidden = noisy.masked | behind

    def _teacher_mask(self, noisy: NoisyRows) -> torch.Tensor:
        """Tokens that an autoregressive teacher can predict, (B, L) bool.

        It knows p(token | all tokens before it). Averaged over the masked ones among these, that is what the model must learn where
        it sees nothing to the right of the token; elsewhere it is biased, for the teacher knows nothing of what comes after. The
        tail of end tokens was never text to the teacher.
        """
        if self.settings.distillation_targets != "causal":
            return noisy.text
        shown = (noisy.document_ids > 0) & ~noisy.hidden
        return noisy.text & nothing_shown_behind(shown, noisy.segment_ids)

    def _replace(self, noisy: NoisyRows, noise: tuple) -> None:
        """Replaces trained tokens where they are seen, never where they are scored.

        The weights stay: a reader who redraws the replacements before every step decodes any order of tokens at this cost, so
        the loss is still an upper bound on the text's NLL, of a model that reads through noise.
        """
        replaced = draw_mask(*noise, self.settings.random_replacement, noisy.maskable, REPLACE_STREAM)
        tokens = draw_tokens(*noise, noisy.maskable, self.vocab_size - 1)
        tokens = tokens + (tokens >= self.mask_token_id)  # any but the mask
        noisy.seen = torch.where(replaced, tokens, noisy.input_ids)


def nothing_shown_behind(shown: torch.Tensor, segment_ids: torch.Tensor) -> torch.Tensor:
    """Which tokens have no visible one behind them in their own segment: (B, L) each -> (B, L) bool."""
    column = column_index(segment_ids)
    last = torch.full_like(column, -1).scatter_reduce(-1, segment_ids, torch.where(shown, column, -1), "amax")
    return column > last.gather(-1, segment_ids)


def behind_first(maskable: torch.Tensor, segment_ids: torch.Tensor) -> torch.Tensor:
    """Which tokens have a maskable one before them in their own segment: (B, L) each -> (B, L) bool."""
    column, length = column_index(segment_ids), segment_ids.shape[-1]
    first = torch.full_like(column, length).scatter_reduce(
        -1, segment_ids, torch.where(maskable, column, length), "amin"
    )
    return column > first.gather(-1, segment_ids)
