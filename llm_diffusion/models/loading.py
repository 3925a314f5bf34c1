"""Loads a model and converts it, reloads a converted model or adapter as it was saved, or brings a causal one, from nothing too."""

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
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from .. import UserError
from ..objective.settings import check_value
from .attention import make_causal
from .checkpoints import (
    EMBEDDED,
    adapter_base,
    best_device,
    check_complete,
    check_device,
    download,
    from_hub,
    gguf_path,
    is_adapter,
    load_adapter,
    load_gguf,
    load_weights,
    loader_options,
    local_file,
    resolve_path,
)
from .conversion import convert_to_diffusion, fingerprint
from .forward import TIME_EMBEDDING
from .layouts import Layout, find_layout
from .lm_head import train_rows_alone
from .patching import base_of
from .probing import probe_attention
from .record import (
    CONVERSION_OPTIONS,
    SIDECAR,
    DiffusionRecord,
    autoregressive_config,
    keep_record,
    read_record,
    record_of,
    update_record,
)
from .special_tokens import check_vocabulary, grow

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
SCRATCH = ("n_embd", "n_layer", "n_head", "n_positions")


def load_diffusion_model(
    name_or_path: str,
    *,
    quantization: str | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | None = None,
    trust_remote_code: bool = False,
    gguf_file: str | None = None,
    **options: Any,
) -> tuple[torch.nn.Module, PreTrainedTokenizerBase]:
    """Loads an AR model and converts it, or reloads a converted model or adapter with the attention it was saved with.

    Published diffusion checkpoints come with their own mask token, attention and read-out, see `layouts`.

    Args:
        name_or_path: hub name, folder, or one of the embedded bases, "tiny" and "smollm2".
        quantization: None, "nf4" or "int8" (bitsandbytes).
        dtype: "auto" is the checkpoint's type on a GPU and fp32 on a CPU.
        device: "cuda", "mps" or "cpu"; None picks the best.
        gguf_file: a GGUF file in the folder or hub repository, whose weights are unpacked (2 or 4 bytes a parameter, by `dtype`).
            `quantization` takes them through bf16 in CPU memory, 2 bytes a parameter. An adapter remembers its file.
        options: `attention`, `block_length`, `clean_context`, `right_shift_logits`, `time_embedding` and `mask_token_id`, see
            `ConversionSettings`; further keywords of `from_pretrained` (`device_map`, `max_memory`, …). `revision` is the branch, tag or
            commit of the repository, for all of its files; the base under an adapter is another repository, and always the newest.

    Returns:
        `(model, tokenizer)`, in evaluation mode; an adapter comes as a trainable `PeftModel`.
    """
    repository, device = resolve_path(name_or_path), device or best_device()
    path = _at_revision(repository, options.pop("revision", None), gguf_file)
    conversion = {name: options.pop(name, None) for name in CONVERSION_OPTIONS}
    options = loader_options(device, dtype, quantization, trust_remote_code=trust_remote_code, **options)
    record = read_record(path) if (adapter := is_adapter(path)) else DiffusionRecord()
    base_path = adapter_base(path) if adapter else path
    path = download(path) if adapter else path  # by name, the tokenizer's loader looks for a config.json on the hub
    gguf_file = gguf_file or record.gguf_file
    gguf = {"gguf_file": gguf_path(base_path, gguf_file)} if gguf_file else {}
    model, layout = _load_base(base_path, options, gguf)
    if base_path == path != repository:  # adapters and cards name the repository
        model.config.name_or_path = model.name_or_path = repository
    tokenizer = _load_tokenizer(path, base_path, gguf, trust_remote_code)
    if "device_map" not in options:
        model = model.to(device)
    if layout is not None:
        layout.name_mask(tokenizer)
        conversion = conversion if adapter else layout.options(conversion)
    if adapter:
        base_of(model).config.diffusion = record.to_dict()
        _check_fingerprint(model, record, path)
        grow(model, len(tokenizer) - 1)  # tokens that its template brought
    new = getattr(model.config, "diffusion", None) is None
    convert_to_diffusion(model, tokenizer, **conversion)
    # A published diffusion model was trained elsewhere; a checkpoint that descends from a GGUF file has weights of its own.
    update_record(model, gguf_file=gguf_file, **({} if layout is None else {"annealed": True}))
    if adapter:
        model = _with_adapter(model, path)
    elif record_of(model).time_embedding and not gguf_file:
        _load_time_embedding(model, path, saved=not new)
    return model.eval(), tokenizer


def _at_revision(repository: str, revision: str | None, gguf_file: str | None) -> str:
    """The repository; of a revision the folder that holds every file as it was there."""
    if revision is None:
        return repository
    if gguf_file is not None:
        download(repository, revision, allow_patterns=[gguf_file])
    return download(repository, revision)


def _load_tokenizer(
    path: str, base_path: str, gguf: dict[str, str], trust_remote_code: bool
) -> PreTrainedTokenizerBase:
    """The checkpoint's own; an adapter may come without one, and a GGUF file has one inside."""
    if (path == base_path and not gguf) or any(local_file(path, name) for name in TOKENIZER_FILES):
        return from_hub(AutoTokenizer, path, trust_remote_code=trust_remote_code)
    return from_hub(AutoTokenizer, base_path, trust_remote_code=trust_remote_code, **gguf)


def _with_adapter(model: PreTrainedModel, path: str) -> PeftModel:
    if local_file(path, GENERATION_CONFIG_NAME) is not None:
        model.generation_config = from_hub(GenerationConfig, path)
    adapted = load_adapter(model, path)
    if record_of(model).time_embedding and TIME_EMBEDDING not in (adapted.active_peft_config.modules_to_save or ()):
        check_complete(path, missing=[TIME_EMBEDDING])
    train_rows_alone(adapted)  # PEFT would copy the vocabulary at every forward
    keep_record(adapted)
    return adapted


def _load_base(path: str, options: dict[str, Any], gguf: dict[str, str]) -> tuple[PreTrainedModel, Layout | None]:
    """The model; and the layout of a checkpoint that transformers' loaders do not know."""
    if not gguf and (layout := find_layout(path)) is not None:
        return layout.load(path, **options), layout
    config = _check_config(path, options["trust_remote_code"], gguf)
    if gguf:
        return load_gguf(config, path, **options, **gguf), None
    model = load_weights(AutoModelForCausalLM, path, **options)
    for name, folder in EMBEDDED.items():
        if path == str(folder):
            model.config.name_or_path = name
    return model, None


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
    # Of quantised weights, and by an earlier version, only the first are known.
    if any(abs(a - b) > 0.02 * max(abs(a), abs(b)) + 1e-5 for a, b in zip(ours, theirs, strict=False)):
        raise UserError(
            f"`model`: the adapter {path!r} was trained on another base than {model.config.name_or_path!r} (its weights differ); "
            f"put the base it was trained on, {record.base_model!r}, back."
        )


def _load_time_embedding(model: PreTrainedModel, path: str, saved: bool) -> None:
    """The weights of a full checkpoint's time embedding, which transformers' loader does not know."""
    index = local_file(path, SAFE_WEIGHTS_INDEX_NAME)
    names = set(json.loads(Path(index).read_text())["weight_map"].values()) if index else {SAFE_WEIGHTS_NAME}
    state = {}
    for weights in filter(None, (local_file(path, name) for name in names)):
        with safe_open(weights, framework="pt") as file:
            state |= {key: file.get_tensor(key) for key in file.keys() if key.startswith(f"{TIME_EMBEDDING}.")}
    ours = {f"{TIME_EMBEDDING}.{name}" for name, _ in model.time_embedding.named_parameters()}
    if saved:  # an AR checkpoint that is converted now has none
        check_complete(path, missing=ours - set(state))
        model.load_state_dict(state, strict=False)


def load_autoregressive(
    name_or_path: str, *, device: str | None = None, trust_remote_code: bool = False, **options: Any
) -> tuple[torch.nn.Module, PreTrainedTokenizerBase]:
    """A causal model, whatever it was saved as: an AR checkpoint or adapter as it is, a diffusion checkpoint causal again.

    Args:
        options: keywords of `from_pretrained`.

    Raises:
        UserError: a diffusion adapter, whose weights mean nothing without its attention; or attention that stays open.
    """
    repository, device = resolve_path(name_or_path), device or best_device()
    path = _at_revision(repository, options.pop("revision", None), options.get("gguf_file"))
    remote = {"trust_remote_code": trust_remote_code}
    options = loader_options(device, **options, **remote)
    tokenizer = from_hub(AutoTokenizer, path, **remote)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    if is_adapter(path):
        if local_file(path, SIDECAR) is not None:
            raise UserError(
                f"`model`: {name_or_path!r} is an adapter of a diffusion model, which `pipeline`='arm' cannot train; name its base, "
                f"{adapter_base(path)!r}, or merge it first."
            )
        model, _ = _load_base(adapter_base(path), options, {})
        if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
            model.resize_token_embeddings(len(tokenizer))  # the rows are the adapter's, as PEFT saves them
        model = load_adapter(model, path)
    else:
        if (layout := find_layout(path)) is not None:
            model = layout.load(path, **options)
            layout.name_mask(tokenizer)
        else:
            config = from_hub(AutoConfig, path, **remote)
            vars(config).pop("diffusion", None)
            make_causal(config)
            model = load_weights(AutoModelForCausalLM, path, config=config, **options)
        if path != repository:
            model.config.name_or_path = model.name_or_path = repository
        if tokenizer.mask_token_id is not None:
            model.generation_config, _ = autoregressive_config(model.generation_config)
            model.generation_config.suppress_tokens = [tokenizer.mask_token_id]
    check_vocabulary(model, tokenizer)
    if "device_map" not in options:
        model = model.to(device)
    if (attention := probe_attention(model)) != "causal":
        raise UserError(f"`model`: {name_or_path!r} attends {attention} from left to right, not causally.")
    return model.eval(), tokenizer


def autoregressive_base(name_or_path: str) -> str:
    """What `load_autoregressive` loads in place of a diffusion adapter: the base under it; any other model is its own."""
    path = resolve_path(name_or_path)
    if is_adapter(path) and local_file(path, SIDECAR) is not None:
        return adapter_base(path)
    return name_or_path


def scratch_model(
    scratch: dict[str, int], tokenizer_of: str, *, seed: int = 0, device: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A GPT-2 with random weights and the vocabulary of another model's tokenizer, autoregressive as any start.

    Args:
        scratch: `n_embd`, `n_layer`, `n_head`, `n_positions`.
        tokenizer_of: hub name, folder or "tiny".
        seed: of the weights.
    """
    device = device or best_device()
    check_device(device)
    tokenizer = from_hub(AutoTokenizer, resolve_path(tokenizer_of))
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = GPT2Config(vocab_size=len(tokenizer), **scratch, **ends, name_or_path="scratch")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = GPT2LMHeadModel(config)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return model.to(device).eval(), tokenizer


def check_scratch(scratch: dict[str, Any], max_length: int) -> None:
    """Raises UserError, naming the value, for a shape that cannot be built or is too short for the data."""
    if set(scratch) != set(SCRATCH):
        raise UserError(f"`scratch` must have the keys {list(SCRATCH)}, got {sorted(scratch)}.")
    for name, value in scratch.items():
        check_value(f"scratch.{name}", value, int, {"min": 1, "max": 65536})
    if scratch["n_embd"] % scratch["n_head"]:
        raise UserError(f"`scratch`: `n_head` ({scratch['n_head']}) must divide `n_embd` ({scratch['n_embd']}).")
    if max_length > scratch["n_positions"]:
        raise UserError(f"`max_length` ({max_length}) exceeds the {scratch['n_positions']} positions of `scratch`.")


def check_positions(model: torch.nn.Module, max_length: int) -> None:
    """Refuses rows that are longer than the positions of a model, learned or turned."""
    positions = getattr(base_of(model).config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and max_length > positions:
        raise UserError(f"`max_length` ({max_length}) exceeds the {positions} positions of the model; shorten it.")
