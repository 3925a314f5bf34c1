"""What a model is made of, what it needs in memory, and which cards train it: `llm-diffusion analyze`.

Everything comes from the config: parameters are counted on the meta device, and what a step keeps for its backward pass follows from the
widths of the layers (`ModelMemory`), which `benchmarks/memory.py` compares with real steps.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from rich.table import Column, Table
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from . import UserError
from .models.attention import in_attention
from .models.checkpoints import adapter_base, from_hub, is_adapter, resolve_path
from .models.lm_head import GPU_PIECE, PIECE
from .models.probing import recurrent_layers
from .objective.settings import check_settings, setting

GIB = 2**30
KINDS = ("lora", "qlora", "full")
CARDS = {"RTX 4080": 16, "RTX A4500": 20, "RTX 3090/4090": 24, "RTX A6000": 48, "A100/H100": 80}  # GiB
CUDA_CONTEXT_GIB = 1.0  # driver, kernels, cuBLAS workspaces
FRAGMENTATION = 1.05  # what the caching allocator cannot reuse
PAGED = "paged_adamw_8bit"
NF4_BITS = 4 + 8 / 64 + 32 / (64 * 256)  # blocks of 64 with 8-bit scales; 256 of these share an fp32 one
ASSUMPTIONS = "lora: bf16 base, fp32 adapters on all linear layers; qlora: NF4 linear layers, all else fp32, bf16 adapters; full: fp32 weights, gradients and moments under bf16 autocast; every token masked, gradients accumulated"
_MLP_NAMES = {"mlp", "ffn", "feed_forward", "moe", "block_sparse_moe", "experts", "fc1", "fc2"}
# Bytes of a number in matrix products, in the residual stream, between the layers of an MLP, and in a dropout's mask; and what a number of
# the MLP's inner width and of the stream takes for a moment, where a block has been recomputed and its backward pass begins.
_BYTES = {
    ("cuda", "lora"): (2, 2, 2, 1, 10, 10),  # under bf16 autocast; adapters are fp32
    ("cuda", "qlora"): (2, 4, 4, 1, 9, 8),
    ("cuda", "full"): (2, 4, 2, 1, 4, 8),
    ("cpu", "lora"): (4, 4, 4, 4, 4, 20),
    ("cpu", "qlora"): (4, 4, 4, 4, 4, 20),
    ("cpu", "full"): (4, 4, 4, 4, 8, 4),
}


@dataclass(frozen=True)
class TrainingSetup:
    """A kind of training and the shape of its steps; with blocks, a row has 2 x `length` tokens."""

    kind: str = setting("lora", "What is trained; qlora: adapters on an NF4 base.", choices=KINDS)
    batch_size: int = setting(16, "Rows of a micro-batch.", min=1)
    length: int = setting(768, "Tokens of a row.", min=2)
    lora_rank: int = setting(16, "Rank of the adapters.", min=1)
    attention: str = setting("bidirectional", "Attention mode.", choices=("bidirectional", "block", "lossless"))
    gradient_checkpointing: bool = True
    optimizer: str = "adamw"
    cards: int = 1


@dataclass
class Analysis:
    """What `analyze` found. GiB: `weights` and `inference` by type of weight, `training` by kind, `cards` with the reserve, and after the
    first changes that help. The last two are empty where there is no estimate; then `notes` says why."""

    name: str
    model: dict[str, Any]
    parameters: dict[str, int]
    weights: dict[str, float]
    inference: dict[str, float]
    setup: dict[str, Any]
    notes: list[str]
    training: dict[str, dict[str, float]] = field(default_factory=dict)
    cards: list[dict[str, Any]] = field(default_factory=list)


class ModelMemory:
    """The memory that training takes: exact counts of parameters, and a formula for what a step keeps beside them.

    A micro-batch runs as `DiffusionSFTTrainer` runs it: cut in two by length, both parts forward, then the later one backward first,
    whose gradients wait for the earlier one's. Layers are taken to be alike.
    """

    def __init__(self, config: PreTrainedConfig, trust_remote_code: bool = False) -> None:
        self.text = text = config.get_text_config()
        self.layers, self.stream = text.num_hidden_layers, text.hidden_size
        with torch.device("meta"):
            self.model = AutoModelForCausalLM.from_config(copy.deepcopy(config), trust_remote_code=trust_remote_code)
        self.parameters = count_parameters(self.model)
        head = self.model.get_output_embeddings()
        # What transformers hands to bitsandbytes: plain linear layers but the head; not experts in one 3-D tensor.
        plain = [m for m in self.model.modules() if type(m) is nn.Linear or isinstance(m, Conv1D)]
        self.quantizable = [m.weight.numel() for m in plain if m is not head]
        # The blocks; a vision tower has its own. Each module with whether it belongs to attention.
        lists = [m for m in self.model.modules() if isinstance(m, nn.ModuleList) and len(m) == self.layers]
        blocks = max(lists, key=lambda m: sum(p.numel() for p in m.parameters()), default=self.model)
        self.modules = [(in_attention(name), module) for name, module in blocks.named_modules()]
        self.experts = [p for p in self.model.parameters() if p.dim() == 3]
        self.heads = getattr(text, "num_attention_heads", None) or 0
        self.head_dim = getattr(text, "head_dim", None) or (text.hidden_size // self.heads if self.heads else 0)
        self.kv_heads = getattr(text, "num_key_value_heads", None) or getattr(text, "num_kv_heads", None) or self.heads
        self.multi_query = getattr(text, "multi_query", False) and not getattr(text, "new_decoder_architecture", False)
        self.kv_heads = 1 if self.multi_query else self.kv_heads  # Falcon-7B

    def training(self, setup: TrainingSetup, device: str = "cuda") -> dict[str, float]:
        """GiB on one card at the peak of an optimiser step, and their `total`; on "cuda" under bf16 autocast, on a "cpu" in fp32.

        `logits` is all that is as wide as the vocabulary, with every maskable token masked (the worst case), `masks` are attention
        masks. Two cards share evenly all but these.
        """
        sizes = {**self.fixed(setup, device), **self.peak(setup, device)}
        sizes = {k: v / GIB / (1 if k in ("logits", "masks") else setup.cards) for k, v in sizes.items()}
        return {**sizes, "total": sum(sizes.values())}

    def fixed(self, setup: TrainingSetup, device: str = "cuda") -> dict[str, float]:
        """Bytes of weights, gradients and AdamW's two moments on all cards.

        Full: all fp32. LoRA: a bf16 base on CUDA, fp32 adapters. QLoRA: NF4 linear layers, all else fp32
        (`prepare_model_for_kbit_training`), bf16 adapters and moments (TRL). Paged 8-bit moments: fp32 ones of embeddings.
        """
        total, quantized = self.parameters["total"], sum(self.quantizable)
        trained, size = self.trained(setup), 2 if setup.kind == "qlora" else 4
        base = {"full": 0, "qlora": quantized * NF4_BITS / 8 + (total - quantized) * 4}
        frozen = base.get(setup.kind, total * (2 if device == "cuda" else 4))
        wide = self.parameters["embeddings"] * (setup.kind == "full")
        moments = 2 * (trained - wide) + 8 * wide if setup.optimizer == PAGED else 2 * size * trained
        return {"weights": frozen + size * trained, "gradients": size * trained, "optimizer": moments}

    def trained(self, setup: TrainingSetup) -> int:
        """How many parameters are trained; under LoRA the row of the mask token too."""
        if setup.kind == "full":
            return self.parameters["total"]
        return self.stream + setup.lora_rank * self._adapters_of_rank_one

    @cached_property
    def _adapters_of_rank_one(self) -> int:
        conv = any(isinstance(layer, Conv1D) for layer in self.model.modules())
        lora = LoraConfig(r=1, target_modules="all-linear", fan_in_fan_out=conv)
        with torch.device("meta"):
            model = get_peft_model(copy.deepcopy(self.model), lora)
        return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)

    def _kept(self, setup: TrainingSetup, device: str, span: int, masked: bool) -> tuple[int, int]:
        """Bytes that the blocks keep for their backward pass, a token; and the inner widths of their MLPs."""
        product, _, between, dropout, *_ = _BYTES[device, setup.kind]
        linear = [(attends, m) for attends, m in self.modules if isinstance(m, nn.Linear | Conv1D)]
        sides = [(attends, *m.weight.shape[:: 1 if isinstance(m, Conv1D) else -1]) for attends, m in linear]
        norms = [(attends, m) for attends, m in self.modules if "norm" in type(m).__name__.lower()]
        reads, width = sum(read for _, read, _ in sides), self.layers * self.stream
        queries, keys = (self.layers * n * self.head_dim for n in (self.heads, self.kv_heads))
        # Attention: queries, keys (under a mask transformers repeats them for the kernel), values, result, and its logarithms.
        repeated = queries if masked or self.multi_query else keys
        kept = 2 * (queries + repeated) * product + self.layers * self.heads * (4 + span * self._weight_bytes(device))
        # MLP: its last layer reads what is between. A gate's activation is kept as a factor too; a GELU spelt out with a power is fp32.
        inner = sum(read for attends, read, _ in sides if not attends and read != self.stream)
        written = sum(wrote for attends, read, wrote in sides if not attends and read == self.stream)
        gated = written >= 2 * inner
        spelt_out = not gated and any(type(m).__name__ == "NewGELUActivation" for _, m in self.modules)
        kept += (written + inner * gated) * between + 12 * written * spelt_out
        # Experts, (experts, 2 I, D) and (experts, D, I), of which a token meets a few: what they read, write and compute between.
        chosen = (getattr(self.text, "num_experts_per_tok", None) or 1) if self.experts else 0
        wrote = chosen * sum(p.numel() // len(p) for p in self.experts) // self.stream
        inner, kept = inner + wrote // 3, kept + (wrote + 2 * chosen * width) * between
        # Norms compute in fp32 whatever the type of the weights.
        of_heads = (queries + keys) // (2 * self.layers) * sum(attends for attends, _ in norms)
        kept += 4 * (of_heads + self.stream * sum(not attends for attends, _ in norms))
        if setup.kind != "full":
            # Every adapter keeps what it reads, after a dropout of its own, and what its first half writes.
            return kept + reads * (product + dropout) + len(linear) * setup.lora_rank * product, inner
        # Under autocast every layer casts the fp32 stream anew. The last layer of attention reads what is counted above.
        reads = reads - queries if device == "cuda" else 2 * width + inner
        scaled = self.stream * sum(not attends and not isinstance(m, nn.LayerNorm) for attends, m in norms)
        return kept + (reads + of_heads) * product + 4 * scaled, inner

    def _weight_bytes(self, device: str) -> int:
        """Bytes that are kept of an attention weight: none where a fused kernel runs."""
        eager = self.model.config._attn_implementation == "eager"
        dropout = getattr(self.text, "attention_dropout", 0) or getattr(self.text, "attn_pdrop", 0)
        return 8 if eager else 12 if dropout and device == "cpu" else 4 * self.multi_query

    def peak(self, setup: TrainingSetup, device: str = "cuda") -> dict[str, float]:
        """Bytes of activations, logits and masks at the fullest moment of a micro-batch."""
        product, size, _, _, busy_inner, busy_stream = _BYTES[device, setup.kind]
        full, rerun, halves = setup.kind == "full", setup.gradient_checkpointing, setup.attention != "bidirectional"
        rows, length, stream, layers = setup.batch_size, setup.length, self.stream, self.layers
        parts = [rows] if rows < 3 else [2 * rows // 3, rows - 2 * rows // 3]
        span, masked = length * (2 if halves else 1), rows > 1 or halves
        # Bytes a row: what a block takes in its backward pass; what all blocks keep; with what stands before and after them.
        kept, inner = self._kept(setup, device, span, masked)
        busy = span * ((kept * rerun + busy_inner * inner) // layers + busy_stream * stream)
        kept = span * (stream * size * layers if rerun else kept)
        each = kept + stream * (4 * span + 8 * length)
        # Fused kernels make a float mask of a padding mask, each its own; a mask of blocks is float, cast where the base is fp32.
        shared = self._weight_bytes(device) or halves and (device == "cpu" or setup.kind == "lora")
        mask = masked * span**2 * product * (1 if rerun or shared else layers)
        # Copies of weights: 16-bit ones of trained weights, by autocast; of experts also those to which PEFT adds their adapters.
        cast, experts = full and device == "cuda", sum(p.numel() for p in self.experts)
        copies = 2 * sum(self.quantizable) * cast + product * experts * (cast or not full)
        matrix, tied = 4 * self.text.vocab_size * stream, self.parameters["head"] == 0
        gradients = self.trained(setup) * (2 if setup.kind == "qlora" else 4) - full * matrix * (1 if tied else 2)
        lasting, moments = copies * (not rerun), []
        for index, n in enumerate(parts):
            logits, pieces = self._logits(n * length, setup.kind, device)
            waits = index + 1 < len(parts)
            before = sum(parts[:index]) * each + index * lasting
            moments.append((before + n * each + lasting + copies * (rerun and full), logits))
            before += gradients * waits
            block = before + n * (kept + busy) + (copies // layers if rerun else copies)
            moments.append((block, full * matrix * (tied or len(parts) > 1)))
            if full:  # gradients of the vocabulary meet at head and embeddings: a sum of two is a third matrix
                held, other = waits or pieces > 1, waits and not tied
                head = max(logits + matrix * (held + other), matrix * (3 + other) if held else matrix + logits // 3)
                moments += [(before + n * each + lasting, head), (before, matrix * (3 if tied else 1))]
        activations, wide = max(moments, key=sum)
        weight = 2 * max(self.quantizable, default=0) if setup.kind == "qlora" else 0  # one at a time is 16 bits wide
        return {"activations": activations + weight, "logits": wide, "masks": rows * mask}

    def _logits(self, tokens: int, kind: str, device: str) -> tuple[int, int]:
        """Bytes where the vocabulary is met, with a 16-bit copy of an fp32 matrix; and in how many pieces."""
        vocabulary = self.text.vocab_size
        piece = max(1, (GPU_PIECE if device == "cuda" else PIECE) // vocabulary)
        first, second = min(tokens, piece), min(max(tokens - piece, 0), piece)
        # fp32 tables: three of a piece; where the head is frozen two, and the gradient of the piece before.
        tables = 12 * first if kind == "full" else max(8 * first, 4 * first + 8 * second)
        return vocabulary * (tables + 2 * self.stream * (device == "cuda" and kind != "lora")), -(-tokens // piece)


def count_parameters(model: PreTrainedModel) -> dict[str, int]:
    """Parameters by part; a head tied to the embedding is counted once, as embedding."""
    heads = {id(p) for p in (model.get_output_embeddings() or nn.Module()).parameters()}
    tables = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    counts = dict.fromkeys(("embeddings", "attention", "mlp", "other", "head"), 0)
    for name, parameter in model.named_parameters():
        part = "attention" if in_attention(name) else "mlp" if _MLP_NAMES & {*name.split(".")} else "other"
        part = "embeddings" if id(parameter) in tables else "head" if id(parameter) in heads else part
        counts[part] += parameter.numel()
    return {**counts, "total": sum(counts.values())}


def analyze(name_or_path: str | PreTrainedConfig, *, trust_remote_code: bool = False, **setup: Any) -> Analysis:
    """Counts a causal language model and estimates, from its config alone, what it needs on CUDA.

    Args:
        name_or_path: hub name, folder of a model or adapter, "tiny", or a config.
        setup: fields of `TrainingSetup` but its kind; inference caches one row of `length` tokens.

    Raises:
        UserError: not a decoder-only causal model, or a setting out of range. OSError: there is no such model.
    """
    setup = TrainingSetup(**setup)
    check_settings(setup)
    memory = ModelMemory(load_config(name_or_path, trust_remote_code), trust_remote_code)
    name = name_or_path if isinstance(name_or_path, str) else memory.model.config.model_type
    analysis = _describe(name, memory, setup)
    if analysis.model["softmax_attention"]:
        setups = {kind: replace(setup, kind=kind) for kind in KINDS}
        analysis.training = {kind: memory.training(setups[kind]) for kind in KINDS}
        analysis.cards = [_fit(memory, card, setups[kind]) for kind in KINDS for card in CARDS]
    return analysis


def load_config(config: str | PreTrainedConfig, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The config of a decoder-only causal model, by name or itself. UserError: it is of another kind. OSError: there is none."""
    if not isinstance(config, PreTrainedConfig):
        path = resolve_path(config)
        if is_adapter(path):
            return load_config(adapter_base(path), trust_remote_code)
        config = from_hub(AutoConfig, path, trust_remote_code=trust_remote_code)
    remote = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    encoder = type(config) in transformers.MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False)
    causal = type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING or remote
    if config.is_encoder_decoder or encoder or not causal:
        raise UserError(f"`model`: {config.model_type!r} is not a decoder-only causal LM like Qwen3, Llama or GPT-2.")
    return config


def _describe(name: str, memory: ModelMemory, setup: TrainingSetup) -> Analysis:
    model, text, total = memory.model, memory.text, memory.parameters["total"]
    attending = sum(in_attention(n) and not in_attention(n.rpartition(".")[0]) for n, _ in model.named_modules())
    recurrent = recurrent_layers(model)
    softmax = bool(memory.heads) and not recurrent and attending >= memory.layers  # a vision tower has its own
    linear = sum(memory.quantizable)
    sizes = {"fp32": (4, 4), "bf16": (2, 2), "int8": (1, 2), "nf4": (NF4_BITS / 8, 2)}  # linear layers, all else
    weights = {kind: (linear * a + (total - linear) * b) / GIB for kind, (a, b) in sizes.items()}
    cache = 2 * 2 * memory.layers * memory.kv_heads * memory.head_dim * setup.length / GIB if softmax else 0.0
    sliding = "sliding_attention" in (getattr(text, "layer_types", None) or ["sliding_attention"])
    window = getattr(text, "sliding_window", None) if sliding else None
    facts = {
        "architecture": type(model).__name__,
        **{name: getattr(memory, name) or None for name in ("layers", "heads", "kv_heads", "head_dim")},
        "hidden_size": text.hidden_size,
        "vocabulary": text.vocab_size,
        "context_length": getattr(text, "max_position_embeddings", None),
        "sliding_window": window,
        "softmax_attention": softmax,
    }
    notes = {
        f"sliding window of {window} tokens: conversion widens it to the whole context": window,
        f"{', '.join(recurrent)} run from left to right; blocks, packing and annealing are refused": recurrent,
        "not every layer is softmax attention: no estimate of training, which takes layers to be alike": not softmax,
    }
    shown = {key: value for key, value in asdict(setup).items() if key not in ("kind", "optimizer", "cards")}
    inference = {"kv_cache": cache, **{kind: weights[kind] + cache for kind in ("bf16", "int8", "nf4")}}
    return Analysis(name, facts, memory.parameters, weights, inference, shown, [n for n, so in notes.items() if so])


def _fit(memory: ModelMemory, card: str, setup: TrainingSetup) -> dict[str, Any]:
    def needed(setup: TrainingSetup) -> float:
        return memory.training(setup)["total"] * FRAGMENTATION + CUDA_CONTEXT_GIB

    gib, total = CARDS[card], needed(setup)
    sizes = ((changes, needed(changed)) for changes, changed in _changes(setup))
    changes, changed = next(((changes, size) for changes, size in sizes if size <= gib), ([], None))
    fit = {"card": card, "gib": gib, "kind": setup.kind, "total": total, "fits": total <= gib, "changes": changes}
    return {**fit, "total_changed": changed if changes else None}


def _changes(setup: TrainingSetup) -> Iterator[tuple[list[str], TrainingSetup]]:
    """What to try, in order; under each start checkpointing, then a smaller batch, then shorter rows."""
    starts = [([], setup)]
    if setup.kind == "lora":
        starts.append((["use_qlora: true"], replace(setup, kind="qlora")))
    starts.append(([*starts[-1][0], f"optim: {PAGED}"], replace(starts[-1][1], optimizer=PAGED)))
    starts.append(([*starts[-1][0], "two such cards by device_map"], replace(starts[-1][1], cards=2)))
    for changes, changed in starts:
        yield changes, changed
        if not setup.gradient_checkpointing:
            changes, changed = [*changes, "gradient_checkpointing: true"], replace(changed, gradient_checkpointing=True)
            yield changes, changed
        fewer = changes
        for rows in (setup.batch_size >> halvings for halvings in range(1, setup.batch_size.bit_length())):
            fewer = [*changes, f"batch_size: {rows} and {-(-setup.batch_size // rows)} x accumulation"]
            yield fewer, replace(changed, batch_size=rows)
        for length in (length for length in (512, 256) if length < setup.length):
            yield [*fewer, f"max_length: {length}"], replace(changed, batch_size=1, length=length)


def analysis_tables(analysis: Analysis) -> list[Table]:
    """Tables of the model, parameters, weights and, where there are figures, of training by kind and of the cards."""
    words = {"None": "-", "True": "yes", "False": "no"}
    facts = [(key.replace("_", " "), words.get(str(value), str(value))) for key, value in analysis.model.items()]
    counts = [(k, f"{n:,}", f"{100 * n / analysis.parameters['total']:.1f}") for k, n in analysis.parameters.items()]
    running = {k: f"{v:.2f}" for k, v in analysis.inference.items()}
    weights = [(k, f"{v:.2f}", running.get(k, "-")) for k, v in analysis.weights.items()]
    tables = [
        _table("Model", ["name", analysis.name], facts, "\n".join(analysis.notes)),
        _table("Parameters", ["part", "count", "%"], counts),
        _table("Weights, GiB", ["type", "alone", f"with KV cache of {analysis.setup['length']:,} tokens"], weights),
    ]
    if analysis.cards:
        setup = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in analysis.setup.items())
        parts = [(kind, *(f"{size:.2f}" for size in analysis.training[kind].values())) for kind in KINDS]
        columns = ["kind", *analysis.training["lora"]]
        tables.append(_table("Training on CUDA, GiB", columns, parts, f"{setup}\n{ASSUMPTIONS}"))
        verdicts = {}
        for fit in analysis.cards:
            helping = f"; {fit['total_changed']:.1f} with" if fit["changes"] else ""
            verdict = f"{fit['total']:.1f} {'fits' if fit['fits'] else 'does not fit'}{helping}"
            verdicts[fit["card"], fit["kind"]] = "\n".join([verdict, *fit["changes"]])
        cards = [(f"{card}, {gib}", *(verdicts[card, kind] for kind in KINDS)) for card, gib in CARDS.items()]
        reserve = f"with {CUDA_CONTEXT_GIB:g} GiB for the CUDA context and {FRAGMENTATION - 1:.0%} for fragmentation"
        tables.append(_table("Cards, GiB", ["card", *KINDS], cards, reserve))
    return tables


def _table(title: str, columns: list[str], rows: list[tuple[str, ...]], caption: str = "") -> Table:
    lines = any("\n" in cell for row in rows for cell in row)
    heads = (Column(name, justify="left" if lines else "right") for name in columns[1:])
    table = Table(columns[0], *heads, title=title, caption=caption, caption_justify="left", show_lines=lines)
    for row in rows:
        table.add_row(*row)
    return table
