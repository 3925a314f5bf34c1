"""Seeded noise: times, masks, orders and replacements as a hash of (seed, step, row of the global batch, position).

The hash is made of integer torch operations, so noise depends on neither device, padding, loader workers, processes nor
accumulation steps, and a resumed run draws what an uninterrupted one would.
"""

from __future__ import annotations

import torch

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
    return low + (high - low) * ((stratum + offset) / n_rows).clamp(max=1.0)


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
    return rank, torch.zeros_like(segment_ids).scatter_add(-1, segment_ids, maskable.long()).gather(
        -1, segment_ids
    ).clamp(min=1)


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
