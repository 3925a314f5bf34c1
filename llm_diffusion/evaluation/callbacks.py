"""Measures answers while a model trains, through the log of its trainer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .. import UserError
from .answers import evaluate_answers, prompt_and_reference
from .calibration import eos_positions
from .ends import foresee_ends, plot_ends

SHOWN = 4  # sample answers of an evaluation


class ForeseenEndsCallback(TrainerCallback):
    """Logs at every evaluation how well the model foresees where answers end, as `eval_end_top1`, `eval_end_error`, …

    Args:
        trainer: whose model is asked, and whose log is written to.
        examples: held-out, of any trainable shape.
        canvas: tokens of the empty canvas.
        path: where the picture of the last evaluation goes; None: nowhere.

    Example:

        trainer.add_callback(ForeseenEndsCallback(trainer, examples, canvas=64))
    """

    def __init__(self, trainer: Trainer, examples: list[dict], canvas: int = 64, path: Path | None = None) -> None:
        self.trainer, self.examples, self.canvas, self.path = trainer, examples, canvas, path

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        # Every process asks the whole list: a model that is cut up among them must be called by all.
        report = foresee_ends(self.trainer.model, self.trainer.processing_class, self.examples, self.canvas)
        self.trainer.log({f"eval_end_{name}": value for name, value in report.table[0.0].items()})
        if self.path is not None and state.is_world_process_zero:
            plot_ends(report, self.path)


class AnswersCallback(TrainerCallback):
    """Answers held-out prompts at every evaluation, through the trainer's own `log`, so to everything in `report_to`.

    Logged: `eval_exact_match`, percent, mean over the kinds and of every kind; `eval_eos_accuracy`, percent of answers that end where the
    reference does; `eval_tokens_per_forward`; `eval_samples`, some answers as text. They are among the metrics of the evaluation too, so
    that the best model may be chosen by them. The prompts are dealt out to the processes, each of which needs all weights (DDP; not
    FSDP or ZeRO-3).

    Args:
        trainer: to be added to, `trainer.add_callback(AnswersCallback(trainer, examples))`.
        examples: of a trainable shape, with references.
        settings: of decoding.
    """

    def __init__(self, trainer: Trainer, examples: Sequence[dict], **settings: Any) -> None:
        if not examples:
            raise UserError("`examples` are empty: there is nothing to answer.")
        self.trainer, self.examples, self.settings = trainer, list(examples), settings

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        tokenizer, rows = self.trainer.processing_class, []
        report = evaluate_answers(self.trainer.model, tokenizer, self.examples, split=True, **self.settings)
        pairs = eos_positions(tokenizer, self.examples, report)["pairs"]
        for example, answer, (wanted, found) in zip(self.examples, report.answers, pairs, strict=True):
            prompt, reference = prompt_and_reference(example)
            rows.append(
                {
                    "kind": example.get("kind", "all"),
                    "right": answer.strip() == reference.strip(),
                    "ends": wanted == found,
                    "rate": report.tokens_per_forward,
                    "text": f"{prompt if isinstance(prompt, str) else prompt[-1]['content']} -> {answer} (reference: {reference})",
                }
            )
        values = _answer_metrics(rows)
        if metrics is not None:
            metrics.update(values)
        self.trainer.log({**values, "eval_samples": "\n\n".join(row["text"] for row in rows[:SHOWN])})


def _answer_metrics(rows: list[dict]) -> dict[str, float]:
    kinds = {kind: [row["right"] for row in rows if row["kind"] == kind] for kind in sorted({r["kind"] for r in rows})}
    by_kind = {f"eval_exact_match_{kind}": 100 * sum(right) / len(right) for kind, right in kinds.items()}
    return {
        "eval_exact_match": sum(by_kind.values()) / len(by_kind),
        **(by_kind if len(by_kind) > 1 else {}),
        "eval_eos_accuracy": 100 * sum(row["ends"] for row in rows) / len(rows),
        "eval_tokens_per_forward": sum(row["rate"] for row in rows) / len(rows),
    }
