"""What a training run shows: a line of figures where a log is read, answers as they get better, and the loss curve as a picture.

Trade-off: log lines instead of the host's progress bar when the output is no terminal, so that `tail -f` of a `nohup` log stays
readable. Alternative: the host's `PrinterCallback`, which prints raw dicts.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class LogLinesCallback(TrainerCallback):
    """Writes one line a logging step: phase, step, loss, accuracy, time left."""

    def __init__(self, write: Callable[[str], None], phase: str) -> None:
        self.write, self.phase, self.started = write, phase, 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self.started = time.perf_counter()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict | None = None,
        **kwargs: object,
    ) -> None:
        if not state.is_world_process_zero or not logs or "train_runtime" in logs:
            return
        names = {
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
        if not any("nelbo" in name for name in logs):  # a drafter, whose loss is no bound
            names = {"masked_nll": "nats/token", "eval_masked_nll": "held-out nats/token", **names}
        figures = "  ".join(f"{label} {float(logs[name]):.3g}" for name, label in names.items() if name in logs)
        took = time.perf_counter() - self.started
        left = took / max(state.global_step, 1) * (state.max_steps - state.global_step)
        self.write(
            f"{self.phase}  step {state.global_step}/{state.max_steps}  {figures}  {took:.0f} s, {left:.0f} s left"
        )


def plot_loss(histories: dict[str, list[dict]], path: Path) -> None:
    """Saves training and held-out NELBO of the phases, one after the other, as a PNG.

    Args:
        histories: phase -> `trainer.state.log_history`.
    """
    from matplotlib.figure import Figure  # slow to import, needed once; `Figure` alone touches no display

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes, offset = figure.subplots(), 0
    for number, (phase, history) in enumerate(histories.items()):
        train, held_out = (_curve(history, offset, prefix) for prefix in ("", "eval_"))
        if train:
            axes.plot(*zip(*train, strict=True), color=f"C{number}", label=f"{phase}: training")
        if held_out:
            axes.plot(*zip(*held_out, strict=True), "o", color=f"C{number}", label=f"{phase}: held out")
        offset = max([offset, *(step for step, _ in train + held_out)])
    axes.set(xlabel="optimiser step", ylabel="NELBO, nats a token", yscale="log", title="Mask-and-denoise training")
    axes.grid(alpha=0.3)
    if axes.has_data():
        axes.legend()
    figure.savefig(path, dpi=120)


def _curve(history: list[dict], offset: int, prefix: str) -> list[tuple[int, float]]:
    """Steps and NELBO; of a drafter, which has none, the NLL of what it drafts."""
    kind = "nelbo" if any(f"{prefix}nelbo" in row for row in history) else "masked_nll"
    return [(offset + row["step"], row[prefix + kind]) for row in history if prefix + kind in row]
