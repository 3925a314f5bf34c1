"""What a model is made of, what it needs in memory, and which cards train it: `llm-diffusion analyze`.

Everything comes from the config; weights are never loaded. To be counted, the model is built on the meta device. For training,
one micro-batch as `DiffusionSFTTrainer` runs it is run forward and backward on fake tensors (shapes without data) at two small
depths, every storage that comes and goes is counted, and the depth is extrapolated, because layers are alike.
Trade-off: seconds instead of a formula's microseconds, and architectures whose forward looks at its data cannot be traced.
Alternative: a formula of saved tensors per layer. It has to be counted anew for every architecture and misses what the hosts
add: PEFT copies the vocabulary matrix to train the mask token's row, autocast keeps 16-bit copies of fp32 weights, QLoRA runs its
residual stream in fp32.
"""

from __future__ import annotations

import copy
import types
import weakref
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING
from transformers.pytorch_utils import Conv1D

from .attention import base_of
from .attention_masks import additive, block_diffusion
from .losses import token_nll
from .tiny import TINY_MODEL_PATH

GIB = 2**30
KINDS = ("lora", "qlora", "full")
ATTENTIONS = ("bidirectional", "block")
PAGED = "paged_adamw_8bit"
CARDS = {"RTX 4080": 16, "RTX A4500": 20, "RTX 3090/4090": 24, "RTX A6000": 48, "A100/H100": 80}
CUDA_CONTEXT_GIB = 1.0  # driver, kernels and cuBLAS workspaces
FRAGMENTATION = 1.05  # what the caching allocator cannot reuse
# NF4 in blocks of 64 with 8-bit scales, and these in blocks of 256 with fp32 scales.
NF4_BITS = 4 + 8 / 64 + 32 / (64 * 256)
SHORTER = (512, 256)
_ATTENTION_NAMES = {"self_attn", "attn", "attention", "self_attention"}
_MLP_NAMES = {"mlp", "ffn", "feed_forward", "feedforward", "moe", "block_sparse_moe", "experts", "fc1", "fc2"}
_LORA_DROPOUT = 0.05  # default of the main job: its masks are kept for backward
_TILE = (4096, 32768)  # rows and columns of logits that TRL's streaming head holds
# Autocast computes these in fp32 on CUDA and in 16 bits, or as they come, on a CPU.
_FP32_ON_CUDA = {"layer_norm", "pow", "__pow__", "rsqrt", "softmax", "log_softmax", "cumsum", "exp", "softplus"}


@dataclass(frozen=True)
class TrainingSetup:
    """A training run: kind "lora", "qlora" (NF4) or "full"; rows and tokens of a micro-batch; and how memory is saved."""

    kind: str = "lora"
    batch_size: int = 16
    length: int = 768
    lora_rank: int = 16
    attention: str = "bidirectional"
    gradient_checkpointing: bool = True
    optimizer: str = "adamw"
    cards: int = 1


@dataclass
class TrainingMemory:
    """GiB at the peak of an optimiser step, gradients of earlier micro-batches present (accumulation).

    `logits` is all that has the size of the vocabulary: logits, copies of the vocabulary matrix and gradients of it; with every
    maskable token masked, the worst case. `masks` are attention masks. `total` has no reserve.
    """

    kind: str
    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    masks: float
    total: float


@dataclass
class CardFit:
    """Whether one kind of training fits a card; if not, the first changes that make it fit, empty when none does.

    `total` and `total_changed` are GiB with the reserve for context and fragmentation.
    """

    card: str
    gib: int
    kind: str
    fits: bool
    total: float
    changes: list[str] = field(default_factory=list)
    total_changed: float | None = None


@dataclass
class Analysis:
    """What `analyze` found. Counts are numbers of parameters, memory is in GiB."""

    name: str
    architecture: str
    layers: int
    heads: int | None
    kv_heads: int | None
    head_dim: int | None
    hidden_size: int
    vocabulary: int
    context_length: int | None
    sliding_window: int | None
    softmax_attention: bool
    parameters: dict[str, int]
    weights: dict[str, float]
    kv_cache: float
    inference: dict[str, float]
    setup: dict[str, Any]
    training: list[TrainingMemory] = field(default_factory=list)
    cards: list[CardFit] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def analyze(
    name_or_path: str | PreTrainedConfig,
    *,
    batch_size: int = 16,
    length: int = 768,
    lora_rank: int = 16,
    attention: str = "bidirectional",
    gradient_checkpointing: bool = True,
    trust_remote_code: bool = False,
) -> Analysis:
    """Counts a causal language model and estimates what it needs on CUDA, from its config alone.

    Args:
        name_or_path: hub name, folder (a saved adapter's too), "tiny", or a config.
        batch_size, length: rows and tokens a row of a micro-batch; `length` is also the KV cache's.
        lora_rank: rank on every linear layer, for LoRA and QLoRA.
        attention: "bidirectional", or "block", which runs noisy and clean halves of 2 x `length` tokens.
        gradient_checkpointing: as TRL does by default.

    Raises:
        ValueError: not a decoder-only causal model, or a setting out of range.
        OSError: no such model.
    """
    setup = TrainingSetup("lora", batch_size, length, lora_rank, attention, gradient_checkpointing)
    for key in ("batch_size", "length", "lora_rank"):
        if getattr(setup, key) < (least := 2 if key == "length" else 1):
            raise ValueError(f"`{key}` must be at least {least}, got {getattr(setup, key)}.")
    if attention not in ATTENTIONS:
        raise ValueError(f"`attention` must be one of {ATTENTIONS}, got {attention!r}.")
    config = load_config(name_or_path, trust_remote_code)
    subject = _Subject(config, trust_remote_code)
    analysis = _describe(subject, name_or_path if isinstance(name_or_path, str) else config.model_type, setup)
    try:
        analysis.training = [subject.memory(replace(setup, kind=kind)) for kind in KINDS]
    except Exception as error:  # remote code may fail in any way on tensors without data; the counts above still hold
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        analysis.notes.append(f"training memory unknown: {analysis.architecture} cannot run without data ({reason})")
        return analysis
    analysis.cards = [_fit(subject, card, replace(setup, kind=kind)) for kind in KINDS for card in CARDS]
    return analysis


def training_memory(config: PreTrainedConfig, setup: TrainingSetup, device: str = "cuda") -> TrainingMemory:
    """GiB of one training setup: on "cuda" under bf16 autocast with TRL's streaming head, on "cpu" in fp32 with full logits."""
    return _Subject(config).memory(setup, device)


def load_config(name_or_path: str | PreTrainedConfig, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The config of a decoder-only causal model; ValueError for any other kind, OSError where there is none."""
    config = name_or_path
    if not isinstance(config, PreTrainedConfig):
        path = Path(TINY_MODEL_PATH if name_or_path == "tiny" else name_or_path).expanduser()
        if (path / "adapter_config.json").exists():
            return load_config(PeftConfig.from_pretrained(str(path)).base_model_name_or_path, trust_remote_code)
        source = str(path) if path.exists() else name_or_path
        try:
            config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise OSError(f"`model`: {name_or_path!r} has no readable config: {reason}") from error
    wanted = "give a decoder-only causal LM, for example Qwen3, Llama or GPT-2"
    if config.is_encoder_decoder:
        raise ValueError(f"`model`: {config.model_type!r} is an encoder-decoder; {wanted}.")
    if type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False):
        raise ValueError(f"`model`: {config.model_type!r} is an encoder, bidirectional already; {wanted}.")
    remote = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if type(config) not in AutoModelForCausalLM._model_mapping and not remote:
        raise ValueError(f"`model`: {config.model_type!r} has no causal language model; {wanted}.")
    return config


class _Subject:
    """One model under analysis: its config, its exact counts, and the traces made of it so far."""

    def __init__(self, config: PreTrainedConfig, trust_remote_code: bool = False) -> None:
        self.config, self.trust_remote_code = config, trust_remote_code
        self.text = config.get_text_config()
        self.layers = self.text.num_hidden_layers
        self.model = self.build(self.layers)
        self.parameters = count_parameters(self.model)
        self.quantizable = sum(m.weight.numel() for m in _linear_layers(self.model))
        self._traces: dict[tuple[TrainingSetup, str], tuple[dict[str, float], float]] = {}

    def build(self, layers: int, dtype: torch.dtype = torch.float32, causal: bool = True) -> PreTrainedModel:
        """The model with its first `layers` layers, on the meta device."""
        config = copy.deepcopy(self.config)
        text = config.get_text_config()
        for name, value in vars(text).items():
            if isinstance(value, list) and len(value) == self.layers:  # one entry a layer, `layer_types` for one
                setattr(text, name, value[:layers])
        text.num_hidden_layers = layers
        config.is_causal = text.is_causal = causal
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=self.trust_remote_code)

    def memory(self, setup: TrainingSetup, device: str = "cuda") -> TrainingMemory:
        """Peak of an optimiser step; two cards share all but what stands at the head evenly."""
        weights, gradients, optimizer = (
            self.fixed(setup, device)[key] for key in ("weights", "gradients", "optimizer")
        )
        peak, _ = self.trace(setup, device)
        shared = setup.cards
        sizes = {
            "weights": weights / shared,
            "gradients": gradients / shared,
            "optimizer": optimizer / shared,
            "activations": peak["activations"] / shared,
            "logits": peak["logits"],
            "masks": peak["masks"],
        }
        return TrainingMemory(
            setup.kind, **{name: size / GIB for name, size in sizes.items()}, total=sum(sizes.values()) / GIB
        )

    def fixed(self, setup: TrainingSetup, device: str = "cuda") -> dict[str, float]:
        """Bytes of weights, gradients and AdamW's two moments.

        Full: fp32 weights, as bf16 autocast wants them, 4 + 4 + 8 bytes a parameter. LoRA: 16-bit weights on CUDA, fp32 adapters.
        QLoRA: NF4 linear layers, all else in fp32 (`prepare_model_for_kbit_training`), bf16 adapters and moments (TRL).
        """
        total, embeddings = self.parameters["total"], self.parameters["embeddings"]
        if setup.kind == "full":
            trained, size, frozen, wide = total, 4, 0.0, embeddings
        else:
            trained, wide = self.trace(setup, device)[1], 0
            size = 2 if setup.kind == "qlora" and device == "cuda" else 4
            frozen = total * (2 if device == "cuda" else 4)
            if setup.kind == "qlora":
                frozen = self.quantizable * NF4_BITS / 8 + (total - self.quantizable) * 4
        moments = 2 * size * trained
        if setup.optimizer == PAGED:
            moments = 2 * (trained - wide) + 8 * wide  # the host keeps embeddings' moments in fp32
        return {"weights": frozen + size * trained, "gradients": size * trained, "optimizer": moments}

    def trace(self, setup: TrainingSetup, device: str) -> tuple[dict[str, float], float]:
        """Bytes by part at the peak of a micro-batch, and the number of trained parameters, at full depth."""
        setup = replace(setup, optimizer="adamw", cards=1)  # which change neither
        if (setup, device) not in self._traces:
            depths = (2, 3) if self.layers > 3 else (self.layers,)
            traces = [_trace(self, setup, depth, device) for depth in depths]
            (low, _), (high, _) = traces[0], traces[-1]
            extra = self.layers - depths[-1]
            segments = [
                {part: b[part] + extra * (b[part] - a[part]) for part in b} for a, b in zip(low, high, strict=True)
            ]
            trained = traces[-1][1] + extra * (traces[-1][1] - traces[0][1])
            self._traces[setup, device] = max(segments, key=lambda peak: sum(peak.values())), trained
        return self._traces[setup, device]


def count_parameters(model: PreTrainedModel) -> dict[str, int]:
    """Parameters by part; a head tied to the embedding is counted once, as embedding."""
    head = model.get_output_embeddings()
    heads = {id(parameter) for parameter in head.parameters()} if head is not None else set()
    embedded = {id(p) for m in model.modules() if isinstance(m, torch.nn.Embedding) for p in m.parameters()}
    counts = dict.fromkeys(("embeddings", "attention", "mlp", "other", "head"), 0)
    for name, parameter in model.named_parameters():
        words = name.split(".")
        part = next((_part_of(word) for word in words if _part_of(word)), "other")
        part = "embeddings" if id(parameter) in embedded else "head" if id(parameter) in heads else part
        counts[part] += parameter.numel()
    return {**counts, "total": sum(counts.values())}


def _part_of(word: str) -> str | None:
    return "attention" if word in _ATTENTION_NAMES else "mlp" if word in _MLP_NAMES else None


def _linear_layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The layers that bitsandbytes quantises: linear ones but the head; experts in one 3-D tensor stay as they are."""
    head = base_of(model).get_output_embeddings()
    return [m for m in model.modules() if (type(m) is torch.nn.Linear or isinstance(m, Conv1D)) and m is not head]


def _describe(subject: _Subject, name: str, setup: TrainingSetup) -> Analysis:
    text, total, quantizable = subject.text, subject.parameters["total"], subject.quantizable
    heads = getattr(text, "num_attention_heads", None)
    kv_heads = getattr(text, "num_key_value_heads", None) or getattr(text, "num_kv_heads", None) or heads
    if getattr(text, "multi_query", False) and not getattr(text, "new_decoder_architecture", False):
        kv_heads = 1  # Falcon-7B
    head_dim = getattr(text, "head_dim", None) or (text.hidden_size // heads if heads else None)
    window = getattr(text, "sliding_window", None)
    if "sliding_attention" not in (getattr(text, "layer_types", None) or ["sliding_attention"]):
        window = None
    names = [n.split(".") for n, _ in subject.model.named_modules()]
    attending = {tuple(n) for n in names if n[-1] in _ATTENTION_NAMES and not _ATTENTION_NAMES & set(n[:-1])}
    softmax = heads is not None and len(attending) == subject.layers
    weights = {
        "fp32": 4 * total / GIB,
        "bf16": 2 * total / GIB,
        "int8": (quantizable + 2 * (total - quantizable)) / GIB,
        "nf4": (quantizable * NF4_BITS / 8 + 2 * (total - quantizable)) / GIB,
    }
    cache = 2 * 2 * subject.layers * kv_heads * head_dim * setup.length / GIB if softmax else 0.0
    notes = [f"sliding window of {window}: conversion refuses it"] if window else []
    return Analysis(
        name=str(name),
        architecture=type(subject.model).__name__,
        layers=subject.layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        hidden_size=text.hidden_size,
        vocabulary=text.vocab_size,
        context_length=getattr(text, "max_position_embeddings", None),
        sliding_window=window,
        softmax_attention=softmax,
        parameters=subject.parameters,
        weights=weights,
        kv_cache=cache,
        inference={kind: weights[kind] + cache for kind in ("bf16", "int8", "nf4")},
        setup={
            k: getattr(setup, k) for k in ("batch_size", "length", "lora_rank", "attention", "gradient_checkpointing")
        },
        notes=notes + ([] if softmax else ["not every layer is softmax attention: conversion cannot open it"]),
    )


class _LiveBytes(TorchDispatchMode):
    """Counts storages as they come and go; keeps, by part, the peak of every segment of a step.

    A segment ends where the backward pass reaches an embedding. Inside one, all that depends on depth grows by the same amount
    a layer, so that every segment's peak, though not their maximum, is linear in depth.
    """

    def __init__(self, known: Iterator[torch.Tensor], vocabulary: int, length: int) -> None:
        super().__init__()
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        self._wide, self._length = {vocabulary, _TILE[1]}, length
        self._live = {"activations": 0, "logits": 0, "masks": 0}
        self.peaks = [dict(self._live)]

    def cut(self, *_: Any) -> None:
        self.peaks.append(dict(self._live))

    def __torch_dispatch__(self, func: Any, _: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self._known:
                self._add(tensor)
        if sum(self._live.values()) > sum(self.peaks[-1].values()):
            self.peaks[-1] = dict(self._live)
        return output

    def _add(self, tensor: torch.Tensor) -> None:
        storage, shape = tensor.untyped_storage(), tensor.shape
        square = shape[-2:] == (self._length, self._length) and (len(shape) == 3 or shape[1:2] == (1,))
        part = "logits" if self._wide & set(shape) else "masks" if square else "activations"
        self._known.add(storage._cdata)
        self._live[part] += storage.nbytes()
        weakref.finalize(storage, self._free, storage._cdata, part, storage.nbytes())

    def _free(self, key: int, part: str, size: int) -> None:
        self._known.discard(key)
        self._live[part] -= size


class _CudaRules(TorchFunctionMode):
    """Lets a trace on CPU tensors keep what CUDA keeps: dropout's one-byte masks, fused attention's none, autocast's fp32."""

    def __torch_function__(self, func: Any, _: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is F.dropout:
            p, training = (
                kwargs.get(k, args[i] if len(args) > i else d)
                for i, (k, d) in ((1, ("p", 0.5)), (2, ("training", True)))
            )
            return torch.native_dropout(args[0], p, True)[0] if training and p else args[0]
        if func is F.scaled_dot_product_attention:
            kwargs["dropout_p"] = 0.0
        elif getattr(func, "__name__", "") in _FP32_ON_CUDA:
            args = tuple(a.float() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args)
        return func(*args, **kwargs)


class _Dequantised(torch.autograd.Function):
    """bitsandbytes' product: a 16-bit copy of the weight lives as long as the product does, forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(weight)
        copied = weight.clone()
        return x @ (copied.t() if copied.shape[-1] == x.shape[-1] else copied)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        copied = ctx.saved_tensors[0].to(gradient.dtype, copy=True)
        return gradient @ (copied if copied.shape[0] == gradient.shape[-1] else copied.t()), None


def _quantised_forward(self: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    output = _Dequantised.apply(x.to(self.weight.dtype), self.weight)
    return (output if self.bias is None else output + self.bias.to(output.dtype)).to(x.dtype)


class _StreamingHead(torch.autograd.Function):
    """What TRL's head on CUDA allocates: one tile of logits, and fp32 gradients of hidden states and, if trained, the matrix."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(hidden, weight)
        ctx.tile = min(len(hidden), _TILE[0]), _TILE[1]
        hidden.new_empty(ctx.tile, dtype=torch.bfloat16)
        return hidden.new_empty(len(hidden), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        tile = gradient.new_empty(ctx.tile, dtype=torch.bfloat16)
        wanted = zip(ctx.saved_tensors, ctx.needs_input_grad, strict=True)
        gradients = [torch.zeros_like(x, dtype=torch.float32) if needed else None for x, needed in wanted]
        del tile
        return tuple(None if g is None else g.to(x.dtype) for g, x in zip(gradients, ctx.saved_tensors, strict=True))


def _trace(subject: _Subject, setup: TrainingSetup, layers: int, device: str) -> tuple[list[dict[str, int]], int]:
    """Peaks of the segments of a micro-batch in bytes by part, and the number of trained parameters."""
    model = subject.build(
        layers,
        torch.bfloat16 if device == "cuda" and setup.kind != "full" else torch.float32,
        causal=setup.attention == "block",
    )
    if setup.kind == "qlora":
        for layer in _linear_layers(model):
            layer.forward = types.MethodType(_quantised_forward, layer)
    if setup.kind != "full":
        experts = any(
            parameter.dim() == 3 for parameter in model.parameters()
        )  # PEFT adapts these without dropout alone
        lora = LoraConfig(
            r=setup.lora_rank,
            lora_dropout=0.0 if experts else _LORA_DROPOUT,
            target_modules="all-linear",
            trainable_token_indices=[0],  # stands for the mask token
            task_type="CAUSAL_LM",
        )
        model = get_peft_model(model, lora)
    with FakeTensorMode(allow_non_fake_inputs=True):
        _materialise(model, setup, device)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        known = [*model.parameters(), *model.buffers(), *(parameter.grad for parameter in trained)]
        length = setup.length * (2 if setup.attention == "block" else 1)
        live = _LiveBytes(known, subject.text.vocab_size, length)
        base_of(model).get_input_embeddings().register_forward_hook(
            lambda _, __, output: output.register_hook(live.cut) and None
        )
        with live:
            _micro_batch(model, setup, device)
    return live.peaks, sum(parameter.numel() for parameter in trained)


def _materialise(model: torch.nn.Module, setup: TrainingSetup, device: str) -> None:
    """Turns meta parameters and buffers, shared ones once, into fake CPU ones of the types that training gives them."""
    kept: dict[torch.Tensor, torch.Tensor] = {}
    quantised = {id(layer.weight) for layer in _linear_layers(model)}
    for module in model.modules():
        for group in (module._parameters, module._buffers):
            for name, old in group.items():
                if old is None:
                    continue
                if old not in kept:
                    dtype = old.dtype
                    if setup.kind == "qlora" and device == "cuda" and old.is_floating_point():
                        dtype = torch.bfloat16 if old.requires_grad or id(old) in quantised else torch.float32
                    new = torch.empty_like(old, dtype=dtype, device="cpu")
                    kept[old] = torch.nn.Parameter(new, old.requires_grad) if group is module._parameters else new
                group[name] = kept[old]


def _micro_batch(model: torch.nn.Module, setup: TrainingSetup, device: str) -> None:
    """Forward and backward as `DiffusionSFTTrainer.compute_loss` does them, in the same two parts of a batch."""
    model.train()
    rules = _CudaRules if device == "cuda" else nullcontext
    if setup.gradient_checkpointing:
        # Function modes end where backward begins: the recomputation enters its own.
        again = {"use_reentrant": False, "context_fn": lambda: (nullcontext(), rules())}
        base_of(model).activation_checkpointing_enable(again)
        if setup.kind != "full":
            base_of(model).enable_input_require_grads()
    rows = setup.batch_size
    parts = [rows] if rows < 3 else [2 * rows // 3, rows - 2 * rows // 3]
    with rules(), torch.autocast("cpu", torch.bfloat16, enabled=device == "cuda"):
        loss = sum(_part_loss(model, part, setup, device) for part in parts)
    loss.backward()


def _part_loss(model: torch.nn.Module, rows: int, setup: TrainingSetup, device: str) -> torch.Tensor:
    base, length = base_of(model), setup.length
    mask = torch.ones(rows, length, dtype=torch.long)
    ids = torch.zeros(rows, length * (2 if setup.attention == "block" else 1), dtype=torch.long)
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask if rows > 1 else None, "use_cache": False}
    if setup.attention == "block":
        wide = additive(block_diffusion(mask, 4, "causal"))
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        inputs["attention_mask"] = torch.zeros_like(wide, dtype=dtype).masked_fill(wide < 0, torch.finfo(dtype).min)
        inputs["position_ids"] = torch.zeros_like(ids)
    scored = torch.arange(length)
    if device == "cuda":
        hidden = base.base_model(**inputs).last_hidden_state[:, scored]
        return _StreamingHead.apply(hidden.flatten(0, 1), base.get_output_embeddings().weight).sum()
    logits = model(**inputs, logits_to_keep=scored).logits.flatten(0, 1)
    terms = token_nll(logits, torch.zeros(len(logits), dtype=torch.long))
    logits.detach().argmax(-1)
    return terms.sum()
