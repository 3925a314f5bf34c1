"""Single rows of a vocabulary, trained under LoRA, without a copy of the matrix.

PEFT trains a token's row (`trainable_token_indices`) by putting it into a copy of the whole embedding at every forward; a tied head
takes a second copy, and autograd a gradient as large as the matrix: gigabytes, and most of a short step, for one row. Here the row is
chosen where its token stands, and its column of the logits is computed beside the others.
Trade-off: two private methods of PEFT's layer are stepped around; parameters, saving, loading and merging remain PEFT's. Alternative:
`modules_to_save`, which trains, stores and ships the whole matrix.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.utils.other import TrainableTokensWrapper
from torch.nn import functional as F


def train_rows_alone(model: torch.nn.Module) -> None:
    """Lets every trained row of `model` stand beside its matrix. In place; idempotent; copies of the model keep it."""
    for module in model.modules():
        if isinstance(module, TrainableTokensLayer) and getattr(module.base_layer, "max_norm", None) is None:
            module.forward_adapters = types.MethodType(_forward_rows, module)


def trained_rows(head: torch.nn.Module) -> tuple[torch.nn.Module, torch.Tensor | None, torch.Tensor | None]:
    """The module under PEFT's wrapper, the rows (r, D) that stand in place of its own now, and their numbers (r,)."""
    if not isinstance(head, TrainableTokensWrapper):
        return head, None, None
    layer = head.token_adapter
    names = _in_use(layer)
    if not names:
        return layer.base_layer, None, None
    rows = torch.cat([layer.trainable_tokens_delta[name] for name in names])
    return layer.base_layer, rows, _index(layer, names, rows.device)


def _in_use(layer: TrainableTokensLayer) -> list[str]:
    if layer.disable_adapters or layer.merged:
        return []
    return [name for name in layer.active_adapters if name in layer.trainable_tokens_delta]


def _index(layer: TrainableTokensLayer, names: list[str], device: torch.device) -> torch.Tensor:
    """The numbers of the rows, put on the device once: making them anew would wait for it at every call."""
    numbers = [number for name in names for number in layer.token_indices[name]]
    kept = getattr(layer, "_row_numbers", None)
    if kept is None or kept[0] != numbers or kept[1].device != device:
        kept = layer._row_numbers = (numbers, torch.tensor(numbers, device=device))
    return kept[1]


def _forward_rows(
    self: TrainableTokensLayer, x: torch.Tensor, active_adapters: list[str], *args: Any, **kwargs: Any
) -> torch.Tensor:
    names = _in_use(self)
    whole = isinstance(self.base_layer, torch.nn.Embedding | torch.nn.Linear)
    if not names or list(active_adapters) != list(self.active_adapters) or not whole:
        return type(self).forward_adapters(self, x, active_adapters, *args, **kwargs)
    self._check_overlapping_tokens(names)
    rows, result = torch.cat([self.trainable_tokens_delta[name] for name in names]), self.base_layer(x)
    index = _index(self, names, x.device)
    if isinstance(self.base_layer, torch.nn.Linear):
        # In place: a product keeps its inputs for backward, not its output.
        return result.index_copy_(-1, index, F.linear(x, rows.to(x.dtype)).to(result.dtype))
    hits = x[..., None] == index
    own = F.embedding(hits.int().argmax(-1), rows).to(result.dtype)
    scale = self._get_embed_scale()
    own = own if scale is None else own * scale.to(own.dtype)
    return torch.where(hits.any(-1, keepdim=True), own, result)
