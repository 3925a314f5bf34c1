"""An approximate key-value cache for bidirectional models: most of the text is seen as it was at the start of the block.

In a bidirectional model every token sees every other one, so each commit changes the keys and values of the whole text, and no cache
is exact. This one computes them all when a block is begun and then, in the block's other passes, only where they change most:

    first pass of a block      | prompt | blocks done | block | later masks |    all computed, all kept
    other passes, "prefix"     | . . . . . . . . . . .| block | later masks |    what stands before the block is read as it was
    other passes, "dual"       | . . . . . . . . . . .| block | . . . . . . |    and so is what stands behind it

What is computed again replaces what was kept, in place. With the right-shifted read-out the column before the block is among it, since
the block's first token is read there (the published program commits that token in the first pass whatever its confidence).
Trade-off: answers differ from those of the model, the more so the more passes a block takes; rows of a batch wait for each other at the
end of a block, so that no row is refreshed more often in company than alone. Alternative: no cache, which is exact, or a model
converted to blocks, whose cache is.

References: Fast-dLLM (arXiv 2505.22618, section 3.2).
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache

from .. import UserError
from ..models.patching import base_of
from ..models.probing import probe_ids
from ..models.record import DiffusionRecord
from ..objective.attention_masks import additive
from .config import DiffusionGenerationConfig


class CanvasCache(DynamicCache):
    """Keys and values of all columns of a canvas.

    Args:
        reach: "prefix" or "dual", what is kept in the passes between two refreshes.
        refresh_steps: passes from one refresh to the next within a block; None: blocks begin with one, and that is all.
    """

    def __init__(self, reach: str, refresh_steps: int | None = None) -> None:
        super().__init__()
        self.reach, self.refresh_steps = reach, refresh_steps
        self.block, self.passes = -1, 0  # which is being filled, and passes since the last refresh, it included
        self.columns: torch.Tensor | None = None  # (B, f) that the forward under way computes; None: all

    def inputs(
        self, inputs: dict[str, torch.Tensor], block: int, in_block: torch.Tensor, shift: bool
    ) -> dict[str, torch.Tensor]:
        """What the next forward is to be given, beside the cache.

        Args:
            inputs: of a forward over all L columns: (B, L) each, `attention_mask` 0 and 1, and (B, k) `logits_to_keep`.
            block: number of the block being filled.
            in_block: (B, L) bool, its columns that may change.
            shift: whether a token is read one column before its own.

        Returns:
            `inputs` as they are where a refresh is due, else (B, f) of the columns to compute again and a 4-D mask.
        """
        due = block != self.block or self.passes == self.refresh_steps
        self.block, self.passes = block, 1 if due else self.passes + 1
        if due:
            self.layers, self.columns = [], None
            return inputs
        mask = inputs["attention_mask"].bool()
        again = in_block if self.reach == "dual" else in_block.long().cummax(-1).values.bool()
        if shift:
            again = again | torch.nn.functional.pad(again[:, 1:], (0, 1))
        again = again & mask
        width, most = mask.shape[1], int(again.sum(-1).max())
        columns = again.long().argsort(dim=-1, descending=True, stable=True)[:, :most]
        # Rows that have fewer are filled up with columns whose keys go to a spare one behind the canvas, which nobody sees.
        self.columns = columns.masked_fill(~again.gather(-1, columns), width)
        at = torch.zeros_like(mask, dtype=torch.long).scatter(
            -1, columns, torch.arange(most, device=mask.device).expand_as(columns)
        )
        seen = torch.nn.functional.pad(mask, (0, 1))[:, None].expand(-1, most, -1)
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
            pad = torch.nn.functional.pad
            super().update(pad(key_states, spare), pad(value_states, spare), layer_idx, *args, **kwargs)
            return key_states, value_states
        layer = self.layers[layer_idx]
        for kept, new in ((layer.keys, key_states), (layer.values, value_states)):
            kept.scatter_(2, self.columns[:, None, :, None].expand_as(new), new)
        return layer.keys, layer.values


def refuse(record: DiffusionRecord, settings: DiffusionGenerationConfig) -> None:
    """Raises ValueError where the cache is exact, by `config.diffusion`."""
    if settings.approximate_cache and record.mode.has_blocks:
        raise UserError(
            f"`approximate_cache`={settings.approximate_cache!r}: a model with `attention`={record.attention!r} has an exact cache; leave it out."
        )


@torch.no_grad()
def check_canvas_cache(model: torch.nn.Module) -> None:
    """Refuses a model, in evaluation mode, that does not see replaced keys and values as it saw the first ones. Probes it once.

    Raises:
        ValueError: some columns computed again, nothing having changed, get other logits (layers that remember, masks that it ignores).
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
    if not (found - want).abs().max() <= 0.01 * want.abs().max():  # nor what is no number
        raise UserError(
            f"`approximate_cache`: {name} gives other logits when keys and values are kept, though nothing changed; leave it out."
        )
    base.follows_canvas_cache = True
