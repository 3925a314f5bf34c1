"""Writes a trained model, its adapters merged, as other engines load it.

    sdar    a folder for SGLang and LMDeploy: Qwen3's tensors under SDAR's config (arXiv 2510.06303)
    gguf    a file for llama.cpp: a Llama as LLaDA (arXiv 2502.09992), a Qwen2 as Dream (arXiv 2508.15487)

These are the layouts and the ways to decode that the engines know; a model that was trained another way is refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import CONFIG_NAME

from .. import UserError
from ..models.files import atomic, write_text
from ..models.layouts import SAME_LAYERS
from ..models.loading import load_diffusion_model
from ..models.record import record_of, save_generation_config

# Of a format: what a transformers model_type is called there.
LAYOUTS = {"sdar": {"qwen3": "sdar", "qwen3_moe": "sdar_moe"}, "gguf": {"llama": "llada", "qwen2": "dream"}}
# Of records and configs: what the engines do not look at.
_ASSUMED = {
    "trained": True,
    **dict.fromkeys(("time_embedding", "attention_bias", "mlp_bias"), False),
    "final_causal_ratio": 0.0,
    "sliding_window": None,
    "hidden_act": "silu",
    "mlp_only_layers": [],
    "decoder_sparse_step": 1,
}
_BLOCKS = {"attention": "block", "clean_context": "block", "right_shift_logits": False}
_ASSUMED_BY = {
    "sdar": {**_BLOCKS, "mask_token_id": SAME_LAYERS["sdar"][1]},
    "gguf": {"attention": "bidirectional", "rope_type": "default"},
}
_SDAR_CONFIG = '''"""SDAR's config: the keys of config.json as they stand there."""

from transformers import PretrainedConfig


class {name}(PretrainedConfig):
    model_type = "{kind}"
'''
_LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# How llama.cpp calls the steps that cut a text before byte-pair encoding, and whether whole words of the vocabulary go before merges.
_PRE_TOKENIZERS = {
    ((_LLAMA3, "bytes"), True): "llama-bpe",
    ((_LLAMA3.replace("{1,3}", ""), "bytes"), False): "qwen2",
    (("words",), False): "gpt-2",
    (("digits", "words"), False): "smollm",
}


def export(name: str, form: str, folder: str | Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Writes a converted model or adapter, all of it or nothing.

    Args:
        name: folder or hub name; as in `load_diffusion_model`.
        form: "sdar" or "gguf".
        folder: a new one.
        dtype: of the weights, which are loaded, merged and written in it.

    Returns:
        What the engine is given: the folder, or the GGUF file in it.

    Raises:
        UserError: the engine cannot decode such a model as it was trained; or the folder is there already.
        ImportError: gguf is not installed.
    """
    folder = Path(folder)
    if form not in LAYOUTS:
        raise UserError(f"`format` must be one of {tuple(LAYOUTS)}, got {form!r}.")
    if folder.exists():
        raise UserError(f"`output`: {str(folder)!r} exists; choose a new folder.")
    model, tokenizer = load_diffusion_model(name, device="cpu", dtype=dtype)
    _check(form, model, tokenizer)
    if isinstance(model, PeftModel):
        model = model.merge_and_unload()
    with atomic(folder) as aside:
        aside.mkdir()
        file = {"sdar": _write_sdar, "gguf": _write_gguf}[form](model, tokenizer, aside)
    return folder / file


def _check(form: str, model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuses what the engines would load and decode in another way than it was trained for, for they check nothing."""
    record, config, names = record_of(model), model.config, LAYOUTS[form]
    if config.model_type not in names:
        raise UserError(
            f"`model`: {form!r} holds {' and '.join(names)} models, this one is {config.model_type}: convert one of them, or decode it here."
        )
    if record.mode.drafts:
        raise UserError("`model`: other engines take other drafters than `attention`='lossless': give them its base.")
    found = {**config.to_dict(), **config.rope_parameters, **vars(record), "trained": record.trained}
    for name, right in {**_ASSUMED, **_ASSUMED_BY[form]}.items():
        if (own := found.get(name, right)) != right:
            raise UserError(
                f"`model`: `{name}` is {own!r}, where {form!r} must have {right!r}: convert and train one so, or decode this one here."
            )
    if form == "gguf":
        _pre_tokenizer(tokenizer)


# -- SDAR


def _write_sdar(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> str:
    config, head = _sdar_config(model), model.get_output_embeddings()
    if head.weight is model.get_input_embeddings().weight:
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
    model.config.tie_word_embeddings = False
    model.save_pretrained(folder)
    write_text(folder / CONFIG_NAME, json.dumps(config, indent=2) + "\n")
    module, name = config["auto_map"]["AutoConfig"].split(".")
    write_text(folder / f"{module}.py", _SDAR_CONFIG.format(name=name, kind=config["model_type"]))
    save_generation_config(model, folder)
    tokenizer.save_pretrained(folder)
    return ""


def _sdar_config(model: PreTrainedModel) -> dict[str, Any]:
    """The keys of the published configs, some of which transformers has renamed since."""
    record, config = record_of(model), model.config.to_dict()
    published = {new: old for old, new in model.config.attribute_map.items()}
    rope, kind = dict(config["rope_parameters"]), LAYOUTS["sdar"][config["model_type"]]
    left_out = {*PreTrainedConfig().to_dict(), "rope_parameters", "layer_types", "diffusion"}
    return {
        "architectures": [type(model).__name__.replace("Qwen3", "SDAR")],
        "model_type": kind,
        "auto_map": {"AutoConfig": f"configuration_{kind}.{type(model.config).__name__.replace('Qwen3', 'SDAR')}"},
        **{published.get(name, name): value for name, value in config.items() if name not in left_out},
        "block_size": record.block_length,
        "mask_token_id": record.mask_token_id,
        "rope_theta": rope.pop("rope_theta"),
        "rope_scaling": None if rope["rope_type"] == "default" else rope,
        "tie_word_embeddings": False,
        "torch_dtype": str(model.dtype).removeprefix("torch."),
    }


# -- GGUF


def _pre_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    cut, model = spec["pre_tokenizer"] or {}, spec["model"]
    steps = tuple(_step(step) for step in cut.get("pretokenizers", [cut]))
    found = _PRE_TOKENIZERS.get((steps, model.get("ignore_merges", False)))
    if model["type"] != "BPE" or (spec["normalizer"] or {}).get("type", "NFC") != "NFC" or found is None:
        raise UserError(
            f"`model`: llama.cpp is not known to cut texts as this tokenizer does, by {steps}; decode it here. Known are the tokenizers "
            f"{', '.join(_PRE_TOKENIZERS.values())}."
        )
    return found


def _step(step: dict[str, Any]) -> str:
    match step:
        case {"type": "Split", "behavior": "Isolated", "invert": False, "pattern": {"Regex": pattern}}:
            return pattern
        case {"type": "Digits", "individual_digits": True}:
            return "digits"
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": words}:
            return "words" if words else "bytes"
    return str(step.get("type"))


def _write_gguf(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> str:
    try:
        import gguf
    except ImportError as error:
        raise ImportError("`format`: gguf is not installed; run `pip install 'llm-diffusion[gguf]'`.") from error
    config, record, arch = model.config, record_of(model), LAYOUTS["gguf"][model.config.model_type]
    file = f"model-{str(model.dtype).removeprefix('torch.')}.gguf"
    writer = gguf.GGUFWriter(folder / file, arch)
    writer.add_name(record.base_model)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for add in (writer.add_key_length, writer.add_value_length, writer.add_rope_dimension_count):
        add(size)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_causal_attention(False)
    writer.add_diffusion_shift_logits(record.right_shift_logits)
    _add_vocabulary(writer, tokenizer, config.vocab_size)
    for name, weight in _gguf_tensors(model, arch):
        kind = None
        if weight.dtype == torch.bfloat16:  # which numpy does not know
            kind, weight = gguf.GGMLQuantizationType.BF16, weight.view(torch.uint8)
        writer.add_tensor(name, weight.numpy(), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _gguf_tensors(model: PreTrainedModel, arch: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Vectors in fp32, as llama.cpp adds them; matrices as they are, without a copy."""
    import gguf

    heads = {"q_proj": model.config.num_attention_heads, "k_proj": model.config.num_key_value_heads}
    kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names = gguf.get_tensor_name_map(kind, model.config.num_hidden_layers)
    for name, weight in model.named_parameters():  # a tied head once
        weight, part = weight.detach().contiguous(), name.split(".")[-2]
        if arch == "llada" and part in heads:
            # LLaDA's rotary embedding turns neighbours, transformers' the two halves of a head.
            weight = weight.unflatten(0, (heads[part], 2, -1)).transpose(1, 2).flatten(0, 2).contiguous()
        yield names.get_name(name, (".weight", ".bias")), weight.float() if weight.dim() == 1 else weight


def _add_vocabulary(writer: Any, tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
    """The tokens of a byte-level BPE, its merges, its special tokens and chat template."""
    import gguf

    added, words = tokenizer.added_tokens_decoder, {id: token for token, id in tokenizer.get_vocab().items()}
    kinds = gguf.TokenType
    types = [
        (kinds.CONTROL if added[id].special else kinds.USER_DEFINED)
        if id in added
        else (kinds.NORMAL if id in words else kinds.UNUSED)
        for id in range(rows)
    ]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_pre_tokenizer(tokenizer))
    writer.add_token_list([words.get(id, f"[PAD{id}]") for id in range(rows)])
    writer.add_token_types(types)
    with TemporaryDirectory() as saved:
        tokenizer.save_pretrained(saved)
        vocabulary = gguf.SpecialVocab(saved, load_merges=True)
    # Its own guess from the post-processor is "crude"; llama.cpp's, from the name of the pre-tokenizer, knows even less.
    vocabulary.add_special_token = {"bos": tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id}
    vocabulary.add_to_gguf(writer, quiet=True)
