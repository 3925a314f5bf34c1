"""What a model is made of, what it needs in memory, and which cards train it: `llm-diffusion analyze`.

Everything comes from the config; weights are never loaded. To be counted, the model is built on the meta device; what training
needs is traced, see `memory`.
Trade-off: what does not fit is answered with the first changes that help, in a fixed order. Alternative: a search over all settings,
whose answer nobody could foresee.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import transformers
from rich.table import Table
from transformers import AutoConfig, PreTrainedConfig

from . import UserError
from .models.attention import in_attention
from .models.checkpoints import (
    adapter_base,
    from_hub,
    is_adapter,
    resolve_path,
)
from .models.memory import (
    GIB,
    KINDS,
    NF4_BITS,
    PAGED,
    ModelMemory,
    TrainingSetup,
)
from .models.probing import recurrent_layers

CARDS = {"RTX 4080": 16, "RTX A4500": 20, "RTX 3090/4090": 24, "RTX A6000": 48, "A100/H100": 80}  # GiB
CUDA_CONTEXT_GIB = 1.0  # driver, kernels, cuBLAS workspaces
FRAGMENTATION = 1.05  # what the caching allocator cannot reuse
SHORTER_LENGTHS = (512, 256)
ASSUMPTIONS = (
    "lora: bf16 base, fp32 adapters on all linear layers; qlora: NF4 linear layers, all else fp32, bf16 adapters; full: fp32 "
    "weights, gradients and moments under bf16 autocast; every token masked, gradients accumulated"
)


@dataclass
class CardFit:
    """Whether a kind of training fits a card, in GiB with the reserve; if not, the first changes that make it fit, if any."""

    card: str
    gib: int
    kind: str
    total: float
    fits: bool
    changes: list[str] = field(default_factory=list)
    total_changed: float | None = None


@dataclass
class Analysis:
    """What `analyze` found: facts of the model, parameters by part, GiB of weights and of inference by type of weight.

    `training`: by kind, the GiB of `ModelMemory.training`; empty, as `cards`, where there is no estimate (`notes` says why).
    """

    name: str
    model: dict[str, Any]
    parameters: dict[str, int]
    weights: dict[str, float]
    inference: dict[str, float]
    setup: dict[str, Any]
    training: dict[str, dict[str, float]] = field(default_factory=dict)
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
    """Counts a causal language model and estimates, from its config alone, what it needs on CUDA.

    Args:
        name_or_path: hub name, folder of a model or adapter, "tiny", or a config.
        batch_size, length: rows of a micro-batch and tokens of a row; inference caches one row of `length` tokens.
        attention: "bidirectional", or "block": noisy and clean halves, 2 x `length` tokens.

    Raises:
        ValueError: not a decoder-only causal model, or a setting out of range.
        OSError: there is no such model.
    """
    setup = TrainingSetup("lora", batch_size, length, lora_rank, attention, gradient_checkpointing)
    for key, least in (("batch_size", 1), ("length", 2), ("lora_rank", 1)):
        if getattr(setup, key) < least:
            raise UserError(f"`{key}` must be at least {least}, got {getattr(setup, key)}.")
    if attention not in ("bidirectional", "block"):
        raise UserError(f"`attention` must be 'bidirectional' or 'block', got {attention!r}.")
    memory = ModelMemory(load_config(name_or_path, trust_remote_code), trust_remote_code)
    analysis = _describe(memory, setup)
    if isinstance(name_or_path, str):
        analysis.name = name_or_path
    if not analysis.model["softmax_attention"]:
        return analysis
    try:
        analysis.training = {kind: memory.training(replace(setup, kind=kind)) for kind in KINDS}
    except Exception as error:  # remote code may fail in any way on tensors without data; the counts hold all the same
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        analysis.notes.append(f"no estimate of training: a step fails on tensors without data ({reason})")
        return analysis
    analysis.cards = [_fit(memory, card, replace(setup, kind=kind)) for kind in KINDS for card in CARDS]
    return analysis


def load_config(name_or_path: str | PreTrainedConfig, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The config of a decoder-only causal model. ValueError: it is of another kind. OSError: there is none."""
    config = name_or_path
    if not isinstance(config, PreTrainedConfig):
        path = resolve_path(name_or_path)
        if is_adapter(path):
            return load_config(adapter_base(path), trust_remote_code)
        config = from_hub(AutoConfig, path, trust_remote_code=trust_remote_code)
    remote = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    found = None
    if config.is_encoder_decoder:
        found = "is an encoder-decoder"
    elif type(config) in transformers.MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False):
        found = "is an encoder"
    elif type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING and not remote:
        found = "has no causal language model"
    if found:
        advice = "give a decoder-only causal LM, for example Qwen3, Llama or GPT-2"
        raise UserError(f"`model`: {config.model_type!r} {found}; {advice}.")
    return config


def _describe(memory: ModelMemory, setup: TrainingSetup) -> Analysis:
    text, total = memory.text, memory.parameters["total"]
    heads = getattr(text, "num_attention_heads", None)
    head_dim = getattr(text, "head_dim", None) or (text.hidden_size // heads if heads else None)
    kv_heads = getattr(text, "num_key_value_heads", None) or getattr(text, "num_kv_heads", None) or heads
    if getattr(text, "multi_query", False) and not getattr(text, "new_decoder_architecture", False):
        kv_heads = 1  # Falcon-7B
    window = getattr(text, "sliding_window", None)
    if "sliding_attention" not in (getattr(text, "layer_types", None) or ["sliding_attention"]):
        window = None
    names = [name for name, _ in memory.model.named_modules()]
    attending = [name for name in names if in_attention(name) and not in_attention(name.rpartition(".")[0])]
    recurrent = recurrent_layers(memory.model)
    softmax = heads is not None and not recurrent and len(attending) >= memory.layers  # a vision tower has its own
    linear = sum(memory.quantizable)
    sizes = {
        "fp32": (4, 4),
        "bf16": (2, 2),
        "int8": (1, 2),
        "nf4": (NF4_BITS / 8, 2),
    }  # of quantizable layers, of all else
    weights = {k: (linear * a + (total - linear) * b) / GIB for k, (a, b) in sizes.items()}
    cache = 2 * 2 * memory.layers * kv_heads * head_dim * setup.length / GIB if softmax else 0.0
    facts = {
        "architecture": type(memory.model).__name__,
        "layers": memory.layers,
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "hidden_size": text.hidden_size,
        "vocabulary": text.vocab_size,
        "context_length": getattr(text, "max_position_embeddings", None),
        "sliding_window": window,
        "softmax_attention": softmax,
    }
    shown = {k: v for k, v in asdict(setup).items() if k not in ("kind", "optimizer", "cards")}
    inference = {"kv_cache": cache, **{kind: weights[kind] + cache for kind in ("bf16", "int8", "nf4")}}
    notes = [f"sliding window of {window} tokens: conversion widens it to the whole context"] if window else []
    if recurrent:
        notes.append(
            f"{', '.join(recurrent)} run from left to right, converted or not: blocks, packing and annealing are refused, and so is a "
            "model of nothing else"
        )
    if not softmax:
        notes.append("not every layer is softmax attention: no estimate of training, which takes layers to be alike")
    return Analysis(memory.config.model_type, facts, memory.parameters, weights, inference, shown, notes=notes)


def _fit(memory: ModelMemory, card: str, setup: TrainingSetup) -> CardFit:
    def needed(tried: TrainingSetup) -> float:
        return memory.training(tried)["total"] * FRAGMENTATION + CUDA_CONTEXT_GIB

    fit = CardFit(card, CARDS[card], setup.kind, needed(setup), needed(setup) <= CARDS[card])
    for changes, tried in [] if fit.fits else _changes(setup):
        # No trace where weights alone are too much.
        if sum(memory.fixed(tried).values()) / tried.cards / GIB < fit.gib and needed(tried) <= fit.gib:
            fit.changes, fit.total_changed = changes, needed(tried)
            break
    return fit


def _changes(setup: TrainingSetup) -> Iterator[tuple[list[str], TrainingSetup]]:
    """What to try, in order: checkpointing, a smaller batch, shorter rows; then the same with QLoRA, with an 8-bit paged
    optimiser too, and on two cards too."""
    ways = [([], setup)]
    if setup.kind == "lora":
        ways.append((["use_qlora: true"], replace(setup, kind="qlora")))
    ways.append(([*ways[-1][0], f"optim: {PAGED}"], replace(ways[-1][1], optimizer=PAGED)))
    ways.append(([*ways[-1][0], "two such cards by device_map"], replace(ways[-1][1], cards=2)))
    for told, tried in ways:
        yield told, tried
        if not setup.gradient_checkpointing:
            told, tried = [*told, "gradient_checkpointing: true"], replace(tried, gradient_checkpointing=True)
            yield told, tried
        rows, fewer = setup.batch_size, told
        while rows > 1:
            rows //= 2
            fewer = [*told, f"batch_size: {rows} and {-(-setup.batch_size // rows)} x accumulation"]
            yield fewer, replace(tried, batch_size=rows)
        for length in (length for length in SHORTER_LENGTHS if length < setup.length):
            yield [*fewer, f"max_length: {length}"], replace(tried, batch_size=1, length=length)


def analysis_tables(analysis: Analysis) -> list[Table]:
    """Tables of the model, parameters, weights and, where there are figures, of training by kind and of the cards."""
    shown = {
        k: "-" if v is None else ("no", "yes")[v] if isinstance(v, bool) else str(v) for k, v in analysis.model.items()
    }
    facts = [(key.replace("_", " "), value) for key, value in shown.items()]
    counts = [(k, f"{n:,}", f"{100 * n / analysis.parameters['total']:.1f}") for k, n in analysis.parameters.items()]
    running = {k: f"{v:.2f}" for k, v in analysis.inference.items()}
    weights = [(k, f"{v:.2f}", running.get(k, "-")) for k, v in analysis.weights.items()]
    cache = f"with KV cache of {analysis.setup['length']:,} tokens"
    tables = [
        _table("Model", ["name", analysis.name], facts, "\n".join(analysis.notes)),
        _table("Parameters", ["part", "count", "%"], counts),
        _table("Weights, GiB", ["type", "alone", cache], weights),
    ]
    if not analysis.cards:
        return tables
    setup = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in analysis.setup.items())
    parts = [(kind, *(f"{size:.2f}" for size in analysis.training[kind].values())) for kind in KINDS]
    tables.append(
        _table("Training on CUDA, GiB", ["kind", *analysis.training["lora"]], parts, f"{setup}\n{ASSUMPTIONS}")
    )
    verdicts = {(fit.card, fit.kind): _verdict(fit) for fit in analysis.cards}
    cards = [(f"{card}, {gib}", *(verdicts[card, kind] for kind in KINDS)) for card, gib in CARDS.items()]
    reserve = (
        f"with {CUDA_CONTEXT_GIB:g} GiB for the CUDA context and {100 * FRAGMENTATION - 100:.0f} % for fragmentation"
    )
    return [*tables, _table("Cards, GiB", ["card", *KINDS], cards, reserve)]


def _verdict(fit: CardFit) -> str:
    if fit.total_changed is None:
        return f"{fit.total:.1f} {'fits' if fit.fits else 'does not fit'}"
    return "\n".join([f"{fit.total:.1f} does not fit; {fit.total_changed:.1f} with", *fit.changes])


def _table(title: str, columns: list[str], rows: list[tuple[str, ...]], caption: str = "") -> Table:
    table = Table(
        title=title,
        caption=caption,
        caption_justify="left",
        show_lines=any("\n" in cell for row in rows for cell in row),
    )
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index and not table.show_lines else "left")
    for row in rows:
        table.add_row(*row)
    return table
