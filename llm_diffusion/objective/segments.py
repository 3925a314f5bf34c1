"""Parts of a row: the texts of a packed row, or the blocks of a text, and where a token stands in its part.

    document_ids   1 1 1 1 1 2 2 2 0      blocks of 2:   0 0 1 1 2 3 3 4 4      texts:   0 0 0 0 0 1 1 1 0

Trade-off: numbers of parts (B, L), on which everything is one scatter, instead of lists of spans. Alternative: a loop over rows.
"""

from __future__ import annotations

import torch

from .attention_masks import positions


def places(ids: torch.Tensor) -> torch.Tensor:
    return torch.arange(ids.shape[-1], device=ids.device).expand_as(ids)


def nothing_to_the_right(visible: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """Which tokens have no visible one behind them in their own text or block: (B, L) each -> (B, L) bool."""
    place = places(part)
    last = torch.full_like(part, -1).scatter_reduce(-1, part, torch.where(visible, place, -1), "amax")
    return place > last.gather(-1, part)


def behind_first(maskable: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """Which tokens have a maskable one before them in their own part: (B, L) each -> (B, L) bool."""
    place, length = places(part), part.shape[-1]
    first = torch.full_like(part, length).scatter_reduce(-1, part, torch.where(maskable, place, length), "amin")
    return place > first.gather(-1, part)


def parts(document_ids: torch.Tensor, block_length: int | None, offset: torch.Tensor | int = 0) -> torch.Tensor:
    """Number of the block, or without blocks of the text, that every token belongs to, counted through the row: (B, L)."""
    if block_length is None:
        return (document_ids - 1).clamp(min=0)
    position = positions(document_ids)
    starts = (((position + offset) % block_length == 0) | (position == 0)) & (document_ids > 0)
    return (starts.cumsum(-1) - 1).clamp(min=0)


def first_of(part: torch.Tensor) -> torch.Tensor:
    """Which tokens are the first of their part: (B, L) -> bool."""
    return torch.nn.functional.pad(part[:, 1:] != part[:, :-1], (1, 0), value=True)
