"""Advice when a training step runs out of memory, by the estimate of `analysis`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from peft import PeftModel

from ..analysis import PAGED, ModelMemory, TrainingSetup
from ..models.patching import base_of
from ..models.record import record_of


def out_of_memory(model: torch.nn.Module, args: Any, shape: torch.Size, error: Exception) -> torch.OutOfMemoryError:
    """The error with the three settings that save most, each with the GiB that a step takes then."""
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    try:
        now, changes = remedies(model, args, shape)
    except Exception:  # a model that cannot be estimated; the error itself must come through
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
