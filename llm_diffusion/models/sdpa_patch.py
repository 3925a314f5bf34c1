"""Attention that makes its own causal mask and calls PyTorch's kernel itself, as remote code does, made bidirectional.

The modules of one model that call `scaled_dot_product_attention` are found by running them; from then on their forwards run in a mode in
which the kernel is not causal. No other model sees it. A mask with position biases is refused, because its mirror image is unknown.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from .. import UserError
from .forward import ForwardState
from .patching import Patch, wrap_forward
from .probing import attention_pattern


class BidirectionalSDPA(TorchFunctionMode):
    """Inside it `scaled_dot_product_attention` is not causal; every other argument passes through."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is scaled_dot_product_attention:
            names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
            kwargs = {**dict(zip(names, args, strict=False)), **kwargs, "is_causal": False}
            args = (kwargs.pop("query"), kwargs.pop("key"), kwargs.pop("value"))
            if kwargs.get("attn_mask") is not None:
                kwargs["attn_mask"] = symmetric(kwargs["attn_mask"])
        return func(*args, **kwargs)


def symmetric(mask: torch.Tensor) -> torch.Tensor:
    """A causal attention mask (..., Q, K), bool or additive, made bidirectional; one that is not causal passes as it is.

    What may be seen from a later position may be seen from an earlier one of the same text; keys that no real query sees (padding)
    stay hidden:

        left padding                 two packed texts
        . . . .      . . . .         x . . .      x x . .
        . x . .  ->  . x x x         x x . .  ->  x x . .
        . x x .      . x x x         . . x .      . . x x
        . x x x      . x x x         . . x x      . . x x

    Raises:
        ValueError: an additive mask with biases of its own (ALiBi), whose mirror image is unknown.
    """
    length = mask.shape[-1]
    if mask.shape[-2] != length:
        return mask
    visible = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    later = torch.ones(length, length, dtype=torch.bool, device=mask.device).triu(1)
    # transformers lets padding see everything, because the kernel makes NaN of a row that sees nothing.
    open_row = visible.all(-1, keepdim=True) | ~visible.any(-1, keepdim=True)
    open_row[..., -1:, :] = False  # the last row of a causal mask sees all without being open
    causal = ~(visible & later & ~open_row).any(-1, keepdim=True).any(-2, keepdim=True)
    seen = visible & ~open_row
    either = (seen | seen.transpose(-1, -2)) & seen.any(-2, keepdim=True)
    if mask.dtype == torch.bool:
        return torch.where(causal, either | (visible & open_row), visible)
    if not torch.compiler.is_compiling() and bool((mask.masked_fill(~visible, 0) != 0).any() & causal.any()):
        raise UserError("its attention mask carries position biases, whose mirror image is unknown")
    bias = torch.zeros_like(mask).masked_fill(~(either | (visible & open_row)), torch.finfo(mask.dtype).min)
    return torch.where(causal, bias, mask)


def patch_sdpa(patch: Patch, model: PreTrainedModel) -> None:
    """The modules that call the kernel run inside `BidirectionalSDPA` from now on, unless their `causal_ratio` is None."""
    for module in _callers_of_sdpa(model):
        if "diffusion_forward" not in vars(module):
            wrap_forward(patch, module, _bidirectional_forward, ForwardState())
        patch.set(module.diffusion_forward, "causal_ratio", 0.0)


def _bidirectional_forward(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    # Gradient checkpointing runs this again: the recomputation is bidirectional too.
    state = self.diffusion_forward
    if state.causal_ratio is None:
        return state.original(*args, **kwargs)
    with BidirectionalSDPA():
        return state.original(*args, **kwargs)


class _Spy(TorchFunctionMode):
    """Calls `found` at every `scaled_dot_product_attention`."""

    def __init__(self, found: Callable[[], None]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict | None = None) -> Any:
        if func is scaled_dot_product_attention:
            self.found()
        return func(*args, **(kwargs or {}))


def _callers_of_sdpa(model: PreTrainedModel) -> list[torch.nn.Module]:
    running: list[torch.nn.Module] = []
    callers: dict[torch.nn.Module, None] = {}

    def finished(*_: Any) -> None:
        running.pop()

    hooks = [
        torch.nn.modules.module.register_module_forward_pre_hook(lambda module, _: running.append(module)),
        torch.nn.modules.module.register_module_forward_hook(finished),
    ]
    try:
        with _Spy(lambda: callers.setdefault(running[-1])):
            attention_pattern(model)
    finally:
        for hook in hooks:
            hook.remove()
    return list(callers)
