"""Turns the adapters of a model off and on without walking it, whole or row by row of one forward pass.

Purpose: drafting (adapter on) and verifying (adapter off) alternate at every forward pass of lossless decoding, and share one where
rows are gated. Walking the modules, as PEFT's `disable_adapter` does, costs more than the forward pass of a small model.
Trade-off: two names of PEFT are relied on, `_disable_adapters` of a layer and the modules in its `lora_B`, here and nowhere else.
Alternative: PEFT's activated LoRA, which gates by a token sequence in the prompt, not by row.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper

from .patching import base_of


class AdapterSwitch:
    """The adapters of one model, found once. `close()`, or the end of a `with` block, leaves them on.

    Raises:
        ValueError: see `check_adapters`.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._gate: torch.Tensor | None = None
        base = base_of(model)
        check_adapters(base, getattr(base.config, "diffusion", {}).get("mask_token_id"))
        self._layers = [
            module for module in base.modules() if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)
        ]
        branches = [
            branch for layer in self._layers if isinstance(layer, LoraLayer) for branch in layer.lora_B.values()
        ]
        self._hooks = [branch.register_forward_hook(self._apply) for branch in branches]
        self._on = True

    def _apply(self, module: torch.nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        return output if self._gate is None else output * self._gate.to(output.dtype)

    def set(self, on: bool, rows: torch.Tensor | None = None) -> None:
        """On or off for the whole next passes; `rows` (L, 1) of ones and zeros tells which positions hear them."""
        self._gate = rows if on else None
        if on != self._on:
            for layer in self._layers:
                layer._disable_adapters = not on
            self._on = on

    def close(self) -> None:
        self.set(True)
        for hook in self._hooks:
            hook.remove()

    def __enter__(self) -> AdapterSwitch:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def check_adapters(model: torch.nn.Module, mask_token_id: int | None = None) -> None:
    """Refuses adapters under which the base is not there any more, or that act on more than the rows that hear them.

    Raises:
        ValueError: none, merged, no plain LoRA, on the vocabulary, or with token rows of their own besides the mask token's.
    """
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    if not any(isinstance(layer, LoraLayer) for layer in layers):
        raise ValueError(
            "`attention`='lossless' needs LoRA adapters beside their base; this model has none, or they were merged, and no "
            "autoregressive model is left to verify with. Train with a LoraConfig, or load the adapter unmerged."
        )
    if any(layer.merged for layer in layers):
        raise ValueError("`attention`='lossless': the adapter is merged into the base; call `unmerge_adapter()` first.")
    wrapped = [name for name, module in model.named_modules() if isinstance(module, ModulesToSaveWrapper)]
    vocabulary = (base_of(model).get_input_embeddings(), base_of(model).get_output_embeddings())
    odd = [type(layer).__name__ for layer in layers if not isinstance(layer, LoraLayer | TrainableTokensLayer)]
    odd += ["DoRA" for layer in layers if any(getattr(layer, "use_dora", {}).values())]
    odd += ["LoRA on the vocabulary" for layer in layers if isinstance(layer, LoraLayer) and layer in vocabulary]
    odd += [f"`modules_to_save` ({name})" for name in wrapped]
    odd += [
        f"`trainable_token_indices` ({rows})"
        for layer in layers
        if isinstance(layer, TrainableTokensLayer)
        for rows in layer.token_indices.values()
        if set(rows) - {mask_token_id}
    ]
    if odd:
        raise ValueError(
            f"`attention`='lossless' knows plain LoRA and the mask token's row, got {', '.join(sorted(set(odd)))}: it would change what the "
            "base says while it verifies; leave it out of `peft_config`."
        )
