"""What changes logits before a token is proposed: guidance, repetition penalty, the host's processors, forbidden words.

In this order; then the bans of `step.ban`, then temperature and filters. A position may be filled before those on its left, so
"the text so far" is what is committed anywhere: masks and padding say nothing.
Trade-off: a processor of the host is called once for every column of the window, with the text on its left, because it was written
for text that ends where it predicts. Alternative: one call with the whole canvas for all columns, whose end means nothing.

References: classifier-free guidance as in LLaDA (arXiv 2502.09992, appendix A.2, eq. 16), CTRL (arXiv 1909.05858) for the penalty.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import LogitsProcessorList

from ..models.sampling import BANNED
from .commit_rules import ranks


@dataclass
class Window:
    """The positions scored by one forward pass, k of every row, in text order."""

    columns: torch.Tensor  # (B, k) in the canvas
    open: torch.Tensor  # (B, k) bool, positions that may change
    masked: torch.Tensor  # (B, k) bool, those that hold a mask
    canvas: torch.Tensor  # (B, L) tokens
    visible: torch.Tensor  # (B, L) bool, committed text: neither padding nor mask
    confidence: torch.Tensor  # (B, k) probability that every token had when it was committed
    keys: torch.Tensor  # (B,) of the noise
    places: torch.Tensor  # (B, k) positions in the text
    step: torch.Tensor  # (B,) passes the row has seen
    steps_left: torch.Tensor  # (B,) of the block, this one included; used where `steps` is set
    post_steps: torch.Tensor  # (B,) passes over this block after its last mask was gone
    block_steps: int  # steps of a block, where `steps` is set

    @property
    def ids(self) -> torch.Tensor:
        """(B, k) tokens there now."""
        return self.canvas.gather(-1, self.columns)


def guide(logits: torch.Tensor, scale: float) -> torch.Tensor:
    """(2B, k, V), with the prompt and without -> (B, k, V): away from what the model says without the prompt.

    LLaDA writes l_u + (w + 1) (l_c - l_u); `scale` is its w + 1, as in the host: 1 is no guidance.
    """
    conditional, unconditional = logits.chunk(2)
    return unconditional + scale * (conditional - unconditional)


def penalise_repetition(logits: torch.Tensor, window: Window, penalty: float) -> torch.Tensor:
    """Makes tokens that stand in the committed text less likely: (B, k, V) -> (B, k, V); no position counts itself."""
    weight = window.visible.to(logits.dtype)
    counts = logits.new_zeros(logits.shape[0], logits.shape[-1]).scatter_add(-1, window.canvas, weight)
    lower = torch.where(logits < 0, logits * penalty, logits / penalty)
    penalised = torch.where(counts[:, None] > 0, lower, logits)
    own = window.ids
    alone = (counts.gather(-1, own) == 1) & ~window.masked & window.open
    mine = torch.where(alone[..., None], logits.gather(-1, own[..., None]), penalised.gather(-1, own[..., None]))
    return penalised.scatter(-1, own[..., None], mine)


def apply_processors(logits: torch.Tensor, window: Window, processors: LogitsProcessorList) -> torch.Tensor:
    """The host's processors, each position with the text on its left, in which what is open still holds the mask token."""
    logits = logits.clone()
    for column in window.columns.unique().tolist():
        row, place = (window.columns == column).nonzero(as_tuple=True)
        logits[row, place] = processors(window.canvas[row, :column], logits[row, place])
    return logits


def ban_words(logits: torch.Tensor, window: Window, words: list[list[int]]) -> torch.Tensor:
    """Puts out of reach, in place, every token that would complete a forbidden sequence with the committed text around it."""
    length = window.canvas.shape[1]
    for word in words:
        for own, token in enumerate(word):
            completes = torch.ones_like(window.open)
            for other, neighbour in enumerate(word):
                if other == own:
                    continue
                column = window.columns + other - own
                inside = (column >= 0) & (column < length)
                column = column.clamp(0, length - 1)
                there = window.visible.gather(-1, column) & (window.canvas.gather(-1, column) == neighbour)
                completes = completes & inside & there
            logits[..., token] = torch.where(completes, BANNED, logits[..., token])
    return logits


def without_bad_words(
    chosen: torch.Tensor, tokens: torch.Tensor, score: torch.Tensor, window: Window, words: list[list[int]]
) -> torch.Tensor:
    """Takes back commits (B, k) that would write a forbidden sequence together; the best commit of a row always stays."""
    canvas = window.canvas.scatter(-1, window.columns, torch.where(chosen, tokens, window.ids))
    new = torch.zeros_like(window.visible).scatter(-1, window.columns, chosen)
    visible, conflict = window.visible | new, torch.zeros_like(new)
    length = canvas.shape[1]
    for word in (word for word in words if 1 < len(word) <= length):
        starts = length - len(word) + 1
        there = [(canvas[:, i : i + starts] == token) & visible[:, i : i + starts] for i, token in enumerate(word)]
        written = torch.stack(there).all(0)
        for i in range(len(word)):
            conflict[:, i : i + starts] |= written
    return chosen & (~conflict.gather(-1, window.columns) | (ranks(score, chosen) == 0))
