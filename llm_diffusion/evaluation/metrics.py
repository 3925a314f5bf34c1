"""Beside exact match: agreement and variety of texts, calibration, where answers end, how an answer forms; logged while a model trains.

References: distinct-n (arXiv 1510.03055, section 5.2), repetition rate as in unlikelihood training (arXiv 1908.04319, section 4, seq-rep-n),
expected calibration error (arXiv 1706.04599, section 2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainerState

from .. import UserError
from ..generation.config import DiffusionGenerationConfig
from ..generation.generate import generate
from ..generation.lengths import end_ids, end_probabilities, quantile_lengths
from ..models.files import atomic
from ..models.patching import base_of, in_eval_mode
from ..models.sampling import BANNED
from ..models.special_tokens import answer_end_id, end_token_ids
from ..objective.modes import IGNORE_INDEX
from ..objective.noise import uniform
from ..training.services import show
from .answers import (
    BATCH_SIZE,
    AnswerReport,
    encode_prompts,
    evaluate_answers,
    in_batches,
    prompt_and_reference,
    question_of,
)
from .likelihood import Row, kept_logits, padded, pair_row, plain_collator

BINS = 10  # of the confidence
REVEALED = (0.0, 0.25, 0.5, 0.75)
COLUMNS = ("probability", "top1", "reciprocal_rank", "error", "over", "under")
ANSWER_METRICS = ("exact_match", "eos_accuracy", "tokens_per_forward")  # and exact match of each kind
LOGGED = 4  # sample answers of an evaluation


# -- texts


def ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    """Runs of n words, blanks between them ignored."""
    words = text.split()
    return list(zip(*(words[i:] for i in range(n)), strict=False))


def distinct_n(texts: Sequence[str], n: int) -> float:
    """Share of different n-grams among all of the texts together; 0 where there are none."""
    found = [gram for text in texts for gram in ngrams(text, n)]
    return len(set(found)) / len(found) if found else 0.0


def repetition_rate(texts: Sequence[str], n: int = 4) -> float:
    """Share of n-grams that stood earlier in the same text, mean over the texts that have one."""
    found = [grams for text in texts if (grams := ngrams(text, n))]
    return fmean(1 - len(set(grams)) / len(grams) for grams in found) if found else 0.0


def word_repetition_rate(texts: Sequence[str]) -> float:
    """Share of words that are the same as the one before them, over all texts: what unmasking too many tokens at once does first."""
    same = [a == b for text in texts for a, b in ngrams(text, 2)]
    return fmean(same) if same else 0.0


def variety(texts: Sequence[str]) -> dict[str, float]:
    """Shares from 0 to 1."""
    distinct = {f"distinct_{n}": distinct_n(texts, n) for n in (1, 2)}
    return {**distinct, "repetition": repetition_rate(texts), "word_repetition": word_repetition_rate(texts)}


def check_references(references: Sequence[str]) -> None:
    """Refuses empty references, with which nothing can agree."""
    empty = [i for i, reference in enumerate(references) if not reference.strip()]
    if empty:
        raise UserError(f"`references`: number {empty[0]} is empty; leave its prompt out.")


def overlap(texts: Sequence[str], references: Sequence[str]) -> dict[str, float | str]:
    """Agreement with references: `bleu` and `chrf` (sacreBLEU, 0 to 100), `rouge1`, `rouge2`, `rougeL` (F, 0 to 1), and `sacrebleu`, the
    signature that makes the BLEU comparable. ImportError without the extra `eval`.
    """
    if len(texts) != len(references) or not texts:
        raise UserError(f"`references`: one for each of the {len(texts)} texts is needed, got {len(references)}.")
    check_references(references)
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics import BLEU, CHRF

    scorers, rouge = {"bleu": BLEU(), "chrf": CHRF()}, RougeScorer(["rouge1", "rouge2", "rougeL"])
    values = {name: scorer.corpus_score(list(texts), [list(references)]).score for name, scorer in scorers.items()}
    scores = [rouge.score(reference, text) for text, reference in zip(texts, references, strict=True)]
    values |= {kind: fmean(score[kind].fmeasure for score in scores) for kind in rouge.rouge_types}
    return {**values, "sacrebleu": str(scorers["bleu"].get_signature())}


# -- calibration


@dataclass
class Calibration:
    """How often tokens of a given confidence are right."""

    bins: list[tuple[float, float, int]]  # (mean confidence, share right, tokens) of every tenth that has tokens
    error: float  # expected calibration error, mean over tokens of |confidence - accuracy| of their bin


def reference_rows(tokenizer: PreTrainedTokenizerBase, examples: Sequence[dict], max_length: int) -> list[Row]:
    """References behind their prompts, with the end token of the answer; rows that are too long keep their ends."""
    rows = []
    for number, example in enumerate(examples):
        prompt, reference = prompt_and_reference(example)
        row, end = pair_row(tokenizer, prompt, reference, number), answer_end_id(tokenizer, prompt)
        whole = row.ids if end is None else (*row.ids, end)
        ids = whole[-max_length:]
        rows.append(Row(ids, max(1, len(ids) - (len(whole) - row.first)), number))
    return rows


def calibration(
    model: torch.nn.Module, rows: Sequence[Row], *, n_draws: int = 4, batch_size: int = 16, seed: int = 0
) -> Calibration:
    """Confidence in the best token against whether it is the reference's, over masked tokens at all noise levels of training.

    The noise, `n_draws` of it a row, is the same in every call.
    """
    collator, found = plain_collator(model), torch.zeros(3, BINS, dtype=torch.float64)
    with in_eval_mode(model):
        for batch in in_batches(rows, batch_size):
            clean = {name: value.to(base_of(model).device) for name, value in padded(batch, collator).items()}
            for number in range(n_draws):
                noisy = collator.corrupt(clean, seed=seed, step=number)
                keep = (noisy["targets"] != IGNORE_INDEX) & (noisy["levels"] > 0)
                logits = kept_logits(model, noisy["inputs"], keep).float()
                logits[:, collator.record.mask_token_id] = BANNED  # never proposed
                confidence, best = logits.softmax(-1).double().max(-1)
                right = (best == noisy["targets"][keep]).double()
                index = (confidence * BINS).long().clamp(max=BINS - 1).cpu()
                found.index_add_(1, index, torch.stack([confidence, right, torch.ones_like(right)]).cpu())
    bins = [(float(c / n), float(r / n), int(n)) for c, r, n in found.T if n]
    total = sum(n for _, _, n in bins)
    return Calibration(bins, sum(abs(c - r) * n for c, r, n in bins) / max(total, 1))


def denoising_trace(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, example: dict, settings: dict
) -> list[list[tuple[str, str]]]:
    """One answer after every step: words with their state, "mask", "new" (committed in this step) or "old"."""
    batch = encode_prompts(tokenizer, [example]).to(base_of(model).device)
    start, mask = batch["input_ids"].shape[1], tokenizer.mask_token_id
    output = generate(model, **batch, **{**settings, "output_history": True, "return_dict_in_generate": True})
    steps, before = [], [mask] * (output.sequences.shape[1] - start)
    for canvas in output.history or []:
        tokens = canvas[0, start : start + len(before)].tolist()
        states = ["mask" if t == mask else "old" if t == b else "new" for t, b in zip(tokens, before, strict=True)]
        words = ["_" if token == mask else tokenizer.decode([token]).replace("\n", " / ") for token in tokens]
        steps.append(list(zip(words, states, strict=True)))
        before = tokens
    return steps


# -- where answers end


def eos_positions(tokenizer: PreTrainedTokenizerBase, examples: Sequence[dict], report: AnswerReport) -> dict[str, Any]:
    """Where answers end beside where their references do, in tokens with the end token.

    Returns:
        `pairs` of (reference, answer or None: no end); `accuracy` and `ended`, percent that end where the reference does, and at all.
    """
    pairs = []
    for example, length, ended in zip(examples, report.tokens, report.ended, strict=True):
        row = pair_row(tokenizer, *prompt_and_reference(example))
        pairs.append((len(row.ids) - row.first + 1, length if ended else None))
    return {"pairs": pairs, "accuracy": 100 * fmean(a == b for a, b in pairs), "ended": 100 * fmean(report.ended)}


@dataclass
class EndReport:
    """Where a model foresees the ends of answers.

    `table` maps the share of the answer that was shown to means: `probability` of an end at the true place, its `top1` and `reciprocal_rank`
    among all places, `error` of the median length (absolute, in tokens), shares of answers foreseen too long (`over`) and too short.
    """

    canvas: int  # its tokens
    examples: int  # without those longer than the canvas
    table: dict[float, dict[str, float]] = field(default_factory=dict)
    curves: list[tuple[list[float], int]] = field(default_factory=list)  # P(end <= place) if empty, true lengths

    def __str__(self) -> str:
        lines = [f"end foreseen at the first step, canvas of {self.canvas}, {self.examples} answers"]
        lines.append("shown   " + "".join(f"{name:>17}" for name in COLUMNS))
        for share, row in self.table.items():
            lines.append(f"{share:<8.0%}" + "".join(f"{row[name]:>17.3f}" for name in COLUMNS))
        return "\n".join(lines)


def foresee_ends(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[dict],
    canvas: int = 64,
    revealed: Sequence[float] = REVEALED,
    seed: int = 0,
) -> EndReport:
    """Where a bidirectional model places the ends of answers, on an empty canvas and with shares of the answer shown.

    The place is judged, not the token: a model that predicts the end everywhere has the token right at every place.

    Args:
        examples: of any trainable shape; answers longer than the canvas are left out.
        revealed: shares of the answer's tokens that are shown, the end token never; which ones is seeded.
    """
    pairs, mask_id = [prompt_and_reference(example) for example in examples], tokenizer.mask_token_id
    answers = [tokenizer(text, add_special_tokens=False)["input_ids"] for _, text in pairs]
    kept = [i for i, answer in enumerate(answers) if len(answer) < canvas]
    if not kept:
        raise UserError(f"`canvas`={canvas}: every one of the {len(answers)} answers is longer; raise it.")
    report, device = EndReport(canvas, len(kept)), base_of(model).device
    lengths = torch.tensor([len(answers[i]) + 1 for i in kept])
    written = torch.tensor([answers[i] + [mask_id] * (canvas - len(answers[i])) for i in kept])
    noise = uniform(seed, torch.tensor(kept)[:, None], torch.arange(canvas))
    settings = DiffusionGenerationConfig(eos_token_id=end_token_ids(model, tokenizer), mask_token_id=mask_id)
    with in_eval_mode(model):
        for share in revealed:
            canvases, found = written.masked_fill(noise >= share, mask_id), []
            for rows in in_batches(range(len(kept)), BATCH_SIZE):
                batch = encode_prompts(tokenizer, [examples[kept[row]] for row in rows])
                ids = torch.cat([batch["input_ids"], canvases[rows]], -1).to(device)
                mask = torch.nn.functional.pad(batch["attention_mask"], (0, canvas), value=1).to(device)
                ends = end_ids(model, settings, device)
                found.append(end_probabilities(model, ids, mask, batch["input_ids"].shape[1], ends).cpu())
            table = {name: value.float() for name, value in end_metrics(torch.cat(found), lengths).items()}
            error = table["error"]
            table |= {"error": error.abs(), "over": (error > 0).float(), "under": (error < 0).float()}
            report.table[share] = {name: table[name].mean().item() for name in COLUMNS}
            if share == 0:
                report.curves = list(zip(found[0][:8].tolist(), lengths[:8].tolist(), strict=True))
    return report


def end_metrics(probabilities: torch.Tensor, lengths: torch.Tensor) -> dict[str, torch.Tensor]:
    """How well (B, W) P(end <= place) predict the true lengths (B,), end token included; the (B,) behind the means of `EndReport`.

    Places are ranked by how likely the answer ends just there; `error` has its sign.
    """
    highest = probabilities.cummax(-1).values
    here = highest - torch.nn.functional.pad(highest[:, :-1], (1, 0))  # the likelihood of every length
    place = (lengths - 1)[:, None]
    rank = 1 + (here.argsort(dim=-1, descending=True, stable=True) == place).int().argmax(-1)
    return {
        "probability": probabilities.gather(-1, place).squeeze(-1),
        "top1": rank == 1,
        "reciprocal_rank": 1 / rank,
        "error": quantile_lengths(probabilities, 0.5) - lengths,
    }


def plot_ends(report: EndReport, path: Path) -> None:
    """Saves what was foreseen of single answers, and how it gets better as they are shown, as a PNG."""
    from matplotlib.figure import Figure  # slow to import, needed once; `Figure` alone touches no display

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for number, (curve, length) in enumerate(report.curves):
        left.plot(range(1, len(curve) + 1), curve, color=f"C{number}")
        left.axvline(length, color=f"C{number}", linestyle=":", linewidth=1)
    left.set(xlabel="tokens", ylabel="P(answer has ended)", title="Empty canvas (dotted: the true end)")
    shares = [100 * share for share in report.table]
    for name in ("top1", "probability", "reciprocal_rank"):
        right.plot(shares, [row[name] for row in report.table.values()], "o-", label=name.replace("_", " "))
    right.set(xlabel="answer shown, %", ylim=(0, 1.02), title="The true end")
    right.grid(alpha=0.3)
    right.legend()
    with atomic(path) as file:
        figure.savefig(file, dpi=120)


# -- while a model trains


class ForeseenEndsCallback(TrainerCallback):
    """Logs at every evaluation how well the model foresees where answers end, as `eval_end_top1`, `eval_end_error`, …

        trainer.add_callback(ForeseenEndsCallback(trainer, examples, canvas=64))

    The picture of the last evaluation goes to `path`.
    """

    def __init__(self, trainer: Trainer, examples: list[dict], canvas: int = 64, path: Path | None = None) -> None:
        self.trainer, self.examples, self.canvas, self.path = trainer, examples, canvas, path

    def on_evaluate(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        # Every process calls the model: one whose weights are split needs them all.
        report = foresee_ends(self.trainer.model, self.trainer.processing_class, self.examples, self.canvas)
        self.trainer.log({f"eval_end_{name}": value for name, value in report.table[0.0].items()})
        if self.path is not None and state.is_world_process_zero:
            plot_ends(report, self.path)
            show(self.trainer, "ends", self.path)


class AnswersCallback(TrainerCallback):
    """Answers held-out prompts at every evaluation, through the trainer's own `log`, so to everything in `report_to`.

        trainer.add_callback(AnswersCallback(trainer, examples, max_new_tokens=128))

    Percent of `eval_exact_match` (mean over the kinds, and each) and `eval_eos_accuracy`; all but `eval_samples` are among the metrics of
    the evaluation too, to choose the best model by. W&B and Trackio show all answers in a table, `eval/answers`. Prompts are split between processes, each with all weights (DDP; not FSDP or ZeRO-3).
    """

    def __init__(self, trainer: Trainer, examples: Sequence[dict], **settings: Any) -> None:
        if not examples:
            raise UserError("`examples` are empty: there is nothing to answer.")
        self.trainer, self.examples, self.settings = trainer, list(examples), settings

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict | None = None, **kwargs: Any) -> None:
        tokenizer, examples = self.trainer.processing_class, self.examples
        report = evaluate_answers(self.trainer.model, tokenizer, examples, split=True, **self.settings)
        kinds = report.exact_match if len(report.exact_match) > 1 else {}
        values = {
            "eval_exact_match": report.mean,
            **{f"eval_exact_match_{kind}": share for kind, share in kinds.items()},
            "eval_eos_accuracy": eos_positions(tokenizer, examples, report)["accuracy"],
            "eval_tokens_per_forward": report.tokens_per_forward,
        }
        if metrics is not None:
            metrics.update(values)
        rows = [
            {"question": question_of(example), "answer": answer, "reference": prompt_and_reference(example)[1]}
            for example, answer in zip(examples, report.answers, strict=True)
        ]
        shown = ["{question} -> {answer} (reference: {reference})".format_map(row) for row in rows[:LOGGED]]
        self.trainer.log({**values, "eval_samples": "\n\n".join(shown)})
        show(self.trainer, "answers", rows)
