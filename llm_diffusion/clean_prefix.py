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

from .adapter_switch import AdapterSwitch
from .attention_masks import additive, block_causal
from .patching import adapters_off, base_of
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


def allow_prefix_under_checkpointing(model: torch.nn.Module) -> None:
    """Tells the host's layers that a cache may be handed to them while they are checkpointed, which it drops otherwise."""
    for module in base_of(model).modules():
        if hasattr(module, "_can_checkpoint_with_cache"):
            module._can_checkpoint_with_cache = True


@torch.no_grad()
def check_clean_prefix(model: torch.nn.Module) -> None:
    """Refuses a model whose cache cannot hold clean text for later rows, or cannot be cropped.

    Raises:
        ValueError: it forgets (sliding window, state space), or gives other logits than without a cache.
    """
    base = base_of(model)
    name = type(base).__name__
    if any(getattr(layer, "is_sliding", False) for layer in DynamicCache(config=base.config).layers):
        raise ValueError(
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
        raise ValueError(
            f"`attention`='lossless': the cache of {name} cannot be cropped or read alone: {error}"
        ) from error
    finally:
        base.train(training)
    scale = want.abs().max()
    if not max((read - want).abs().max(), (again - want).abs().max()) <= 0.01 * scale:  # nor what is no number
        raise ValueError(
            f"`attention`='lossless': {name} gives other logits from its cache than without; use `attention`='block'."
        )


def check_drafts(model: torch.nn.Module, mask_token_id: int, checkpointing: bool) -> None:
    """Refuses adapters that decoding would hear otherwise than training does, on one block behind a clean one.

    Raises:
        ValueError: adapters on experts or other layers that do not see rows, or layers that drop the prefix while checkpointed.
    """
    base = base_of(model)
    name, training = type(base).__name__, base.training
    ids = probe_ids(base, 2 * BLOCK)
    ids[:, BLOCK:] = mask_token_id
    place = torch.arange(ids.shape[1], device=ids.device)[None]
    mask = additive(block_causal(torch.ones_like(ids), BLOCK), base.dtype)
    clean = {
        "input_ids": ids[:, :BLOCK],
        "attention_mask": mask[:, :, :BLOCK, :BLOCK],
        "position_ids": place[:, :BLOCK],
    }
    noisy = {"input_ids": ids[:, BLOCK:], "attention_mask": mask[:, :, BLOCK:], "position_ids": place[:, BLOCK:]}
    adapters = [parameter for key, parameter in model.named_parameters() if "lora_B" in key]
    kept = [parameter.detach().clone() for parameter in adapters]
    base.eval()
    try:
        with torch.no_grad():
            for parameter in adapters:  # they start at zero, and would not be heard at all
                parameter.copy_(torch.full_like(parameter, 0.01))
            cache = DynamicCache()
            with adapters_off(model):
                base(**clean, past_key_values=cache, use_cache=True)
            want = base(**noisy, past_key_values=CleanPrefix(cache), use_cache=False).logits
            with AdapterSwitch(model) as switch:
                switch.first = BLOCK
                found = base(input_ids=ids, attention_mask=mask, position_ids=place, use_cache=False).logits[:, BLOCK:]
        if checkpointing:
            base.train()
            base.activation_checkpointing_enable({"use_reentrant": False})
            base(**noisy, past_key_values=CleanPrefix(cache), use_cache=False)
    except Exception as error:  # experts, shapes, checkpointing: every host fails in its own way
        hint = "; set `gradient_checkpointing` to false" if base.training else "; leave experts out of `target_modules`"
        raise ValueError(f"`attention`='lossless': the adapters of {name} cannot draft: {error}{hint}.") from error
    finally:
        if checkpointing:
            base.activation_checkpointing_disable()
        base.train(training)
        with torch.no_grad():
            for parameter, value in zip(adapters, kept, strict=True):
                parameter.copy_(value)
    others = torch.arange(want.shape[-1], device=want.device) != mask_token_id  # which is never said
    if not (want - found)[..., others].abs().max() <= 0.01 * want[..., others].abs().max():
        raise ValueError(
            f"`attention`='lossless': the adapters of {name} are heard otherwise in decoding than in training; adapt linear layers that "
            "see every token, and no experts."
        )
