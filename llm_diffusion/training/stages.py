"""The staged recipe: one trainer after the other over the same weights, each with its own data, schedule and trained parameters.

    stage       trains        what for
    attention   attention     causal attention is annealed to its target; only what attends is adapted
    diffusion   adapters      mask-and-denoise training
    recovery    adapters      prompts stay clean, what the model could do before comes back; or everything, adapters merged
    dpo         adapters      preferences: the stage's start is its reference

The main job's phases (`pretrain`, `sft`, `dpo`) are such stages. Every finished stage is saved with its log, so that a stopped run
goes on where it was: finished stages are loaded, the one that was running resumes from its last checkpoint.
"""

from __future__ import annotations

import itertools
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftConfig, PeftModel
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerState, set_seed
from transformers.trainer_callback import PrinterCallback
from trl import SFTConfig, SFTTrainer

from .. import UserError
from ..data.tokens import Tokenising, tokenised
from ..models.attention import in_attention
from ..models.files import UNFINISHED, atomic, read_json
from ..models.forward import TIME_EMBEDDING
from ..models.patching import base_of
from ..models.special_tokens import end_token_ids
from ..objective.settings import user_settings
from .config import DiffusionDPOConfig, DiffusionSFTConfig
from .dpo import DiffusionDPOTrainer
from .resuming import ResumableTrainerMixin, last_checkpoint, save_atomically
from .sft import DiffusionSFTTrainer

TRAINS = ("attention", "adapters", "everything")
LOG = "stage.json"  # a folder that has it is a finished stage
Loaded = tuple[torch.nn.Module, PreTrainedTokenizerBase]


@dataclass
class Stage:
    """One stage: what it trains (of `TRAINS`), and its settings, which choose the trainer; a plain `SFTConfig` is TRL's own."""

    name: str
    trains: str
    arguments: SFTConfig | DiffusionDPOConfig

    @property
    def prefers(self) -> bool:
        return isinstance(self.arguments, DiffusionDPOConfig)


def stage_folders(names: list[str], output: Path) -> dict[str, Path]:
    """Where the result of every stage is saved: `<name>_model`, of the last one but for preferences `sft_model`."""
    last = [name for name in names if name != "dpo"][-1:]
    return {name: output / ("sft_model" if name in last else f"{name}_model") for name in names}


def select_parameters(model: torch.nn.Module, trains: str, adapters: set[str]) -> None:
    """Sets which parameters train.

    Args:
        trains: "attention": the adapters of attention modules, the mask token's row and the time embedding; "adapters": all of
            them; "everything": all weights. Without adapters weights train instead: those of attention modules and the time
            embedding, otherwise all.
        adapters: names of the parameters that PEFT trains; empty for a model without adapters.
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
    data: tuple[Dataset, Dataset],
    output: Path,
    *,
    preferences: tuple[Dataset, Dataset] | None = None,
    peft_config: PeftConfig | None = None,
    on_built: Callable[[Any, Stage], None] = lambda trainer, stage: None,
    on_start: Callable[[], None] = lambda: None,
    load: Callable[[str], Loaded] | None = None,
) -> dict[str, list[dict]]:
    """Trains stage after stage; the result of each is saved in its folder of `stage_folders`.

    Args:
        model: a converted model, bare or under PEFT; a causal one for stages of a plain `SFTConfig`.
        data, preferences: rows to train and to evaluate on; the second for stages that train on preferences.
        peft_config: adapters for the first stage to make.
        on_built: adds callbacks to a stage's trainer.
        on_start: called when everything that can be checked has been, and an earlier run is forgotten; before the first step.
        load: loads a saved stage; given, a stopped run is resumed.

    Returns the log history of every stage.
    """
    folders = stage_folders([stage.name for stage in stages], output)
    if len(set(folders.values())) < len(stages):
        raise UserError(f"`stages`: only the last one, before 'dpo', may be called 'sft', got {list(folders)}.")
    finished = 0
    while load is not None and finished < len(stages) and (folders[stages[finished].name] / LOG).exists():
        finished += 1
    histories = {stage.name: read_json(folders[stage.name] / LOG, list) for stage in stages[:finished]}
    if finished == len(stages):
        return histories
    if finished:
        (model, tokenizer), peft_config = load(str(folders[stages[finished - 1].name])), None
    run = _Run(model, tokenizer, data, preferences, peft_config, on_built)
    run.build_ahead(stages[finished:])
    if load is None:
        _forget(stages, folders)
    on_start()
    for stage in stages[finished:]:
        trainer, folder = run.trainer(stage), folders[stage.name]
        set_seed(stage.arguments.seed)  # whatever ran before: it may have been another process
        trainer.train(resume_from_checkpoint=None if load is None else last_checkpoint(trainer))
        trainer.evaluate()
        save_atomically(trainer, partial(_write, trainer, output / UNFINISHED / folder.name), output)
        histories[stage.name] = trainer.state.log_history
    return histories


class CausalSFTTrainer(ResumableTrainerMixin, SFTTrainer):
    """TRL's own training, whose checkpoints are whole."""


@dataclass
class _Run:
    """The weights as they pass through the stages."""

    model: torch.nn.Module
    tokenizer: PreTrainedTokenizerBase
    data: tuple[Dataset, Dataset]
    preferences: tuple[Dataset, Dataset] | None
    peft_config: PeftConfig | None
    on_built: Callable[[Any, Stage], None]
    trainers: dict[str, Any] = field(default_factory=dict)
    adapters: set[str] = field(default_factory=set)  # names of what PEFT trains

    def build_ahead(self, stages: list[Stage]) -> None:
        """Builds trainers before the first one runs, so that data that a later stage refuses stops the job at once; not beyond a
        merge of adapters, nor for preferences, whose reference is the model as the stage before leaves it."""
        for stage in stages:
            merges = stage.trains == "everything" and (isinstance(self.model, PeftModel) or self.peft_config)
            if merges or (stage.prefers and stage is not stages[0]):
                break
            self._build(stage)
        if isinstance(self.model, PeftModel):
            self.adapters = {name for name, parameter in self.model.named_parameters() if parameter.requires_grad}

    def trainer(self, stage: Stage) -> Any:
        """The trainer of a stage whose turn it is, with what it trains switched on."""
        if stage.trains == "everything":
            self.model, self.adapters = _merged(self.model), set()
        if stage.name not in self.trainers:
            self._build(stage)
        select_parameters(self.model, stage.trains, self.adapters)
        return self.trainers.pop(stage.name)

    def _build(self, stage: Stage) -> None:
        args, (train, test) = stage.arguments, self.preferences if stage.prefers else self.data
        if stage.prefers:
            kind = DiffusionDPOTrainer
        elif isinstance(args, DiffusionSFTConfig):
            kind = DiffusionSFTTrainer
        else:  # the rows are those of our own trainers, so that prompts are not trained on unless every token is
            kind = CausalSFTTrainer
            how = Tokenising.of(self.tokenizer, args, ends=end_token_ids(self.model, self.tokenizer))
            train, test = tokenised(train, how, "train_dataset"), tokenised(test, how, "eval_dataset")
            args.completion_only_loss = None  # the labels are there
        peft_config = None if stage.trains == "everything" else self.peft_config
        given = {"train_dataset": train, "eval_dataset": test, "processing_class": self.tokenizer}
        with user_settings(f"stage `{stage.name}`", ValueError):
            trainer = kind(self.model, args=args, peft_config=peft_config, **given)
        trainer.remove_callback(PrinterCallback)  # prints raw dicts
        self.on_built(trainer, stage)
        self.model, self.peft_config, self.trainers[stage.name] = trainer.model, None, trainer


def _write(trainer: Any, folder: Path) -> None:
    trainer.save_model(str(folder))
    if trainer.is_world_process_zero():
        (folder / LOG).write_text(json.dumps(trainer.state.log_history) + "\n")


def _forget(stages: list[Stage], folders: dict[str, Path]) -> None:
    """What an earlier run left must not be taken for this one's when it is resumed."""
    for stage in stages:
        (folders[stage.name] / LOG).unlink(missing_ok=True)
        for checkpoint in Path(stage.arguments.output_dir).glob("checkpoint-*"):
            shutil.rmtree(checkpoint, ignore_errors=True)  # another process may be at it


def _merged(model: torch.nn.Module) -> torch.nn.Module:
    """The adapters in the weights, so that everything can train."""
    if getattr(base_of(model), "is_quantized", False):
        raise UserError("`stages.trains`: 'everything' cannot train a quantised base; set `use_qlora` to false.")
    return model.merge_and_unload() if isinstance(model, PeftModel) else model


NAMES = {
    "nelbo": "nats/token",
    "masked_accuracy": "accuracy",
    "eval_nelbo": "held-out nats/token",
    "eval_exact_match": "exact match",
    "accepted_length": "accepted",
    "eval_accepted_length": "held-out accepted",
    "rewards/margins": "margin",
    "rewards/accuracies": "preferred",
    "eval_rewards/accuracies": "held-out preferred",
    "learning_rate": "lr",
}


class LogLinesCallback(TrainerCallback):
    """Writes one line a logging step: phase, step, loss, accuracy, time left."""

    def __init__(self, write: Callable[[str], None], phase: str) -> None:
        self.write, self.phase, self.started = write, phase, 0.0

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.started = time.perf_counter()

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or not logs or "train_runtime" in logs:
            return
        if not any("nelbo" in name for name in logs):  # a drafter, whose loss is no bound
            logs = {name.replace("masked_nll", "nelbo"): value for name, value in logs.items()}
        figures = "  ".join(f"{label} {float(logs[name]):.3g}" for name, label in NAMES.items() if name in logs)
        took = time.perf_counter() - self.started
        left = took / max(state.global_step, 1) * (state.max_steps - state.global_step)
        step = f"step {state.global_step}/{state.max_steps}"
        self.write(f"{self.phase}  {step}  {figures}  {took:.0f} s, {left:.0f} s left")


def plot_loss(histories: dict[str, list[dict]], path: Path) -> None:
    """Saves training and held-out NELBO of the phases (phase -> `trainer.state.log_history`), one after the other, as a PNG; for a drafter
    the held-out accepted length against trained tokens beside it."""
    from matplotlib.figure import Figure  # slow to import, needed once; `Figure` alone touches no display

    accepted, tokens = [], 0
    for row in itertools.chain(*histories.values()):
        tokens = row.get("num_tokens", tokens)
        if "eval_accepted_length" in row:
            accepted.append((tokens, row["eval_accepted_length"]))
    figure = Figure(figsize=(12 if accepted else 7, 4), layout="constrained")
    (axes, *beside), offset = figure.subplots(1, 1 + bool(accepted), squeeze=False)[0], 0
    if accepted:
        beside[0].plot(*zip(*accepted, strict=True), "o-")
        title = "Tokens that a verified draft yields"
        beside[0].set(xlabel="trained tokens", ylabel="held-out accepted length", title=title)
        beside[0].grid(alpha=0.3)
    for number, (phase, history) in enumerate(histories.items()):
        end = offset
        for prefix, style, label in (("", "-", "training"), ("eval_", "o", "held out")):
            # A drafter has no NELBO, but the NLL of what it drafts.
            key = prefix + ("nelbo" if any(f"{prefix}nelbo" in row for row in history) else "masked_nll")
            if points := [(offset + row["step"], row[key]) for row in history if key in row]:
                axes.plot(*zip(*points, strict=True), style, color=f"C{number}", label=f"{phase}: {label}")
                end = max(end, points[-1][0])
        offset = end
    axes.set(xlabel="optimiser step", ylabel="NELBO, nats a token", yscale="log", title="Mask-and-denoise training")
    axes.grid(alpha=0.3)
    if axes.has_data():
        axes.legend()
    with atomic(path) as file:
        figure.savefig(file, dpi=120)
