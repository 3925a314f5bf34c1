"""Where an answer ends, predicted at the first step: canvases sized to it, and grown when they were too short.

A model that was trained on canvases whose length does not depend on the answer's (`max_canvas`), filled behind the end token, knows at
place i of an empty canvas how likely the answer has ended by then: a distribution function of the length.

    place               0    1    2    3    4    5    6   …
    P(end <= place)    .00  .01  .02  .31  .94  .99  1.0       quantile 0.9: 5 tokens, the end token included

1. `predict_lengths`: one forward over a short canvas, doubled for rows that do not end in it.
2. `fill_sized`: every row gets a canvas of its length, and a longer one if no end came into it.

References: DAEDAL (arXiv 2508.00819) for growing, rho-EOS (arXiv 2601.22527) for reading the density of end tokens.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import LogitsProcessorList

from ..models.patching import in_eval_mode
from ..models.record import record_of
from ..models.sampling import DiffusionOutput, OnStep, Recorder, behind, eos_ids
from .canvas import fill_masks, with_masks
from .config import DiffusionGenerationConfig


def end_ids(model: torch.nn.Module, settings: DiffusionGenerationConfig, device: torch.device) -> torch.Tensor:
    """End tokens, and the token that stands behind them where that is another."""
    tail = record_of(model).tail_token_id
    eos = eos_ids(settings, device)
    return eos if tail is None else torch.cat([eos, torch.tensor([tail], device=device)]).unique()


@torch.no_grad()
def end_probabilities(
    model: torch.nn.Module, ids: torch.Tensor, attention_mask: torch.Tensor, first: int, ends: torch.Tensor
) -> torch.Tensor:
    """P(end <= place) at every place of a canvas, by one forward pass.

    Args:
        ids, attention_mask: (B, L), prompts padded on the left; the canvas starts at column `first`, masks and any known tokens.
        ends: (n,) ids of the end token and of what stands behind it.

    Returns:
        (B, L - first) fp32; of known tokens 0 or 1.
    """
    record, places = record_of(model), attention_mask.cumsum(-1) - 1
    columns = torch.arange(first, ids.shape[1], device=ids.device).expand(len(ids), -1)
    hidden, timing = ids == record.mask_token_id, {}
    if record.time_embedding:
        noise = hidden[:, first:].float().mean(-1, keepdim=True)
        timing["timesteps"] = noise.expand(ids.shape) * attention_mask
    logits = model(
        input_ids=ids,
        attention_mask=attention_mask,
        position_ids=places.clamp(min=0),
        logits_to_keep=record.mode.readout_positions(columns, places[:, first:]),
        use_cache=False,
        **timing,
    ).logits.float()
    if record.converted:
        logits[..., record.mask_token_id] = -torch.inf
    predicted = (logits[..., ends].logsumexp(-1) - logits.logsumexp(-1)).exp()
    return torch.where(hidden[:, first:], predicted, torch.isin(ids[:, first:], ends).float())


def quantile_lengths(probabilities: torch.Tensor, quantile: float) -> torch.Tensor:
    """Tokens through the end token that hold the answer with this probability: (B, W) of `end_probabilities` -> (B,), W + 1 = none."""
    reached = probabilities >= quantile
    return torch.where(reached.any(-1), reached.long().argmax(-1), probabilities.shape[1]) + 1


def predict_lengths(
    model: torch.nn.Module,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    settings: DiffusionGenerationConfig,
    longest: int | torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Lengths of the answers of left-padded prompts (B, P) by `settings.length_quantile`, and forward passes, (B,) each.

    The first canvas has `settings.initial_length` tokens; rows that do not end in it get another one, twice as long. `longest`, of all
    rows or (B,), bounds both.
    """
    ends, nfe, first = end_ids(model, settings, input_ids.device), torch.zeros_like(input_ids[:, 0]), input_ids.shape[1]
    lengths, width = nfe + longest, settings.initial_length
    rows = torch.arange(len(input_ids), device=input_ids.device)
    with in_eval_mode(model):
        while rows.numel():
            room = lengths[rows]
            width = min(width, int(room.max()))
            ids, mask = with_masks(input_ids[rows], attention_mask[rows], width, settings.mask_token_id)
            inside = torch.arange(width, device=ids.device) < room[:, None]
            mask[:, first:] = inside
            probabilities = end_probabilities(model, ids, mask, first, ends).masked_fill(~inside, 0.0)
            found = quantile_lengths(probabilities, settings.length_quantile)
            nfe[rows] += 1
            lengths[rows] = torch.where(found <= width, found, room)
            rows, width = rows[(found > width) & (room > width)], 2 * width
    return lengths, nfe


def fill_sized(
    model: torch.nn.Module,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    settings: DiffusionGenerationConfig,
    on_step: OnStep | None = None,
    processors: LogitsProcessorList | None = None,
) -> DiffusionOutput:
    """Answers left-padded prompts (B, P) on canvases of the length that the model predicts; sequences (B, P + max_new_tokens).

    A row whose canvas was filled without an end token goes on behind it: its text so far is the prompt of a next, sized canvas.
    """
    settings, first, recorder = copy.copy(settings), input_ids.shape[1], Recorder(settings, on_step)
    ends = end_ids(model, settings, input_ids.device)
    settings.eos_token_id, settings.output_history = ends.tolist(), False
    canvas, mask = with_masks(input_ids, attention_mask, settings.max_new_tokens, settings.mask_token_id)
    was_open = behind(canvas, first)
    confidence = torch.zeros(canvas.shape, device=canvas.device)
    nfe, done = torch.zeros_like(canvas[:, 0]), torch.zeros_like(canvas[:, 0])
    rows, gone = torch.arange(len(canvas), device=canvas.device), torch.zeros_like(done, dtype=torch.bool)

    def filled() -> torch.Tensor:
        """The canvas, in which the end token stands behind an end."""
        after = (torch.isin(canvas, ends) & was_open).long().cumsum(-1) > 0
        return torch.where(after & (canvas == settings.mask_token_id), ends[0] if ends.numel() else canvas, canvas)

    while rows.numel():
        texts, text_mask = _aligned(canvas[rows], mask[rows], first + done[rows])
        room = settings.max_new_tokens - done[rows]
        lengths, passes = predict_lengths(model, texts, text_mask, settings, room)
        lengths, width = (lengths + settings.length_margin).minimum(room), texts.shape[1]
        ids, ids_mask = with_masks(texts, text_mask, int(lengths.max()), settings.mask_token_id)
        inside = torch.arange(ids.shape[1] - width, device=ids.device) < lengths[:, None]
        ids_mask[:, width:] = inside
        row, place = inside.nonzero(as_tuple=True)
        at = rows[row], (first + done[rows])[row] + place  # where the canvases of this round stand in the answers

        def step(drafts: torch.Tensor, sure: torch.Tensor, at: Any = at, inside: Any = inside, rows: Any = rows) -> Any:
            canvas[at], confidence[at] = drafts[:, -inside.shape[1] :][inside], sure[:, -inside.shape[1] :][inside]
            given_up = recorder.step(canvas if settings.revises else filled(), confidence)
            return None if given_up is None else gone.logical_or_(given_up)[rows]

        output = fill_masks(model, ids, ids_mask, settings, width, step, processors)
        nfe[rows] += passes + output.nfe
        canvas[at] = output.sequences[:, width:][inside]
        done[rows] += lengths
        over = (torch.isin(canvas[rows], ends) & was_open).any(-1) | (done[rows] >= settings.max_new_tokens)
        rows = rows[~(over | gone[rows])]
    return recorder.output(filled(), was_open, nfe, ends)


def _aligned(ids: torch.Tensor, mask: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The first `lengths` (B,) columns of every row, moved to the right so that all of them end together: (B, max(lengths)) each."""
    width = int(lengths.max())
    column = torch.arange(width, device=ids.device) - (width - lengths)[:, None]
    return ids.gather(-1, column.clamp(min=0)), mask.gather(-1, column.clamp(min=0)) * (column >= 0)
