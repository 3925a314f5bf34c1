"""Two or more models on the same problems: exact match with confidence intervals, and a paired test.

    comparison = compare(problems, {"SFT": answers, "SFT + DPO": other_answers})
    print(comparison.differences[0].p_value)

Purpose: to know whether a difference is one. The same problems are answered by all models, so the test looks only at those on which
they differ (McNemar 1947, exact), which is far sharper than comparing two intervals.
Trade-off: p-values are for one pair each; with three models there are three, to be judged together (Bonferroni: times three).
Alternative: intervals side by side, from which no difference can be read.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import NormalDist, fmean

import torch
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from .. import UserError
from ..reasoning.problems import Problem, f1, is_right
from ..reasoning.worked_answers import judge
from .answers import evaluate_answers

CONFIDENCE = 0.95
RESAMPLES = 2000


@dataclass
class Score:
    """Of one model on one kind of problem (or "all").

    Args:
        n: problems.
        exact_match: percent, with its Wilson interval.
        f1: mean word overlap, percent, with its bootstrap interval; None where no problem is of HotpotQA's form.
        false_step: percent of answers with an equation that does not hold.
        superfluous_step: percent of answers with a step that repeats another or that nothing uses.
    """

    n: int
    exact_match: float
    interval: tuple[float, float]
    f1: float | None
    f1_interval: tuple[float, float] | None
    false_step: float
    superfluous_step: float


@dataclass
class Difference:
    """Exact match of `second` minus that of `first`, in points, on the same problems.

    Args:
        interval: of the difference, by paired bootstrap.
        only_first, only_second: problems that only one of them has right.
        p_value: two-sided, exact McNemar.
    """

    first: str
    second: str
    points: float
    interval: tuple[float, float]
    only_first: int
    only_second: int
    p_value: float


@dataclass
class Paired:
    """Models that were right or wrong on the same documents.

    Args:
        what: of a task and metric, or of a kind of problem.
        shares: percent that is right and its Wilson interval, by model.
        differences: of every two models.
    """

    what: str
    n: int
    shares: dict[str, tuple[float, float, float]]
    differences: list[Difference]


@dataclass
class Comparison:
    scores: dict[str, dict[str, Score]] = field(default_factory=dict)  # by model, then by kind
    differences: list[Difference] = field(default_factory=list)

    def tables(self) -> list[Table]:
        """One table of scores and, for several models, one of differences."""
        n = next(iter(self.scores.values()))["all"].n
        table = Table(title=f"Exact match on {n} problems, %, with {CONFIDENCE:.0%} intervals (Wilson)")
        table.add_column("kind")
        for name in self.scores:
            table.add_column(name, justify="right")
        for kind in next(iter(self.scores.values())):
            table.add_row(kind, *(_shown(s[kind].exact_match, s[kind].interval) for s in self.scores.values()))
        for label, value in (("a step does not hold", "false_step"), ("a step is superfluous", "superfluous_step")):
            table.add_row(label, *(f"{getattr(s['all'], value):.1f}" for s in self.scores.values()))
        if any(s["all"].f1 is not None for s in self.scores.values()):
            table.add_row("F1", *(_shown(s["all"].f1, s["all"].f1_interval) for s in self.scores.values()))
        if not self.differences:
            return [table]
        paired = Table(title="Differences on the same problems, points (paired bootstrap; McNemar, exact)")
        for column in ("models", "difference", "only first right", "only second right", "p"):
            paired.add_column(column, justify="left" if column == "models" else "right")
        for d in self.differences:
            shown = _shown(d.points, d.interval, "+")
            paired.add_row(f"{d.second} - {d.first}", shown, str(d.only_first), str(d.only_second), f"{d.p_value:.2g}")
        return [table, paired]


def _shown(value: float, interval: tuple[float, float], sign: str = "") -> str:
    return f"{value:{sign}.1f} [{interval[0]:{sign}.1f}, {interval[1]:{sign}.1f}]"


def wilson_interval(right: int, n: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Bounds of a share, 0 to 1 (Wilson 1927); sound near 0 and 1, where the normal approximation is not."""
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share, correction = right / n, z * z / n
    centre = (share + correction / 2) / (1 + correction)
    half = z * math.sqrt(share * (1 - share) / n + correction / (4 * n)) / (1 + correction)
    return max(0.0, centre - half), min(1.0, centre + half)


def bootstrap_interval(
    values: Sequence[float], confidence: float = CONFIDENCE, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """Bounds of a mean: percentiles of the means of samples drawn from `values` with replacement."""
    rng = random.Random(seed)
    means = sorted(fmean(rng.choices(values, k=len(values))) for _ in range(resamples))
    tail = int((1 - confidence) / 2 * resamples)
    return means[tail], means[-1 - tail]


def mcnemar_exact(only_first: int, only_second: int) -> float:
    """Two-sided p-value that two models are equally often right, from the problems that only one of them has right."""
    n, fewer = only_first + only_second, min(only_first, only_second)
    return min(1.0, 2 * sum(math.comb(n, k) for k in range(fewer + 1)) / 2**n)


def paired(what: str, right: dict[str, Sequence[bool]], seed: int = 0) -> Paired:
    """Shares of every model and differences of every two; `right` by model, the documents in the same order."""
    n = len(next(iter(right.values())))
    shares = {name: _share(sum(hits), n) for name, hits in right.items()}
    pairs = itertools.combinations(right, 2)
    return Paired(what, n, shares, [_difference(a, b, right[a], right[b], seed) for a, b in pairs])


def _share(right: int, n: int) -> tuple[float, float, float]:
    low, high = wilson_interval(right, n)
    return 100 * right / n, 100 * low, 100 * high


def answer_problems(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    *,
    autoregressive: bool = False,
    **settings: object,
) -> list[str]:
    """The model's answers, in the order of the problems; `settings` are decoding settings."""
    examples = [problem.example() for problem in problems]
    return evaluate_answers(model, tokenizer, examples, autoregressive=autoregressive, **settings).answers


def compare(problems: Sequence[Problem], answers: dict[str, Sequence[str]], seed: int = 0) -> Comparison:
    """Scores every model's answers to the same problems, and every two models against each other.

    Args:
        answers: by name of the model, in the order of the problems.
        seed: of the bootstraps.

    Raises:
        ValueError: no problem or model, or a model with more or fewer answers than problems.
    """
    if not problems or not answers:
        raise UserError(f"`compare` needs problems and answers, got {len(problems)} and {len(answers)}.")
    for name, texts in answers.items():
        if len(texts) != len(problems):
            raise UserError(f"`answers`: {name!r} has {len(texts)} answers to {len(problems)} problems.")
    right = {name: [is_right(p, a) for p, a in zip(problems, texts, strict=True)] for name, texts in answers.items()}
    kinds = list(dict.fromkeys(problem.kind for problem in problems))
    groups = {k: [i for i, p in enumerate(problems) if p.kind == k] for k in kinds if len(kinds) > 1}
    groups["all"] = list(range(len(problems)))
    found = Comparison()
    for name, texts in answers.items():
        found.scores[name] = {
            kind: _score([(problems[i], texts[i], right[name][i]) for i in rows], seed) for kind, rows in groups.items()
        }
    found.differences = paired("all", right, seed).differences
    return found


def _score(rows: Sequence[tuple[Problem, str, bool]], seed: int) -> Score:
    n, (share, *interval) = len(rows), _share(sum(hit for _, _, hit in rows), len(rows))
    judgements = [judge(answer) for _, answer, _ in rows]
    overlaps = [100 * f1(problem, answer) for problem, answer, _ in rows if problem.form == "hotpotqa"]
    return Score(
        n,
        share,
        tuple(interval),
        fmean(overlaps) if overlaps else None,
        bootstrap_interval(overlaps, seed=seed) if overlaps else None,
        100 * fmean(bool(j.false_steps) for j in judgements),
        100 * fmean(bool(j.superfluous) for j in judgements),
    )


def _difference(first: str, second: str, a: Sequence[bool], b: Sequence[bool], seed: int) -> Difference:
    points = [100.0 * (y - x) for x, y in zip(a, b, strict=True)]
    only_first, only_second = points.count(-100.0), points.count(100.0)
    interval = bootstrap_interval(points, seed=seed)
    return Difference(
        first, second, fmean(points), interval, only_first, only_second, mcnemar_exact(only_first, only_second)
    )
