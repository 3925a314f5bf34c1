"""Loads, converts and reloads: from any causal language model to a diffusion model and back from disk.

A converted model stays the host's own class. What makes it a diffusion model is a record, `config.diffusion`, the attention
switch, a mask token, and a bound `generate`. Full checkpoints carry the record in config.json; adapters, which have no model
config of their own, in a `diffusion_config.json` beside them.
Trade-off: a plain loader gives the causal model of an adapter directory; `load_diffusion_model` is the one that is always right.
Alternative: own model classes with `auto_map`, which every host tool would have to be taught.
"""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from . import time_embedding as time_embeddings
from .attention import check_block_attention, check_decoder, check_transformers, lift_masks, patch_causal_attention
from .clean_prefix import check_clean_prefix
from .diffugpt import load_published, name_mask
from .generation import generate
from .hub import (
    adapter_base,
    best_device,
    download,
    from_hub,
    gguf_path,
    is_adapter,
    load_gguf,
    loader_options,
    local_file,
    resolve_path,
)
from .layouts import Layout, find_layout
from .mask_token import check_mask_token, grow, set_mask_token
from .noise_schedules import get_noise_schedule
from .patching import Patch, base_of, bind, keep_logits
from .probing import recurrent_layers
from .tiny import TINY_MODEL_PATH
from .token_rows import train_rows_alone

logger = logging.getLogger(__name__)

SIDECAR = "diffusion_config.json"
ATTENTIONS = ("bidirectional", "block", "lossless")
CLEAN_CONTEXTS = ("causal", "block")
CONVERSION_OPTIONS = (
    *("attention", "block_length", "clean_context", "right_shift_logits", "time_embedding", "mask_token_id"),
)
DEFAULT_BLOCK_LENGTH = {"block": 4, "lossless": 8}


def _new_record(
    attention: str | None,
    block_length: int | None,
    clean_context: str | None,
    right_shift_logits: bool | None,
    time_embedding: bool | None,
    noise_schedule: str | None,
) -> dict[str, Any]:
    """Checked options with their defaults filled in."""
    attention, noise_schedule = attention or "bidirectional", noise_schedule or "linear"
    if attention not in ATTENTIONS:
        raise ValueError(f"`attention` must be one of {ATTENTIONS}, got {attention!r}.")
    get_noise_schedule(noise_schedule)
    if attention != "bidirectional":
        block_length = DEFAULT_BLOCK_LENGTH[attention] if block_length is None else block_length
        clean_context = clean_context or "causal"
        least = 2 if attention == "lossless" else 1  # the first token of a draft is the base's own
        if block_length < least:
            raise ValueError(
                f"`block_length` must be at least {least} with `attention`={attention!r}, got {block_length}."
            )
        if clean_context not in CLEAN_CONTEXTS:
            raise ValueError(f"`clean_context` must be one of {CLEAN_CONTEXTS}, got {clean_context!r}.")
    elif block_length is not None or clean_context is not None:
        raise ValueError("`block_length` and `clean_context` belong to `attention`='block'; leave them out.")
    if attention == "lossless" and (clean_context != "causal" or right_shift_logits is False or time_embedding):
        raise ValueError(
            "`attention`='lossless' drafts behind the base's own text and read-out: `clean_context` is 'causal', `right_shift_logits` "
            "true and `time_embedding` false; leave them out."
        )
    if right_shift_logits is None:
        right_shift_logits = (
            clean_context != "block"
        )  # a block-causal clean half reads every token in its own place, as SDAR
    return {
        "attention": attention,
        "block_length": block_length,
        "clean_context": clean_context,
        "right_shift_logits": right_shift_logits,
        "time_embedding": bool(time_embedding),
        "noise_schedule": noise_schedule,
        "final_causal_ratio": 0.0,
    }


def convert_to_diffusion(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    *,
    attention: str | None = None,
    block_length: int | None = None,
    clean_context: str | None = None,
    right_shift_logits: bool | None = None,
    time_embedding: bool | None = None,
    noise_schedule: str | None = None,
    mask_token_id: int | None = None,
) -> torch.nn.Module:
    """Turns a causal language model into a masked-diffusion model, in place. Idempotent.

    Args:
        model: any `AutoModelForCausalLM`, bare or under PEFT.
        tokenizer: its tokenizer; gets the mask token.
        attention: "bidirectional" (default); "block": bidirectional inside a block, blocks from left to right; or "lossless": the model
            stays as it is, and adapters learn to draft blocks that it verifies.
        block_length: tokens of a block (default 4; 8 of a lossless draft).
        clean_context: how finished blocks see themselves: "causal" (default; what the AR model did) or "block".
        right_shift_logits: whether hidden state i - 1 predicts token i, as in the AR model. Default True, the read-out that the
            model was trained with; False for `clean_context="block"`.
        time_embedding: whether the model is told how noisy its input is (default False), see `time_embedding`.
        noise_schedule: recorded for training and likelihood, "linear" by default.
        mask_token_id: any token of the vocabulary as the mask; default the tokenizer's own, or a new one, see `set_mask_token`.

    Returns:
        The same `model`, with `config.diffusion`, and `generate` bound to it.

    Raises:
        ValueError: the model cannot attend as asked, or is already converted with other options.
    """
    check_transformers()
    base = base_of(model)
    keep_logits(base)
    for module in base.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # bitsandbytes would repack 4-bit weights at the first evaluation, the probe below for one, and train with wrong
            # gradients afterwards.
            module.support_avx512bf16_for_cpu = False
    asked = {
        "attention": attention,
        "block_length": block_length,
        "clean_context": clean_context,
        "right_shift_logits": right_shift_logits,
        "time_embedding": time_embedding,
        "noise_schedule": noise_schedule,
    }
    record = getattr(base.config, "diffusion", None)
    if record is None:
        record = _new_record(**asked)
        check_mask_token(tokenizer, mask_token_id)
        set_attention(base, record)
        record |= {
            "mask_token_id": set_mask_token(base, tokenizer, mask_token_id),
            "base_model": base.config._name_or_path,
            "base_fingerprint": fingerprint(base),
            "conversion_steps": 0,
            "training_tokens": 0,
            "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "version": version("llm_diffusion"),
        }
    else:
        for name, value in {**asked, "mask_token_id": mask_token_id}.items():
            if value is not None and value != record.get(name, False):
                raise ValueError(
                    f"`{name}`: the checkpoint was converted with {record.get(name, False)!r}, asked for {value!r}; leave it out."
                )
        set_attention(base, record)
        if tokenizer.mask_token_id != record["mask_token_id"]:
            raise ValueError(
                f"`tokenizer`: its mask token id is {tokenizer.mask_token_id}, the checkpoint's is {record['mask_token_id']}; "
                "load the tokenizer that was saved with the model."
            )
    base.config.diffusion = record
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    bind(base, "generate", generate)
    return model


def set_attention(model: PreTrainedModel, record: dict[str, Any]) -> None:
    if record["attention"] != "bidirectional":
        check_decoder(model)
        check_block_attention(model, record["block_length"])
        if record["attention"] == "lossless":
            check_clean_prefix(model)
    else:
        patch_causal_attention(model)
        if layers := recurrent_layers(model):
            logger.warning("%s: its layers %s still run from left to right", type(model).__name__, ", ".join(layers))
        set_final_causal_ratio(model, record.get("final_causal_ratio", 0.0))
    if record.get("time_embedding"):
        time_embeddings.attach(model)


def set_final_causal_ratio(model: PreTrainedModel, ratio: float) -> None:
    """What stays of the causal mask for good, in evaluation and generation too: 0 is fully bidirectional."""
    if ratio or getattr(model, "lifted_causal_ratio", None) is not None:
        lift_masks(Patch(), model, ratio)


def fingerprint(model: PreTrainedModel) -> list[float]:
    """Weights that neither adapters nor quantisation touch: of the last norm, as a rule, and of the input embedding."""
    head = model.get_output_embeddings()
    others = {id(parameter) for parameter in head.parameters()} if head is not None else set()
    weights = [
        parameter
        for name, parameter in model.named_parameters()
        if parameter.dim() == 1 and parameter.numel() >= 8 and parameter.is_floating_point()
        if id(parameter) not in others and not name.startswith(time_embeddings.NAME)
    ]
    values = [model.get_input_embeddings().weight[3:11, 0]]
    if weights:
        values.append(weights[-1][:: len(weights[-1]) // 8][:8])
    return [round(value, 6) for value in torch.cat([v.detach().float().cpu() for v in values]).tolist()]


def load_diffusion_model(
    name_or_path: str,
    *,
    attention: str | None = None,
    block_length: int | None = None,
    clean_context: str | None = None,
    right_shift_logits: bool | None = None,
    time_embedding: bool | None = None,
    mask_token_id: int | None = None,
    quantization: str | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | None = None,
    trust_remote_code: bool = False,
    gguf_file: str | None = None,
    **options: Any,
) -> tuple[torch.nn.Module, PreTrainedTokenizerBase]:
    """Loads an AR model and converts it, or reloads a converted model or adapter with the attention it was saved with.

    LLaDA and SMDM checkpoints come with their own mask token and read-out, see `layouts`.

    Args:
        name_or_path: hub name, folder (DiffuGPT's own layout of weights too), or "tiny" for the embedded base.
        attention, block_length, clean_context, right_shift_logits, time_embedding, mask_token_id: see `convert_to_diffusion`; None
            means as saved, else the default.
        quantization: None, "nf4" or "int8" (bitsandbytes).
        dtype: "auto" is the checkpoint's type on a GPU and fp32 on a CPU.
        device: "cuda", "mps" or "cpu"; None picks the best.
        gguf_file: a GGUF file in the folder or hub repository, whose weights are unpacked (2 or 4 bytes a parameter, by `dtype`).
            `quantization` takes them through bf16 in the host's memory, 2 bytes a parameter. An adapter remembers its file.
        options: further keywords of `from_pretrained` (`device_map`, `max_memory`, `revision`, …).

    Returns:
        `(model, tokenizer)`, in evaluation mode; an adapter comes as a trainable `PeftModel`.
    """
    path, device = resolve_path(name_or_path), device or best_device()
    options = loader_options(device, dtype, quantization, trust_remote_code=trust_remote_code, **options)
    record = _read_sidecar(path) if (adapter := is_adapter(path)) else {}
    base_path = adapter_base(path) if adapter else path
    path = download(path) if adapter else path  # by name, the host's tokenizer loader asks the hub for a config.json
    gguf_file = gguf_file or record.get("gguf_file")
    gguf = {"gguf_file": gguf_path(base_path, gguf_file)} if gguf_file else {}
    model, layout, published = _load_base(base_path, options, gguf)
    if layout is not None and not adapter and right_shift_logits is None:
        right_shift_logits = False  # as it was trained
    own_tokenizer = adapter or not gguf or local_file(path, "tokenizer.json")
    gguf = {} if own_tokenizer else gguf
    tokenizer = from_hub(AutoTokenizer, path, trust_remote_code=trust_remote_code, **gguf)
    if layout is not None:
        layout.name_mask(tokenizer)
    if "device_map" not in options:
        model = model.to(device)
    if adapter:
        base_of(model).config.diffusion = record
        _check_fingerprint(model, record, path)
        grow(model, record["mask_token_id"])
    elif published:
        name_mask(model, tokenizer)
    convert_to_diffusion(
        model,
        tokenizer,
        attention=attention,
        block_length=block_length,
        clean_context=clean_context,
        right_shift_logits=right_shift_logits,
        time_embedding=time_embedding,
        mask_token_id=mask_token_id,
    )
    if published:
        model.config.diffusion["annealed"] = True  # it was trained as a diffusion model elsewhere
    if gguf_file:
        base_of(model).config.diffusion["gguf_file"] = gguf_file
    if adapter:
        model = from_hub(PeftModel, model, path, is_trainable=True)
        train_rows_alone(model)  # PEFT would copy the vocabulary at every forward
    elif not gguf_file:
        record = base_of(model).config.diffusion
        record.pop("gguf_file", None)  # a checkpoint that descends from one has weights of its own
        if record.get("time_embedding"):
            _load_time_embedding(model, path)
    return model.eval(), tokenizer


def _load_base(path: str, options: dict[str, Any], gguf: dict[str, str]) -> tuple[PreTrainedModel, Layout | None, bool]:
    """The model, the layout of a checkpoint that the host's loaders do not know, and whether it is DiffuGPT's."""
    layout = None if gguf else find_layout(path)
    if layout is not None:
        model = layout.load(path, **{key: value for key, value in options.items() if key != "trust_remote_code"})
        return model, layout, False
    config = _check_config(path, options["trust_remote_code"], gguf)
    if gguf:
        return load_gguf(config, path, **options, **gguf), None, False
    if (published := load_published(path, config, **options)) is not None:
        return published, None, True
    model = from_hub(AutoModelForCausalLM, path, **options)
    if path == str(TINY_MODEL_PATH):
        model.config._name_or_path = "tiny"
    return model, None, False


def _check_config(path: str, trust_remote_code: bool, gguf: dict[str, str]) -> PretrainedConfig:
    if gguf and local_file(path, CONFIG_NAME):  # knows more than GGUF metadata: rope scaling, an unusual head size
        gguf = {}
    config = from_hub(AutoConfig, path, trust_remote_code=trust_remote_code, **gguf)
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"`model`: {path!r} is an encoder-decoder ({config.model_type}); a decoder-only causal LM is needed."
        )
    return config


def _check_fingerprint(model: PreTrainedModel, record: dict[str, Any], path: str) -> None:
    ours, theirs = fingerprint(model), record.get("base_fingerprint")
    if theirs is None:
        return
    if len(ours) != len(theirs) or any(
        abs(a - b) > 0.02 * max(abs(a), abs(b)) + 1e-5 for a, b in zip(ours, theirs, strict=True)
    ):
        raise ValueError(
            f"`model`: the adapter {path!r} was trained on another base than {model.config._name_or_path!r} (its weights differ); "
            f"put the base it was trained on, {record['base_model']!r}, back."
        )


def _load_time_embedding(model: PreTrainedModel, path: str) -> None:
    """The weights of a full checkpoint's time embedding, which the host's loader does not know."""
    index = local_file(path, SAFE_WEIGHTS_INDEX_NAME)
    names = set(json.loads(Path(index).read_text())["weight_map"].values()) if index else {SAFE_WEIGHTS_NAME}
    state = {}
    for weights in filter(None, (local_file(path, name) for name in names)):
        with safe_open(weights, framework="pt") as file:
            state |= {key: file.get_tensor(key) for key in file.keys() if key.startswith(f"{time_embeddings.NAME}.")}
    if state:  # an AR checkpoint that is converted now has none
        model.load_state_dict(state, strict=False)


def read_record(folder: str | Path) -> dict[str, Any]:
    """The diffusion record of a saved adapter or full checkpoint."""
    if (Path(folder) / SIDECAR).exists():
        return _read_sidecar(str(folder))
    return json.loads((Path(folder) / "config.json").read_text())["diffusion"]


def _read_sidecar(path: str) -> dict[str, Any]:
    sidecar = local_file(path, SIDECAR)
    if sidecar is None:
        raise ValueError(
            f"`model`: {path!r} holds an adapter without {SIDECAR}; it was not saved by llm_diffusion's trainers."
        )
    try:
        record = json.loads(Path(sidecar).read_text())
        missing = {"base_model", "mask_token_id", "attention"} - set(record)
    except (json.JSONDecodeError, TypeError) as error:
        raise ValueError(f"`model`: {sidecar!r} is malformed: {error}.") from error
    if missing:
        raise ValueError(f"`model`: {sidecar!r} lacks {sorted(missing)}.")
    return record


def save_record(model: torch.nn.Module, folder: str | Path) -> None:
    """Writes `config.diffusion` beside an adapter, whose own files cannot carry it."""
    (Path(folder) / SIDECAR).write_text(json.dumps(base_of(model).config.diffusion, indent=2) + "\n")
