"""Checkpoints: where their files are, where and how wide they are loaded, and bases from GGUF files."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from peft import PeftConfig, PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GgufConfig, PretrainedConfig, PreTrainedModel
from transformers.utils import ADAPTER_CONFIG_NAME

from .. import UserError
from ..objective.settings import read_path
from . import smollm2

TINY_MODEL_PATH = Path(__file__).parents[1] / "data" / "tiny_base"
EMBEDDED = {"tiny": TINY_MODEL_PATH, smollm2.NAME: smollm2.FOLDER}
QUANTIZATIONS = ("nf4", "int8")

# -- files


def resolve_path(name_or_path: str | Path) -> str:
    """ "tiny" or "smollm2" -> the folder of the base. A path that does not exist is refused before the hub is queried for it."""
    name_or_path = str(name_or_path)
    if name_or_path in EMBEDDED:
        if name_or_path == smollm2.NAME:
            smollm2.unpack()
        return str(EMBEDDED[name_or_path])
    looks_local = name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") > 1
    path = read_path("model", name_or_path)
    if looks_local and not path.exists():
        raise FileNotFoundError(
            f"`model`: the folder {name_or_path!r} does not exist; give an existing folder or a hub name."
        )
    return str(path) if path.exists() else name_or_path


def from_hub(loader: Any, *arguments: Any, **options: Any) -> Any:
    """`loader.from_pretrained`, whose dozen types of errors become one OSError that names the checkpoint, the last of `arguments`."""
    try:
        return loader.from_pretrained(*arguments, **options)
    except (ImportError, torch.OutOfMemoryError):
        raise  # they name what to install, or are not the checkpoint's fault
    except Exception as error:
        raise _refusal(arguments[-1], error) from error


def load_weights(loader: Any, *arguments: Any, **options: Any) -> PreTrainedModel:
    """`from_hub` of a model, all of whose tensors must be in the checkpoint: transformers draws the others at random."""
    checks = {"output_loading_info": True, "ignore_mismatched_sizes": True}  # its own error names no tensor
    model, found = from_hub(loader, *arguments, **checks, **options)
    wrong = [f"{name} (is {tuple(there)}, must be {tuple(ours)})" for name, there, ours in found["mismatched_keys"]]
    check_complete(arguments[-1], missing=found["missing_keys"], of_another_shape=wrong)
    return model


def check_complete(path: str, **wrong: Any) -> None:
    """Raises OSError with the names of tensors that are wrong in a checkpoint, by what is wrong with them."""
    for what, names in wrong.items():
        if names := sorted(names):
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            why = f"tensors {what.replace('_', ' ')}: {shown}"
            raise CheckpointError(f"`model`: {path!r} is not a loadable checkpoint: {why}.")


def load_adapter(model: PreTrainedModel, path: str) -> PeftModel:
    """A trainable adapter over its base, all of whose tensors are there, finite, and used: PEFT warns of some, and ignores others."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Found missing adapter keys")
        adapted = from_hub(PeftModel, model, path, is_trainable=True)
    found = adapted.load_adapter(path, adapted.active_adapter, is_trainable=True)  # again, for what it found
    trained = ((name, weight) for name, weight in adapted.named_parameters() if weight.requires_grad)
    infinite = [name for name, weight in trained if not weight.isfinite().all()]
    prefix = getattr(adapted.base_model, "prefix", "")
    unused = [name for name in found.unexpected_keys if prefix in name]  # a grown embedding is saved too
    check_complete(path, missing=found.missing_keys, without_a_place=unused, non_finite=infinite)
    return adapted


class CheckpointError(UserError, OSError):
    """What cannot be loaded; of the type that transformers raises, whichever that is."""


def _refusal(name: str, error: Exception) -> CheckpointError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if Path(name).exists() or not isinstance(error, OSError | HFValidationError):
        return CheckpointError(f"`model`: {name!r} is not a loadable checkpoint: {reason}")
    return CheckpointError(
        f"`model`: {name!r} is neither a folder here nor available from the hub (offline, unknown or gated); check the name, "
        f"log in with `hf auth login`, or give a local folder. The loader's reason: {reason}"
    )


def download(name: str, revision: str | None = None, **patterns: Any) -> str:
    """Fetches a model's files from the hub; the folder they are in. `patterns` are keywords of `snapshot_download`, for some of them."""
    path = resolve_path(name)
    if Path(path).exists():
        return path
    wanted = patterns or {"ignore_patterns": ["*.bin", "*.pth", "*.h5", "*.msgpack", "*.onnx", "*.gguf"]}
    try:
        folder = snapshot_download(path, revision=revision, **wanted)
        if not patterns and not any(Path(folder).glob("*.safetensors")):  # as older repositories are
            snapshot_download(path, revision=revision, allow_patterns=["*.bin"])
        return folder
    except Exception as error:
        raise _refusal(name, error) from error


def local_file(path: str, file: str) -> str | None:
    """Where a file of a folder or hub repository is on this machine, fetched if need be; None: there is no such file."""
    found = Path(download(path, allow_patterns=[file])) / file
    return str(found) if found.exists() else None


def is_adapter(path: str) -> bool:
    return local_file(path, ADAPTER_CONFIG_NAME) is not None


def adapter_base(path: str) -> str:
    """Path or name of the base under an adapter, a folder or hub repository."""
    base = from_hub(PeftConfig, path).base_model_name_or_path
    try:
        return resolve_path(base)
    except FileNotFoundError as error:
        for name, folder in EMBEDDED.items():
            if Path(base).name == folder.name:  # it is elsewhere on every machine
                return resolve_path(name)
        raise FileNotFoundError(
            f"`model`: the base {base!r} of the adapter {path!r} does not exist; put it back or train again."
        ) from error


# -- where and how wide


def best_device() -> str:
    """ "cuda", "mps" or "cpu", whichever is there first."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def check_device(device: str) -> None:
    """Raises ValueError for a device that is unknown or not there."""
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if device not in there:
        raise UserError(f"`device` must be cuda, mps or cpu, got {device!r}; choose one GPU with CUDA_VISIBLE_DEVICES.")
    if not there[device]:
        raise UserError(f"`device`: there is no {device} on this machine; leave it out to take the best there is.")


def quantization_config(kind: str | None, device: str, **options: Any) -> BitsAndBytesConfig | None:
    """bitsandbytes settings for "nf4" (double quantisation) or "int8"; `options` replace single keys.

    Raises:
        ValueError: unknown kind, or a device without bitsandbytes kernels.
        ImportError: bitsandbytes is not installed.
    """
    if kind is None:
        return None
    if kind not in QUANTIZATIONS:
        raise UserError(f"`quantization` must be one of {QUANTIZATIONS} or None, got {kind!r}.")
    if device.startswith("mps"):
        raise UserError(
            "`quantization`: bitsandbytes has no kernels for MPS; set `use_qlora` to false on Apple Silicon."
        )
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "`quantization`: bitsandbytes is not installed; run `pip install 'llm-diffusion[qlora]'` or set `use_qlora` to false."
        ) from error
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, **options)
    compute = torch.bfloat16 if device.startswith("cuda") and torch.cuda.is_bf16_supported() else torch.float32
    nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": compute}
    return BitsAndBytesConfig(**{"load_in_4bit": True, **nf4, **options})


def loader_options(
    device: str, dtype: str | torch.dtype = "auto", quantization: str | None = None, **options: Any
) -> dict[str, Any]:
    """Keywords of `from_pretrained` for a device, a type and a quantisation; `options` come first."""
    quantized = options.pop("quantization_config", None) or quantization_config(quantization, device)
    check_device(device)
    older = options.pop("torch_dtype", None)  # what `from_pretrained` called it, and would leave aside for ours
    dtype = older if dtype == "auto" and older is not None else dtype
    options = {"dtype": torch.float32 if (dtype, device) == ("auto", "cpu") else dtype, **options}
    if quantized is not None:
        options["quantization_config"] = quantized
    if quantized is not None or device == "cuda":
        options.setdefault("device_map", {"": device})
    return options


# -- GGUF


def load_gguf(config: PretrainedConfig, path: str, **options: Any) -> PreTrainedModel:
    """A base from a GGUF file; transformers refuses to quantise one while it reads it, so that is a second step."""
    if options["dtype"] == "auto":
        options["dtype"] = config.dtype or torch.bfloat16  # transformers would take fp32
    quantized = options.pop("quantization_config", None)
    last = {}
    if quantized is not None:
        last = {key: options.pop(key) for key in ("device_map", "max_memory", "dtype") if key in options}
        options["dtype"] = torch.bfloat16
    # Without `dequantize` the model would pass for a quantised one, which is neither trained nor saved.
    unpack = GgufConfig(dequantize=True)
    model = load_weights(AutoModelForCausalLM, path, config=config, quantization_config=unpack, **options)
    if quantized is not None:
        last |= {"config": model.config, "state_dict": model.state_dict(), "quantization_config": quantized}
        model = type(model).from_pretrained(None, **last)
    model.name_or_path = model.config.name_or_path = path  # where PEFT looks for the base
    return model


def gguf_path(path: str, gguf_file: str) -> str:
    """transformers takes a bare name from the working directory first, hence the whole path."""
    file = Path(path) / gguf_file
    if Path(path).is_dir() and not file.is_file():
        there = ", ".join(sorted(entry.name for entry in Path(path).glob("*.gguf"))) or "none"
        raise FileNotFoundError(f"`gguf_file`: {path!r} has no {gguf_file!r}; GGUF files there: {there}.")
    return str(file.resolve()) if file.is_file() else gguf_file
