"""What a trainer does when a step goes wrong: memory runs out, the loss is non-finite, a checkpoint is cut short."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers.trainer_utils import rotate_checkpoints

from ..models.memory import PAGED, ModelMemory, TrainingSetup
from ..models.patching import base_of
from ..models.record import record_of

UNFINISHED = "unfinished"  # folder of an output folder in which a checkpoint is written


def save_bad_batch(folder: Path, step: int, seed: int, batch: dict[str, Any], loss: torch.Tensor) -> FloatingPointError:
    """Keeps the rows that made the loss non-finite; the error that says so."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"bad_batch-{step}.pt"
    kept = {name: value.cpu() if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
    torch.save({"step": step, "seed": seed, "batch": kept}, file)
    return FloatingPointError(
        f"the loss is {loss.item()} at step {step}; the weights are as they were before it. Its rows are in {str(file)!r} "
        "(`torch.load`). Lower `learning_rate` or `max_grad_norm`, compute in bf16 instead of fp16, or look at the rows."
    )


def out_of_memory(model: torch.nn.Module, args: Any, shape: torch.Size, error: Exception) -> torch.OutOfMemoryError:
    """The error with the three settings that save most, each with the GiB that a step takes then."""
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    try:
        now, changes = remedies(model, args, shape)
    except Exception:  # a model that cannot be traced; the error itself must come through
        return torch.OutOfMemoryError(reason)
    rows = "; ".join(f"{text} ({gib:.2f} GiB)" for text, gib in changes[:3])
    return torch.OutOfMemoryError(
        f"{reason} A step of {shape[0]} x {shape[1]} tokens takes {now:.2f} GiB by estimate (`llm-diffusion analyze`). What helps most: {rows}."
    )


def remedies(model: torch.nn.Module, args: Any, shape: torch.Size) -> tuple[float, list[tuple[str, float]]]:
    """GiB of a step on one card now, and after single changes of settings, the one that saves most first."""
    base = base_of(model)
    adapted = isinstance(model, PeftModel)
    kind = "full" if not adapted else "qlora" if getattr(base, "is_quantized", False) else "lora"
    setup = TrainingSetup(
        kind,
        shape[0],
        shape[1],
        model.peft_config[model.active_adapter].r if adapted else 16,
        "block" if record_of(base).mode.has_blocks else "bidirectional",
        bool(args.gradient_checkpointing),
        PAGED if "8bit" in str(args.optim) else "adamw",
    )
    device, memory = "cuda" if base.device.type == "cuda" else "cpu", ModelMemory(base.config)
    now = memory.training(setup, device)["total"]
    after = [(text, memory.training(tried, device)["total"]) for text, tried in _single_changes(setup, args)]
    return now, sorted((change for change in after if change[1] < now), key=lambda change: change[1])


def _single_changes(setup: TrainingSetup, args: Any) -> Iterator[tuple[str, TrainingSetup]]:
    rows, steps = setup.batch_size, args.gradient_accumulation_steps
    if rows > 1:
        text = (
            f"per_device_train_batch_size {rows} -> {rows // 2} with gradient_accumulation_steps {steps} -> {2 * steps}"
        )
        yield text, replace(setup, batch_size=rows // 2)
    if setup.length >= 4:
        yield f"max_length {setup.length} -> {setup.length // 2}", replace(setup, length=setup.length // 2)
    if not setup.gradient_checkpointing:
        yield "gradient_checkpointing false -> true", replace(setup, gradient_checkpointing=True)
    if setup.kind != "qlora":
        other = {"lora": ("quantization none -> nf4", "qlora"), "full": ("all weights -> LoRA", "lora")}[setup.kind]
        yield other[0], replace(setup, kind=other[1])
    if setup.optimizer != PAGED:
        yield f"optim -> {PAGED}", replace(setup, optimizer=PAGED)


def save_whole(trainer: Any, write: Callable[[], None], folder: Path) -> None:
    """Lets `write` write a checkpoint aside, and gives it its name when it is whole; then old ones go, as many as TRL would.

    A process that dies, or a disk that is full, leaves the checkpoints that were there before.
    """
    aside, accelerator = folder / UNFINISHED, trainer.accelerator
    if accelerator.is_local_main_process:
        shutil.rmtree(aside, ignore_errors=True)
    accelerator.wait_for_everyone()
    try:
        write()
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)  # a full disk has room again
        raise
    accelerator.wait_for_everyone()
    best = trainer.state.best_model_checkpoint
    if best is not None and Path(best).parent == aside:
        trainer.state.best_model_checkpoint = str(folder / Path(best).name)
        if trainer.args.should_save:
            trainer.state.save_to_json(str(Path(best) / "trainer_state.json"))
    if accelerator.is_local_main_process and aside.is_dir():
        for written in aside.iterdir():
            shutil.rmtree(folder / written.name, ignore_errors=True)
            written.rename(folder / written.name)
        aside.rmdir()
    accelerator.wait_for_everyone()
    if trainer.args.should_save:
        rotate_checkpoints(
            output_dir=str(folder),
            save_total_limit=trainer.args.save_total_limit,
            best_model_checkpoint=trainer.state.best_model_checkpoint,
            use_mtime=True,
        )
