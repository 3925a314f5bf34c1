"""Clean text that noisy rows see and do not extend: the base's keys and values, written once.

    keys    | clean text, by the base, without gradient | noisy rows, by the adapter |
    queries |                                           | noisy rows                 |

Purpose: in lossless training the clean half costs a forward pass without gradients, and no backward pass. The layers' keys and values
are joined in every call instead of being stored, so that gradient checkpointing may run a layer twice.
Trade-off: one copy of the prefix a layer and call. Alternative: both halves in one pass with gated adapters, whose backward pass runs
through the clean half for nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache

from .. import UserError
from ..objective.attention_masks import additive, block_causal
from .patching import base_of
from .probing import probe_ids

BLOCK, BLOCKS = 4, 3  # of the probe


class CleanPrefix(DynamicCache):
    """A cache that is read and never written: `update` joins the prefix and the given states."""

    def __init__(self, cache: DynamicCache) -> None:
        super().__init__()
        self.layers = cache.layers

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        layer = self.layers[layer_idx]
        return torch.cat([layer.keys, key_states], -2), torch.cat([layer.values, value_states], -2)


@torch.no_grad()
def check_clean_prefix(model: torch.nn.Module) -> None:
    """Refuses a model whose cache cannot hold clean text for later rows, or cannot be cropped.

    Raises:
        ValueError: it forgets (sliding window, state space), or gives other logits than without a cache.
    """
    base = base_of(model)
    name = type(base).__name__
    if any(getattr(layer, "is_sliding", False) for layer in DynamicCache(config=base.config).layers):
        raise UserError(
            f"`attention`='lossless': {name} has sliding-window attention, whose cache forgets and cannot be cropped; use 'block'."
        )
    ids = probe_ids(base, BLOCK * BLOCKS)
    mask = additive(block_causal(torch.ones_like(ids), BLOCK), base.dtype)
    place, clean = torch.arange(ids.shape[1], device=ids.device)[None], BLOCK * (BLOCKS - 1)
    training = base.training
    base.eval()
    try:
        want = base(input_ids=ids, attention_mask=mask, position_ids=place, use_cache=False).logits[:, clean:]
        cache = DynamicCache()
        first = {"input_ids": ids[:, :clean], "attention_mask": mask[:, :, :clean, :clean]}
        base(**first, position_ids=place[:, :clean], past_key_values=cache, use_cache=True)
        rest = {"input_ids": ids[:, clean:], "attention_mask": mask[:, :, clean:], "position_ids": place[:, clean:]}
        read = base(**rest, past_key_values=CleanPrefix(cache), use_cache=False).logits
        base(**rest, past_key_values=cache, use_cache=True)
        cache.crop(-BLOCK)
        again = base(**rest, past_key_values=cache, use_cache=True).logits
    except Exception as error:  # in as many ways as there are caches
        raise UserError(
            f"`attention`='lossless': the cache of {name} cannot be cropped or read alone: {error}"
        ) from error
    finally:
        base.train(training)
    scale = want.abs().max()
    if not max((read - want).abs().max(), (again - want).abs().max()) <= 0.01 * scale:  # nor what is no number
        raise UserError(
            f"`attention`='lossless': {name} gives other logits from its cache than without; use `attention`='block'."
        )
