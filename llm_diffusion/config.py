"""The settings of the main job: one flat schema for JSON, YAML and presets.

Precedence: defaults < preset < `--config` file < `--hyper-parameters-json`. The flat config.json of DiffuGPT experiments is read
too, see `diffugpt_config`. Every field of `DiffusionSFTConfig` (and so of TRL's
and transformers' arguments) is a key too. An unknown key or a wrong type is one clear error.
Trade-off: a dataclass and a short checker. Alternative: HfArgumentParser, whose YAML reader turns 2e-5 into a string, or pydantic,
which accepts misspelt keys of a TrainingArguments subclass.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import json
import math
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from peft import LoraConfig
from transformers import BitsAndBytesConfig, GenerationConfig
from trl import SFTConfig

from . import UserError
from .diffugpt_config import is_diffugpt_config, read_diffugpt_config, strip_comments
from .generation.config import DiffusionGenerationConfig
from .models.special_tokens import TOKEN_IDS
from .pipelines import check_pipeline as known_pipeline
from .pipelines import check_scratch
from .training.config import DiffusionDPOConfig, DiffusionSFTConfig
from .training.stages import TRAINS

PRESETS = Path(__file__).parent / "presets"
SEED_LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass
class HyperParameters:
    """Settings of the main job. Names and defaults of the first block are promises.

    Keys beyond these are fields of `DiffusionSFTConfig` and go into `training`; `pretrain_config` and `sft_config` hold such
    fields for one phase alone, `dpo_config` fields of `DiffusionDPOConfig`. Preferences are the pairs of `preference_dataset`, or
    injected errors in the training data's answers (see `pairs`). `stages` replace the phases: each a `name`, what it `trains` ("attention", "adapters" or
    "everything", see `conversion.select_parameters`), and fields for it alone. `model_init_kwargs` are keywords of
    `from_pretrained`: `device_map`, `max_memory`, `attn_implementation`, `gguf_file`, `revision`, …
    `pipeline` "arm" trains and decodes from left to right, by TRL's own trainer. `scratch` (`n_embd`, `n_layer`, `n_head`,
    `n_positions`) is a GPT-2 built from nothing, with the tokenizer of `model`. `token_ids`: ids of the end ("eos") and padding
    token ("pad") where they are not the tokenizer's. `prompts` are what `llm-diffusion generate --config` continues, and
    the job of "arm" at its end.
    """

    model: str = "Qwen/Qwen3-4B-Instruct-2507"
    dataset: str = "allenai/tulu-3-sft-mixture-0225"
    epochs: float = 1
    batch_size: int = 16
    learning_rate: float = 2e-4
    gradient_accumulation_steps: int = 4
    use_qlora: bool = False
    max_length: int = 768
    debug: bool = False
    seed: int = 42
    test_size: float = 0.01
    dataloader_num_workers: int = 0
    output_dir: str = "/tmp/output"
    diffusion_steps: int = 10
    lora_config: dict[str, Any] = field(
        default_factory=lambda: {
            "r": 16,
            "lora_alpha": 32,
            "lora_dropout": 0.05,
            "target_modules": list(SEED_LORA_TARGETS),
            "bias": "none",
        }
    )
    qlora_config: dict[str, Any] = field(
        default_factory=lambda: {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": "bfloat16",
        }
    )
    wandb_config: dict[str, Any] = field(
        default_factory=lambda: {"project": "llm-diffusion", "entity": None, "wandb_log_path": "/tmp/wandb"}
    )
    use_wandb: bool = False

    pipeline: str = "diffusion"
    scratch: dict[str, Any] = field(default_factory=dict)
    token_ids: dict[str, Any] = field(default_factory=dict)
    prompts: list[str] = field(default_factory=list)
    use_lora: bool = True
    phases: list[str] = field(default_factory=lambda: ["pretrain", "sft"])
    stages: list[dict[str, Any]] = field(default_factory=list)
    max_examples: int | None = None
    answers_from_base: bool = False
    eval_examples: int = 0
    eval_answers: int = 0
    generation: dict[str, Any] = field(default_factory=lambda: {"max_new_tokens": 128, "block_length": 32})
    device: str | None = None
    num_threads: int | None = None
    trust_remote_code: bool = False
    model_init_kwargs: dict[str, Any] = field(default_factory=dict)
    pretrain_config: dict[str, Any] = field(default_factory=dict)
    sft_config: dict[str, Any] = field(default_factory=dict)
    dpo_config: dict[str, Any] = field(default_factory=dict)
    preference_dataset: str | None = None
    training: dict[str, Any] = field(default_factory=dict)


OWN_KEYS = {f.name for f in dataclasses.fields(HyperParameters)} - {"training"}
TRAINING_KEYS = {f.name for f in dataclasses.fields(DiffusionSFTConfig)}
DPO = "dpo"  # the phase, or stage, of preferences
DPO_KEYS = {f.name for f in dataclasses.fields(DiffusionDPOConfig)}
PHASES = ("pretrain", "sft", DPO)
# Set by the main job itself from keys of its own.
_RENAMED = {
    "num_train_epochs": "epochs",
    "per_device_train_batch_size": "batch_size",
    "use_cpu": "device",
}


def read_mapping(source: str, what: str) -> dict[str, Any]:
    """A mapping from inline JSON or from a JSON or YAML file; ValueError says where it is malformed."""
    text, name = source, "the inline JSON"
    if not strip_comments(source).lstrip().startswith("{"):
        path = Path(source).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"`{what}`: {source!r} is neither inline JSON nor an existing file.")
        text, name = path.read_text(), str(path)
    bare = strip_comments(text)
    try:
        loaded = json.loads(bare) if bare.lstrip().startswith("{") else yaml.safe_load(text)
    except (json.JSONDecodeError, yaml.YAMLError) as error:
        place = (
            f"line {error.lineno}, column {error.colno}: {error.msg}"
            if isinstance(error, json.JSONDecodeError)
            else str(error)
        )
        raise UserError(f"`{what}`: {name} is malformed, {' '.join(place.split())}.") from error
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise UserError(f"`{what}`: {name} must hold a mapping of settings, found {type(loaded).__name__}.")
    return loaded


def preset_names() -> list[str]:
    return sorted(path.stem for path in PRESETS.glob("*/*.yaml"))


def read_preset(names: str) -> dict[str, Any]:
    """The settings of a preset, or of several joined by "+", later ones winning: `qwen3-4b+rtx4080`."""
    merged: dict[str, Any] = {}
    if names not in preset_names():  # `phi-2-3stage` is short for `phi-2+3stage`
        names = names.replace("-3stage", "+3stage")
    for name in names.split("+"):
        found = sorted(PRESETS.glob(f"*/{name}.yaml")) if name.strip() else []
        if not found:
            close = difflib.get_close_matches(name, preset_names(), n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise UserError(f"preset {name!r} is unknown{hint} There are: {', '.join(preset_names())}.")
        merged = merge(merged, read_mapping(str(found[0]), "preset"))
    return merged


def merge(low: dict[str, Any], high: dict[str, Any]) -> dict[str, Any]:
    """`high` over `low`; nested mappings are merged key by key."""
    merged = dict(low)
    for key, value in high.items():
        merged[key] = merge(low[key], value) if isinstance(value, dict) and isinstance(low.get(key), dict) else value
    return merged


def resolve(
    preset: str | None = None, config: str | None = None, hyper_parameters: str | None = None
) -> HyperParameters:
    """All layers merged and checked.

    Raises:
        ValueError, FileNotFoundError: naming the key, what was found and what was expected.
    """
    return build(layers(preset, config, hyper_parameters))


def layers(preset: str | None, config: str | None, hyper_parameters: str | None) -> dict[str, Any]:
    """Preset < file < JSON, merged, not checked."""
    own = read_mapping(config, "--config") if config else {}
    if hyper_parameters:
        own = merge(own, read_mapping(hyper_parameters, "--hyper-parameters-json"))
    if is_diffugpt_config(own):
        own = read_diffugpt_config(own)
    return merge(read_preset(preset) if preset else {}, own)


def build(given: dict[str, Any]) -> HyperParameters:
    """Checks a mapping of settings and fills in the defaults."""
    hp = HyperParameters()
    if given.get("pipeline") == "arm":
        hp.generation = {"max_new_tokens": 128}
    hints = typing.get_type_hints(HyperParameters)
    for key, value in given.items():
        if key in OWN_KEYS:
            value = check_type(key, value, hints[key])
            setattr(hp, key, merge(getattr(hp, key), value) if isinstance(value, dict) else value)
        else:
            if key == "resume_from_checkpoint":
                raise UserError(
                    "`resume_from_checkpoint` belongs to the trainers in Python; the main job has `--resume`."
                )
            check_training_key(key)
            hp.training[key] = check_training_value(key, value)
    for name in ("pretrain_config", "sft_config", "dpo_config"):
        for key in (nested := getattr(hp, name)):
            nested[key] = check_stage_value(key, nested[key], name, preferences=name == "dpo_config")
    check_ranges(hp)
    hp.stages = check_stages(hp.stages)
    if hp.training.get("attention") == "lossless" and any(stage["name"] == DPO for stage in stages_of(hp)):
        raise UserError(
            "`attention`='lossless': a drafter's words are verified by its base, whose preferences it cannot change; leave 'dpo' out."
        )
    check_pipeline(hp)
    if hp.training.get("attention") == "lossless" and any(stage["trains"] == "everything" for stage in stages_of(hp)):
        raise UserError(
            "`attention`='lossless' trains adapters, beside a base that stays as it is: `use_lora` is true, and no stage trains 'everything'."
        )
    memory = hp.model_init_kwargs.get("max_memory")
    if isinstance(memory, dict):  # JSON has no integer keys, and accelerate numbers the cards by integers
        hp.model_init_kwargs["max_memory"] = {int(k) if str(k).isdigit() else k: v for k, v in memory.items()}
    return hp


def stages_of(hp: HyperParameters) -> list[dict[str, Any]]:
    """The stages as given, or the phases as stages."""
    pretrain = {"completion_only_loss": False, **hp.pretrain_config}
    phases = {"pretrain": pretrain, "sft": hp.sft_config, DPO: hp.dpo_config}
    trains = "adapters" if hp.use_lora else "everything"
    stages = hp.stages or [{"name": phase, **phases[phase]} for phase in hp.phases]
    return [{"trains": trains, **stage} for stage in stages]


def check_stages(stages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Stages with checked names, keys and types."""
    names = [stage.get("name") for stage in stages]
    if not all(isinstance(name, str) and name.isidentifier() for name in names) or len(set(names)) < len(names):
        raise UserError(f"`stages`: every stage needs a `name` of its own, letters and digits, got {names}.")
    check_order("stages", names)
    checked = []
    for stage in stages:
        where = f"stages.{stage['name']}"
        if stage.get("trains", "adapters") not in TRAINS:
            raise UserError(f"`{where}.trains` must be one of {TRAINS}, got {stage['trains']!r}.")
        own = {key: stage[key] for key in ("name", "trains") if key in stage}
        for key in [key for key in stage if key not in own]:
            own[key] = check_stage_value(key, stage[key], where, preferences=stage["name"] == DPO)
        checked.append(own)
    return checked


def check_order(key: str, names: list[str]) -> None:
    """Refuses an order in which a result would be saved under another one's name."""
    if DPO in names[:-1]:
        raise UserError(
            f"`{key}`: 'dpo' must be the last one, because the result is saved as `dpo_model`, got {names}."
        )
    if "sft" in [name for name in names if name != DPO][:-1]:
        raise UserError(
            f"`{key}`: only the last one may be called 'sft' (but for 'dpo' behind it), because the result is saved as `sft_model`, got {names}."
        )


def check_stage_value(key: str, value: Any, where: str, preferences: bool) -> Any:
    """`value` of a key of one stage alone, as its trainer's config wants it."""
    config, keys = (DiffusionDPOConfig, DPO_KEYS) if preferences else (DiffusionSFTConfig, TRAINING_KEYS)
    check_training_key(key, where, keys)
    return check_type(key, value, typing.get_type_hints(config)[key])


def check_training_key(key: str, where: str = "", keys: set[str] = TRAINING_KEYS) -> None:
    inside = f" in `{where}`" if where else ""
    if key in _RENAMED and not where:
        raise UserError(f"`{key}` is called `{_RENAMED[key]}` here.")
    if key not in keys:
        close = difflib.get_close_matches(key, sorted(keys if where else OWN_KEYS | keys), n=1)
        raise UserError(
            f"unknown key `{key}`{inside}" + (f"; did you mean `{close[0]}`?" if close else "; see config.yaml.")
        )
    return key


def check_training_value(key: str, value: Any) -> Any:
    return check_type(key, value, typing.get_type_hints(DiffusionSFTConfig)[key])


def check_type(key: str, value: Any, hint: Any) -> Any:
    """`value` as the type `hint` wants it; numbers written as text (YAML's 2e-4) are read as numbers.

    Raises:
        ValueError: wrong type.
    """
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    origins = [typing.get_origin(option) or option for option in options]
    if value is None and type(None) in origins:
        return None
    if any(origin is Any for origin in origins):
        return value
    for option, origin in zip(options, origins, strict=True):
        if origin is Literal and value in typing.get_args(option):
            return value
        if origin is bool and isinstance(value, bool):
            return value
        if origin is int and isinstance(value, int) and not isinstance(value, bool):
            return value
        if origin is float and (number := _as_float(value)) is not None:
            return number
        if isinstance(origin, type) and origin not in (bool, int, float) and isinstance(value, origin):
            return value
    if not any(origin in (bool, int, float, str, list, dict, tuple) for origin in origins):
        return value  # an enum or object of the host, which checks it itself
    expected = " or ".join("null" if o is type(None) else getattr(o, "__name__", str(o)) for o in origins)
    raise UserError(f"`{key}` must be {expected}, got {value!r} ({type(value).__name__}).")


def _as_float(value: Any) -> float | None:
    if isinstance(value, bool):
        return None
    if isinstance(value, int | float):
        return float(value)
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return None
    return None


def check_ranges(hp: HyperParameters) -> None:
    at_least = {
        "batch_size": 1,
        "gradient_accumulation_steps": 1,
        "max_length": 2,
        "diffusion_steps": 1,
        "dataloader_num_workers": 0,
        "max_examples": 2,
        "eval_examples": 0,
        "eval_answers": 0,
        "num_threads": 1,
    }
    for name, least in at_least.items():
        value = getattr(hp, name)
        if value is not None and value < least:
            raise UserError(f"`{name}` must be at least {least}, got {value}.")
    for name in ("epochs", "learning_rate", "test_size"):
        if not (math.isfinite(getattr(hp, name)) and getattr(hp, name) > 0):
            raise UserError(f"`{name}` must be above 0, got {getattr(hp, name)}.")
    for name, keys in (
        ("wandb_config", set(HyperParameters().wandb_config)),
        ("qlora_config", set(inspect.signature(BitsAndBytesConfig).parameters) - {"kwargs"}),
        ("lora_config", {f.name for f in dataclasses.fields(LoraConfig)}),
    ):
        if unknown := sorted(set(getattr(hp, name)) - keys):
            raise UserError(f"`{name}`: unknown key(s) {unknown}.")
    for key, value in hp.lora_config.items():
        hp.lora_config[key] = check_type(f"lora_config.{key}", value, typing.get_type_hints(LoraConfig)[key])
    if not hp.phases or set(hp.phases) - set(PHASES) or len(set(hp.phases)) < len(hp.phases):
        raise UserError(f"`phases` must be a non-empty list, each once, of {list(PHASES)}, got {hp.phases}.")
    check_order("phases", hp.phases)
    if hp.pipeline != "arm":
        DiffusionGenerationConfig(**hp.generation)
    if hp.device not in (None, "cuda", "mps", "cpu"):
        raise UserError(
            f"`device` must be cuda, mps or cpu, got {hp.device!r}; choose one GPU with CUDA_VISIBLE_DEVICES."
        )


def check_pipeline(hp: HyperParameters) -> None:
    """What belongs to one pipeline alone, and to models from nothing."""
    known_pipeline(hp.pipeline)
    if unknown := sorted(set(hp.token_ids) - set(TOKEN_IDS)):
        raise UserError(f"`token_ids`: unknown key(s) {unknown}; there are {list(TOKEN_IDS)}.")
    for name in hp.token_ids:
        check_type(f"token_ids.{name}", hp.token_ids[name], int)
    if hp.scratch:
        check_scratch(hp.scratch, hp.max_length)
        if hp.use_lora or hp.use_qlora:
            raise UserError("`scratch`: a model from nothing trains all its weights; set `use_lora` to false.")
    if hp.pipeline == "arm":
        if any(stage["name"] == DPO for stage in stages_of(hp)):
            raise UserError("`pipeline`='arm' has no preferences; leave 'dpo' out, TRL has a trainer of its own.")
        own = {key for stage in stages_of(hp) for key in (*stage, *hp.training) if key in TRAINING_KEYS}
        if foreign := sorted(own - {f.name for f in dataclasses.fields(SFTConfig)}):
            raise UserError(f"{foreign} belong to `pipeline`='diffusion'; leave them out.")
        if unknown := sorted(set(hp.generation) - set(vars(GenerationConfig()))):
            raise UserError(f"`generation`: {unknown} are no settings of left-to-right decoding; leave them out.")


def as_dict(hp: HyperParameters) -> dict[str, Any]:
    """Flat mapping in the schema that `build` reads."""
    flat = dataclasses.asdict(hp)
    training = flat.pop("training")
    return {**flat, **training}
