"""What a training run shows: a line of figures where a log is read, so that `tail -f` stays readable, and the loss curve."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerState

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
    """Saves training and held-out NELBO of the phases (phase -> `trainer.state.log_history`), one after the other, as a PNG."""
    from matplotlib.figure import Figure  # slow to import, needed once; `Figure` alone touches no display

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes, offset = figure.subplots(), 0
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
    figure.savefig(path, dpi=120)
