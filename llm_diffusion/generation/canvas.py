"""Fills the masks of a canvas by iterative unmasking, every forward pass over the whole canvas.

A canvas of text and mask tokens is filled from the most confident position outwards, several tokens a pass. With a
`block_length` it is filled block by block from the left, LLaDA's semi-autoregressive order; later blocks stand there as masks,
or, with `grow_canvas`, do not exist yet. Only positions of the active block meet the vocabulary. There is no cache, which is exact
for a bidirectional model, unless an `approximate_cache` is set (`CanvasCache`).

References: LLaDA (arXiv 2502.09992, algorithms 4-5), Fast-dLLM (arXiv 2505.22618) for the threshold.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import torch
from torch.nn.functional import pad
from transformers import DynamicCache, LogitsProcessorList

from .. import UserError
from ..models.packing import packed
from ..models.patching import base_of, in_eval_mode, is_compiled
from ..models.probing import probe_ids
from ..models.record import record_of
from ..models.sampling import DiffusionOutput, OnStep, Recorder, check_decodable, eos_ids
from ..objective.attention_masks import additive
from ..objective.noise import row_keys
from .config import DiffusionGenerationConfig
from .step import Rows, Window, commit, fill_behind_ends, guide, still_busy, with_unconditional


def with_masks(ids: torch.Tensor, mask: torch.Tensor, n: int, mask_token_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, P) prompts and their attention mask, with n mask tokens behind them: (B, P + n) each."""
    return pad(ids, (0, n), value=mask_token_id), pad(mask.long(), (0, n), value=1)


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
        settings: see `UnmaskingSettings`.
        first: column at which the canvas starts: blocks are counted from it, and mask tokens before it stay.
        on_step: called after every step with the whole canvas (B, L) and the probabilities its tokens had when committed, (B, L).
        processors: of transformers, see `step.apply_processors`.

    Returns:
        A `DiffusionOutput`. After the end token a row is filled with it, so that no mask is left.
    """
    record = record_of(model)
    if record.mode.drafts:
        raise UserError("`model`: a lossless adapter cannot fill gaps; train one with `attention`='bidirectional'.")
    settings.check_model(record)
    return CanvasDecoder(model, input_ids, attention_mask, settings, first, processors).run(on_step)


class CanvasDecoder:
    """One batch of canvases; arguments as of `fill_masks`."""

    def __init__(
        self,
        model: torch.nn.Module,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        settings: DiffusionGenerationConfig,
        first: int,
        processors: LogitsProcessorList | None,
    ) -> None:
        self.model, self.record, self.settings = model, record_of(model), copy.copy(settings)
        self.mode, self.processors, self.first = self.record.mode, processors, first
        span = input_ids.shape[1] - first
        block_length = self.record.block_length or min(settings.block_length or span, span)
        self.settings.block_length = block_length
        n_blocks = -(-attention_mask[:, first:].sum(-1) // block_length)  # of every row, which others do not lengthen
        self.steps = ((settings.steps or 0) // n_blocks.clamp(min=1)).clamp(min=1)  # (B,) of a block
        self.passes = 2 if settings.guided else 1  # of a step, in one batch
        self.eos = eos_ids(settings, input_ids.device)
        self.padded = not bool(attention_mask.all())
        # Every pass has the shape of the first one: rows that are done stay, and do nothing.
        self.static = is_compiled(model)
        self.cache: DynamicCache | None = None
        self.failed = torch.zeros((), dtype=torch.bool, device=input_ids.device)
        self.rows = self._rows(input_ids, attention_mask)

    def _rows(self, ids: torch.Tensor, attention_mask: torch.Tensor) -> Rows:
        is_open = (ids == self.settings.mask_token_id) & attention_mask.bool()
        is_open[:, : self.first] = False  # a prompt may speak of the mask token
        places = attention_mask.cumsum(-1) - 1
        start = self.mode.block_start(attention_mask[:, : self.first].sum(-1))
        index = torch.arange(len(ids), device=ids.device)
        return Rows(
            ids=ids.clone(),
            attention_mask=attention_mask,
            open=is_open,
            confidence=torch.zeros(ids.shape, device=ids.device),
            places=places,
            block=((places - start[:, None]) // self.settings.block_length).clamp(min=0),
            keys=row_keys(ids, attention_mask),
            index=index,
            active=torch.full_like(index, -1),
            busy=torch.zeros_like(index, dtype=torch.bool),
            **dict.fromkeys(("steps_left", "steps_done", "post_steps"), torch.zeros_like(index)),
        )

    def run(self, on_step: OnStep | None = None) -> DiffusionOutput:
        """Decodes all rows to their end."""
        recorder = Recorder(self.settings, on_step)
        canvas, confidence, was_open = self.rows.ids.clone(), self.rows.confidence.clone(), self.rows.open
        with in_eval_mode(self.model), nullcontext() if self.static else packed(self.model, merge=True):
            nfe = torch.full_like(self.rows.index, self._prefill() * self.passes)
            while (window := self._begin(self.rows)) is not None:
                rows = self.rows = window.rows
                self._fill(window)
                nfe[rows.index] += self.passes * window.working
                canvas[rows.index], confidence[rows.index] = rows.ids, rows.confidence
                gone = recorder.step(self._as_given(canvas), self._as_given(confidence, 0)) if recorder.wanted else None
                if gone is not None:
                    rows.open, rows.busy = rows.open & ~gone[rows.index, None], rows.busy & ~gone[rows.index]
        return recorder.output(self._as_given(canvas), self._as_given(was_open, False), nfe, self.eos)

    def _prefill(self) -> int:
        """Makes the cache ready; passes that this took."""
        if self.settings.approximate_cache:
            check_canvas_cache(self.model)
            self.cache = CanvasCache(self.settings.approximate_cache, self.settings.cache_refresh_steps)
        return 0

    def _as_given(self, per_column: torch.Tensor, prompt: int | None = None) -> torch.Tensor:
        """(B, W) in the columns of this decoder -> in those of the batch; `prompt`: a value for all prompts, None: as given."""
        return per_column

    def _leave(self, stay: torch.Tensor, n_rows: int) -> None:
        """Only the rows `stay` of `n_rows` go on."""
        if self.cache is not None:
            # Under guidance the rows without their prompts stand behind the others.
            self.cache.batch_select_indices(torch.cat([stay, stay + n_rows]) if self.settings.guided else stay)

    def _begin(self, rows: Rows) -> Window | None:
        """Lets the rows that are done leave and says what the next pass is over; None: nothing is left.

        The only place where a step waits for the device: its answer decides whether there is another one, and how wide.
        """
        settings = self.settings
        pending = (rows.ids == settings.mask_token_id) & rows.open
        active = rows.block.masked_fill(~pending, rows.ids.shape[1]).amin(-1)
        active = torch.where(rows.busy, rows.active, active)
        # With a cache rows begin their blocks together, those that are ahead wait.
        working = torch.ones_like(rows.busy) if self.cache is None else active == active.amin()
        eligible = (rows.open if settings.revises else pending) & (rows.block == active[:, None]) & working[:, None]
        if settings.steps:
            steps_left = torch.where(active == rows.active, rows.steps_left - 1, self.steps[rows.index])
            rows.steps_left = torch.where(working, steps_left, rows.steps_left)
        rows.active = torch.where(working, active, rows.active)
        unfinished = pending.any(-1) | rows.busy
        failed = self.failed.expand(len(pending))
        counts, blocks, alive, failed = torch.stack([eligible.sum(-1), rows.active, unfinished.long(), failed]).tolist()
        check_decodable(not any(failed))
        stay = [row for row, goes_on in enumerate(alive) if goes_on]
        if not stay:
            return None
        most, block = max(counts[row] for row in stay), max(blocks[row] for row in stay)
        if self.static:
            most, working = settings.block_length, working & unfinished
        elif len(stay) < len(alive):
            n_rows, stay = len(alive), torch.tensor(stay, device=rows.ids.device)
            rows, working, pending, eligible = rows.select(stay), working[stay], pending[stay], eligible[stay]
            self._leave(stay, n_rows)
        # The eligible positions of every row side by side; rows that have fewer are filled up with others.
        columns = eligible.long().argsort(dim=-1, descending=True, stable=True)[:, :most]
        steps = self.steps[rows.index]
        return Window(rows, columns, eligible.gather(-1, columns), pending, working, block, steps)

    def _fill(self, window: Window) -> None:
        """One forward pass, and what changes by it."""
        rows, columns = window.rows, window.columns
        chosen, tokens, probability = commit(self._logits(window), window, self.settings, self.processors)
        self.failed = window.failed
        busy, rows.post_steps = still_busy(window, chosen, self.settings)
        rows.busy, rows.steps_done = busy & window.working, rows.steps_done + window.working.long()
        ids = rows.ids.scatter(-1, columns, torch.where(chosen, tokens, window.ids))
        rows.confidence = rows.confidence.scatter(-1, columns, torch.where(chosen, probability, window.confidence))
        rows.ids = fill_behind_ends(ids, rows.open, self.eos, self.settings, rows.busy)

    def _logits(self, window: Window) -> torch.Tensor:
        """(B, k, V) fp32 logits of the tokens of a window."""
        rows, settings, width, mask = window.rows, self.settings, window.rows.ids.shape[1], window.rows.attention_mask
        allowed = self.mode.decoding_mask(mask, rows.active)
        noisy = mask.bool() if allowed is None else rows.block == rows.active[:, None]  # finished text has no noise
        if allowed is None and settings.grow_canvas:
            width = min(width, self.first + settings.block_length * (window.block + 1))
            # Rows that are behind do not see the canvas that others have reached.
            mask = mask * (rows.block <= rows.active.clamp(min=0)[:, None])
        inputs = {
            "input_ids": rows.ids[:, :width],
            "attention_mask": mask[:, :width] if allowed is None else additive(allowed, base_of(self.model).dtype),
            "position_ids": rows.places.clamp(min=0)[:, :width],
            "logits_to_keep": self.mode.readout_positions(window.columns, window.places).clamp(max=width - 1),
        }
        if self.record.time_embedding:  # as in training: the prompt tokens of a block share its noise level
            inputs["timesteps"] = (noisy * self._mask_share(rows.ids, noisy & rows.open))[:, :width]
        inputs = with_unconditional(inputs, rows.given[:, :width], settings)
        if self.cache is not None:
            in_block = (rows.open & (rows.block == window.block))[:, :width].repeat(self.passes, 1)
            inputs = self.cache.inputs(inputs, window.block, in_block, self.record.right_shift_logits)
        if not self.padded and not settings.grow_canvas and inputs["attention_mask"].dim() == 2:
            # transformers would read all of it, in every pass, to find that nothing is masked.
            inputs["attention_mask"] = None
        logits = self.model(**inputs, past_key_values=self.cache, use_cache=self.cache is not None).logits.float()
        return guide(logits, settings.guidance_scale)

    def _mask_share(self, ids: torch.Tensor, canvas: torch.Tensor) -> torch.Tensor:
        """(B, L) ids and the positions being filled -> (B, 1) share of them that is still masked, the noise level."""
        masks = (ids == self.settings.mask_token_id) & canvas
        return masks.sum(-1, keepdim=True) / canvas.sum(-1, keepdim=True).clamp(min=1)


class CanvasCache(DynamicCache):
    """Keys and values of all columns of a bidirectional canvas, most of them as they were when the block was begun.

    Each commit changes the keys and values of the whole text, so no cache is exact. This one computes them all in the first pass of a
    block, and then, in its other passes, only where they change most:

        first pass of a block      | prompt | blocks done | block | later masks |    all computed, all kept
        other passes, "prefix"     | . . . . . . . . . . .| block | later masks |    what stands before the block is read as it was
        other passes, "dual"       | . . . . . . . . . . .| block | . . . . . . |    and so is what stands behind it

    What is computed again replaces what was kept, in place. With the right-shifted read-out the column before the block is among it,
    since the block's first token is read there. Rows of a batch wait for each other at the end of a block, so that no row is refreshed
    more often in company than alone.

    Args:
        reach: "prefix" or "dual", what is kept in the passes between two refreshes.
        refresh_steps: passes from one refresh to the next within a block; None: blocks begin with one, and that is all.

    References: Fast-dLLM (arXiv 2505.22618, section 3.2).
    """

    def __init__(self, reach: str, refresh_steps: int | None = None) -> None:
        super().__init__()
        self.reach, self.refresh_steps = reach, refresh_steps
        self.block, self.passes = -1, 0  # which is being filled, and passes since the last refresh, it included
        self.columns: torch.Tensor | None = None  # (B, f) that the forward under way computes; None: all

    def inputs(
        self, inputs: dict[str, torch.Tensor], block: int, in_block: torch.Tensor, shift: bool
    ) -> dict[str, torch.Tensor]:
        """What the next forward is to be given: all columns where a refresh is due, else (B, f) to compute again and a 4-D mask.

        Args:
            inputs: of a forward over all L columns: (B, L) each, `attention_mask` 0 and 1, and (B, k) `logits_to_keep`.
            block: number of the block being filled.
            in_block: (B, L) bool, its columns that may change.
            shift: whether a token is read one column before its own.
        """
        due = block != self.block or self.passes == self.refresh_steps
        self.block, self.passes = block, 1 if due else self.passes + 1
        if due:
            self.layers, self.columns = [], None
            return inputs
        mask = inputs["attention_mask"].bool()
        again = in_block if self.reach == "dual" else in_block.long().cummax(-1).values.bool()
        if shift:
            again = again | pad(again[:, 1:], (0, 1))
        again = again & mask
        width, most = mask.shape[1], int(again.sum(-1).max())
        columns = again.long().argsort(dim=-1, descending=True, stable=True)[:, :most]
        # Rows that have fewer are filled up with columns whose keys go to a spare one behind the canvas, which nothing attends to.
        self.columns = columns.masked_fill(~again.gather(-1, columns), width)
        order = torch.arange(most, device=mask.device).expand_as(columns)
        at = torch.zeros_like(mask, dtype=torch.long).scatter(-1, columns, order)
        seen = pad(mask, (0, 1))[:, None].expand(-1, most, -1)
        return {
            **{name: value.gather(-1, columns) for name, value in inputs.items() if value.shape == mask.shape},
            "attention_mask": additive(seen, self.layers[0].keys.dtype),
            "logits_to_keep": at.gather(-1, inputs["logits_to_keep"]),
        }

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.columns is None:
            spare = (0, 0, 0, 1)
            super().update(pad(key_states, spare), pad(value_states, spare), layer_idx, *args, **kwargs)
            return key_states, value_states
        layer = self.layers[layer_idx]
        for kept, new in ((layer.keys, key_states), (layer.values, value_states)):
            kept.scatter_(2, self.columns[:, None, :, None].expand_as(new), new)
        return layer.keys, layer.values


@torch.no_grad()
def check_canvas_cache(model: torch.nn.Module) -> None:
    """Refuses a model, in evaluation mode, that does not read replaced keys and values as it read the first ones. Probes it once.

    Raises:
        UserError: some columns computed again, nothing having changed, get other logits (layers that remember, masks that it ignores).
    """
    base = base_of(model)
    if getattr(base, "follows_canvas_cache", False):
        return
    name, ids, cache = type(base).__name__, probe_ids(base, 8), CanvasCache("dual")
    columns = torch.arange(ids.shape[1], device=ids.device)[None]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": columns}
    inputs["logits_to_keep"] = columns[:, 3:5]
    again = torch.isin(columns, columns[:, 3:5])
    try:
        with torch.compiler.set_stance("force_eager"):  # a compiled model is not compiled for this
            want, found = [
                base(**cache.inputs(inputs, 0, again, shift=False), past_key_values=cache, use_cache=True).logits
                for _ in range(2)
            ]
    except Exception as error:  # in as many ways as there are caches
        raise UserError(f"`approximate_cache`: {name} cannot be given its keys and values again: {error}") from error
    if not (found - want).abs().max() <= 0.01 * want.abs().max():  # also where they are non-finite
        raise UserError(f"`approximate_cache`: {name} gives other logits with keys and values kept; leave it out.")
    base.follows_canvas_cache = True
