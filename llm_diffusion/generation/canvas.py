"""Fills the masks of a canvas by iterative unmasking, every forward over the whole canvas.

A canvas of text and mask tokens is filled from the most confident position outwards, several tokens a forward pass. With a
`block_length` it is filled block by block from the left, LLaDA's semi-autoregressive order; later blocks stand there as masks,
or, with `grow_canvas`, do not exist yet. Only positions of the active block meet the vocabulary.
Trade-off: no cache, which is exact for a bidirectional model, unless an `approximate_cache` is asked for. Alternative:
`blocks`, exact with a cache, for block models.

References: LLaDA (arXiv 2502.09992, algorithms 4-5), Fast-dLLM (arXiv 2505.22618) for the threshold.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from transformers import LogitsProcessorList

from .. import UserError
from ..models.outputs import DiffusionOutput, eos_ids, output_of
from ..models.patching import base_of, is_compiled
from ..models.record import record_of
from ..objective.attention_masks import additive, block_decoding
from ..objective.noise import (
    readout_positions,
    row_keys,
)
from .cache import CanvasCache, check_canvas_cache, refuse
from .config import DiffusionGenerationConfig
from .logits import (
    Window,
    guide,
)
from .step import commit, still_busy

OnStep = Callable[[torch.Tensor, torch.Tensor], None]  # gets the canvas (B, L) and how sure each token was, (B, L)


@dataclass
class _Rows:
    """The rows still being decoded; all tensors lose a row together when it is finished."""

    ids: torch.Tensor  # (B, L)
    attention_mask: torch.Tensor  # (B, L)
    open: torch.Tensor  # (B, L) bool, positions that held a mask at the start
    confidence: torch.Tensor  # (B, L) probability that every token had when it was committed
    block: torch.Tensor  # (B, L) block of every open position, counted from the left
    keys: torch.Tensor  # (B,) of the noise
    index: torch.Tensor  # (B,) place in the batch as given
    active: torch.Tensor  # (B,) block being filled
    steps_left: torch.Tensor  # (B,) steps left for that block, this one included
    steps_done: torch.Tensor  # (B,) steps so far
    busy: torch.Tensor  # (B,) bool, whether revision of the active block goes on
    post_steps: torch.Tensor  # (B,) steps over the active block without a mask

    def select(self, rows: torch.Tensor) -> _Rows:
        return _Rows(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})


def _start(
    ids: torch.Tensor, attention_mask: torch.Tensor, settings: DiffusionGenerationConfig, first: int, from_start: bool
) -> _Rows:
    is_open = (ids == settings.mask_token_id) & attention_mask.bool()
    is_open[:, :first] = False  # a prompt may speak of the mask token
    # Blocks are counted in the text, padding left out: from its start, or from the first token of the answer.
    place = attention_mask.cumsum(-1) - 1
    if first and not from_start:
        place = place - place[:, first : first + 1]
    index = torch.arange(ids.shape[0], device=ids.device)
    return _Rows(
        ids=ids.clone(),
        attention_mask=attention_mask,
        open=is_open,
        confidence=torch.zeros(ids.shape, device=ids.device),
        block=(place // settings.block_length).clamp(min=0),
        keys=row_keys(ids, attention_mask),
        index=index,
        active=torch.full_like(index, -1),
        steps_left=torch.zeros_like(index),
        steps_done=torch.zeros_like(index),
        busy=torch.zeros_like(index, dtype=torch.bool),
        post_steps=torch.zeros_like(index),
    )


@torch.no_grad()
def fill_masks(
    model: torch.nn.Module,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    settings: DiffusionGenerationConfig,
    first: int = 0,
    on_step: OnStep | None = None,
    processors: LogitsProcessorList | None = None,
) -> DiffusionOutput:
    """Fills every mask token of a batch; other tokens stay as they are.

    Args:
        input_ids: (B, L) with mask tokens anywhere, ragged rows padded on either side.
        attention_mask: (B, L), 0 at padding.
        settings: see `DiffusionGenerationConfig`.
        first: column at which the canvas starts: blocks are counted from it, and mask tokens before it stay.
        on_step: called after every step with the whole canvas (B, L) and the probabilities its tokens had when committed, (B, L).
        processors: of the host, see `logits.apply_processors`.

    Returns:
        A `DiffusionOutput`. After the end token a row is filled with it, so that no mask is left.
    """
    settings = copy.copy(settings)
    span = input_ids.shape[1] - first
    record = record_of(model)
    if record.mode.drafts:
        raise UserError(
            "`model`: a lossless adapter drafts what its base says next; it cannot fill gaps. Train one with `attention='bidirectional'`."
        )
    refuse(record, settings)
    settings.block_length = min(record.block_length or settings.block_length or span, span)
    eos = eos_ids(settings, input_ids.device)
    rows = _start(input_ids, attention_mask, settings, first, from_start=record.mode.has_blocks)
    canvas, was_open = rows.ids.clone(), rows.open
    nfe, history, confidences = torch.zeros_like(rows.index), [], []
    confidence = rows.confidence.clone()
    cache = None
    if settings.approximate_cache:
        cache = CanvasCache(settings.approximate_cache, settings.cache_refresh_steps)
    call = _Call(model, settings, first, processors, cache, not bool(attention_mask.all()), is_compiled(model))
    training = model.training
    model.eval()
    try:
        if cache is not None:
            check_canvas_cache(model)
        while (step := _begin(call, rows)) is not None:
            rows, working = step.rows, step.working
            chosen, tokens, probability = _fill(call, step)
            rows.ids = torch.where(chosen, tokens, rows.ids)
            rows.confidence = torch.where(chosen, probability, rows.confidence)
            nfe[rows.index] += passes_of(settings) * working
            _, rows.ids = finish(rows.ids, rows.open, eos, settings, rows.busy)
            canvas[rows.index], confidence[rows.index] = rows.ids, rows.confidence
            if settings.output_history:
                history.append(canvas.clone())
                confidences.append(confidence.clone())
            if on_step is not None:
                on_step(canvas, confidence)
    finally:
        model.train(training)
    output = output_of(canvas, was_open, nfe, eos, history if settings.output_history else None)
    output.confidence = confidences if settings.output_history else None
    return output


@dataclass
class _Call:
    """What stays as it is from step to step."""

    model: torch.nn.Module
    settings: DiffusionGenerationConfig
    first: int  # column at which the canvas starts
    processors: LogitsProcessorList | None
    cache: CanvasCache | None
    padded: bool
    static: (
        bool  # for a compiled model every pass has the shape of the first one: rows that are done stay, and do nothing
    )


@dataclass
class _Step:
    """One pass over the rows that are not done."""

    rows: _Rows
    working: torch.Tensor  # (B,) bool, rows that take part; the others wait
    pending: torch.Tensor  # (B, L) bool, the masks
    eligible: torch.Tensor  # (B, L) bool, what may change now
    most: int  # eligible positions of the row that has most
    block: int  # the furthest one being filled


def _begin(call: _Call, rows: _Rows) -> _Step | None:
    """Lets the rows that are done leave and says what the next pass is over; None: nothing is left.

    The only place where a step waits for the device: its answer decides whether there is another one, and how wide.
    """
    settings, length = call.settings, rows.ids.shape[1]
    pending = (rows.ids == settings.mask_token_id) & rows.open
    active = rows.block.masked_fill(~pending, length).amin(-1)
    active = torch.where(rows.busy, rows.active, active)
    # With a cache rows begin their blocks together, those that are ahead wait.
    working = torch.ones_like(rows.busy) if call.cache is None else active == active.amin()
    eligible = (rows.open if settings.revises else pending) & (rows.block == active[:, None]) & working[:, None]
    if settings.steps:
        per_block = steps_per_block(settings, length - call.first)
        steps_left = torch.where(active == rows.active, rows.steps_left - 1, per_block)
        rows.steps_left = torch.where(working, steps_left, rows.steps_left)
    rows.active = torch.where(working, active, rows.active)
    unfinished = pending.any(-1) | rows.busy
    counts, blocks, alive = torch.stack([eligible.sum(-1), rows.active, unfinished.long()]).tolist()
    stay = [row for row, goes_on in enumerate(alive) if goes_on]
    if not stay:
        return None
    most, block = max(counts[row] for row in stay), max(blocks[row] for row in stay)
    if call.static:
        most, working = settings.block_length, working & unfinished
    elif len(stay) < len(alive):
        n_rows, stay = len(alive), torch.tensor(stay, device=rows.ids.device)
        rows, working, pending, eligible = rows.select(stay), working[stay], pending[stay], eligible[stay]
        if call.cache is not None:
            call.cache.batch_select_indices(with_guided(stay, n_rows, settings))
    return _Step(rows, working, pending, eligible, most, block)


def _fill(call: _Call, step: _Step) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One forward pass: (B, L) bool, which positions change, (B, L), to which tokens, and (B, L), how probable those are."""
    rows, settings, pending = step.rows, call.settings, step.pending
    # The eligible positions of every row side by side, (B, k); shorter rows are filled up with ineligible ones.
    positions = step.eligible.long().argsort(dim=-1, descending=True, stable=True)[:, : step.most]
    eligible = step.eligible.gather(-1, positions)
    window = Window(
        columns=positions,
        open=eligible,
        masked=eligible & pending.gather(-1, positions),
        canvas=rows.ids,
        visible=rows.attention_mask.bool() & ~pending,
        confidence=rows.confidence.gather(-1, positions),
        keys=rows.keys,
        places=(rows.attention_mask.cumsum(-1) - 1).gather(-1, positions),
        step=rows.steps_done,
        steps_left=rows.steps_left,
        post_steps=rows.post_steps,
        block_steps=steps_per_block(settings, rows.ids.shape[1] - call.first) if settings.steps else 0,
    )
    chosen, tokens, probability = commit(_logits(call, step, positions), window, settings, call.processors)
    busy, rows.post_steps = still_busy(window, chosen, tokens, settings)
    rows.busy = busy & step.working
    rows.steps_done = rows.steps_done + step.working.long()
    return (
        torch.zeros_like(pending).scatter(-1, positions, chosen),
        rows.ids.scatter(-1, positions, tokens),
        torch.zeros(pending.shape, device=pending.device).scatter(-1, positions, probability),
    )


def _logits(call: _Call, step: _Step, positions: torch.Tensor) -> torch.Tensor:
    """(B, k, V) fp32 logits of the tokens at `positions`."""
    model, rows, settings, cache = call.model, step.rows, call.settings, call.cache
    record, width, attention_mask = record_of(model), rows.ids.shape[1], rows.attention_mask
    places = attention_mask.cumsum(-1) - 1
    if record.mode.has_blocks:
        allowed = block_decoding(attention_mask, record.block_length, record.clean_context, rows.active)
        model_mask = additive(allowed, base_of(model).dtype)
    else:
        if settings.grow_canvas:
            width = min(width, call.first + settings.block_length * (step.block + 1))
            # Rows that are behind do not see the canvas that others have reached.
            attention_mask = attention_mask * (rows.block <= rows.active.clamp(min=0)[:, None])
        model_mask = attention_mask[:, :width]
    shift = record.right_shift_logits
    if shift:
        # The first token of a text has no predecessor, not even padding: it is read in its own place.
        positions = torch.where(places.gather(-1, positions) > 0, readout_positions(positions, True), positions)
    timing = {}
    if record.time_embedding:
        # As in training: the prompt tokens of a block share its noise level, finished text has none.
        noisy = rows.block == rows.active[:, None] if record.mode.has_blocks else attention_mask.bool()
        timing["timesteps"] = (noisy * mask_share(rows.ids, noisy & rows.open, settings))[:, :width]
    inputs = {
        "input_ids": rows.ids[:, :width],
        "attention_mask": model_mask,
        "position_ids": places.clamp(min=0)[:, :width],
        "logits_to_keep": positions.clamp(max=width - 1),
        **timing,
    }
    if settings.guided:
        inputs = {name: torch.cat([value, value]) for name, value in inputs.items()}
        given = rows.attention_mask.bool() & ~rows.open
        inputs["input_ids"][len(rows.ids) :].masked_fill_(given[:, :width], settings.mask_token_id)
    if cache is not None:
        in_block = (rows.open & (rows.block == step.block))[:, :width].repeat(passes_of(settings), 1)
        inputs = cache.inputs(inputs, step.block, in_block, shift)
    if not call.padded and not settings.grow_canvas and inputs["attention_mask"].dim() == 2:
        inputs["attention_mask"] = None  # hosts would read all of it, in every pass, to find that nothing is masked
    logits = model(**inputs, past_key_values=cache, use_cache=cache is not None).logits.float()
    return guide(logits, settings.guidance_scale) if settings.guided else logits


def passes_of(settings: DiffusionGenerationConfig) -> int:
    """Forward passes of a step: guidance asks twice, in one batch."""
    return 2 if settings.guided else 1


def with_guided(rows: torch.Tensor, n_rows: int, settings: DiffusionGenerationConfig) -> torch.Tensor:
    """Rows of a batch of `n_rows` -> of a cache, in which under guidance the rows without their prompts stand behind the others."""
    return torch.cat([rows, rows + n_rows]) if settings.guided else rows


def mask_share(ids: torch.Tensor, canvas: torch.Tensor, settings: DiffusionGenerationConfig) -> torch.Tensor:
    """(B, L) ids and the positions being filled -> (B, 1) share of them that is still masked, the noise level."""
    return ((ids == settings.mask_token_id) & canvas).sum(-1, keepdim=True) / canvas.sum(-1, keepdim=True).clamp(min=1)


def steps_per_block(settings: DiffusionGenerationConfig, span: int) -> int:
    """Denoising steps of a block when `settings.steps` are dealt out over a canvas of `span` tokens."""
    return max(1, settings.steps // -(-span // settings.block_length))


def finish(
    ids: torch.Tensor,
    was_open: torch.Tensor,
    eos: torch.Tensor,
    settings: DiffusionGenerationConfig,
    busy: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which rows are done: no mask left, or an end token committed and no mask before it.

    Args:
        ids: (B, L) canvas.
        was_open: (B, L) bool, positions that held a mask at the start.
        busy: (B,) bool, rows whose tokens may still be revised: they go on.

    Returns:
        (B,) bool, and the canvas, in which what is left of a stopped row's masks has become its end token.
    """
    pending = (ids == settings.mask_token_id) & was_open
    done = ~pending.any(-1) if busy is None else ~pending.any(-1) & ~busy
    if not settings.eos_early_stop:
        return done, ids
    length = ids.shape[1]
    ends = was_open & torch.isin(ids, eos)
    end = torch.where(ends.any(-1), ends.long().argmax(-1), length)
    first_mask = torch.where(pending.any(-1), pending.long().argmax(-1), length)
    stopped = (first_mask > end)[:, None]
    if busy is not None:
        stopped = stopped & ~busy[:, None]
    end_token = ids.gather(-1, end.clamp(max=length - 1)[:, None])
    if settings.length_quantile is not None and not settings.revises:
        # A sized canvas shrinks to its first end: nothing behind it will be read.
        behind = torch.arange(length, device=ids.device) > end[:, None]
        return stopped.squeeze(-1) | done, torch.where(pending & behind, end_token, ids)
    return stopped.squeeze(-1) | done, torch.where(pending & stopped, end_token, ids)
