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
                                                              clean ....     x...     clean: causal (or block-causal)
                                                                    ....     xx..
                                                                    ....     xxx.
                                                                    ....     xxxx

References: BD3LM (arXiv 2503.09573, figure 4 and appendix B.6), SDAR (arXiv 2510.06303).
"""

from __future__ import annotations

import torch


def additive(allowed: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """(B, Q, K) bool, True = may attend -> (B, 1, Q, K) additive float."""
    bias = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
    return bias.masked_fill(~allowed, torch.finfo(dtype).min)[:, None]


def block_causal(attention_mask: torch.Tensor, block_length: int) -> torch.Tensor:
    """Bidirectional inside a block, causal between blocks: (B, L) padding mask -> (B, L, L) bool."""
    # Blocks count real tokens, so that left padding does not move them.
    block = (attention_mask.cumsum(-1) - 1).clamp(min=0) // block_length
    return (block[:, :, None] >= block[:, None, :]) & attention_mask[:, None, :].bool()


def block_decoding(
    attention_mask: torch.Tensor, block_length: int, clean_context: str, active: torch.Tensor
) -> torch.Tensor:
    """What block decoding sees at block `active` (B,) of every row, without a cache: (B, L) padding mask -> (B, L, L) bool.

    Finished text before the active block attends as in training's clean half; the active block sees all of it and itself in
    both directions; later blocks are seen by nobody before their turn.
    """
    position = attention_mask.cumsum(-1) - 1
    block = position.clamp(min=0) // block_length
    order = position if clean_context == "causal" else block
    inside = order[:, :, None] >= order[:, None, :]
    in_active = block[:, :, None] == active[:, None, None]
    up_to_active = block[:, None, :] <= active[:, None, None]
    return torch.where(in_active, up_to_active, inside) & attention_mask[:, None, :].bool()


def block_diffusion(attention_mask: torch.Tensor, block_length: int, clean_context: str) -> torch.Tensor:
    """Training mask over [noisy ; clean] halves of the same L tokens: (B, L) padding mask -> (B, 2L, 2L) bool.

    Args:
        clean_context: how the clean half sees itself, "causal" (what the AR model did) or "block" (block-causal).
    """
    position = attention_mask.cumsum(-1) - 1
    block = position.clamp(min=0) // block_length
    same = block[:, :, None] == block[:, None, :]
    before = block[:, :, None] > block[:, None, :]
    within_clean = position[:, :, None] >= position[:, None, :] if clean_context == "causal" else same | before
    never = torch.zeros_like(same)
    allowed = torch.cat([torch.cat([same, before], -1), torch.cat([never, within_clean], -1)], -2)
    return allowed & torch.cat([attention_mask, attention_mask], -1)[:, None, :].bool()
