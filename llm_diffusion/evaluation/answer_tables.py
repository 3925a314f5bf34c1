"""Answers of several models one by one: which are right on the same documents, and which of their steps hold.

Trade-off: whatever is right or wrong is compared, whoever judged it (a task's metric, the rule of a problem); figures of other kinds, a
perplexity for one, are not. Alternative: totals beside each other, from which no difference can be read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from statistics import fmean
from typing import Any

from ..reasoning.problems import Problem, is_right, read_problem
from ..reasoning.worked_answers import equations, judge
from .answers import prompt_and_reference
from .statistics import paired

WORKED_FORMS = ("gsm8k", "math")
TRAINABLE = ({"messages"}, {"text"}, {"prompt", "completion"})
# question, worked answer, right worked answer -> `right` and `first_wrong_step`
Judge = Callable[[str, str, str], dict[str, Any]]


def as_problem(record: dict) -> Problem:
    """A record of any form that `problems` reads, or an example of any trainable shape."""
    if set(record) >= {"text"} and "options" not in record:
        prompt, reference = prompt_and_reference(record)
        return Problem(({"role": "user", "content": prompt},), reference, "plain", reference, kind="all")
    return read_problem(record)


def as_example(record: dict) -> dict:
    """A trainable shape of a record; those that have one stay as they are."""
    trainable = any(columns <= set(record) for columns in TRAINABLE) and "options" not in record
    return record if trainable else as_problem(record).example()


def answer_tables(
    problems: Sequence[Problem],
    answers: dict[str, Sequence[str]],
    samples: dict[str, dict[str, list[dict]]],
    by_model: Judge | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """What the report says of single answers.

    Args:
        answers: to the problems, by model.
        samples: of the harness, by model, then by task.
        by_model: a judge who reads sentences too; see `judged_steps`.

    Returns:
        `paired`, see `statistics.Paired`; `worked`, see `judged_steps`, by model.
    """
    worked = {}
    for name in dict.fromkeys([*answers, *samples]):
        mine = list(zip(problems, answers[name], strict=True)) if name in answers else []
        if found := judged_steps(mine + worked_of_tasks(samples.get(name, {})), by_model):
            worked[name] = found
    compared = compared_answers(problems, answers, seed) if answers else []
    return {"paired": compared + compared_tasks(samples, seed), "worked": worked}


def compared_answers(
    problems: Sequence[Problem], answers: dict[str, Sequence[str]], seed: int = 0
) -> list[dict[str, Any]]:
    """Right final answers, by kind and, where there are several kinds, of all together; see `Paired`.

    Args:
        answers: by model, in the order of the problems.
    """
    right = {m: [is_right(p, a) for p, a in zip(problems, texts, strict=True)] for m, texts in answers.items()}
    kinds = list(dict.fromkeys(problem.kind for problem in problems))
    groups = {kind: [i for i, problem in enumerate(problems) if problem.kind == kind] for kind in kinds}
    if len(kinds) > 1:
        groups["all kinds"] = list(range(len(problems)))
    return [
        asdict(paired(f"prompts: {kind}", {m: [hits[i] for i in rows] for m, hits in right.items()}, seed))
        for kind, rows in groups.items()
    ]


def compared_tasks(samples: dict[str, dict[str, list[dict]]], seed: int = 0) -> list[dict[str, Any]]:
    """Of every task and metric that is right or wrong; `samples` of the harness by model, then by task."""
    hits = {model: _hits(by_task) for model, by_task in samples.items()}
    names = [name for name in next(iter(hits.values()), {}) if all(name in mine for mine in hits.values())]
    return [asdict(paired(name, {model: mine[name] for model, mine in hits.items()}, seed)) for name in names]


def _hits(by_task: dict[str, list[dict]]) -> dict[str, list[bool]]:
    found: dict[str, list[Any]] = {}
    for task, rows in by_task.items():
        for row in sorted(rows, key=lambda row: row["doc_id"]):
            kind = "" if row["filter"] == "none" else f" ({row['filter']})"
            for metric in row["metrics"]:
                found.setdefault(f"{task}, {metric}{kind}", []).append(row[metric])
    return {
        name: [bool(value) for value in values]
        for name, values in found.items()
        if all(isinstance(value, bool | int | float) and value in (0, 1) for value in values)
    }


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

    Args:
        by_model: a judge who reads sentences too, heard beside.

    Returns:
        `summary`, percents of the answers; `answers`, each with its labels; {} where no problem has a worked answer.
    """
    rows = []
    for problem, answer in pairs:
        if problem.form not in WORKED_FORMS:
            continue
        right = is_right(problem, answer)  # a number that nothing marks counts too
        found = judge(answer, problem.question, None if right else problem.reference)
        row = {
            "question": problem.question,
            "answer": answer,
            "right": right,
            "first_wrong_step": found.first_wrong_step,
            "superfluous": found.superfluous,
            "equations": len(equations(answer)),
        }
        if by_model is not None:
            row["judge"] = by_model(problem.question, answer, problem.answer)
        rows.append(row)
    if not rows:
        return {}
    return {"summary": _summary(rows), "answers": rows}


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
    judged = [row for row in rows if "judge" in row]
    if judged:
        found["judge: right, %"] = 100 * fmean(row["judge"]["right"] for row in judged)
        found["judge agrees on right, %"] = 100 * fmean(row["judge"]["right"] == row["right"] for row in judged)
    return found
