"""Fills gaps of unknown length between given pieces of text: [piece, gap, piece, gap, piece].

A mask stands for one token, so a gap's length must be chosen before its tokens are. Every length up to `max_gap_length` is tried: the
text is filled with that many masks, all candidates in one batch, and the filling whose tokens were surest is taken (the mean of their
log-probabilities when committed, as beam search compares hypotheses of different lengths). Of several gaps the leftmost is chosen
first, with the text up to the next gap; then all are filled together once more, where each sees everything.
Trade-off: as many fillings as lengths, for any model that sees both sides, as trained. Alternative: tokens that grow and shrink a gap,
which a model must be trained to say, or growing by the confidence of the end token (DAEDAL, arXiv 2508.00819), which fits open ends.
"""

from __future__ import annotations

import copy

import torch
from transformers import LogitsProcessorList

from .. import UserError
from ..models.patching import base_of
from ..models.record import record_of
from .canvas import fill_masks
from .config import DiffusionGenerationConfig


@torch.no_grad()
def fill_gaps(
    model: torch.nn.Module,
    pieces: list[list[int]],
    settings: DiffusionGenerationConfig,
    max_gap_length: int = 16,
    batch_size: int = 16,
    processors: LogitsProcessorList | None = None,
) -> list[list[int]]:
    """The tokens of every gap between neighbouring pieces.

    Args:
        pieces: token ids; the first and the last may be empty, which leaves an open end.
        settings: how each candidate is filled. End tokens end nothing here, and are not said where text follows.
        max_gap_length: most tokens of a gap, at least 1.
        batch_size: candidates filled at once.

    Returns:
        One list of tokens for each of the `len(pieces) - 1` gaps.

    Raises:
        ValueError: fewer than two pieces, a length below 1, or a model that does not see what follows a gap.
    """
    record = record_of(model)
    if record.mode.has_blocks:
        raise UserError(
            f"`attention`={record.attention!r}: the model does not see the text behind a gap; use a bidirectional one."
        )
    if len(pieces) < 2:
        raise UserError(f"`pieces`: a gap lies between two pieces of text, got {len(pieces)}.")
    if isinstance(max_gap_length, bool) or not isinstance(max_gap_length, int) or max_gap_length < 1:
        raise UserError(f"`max_gap_length` must be a whole number, at least 1, got {max_gap_length!r}.")
    limit = getattr(base_of(model).config.get_text_config(), "max_position_embeddings", None)
    longest = sum(map(len, pieces)) + max_gap_length * (len(pieces) - 1)
    if limit is not None and longest > limit:
        raise UserError(
            f"`max_gap_length`={max_gap_length}: up to {longest} tokens exceed the model's {limit} positions."
        )
    settings = copy.copy(settings)
    # Both sides are seen from the start, and no gap ends the text.
    settings.block_length, settings.grow_canvas, settings.output_history, settings.eos_token_id = (
        None,
        False,
        True,
        None,
    )
    before, lengths = list(pieces[0]), []
    for behind in pieces[1:]:
        candidates = [[n] for n in range(1, max_gap_length + 1)]
        fillings = []
        for first in range(0, max_gap_length, batch_size):
            chunk = candidates[first : first + batch_size]
            fillings += _fill(model, [before, behind], chunk, settings, processors)
        gap = max(fillings, key=lambda filling: filling[0])[1][0]
        lengths.append(len(gap))
        before += gap + list(behind)
    return [gap] if len(lengths) == 1 else _fill(model, pieces, [lengths], settings, processors)[0][1]


def _fill(
    model: torch.nn.Module,
    pieces: list[list[int]],
    candidates: list[list[int]],
    settings: DiffusionGenerationConfig,
    processors: LogitsProcessorList | None,
) -> list[tuple[float, list[list[int]]]]:
    """For each choice of lengths, how sure the filling is and its gaps."""
    rows = []
    for lengths in candidates:
        row = list(pieces[0])
        for n, piece in zip(lengths, pieces[1:], strict=True):
            row += [settings.mask_token_id] * n + list(piece)
        rows.append(row)
    device, width = next(model.parameters()).device, max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
    # A mask token in a piece is one gap more, of one token.
    output = fill_masks(model, ids, mask, settings, processors=processors)
    asked = (ids == settings.mask_token_id) & mask.bool()
    sure = torch.where(asked, output.confidence[-1].clamp(min=1e-9).log(), 0.0).sum(-1) / asked.sum(-1)
    result = []
    for row, lengths, score in zip(output.sequences.tolist(), candidates, sure.tolist(), strict=True):
        gaps, start = [], len(pieces[0])
        for n, piece in zip(lengths, pieces[1:], strict=True):
            gaps.append(row[start : start + n])
            start += n + len(piece)
        result.append((score, gaps))
    return result
