"""Copies of a model's weights on a CPU from which a pass over a few rows takes less time, made once and kept beside the model.

packed    the same numbers, in the layout that oneDNN multiplies few rows by     a half to three quarters of the time, the model's own outputs
int8      one scale a row, inputs rounded as they come                           half of the time or less; for drafts, which are verified

torch has them for its compiler and its quantisation alone, so its private names stand here and nowhere else; where they, or what they need
of the processor, are missing, there is no copy.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from threading import Lock
from typing import Any
from weakref import WeakKeyDictionary

import psutil
import torch
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from transformers.pytorch_utils import Conv1D

from .patching import Patch, base_of

SUPPORT = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # of torch.cpu
OPERATORS = ("_reorder_linear_weight", "_linear_pointwise")  # of torch.ops.mkldnn
INT8_OPERATORS = ("linear_prepack", "linear_dynamic")  # of torch.ops.quantized
logger = logging.getLogger(__name__)
ROOM = 0.5  # of the memory that is free, which packed weights may take at most; else there are none
ROWS = 8  # what the layout is best for; any number is right
_lock = Lock()
# Of every layer and kind of copy the state of the weights, and the copy; outside the model, because it can be neither copied nor saved.
_copies: WeakKeyDictionary[torch.nn.Module, dict[str, tuple[list[tuple], Any]]] = WeakKeyDictionary()


def can_pack(layer: torch.nn.Module) -> bool:
    """Whether this is a plain linear layer on a CPU, in fp32, or in bf16 where the processor multiplies that."""
    return type(layer) is torch.nn.Linear and _packable(layer.weight)


def _packable(weight: torch.Tensor) -> bool:
    return (
        # Sharded weights are of another type, flat, or empty.
        type(weight) is torch.nn.Parameter
        and weight.dim() == 2
        and weight.numel() > 0
        and weight.device.type == "cpu"
        and (weight.dtype == torch.float32 or weight.dtype == torch.bfloat16 and has_fast_bfloat16())
        and torch.backends.mkldnn.is_available()
        and all(hasattr(torch.ops.mkldnn, name) for name in OPERATORS)
    )


def has_fast_bfloat16() -> bool:
    """Whether this CPU multiplies bf16 itself, with AVX512-BF16 or AMX."""
    return any(getattr(torch.cpu, name, bool)() for name in SUPPORT)


@contextmanager
def packed(model: torch.nn.Module, merge: bool = False) -> Iterator[None]:
    """For inference: the linear layers of a model's base run on packed weights, which are kept for the next time.

    Weights that were changed or replaced since are packed again; the copy takes as much memory as the layers, where that is free.

    Args:
        merge: plain LoRA beside such a layer is merged into its copy, and runs no more by itself, which takes longer than the layer.
    """
    patch = Patch()
    try:
        with _lock:  # calls from several threads may overlap in any order: what one has packed the others leave alone
            layers = [] if torch.is_grad_enabled() else list(_layers(base_of(model), merge))
            for layer, bias, sources, weight in layers if _have_room(layers) else ():
                patch.set(layer, "forward", partial(_linear, _packed(layer, sources, weight), bias))
        yield
    finally:
        with _lock:
            patch.undo()


def _layers(
    model: torch.nn.Module, merge: bool
) -> Iterator[tuple[torch.nn.Module, torch.Tensor | None, list[Any], Callable]]:
    """Of each layer its bias, what its weight is made of, and what makes it."""
    inner: set[torch.nn.Module] = set()  # of merged layers, and of those whose weight PEFT changes while they run
    for layer in model.modules():
        if isinstance(layer, ParamWrapper) or getattr(vars(layer).get("forward"), "func", None) is _linear:
            inner.update(layer.modules())
        if layer in inner:
            continue
        lora = merged_lora(layer) if merge and isinstance(layer, LoraLayer) else None
        if lora is not None and _packable(layer.get_base_layer().weight):
            inner.update(layer.modules())
            yield layer, layer.get_base_layer().bias, *lora
        elif can_pack(layer):
            yield layer, layer.bias, [layer.weight], partial(getattr, layer, "weight")


def _have_room(layers: list[tuple]) -> bool:
    new = sum(sources[0].nbytes for layer, _, sources, _ in layers if "packed" not in _copies.get(layer, {}))
    room = ROOM * psutil.virtual_memory().available
    if new and new >= room:
        _warn_of_no_room(f"{new / 2**30:.2g} GiB")
        return False
    return True


@cache
def _warn_of_no_room(size: str) -> None:
    """Says it once, not in every call."""
    logger.warning(f"decoding goes on without a packed copy of the weights, slower: {size} are not free for it")


def _packed(layer: torch.nn.Module, sources: list[Any], weight: Callable[[], torch.Tensor]) -> torch.Tensor:
    reorder, dtype = torch.ops.mkldnn._reorder_linear_weight, sources[0].dtype
    return _copy(layer, "packed", sources, lambda: reorder(weight().detach().to(dtype).contiguous(), ROWS))


def branches_of(layer: LoraLayer) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, float]]:
    """Of every active adapter A (r, in), B (out, r), its bias, and the scaling of their product."""
    return [
        (layer.lora_A[name].weight, layer.lora_B[name].weight, layer.lora_B[name].bias, layer.scaling[name])
        for name in layer.active_adapters
        if name in layer.lora_A and not layer.disable_adapters
    ]


def merged_lora(layer: LoraLayer) -> tuple[list[Any], Callable[[], torch.Tensor]] | None:
    """What W + scaling B A (out, in) is made of, and what makes it; None where there is more to the layer than that."""
    base, branches = layer.get_base_layer(), branches_of(layer)
    plain = type(layer) is LoraLinear and type(base) in (torch.nn.Linear, Conv1D)
    if not plain or layer.merged or layer.lora_variant or any(bias is not None for *_, bias, _ in branches):
        return None

    def merged() -> torch.Tensor:
        weight = (base.weight.T if type(base) is Conv1D else base.weight).float()
        return sum((scaling * (up.float() @ down.float()) for down, up, _, scaling in branches), weight)

    return [base.weight, *(part for down, up, _, scaling in branches for part in (down, up, scaling))], merged


def _linear(weight: torch.Tensor, bias: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def can_quantise(weight: torch.Tensor) -> bool:
    """Whether `int8_linear` takes these weights: numbers on a CPU, for which this build of torch has int8 products."""
    return (
        weight.device.type == "cpu"
        and weight.is_floating_point()
        and torch.backends.quantized.engine != "none"
        and all(hasattr(torch.ops.quantized, name) for name in INT8_OPERATORS)
    )


def int8_linear(
    layer: torch.nn.Module,
    sources: list[Any],
    weight: Callable[[], torch.Tensor],
    bias: torch.Tensor | None,
) -> Callable[[torch.Tensor], torch.Tensor]:
    """What computes x W^T + b from int8 weights, in the type of x.

    Args:
        layer: whom the copy belongs to.
        sources: tensors and numbers that W is made of; when one was changed or replaced since, W is quantised again.
        weight: makes W (out, in).
        bias: b (out,).
    """

    return partial(_int8_linear, _copy(layer, "int8", sources, lambda: _quantised(weight(), bias)))


def _quantised(weight: torch.Tensor, bias: torch.Tensor | None) -> Any:
    whole = weight.detach().float()
    scales = whole.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny) / 127
    zeros = torch.zeros(len(whole), dtype=torch.long)
    with warnings.catch_warnings():  # torch will leave these tensors to another package one day
        warnings.simplefilter("ignore", UserWarning)
        rounded = torch.quantize_per_channel(whole, scales, zeros, 0, torch.qint8)
    return torch.ops.quantized.linear_prepack(rounded, None if bias is None else bias.detach().float())


def _int8_linear(weight: Any, x: torch.Tensor) -> torch.Tensor:
    return torch.ops.quantized.linear_dynamic(x.float(), weight, reduce_range=_overflows()).to(x.dtype)


@cache
def _overflows() -> bool:
    """Whether products of eight by eight bits overflow in pairs, as they do without VNNI in hardware; inputs keep seven bits then."""
    ones = torch.ones(64, 64)
    return bool((torch.ops.quantized.linear_dynamic(ones, _quantised(ones, None), reduce_range=False) < 63).any())


def _state_of(source: torch.Tensor | float) -> tuple:
    if not isinstance(source, torch.Tensor):
        return (source,)
    # Versions miss what is written through `.data`, as PEFT merges adapters; some of the numbers show it.
    some = source.detach().flatten()[:: max(1, source.numel() // 61)].contiguous().view(torch.uint8)
    return source.data_ptr(), source._version, some.numpy().tobytes()


def _copy(layer: torch.nn.Module, kind: str, sources: list[Any], make: Callable[[], Any]) -> Any:
    """A layer's copy of one kind, made again when one of its sources was changed or replaced."""
    kept, key = _copies.setdefault(layer, {}), [_state_of(source) for source in sources]
    if kind not in kept or kept[kind][0] != key:
        kept[kind] = key, make()
    return kept[kind][1]
