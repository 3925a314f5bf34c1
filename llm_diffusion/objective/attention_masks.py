"""Who may attend to whom, as 4-D additive float masks.

All masks are (B, 1, Q, K) or broadcast to it: 0 where attention is allowed, the most negative finite number where not.
Float, because a boolean 4-D mask is right for sdpa and silently means "everything" for eager; finite, because a row with no
allowed key must not become NaN.

    bidirectional     causal            block-causal, b=2     block diffusion, b=2 (queries down, keys across)
    x x x x           x . . .           x x . .                     noisy    clean
    x x x x           x x . .           x x . .               noisy xx..     ....     noisy: own block
    x x x x           x x x .           x x x x                     xx..     ....       and clean blocks before it
    x x x x           x x x x           x x x x                     ..xx     xx..
                                                                    ..xx     xx..
    two packed texts  half annealed                           clean ....     x...     clean: causal (or block-causal)
    x x . .           x ~ ~ ~                                       ....     xx..
    x x . .           x x ~ ~         ~ : log(1 - causal ratio)     ....     xxx.
    . . x x           x x x ~                                       ....     xxxx
    . . x x           x x x x

All are made from `document_ids` (B, L): 0 at padding, elsewhere the number of the text a token belongs to, rising from left to right.
The usual padding mask of 0 and 1 is the case of one text a row. Texts never see each other, and positions and blocks are counted
from the start of each.

References: BD3LM (arXiv 2503.09573, figure 4 and appendix B.6), SDAR (arXiv 2510.06303), DiffuLLaMA (arXiv 2410.17891, section 3.2)
for attention annealing.
"""

from __future__ import annotations

import math

import torch

from .. import UserError


def additive(allowed: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """(B, Q, K) bool, True = may attend -> (B, 1, Q, K) additive float."""
    bias = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
    return bias.masked_fill(~allowed, torch.finfo(dtype).min)[:, None]


def positions(document_ids: torch.Tensor) -> torch.Tensor:
    """Place of every token in its own text, padding not counted: (B, L) -> (B, L); below 0 in padding on the left."""
    real = document_ids > 0
    count = real.cumsum(-1) - 1
    so_far = document_ids.cummax(-1).values
    first = real & (document_ids > torch.nn.functional.pad(so_far[:, :-1], (1, 0)))
    return count - torch.where(first, count, 0).cummax(-1).values


def column_index(ids: torch.Tensor) -> torch.Tensor:
    """The column of every token of a batch: (B, L) -> (B, L)."""
    return torch.arange(ids.shape[-1], device=ids.device).expand_as(ids)


def segments(document_ids: torch.Tensor, block_length: int | None, offset: torch.Tensor | int = 0) -> torch.Tensor:
    """Number of the block, or without blocks of the text, that every token belongs to, counted through the row: (B, L).

        document_ids   1 1 1 1 1 2 2 2 0      blocks of 2:   0 0 1 1 2 3 3 4 4      texts:   0 0 0 0 0 1 1 1 0

    Args:
        offset: by how many tokens, (B, 1), the first block of a text is shortened.
    """
    if block_length is None:
        return (document_ids - 1).clamp(min=0)
    position = positions(document_ids)
    starts = (((position + offset) % block_length == 0) | (position == 0)) & (document_ids > 0)
    return (starts.cumsum(-1) - 1).clamp(min=0)


def bidirectional(document_ids: torch.Tensor) -> torch.Tensor:
    """Every token of a text sees all of it: (B, L) -> (B, L, L) bool."""
    return (document_ids[:, :, None] == document_ids[:, None, :]) & (document_ids > 0)[:, None, :]


def block_causal(document_ids: torch.Tensor, block_length: int) -> torch.Tensor:
    """Bidirectional inside a block, causal between blocks: (B, L) -> (B, L, L) bool. Blocks of one are causal."""
    block = positions(document_ids).clamp(min=0) // block_length
    return (block[:, :, None] >= block[:, None, :]) & bidirectional(document_ids)


def annealed(document_ids: torch.Tensor, causal_ratio: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Between causal (ratio 1) and bidirectional (ratio 0): (B, L) -> (B, 1, L, L) additive float.

    The future keys get log(1 - ratio) before the softmax, which scales their share of attention by 1 - ratio. (Adding 1 - ratio
    itself leaks the future at ratio 1; as a boolean it is fully bidirectional for every ratio below 1.)
    """
    if not 0 <= causal_ratio <= 1:
        raise UserError(f"`causal_ratio` must be in [0, 1], got {causal_ratio}.")
    bias = math.log1p(-causal_ratio) if causal_ratio < 1 else torch.finfo(dtype).min
    future = torch.full((document_ids.shape[-1],) * 2, bias, dtype=dtype, device=document_ids.device).triu(1)
    return (future + additive(bidirectional(document_ids), dtype)).clamp(min=torch.finfo(dtype).min)


def block_decoding(
    document_ids: torch.Tensor, block_length: int, clean_context: str, active: torch.Tensor
) -> torch.Tensor:
    """What block decoding sees at block `active` (B,) of every row, without a cache: (B, L) padding mask -> (B, L, L) bool.

    Finished text before the active block attends as in training's clean half; the active block sees all of it and itself in
    both directions; later blocks are seen by nobody before their turn.
    """
    position = positions(document_ids)
    block = position.clamp(min=0) // block_length
    order = position if clean_context == "causal" else block
    inside = order[:, :, None] >= order[:, None, :]
    in_active = block[:, :, None] == active[:, None, None]
    up_to_active = block[:, None, :] <= active[:, None, None]
    return torch.where(in_active, up_to_active, inside) & (document_ids > 0)[:, None, :]


def block_diffusion(
    document_ids: torch.Tensor, block_length: int, clean_context: str, offset: torch.Tensor | int = 0
) -> torch.Tensor:
    """Training mask over [noisy ; clean] halves of the same L tokens: (B, L) -> (B, 2L, 2L) bool.

    Args:
        clean_context: how the clean half sees itself, "causal" (what the AR model did) or "block" (block-causal).
        offset: by how many tokens, (B, 1), the first block is shortened.
    """
    position, text = positions(document_ids), bidirectional(document_ids)
    block = (position + offset).clamp(min=0) // block_length
    same = (block[:, :, None] == block[:, None, :]) & text
    before = (block[:, :, None] > block[:, None, :]) & text
    within_clean = position[:, :, None] >= position[:, None, :] if clean_context == "causal" else same | before
    never = torch.zeros_like(same)
    return torch.cat([torch.cat([same, before], -1), torch.cat([never, within_clean & text], -1)], -2)


def symmetric(mask: torch.Tensor) -> torch.Tensor:
    """A causal attention mask (..., Q, K), bool or additive, made bidirectional; one that is not causal passes as it is.

    What may be seen from a later position may be seen from an earlier one of the same text; keys that no real query sees (padding)
    stay hidden:

        left padding                 two packed texts
        . . . .      . . . .         x . . .      x x . .
        . x . .  ->  . x x x         x x . .  ->  x x . .
        . x x .      . x x x         . . x .      . . x x
        . x x x      . x x x         . . x x      . . x x

    Raises:
        ValueError: an additive mask with biases of its own (ALiBi), whose mirror image is unknown.
    """
    length = mask.shape[-1]
    if mask.shape[-2] != length:
        return mask
    visible = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    later = torch.ones(length, length, dtype=torch.bool, device=mask.device).triu(1)
    # transformers lets padding see everything, because the kernel makes NaN of a row that sees nothing.
    open_row = visible.all(-1, keepdim=True) | ~visible.any(-1, keepdim=True)
    open_row[..., -1:, :] = False  # the last row of a causal mask sees all without being open
    causal = ~(visible & later & ~open_row).any(-1, keepdim=True).any(-2, keepdim=True)
    seen = visible & ~open_row
    either = (seen | seen.transpose(-1, -2)) & seen.any(-2, keepdim=True)
    if mask.dtype == torch.bool:
        return torch.where(causal, either | (visible & open_row), visible)
    if not torch.compiler.is_compiling() and bool((mask.masked_fill(~visible, 0) != 0).any() & causal.any()):
        raise UserError("its attention mask carries position biases, whose mirror image is unknown")
    bias = torch.zeros_like(mask).masked_fill(~(either | (visible & open_row)), torch.finfo(mask.dtype).min)
    return torch.where(causal, bias, mask)
