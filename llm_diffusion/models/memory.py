"""The memory that a training step takes, traced from a config; weights are never loaded.

The model is built on the meta device. A micro-batch as `DiffusionSFTTrainer` runs it goes forward and backward on fake tensors
(shapes without data) through one layer and through two; storages are counted as they come and go, and depth is extrapolated,
because layers are alike.
Trade-off: seconds instead of a formula's microseconds, and no figure for remote code that looks at its data.
Alternative: a formula of saved tensors per layer. It must be counted anew for every architecture and misses what the hosts add:
autocast keeps 16-bit copies of fp32 weights, QLoRA's residual
stream is fp32.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..objective.attention_masks import additive, block_diffusion
from .attention import in_attention
from .lm_head import GPU_PIECE, PIECE, row_scores
from .patching import base_of
from .token_rows import train_rows_alone, trained_rows

GIB = 2**30
KINDS = ("lora", "qlora", "full")
NF4_BITS = 4 + 8 / 64 + 32 / (64 * 256)  # blocks of 64 with 8-bit scales; 256 of these share an fp32 one
PAGED = "paged_adamw_8bit"
_MLP_NAMES = {"mlp", "ffn", "feed_forward", "moe", "block_sparse_moe", "experts", "fc1", "fc2"}
_LORA_DROPOUT = 0.05  # the main job's default: its masks wait for backward
# Autocast runs these in fp32 on CUDA, not on a CPU, where the trace runs.
_FP32_ON_CUDA = {"layer_norm", "pow", "__pow__", "rsqrt", "softmax", "log_softmax", "cumsum", "exp", "softplus"}


@dataclass(frozen=True)
class TrainingSetup:
    """A way to train: kind "lora", "qlora" (NF4) or "full"; rows of a micro-batch and tokens of a row."""

    kind: str = "lora"
    batch_size: int = 16
    length: int = 768
    lora_rank: int = 16
    attention: str = "bidirectional"
    gradient_checkpointing: bool = True
    optimizer: str = "adamw"
    cards: int = 1


def count_parameters(model: PreTrainedModel) -> dict[str, int]:
    """Parameters by part; a head tied to the embedding is counted once, as embedding."""
    head = model.get_output_embeddings()
    heads = {id(parameter) for parameter in head.parameters()} if head is not None else set()
    tables = {id(p) for m in model.modules() if isinstance(m, torch.nn.Embedding) for p in m.parameters()}
    counts = dict.fromkeys(("embeddings", "attention", "mlp", "other", "head"), 0)
    for name, parameter in model.named_parameters():
        part = "attention" if in_attention(name) else "mlp" if _MLP_NAMES & {*name.split(".")} else "other"
        part = "embeddings" if id(parameter) in tables else "head" if id(parameter) in heads else part
        counts[part] += parameter.numel()
    return {**counts, "total": sum(counts.values())}


class ModelMemory:
    """Memory that training a model takes. Holds the exact counts of the whole model, and what was traced so far."""

    def __init__(self, config: PreTrainedConfig, trust_remote_code: bool = False) -> None:
        self.config, self.trust_remote_code = config, trust_remote_code
        self.text = config.get_text_config()
        self.layers = self.text.num_hidden_layers
        self.model = self.build(self.layers)
        self.parameters = count_parameters(self.model)
        self.quantizable = [layer.weight.numel() for layer in _quantizable(self.model)]
        self.depths = (1, 2)[: self.layers]
        self._adapters: dict[int, int] = {}
        self._peaks: dict[tuple[TrainingSetup, str], dict[str, float]] = {}

    def build(self, layers: int, dtype: torch.dtype = torch.float32, causal: bool = True) -> PreTrainedModel:
        """The model with its first `layers` layers, on the meta device."""
        config = copy.deepcopy(self.config)
        text = config.get_text_config()
        for name, value in list(vars(text).items()):
            if isinstance(value, list) and len(value) == self.layers:  # one entry a layer, as in `layer_types`
                setattr(text, name, value[:layers])
        text.num_hidden_layers = layers
        config.is_causal = text.is_causal = causal
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=self.trust_remote_code)

    def training(self, setup: TrainingSetup, device: str = "cuda") -> dict[str, float]:
        """GiB on one card at the peak of an optimiser step, gradients of earlier micro-batches there, and their `total`.

        `logits` is all that is as wide as the vocabulary: a piece of the logits, every maskable token masked (the worst case),
        copies and gradients of the vocabulary matrix. `masks` are attention masks. Two cards share evenly all but these.

        Args:
            device: "cuda", under bf16 autocast, or "cpu", in fp32.
        """
        sizes = {**self.fixed(setup, device), **self.peak(replace(setup, optimizer="adamw", cards=1), device)}
        sizes = {k: v / GIB / (1 if k in ("logits", "masks") else setup.cards) for k, v in sizes.items()}
        return {**sizes, "total": sum(sizes.values())}

    def fixed(self, setup: TrainingSetup, device: str = "cuda") -> dict[str, float]:
        """Bytes of weights, gradients and AdamW's two moments on all cards.

        Full: fp32 weights, as bf16 autocast wants them: 4 + 4 + 8 bytes a parameter. LoRA: bf16 weights on CUDA, fp32 adapters.
        QLoRA: NF4 linear layers, all else fp32 (`prepare_model_for_kbit_training`), bf16 adapters and moments (TRL).
        """
        total, quantized = self.parameters["total"], sum(self.quantizable)
        trained, size, wide, frozen = self.trained(setup), 4, 0, 0.0
        if setup.kind == "full":
            wide = self.parameters["embeddings"]
        elif setup.kind == "qlora":
            size, frozen = 2, quantized * NF4_BITS / 8 + (total - quantized) * 4
        else:
            frozen = total * (2 if device == "cuda" else 4)
        # With 8-bit moments the host keeps those of embeddings in fp32.
        moments = 2 * (trained - wide) + 8 * wide if setup.optimizer == PAGED else 2 * size * trained
        return {"weights": frozen + size * trained, "gradients": size * trained, "optimizer": moments}

    def trained(self, setup: TrainingSetup) -> int:
        """How many parameters are trained."""
        if setup.kind == "full":
            return self.parameters["total"]
        if setup.lora_rank not in self._adapters:
            adapted = [self._trainable(replace(setup, kind="lora"), depth, "cpu") for depth in self.depths]
            counts = [sum(p.numel() for p in model.parameters() if p.requires_grad) for model in adapted]
            self._adapters[setup.lora_rank] = counts[0] + (self.layers - 1) * (counts[-1] - counts[0])
        return self._adapters[setup.lora_rank]

    def peak(self, setup: TrainingSetup, device: str) -> dict[str, float]:
        """Bytes of activations, logits and masks at the peak of a micro-batch, all layers there."""
        if (setup, device) not in self._peaks:
            traces = [_trace(self._trainable(setup, depth, device), setup, device) for depth in self.depths]
            more, segments = self.layers - 1, zip(traces[0], traces[-1], strict=True)
            moments = [{part: one[part] + more * (two[part] - one[part]) for part in one} for one, two in segments]
            peak = max(moments, key=lambda live: sum(live.values()))
            if setup.kind == "qlora":  # one layer's weight at a time is 16 bits wide
                peak["activations"] += 2 * max(self.quantizable, default=0)
            self._peaks[setup, device] = peak
        return self._peaks[setup, device]

    def _trainable(self, setup: TrainingSetup, layers: int, device: str) -> torch.nn.Module:
        """The model as the trainer gets it, with adapters and the types that its tensors have in training."""
        sixteen = torch.bfloat16 if device == "cuda" else torch.float32
        model = self.build(layers, torch.float32 if setup.kind == "full" else sixteen, setup.attention == "block")
        experts = [parameter for parameter in model.parameters() if parameter.dim() == 3]
        for parameter in experts:  # torch traces grouped products in this type alone
            parameter.data = parameter.data.to(torch.bfloat16)
        if setup.kind == "full":
            return model
        if setup.kind == "qlora":
            quantized = _quantizable(model)
            for parameter in {*model.parameters()} - {layer.weight for layer in quantized} - {*experts}:
                parameter.data = parameter.data.float()
            for layer in quantized:
                # bitsandbytes gives back the type it was given, here fp32; a copy of the weight is counted in `peak`.
                layer.forward = lambda x, forward=layer.forward: forward(x).to(x.dtype)
        lora = LoraConfig(
            r=setup.lora_rank,
            lora_dropout=0.0 if experts else _LORA_DROPOUT,  # PEFT adapts experts, but without dropout
            target_modules="all-linear",
            trainable_token_indices=[0],  # stands for the mask token
            fan_in_fan_out=any(isinstance(layer, Conv1D) for layer in model.modules()),
        )
        model = get_peft_model(model, lora)
        train_rows_alone(model)
        for parameter in model.parameters():
            if parameter.requires_grad and setup.kind == "qlora":
                parameter.data = parameter.data.to(sixteen)
        return model


def _quantizable(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The layers that transformers hands to bitsandbytes: plain linear ones but the head; not experts in one 3-D tensor."""
    head = base_of(model).get_output_embeddings()
    return [m for m in model.modules() if (type(m) is torch.nn.Linear or isinstance(m, Conv1D)) and m is not head]


class _LiveBytes(TorchDispatchMode):
    """Counts storages as they come and go; `peaks` are the fullest moments, by part, of the segments of a step.

    A segment ends with the forward pass, and where the backward pass reaches an embedding. All moments of one segment grow by the same bytes with every
    layer, so that its peak is linear in depth; the peak of the whole step is not.
    """

    def __init__(self, known: list[torch.Tensor], vocabulary: int, length: int) -> None:
        super().__init__()
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        self._wide, self._square = vocabulary, (length, length)
        self._live = {"activations": 0, "logits": 0, "masks": 0}
        self.peaks = [dict(self._live)]

    def cut(self, _: torch.Tensor) -> None:
        self.peaks.append(dict(self._live))

    def __torch_dispatch__(self, func: Any, _: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self._known:
                self._add(tensor.untyped_storage(), tensor.shape)
        if sum(self._live.values()) > sum(self.peaks[-1].values()):
            self.peaks[-1] = dict(self._live)
        return output

    def _add(self, storage: torch.UntypedStorage, shape: torch.Size) -> None:
        mask = shape[-2:] == self._square and (len(shape) == 3 or shape[1:2] == (1,))
        part = "logits" if self._wide in shape else "masks" if mask else "activations"
        self._known.add(storage._cdata)
        self._live[part] += storage.nbytes()
        weakref.finalize(storage, self._free, storage._cdata, part, storage.nbytes())

    def _free(self, key: int, part: str, size: int) -> None:
        self._known.discard(key)
        self._live[part] -= size


class _CudaRules(TorchFunctionMode):
    """Lets CPU tensors keep for backward what CUDA keeps: one-byte dropout masks, none in attention, autocast's fp32."""

    def __torch_function__(self, func: Any, _: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is F.dropout:
            kept = torch.native_dropout(args[0], kwargs["p"], True) if kwargs["training"] and kwargs["p"] else args
            return kept[0]
        if func is F.scaled_dot_product_attention:
            kwargs["dropout_p"] = 0.0
        elif getattr(func, "__name__", "") in _FP32_ON_CUDA:
            args, kwargs = tree_map_only(
                torch.Tensor, lambda x: x.float() if x.is_floating_point() else x, (args, kwargs)
            )
        return func(*args, **kwargs)


def _trace(model: torch.nn.Module, setup: TrainingSetup, device: str) -> list[dict[str, int]]:
    """Peaks of the segments of a micro-batch, in bytes by part. `model` is on the meta device."""
    base, fakes = base_of(model), {}
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in model.modules():
            for tensors in (module._parameters, module._buffers):
                for name, old in ((name, old) for name, old in tensors.items() if old is not None):
                    if old not in fakes:  # tied tensors stay one
                        fakes[old] = torch.empty_like(old, device="cpu").requires_grad_(old.requires_grad)
                    tensors[name] = fakes[old]
        for tensor in (tensor for tensor in fakes.values() if tensor.requires_grad):
            tensor.grad = torch.zeros_like(tensor)
        known = [*fakes.values(), *(tensor.grad for tensor in fakes.values() if tensor.grad is not None)]
        length = setup.length * (2 if setup.attention == "block" else 1)
        live = _LiveBytes(known, base.config.get_text_config().vocab_size, length)
        base.get_input_embeddings().register_forward_hook(lambda *call: call[-1].register_hook(live.cut) and None)
        with live:
            _micro_batch(model, setup, device, live.cut)
    return live.peaks


def _micro_batch(model: torch.nn.Module, setup: TrainingSetup, device: str, cut: Callable[[Any], None]) -> None:
    """Forward and backward as `DiffusionSFTTrainer.compute_loss` does them, with the same two parts of a batch."""
    model.train()
    rules = _CudaRules if device == "cuda" else nullcontext
    if setup.gradient_checkpointing:
        # Function modes are off in backward: the recomputation enters its own.
        again = {"use_reentrant": False, "context_fn": lambda: (nullcontext(), rules())}
        base_of(model).activation_checkpointing_enable(again)
        if setup.kind != "full":
            base_of(model).enable_input_require_grads()
    rows = setup.batch_size
    parts = [rows] if rows < 3 else [2 * rows // 3, rows - 2 * rows // 3]
    with rules():
        loss = sum(_part_loss(model, part, setup, device) for part in parts)
    cut(loss)
    loss.backward()


def _part_loss(model: torch.nn.Module, rows: int, setup: TrainingSetup, device: str) -> torch.Tensor:
    base, block = base_of(model), setup.attention == "block"
    mask = torch.ones(rows, setup.length, dtype=torch.long)
    ids = torch.zeros(rows, setup.length * (2 if block else 1), dtype=torch.long)
    inputs = {"input_ids": ids, "attention_mask": mask if rows > 1 else None, "use_cache": False}  # one row: no padding
    if block:
        wide = additive(block_diffusion(mask, 4, "causal"))
        inputs |= {"attention_mask": wide.to(base.dtype, copy=True), "position_ids": torch.zeros_like(ids)}
    scored = torch.arange(setup.length)
    # The host wraps the forward alone, so each part casts the weights anew.
    with torch.autocast("cpu", torch.bfloat16, enabled=device == "cuda"):
        hidden = base.base_model(**inputs).last_hidden_state[:, scored].flatten(0, 1)
        head, own, index = trained_rows(base.get_output_embeddings())
        targets = torch.zeros(len(hidden), dtype=torch.long)
        piece = GPU_PIECE if device == "cuda" else PIECE
        return row_scores(hidden, head.weight, targets, rows=own, index=index, piece=piece)[0].sum()
