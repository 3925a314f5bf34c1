"""Loads and reloads: an autoregressive model that is converted, or a converted model or adapter as it was saved.

Full checkpoints carry the record in config.json; adapters, which have no model config of their own, in a `diffusion_config.json`.
"""

from __future__ import annotations

import json
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

from .. import UserError
from . import time_embedding as time_embeddings
from .checkpoints import (
    TINY_MODEL_PATH,
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
from .conversion import convert_to_diffusion, fingerprint
from .diffugpt import load_published, name_mask
from .layouts import Layout, find_layout
from .patching import base_of
from .record import DiffusionRecord, read_sidecar, update_record
from .special_tokens import grow
from .token_rows import train_rows_alone


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
    record = read_sidecar(path) if (adapter := is_adapter(path)) else DiffusionRecord()
    base_path = adapter_base(path) if adapter else path
    path = download(path) if adapter else path  # by name, the host's tokenizer loader asks the hub for a config.json
    gguf_file = gguf_file or record.gguf_file
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
        base_of(model).config.diffusion = record.to_dict()
        _check_fingerprint(model, record, path)
        grow(model, record.mask_token_id)
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
        update_record(model, annealed=True)  # it was trained as a diffusion model elsewhere
    if gguf_file:
        update_record(model, gguf_file=gguf_file)
    if adapter:
        model = from_hub(PeftModel, model, path, is_trainable=True)
        train_rows_alone(model)  # PEFT would copy the vocabulary at every forward
    elif not gguf_file:
        record = update_record(model, gguf_file=None)  # a checkpoint that descends from one has weights of its own
        if record.time_embedding:
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
        raise UserError(
            f"`model`: {path!r} is an encoder-decoder ({config.model_type}); a decoder-only causal LM is needed."
        )
    return config


def _check_fingerprint(model: PreTrainedModel, record: DiffusionRecord, path: str) -> None:
    ours, theirs = fingerprint(model), record.base_fingerprint
    if theirs is None:
        return
    if len(ours) != len(theirs) or any(
        abs(a - b) > 0.02 * max(abs(a), abs(b)) + 1e-5 for a, b in zip(ours, theirs, strict=True)
    ):
        raise UserError(
            f"`model`: the adapter {path!r} was trained on another base than {model.config._name_or_path!r} (its weights differ); "
            f"put the base it was trained on, {record.base_model!r}, back."
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
