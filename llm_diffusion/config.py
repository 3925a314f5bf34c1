"""The settings of the main job: one flat schema for JSON, YAML and presets.

Precedence: defaults < preset < `--config` file < `--hyper-parameters-json`. Every field of `DiffusionSFTConfig`, so of TRL's and
transformers' arguments, is a key too. `python -m llm_diffusion.config` prints docs/settings.md, and with `--yaml` config.yaml.

TRL, PEFT and transformers are imported where their settings are checked, so that `--help` is answered at once.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import json
import re
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from loguru import logger

from . import UserError
from .objective.settings import (
    SEEDS,
    check_settings,
    check_value,
    default_of,
    hints_of,
    merge,
    read_path,
    read_setting,
    read_value,
    setting,
    settings_table,
    user_settings,
)
from .presets import is_diffugpt_config, left_aside, read_diffugpt_config, read_preset
from .presets.files import read_mapping

SEED_LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LORA = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.05, "target_modules": SEED_LORA_TARGETS, "bias": "none"}
QLORA = {
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": "bfloat16",
}
WANDB = {"project": "llm-diffusion", "entity": None, "wandb_log_path": "/tmp/wandb"}
DPO = "dpo"  # the phase, or stage, of preferences
PHASES = ("pretrain", "sft", DPO)


@dataclass
class HyperParameters:
    """Settings of the main job, keys of JSON and YAML files; every field of `DiffusionSFTConfig` is a key too, see `training`."""

    model: str = setting("Qwen/Qwen3-4B-Instruct-2507", 'Hub name, folder, "tiny" or "smollm2".')
    dataset: str = setting(
        "allenai/tulu-3-sft-mixture-0225",
        'Hub name, saved dataset, folder or file of txt, JSONL or Parquet, "tiny", or "self": prompts and answers of the model itself; several with a number or share of rows each: "a:2000, b.jsonl:0.5, tiny".',
    )
    pipeline: str = setting("diffusion", "`arm`: from left to right, TRL's own training.", choices=("diffusion", "arm"))
    epochs: float = setting(1, "Epochs of each phase.", above=0, max=1_000_000)
    batch_size: int = setting(16, "Rows of a micro-batch on each device.", min=1)
    gradient_accumulation_steps: int = setting(4, "Micro-batches of an optimiser step.", min=1)
    learning_rate: float = setting(2e-4, "Highest learning rate.", above=0, max=1000)
    max_length: int = setting(768, "Tokens of a row; longer ones are cut.", min=2)
    output_dir: str = setting(
        "/tmp/output", "Checkpoints; the result is in its folder `sft_model`, after preferences in `dpo_model`."
    )
    test_size: float = setting(0.01, "Share (below 1) or number of examples held out.", above=0, whole=True)
    max_examples: int | None = setting(None, "Training examples at most.", min=2)
    seed: int = setting(42, "Of data, noise and weights.", **SEEDS)
    debug: bool = setting(False, '100 examples, and names of runs that begin with "debug-".')
    phases: list[str] = setting(
        ["pretrain", "sft"], "`pretrain`: every token may be masked; `sft`: prompts stay clean; `dpo`: preferences."
    )
    stages: list[dict[str, Any]] = setting(
        [], "Instead of phases: each a `name`, what it `trains` (attention, adapters, everything), training settings."
    )
    pretrain_config: dict[str, Any] = setting({}, "Training settings of the phase `pretrain` alone.")
    sft_config: dict[str, Any] = setting({}, "Training settings of the phase `sft` alone.")
    dpo_config: dict[str, Any] = setting({}, "Settings of the phase `dpo` alone, fields of `DiffusionDPOConfig`.")
    preference_dataset: str | None = setting(
        None, "Pairs with `chosen` and `rejected`; None: the data's answers beside wrong ones made from them."
    )
    answers_from_base: bool = setting(False, "Train on the AR base's own answers instead of the data's.")
    use_lora: bool = setting(True, "False: all weights are trained.")
    lora_config: dict[str, Any] = setting(LORA, "PEFT's; `target_modules` may also be `all-linear` or `attention`.")
    use_qlora: bool = setting(False, "4-bit base under the adapters; CUDA, or CPU for tests.")
    qlora_config: dict[str, Any] = setting(QLORA, "Of transformers' `BitsAndBytesConfig`.")
    generation: dict[str, Any] = setting({}, "Decoding settings; what is left out is the model's own default.")
    diffusion_steps: int | None = setting(
        None, "Denoising steps of a block, unless `generation` has another rule; None: the model's own rule.", min=1
    )
    eval_examples: int = setting(0, "Held-out prompts answered before and after training.", min=0)
    eval_answers: int = setting(0, "Held-out prompts answered at every evaluation during training.", min=0)
    prompts: list[str] = setting([], "Texts that `generate --config` continues, and the pipeline `arm` at its end.")
    scratch: dict[str, Any] = setting(
        {}, "`n_embd`, `n_layer`, `n_head`, `n_positions`: a GPT-2 from nothing, with the tokenizer of `model`."
    )
    token_ids: dict[str, Any] = setting({}, "`eos` and `pad`, where they are not the tokenizer's own.")
    device: str | None = setting(None, "None: the best there is.", choices=("cuda", "mps", "cpu"))
    num_threads: int | None = setting(None, "CPU threads.", min=1)
    dataloader_num_workers: int = setting(0, "Processes that prepare batches.", min=0)
    trust_remote_code: bool = setting(False, "Run the model's own code.")
    model_init_kwargs: dict[str, Any] = setting(
        {}, "Keywords of `from_pretrained`: device_map, max_memory, attn_implementation, gguf_file, revision, …"
    )
    use_wandb: bool = setting(False, "Log to Weights & Biases.")
    wandb_config: dict[str, Any] = setting(WANDB, "Project, entity, and the folder of its files.")
    training: dict[str, Any] = field(default_factory=dict)


OWN_KEYS = {f.name for f in dataclasses.fields(HyperParameters)} - {"training"}
LORA_BOUNDS: dict[str, dict[str, Any]] = {
    "r": {"min": 1, "max": 65536},
    "lora_alpha": {"min": 1, "max": 65536},
    "lora_dropout": {"min": 0, "below": 1},
    "bias": {"choices": ("none", "all", "lora_only")},
    "task_type": {"choices": ("CAUSAL_LM",)},
    "inference_mode": {"choices": (False,)},  # would freeze the adapters
}
QLORA_BOUNDS: dict[str, dict[str, Any]] = {
    "bnb_4bit_quant_type": {"choices": ("nf4", "fp4")},
    "bnb_4bit_compute_dtype": {"choices": ("bfloat16", "float16", "float32")},
    "llm_int8_threshold": {"min": 0},
}
# Keys of the trainers that the main job sets itself; and those that one stage cannot have for itself.
_OF_THE_RUN = "output_dir use_cpu resume_from_checkpoint model_init_kwargs trust_remote_code dataset_text_field".split()
_RENAMED = {
    "num_train_epochs": "`epochs`",
    "per_device_train_batch_size": "`batch_size`",
    "use_cpu": "`device`",
    "resume_from_checkpoint": "`--resume`, and belongs to the trainers in Python,",
}


# -- reading


def layers(preset: str | None = None, config: str | None = None, hyper_parameters: str | None = None) -> dict[str, Any]:
    """Preset < file < JSON, merged, not checked."""
    own = {} if config is None else read_mapping(config, "--config")
    if hyper_parameters is not None:
        own = merge(own, read_mapping(hyper_parameters, "--hyper-parameters-json"))
    if is_diffugpt_config(own):
        aside = left_aside(own)
        for why in dict.fromkeys(aside.values()):
            logger.info("left aside: " + ", ".join(f"`{key}`" for key in aside if aside[key] == why) + f": {why}")
        own = read_diffugpt_config(own)
    return merge({} if preset is None else read_preset(preset), own)


def resolve(*given: str | None, **named: str | None) -> HyperParameters:
    """`layers`, checked. Raises UserError or FileNotFoundError, naming the key, what was found and what was expected."""
    return build(layers(*given, **named))


def as_dict(hp: HyperParameters) -> dict[str, Any]:
    """Flat mapping in the schema that `build` reads."""
    flat = dataclasses.asdict(hp)
    return flat.pop("training") | flat


# -- checking


def build(given: dict[str, Any]) -> HyperParameters:
    """Checks a mapping of settings and fills in the defaults."""
    from .training.arguments import INHERITED

    hp, hints = HyperParameters(), hints_of(HyperParameters)
    for key, value in given.items():
        if key in OWN_KEYS:
            value = read_value(key, value, hints[key])
            if isinstance(value, str) and not value.strip():
                raise UserError(f"`{key}` must not be empty.")
            setattr(hp, key, merge(getattr(hp, key), value) if isinstance(value, dict) else value)
    hp.training = _read_training({key: value for key, value in given.items() if key not in OWN_KEYS})
    for phase in PHASES:
        name = f"{phase}_config"
        setattr(hp, name, _read_training(getattr(hp, name), name, phase == DPO))
    check_settings(hp, inherited=INHERITED)
    read_path("output_dir", hp.output_dir)
    _read_nested(hp)
    _check_order(hp)
    hp.stages = [_read_stage(stage) for stage in hp.stages]
    _check_pipelines(hp)
    memory = hp.model_init_kwargs.get("max_memory")
    if isinstance(memory, dict):  # JSON has no integer keys, and accelerate numbers the cards by integers
        hp.model_init_kwargs["max_memory"] = {int(k) if str(k).isdigit() else k: v for k, v in memory.items()}
    return hp


def training_hints(preferences: bool = False) -> dict[str, Any]:
    """Keys of a stage, and their types."""
    return hints_of(_training_kind(preferences))


def _training_kind(preferences: bool) -> type:
    from .training.config import DiffusionDPOConfig, DiffusionSFTConfig

    return DiffusionDPOConfig if preferences else DiffusionSFTConfig


def _read_training(given: dict[str, Any], where: str = "", preferences: bool = False) -> dict[str, Any]:
    """Settings of the trainers; those of one stage alone, `where`, or those that all share."""
    hints = training_hints(preferences) if given else {}
    for key in given:
        if key in _RENAMED and not where:
            raise UserError(f"`{key}` is called {_RENAMED[key]} here.")
        if key in _OF_THE_RUN and where:
            raise UserError(f"`{where}.{key}`: all stages share it; set it outside of `{where}`.")
        if key not in hints:
            close = difflib.get_close_matches(key, [*hints, *([] if where else OWN_KEYS)], n=1)
            hint = f"; did you mean `{close[0]}`?" if close else "; docs/settings.md has all of them."
            raise UserError(f"unknown key `{key}`{f' in `{where}`' if where else ''}{hint}")
    return {key: _read_one(key, value, where, preferences) for key, value in given.items()}


def _read_one(key: str, value: Any, where: str, preferences: bool) -> Any:
    from .training.arguments import INHERITED

    declared = _training_kind(preferences).__dataclass_fields__[key]
    bounds = {**dict(declared.metadata.items()), **INHERITED.get(key, {})}
    name, hint = f"{where}.{key}" if where else key, training_hints(preferences)[key]
    return read_setting(name, value, hint, bounds, default_of(declared))


def _read_stage(stage: dict[str, Any]) -> dict[str, Any]:
    from .training.stages import TRAINS

    where = f"stages.{stage['name']}"
    check_value(f"{where}.trains", stage.get("trains", "adapters"), str, {"choices": TRAINS})
    rest = {key: value for key, value in stage.items() if key not in ("name", "trains")}
    return stage | _read_training(rest, where, stage["name"] == DPO)


def stages_of(hp: HyperParameters) -> list[dict[str, Any]]:
    """The stages as given, or the phases as stages."""
    pretrain = {"completion_only_loss": False, **hp.pretrain_config}
    phases = {"pretrain": pretrain, "sft": hp.sft_config, DPO: hp.dpo_config}
    stages = hp.stages or [{"name": phase, **phases[phase]} for phase in hp.phases]
    return [{"trains": "adapters" if hp.use_lora else "everything", **stage} for stage in stages]


def _check_order(hp: HyperParameters) -> None:
    """Names that are folders' too: each once, and the last ones where `stages.stage_folders` expects them."""
    if not hp.phases or any(phase not in PHASES for phase in hp.phases):
        raise UserError(f"`phases` must be a non-empty list of {list(PHASES)}, got {hp.phases}.")
    stages = [stage.get("name") for stage in hp.stages]
    for key, names in (("phases", hp.phases), ("stages", stages)):
        if not all(isinstance(name, str) and name.isidentifier() for name in names) or len(set(names)) < len(names):
            raise UserError(f"`{key}`: each needs a `name` of its own, letters and digits, got {names}.")
        if DPO in names[:-1] or "sft" in [name for name in names if name != DPO][:-1]:
            raise UserError(f"`{key}`: only the last may be called 'sft', and 'dpo' behind it, got {names}.")


def _read_nested(hp: HyperParameters) -> None:
    """Holds mappings against the names, types and ranges of what they are handed to."""
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig

    from .models.special_tokens import TOKEN_IDS

    quantization = inspect.signature(BitsAndBytesConfig).parameters.keys() - {"kwargs"}
    for name, hints, bounds in (
        ("wandb_config", dict.fromkeys(WANDB, str | None), {}),
        ("qlora_config", dict.fromkeys(quantization, Any), QLORA_BOUNDS),
        ("lora_config", hints_of(LoraConfig), LORA_BOUNDS),
        ("token_ids", dict.fromkeys(TOKEN_IDS, int), dict.fromkeys(TOKEN_IDS, {"min": 0})),
    ):
        given = getattr(hp, name)
        if unknown := sorted(given.keys() - hints.keys()):
            raise UserError(f"`{name}`: unknown key(s) {unknown}.")
        read = {k: read_setting(f"{name}.{k}", v, hints[k], bounds.get(k, {})) for k, v in given.items()}
        setattr(hp, name, read)
    if hp.use_qlora and not (hp.qlora_config.get("load_in_4bit") or hp.qlora_config.get("load_in_8bit")):
        raise UserError("`qlora_config`: set `load_in_4bit` or `load_in_8bit` to true, or leave `use_qlora` out.")
    with user_settings("`lora_config`"):
        LoraConfig(**hp.lora_config)
    for key in ("target_modules", "exclude_modules"):
        if isinstance(pattern := hp.lora_config.get(key), str):
            with user_settings(f"`lora_config.{key}`"):
                re.compile(pattern)
        elif pattern == []:
            raise UserError(f"`lora_config.{key}` must not be empty.")
    with user_settings("`qlora_config`"), suppress(ImportError):  # bitsandbytes may not be there, nor be needed
        BitsAndBytesConfig(**hp.qlora_config)


def _check_pipelines(hp: HyperParameters) -> None:
    """Rules between settings: of the two pipelines, of lossless models, and of models from nothing."""
    from trl import SFTConfig

    from .models.loading import check_scratch

    stages, lossless = stages_of(hp), hp.training.get("attention") == "lossless"
    prefers = any(stage["name"] == DPO for stage in stages)
    if lossless and prefers:
        raise UserError("`attention`='lossless': preferences cannot change the verifying base; leave 'dpo' out.")
    if lossless and any(stage["trains"] == "everything" for stage in stages):
        raise UserError("`attention`='lossless' trains adapters: set `use_lora`, let no stage train 'everything'.")
    trackers = hp.training.get("report_to", "wandb")
    if hp.use_wandb and not {"wandb", "all"} & set([trackers] if isinstance(trackers, str) else trackers or ()):
        raise UserError("`use_wandb` and a `report_to` without 'wandb' contradict each other; leave one of them out.")
    if hp.preference_dataset is not None and not prefers:
        raise UserError(
            "`preference_dataset`: no phase trains on preferences; add 'dpo' as the last one, or leave it out."
        )
    if hp.scratch:
        check_scratch(hp.scratch, hp.max_length)
        if hp.use_lora or hp.use_qlora:
            raise UserError("`scratch`: a model from nothing trains all its weights; set `use_lora` to false.")
    _check_generation(hp)
    if hp.pipeline == "diffusion":
        return
    if prefers:
        raise UserError("`pipeline`='arm' has no preferences; leave 'dpo' out, TRL has a trainer of its own.")
    own = {key for settings in (hp.training, *stages) for key in settings} & set(training_hints())
    if foreign := sorted(own - {f.name for f in dataclasses.fields(SFTConfig)}):
        raise UserError(f"{foreign} belong to `pipeline`='diffusion'; leave them out.")


def _check_generation(hp: HyperParameters) -> None:
    from .generation.config import DiffusionGenerationConfig
    from .generation.inference import check_autoregressive

    try:
        check_autoregressive(hp.generation) if hp.pipeline == "arm" else DiffusionGenerationConfig(**hp.generation)
    except Exception as error:  # transformers has several, and ours do not know that they are settings of `generation`
        raise UserError(f"`generation`: {' '.join(str(error).split())}") from error


# -- what is generated from the declarations


def settings_page() -> str:
    """docs/settings.md."""
    from .generation.config import UnmaskingSettings
    from .models.record import ConversionSettings
    from .objective.annealing import AnnealingSettings
    from .objective.forward_process import NoiseSettings
    from .training.config import DiffusionGRPOConfig, DiffusionSFTConfig, ScoreSettings

    intro = "Written by `python -m llm_diffusion.config`. In JSON and YAML None is `null`, and True `true`. Numbers are finite, whole ones below 2³¹."
    page = f"# Settings\n\n{intro}\n"
    shared = NoiseSettings, AnnealingSettings, ConversionSettings
    for kind in (HyperParameters, DiffusionSFTConfig, *shared, ScoreSettings, DiffusionGRPOConfig, UnmaskingSettings):
        first_line = kind.__doc__.strip().splitlines()[0]
        page += f"\n## `{kind.__name__}`\n\n{first_line}\n\n{settings_table(kind)}\n"
    return page


def config_yaml() -> str:
    """config.yaml: the defaults of the main job, each with its help."""
    text = """\
# Settings of the main job and their defaults, written by `python -m llm_diffusion.config --yaml`. Use:
# python -m llm_diffusion.main --config config.yaml. Training settings are keys too, see docs/settings.md.
"""
    for name, default in as_dict(HyperParameters()).items():
        declared = HyperParameters.__dataclass_fields__[name]
        nested = "".join(f"\n  {k}: {json.dumps(v)}" for k, v in default.items()) if isinstance(default, dict) else ""
        value = "" if nested else f" {json.dumps(default)}"
        text += f"{name}:{value} # ({declared.type.split('[')[0]}) {declared.metadata['help']}{nested}\n"
    return text


if __name__ == "__main__":
    sys.stdout.write(config_yaml() if "--yaml" in sys.argv else settings_page())
