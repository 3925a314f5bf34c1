"""Models on the same documents: how many each has right, and whether a difference is one; worked answers, step by step.

The test of a difference looks only at the documents on which two models differ (McNemar 1947, exact), which is far sharper than comparing
two intervals. A p-value is of one pair of models; several are to be judged together (Bonferroni: times their number).
"""

from __future__ import annotations

import itertools
import math
import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ..generation.inference import DiffusionInference, continue_autoregressive
from ..models.loading import autoregressive_base, load_autoregressive
from ..models.special_tokens import prompt_ids
from ..reasoning.problems import Problem, f1, is_right, read_problem
from ..reasoning.worked_answers import equations, judge
from .answers import evaluate_answers

WORKED_FORMS = ("gsm8k", "math")
# question, worked answer, right worked answer -> `right` and `first_wrong_step`
Judge = Callable[[str, str, str], dict[str, Any]]


def wilson_interval(right: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Bounds of a share, 0 to 1 (Wilson 1927)."""
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share, correction = right / n, z * z / n
    centre = (share + correction / 2) / (1 + correction)
    half = z * math.sqrt(share * (1 - share) / n + correction / (4 * n)) / (1 + correction)
    return max(0.0, centre - half), min(1.0, centre + half)


def bootstrap_interval(
    values: Sequence[float], confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Bounds of a mean: percentiles of the means of samples drawn from `values` with replacement."""
    rng = random.Random(seed)
    means = sorted(fmean(rng.choices(values, k=len(values))) for _ in range(resamples))
    tail = int((1 - confidence) / 2 * resamples)
    return means[tail], means[-1 - tail]


def mcnemar_exact(only_first: int, only_second: int) -> float:
    """Two-sided p-value that two models are equally often right, from the documents that only one of them has right."""
    n, fewer = only_first + only_second, min(only_first, only_second)
    return min(1.0, 2 * sum(math.comb(n, k) for k in range(fewer + 1)) / 2**n)


def paired(what: str, scores: dict[str, Sequence[float]], seed: int = 0) -> dict[str, Any]:
    """Means of every model, and differences of every two, in percent and points with their intervals.

    Args:
        what: a task and metric, or a kind of problem.
        scores: by model, the documents in the same order: right or wrong, or an overlap from 0 to 1.

    Returns:
        `what`; `n` documents; `shares` by model, (mean, low, high), by Wilson where everything is right or wrong, else by bootstrap;
        `differences`, `second` minus `first`, with the documents on which only one is right (of an overlap: higher).
    """
    shares, differences = {}, []
    for name, values in scores.items():
        binary, n = set(values) <= {0, 1}, len(values)
        bounds = wilson_interval(sum(values), n) if binary else bootstrap_interval(values, seed=seed)
        shares[name] = tuple(100 * value for value in (sum(values) / n, *bounds))
    for first, second in itertools.combinations(scores, 2):
        points = [100.0 * (y - x) for x, y in zip(scores[first], scores[second], strict=True)]
        found = {"first": first, "second": second, "points": fmean(points)}
        found["interval"] = bootstrap_interval(points, seed=seed)
        only = sum(point < 0 for point in points), sum(point > 0 for point in points)
        found |= {"only_first": only[0], "only_second": only[1], "p_value": mcnemar_exact(*only)}
        differences.append(found)
    return {"what": what, "n": n, "shares": shares, "differences": differences}


# -- answers one by one


def answer_tables(
    problems: Sequence[Problem],
    answers: dict[str, Sequence[str]],
    samples: dict[str, dict[str, list[dict]]],
    by_model: Judge | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Answers to the problems, by model, and `samples` of the harness, by model, then by task: `paired`, compared; `worked`, re-evaluated."""
    worked = {}
    for name in dict.fromkeys([*answers, *samples]):
        mine = list(zip(problems, answers.get(name, ()), strict=False))
        if found := judged_steps(mine + worked_of_tasks(samples.get(name, {})), by_model):
            worked[name] = found
    compared = compared_answers(problems, answers, seed) if answers else []
    return {"paired": compared + compared_tasks(samples, seed), "worked": worked}


def compared_answers(
    problems: Sequence[Problem], answers: dict[str, Sequence[str]], seed: int = 0
) -> list[dict[str, Any]]:
    """Right final answers by kind and, where there are several kinds, of all together; for HotpotQA the word overlap (F1). See `paired`."""

    def scored(what: str, score: Callable[[Problem, str], float], rows: list[int]) -> dict[str, Any]:
        found = {name: [score(problems[i], texts[i]) for i in rows] for name, texts in answers.items()}
        return paired(f"prompts: {what}", found, seed)

    groups = defaultdict(list)
    for i, problem in enumerate(problems):
        groups[problem.kind].append(i)
    if len(groups) > 1:
        groups["all kinds"] = list(range(len(problems)))
    overlapping = [i for i, problem in enumerate(problems) if problem.form == "hotpotqa"]
    compared = [scored(kind, is_right, rows) for kind, rows in groups.items()]
    return compared + ([scored("F1", f1, overlapping)] if overlapping else [])


def compared_tasks(samples: dict[str, dict[str, list[dict]]], seed: int = 0) -> list[dict[str, Any]]:
    """Of every task and metric that is right or wrong; `samples` of the harness by model, then by task."""
    hits = {model: _hits(by_task) for model, by_task in samples.items()}
    names = [name for name in next(iter(hits.values()), {}) if all(name in mine for mine in hits.values())]
    return [paired(name, {model: mine[name] for model, mine in hits.items()}, seed) for name in names]


def _hits(by_task: dict[str, list[dict]]) -> dict[str, list[bool]]:
    found = defaultdict(list)
    for task, rows in by_task.items():
        for row in sorted(rows, key=lambda row: row["doc_id"]):
            kind = "" if row["filter"] == "none" else f" ({row['filter']})"
            for metric in row["metrics"]:
                found[f"{task}, {metric}{kind}"].append(row[metric])
    return {name: [bool(v) for v in values] for name, values in found.items() if all(v in (0, 1) for v in values)}


def worked_of_tasks(by_task: dict[str, list[dict]]) -> list[tuple[Problem, str]]:
    """Problems with worked answers among the documents of tasks, with the answers before any extraction."""
    found = []
    for rows in by_task.values():
        first = {row["doc_id"]: row for row in reversed(rows)}  # of several filters one
        for _, row in sorted(first.items()):
            if not isinstance(row["resps"][0][0], str):  # a likelihood
                break
            try:
                problem = read_problem(row["doc"])
            except ValueError:  # no form of ours
                break
            found.append((problem, row["resps"][0][0]))
    return found


def judged_steps(pairs: Iterable[tuple[Problem, str]], by_model: Judge | None = None) -> dict[str, Any]:
    """Worked answers to problems that have them (GSM8K, MATH), re-evaluated step by step; steps are counted from 0.

    Returns:
        `summary`, percents of the answers; `answers`, each with its labels; {} where no problem has a worked answer.
    """
    rows = []
    for problem, answer in pairs:
        if problem.form not in WORKED_FORMS:
            continue
        right = is_right(problem, answer)  # a number that nothing marks counts too
        found = judge(answer, problem.question, None if right else problem.reference)
        row = {"question": problem.question, "answer": answer, "right": right, "equations": len(equations(answer))}
        row |= {"first_wrong_step": found.first_wrong_step, "superfluous": found.superfluous}
        if by_model is not None:
            row["judge"] = by_model(problem.question, answer, problem.answer)
        rows.append(row)
    return {"summary": _summary(rows), "answers": rows} if rows else {}


def _summary(rows: Sequence[dict[str, Any]]) -> dict[str, float | int]:
    wrong = [row["first_wrong_step"] for row in rows if row["first_wrong_step"] is not None]
    found: dict[str, float | int | None] = {
        "worked answers": len(rows),
        "right, %": 100 * fmean(row["right"] for row in rows),
        "with an equation, %": 100 * fmean(row["equations"] > 0 for row in rows),
        "with a wrong step, %": 100 * len(wrong) / len(rows),
        "first wrong step, mean": 1 + fmean(wrong) if wrong else None,
        "with a superfluous step, %": 100 * fmean(bool(row["superfluous"]) for row in rows),
    }
    if all("judge" in row for row in rows):
        found["judge: right, %"] = 100 * fmean(row["judge"]["right"] for row in rows)
        found["judge agrees on right, %"] = 100 * fmean(row["judge"]["right"] == row["right"] for row in rows)
    return found


# -- models side by side, by both pipelines

# Decoding settings that both pipelines know; the others are of unmasking alone.
SHARED_SETTINGS = ("max_new_tokens", "do_sample", "temperature", "top_k", "top_p", "repetition_penalty", "seed")


@dataclass
class Continuations:
    """What one model answers by one pipeline; tokens per forward are the mean over answers, 1 from left to right."""

    model: str
    pipeline: str
    texts: list[str]
    tokens_per_forward: float = 1.0
    seconds: float = 0.0
    nll_per_token: float = float("inf")  # under the judge, prompts given


def side_by_side(
    models: list[str],
    prompts: list[str],
    load: Callable[[str], DiffusionInference],
    settings: dict[str, Any],
    chat: bool = False,
) -> list[Continuations]:
    """Every model from left to right, with the settings of `SHARED_SETTINGS`, and by unmasking, as `load` gives it.

    The first, from left to right, judges the answers. Low figures alone prove little: text that repeats itself is likely too.

    Args:
        chat: whether the prompts are questions, to be put by every model's chat template.
    """

    def templated(tokenizer: PreTrainedTokenizerBase) -> list[str]:
        if not chat:
            return prompts
        turns = ([{"role": "user", "content": prompt}] for prompt in prompts)
        return [tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True) for turn in turns]

    shared = {name: value for name, value in settings.items() if name in SHARED_SETTINGS}
    judge, rows = load_autoregressive(autoregressive_base(models[0])), []
    for number, name in enumerate(models):
        model, tokenizer = load_autoregressive(autoregressive_base(name)) if number else judge
        started = time.perf_counter()
        texts = continue_autoregressive(model, tokenizer, templated(tokenizer), **shared)
        rows.append(Continuations(name, "arm", texts, seconds=time.perf_counter() - started))
        inference = load(name)
        examples = [{"prompt": prompt, "completion": ""} for prompt in templated(inference.tokenizer)]
        report = evaluate_answers(inference.model, inference.tokenizer, examples, **inference.settings)
        rows.append(Continuations(name, "diffusion", report.answers, report.tokens_per_forward, report.seconds))
    for row in rows:
        row.nll_per_token = nll_per_token(*judge, templated(judge[1]), row.texts)
    return rows


@torch.no_grad()
def nll_per_token(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, prompts: list[str], answers: list[str]
) -> float:
    """Nats a token that a causal model needs for the answers, prompts given; infinite if all answers are empty."""
    total, count = 0.0, 0
    for prompt, answer in zip(prompts, answers, strict=True):
        start = prompt_ids(tokenizer, prompt)
        ids = torch.tensor([start + tokenizer(answer, add_special_tokens=False)["input_ids"]], device=model.device)
        logits = model(input_ids=ids).logits[0, len(start) - 1 : -1].float()
        total += torch.nn.functional.cross_entropy(logits, ids[0, len(start) :], reduction="sum").item()
        count += ids.shape[1] - len(start)
    return total / count if count else float("inf")
