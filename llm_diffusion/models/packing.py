"""Linear layers of a bf16 model on a CPU, with weights in the layout that oneDNN multiplies by, made once instead of at every call.

The products are the same ones in the same order; a pass over a few rows takes three quarters of the time. torch has this layout for its
compiler alone, so its private names stand here and nowhere else; without them, or bf16 in hardware, nothing is packed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from weakref import WeakKeyDictionary

import torch

from .patching import Patch, base_of

SUPPORT = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # of torch.cpu
OPERATORS = ("_reorder_linear_weight", "_linear_pointwise")  # of torch.ops.mkldnn
ROWS = 8  # what the layout is best for; any number is right
# Of every layer the weights' place and version, and the packed copy; outside the model, because it can be neither copied nor saved.
_packed: WeakKeyDictionary[torch.nn.Module, tuple[tuple[int, int], torch.Tensor]] = WeakKeyDictionary()


def can_pack(layer: torch.nn.Module) -> bool:
    """Whether this is a plain linear layer in bf16, on a CPU that multiplies bf16."""
    weight = getattr(layer, "weight", None)
    return (
        type(layer) is torch.nn.Linear
        and weight.dtype == torch.bfloat16
        and weight.device.type == "cpu"
        and has_fast_bfloat16()
        and all(hasattr(torch.ops.mkldnn, name) for name in OPERATORS)
    )


def has_fast_bfloat16() -> bool:
    """Whether this CPU multiplies bf16 itself, with AVX512-BF16 or AMX."""
    return any(getattr(torch.cpu, name, bool)() for name in SUPPORT)


@contextmanager
def packed(model: torch.nn.Module) -> Iterator[None]:
    """For inference: the linear layers of a model's base run on packed weights, which are kept for the next time.

    Weights that were changed or replaced since are packed again; the copy takes as much memory as the layers.
    """
    with Patch() as patch:
        for layer in () if torch.is_grad_enabled() else base_of(model).modules():
            if can_pack(layer):
                patch.set(layer, "forward", partial(_linear, _packed_weight(layer), layer.bias))
        yield


def _packed_weight(layer: torch.nn.Linear) -> torch.Tensor:
    key = layer.weight.data_ptr(), layer.weight._version
    if layer not in _packed or _packed[layer][0] != key:
        _packed[layer] = key, torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), ROWS)
    return _packed[layer][1]


def _linear(weight: torch.Tensor, bias: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
