"""Turns the adapters of a model off and on without walking it, whole or for the last rows of a forward pass.

Drafting (adapter on) and verifying (adapter off) alternate at every forward pass of lossless decoding, or share one. Walking the
modules, as PEFT's `disable_adapter` does, costs more than the forward pass of a small model. While a switch is open, LoRA layers run a
forward of ours, which knows plain LoRA only and refuses the rest.

On a CPU a pass that only drafts may run on a copy of the weights, adapters merged, in int8: what it gets wrong costs a token, no truth.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch.nn import functional as F

from .. import UserError
from ..models.packing import branches_of, can_quantise, int8_linear, merged_lora
from ..models.patching import Patch, base_of, embedding_table
from ..models.record import record_of


class AdapterSwitch(AbstractContextManager):
    """The adapters of one model, found once; for inference. The end of the `with` block gives them back.

    Attributes:
        first: rows (positions of a pass) from this one on have the adapters on; None: no row has.

    Args:
        in_int8: whether passes with the adapters on for all rows run in int8, on a CPU.

    Raises:
        UserError: see `check_adapters`.
    """

    def __init__(self, model: torch.nn.Module, in_int8: bool = False) -> None:
        self.first: int | None = None
        self._in_int8 = in_int8
        base, self._patch, self._batch = base_of(model), Patch(), 1
        if "adapter_switch" in vars(base):
            raise RuntimeError("lossless decoding is running on this model already; one call at a time.")
        self._mask_token_id = record_of(base).mask_token_id
        modules, embedding = list(base.modules()), base.get_input_embeddings()
        check_adapters(base, self._mask_token_id, modules)
        self._mask_row: torch.Tensor | None = None
        if self._mask_token_id is not None:  # as the adapters have it, scaled as the embedding scales
            self._mask_row = embedding(torch.tensor([[self._mask_token_id]], device=embedding_table(base).device))[0, 0]
        with ExitStack() as broken_off:  # between two copies, which take their time: nothing stays behind
            broken_off.enter_context(self._patch)
            self._patch.set(base, "adapter_switch", True)
            for module in modules:
                if isinstance(module, LoraLayer):
                    self._patch.set(module, "forward", self._forward_of(module))
                elif isinstance(module, AuxiliaryTrainingWrapper | TrainableTokensLayer):
                    self._patch.set(module, "_disable_adapters", True)
            # Under a mask row of its own the head is wrapped; what the row adds is banned from drafts in any case.
            for head in base.get_output_embeddings().modules():
                if in_int8 and type(head) is torch.nn.Linear and can_quantise(head.weight):
                    copy = int8_linear(head, [head.weight], partial(torch.Tensor.detach, head.weight), head.bias)
                    self._patch.set(head, "forward", partial(self._forward, head.forward, [], copy))
            broken_off.pop_all()
        self._hook = embedding.register_forward_hook(self._embed)

    def _forward_of(self, layer: LoraLayer) -> Callable[..., torch.Tensor]:
        base, lora, in_int8 = layer.get_base_layer(), merged_lora(layer), None
        if self._in_int8 and lora is not None and can_quantise(base.weight):
            in_int8 = int8_linear(layer, *lora, base.bias)
        return partial(self._forward, base, branches_of(layer), in_int8)

    def _forward(
        self,
        base: Callable[..., torch.Tensor],
        branches: list[tuple],
        drafting: Callable[..., torch.Tensor] | None,
        x: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if self.first == 0 and drafting is not None:
            return drafting(x)
        output = base(x, *args, **kwargs)
        if self.first is None:
            return output
        # Some layers see the rows of all texts one under the other.
        rows, found = (value.view(self._batch, -1, value.shape[-1])[:, self.first :] for value in (x, output))
        for down, up, bias, scaling in branches:
            # One call in place of four: small models are all overhead.
            if bias is None and output.dtype == up.dtype == x.dtype:
                found.baddbmm_(F.linear(rows, down), up.T.expand(self._batch, -1, -1), alpha=scaling)
            else:
                added = F.linear(F.linear(rows.to(down.dtype), down), up, bias)
                found += added * scaling  # rounded once, as PEFT does
        return output

    def _embed(self, module: torch.nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        """The mask token's own row, where the adapters are on."""
        self._batch = len(args[0])
        if self.first is None or self._mask_row is None:
            return output
        masks = args[0][:, self.first :, None] == self._mask_token_id
        rows = torch.where(masks, self._mask_row.to(output.dtype), output[:, self.first :])
        return torch.cat([output[:, : self.first], rows], 1)

    def __exit__(self, *exception: object) -> None:
        self._hook.remove()
        self._patch.undo()


def check_adapters(
    model: torch.nn.Module, mask_token_id: int | None = None, modules: list[torch.nn.Module] | None = None
) -> None:
    """Refuses adapters under which the base is not there any more, or that act on more than the rows where they are on.

    Args:
        modules: all of the model's, if they were listed already.

    Raises:
        UserError: none, merged, no plain LoRA, on the vocabulary, or with token rows of their own besides the mask token's.
    """
    modules = list(base_of(model).modules()) if modules is None else modules
    layers = [module for module in modules if isinstance(module, BaseTunerLayer)]
    if not any(isinstance(layer, LoraLayer) for layer in layers):
        raise UserError(
            "`attention`='lossless' needs LoRA adapters beside their base; this model has none, or they were merged, and no "
            "autoregressive model is left to verify with. Train with a LoraConfig, or load the adapter unmerged."
        )
    if any(layer.merged for layer in layers):
        raise UserError("`attention`='lossless': the adapter is merged into the base; call `unmerge_adapter()` first.")
    vocabulary = (base_of(model).get_input_embeddings(), base_of(model).get_output_embeddings())
    odd = ["`modules_to_save`" for module in modules if isinstance(module, ModulesToSaveWrapper)]
    for layer in layers:
        if isinstance(layer, TrainableTokensLayer):
            others = [rows for rows in layer.token_indices.values() if set(rows) - {mask_token_id}]
            odd += [f"`trainable_token_indices` {rows}" for rows in others]
        elif not isinstance(layer, LoraLayer) or not layer.lora_A:
            odd.append(type(layer).__name__)
        elif layer.lora_variant or layer in vocabulary:
            odd.append("a variant of LoRA" if layer.lora_variant else "LoRA on the vocabulary")
    if odd:
        raise UserError(
            f"`attention`='lossless' knows plain LoRA and the mask token's row, got {', '.join(sorted(set(odd)))}: it would change what the "
            "base predicts while it verifies; leave it out of `peft_config`."
        )
