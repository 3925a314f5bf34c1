"""The main job, of either pipeline: load, train stage after stage, save, reload from disk, answer held-out prompts.

pipeline    the model                           trained by              shown at the end
diffusion   converted when it is loaded         our trainers, on TRL    answers beside those of the AR base
arm         autoregressive, from left to right  TRL's own SFTTrainer    perplexity, and continuations of `prompts`
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from loguru import logger
from peft import LoraConfig, PeftModel
from torch.nn import Linear, Module
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.pytorch_utils import Conv1D

from . import UserError
from .config import DPO, SEED_LORA_TARGETS, WANDB, HyperParameters, as_dict, stages_of, training_hints
from .data.datasets import (
    DEBUG_EXAMPLES,
    PLAIN_CHAT_TEMPLATE,
    SELF,
    first_rows,
    load_preference_splits,
    load_splits,
    readable,
    split_rows,
)
from .evaluation.answers import AnswerReport, evaluate_answers
from .evaluation.metrics import ANSWER_METRICS, AnswersCallback
from .evaluation.report import decoding, show_autoregressive, show_ends, show_job
from .generation.config import check_room
from .generation.self_generated import answered_by_base, generate_answers, generate_prompts
from .models.attention import in_attention
from .models.checkpoints import best_device, check_device, quantization_config
from .models.conversion import convert_to_diffusion
from .models.files import UNFINISHED, check_writable, locked, write_text
from .models.loading import check_positions, load_autoregressive, load_diffusion_model, scratch_model
from .models.patching import base_of, dtype_name
from .models.record import CONVERSION_OPTIONS, save_generation_config
from .models.smollm2 import fast_type
from .models.special_tokens import use_tokens
from .objective.settings import read_path, redacted, user_settings
from .reasoning.pairs import preference_pairs
from .training.adapters import check_adapter
from .training.config import CausalSFTConfig, DiffusionDPOConfig, DiffusionSFTConfig
from .training.resuming import StopCallback, check_same_run
from .training.services import check_hub, start_wandb
from .training.stages import Loaded, LogLinesCallback, Stage, plot_loss, run_stages, stage_folders

EVAL_ROWS = 200  # of held-out data, in the evaluations of training
# Settings of the other phases that mean something else to preferences, whose own are in `dpo_config`.
NOT_FOR_DPO = {"learning_rate", "loss_type", "packing", "padding_free", "metric_for_best_model", "greater_is_better"}
# Settings of the main job that are the trainers' by the same name.
SHARED = ("learning_rate", "gradient_accumulation_steps", "max_length", "seed", "dataloader_num_workers")
SETTINGS = "hyper_parameters.json"
SELF_PROMPTS = 2000  # that the model writes itself, unless `max_examples` says


def run(hp: HyperParameters, resume: bool = False) -> None:
    """The main job; `resume` goes on with a stopped one."""
    first, output = among_processes(), read_path("output_dir", hp.output_dir)
    check_writable(output, "output_dir")
    with locked(output / ".lock", f"`output_dir`: {str(output)!r}") if first else nullcontext():
        # Of a process that was killed.
        for left in (*output.glob(f"{UNFINISHED}*"), *output.glob(f"*/{UNFINISHED}*")) if first else ():
            shutil.rmtree(left, ignore_errors=True)
        _run(hp, output, first, resume)


def _run(hp: HyperParameters, output: Path, first: bool, resume: bool) -> None:
    started = time.perf_counter()

    # 1. Whatever can be refused without data and model is refused now.
    device = hp.device or best_device()
    check_start(hp, device, output, resume)
    report_to = start_wandb(hp.wandb_config, hp.debug) if hp.use_wandb else str(hp.training.get("report_to", "none"))
    stages = [make_stage(hp, stage, output, device, report_to) for stage in stages_of(hp)]
    options = loader_options(hp, device)
    if any(stage.arguments.push_to_hub for stage in stages):
        check_hub()
    log_settings(hp)

    # 2. Data: texts or conversations, and pairs where a stage takes them.
    data = None if hp.dataset == SELF else load_data(hp)

    # 3. The model, and what it answers before it is trained.
    model, tokenizer = load_start(hp, options)
    if data is None:
        data = self_generated_data(hp, model, tokenizer, output)
    examples = readable(data.test, hp.eval_examples, tokenizer) if hp.pipeline == "diffusion" else []
    reports = {}
    if examples:
        start = "before" if [stage.name for stage in stages] == [DPO] else "AR base"
        reports[start] = measure(hp, model, tokenizer, examples, autoregressive=start == "AR base")
    if hp.answers_from_base:
        logger.info(f"AR base: answering the {len(data.train):,} training prompts; its answers are trained on")
        limit, cache = answer_limit(hp), generated_beside(output)
        data.train = answered_by_base(model, tokenizer, data.train, max_new_tokens=limit, cache=cache)

    # 4. Training, stage after stage over the same weights.
    # What is saved has weights of its own, and adapters remember the file of their base.
    loader = load_diffusion_model if hp.pipeline == "diffusion" else load_autoregressive
    load = partial(loader, **{key: value for key, value in options.items() if key != "gguf_file"})
    histories = train(hp, stages, (model, tokenizer), data, output, load if resume else None)
    if not first:
        return  # one process is enough to read and show what was trained
    plot_loss(histories, output / "loss.png")

    # 5. What was saved is loaded from disk, as a user will, and shown.
    folders = stage_folders([stage.name for stage in stages], output)
    final = folders[stages[-1].name]
    if hp.pipeline == "diffusion":
        for folder in folders.values():
            save_generation_config(model, folder, decoding(hp, model))
    del model
    if hp.pipeline == "arm":
        show_autoregressive(hp, partial(load, str(final)), histories)
        logger.info(f"saved: {final}; done in {time.perf_counter() - started:.0f} s")
        return
    model, tokenizer = measure_saved(hp, load, folders, examples, reports)
    if reports:
        results = {name: vars(report) | {"mean": report.mean} for name, report in reports.items()}
        write_text(output / "results.json", json.dumps(results, indent=1) + "\n")
        show_ends([stage.arguments for stage in stages], model, tokenizer, examples, output / "ends.png")
    samples = readable(data.test, 6, tokenizer)
    show_job(hp, model, tokenizer, samples, reports, histories, final, time.perf_counter() - started)


# -- 1. before anything long begins


def among_processes() -> bool:
    """Whether this is the first of several processes, which `accelerate launch` or torchrun start; the others are silent."""
    first = int(os.environ.get("RANK", 0)) == 0
    if not first:
        logger.remove()
    if torch.cuda.is_available() and "LOCAL_RANK" in os.environ:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    return first


def check_start(hp: HyperParameters, device: str, output: Path, resume: bool) -> None:
    if hp.num_threads:
        torch.set_num_threads(hp.num_threads)
    check_device(device)
    if hp.dataset == SELF and any(stage["name"] == DPO for stage in stages_of(hp)):
        raise UserError(
            "`dataset`: 'self' has no preferences; train on them in a run of its own, from what this one saves."
        )
    check_same_run(
        as_dict(hp), as_dict(HyperParameters()), output / SETTINGS, "`--resume`" if resume else "`output_dir`"
    )


def loader_options(hp: HyperParameters, device: str) -> dict[str, Any]:
    """Keywords of the loaders."""
    with user_settings("`qlora_config`"):
        quantized = quantization_config("nf4", device, **hp.qlora_config) if hp.use_qlora else None
    own = {"quantization_config": quantized, "device": device, "trust_remote_code": hp.trust_remote_code}
    whole = any(stage["trains"] == "everything" for stage in stages_of(hp))  # small steps are lost on weights in bf16
    if not (whole or hp.use_qlora or {"dtype", "torch_dtype"} & hp.model_init_kwargs.keys()):
        own["dtype"] = fast_type(hp.model, "auto", device)  # adapters stay in fp32
    return own | hp.model_init_kwargs


def make_stage(hp: HyperParameters, stage: dict[str, Any], output: Path, device: str, report_to: str) -> Stage:
    """A stage and its checked settings: those of the job < those that all stages share < the stage's own."""
    prefix = "debug-" if hp.debug else ""
    settings: dict[str, Any] = {
        "num_train_epochs": hp.epochs,
        "per_device_train_batch_size": hp.batch_size,
        "per_device_eval_batch_size": hp.batch_size,
        **{key: getattr(hp, key) for key in SHARED},
        "dataloader_pin_memory": device.startswith("cuda"),
        "use_cpu": device == "cpu",
        "report_to": report_to,
        "project": f"{prefix}{hp.wandb_config.get('project') or WANDB['project']}",
        "run_name": f"{prefix}{Path(hp.model).name}-{stage['name']}",
        "logging_steps": 10,
        "save_strategy": "no",
        "disable_tqdm": not sys.stderr.isatty(),
        **hp.training,
        "dataset_text_field": "text",  # what `load_splits` calls the column
    }
    if prefers := stage["name"] == DPO:
        settings = {key: settings[key] for key in settings.keys() & training_hints(True).keys() - NOT_FOR_DPO}
    settings |= {key: value for key, value in stage.items() if key not in ("name", "trains")}
    if settings.get("load_best_model_at_end"):
        settings = {"metric_for_best_model": "eval_loss", "greater_is_better": False, **settings}
    kind = DiffusionDPOConfig if prefers else DiffusionSFTConfig
    if hp.pipeline == "arm":
        # TRL's defaults: bf16 is emulated on most CPUs, and it still sets the old name, of which transformers warns.
        settings.setdefault("bf16", torch.cuda.is_available())
        settings.setdefault("activation_checkpointing", settings.get("gradient_checkpointing", True))
        kind = CausalSFTConfig
    with user_settings(f"settings of `{stage['name']}`"):
        arguments = kind(str(output / stage["name"]), **settings)
    check_best_metric(hp, arguments)
    return Stage(stage["name"], stage["trains"], arguments)


def check_best_metric(
    hp: HyperParameters, arguments: CausalSFTConfig | DiffusionSFTConfig | DiffusionDPOConfig
) -> None:
    """Refuses a metric that no evaluation of this job gives; transformers would end the run at the first one."""
    name = (arguments.metric_for_best_model or "eval_loss").removeprefix("eval_")
    answers = ANSWER_METRICS if hp.eval_answers and hp.pipeline == "diffusion" else ()
    if name not in (known := (*arguments.evaluated, *answers)) and not (answers and name.startswith("exact_match_")):
        raise UserError(f"`metric_for_best_model`: evaluations give {', '.join(known)}; got {name!r:.80}.")


def log_settings(hp: HyperParameters) -> None:
    logger.info("settings, resolved:")
    for key, value in redacted(as_dict(hp)).items():
        if value not in (None, {}, [], ""):
            logger.info(f"  {key}: {json.dumps(value)}")
    low, high = hp.training.get("min_mask_probability", 0.0), hp.training.get("max_mask_probability", 1.0)
    if (low, high) != (0.0, 1.0):
        logger.warning(f"mask probability from {low} to {high}: the loss is a reweighted objective, not the ELBO")


# -- 2. data


@dataclass
class Data:
    """Rows to train on and held-out ones; `pairs` of both, where a stage trains on preferences."""

    train: Dataset
    test: Dataset
    pairs: tuple[Dataset, Dataset] | None = None


def load_data(hp: HyperParameters) -> Data:
    shares = {"test_size": hp.test_size, "seed": hp.seed, "limit": DEBUG_EXAMPLES if hp.debug else hp.max_examples}
    every_token = all(stage.get("completion_only_loss") is False for stage in stages_of(hp))
    text_field = hp.training.get("dataset_text_field", "text")
    data = Data(*load_splits(hp.dataset, every_token=every_token, text_field=text_field, **shares))
    logger.info(f"data: {len(data.train):,} examples to train on, {len(data.test):,} held out")
    if not any(stage["name"] == DPO for stage in stages_of(hp)):
        return data
    if hp.preference_dataset is not None:
        found = load_preference_splits(hp.preference_dataset, **shares)
    else:  # the data's answers beside wrong ones made from them
        found = preference_pairs(data.train, seed=hp.seed), preference_pairs(data.test, seed=hp.seed)
    logger.info(f"preferences: {len(found[0]):,} pairs to train on, {len(found[1]):,} held out")
    data.pairs = found[0], first_rows(found[1], EVAL_ROWS)
    return data


def self_generated_data(hp: HyperParameters, model: Module, tokenizer: Tokenizer, output: Path) -> Data:
    """Prompts that the model writes itself and its own answers, kept beside the output folder for the next run."""
    n, cache = DEBUG_EXAMPLES if hp.debug else hp.max_examples or SELF_PROMPTS, generated_beside(output)
    logger.info(f"data: the model writes {n:,} prompts and answers them; kept in {cache}")
    prompts = generate_prompts(model, tokenizer, n, seed=hp.seed, cache=cache)
    rows = generate_answers(model, tokenizer, prompts, max_new_tokens=answer_limit(hp), cache=cache)
    return Data(*split_rows(rows, hp.test_size, hp.seed))


def generated_beside(output: Path) -> Path:
    return output.with_name(f"{output.name}-self-generated.jsonl")


def answer_limit(hp: HyperParameters) -> int:
    return hp.generation.get("max_new_tokens", 128)


# -- 3. the model


def load_start(hp: HyperParameters, options: dict[str, Any]) -> Loaded:
    """The model that training starts from: built from nothing or loaded; converted, unless it stays autoregressive."""
    conversion = {name: hp.training.get(name) for name in CONVERSION_OPTIONS}
    if hp.scratch:
        model, tokenizer = scratch_model(hp.scratch, hp.model, seed=hp.seed, device=options["device"])
        if hp.pipeline == "diffusion":
            convert_to_diffusion(model, tokenizer, **conversion)
    elif hp.pipeline == "diffusion":
        model, tokenizer = load_diffusion_model(hp.model, **conversion, **options)
    else:
        model, tokenizer = load_autoregressive(hp.model, **options)
    use_tokens(base_of(model), tokenizer, hp.token_ids)
    check_positions(model, max(stage.get("max_length") or hp.max_length for stage in stages_of(hp)))
    check_room(model, 1, hp.generation.get("max_new_tokens") or 1, "generation.max_new_tokens")
    kind = f"converted; mask token {tokenizer.mask_token!r}" if hp.pipeline == "diffusion" else "from left to right"
    source = "from nothing" if hp.scratch else hp.model
    logger.info(f"model: {source}, {dtype_name(model)} on {options['device']}, {kind}")
    if tokenizer.chat_template is None:
        logger.info("the tokenizer has no chat template; a plain one (User: … Assistant: …) is saved with the model")
        tokenizer.chat_template = PLAIN_CHAT_TEMPLATE
    return model, tokenizer


def measure(
    hp: HyperParameters, model: Module, tokenizer: Tokenizer, examples: list[dict], autoregressive: bool = False
) -> AnswerReport:
    name = "AR base" if autoregressive else "converted model"
    logger.info(f"{name}: answering {len(examples)} held-out prompts")
    return evaluate_answers(model, tokenizer, examples, autoregressive=autoregressive, **decoding(hp, model))


# -- 4. training


def train(
    hp: HyperParameters, stages: list[Stage], loaded: Loaded, data: Data, output: Path, load: Any
) -> dict[str, list[dict]]:
    """Runs the stages; returns their log histories. `load`: loads a saved stage, to resume."""
    model, tokenizer = loaded
    examples = readable(data.test, hp.eval_answers, tokenizer) if hp.pipeline == "diffusion" else []

    def add_callbacks(trainer: Any, stage: Stage) -> None:
        trainer.add_callback(LogLinesCallback(logger.info, stage.name))
        trainer.add_callback(StopCallback(logger.warning))
        if examples:
            trainer.add_callback(AnswersCallback(trainer, examples, **decoding(hp, trainer.model)))

    def save_settings() -> None:
        write_text(output / SETTINGS, json.dumps(redacted(as_dict(hp)), indent=2) + "\n")
        if hp.use_wandb and "WANDB_DIR" in os.environ:
            Path(os.environ["WANDB_DIR"]).mkdir(parents=True, exist_ok=True)

    return run_stages(
        model,
        tokenizer,
        stages,
        (data.train, first_rows(data.test, EVAL_ROWS)),
        output,
        preferences=data.pairs,
        # An adapter is trained on.
        peft_config=lora(hp, model) if hp.use_lora and not isinstance(model, PeftModel) else None,
        on_built=add_callbacks,
        on_start=save_settings,
        load=load,
    )


def lora(hp: HyperParameters, model: Module) -> LoraConfig:
    """LoRA settings with target modules that this architecture has; "attention" is every linear layer of the attention.

    The default names are those of Qwen and Llama; where they do not all exist, every linear layer is adapted. Names that the
    user chose are never replaced: unmatched ones are an error.
    """
    settings = dict(hp.lora_config)
    layers = [name for name, module in model.named_modules() if isinstance(module, Linear | Conv1D)]
    names = sorted({layer.rsplit(".", 1)[-1] for layer in layers} - {"lm_head"})
    targets = settings.get("target_modules")
    if targets == "attention":
        settings["target_modules"] = [layer for layer in layers if in_attention(layer)]
    elif isinstance(targets, list):
        missing = [target for target in targets if not any(f".{layer}".endswith(f".{target}") for layer in layers)]
        if missing and targets == SEED_LORA_TARGETS:
            logger.info(f"LoRA: {missing} do not exist in this architecture; adapting every linear layer: {names}")
            settings["target_modules"] = "all-linear"
        elif missing:
            raise UserError(
                f"`lora_config.target_modules`: {missing} match nothing in {hp.model!r}; its linear layers are {names}."
            )
    with user_settings("`lora_config`"):
        config = LoraConfig(**settings | {"task_type": "CAUSAL_LM"})
    check_adapter(model, config)
    return config


# -- 5. the result


def measure_saved(
    hp: HyperParameters, load: Any, folders: dict[str, Path], examples: list[dict], reports: dict[str, AnswerReport]
) -> Loaded:
    """Adds the answers of what was saved to `reports`: before and after preferences; returns the last model."""
    names = list(folders)
    for name in names[-2:] if examples and names[-1] == DPO else names[-1:]:
        loaded = load(str(folders[name]))
        if examples:
            reports["preferences" if name == DPO else "converted"] = measure(hp, *loaded, examples)
    return loaded
