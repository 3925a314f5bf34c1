"""Where an answer ends, said at the first step: canvases sized to it, grown when it was too short, and how well it is said.

A model that was trained on canvases whose length says nothing of the answer's (`max_canvas`), filled behind the end token, knows at
place i of an empty canvas how likely the answer has ended by then: a distribution function of the length.

    place               0    1    2    3    4    5    6   …
    P(end <= place)    .00  .01  .02  .31  .94  .99  1.0       quantile 0.9: 5 tokens, the end token included

1. `predict_lengths`: one forward over a short canvas, doubled for rows that do not end in it.
2. `fill_sized`: every row gets the canvas it asked for, and a longer one if no end came into it.
3. `end_metrics`: what was said, against where answers really end.

Trade-off: one forward for the size, and canvases of one batch padded to the longest. Alternative: block decoding, whose length is open.

References: DAEDAL (arXiv 2508.00819) for growing, rho-EOS (arXiv 2601.22527) for reading the density of end tokens.
"""

from __future__ import annotations

import copy

import torch
from transformers import LogitsProcessorList

from ..models.outputs import DiffusionOutput, eos_ids, output_of
from ..models.record import record_of
from ..objective.noise import (
    readout_positions,
)
from .canvas import OnStep, fill_masks
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
    read = columns
    if record.right_shift_logits:
        # The first token of a text has no predecessor, not even padding: it is read in its own place.
        read = torch.where(places[:, first:] > 0, readout_positions(columns, True), columns)
    timing = {}
    hidden = ids == record.mask_token_id
    if record.time_embedding:
        noise = hidden[:, first:].float().mean(-1, keepdim=True)
        timing["timesteps"] = noise.expand(ids.shape) * attention_mask
    logits = model(
        input_ids=ids,
        attention_mask=attention_mask,
        position_ids=places.clamp(min=0),
        logits_to_keep=read,
        use_cache=False,
        **timing,
    ).logits.float()
    if record.converted:
        logits[..., record.mask_token_id] = -torch.inf
    said = (logits[..., ends].logsumexp(-1) - logits.logsumexp(-1)).exp()
    return torch.where(hidden[:, first:], said, torch.isin(ids[:, first:], ends).float())


def quantile_lengths(probabilities: torch.Tensor, quantile: float) -> torch.Tensor:
    """Tokens through the end token that hold the answer with this probability: (B, W) of `end_probabilities` -> (B,), W + 1 = none."""
    reached = probabilities >= quantile
    width = probabilities.shape[1]
    return torch.where(reached.any(-1), reached.long().argmax(-1), width) + 1


@torch.no_grad()
def predict_lengths(
    model: torch.nn.Module,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    settings: DiffusionGenerationConfig,
    longest: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Lengths of the answers of left-padded prompts (B, P) by `settings.length_quantile`, at most `longest`, and forward passes, (B,) each.

    The first canvas has `settings.initial_length` tokens; rows that do not end in it are asked again with twice as many.
    """
    ends, width = end_ids(model, settings, input_ids.device), min(settings.initial_length, longest)
    lengths, nfe = torch.full_like(input_ids[:, 0], longest), torch.zeros_like(input_ids[:, 0])
    rows = torch.arange(len(input_ids), device=input_ids.device)
    training = model.training
    model.eval()
    try:
        while rows.numel():
            ids, mask = _with_masks(input_ids[rows], attention_mask[rows], width, settings.mask_token_id)
            found = quantile_lengths(
                end_probabilities(model, ids, mask, input_ids.shape[1], ends), settings.length_quantile
            )
            nfe[rows] += 1
            done = found <= width
            lengths[rows] = torch.where(done, found, lengths[rows])
            if width == longest:
                break
            rows, width = rows[~done], min(2 * width, longest)
    finally:
        model.train(training)
    return lengths, nfe


def _with_masks(ids: torch.Tensor, mask: torch.Tensor, n: int, mask_token_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    pad = torch.nn.functional.pad
    return pad(ids, (0, n), value=mask_token_id), pad(mask.long(), (0, n), value=1)


def fill_sized(
    model: torch.nn.Module,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    settings: DiffusionGenerationConfig,
    on_step: OnStep | None = None,
    processors: LogitsProcessorList | None = None,
) -> DiffusionOutput:
    """Answers left-padded prompts (B, P) on canvases of the length that the model foresees; sequences (B, P + max_new_tokens).

    A row whose canvas was filled without an end token goes on behind it: its text so far is the prompt of a next, sized canvas.
    """
    settings, first = copy.copy(settings), input_ids.shape[1]
    settings.eos_token_id = end_ids(model, settings, input_ids.device).tolist()
    ends = eos_ids(settings, input_ids.device)
    canvas, mask = _with_masks(input_ids, attention_mask, settings.max_new_tokens, settings.mask_token_id)
    was_open = torch.zeros_like(canvas, dtype=torch.bool)
    was_open[:, first:] = True
    nfe, done = torch.zeros_like(canvas[:, 0]), torch.zeros_like(canvas[:, 0])
    rows, history, confidences = torch.arange(len(canvas), device=canvas.device), [], []
    confidence = torch.zeros(canvas.shape, device=canvas.device)
    while rows.numel():
        texts, text_mask = _shifted(canvas[rows], mask[rows], first + done[rows])
        room = settings.max_new_tokens - done[rows]
        lengths, passes = predict_lengths(model, texts, text_mask, settings, int(room.max()))
        lengths = (lengths + settings.length_margin).minimum(room)
        width = texts.shape[1]
        ids, ids_mask = _with_masks(texts, text_mask, int(lengths.max()), settings.mask_token_id)
        ids_mask[:, width:] = torch.arange(ids.shape[1] - width, device=ids.device) < lengths[:, None]

        def step(
            drafts: torch.Tensor,
            sure: torch.Tensor,
            rows: torch.Tensor = rows,
            width: int = width,
            lengths: torch.Tensor = lengths,
        ) -> None:
            _write(canvas, rows, first + done[rows], drafts[:, width:], lengths)
            _write(confidence, rows, first + done[rows], sure[:, width:], lengths)
            if settings.output_history:
                history.append(canvas.clone())
                confidences.append(confidence.clone())
            if on_step is not None:
                on_step(canvas, confidence)

        output = fill_masks(model, ids, ids_mask, settings, width, step, processors)
        nfe[rows] += passes + output.nfe
        _write(canvas, rows, first + done[rows], output.sequences[:, width:], lengths)
        done[rows] += lengths
        over = (torch.isin(canvas[rows], ends) & was_open[rows]).any(-1) | (done[rows] >= settings.max_new_tokens)
        rows = rows[~over]
    # Behind the end stands the end token.
    after = (torch.isin(canvas, ends) & was_open).long().cumsum(-1) > 0
    canvas = torch.where(after & (canvas == settings.mask_token_id), ends[0] if ends.numel() else canvas, canvas)
    output = output_of(canvas, was_open, nfe, ends, history if settings.output_history else None)
    output.confidence = confidences if settings.output_history else None
    return output


def _shifted(ids: torch.Tensor, mask: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The first `lengths` (B,) columns of every row, moved to the right so that all of them end together: (B, max(lengths)) each."""
    width = int(lengths.max())
    column = torch.arange(width, device=ids.device) - (width - lengths)[:, None]
    inside = column >= 0
    column = column.clamp(min=0)
    return ids.gather(-1, column), mask.gather(-1, column) * inside


def _write(
    canvas: torch.Tensor, rows: torch.Tensor, start: torch.Tensor, answer: torch.Tensor, lengths: torch.Tensor
) -> None:
    """Writes the first `lengths` (B,) tokens of `answer` (B, W) into `rows` of the canvas, from column `start` (B,) on, in place."""
    step = torch.arange(answer.shape[1], device=canvas.device)
    inside = step < lengths[:, None]
    canvas[rows[:, None].expand_as(answer)[inside], (start[:, None] + step)[inside]] = answer[inside]


def end_metrics(probabilities: torch.Tensor, lengths: torch.Tensor) -> dict[str, torch.Tensor]:
    """How well the ends of answers are foreseen.

    Args:
        probabilities: (B, W) P(end <= place).
        lengths: (B,) true ones, the end token included, at most W.

    Returns:
        (B,) each: `probability` of an end token at the true place; `top1` whether the likeliest place is the true one; `reciprocal_rank`
        of the true place among all places, by how likely the answer ends just there; `error` of the median length, in tokens.
    """
    highest = probabilities.cummax(-1).values
    here = highest - torch.nn.functional.pad(highest[:, :-1], (1, 0))  # the likelihood of every length
    place = (lengths - 1)[:, None]
    true = here.gather(-1, place)
    index = torch.arange(here.shape[1], device=here.device)
    rank = 1 + ((here > true) | ((here == true) & (index < place))).sum(-1)
    return {
        "probability": probabilities.gather(-1, place).squeeze(-1),
        "top1": rank == 1,
        "reciprocal_rank": 1 / rank,
        "error": quantile_lengths(probabilities, 0.5) - lengths,
    }
