"""Noise: schedules, and seeded times, masks, orders and replacements.

A schedule is the survival probability alpha(t), falling from 1 at t=0 to 0 at t=1. A token is masked with probability
p(t) = 1 - alpha(t), and in the negative ELBO its cross-entropy weighs w(t) = -alpha'(t) / (1 - alpha(t)). The NELBO does not depend
on the schedule (substitute u = p(t)); only the variance of its estimate does.

Draws are a hash of (seed, step, row of the global batch, position), made of integer torch operations: they depend on neither device,
padding, loader workers, processes nor accumulation steps, and a resumed run draws what an uninterrupted one would.

References: MDLM (arXiv 2406.07524, eq. 10-11), LLaDA (arXiv 2502.09992, eq. 3), SMDM (arXiv 2410.18514), DDPM (arXiv 2006.11239,
section 4) and Improved DDPM (arXiv 2102.09672, eq. 17) for the schedules by beta.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable

import torch

from .. import UserError

MIN_TIME = 1e-3  # LLaDA's epsilon: times are drawn from [MIN_TIME, 1]

_MASK_32 = 0xFFFFFFFF
TIME_STREAM, MASK_STREAM, ORDER_STREAM, REPLACE_STREAM, TOKEN_STREAM, OFFSET_STREAM, FULL_STREAM, FIRST_STREAM = range(
    1, 9
)
FIRST_STEP_STREAM = 9


def _mix(value: torch.Tensor) -> torch.Tensor:
    """The 32-bit finaliser of MurmurHash3 on int64 tensors holding 32-bit values (products wrap modulo 2^64)."""
    value = value & _MASK_32
    value = ((value ^ (value >> 16)) * 0x85EBCA6B) & _MASK_32
    value = ((value ^ (value >> 13)) * 0xC2B2AE35) & _MASK_32
    return value ^ (value >> 16)


def hash_keys(*parts: torch.Tensor | int) -> torch.Tensor:
    """Hashes integers, broadcast against each other, to 32-bit keys (int64). At least one part must be a tensor."""
    device = next(part.device for part in parts if isinstance(part, torch.Tensor))
    key = torch.zeros((), dtype=torch.int64, device=device)
    for part in parts:
        part = part if isinstance(part, torch.Tensor) else operator.index(part) & _MASK_32  # of any size
        # `+ golden ratio` keeps a zero part from leaving a zero key unchanged.
        key = _mix(_mix(torch.as_tensor(part, dtype=torch.int64, device=device)) + 0x9E3779B9 + key * 31)
    return key


def uniform(*parts: torch.Tensor | int) -> torch.Tensor:
    """Uniform numbers in (0, 1), fp32, one for every element of the broadcast `parts`."""
    # 23 bits: with 24, the highest key would round up to exactly 1, and a Gumbel variable made of it to infinity.
    return ((hash_keys(*parts) >> 9).float() + 0.5) * 2.0**-23


def content_keys(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """A key for every row from its tokens alone, whatever its padding: (B, L) -> (B,). Fixes the noise of evaluation."""
    real = attention_mask > 0
    position = (real.cumsum(-1) - 1).clamp(min=0)
    return _mix((hash_keys(input_ids, position) * real).sum(-1))


def stratified_times(seed: int, step: int, rows: torch.Tensor, n_rows: int, low: float = MIN_TIME, high: float = 1.0):
    """Times of the rows of one optimiser step, one in each of `n_rows` equal strata (VDM's low-discrepancy sampler).

    Every row alone is uniform on [low, high]; together they cover it evenly, across processes and accumulation steps,
    because a row's stratum follows from its place in the global batch.

    Args:
        rows: (B,) places of these rows in the global batch, each in [0, n_rows).

    Returns:
        (B,) fp32.

    References: VDM (arXiv 2107.00630, appendix I.1).
    """
    everyone = torch.arange(n_rows, device=rows.device)
    # Strata are dealt out in random order: were they dealt in row order, sorted batches would tie length to noise.
    stratum = hash_keys(seed, step, everyone, ORDER_STREAM).argsort().argsort()[rows]
    offset = uniform(seed, step, torch.zeros_like(rows[:1]), TIME_STREAM)
    return low + (high - low) * ((stratum + offset) / n_rows)


def times_of_segments(times: torch.Tensor, segment_ids: torch.Tensor) -> torch.Tensor:
    """One time for every segment (block, packed text) of a row, spread evenly: (B,) row times, (B, L) segment numbers -> (B, L).

    Segment k takes the row's time plus k golden ratios, wrapped around: each alone is uniform, and neighbours differ widely.

    References: BD3LM (arXiv 2503.09573, section 5.3) for one time a block.
    """
    unit = (times[:, None] - MIN_TIME) / (1 - MIN_TIME) + segment_ids * 0.6180339887498949
    return MIN_TIME + (1 - MIN_TIME) * (unit % 1.0)


def draw_mask(
    seed: int,
    step: int,
    rows: torch.Tensor,
    probability: torch.Tensor | float,
    maskable: torch.Tensor,
    stream: int = MASK_STREAM,
) -> torch.Tensor:
    """Masks every maskable token independently: m_i ~ Bernoulli(p).

    Args:
        rows: (B,) keys of the rows.
        probability: (B, 1) or (B, L) mask probability, or one for all.
        maskable: (B, L) bool.
        stream: another one draws independently.

    Returns:
        (B, L) bool, True where the token is replaced by the mask token.
    """
    # Counted over maskable tokens, so that padding on the left or in between moves no draw.
    position = maskable.long().cumsum(-1)
    return (uniform(seed, step, rows[:, None], position, stream) < probability) & maskable


def draw_tokens(seed: int, step: int, rows: torch.Tensor, maskable: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """A uniformly random token id below `vocab_size` for every maskable token: (B,) keys, (B, L) bool -> (B, L)."""
    position = maskable.long().cumsum(-1)
    return hash_keys(seed, step, rows[:, None], position, TOKEN_STREAM) % vocab_size


def ranks(noise: torch.Tensor, maskable: torch.Tensor, segment_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Place of every maskable token in its segment's random order, and how many the segment has, at least 1.

    Args:
        noise: (B, L) below 1, independent numbers.
        maskable: (B, L) bool.
        segment_ids: (B, L) number of the text or block of every token, rising from the left.

    Returns:
        (B, L) from 0, at tokens that are not maskable behind all others; and (B, L).
    """
    noise = noise.masked_fill(~maskable, 2.0)
    # Sorted by segment, and in each by noise; the rank of a token is its distance from the start of its segment.
    order = noise.argsort(-1)
    order = order.gather(-1, segment_ids.gather(-1, order).argsort(dim=-1, stable=True))
    index = torch.arange(segment_ids.shape[-1], device=segment_ids.device).expand_as(segment_ids)
    parts = segment_ids.gather(-1, order)
    first = torch.nn.functional.pad(parts[:, 1:] != parts[:, :-1], (1, 0), value=True)
    rank = torch.zeros_like(segment_ids).scatter(-1, order, index - torch.where(first, index, 0).cummax(-1).values)
    sizes = torch.zeros_like(segment_ids).scatter_add(-1, segment_ids, maskable.long())
    return rank, sizes.gather(-1, segment_ids).clamp(min=1)


def draw_exact_mask(
    seed: int,
    step: int,
    rows: torch.Tensor,
    times: torch.Tensor,
    maskable: torch.Tensor,
    segment_ids: torch.Tensor,
    position: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Masks exactly k of the n maskable tokens of every segment, k uniform on 1 … n: less noise than one draw a token.

    Weighted n / k it estimates the same bound, whatever the schedule, because the number of masks is all that a time decides.

    Args:
        rows: (B,) keys of the rows.
        times: (B, L) times of the segments, uniform on [MIN_TIME, 1], which decide k.
        maskable: (B, L) bool.
        segment_ids: (B, L) number of the text or block of every token, rising from the left.
        position: (B, L) key of every maskable token in its row; None: its count. Rows of one key share the noise of equal ones.

    Returns:
        (B, L) bool, and (B, L) k / n.

    References: LLaDA (arXiv 2502.09992, eq. 6).
    """
    position = maskable.long().cumsum(-1) if position is None else position
    rank, n = ranks(uniform(seed, step, rows[:, None], position, MASK_STREAM), maskable, segment_ids)
    k = torch.maximum(torch.ceil((times - MIN_TIME) / (1 - MIN_TIME) * n), torch.ones_like(times)).clamp(max=n)
    return maskable & (rank < k), k / n


def row_keys(ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """(B,) keys of the noise: by content, and the n-th row with the same content gets noise of its own."""
    keys = content_keys(ids, attention_mask)
    occurrence = (keys[:, None] == keys[None]).long().tril(-1).sum(-1)
    return hash_keys(keys, occurrence)


NoiseSchedule = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def linear(t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """alpha = 1 - t: mask probability t, weight 1/t.

    Args:
        t: times in (0, 1], any shape.

    Returns:
        `(mask_probability, weight)`, fp32, of the same shape.
    """
    t = t.float()
    return t, 1 / t


def cosine(t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """alpha = 1 - cos(pi/2 (1 - t)): more time at high noise; weight pi/2 tan(pi/2 (1 - t)). Shapes as `linear`."""
    angle = math.pi / 2 * (1 - t.float())
    return torch.cos(angle), math.pi / 2 * torch.tan(angle)


def beta_linear(t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """DDPM's betas from 1e-4 to 0.02 over 1000 steps, in continuous time: alpha = exp(-(0.1 t + 9.95 t^2)). Shapes as `linear`.

    Rescaled so that nothing survives t = 1, where the original leaves 4e-5; the weight does not change by that.
    """
    t = t.float()
    hazard = 0.1 * t + 9.95 * t**2
    return torch.expm1(-hazard) / math.expm1(-10.05), (0.1 + 19.9 * t) / torch.expm1(hazard)


def beta_cosine(t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Improved DDPM's: alpha = cos^2(pi/2 (t + s) / (1 + s)) / cos^2(pi/2 s / (1 + s)), s = 0.008. Shapes as `linear`."""
    start, t = math.pi / 2 * 0.008 / 1.008, t.float()
    passed = math.pi / 2 * t / 1.008
    # cos^2 a - cos^2 b = sin(a + b) sin(b - a): no cancellation at small times.
    difference = torch.sin(2 * start + passed) * torch.sin(passed)
    weight = math.pi / 2 / 1.008 * torch.sin(2 * (start + passed)) / difference
    # The slope at t = 1 is zero up to rounding.
    return (difference / math.cos(start) ** 2).clamp(max=1), weight.clamp(min=0)


NOISE_SCHEDULES: dict[str, NoiseSchedule] = {
    "linear": linear,
    "cosine": cosine,
    "beta_linear": beta_linear,
    "beta_cosine": beta_cosine,
}


def get_noise_schedule(name: str) -> NoiseSchedule:
    """The schedule called `name`; ValueError when there is none."""
    if name not in NOISE_SCHEDULES:
        raise UserError(f"`noise_schedule` must be one of {sorted(NOISE_SCHEDULES)}, got {name!r}.")
    return NOISE_SCHEDULES[name]
