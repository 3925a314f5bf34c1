"""The staged recipe: one trainer after the other over the same weights, each with its own data, schedule and trained parameters.

    stage       trains        what for
    attention   attention     causal attention is annealed to its target; only what attends is adapted
    diffusion   adapters      mask-and-denoise training
    recovery    adapters      prompts stay clean, what the model could do before comes back; or everything, adapters merged
    dpo         adapters      preferences: the stage's start is its reference

The main job's phases (`pretrain`, `sft`, `dpo`) are such stages. Every finished stage is saved with its log, so that a stopped run
goes on where it was: finished stages are loaded, the one that was running resumes from its last checkpoint.
Trade-off: a list of plain settings, no pipeline. Alternative: one run with annealing over its first steps (preset `gradual`).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftConfig, PeftModel
from transformers import PreTrainedTokenizerBase
from transformers.trainer_callback import PrinterCallback
from trl import SFTConfig, SFTTrainer

from .. import UserError
from ..models.attention import in_attention
from ..models.patching import base_of
from ..models.time_embedding import NAME as TIME_EMBEDDING
from .config import DiffusionDPOConfig
from .dpo import DiffusionDPOTrainer
from .sft import DiffusionSFTTrainer

TRAINS = ("attention", "adapters", "everything")
LOG = "stage.json"  # written last: a folder that has it is a finished stage


@dataclass
class Stage:
    """One stage: its name, what it trains ("attention", "adapters" or "everything"), and its training settings."""

    name: str
    trains: str
    arguments: SFTConfig | DiffusionDPOConfig

    @property
    def prefers(self) -> bool:
        """Whether it trains on preferences."""
        return isinstance(self.arguments, DiffusionDPOConfig)


def stage_folders(names: list[str], output: Path) -> dict[str, Path]:
    """Where the result of every stage is saved: `<name>_model`, of the last one but for preferences `sft_model`."""
    last = [name for name in names if name != "dpo"][-1:]
    return {name: output / ("sft_model" if name in last else f"{name}_model") for name in names}


def select_parameters(model: torch.nn.Module, trains: str, adapters: set[str]) -> None:
    """Sets which parameters train.

    Args:
        trains: "attention": the adapters of attention modules, the mask token's row and the time embedding. "adapters": all
            adapters. "everything": all weights, into which the adapters have been merged. A model without adapters trains weights
            instead: for "attention" those of attention modules and the time embedding, otherwise all.
        adapters: names of the parameters that PEFT trains; empty for a model without adapters.

    Raises:
        ValueError: no parameter is left.
    """
    trained = 0
    for name, parameter in model.named_parameters():
        attends = in_attention(name) or TIME_EMBEDDING in name
        if adapters:
            chosen = name in adapters and (trains == "adapters" or attends or "lora_" not in name)
        else:
            chosen = attends if trains == "attention" else parameter.is_floating_point()
        parameter.requires_grad_(chosen)
        trained += chosen
    if not trained:
        raise UserError(f"`stages.trains`: {trains!r} leaves nothing to train in {type(base_of(model)).__name__}.")


def run_stages(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    stages: list[Stage],
    train: Dataset,
    test: Dataset,
    output: Path,
    peft_config: PeftConfig | None = None,
    callbacks: Callable[[str], list[Any]] = lambda stage: [],
    answers: Callable[[Any], Any] | None = None,
    load: Callable[[str], tuple[torch.nn.Module, PreTrainedTokenizerBase]] | None = None,
    started: Callable[[], None] = lambda: None,
    preferences: tuple[Dataset, Dataset] | None = None,
    make_trainer: Callable[..., SFTTrainer] = DiffusionSFTTrainer,
) -> dict[str, list[dict]]:
    """Trains stage after stage; the result of each is saved where `stage_folders` says.

    Args:
        model: a converted model, bare or under PEFT.
        peft_config: adapters for the first stage to make.
        callbacks: name of a stage -> callbacks of its trainer.
        answers: a trainer -> one more callback, which needs to know it.
        load: loads a saved stage; given, a stopped run is resumed.
        started: called when everything that can be checked has been, before the first step.
        preferences: pairs to train and to evaluate on, for a stage that trains on preferences.
        make_trainer: takes what `SFTTrainer` takes.

    Returns:
        The log history of every stage.
    """
    folders = stage_folders([stage.name for stage in stages], output)
    if len(set(folders.values())) < len(stages):
        raise UserError(
            f"`stages`: only the last one may be called 'sft' (but for 'dpo' behind it), because the result is saved as `sft_model`, got {list(folders)}."
        )
    finished = 0
    while load is not None and finished < len(stages) and (folders[stages[finished].name] / LOG).exists():
        finished += 1
    histories = {stage.name: json.loads((folders[stage.name] / LOG).read_text()) for stage in stages[:finished]}
    if finished == len(stages):
        return histories
    if finished:
        (model, tokenizer), peft_config = load(str(folders[stages[finished - 1].name])), None

    def build(stage: Stage, model: torch.nn.Module, peft_config: PeftConfig | None) -> Any:
        kind = DiffusionDPOTrainer if stage.prefers else make_trainer
        data = preferences if stage.prefers else (train, test)
        trainer = kind(
            model,
            args=stage.arguments,
            train_dataset=data[0],
            eval_dataset=data[1],
            processing_class=tokenizer,
            peft_config=None if stage.trains == "everything" else peft_config,
            callbacks=callbacks(stage.name),
        )
        return _showing(trainer, answers)

    # Trainers are built before the first one runs, so that data that a later stage refuses stops the job at once. Where adapters
    # are merged on the way that is not possible; nor for preferences, whose reference is the model as the stage before leaves it.
    trainers: dict[str, Any] = {}
    for stage in stages[finished:]:
        if stage.prefers and stage is not stages[finished]:
            break
        if stage.trains == "everything" and (isinstance(model, PeftModel) or peft_config is not None):
            break
        trainers[stage.name] = build(stage, model, peft_config)
        model, peft_config = trainers[stage.name].model, None
    adapters = _trainable(model)
    started()
    if load is None:
        _forget(stages, folders)
    for stage in stages[finished:]:
        if stage.trains == "everything":
            model, adapters = _merged(model), set()
        trainer = trainers.get(stage.name) or build(stage, model, peft_config)
        model, peft_config = trainer.model, None
        select_parameters(model, stage.trains, adapters)
        trainer.train(resume_from_checkpoint=_checkpoint(stage) if load is not None else None)
        trainer.evaluate()
        folder = folders[stage.name]
        trainer.save_model(str(folder))
        _note_finished(trainer, folder)
        histories[stage.name] = trainer.state.log_history
    return histories


def _showing(trainer: Any, answers: Callable[[Any], Any] | None) -> Any:
    """The trainer without the host's raw dicts, and with the callback that has to know it."""
    trainer.remove_callback(PrinterCallback)
    if answers is not None:
        trainer.add_callback(answers(trainer))
    return trainer


def _note_finished(trainer: Any, folder: Path) -> None:
    """By one process; then all go on: the next stage, or the end, may read what was saved."""
    if trainer.is_world_process_zero():
        (folder / LOG).write_text(json.dumps(trainer.state.log_history) + "\n")
    trainer.accelerator.wait_for_everyone()


def _forget(stages: list[Stage], folders: dict[str, Path]) -> None:
    """What an earlier run left must not be taken for this one's when it is resumed."""
    for stage in stages:
        (folders[stage.name] / LOG).unlink(missing_ok=True)
        for checkpoint in Path(stage.arguments.output_dir).glob("checkpoint-*"):
            shutil.rmtree(checkpoint, ignore_errors=True)  # another process may be at it


def _trainable(model: torch.nn.Module) -> set[str]:
    """Names of what PEFT trains, nothing for a bare model."""
    if not isinstance(model, PeftModel):
        return set()
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def _merged(model: torch.nn.Module) -> torch.nn.Module:
    """The adapters in the weights, so that everything can train."""
    if getattr(base_of(model), "is_quantized", False):
        raise UserError(
            "`stages.trains`: 'everything' cannot train a quantised base; set `use_qlora` to false, or train adapters."
        )
    return model.merge_and_unload() if isinstance(model, PeftModel) else model


def _checkpoint(stage: Stage) -> str | None:
    """The last checkpoint that was written to its end."""
    states = Path(stage.arguments.output_dir).glob("checkpoint-*/trainer_state.json")
    whole = [state.parent for state in states]
    return str(max(whole, key=lambda folder: int(folder.name.split("-")[1]))) if whole else None
