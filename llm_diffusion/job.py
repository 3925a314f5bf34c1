"""The main job: load, convert, mask-and-denoise pretraining on all tokens, prefix-masked fine-tuning with the same adapters,
preferences if asked, save, reload from disk, answer held-out prompts beside their references.

Trade-off: one file of plain steps, read from top to bottom. Alternative: a pipeline framework.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from loguru import logger
from peft import LoraConfig, PeftModel
from transformers import PreTrainedTokenizerBase, Trainer
from transformers.pytorch_utils import Conv1D
from trl import SFTConfig, SFTTrainer

from . import UserError
from .config import (
    DPO,
    DPO_KEYS,
    SEED_LORA_TARGETS,
    HyperParameters,
    as_dict,
    stages_of,
)
from .data.datasets import (
    DEBUG_EXAMPLES,
    PLAIN_CHAT_TEMPLATE,
    load_preference_splits,
    load_splits,
)
from .evaluation.answers import AnswerReport, answered_by_base, evaluate_answers
from .evaluation.job_report import decoding, show
from .evaluation.metrics import AnswersCallback, foresee_ends, plot_ends
from .models.attention import in_attention
from .models.checkpoints import best_device, check_device, quantization_config
from .models.conversion import convert_to_diffusion
from .models.loading import load_diffusion_model
from .models.patching import base_of
from .models.record import CONVERSION_OPTIONS
from .models.special_tokens import use_tokens
from .pipelines import check_positions, scratch_model
from .reasoning.pairs import preference_pairs
from .training.callbacks import LogLinesCallback, plot_loss
from .training.config import DiffusionDPOConfig, DiffusionSFTConfig
from .training.rows import check_pairs
from .training.sft import DiffusionSFTTrainer
from .training.stages import Stage, run_stages, stage_folders

EVAL_ROWS = 200  # of held-out data, in the evaluations of training
# Settings of the other phases that mean something else to preferences, whose own are in `dpo_config`.
NOT_FOR_DPO = {"learning_rate", "loss_type", "packing", "padding_free", "metric_for_best_model", "greater_is_better"}
SETTINGS = "hyper_parameters.json"


def run(hp: HyperParameters, resume: bool = False) -> None:
    """The main job."""
    started = time.perf_counter()
    device = hp.device or best_device()
    first = among_processes(device)
    if hp.num_threads:
        torch.set_num_threads(hp.num_threads)
    output = Path(hp.output_dir).expanduser()
    quantized = quantization_config("nf4", device, **hp.qlora_config) if hp.use_qlora else None
    check_device(device)
    check_writable(output, "output_dir")
    if resume:
        check_same_settings(hp, output / SETTINGS)
    report_to = start_wandb(hp)
    arguments = [training_arguments(hp, stage, output, device, report_to) for stage in stages_of(hp)]
    print_settings(hp)
    limit = DEBUG_EXAMPLES if hp.debug else hp.max_examples
    train, test = load_splits(hp.dataset, test_size=hp.test_size, seed=hp.seed, limit=limit)
    logger.info(f"data: {len(train):,} examples to train on, {len(test):,} held out")
    names = [stage["name"] for stage in stages_of(hp)]
    preferences = preference_data(hp, train, test, limit) if DPO in names else None
    options = {
        "quantization_config": quantized,
        "device": device,
        "trust_remote_code": hp.trust_remote_code,
        **hp.model_init_kwargs,
    }
    saved = {
        key: value for key, value in options.items() if key != "gguf_file"
    }  # adapters remember it, the rest has weights
    conversion = {name: hp.training.get(name) for name in CONVERSION_OPTIONS}
    if hp.scratch:
        model, tokenizer = scratch_model(hp.scratch, hp.model, seed=hp.seed, device=device)
        convert_to_diffusion(model, tokenizer, **conversion)
    else:
        model, tokenizer = load_diffusion_model(hp.model, **conversion, **options)
    use_tokens(base_of(model), tokenizer, hp.token_ids)
    check_positions(model, hp.max_length)
    logger.info(
        f"model: {'from nothing' if hp.scratch else hp.model} on {device}, converted; mask token {tokenizer.mask_token!r} = {tokenizer.mask_token_id}"
    )
    if tokenizer.chat_template is None:
        logger.info(
            "the tokenizer has no chat template: using a plain one (User: … Assistant: …), saved with the model"
        )
        tokenizer.chat_template = PLAIN_CHAT_TEMPLATE
    # An adapter is trained on.
    peft_config = None if isinstance(model, PeftModel) or not hp.use_lora else lora(hp, model)
    reports = {}
    examples = readable(test, hp.eval_examples, tokenizer)
    if examples and names == [DPO]:
        reports["before"] = measure(model, tokenizer, examples, hp)
    elif examples:
        reports["AR base"] = measure(model, tokenizer, examples, hp, autoregressive=True)
    if hp.answers_from_base:
        logger.info(
            f"AR base: answering the {len(train):,} training prompts, which it is trained on in place of the data's answers"
        )
        limit = hp.generation.get("max_new_tokens", 128)
        train = answered_by_base(model, tokenizer, train, max_new_tokens=limit)
    load = (lambda folder: load_diffusion_model(folder, **saved)) if resume else None
    histories = train_stages(
        hp, arguments, model, tokenizer, peft_config, train, test, output, load, preferences=preferences
    )
    if not first:
        return  # one is enough to read and show what was trained
    folders = stage_folders(names, output)
    final = folders[names[-1]]
    del model
    if examples and DPO in names[1:]:
        model, tokenizer = load_diffusion_model(str(folders[names[-2]]), **saved)
        reports["converted"] = measure(model, tokenizer, examples, hp)
        del model
    model, tokenizer = load_diffusion_model(str(final), **saved)
    if examples:
        reports["preferences" if names[-1] == DPO else "converted"] = measure(model, tokenizer, examples, hp)
        results = {name: vars(report) | {"mean": report.mean} for name, report in reports.items()}
        (output / "results.json").write_text(json.dumps(results, indent=1) + "\n")
        show_ends(arguments, model, tokenizer, examples, output / "ends.png")
    plot_loss(histories, output / "loss.png")
    samples = readable(test, 6, tokenizer)
    show(hp, model, tokenizer, samples, reports, histories, final, time.perf_counter() - started)


def show_ends(
    arguments: list[DiffusionSFTConfig],
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: list[dict],
    picture: Path,
) -> None:
    """Where the model foresees the ends of held-out answers, if a stage teacher_mask it."""
    canvases = [getattr(stage, "max_canvas", None) for stage in arguments]
    canvas = max((size for size in canvases if size is not None), default=None)
    if canvas is None:
        return
    report = foresee_ends(model, tokenizer, examples, canvas)
    plot_ends(report, picture)
    print(f"{report}\npicture: {picture}\n")


def among_processes(device: str) -> bool:
    """Whether this is the first of several processes, which `accelerate launch` or torchrun start; the others are silent."""
    first = int(os.environ.get("RANK", 0)) == 0
    if not first:
        logger.remove()
    if device == "cuda" and "LOCAL_RANK" in os.environ:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    return first


def preference_data(hp: HyperParameters, train: Dataset, test: Dataset, limit: int | None) -> tuple[Dataset, Dataset]:
    """Pairs to train and to evaluate on: those of `preference_dataset`, or the data's answers beside wrong ones made from them."""
    if hp.preference_dataset is not None:
        found = load_preference_splits(hp.preference_dataset, test_size=hp.test_size, seed=hp.seed, limit=limit)
    else:
        found = preference_pairs(train, seed=hp.seed), preference_pairs(test, seed=hp.seed)
    logger.info(f"preferences: {len(found[0]):,} pairs to train on, {len(found[1]):,} held out")
    train, test = (
        check_pairs(pairs, "preference") for pairs in found
    )  # the trainer is built when the phases before are done
    return train, test.select(range(min(len(test), EVAL_ROWS)))


def readable(test: Dataset, n: int, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """The first `n` rows; tokens of a prepared dataset as text."""
    rows = list(test.select(range(min(n, len(test)))))
    if "input_ids" not in test.column_names:
        return rows
    return [{"text": tokenizer.decode(row["input_ids"], skip_special_tokens=True)} for row in rows]


def measure(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: list[dict],
    hp: HyperParameters,
    autoregressive: bool = False,
) -> AnswerReport:
    name = "AR base" if autoregressive else "converted model"
    logger.info(f"{name}: answering {len(examples)} held-out prompts")
    return evaluate_answers(model, tokenizer, examples, autoregressive=autoregressive, **decoding(hp, model))


def check_writable(folder: Path, key: str) -> None:
    """Refuses a folder that cannot be written, without making it: nothing is left behind when the run fails to start."""
    existing = folder
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise OSError(f"`{key}`: {str(folder)!r} cannot be written; choose another folder.")


def check_same_settings(hp: HyperParameters, file: Path) -> None:
    """Refuses to go on with a run that was started with other settings."""
    if file.exists() and json.loads(file.read_text()) != json.loads(json.dumps(as_dict(hp))):
        raise UserError(
            f"`--resume`: {str(file)!r} holds other settings than this run; give the same, or another `output_dir`."
        )


def print_settings(hp: HyperParameters) -> None:
    logger.info("settings, resolved:")
    for key, value in as_dict(hp).items():
        if value not in (None, {}, ""):
            logger.info(f"  {key}: {json.dumps(value)}")
    low, high = hp.training.get("min_mask_probability", 0.0), hp.training.get("max_mask_probability", 1.0)
    if (low, high) != (0.0, 1.0):
        logger.warning(f"mask probability from {low} to {high}: the loss is a reweighted objective, not the ELBO")


def train_stages(
    hp: HyperParameters,
    arguments: list[DiffusionSFTConfig],
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    peft_config: LoraConfig | None,
    train: Dataset,
    test: Dataset,
    output: Path,
    load: Callable[[str], tuple[torch.nn.Module, PreTrainedTokenizerBase]] | None,
    make_trainer: Callable[..., SFTTrainer] = DiffusionSFTTrainer,
    preferences: tuple[Dataset, Dataset] | None = None,
) -> dict[str, list[dict]]:
    """Stage after stage over the same weights; returns their log histories. `load`: loads a saved stage, to resume."""
    stages = [
        Stage(stage["name"], stage["trains"], chosen) for stage, chosen in zip(stages_of(hp), arguments, strict=True)
    ]

    examples = list(test.select(range(min(hp.eval_answers, len(test)))))

    def answers(trainer: Trainer) -> AnswersCallback:
        return AnswersCallback(trainer, examples, **decoding(hp, trainer.model))

    def started() -> None:
        output.mkdir(parents=True, exist_ok=True)
        (output / SETTINGS).write_text(json.dumps(as_dict(hp), indent=2) + "\n")
        if hp.use_wandb and "WANDB_DIR" in os.environ:
            Path(os.environ["WANDB_DIR"]).mkdir(parents=True, exist_ok=True)

    return run_stages(
        model,
        tokenizer,
        stages,
        train,
        test.select(range(min(len(test), EVAL_ROWS))),
        output,
        peft_config,
        callbacks=lambda stage: [LogLinesCallback(logger.info, stage)],
        answers=answers if examples else None,
        load=load,
        started=started,
        preferences=preferences,
        make_trainer=make_trainer,
    )


def training_arguments(
    hp: HyperParameters,
    stage: dict[str, Any],
    output: Path,
    device: str,
    report_to: str,
    kind: type[SFTConfig] = DiffusionSFTConfig,
) -> SFTConfig | DiffusionDPOConfig:
    prefix = "debug-" if hp.debug else ""
    settings: dict[str, Any] = {
        "num_train_epochs": hp.epochs,
        "per_device_train_batch_size": hp.batch_size,
        "per_device_eval_batch_size": hp.batch_size,
        "learning_rate": hp.learning_rate,
        "gradient_accumulation_steps": hp.gradient_accumulation_steps,
        "max_length": hp.max_length,
        "seed": hp.seed,
        "dataloader_num_workers": hp.dataloader_num_workers,
        "dataloader_pin_memory": device.startswith("cuda"),
        "use_cpu": device == "cpu",
        "report_to": report_to,
        "run_name": f"{prefix}{Path(hp.model).name}-{stage['name']}",
        "logging_steps": 10,
        "save_strategy": "no",
        "disable_tqdm": not sys.stderr.isatty(),
        **hp.training,
    }
    prefers = stage["name"] == DPO
    if prefers:
        settings = {key: value for key, value in settings.items() if key in DPO_KEYS - NOT_FOR_DPO}
    settings |= {key: value for key, value in stage.items() if key not in ("name", "trains")}
    if settings.get("load_best_model_at_end"):
        settings = {"metric_for_best_model": "eval_loss", "greater_is_better": False, **settings}
    if kind is SFTConfig:
        # The host's defaults: bf16 is emulated on most CPUs, and it still sets the old name, of which transformers warns.
        settings.setdefault("bf16", torch.cuda.is_available())
        settings.setdefault("activation_checkpointing", settings.get("gradient_checkpointing", True))
    return (DiffusionDPOConfig if prefers else kind)(str(output / stage["name"]), **settings)


def lora(hp: HyperParameters, model: torch.nn.Module) -> LoraConfig:
    """LoRA settings with target modules that this architecture has.

    The default names are those of Qwen and Llama; where they do not all exist, every linear layer is adapted. Names that the
    user chose are never replaced: unmatched ones are an error. "attention" is every linear layer of the attention, whatever it
    is called.
    """
    settings = dict(hp.lora_config)
    layers = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear | Conv1D)]
    names = {layer.rsplit(".", 1)[-1] for layer in layers} - {"lm_head"}
    targets = settings.get("target_modules")
    if targets == "attention":
        settings["target_modules"] = [layer for layer in layers if in_attention(layer)]
    if isinstance(targets, list):
        missing = [
            target for target in targets if not any(layer == target or layer.endswith(f".{target}") for layer in layers)
        ]
        if missing and targets == SEED_LORA_TARGETS:
            logger.info(
                f"LoRA: {missing} do not exist in this architecture; adapting every linear layer: {sorted(names)}"
            )
            settings["target_modules"] = "all-linear"
        elif missing:
            raise UserError(
                f"`lora_config.target_modules`: {missing} match nothing in {hp.model!r}; its linear layers are {sorted(names)}."
            )
    return LoraConfig(task_type="CAUSAL_LM", **settings)


def start_wandb(hp: HyperParameters) -> str:
    """What to report to; without a login Weights & Biases goes on offline."""
    if not hp.use_wandb:
        return str(hp.training.get("report_to", "none"))
    try:
        import wandb
    except ImportError as error:
        raise ImportError("`use_wandb`: wandb is not installed; run `pip install 'llm-diffusion[wandb]'`.") from error
    os.environ["WANDB_PROJECT"] = ("debug-" if hp.debug else "") + (hp.wandb_config.get("project") or "llm-diffusion")
    if hp.wandb_config.get("entity"):
        os.environ["WANDB_ENTITY"] = hp.wandb_config["entity"]
    if hp.wandb_config.get("wandb_log_path"):
        folder = Path(hp.wandb_config["wandb_log_path"]).expanduser()
        check_writable(folder, "wandb_config.wandb_log_path")
        os.environ["WANDB_DIR"] = str(folder)
    if wandb.api.api_key is None and "WANDB_MODE" not in os.environ:
        logger.warning(
            "wandb: not logged in; going on offline. Run `wandb login` or set WANDB_API_KEY, and `wandb sync` to upload."
        )
        os.environ["WANDB_MODE"] = "offline"
    return "wandb"
