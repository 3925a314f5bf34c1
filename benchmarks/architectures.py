"""Architecture sweep: every causal LM class of the installed transformers, tiny and random, through the whole conversion.

Purpose: "any AutoModelForCausalLM" is a claim about some 180 classes, so it is measured on all of them: built from their own
config, probed, patched, verified by means other than the library's probe, decoded, trained for a step, saved, reloaded.
The one number that must be zero is "silently causal": patched with success, and yet some token is not seen by an earlier one.
Trade-off: tiny random weights prove who attends to whom, not quality; windows are four tokens long and the text twelve, so that a
window that was left in place is seen. Encoders stay as their config makes them, that is, bidirectional.
Alternative: a handful of hand-picked real checkpoints, which would say nothing of the rest.

    python benchmarks/architectures.py                              # all, into benchmarks/results/architectures.md
    python benchmarks/architectures.py --only LlamaForCausalLM,mpt  # by class or model type
    python benchmarks/architectures.py --list
"""

from __future__ import annotations

import argparse
import inspect
import json
import multiprocessing
import os
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import peft
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from llm_diffusion.models import attention
from llm_diffusion.models.checkpoints import TINY_MODEL_PATH
from llm_diffusion.models.conversion import convert_to_diffusion
from llm_diffusion.models.loading import load_diffusion_model
from llm_diffusion.objective.attention_masks import additive

KERNELS = ("sdpa", "eager")
VOCAB, STD = 512, 0.2
LENGTH, PADDING = 12, 3  # three times the window
BLOCK_LENGTH = 4
SPECIAL = r".*\b(router|gate|out_proj|conv1d)\b.*"
TOLERANCE = 1e-4  # of the largest logit: experts are run in groups, so that equal rows may differ by rounding

# -- tiny configs

_BY_SIZE = {
    VOCAB: "vocab_size n_words n_token vocab_size_per_layer_input unpadded_vocab_size encoder_hash_byte_group_vocab",
    # Top-k sparse attention must keep every key of a short text, else it is not comparable with dense attention.
    128: "max_position_embeddings n_positions model_max_length max_seq_len context_length max_target_positions n_ctx "
    "max_source_positions original_max_position_embeddings rel_extent index_topk pronunciation_vocab_size "
    "shape_vocab_size",
    64: "intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim dim_ff dff ffn_hidden_size d_inner feed_forward_size "
    "intermediate_size_mlp dense_intermediate_size mamba_d_ssm indexer_budget",
    32: "hidden_size d_model n_embd emb_dim embedding_size embedding_dim attention_hidden_size moe_intermediate_size "
    "shared_expert_intermediate_size shared_experts_intermediate_size shared_intermediate_size expert_ffn_hidden_size "
    "moe_shared_expert_intermediate_size word_embed_proj_dim lru_width input_embedding_size output_embedding_size "
    "router_hidden_size dim_model_base hc_lowrank pronunciation_embed_dim shape_embed_dim backbone_hidden_size",
    16: "qk_head_dim mamba_headdim mamba_d_head mamba_head_dim q_lora_rank kv_lora_rank o_lora_rank laurel_rank "
    "hidden_size_per_layer_input mamba_d_state state_size ssm_state_size time_step_rank mamba_dt_rank ple_embed_dim",
    8: "head_dim v_head_dim qk_nope_head_dim qk_rope_head_dim swa_head_dim swa_v_head_dim kv_channels "
    "attention_head_size d_head dim_head global_head_dim index_head_dim indexer_head_dim linear_head_dim "
    "linear_key_head_dim linear_value_head_dim attention_head_dim chunk_size mamba_chunk_size d_rel max_window_layers "
    "gated_norm_rank adapter_rank",
    4: "num_attention_heads n_head n_heads num_heads attention_heads encoder_attention_heads decoder_attention_heads "
    "num_encoder_attention_heads num_decoder_attention_heads rotary_dim linear_num_heads linear_num_value_heads "
    "swa_num_attention_heads index_n_heads indexer_n_heads mamba_n_heads mamba_num_heads n_mamba_heads num_experts "
    "num_local_experts n_routed_experts moe_num_experts sliding_window sliding_window_size window_size "
    "attention_window_size local_attention attention_chunk_size",
    2: "num_key_value_heads num_kv_heads swa_num_key_value_heads linear_num_key_heads num_experts_per_tok "
    "num_experts_per_token moe_topk moe_k num_global_key_value_heads num_query_groups hc_count hc_mult zero_expert_num "
    "o_groups indexer_compress_ratio",
    1: "n_group topk_group num_expert_group n_groups mamba_ngroups num_shared_experts n_shared_experts indexer_kv_heads "
    "moe_num_shared_experts num_dense_layers first_k_dense_replace pretraining_tp num_codebooks",
    0: "num_nextn_predict_layers num_mtp_layers num_kv_shared_layers",
}
SIZES = {name: size for size, names in _BY_SIZE.items() for name in names.split()}
LAYER_COUNTS = (
    "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_encoder_layers num_decoder_layers "
    "num_blocks"
).split()
# Unset by default, though the model cannot do without; other unset sizes mean that a part is absent.
REQUIRED = (
    "head_dim n_shared_experts num_key_value_heads n_routed_experts num_experts_per_tok indexer_n_heads indexer_kv_heads "
    "indexer_head_dim indexer_budget indexer_compress_ratio"
).split()
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_BROAD = {"attention_hidden_size": 64, "attention_head_dim": 16, "num_key_value_heads": 4}  # attention of doubled width
OVERRIDES: dict[str, dict[str, Any]] = {
    "BambaForCausalLM": {"attn_layer_indices": [1]},
    "CohereCompassForCausalLM": {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}},
    "DbrxForCausalLM": {
        "attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": 32},
    },
    "Dots3NoteForCausalLM": {
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 16,
        "swa_kv_lora_rank": 16,
        "swa_head_dim": 16,
        "swa_qk_nope_head_dim": 8,
        "swa_v_head_dim": 8,
    },
    "GraniteMoeHybridForCausalLM": {"layer_types": ["linear_attention", "full_attention"]},
    "JambaForCausalLM": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "Lfm2ForCausalLM": {"layer_types": ["conv", "full_attention"]},
    "Lfm2MoeForCausalLM": {"layer_types": ["conv", "full_attention"]},
    "Mamba2ForCausalLM": {"head_dim": 16},
    "RecurrentGemmaForCausalLM": {"block_types": ["recurrent", "attention"]},
    "ReformerModelWithLMHead": {
        "is_decoder": True,
        "axial_pos_shape": [8, 16],
        "axial_pos_embds_dim": [16, 16],
        "local_attn_chunk_length": 4,
        "lsh_attn_chunk_length": 4,
        "num_buckets": 2,
    },
    "XmodForCausalLM": {"default_language": "en_XX"},
    "ZambaForCausalLM": {
        **_BROAD,
        "num_hidden_layers": 3,
        "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
    },
    "Zamba2ForCausalLM": {**_BROAD, "num_query_groups": 4},
    "ZayaForCausalLM": {"num_experts_per_tok": 1},
}


def _layer_lists(given: dict[str, Any]) -> tuple[int, dict[str, list[str]]]:
    """One layer of each kind the config knows (at least two): how many layers, and the lists that say what each is."""
    count = next((given[name] for name in LAYER_COUNTS if isinstance(given.get(name), int)), None)
    lists = {
        name: list(dict.fromkeys(value))
        for name, value in given.items()
        if isinstance(value, list) and value and len(value) == count and isinstance(value[0], str)
    }
    layers = max([2, *map(len, lists.values())])
    return layers, {name: (kinds * layers)[:layers] for name, kinds in lists.items()}


def tiny_config(config_class: type[PreTrainedConfig], **overrides: Any) -> PreTrainedConfig:
    """The class's default config with every size that `SIZES` knows, by the config's own name for it, made small."""
    given = config_class().to_dict()
    aliases = {own: generic for generic, own in config_class.attribute_map.items()}
    layers, values = _layer_lists(given)
    latent = "kv_lora_rank" in given or "qk_rope_head_dim" in given  # every head has its own keys then
    for name, value in given.items():
        size = SIZES.get(name, SIZES.get(aliases.get(name, "")))
        if name in values or (value is None and name not in REQUIRED):
            continue
        if name in config_class.sub_configs:
            part = type(getattr(config_class(), name))
            values[name] = {**tiny_config(part).to_dict(), **overrides.pop(name, {})}
        elif name in LAYER_COUNTS:
            values[name] = layers
        elif name == "num_key_value_heads" and latent:
            values[name] = SIZES["num_attention_heads"]
        elif size is not None:
            values[name] = size
        elif re.search("drop|jitter", name) and isinstance(value, float):
            values[name] = 0.0  # two forwards must agree
        elif name.endswith(("token_id", "_index")) and isinstance(value, int) and value >= VOCAB:
            values[name] = 3
        elif name in ("initializer_range", "init_std"):
            values[name] = STD
    return config_class(**{**values, **TOKENS, **overrides})


def class_of(name: str) -> type[PreTrainedModel]:
    """The causal LM class of a class name ("LlamaForCausalLM") or a model type ("llama")."""
    return getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(name, name))


def class_names() -> list[str]:
    return sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()))


def tiny_model(name: str, attn_implementation: str = "sdpa", seed: int = 0) -> PreTrainedModel:
    """A tiny random model of a class name or a model type, in evaluation mode; the same seed gives the same weights.

    Weights are wide (standard deviation 0.2), so that every token visibly moves every position that sees it.
    """
    model_class = class_of(name)
    config = tiny_config(model_class.config_class, **OVERRIDES.get(model_class.__name__, {}))
    torch.manual_seed(seed)
    model = model_class._from_config(config, attn_implementation=attn_implementation)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in sorted(model.named_parameters()):
            # Decay rates and norms keep their own initialisation; experts are often left uninitialised.
            if (parameter.dim() >= 2 and not key.endswith("A_log")) or not parameter.isfinite().all():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * STD)
        for module in model.modules():
            if isinstance(module, torch.nn.Embedding) and module.padding_idx is not None:
                module.weight[module.padding_idx] = 0  # as some architectures set it again when they are loaded
    return model.eval()


# -- what kind of model it is

RECURRENT = re.compile(
    "Mamba|Rwkv|SSM|Rglru|RgLru|RecurrentBlock|DeltaNet|GatedDelta|DeltaAttention|LinearAttention|Lightning|ShortConv|"
    "xLSTM|mLSTM|KDA"
)
RECURRENT_LAYERS = {"linear_attention", "mamba", "conv", "recurrent", "mamba2", "hybrid"}


def kind_of(model: PreTrainedModel) -> str:
    """From the module tree, the config's layer types and, for encoders, from how the plain model attends."""
    prefix = type(model).__name__.removesuffix("ForCausalLM")  # or else all of KimiLinear's attention would be linear
    text = [m for path, m in model.named_modules() if not re.search("audio|vision|image", path)]
    names = {type(module).__name__ for module in text if module is not model}
    config = model.config.get_text_config()
    layers = set(getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or ())
    depthwise = any(isinstance(m, torch.nn.Conv1d) and m.groups == m.in_channels > 1 for m in text)
    recurrent = {name for name in names if RECURRENT.search(prefix) or RECURRENT.search(name.removeprefix(prefix))}
    if recurrent or depthwise or layers & RECURRENT_LAYERS:
        return "hybrid" if any("Attention" in name for name in names - recurrent) else "recurrent"
    if not isinstance(model.get_input_embeddings(), torch.nn.Embedding):
        return "no token embedding"
    return "encoder" if bool(_dependence(model, "none").all()) else "decoder"


# -- verification that shares no code with the library's probe


def _text(padding: str) -> tuple[torch.Tensor, torch.Tensor, slice]:
    """(1, n) ids and mask, and where the text stands in them."""
    ids = torch.randint(3, VOCAB // 2, (1, LENGTH), generator=torch.Generator().manual_seed(1))
    left, right = (PADDING if padding == side else 0 for side in ("left", "right"))
    mask = torch.nn.functional.pad(torch.ones_like(ids), (left, right))
    return torch.nn.functional.pad(ids, (left, right)), mask, slice(left, left + LENGTH)


@torch.no_grad()
def _logits(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor, mask4d: bool = False) -> torch.Tensor:
    inputs = {"input_ids": ids}
    if bool((mask == 0).any()) or mask4d:
        if "position_ids" in inspect.signature(model.forward).parameters:
            inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0).expand_as(ids)
        full = mask[:, None, :].bool().expand(-1, mask.shape[1], -1)
        inputs["attention_mask"] = (additive(full, model.dtype) if mask4d else mask).expand(
            ids.shape[0], *[-1] * (3 if mask4d else 1)
        )
    return model(**inputs, use_cache=False).logits.float()


def _dependence(model: PreTrainedModel, padding: str, mask4d: bool = False) -> torch.Tensor:
    """(LENGTH, LENGTH) bool: [i, j] = the output at i moves when token j is replaced."""
    ids, mask, text = _text(padding)
    start = text.start
    rows = ids.repeat(LENGTH + 1, 1)
    for j in range(LENGTH):
        rows[j + 1, start + j] += VOCAB // 2
    logits = _logits(model, rows, mask, mask4d)[:, text]
    return ((logits[1:] - logits[:1]).abs().amax(-1) > 1e-5 * logits.abs().max()).T


def _layers_of(model: PreTrainedModel) -> list[torch.nn.Module]:
    """The decoder's layers: the largest list of modules outside of other modalities' towers."""
    lists = [
        list(module)
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList) and not re.search("audio|vision|image|expert", path)
    ]
    depth = model.config.get_text_config().num_hidden_layers
    named = [layer for layers in lists for layer in layers if re.search("Layer|Block", type(layer).__name__)]
    return next((layers for layers in lists if len(layers) == depth), named)


@torch.no_grad()
def _causal_layers(model: PreTrainedModel, padding: str) -> list[int]:
    """The layers in which the first token does not see the last: one of them hides behind any other that does.

    Of two equal rows the second one's last hidden state is changed on the way into each layer, and changed back behind it.
    """
    ids, mask, text = _text(padding)
    first, last, causal = text.start, text.stop - 1, []

    def row(hidden: torch.Tensor, index: int) -> torch.Tensor:
        return (
            hidden[index] if hidden.shape[0] == 2 else hidden[:, index].movedim(0, 1)
        )  # parallel streams may come first

    def disturb(_: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        hidden = (args[0] if args else kwargs["hidden_states"]).clone()
        row(hidden, 1)[last] += torch.linspace(-3, 3, hidden.shape[-1])
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

    def compare(index: int) -> Callable[..., Any]:
        def hook(_: torch.nn.Module, __: tuple, output: Any) -> Any:
            several = isinstance(output, tuple | list)
            hidden = (output[0] if several else output).clone()
            same, moved = row(hidden, 0)[first], row(hidden, 1)[first]
            if (same - moved).abs().max() <= 1e-6 * same.abs().max():
                causal.append(index)
            row(hidden, 1).copy_(row(hidden, 0))
            return type(output)([hidden, *output[1:]]) if several else hidden

        return hook

    hooks = [layer.register_forward_pre_hook(disturb, with_kwargs=True) for layer in _layers_of(model)]
    hooks += [layer.register_forward_hook(compare(i)) for i, layer in enumerate(_layers_of(model))]
    try:
        _logits(model, ids.repeat(2, 1), mask)
    finally:
        for hook in hooks:
            hook.remove()
    return causal


def _sees_padding(model: PreTrainedModel, padding: str) -> bool:
    """Whether the content of padding moves a real token's output."""
    ids, mask, text = _text(padding)
    other = torch.where(mask.bool(), ids, torch.full_like(ids, 77))
    logits = _logits(model, torch.cat([ids, other]), mask)[:, text]
    return bool((logits[0] - logits[1]).abs().max() > TOLERANCE * logits.abs().max())


def _shifts_with_padding(model: PreTrainedModel, padding: str) -> bool:
    """Whether a padded text has other outputs than the same text alone; masks are often built by another road then."""
    ids, mask, text = _text(padding)
    alone, padded = _logits(model, *_text("none")[:2]), _logits(model, ids, mask)[:, text]
    return bool((alone - padded).abs().max() > TOLERANCE * alone.abs().max())


def _against_full_mask(model: PreTrainedModel, plain: PreTrainedModel, kind: str) -> str:
    """Patched logits against those of an unpatched copy that is handed an explicit full 4-D mask.

    Recurrent layers learn of padding from a 2-D mask alone, so models with them are compared without padding.
    """
    worst = 0.0
    for padding in ("none", "left", "right") if kind == "decoder" else ("none",):
        ids, mask, text = _text(padding)
        try:
            want = _logits(plain, ids, mask, mask4d=True)[:, text]
            follows = bool(_dependence(plain, padding, mask4d=True).all())
        except Exception as error:  # rejected in as many ways as there are architectures
            return f"n/a (rejected: {_first_line(error)})"
        if not follows:
            return "n/a (unpatched model ignores 4-D masks)"
        got = _logits(model, ids, mask)[:, text]
        worst = max(worst, float((got - want).abs().max() / want.abs().max()))
    return "equal" if worst < TOLERANCE else f"differs ({worst:.1e})"


def _look_at_layers(found: dict[str, Any], model: PreTrainedModel, kind: str) -> None:
    """Notes the layers that stay causal: a problem of a decoder, the nature of a hybrid model."""
    try:
        depth, causal = len(_layers_of(model)), {p: _causal_layers(model, p) for p in ("none", "left", "right")}
    except Exception as error:
        causal, depth = {}, 0
        found["problems"].append(f"layers cannot be looked at: {_first_line(error)}")
    found["causal layers"] = f"{max(map(len, causal.values()))} of {depth}" if depth else "n/a"
    for padding, layers in causal.items():
        if layers and kind == "decoder":
            found["problems"].append(f"partly causal: layers {layers} of {depth}, padding {padding}")


def verify(model: PreTrainedModel, plain: PreTrainedModel, kind: str) -> dict[str, Any]:
    """What a patched model does, by its own logits: nothing here asks the library."""
    found: dict[str, Any] = {"problems": []}
    for padding in ("none", "left", "right"):
        pattern = _dependence(model, padding)
        if not pattern.all():
            missing = [f"{i}<-{j}" for i, j in (~pattern).nonzero()[:3].tolist()]
            found["problems"].append(
                f"silently causal, padding {padding}: {(~pattern).sum()} unseen ({', '.join(missing)} …)"
            )
        if padding != "none" and _sees_padding(model, padding):
            before = ", as before the patch" if _sees_padding(plain, padding) else ""
            found["problems"].append(f"padding on the {padding} is seen{before}")
        if padding != "none" and _shifts_with_padding(model, padding) and not _shifts_with_padding(plain, padding):
            found["problems"].append(
                f"partly causal: padding on the {padding} changes the outputs, unlike before the patch"
            )
    _look_at_layers(found, model, kind)
    found["full mask"] = _against_full_mask(model, plain, kind)
    return found


# -- the life of a converted model


def _expect(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(message)


def _generates(model: PreTrainedModel, mask_id: int) -> str:
    prompts = torch.randint(3, VOCAB // 2, (2, 6), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(prompts)
    mask[0, :2] = 0
    sequences = model.generate(prompts, attention_mask=mask, max_new_tokens=8, steps=4, eos_token_id=None)
    _expect(sequences.shape == (2, 14), f"shape {tuple(sequences.shape)}")
    _expect(not bool((sequences == mask_id).any()), "masks are left")
    return "yes"


def _lora_gradients(model: torch.nn.Module, mask_id: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, VOCAB // 2, (2, LENGTH), generator=torch.Generator().manual_seed(3))
    noisy = torch.where(torch.arange(LENGTH) % 3 == 1, mask_id, ids)
    logits = model(input_ids=noisy, attention_mask=torch.ones_like(ids), use_cache=False).logits[:, :-1]
    scored = (noisy == mask_id)[:, 1:]
    model.zero_grad()
    torch.nn.functional.cross_entropy(logits[scored].float(), ids[:, 1:][scored]).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def _lora_step(model: PreTrainedModel, mask_id: int, exclude: str | None = None) -> tuple[str, torch.nn.Module]:
    """One step of a LoRA with a trainable mask token, with and without gradient checkpointing."""
    torch.manual_seed(0)
    config = LoraConfig(
        r=4,
        target_modules="all-linear",
        exclude_modules=exclude,
        trainable_token_indices=[mask_id],
        task_type="CAUSAL_LM",
    )
    ids, mask, _ = _text("none")
    before = _logits(model, ids, mask)
    wrapped = get_peft_model(model, config).eval()
    after = _logits(wrapped.get_base_model(), ids, mask)
    _expect(bool((after - before).abs().max() < TOLERANCE * before.abs().max()), "an untrained LoRA changes the logits")
    _expect(attention.probe_attention(wrapped) == "bidirectional", "not bidirectional under PEFT")
    wrapped.train()
    plain = _lora_gradients(wrapped, mask_id)
    _expect(bool(plain) and all(g.isfinite().all() for g in plain.values()), "gradients are not finite")
    _expect(any(bool(g.abs().max() > 0) for g in plain.values()), "gradients are zero")
    note = "yes"
    if model.supports_gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        again = _lora_gradients(wrapped, mask_id)
        model.gradient_checkpointing_disable()
        scale = max(float(g.abs().max()) for g in plain.values())
        worst = max(float((g - again[name]).abs().max()) for name, g in plain.items()) / scale
        _expect(worst < TOLERANCE, f"gradients differ under gradient checkpointing ({worst:.1e})")
    else:
        note = "yes, no checkpointing"
    torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=1e-3).step()
    return note, wrapped.eval()


def _same(model: torch.nn.Module, other: torch.nn.Module) -> bool:
    ids, mask, text = _text("left")
    want, got = _logits(model, ids, mask)[:, text], _logits(other, ids, mask)[:, text]
    return bool((want - got).abs().max() < TOLERANCE * want.abs().max())


def _reloads(model: PreTrainedModel, folder: str, kernel: str, plainly: bool) -> str:
    if plainly:
        again = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=kernel).eval()
    else:
        again, _ = load_diffusion_model(folder, device="cpu", attn_implementation=kernel)
    found = attention.probe_attention(again)
    if found != "bidirectional":
        return found
    return "yes" if _same(model, again) else "other logits"


def _guarded(step: Callable[[], Any]) -> Any:
    try:
        return step()
    except Exception as error:
        return f"no: {_first_line(error)}"


def live(name: str, kernel: str) -> dict[str, str]:
    """Conversion, decoding, one LoRA step, files and merging of one class."""
    model, tokenizer = tiny_model(name, kernel), AutoTokenizer.from_pretrained(TINY_MODEL_PATH)
    converted = _guarded(lambda: convert_to_diffusion(model, tokenizer))
    if isinstance(converted, str):
        return dict.fromkeys(("generates", "lora", "plain reload", "load_diffusion_model", "merge"), converted)
    mask_id = tokenizer.mask_token_id
    found = {"generates": _guarded(lambda: _generates(model, mask_id))}
    with tempfile.TemporaryDirectory() as folder:

        def save() -> str:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            return "yes"

        saved = _guarded(save)
        for column, plainly in (("plain reload", True), ("load_diffusion_model", False)):
            found[column] = (
                _guarded(lambda plainly=plainly: _reloads(model, folder, kernel, plainly)) if saved == "yes" else saved
            )
    step = _guarded(lambda: _lora_step(model, mask_id))
    found["lora"] = step if isinstance(step, str) else step[0]
    if isinstance(step, str):  # once more without the modules that PEFT refuses or that return tuples
        step = _guarded(lambda: _lora_step(convert_to_diffusion(tiny_model(name, kernel), tokenizer), mask_id, SPECIAL))
        found["lora"] = (
            f"without routers and out_proj: {step if isinstance(step, str) else 'yes'}; all: {found['lora']}"
        )
    found["merge"] = "–" if isinstance(step, str) else _guarded(lambda: _merges(step[1]))
    return found


def _merges(wrapped: torch.nn.Module) -> str:
    before = _logits(attention.base_of(wrapped), *_text("left")[:2])
    merged = wrapped.merge_and_unload()
    found = attention.probe_attention(merged)
    if found != "bidirectional":
        return found
    after = _logits(merged, *_text("left")[:2])
    return "yes" if bool((before - after).abs().max() < 1e-3 * before.abs().max()) else "other logits"


# -- one class


def _first_line(error: BaseException, length: int = 160) -> str:
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()] or [""]
    # Strict config validation puts the reason in its second line.
    text = lines[1] if len(lines) > 1 and lines[0].startswith("Class validation error") else lines[0]
    return f"{type(error).__name__}: {text}"[:length].replace("|", "/")


def try_kernel(name: str, kernel: str) -> dict[str, Any]:
    """Build, probe, patch and verify one class with one attention implementation."""
    try:
        plain = tiny_model(name, kernel)
    except Exception as error:
        unsupported = "does not support an attention implementation" in str(error)
        return {"result": "unsupported" if unsupported else "not built", "reason": _first_line(error)}
    found: dict[str, Any] = {"parameters": sum(p.numel() for p in plain.parameters())}
    found["before"] = _guarded(lambda: attention.probe_attention(plain))
    found["kind"] = _guarded(lambda: kind_of(plain))
    found["block"] = _guarded(lambda: attention.check_block_attention(tiny_model(name, kernel), BLOCK_LENGTH) or "yes")
    model = tiny_model(name, kernel)
    try:
        patch = attention.patch_causal_attention(model)
    except Exception as error:
        return {**found, "result": "refused", "reason": _first_line(error, 1000)}
    found |= {"result": "works", "mechanism": getattr(patch, "mechanism", "config"), "problems": []}
    try:
        found |= verify(model, plain, found["kind"])
    except Exception as error:
        found["problems"].append(f"verification fails: {_first_line(error)}")
    patch.undo()
    if _guarded(lambda: _same(plain, model)) is not True:
        found["problems"].append("undo leaves other logits")
    return found


def try_class(name: str) -> dict[str, Any]:
    """Everything about one class; the life of the converted model with the first implementation that works."""
    started = time.perf_counter()
    found: dict[str, Any] = {"name": name, **{kernel: try_kernel(name, kernel) for kernel in KERNELS}}
    kernel = next((kernel for kernel in KERNELS if found[kernel]["result"] == "works"), None)
    if kernel is not None:
        found |= {"life": live(name, kernel), "lived with": kernel}
    return {**found, "seconds": round(time.perf_counter() - started, 1)}


def _child(connection: Any, name: str) -> None:
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # progress and notices of a thousand small models
    torch.set_num_threads(1)
    try:
        connection.send(try_class(name))
    except Exception as error:
        connection.send({"name": name, "crash": _first_line(error)})


def isolated(name: str, timeout: float) -> dict[str, Any]:
    """`try_class` in a process of its own: a crash or an endless loop is that class's result."""
    context = multiprocessing.get_context("forkserver")  # forks after the imports, which take the most time
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(sender, name))
    process.start()
    sender.close()
    try:
        return receiver.recv() if receiver.poll(timeout) else {"name": name, "crash": f"took over {timeout:.0f} s"}
    except EOFError:
        process.join()
        return {"name": name, "crash": f"process died with exit code {process.exitcode}"}
    finally:
        process.kill()
        process.join()


# -- report

COLUMNS = ("generates", "lora", "plain reload", "load_diffusion_model", "merge")


def _built(found: dict[str, Any]) -> list[dict[str, Any]]:
    return [found[k] for k in KERNELS if found.get(k, {}).get("result") in ("works", "refused")]


def _kind(found: dict[str, Any]) -> str:
    kind = next((k["kind"] for k in _built(found)), "–")
    return "no plain token ids" if kind.startswith("no:") else kind


def _problems(found: dict[str, Any]) -> list[str]:
    problems = [f"{k}: {p}" for k in KERNELS for p in found.get(k, {}).get("problems", [])]
    problems += [f"{k}: {v}" for k in KERNELS if (v := found.get(k, {}).get("full mask", "")).startswith("differs")]
    problems += [
        f"{c}: {v}" for c, v in found.get("life", {}).items() if not v.startswith("yes") and c != "plain reload"
    ]
    return problems


def _silent(found: dict[str, Any]) -> bool:
    life = found.get("life", {})
    attends = ("causal", "mixed", "block")
    # One full layer hides causal ones from perturbation; that the logits differ from those of a full mask shows them.
    partly = any(re.search("silently causal|partly causal|differs", p) for p in _problems(found))
    return partly or any(life.get(column) in attends for column in ("load_diffusion_model", "merge"))


def _results(found: dict[str, Any]) -> set[str]:
    return {k["result"] for k in _built(found)}


def summary(all_found: list[dict[str, Any]]) -> str:
    """Counts, then every class that was not built, is refused, or shows a problem, with its reason."""
    built = [f for f in all_found if _built(f)]
    unbuilt = [f for f in all_found if not _built(f)]
    decoders = [f for f in built if _kind(f) == "decoder"]
    kinds = {kind: [f for f in built if _kind(f) == kind] for kind in sorted({_kind(f) for f in built})}

    def working(group: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [f for f in group if _results(f) == {"works"}]

    lines = [
        f"transformers {transformers.__version__}, torch {torch.__version__}, peft {peft.__version__}.",
        "",
        f"- tried: {len(all_found)} classes; built: {len(built)}",
        f"- softmax-attention decoders: {len(decoders)}; working with every implementation they have: {len(working(decoders))}",
        *[
            f"- {kind}: {len(group)}, working: {len(working(group))}"
            for kind, group in kinds.items()
            if kind != "decoder"
        ],
        f"- block attention: {sum(any(k['block'] == 'yes' for k in _built(f)) for f in built)} of {len(built)}",
        f"- silently causal: {sum(_silent(f) for f in all_found)}",
    ]
    for title, rows in (
        ("Not built", [(f["name"], _unbuilt_reason(f)) for f in unbuilt]),
        (
            "Refused",
            [(f["name"], r) for kind, g in kinds.items() if kind != "encoder" for f in g for r in _refusals(f, kind)],
        ),
        ("Problems", [(f["name"], p) for f in all_found for p in _problems(f)]),
    ):
        lines += ["", f"{title}: {len({name for name, _ in rows})}", ""] + [
            f"- `{name}`: {text}" for name, text in rows
        ]
    encoders = [f["name"] for f in kinds.get("encoder", []) if _results(f) == {"refused"}]
    lines += [
        "",
        f"Refused as encoders, which attend in both directions already: {len(encoders)}",
        "",
        ", ".join(encoders),
    ]
    return re.sub(r"'?/\S*/tmp\w+'?|'?/tmp/\w+'?", "the folder", "\n".join(lines))


def _unbuilt_reason(found: dict[str, Any]) -> str:
    return found.get("crash") or next(found[k]["reason"] for k in KERNELS if "reason" in found[k])


def _refusals(found: dict[str, Any], kind: str) -> list[str]:
    reasons = {k: found[k]["reason"] for k in KERNELS if found[k]["result"] == "refused"}
    short = {
        k: re.sub(r"^ValueError: `model`: \w+ ", "", r).split(" Use an architecture")[0] for k, r in reasons.items()
    }
    if len(set(short.values())) == 1 and len(short) > 1:
        short = {"sdpa, eager": next(iter(short.values()))}
    return [f"({kind}; {kernels}) {reason}" for kernels, reason in short.items()]


def table(all_found: list[dict[str, Any]]) -> str:
    head = [
        "class",
        "kind",
        "sdpa",
        "eager",
        "mechanism",
        "causal layers left",
        "= 4-D full mask",
        *COLUMNS,
        "block attention",
    ]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for found in (f for f in all_found if _built(f)):
        life, both = found.get("life", {}), [found[k] for k in KERNELS]

        def merged(key: str, both: list[dict[str, Any]] = both) -> str:
            values = [str(k[key]).split(" (")[0].split(":")[0] for k in both if k.get(key)]
            return " / ".join(dict.fromkeys(values)) or "–"

        cells = [found["name"], _kind(found), *[k["result"].replace("unsupported", "–") for k in both]]
        cells += [
            merged("mechanism"),
            merged("causal layers"),
            merged("full mask"),
            *[life.get(c, "–").split(":")[0] for c in COLUMNS],
        ]
        lines.append("| " + " | ".join([*cells, merged("block")]) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default="benchmarks/results/architectures.md", help="Markdown file to write")
    parser.add_argument("--only", help="class names or model types, separated by commas")
    parser.add_argument("--list", action="store_true", help="print the classes and stop")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds for one class")
    parser.add_argument("--json", help="write the raw findings here too")
    options = parser.parse_args()
    names = [class_of(name).__name__ for name in options.only.split(",")] if options.only else class_names()
    if options.list:
        print("\n".join(names))
        return 0
    multiprocessing.get_context("forkserver").set_forkserver_preload(
        ["transformers", "peft", "llm_diffusion.models.conversion"]
    )
    with ThreadPoolExecutor(options.workers) as pool:
        all_found = list(pool.map(lambda name: isolated(name, options.timeout), names))
    text = summary(all_found)
    Path(options.output).parent.mkdir(parents=True, exist_ok=True)
    Path(options.output).write_text(
        f"# Architectures\n\n`python benchmarks/architectures.py`\n\n{text}\n\n{table(all_found)}\n"
    )
    if options.json:
        Path(options.json).write_text(json.dumps(all_found, indent=1))
    print(text)
    return int(any(_silent(f) for f in all_found))


if __name__ == "__main__":
    sys.exit(main())
