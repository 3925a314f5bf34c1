"""Preference pairs and labelled answers as JSONL: out to people or a judge, and back.

    {"prompt": […], "chosen": […], "rejected": […], "kind": "calculation_slip", "step": 1, "span": [14, 16]}     a pair
    {"prompt": […], "answer": "…", "reference": "…", "right": true, "first_wrong_step": null}                    a labelled answer

Trade-off: whoever labels edits `right` (or the texts) in any editor. Alternative: a labelling tool with a format of its own.
"""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from collections.abc import Iterable, Sequence
from os.path import commonprefix
from pathlib import Path

from datasets import Dataset

from .. import UserError
from ..data.datasets import load_any
from .arithmetic_errors import Trace, Wrong
from .pairs import (
    FEATURES,
    KINDS,
    NATURAL_KINDS,
    is_declared,
    preference_pairs,
)
from .problems import Problem, read_problem
from .text_errors import LENGTH_BOUND
from .worked_answers import judge, step_at

logger = logging.getLogger(__name__)


def write_rows(path: str | Path, rows: Iterable[dict]) -> None:
    """One JSON object a line; the file appears when all of it is written."""
    path = Path(path).expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".unfinished")
    with unfinished.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    unfinished.replace(path)


def read_pairs(path: str | Path) -> Dataset:
    """Pairs of a JSONL file (or any dataset file), checked; see `checked_pairs`."""
    return checked_pairs(load_any(str(path))["train"])


def checked_pairs(rows: Iterable[dict]) -> Dataset:
    """Pairs as `preference_pairs` makes them, or with `prompt`, `chosen` and `rejected` alone (texts or messages; kind `labelled`).

    A pair that bears the name of an injected error is re-evaluated: it must be wrong in that way.

    Raises:
        ValueError: a column is missing, a side is empty, both are the same, or a pair is not what its kind says.
    """
    found = [_checked_pair(dict(row), f"`pairs`: row {index}") for index, row in enumerate(rows)]
    if not found:
        raise UserError("`pairs`: there is no pair.")
    return Dataset.from_list(found, features=FEATURES)


def _checked_pair(row: dict, where: str) -> dict:
    missing = [name for name in ("prompt", "chosen", "rejected") if row.get(name) is None]
    if missing:
        raise UserError(f"{where} lacks {missing}, it has {sorted(row)}; `prompt`, `chosen` and `rejected` are needed.")
    prompt = _as_messages(row["prompt"], "user", f"{where}: `prompt`")
    sides = {name: _as_messages(row[name], "assistant", f"{where}: `{name}`") for name in ("chosen", "rejected")}
    chosen, rejected = (sides[name][-1]["content"] for name in ("chosen", "rejected"))
    if chosen.strip() == rejected.strip():
        raise UserError(f"{where}: `chosen` and `rejected` are the same; change one of them or leave the row out.")
    kind = row.get("kind") or "labelled"
    if kind not in KINDS + NATURAL_KINDS:
        raise UserError(f"{where}: `kind` must be one of {list(KINDS + NATURAL_KINDS)}, got {kind!r}.")
    span = row.get("span") or list(_changed(chosen, rejected))
    if len(span) != 2 or not 0 <= span[0] <= span[1] <= len(rejected):
        raise UserError(f"{where}: `span` must be a start and an end within the rejected answer, got {span}.")
    if kind in KINDS and not is_declared(
        Trace(read_problem({"messages": [*prompt, *sides["chosen"]]})), kind, Wrong(rejected, tuple(span))
    ):
        raise UserError(f"{where}: the rejected answer is not wrong by {kind}; correct it, or leave `kind` out.")
    step = row.get("step")
    step = step_at(rejected, span[0]) if step is None else step
    return {"prompt": prompt, **sides, "kind": kind, "step": step, "span": list(span)}


def _as_messages(side: str | list[dict], role: str, where: str) -> list[dict]:
    messages = [{"role": role, "content": side}] if isinstance(side, str) else list(side)
    if not messages or not all({"role", "content"} <= set(m) for m in messages):
        raise UserError(f"{where} must be text or messages with `role` and `content`, got {side!r}.")
    if not (messages[-1]["content"] or "").strip():
        raise UserError(f"{where} is empty; give it a text or leave the row out.")
    return [{"role": m["role"], "content": m["content"]} for m in messages]


def _changed(chosen: str, rejected: str) -> tuple[int, int]:
    """The characters of the rejected text between what both texts begin and end with."""
    start = len(commonprefix([chosen, rejected]))
    tail = len(commonprefix([chosen[start:][::-1], rejected[start:][::-1]]))
    return start, len(rejected) - tail


def labelled_answer(problem: Problem, answer: str, right: bool | None) -> dict:
    """A row for people or a judge: `right` is theirs to change, None is not judged yet."""
    return {
        "prompt": list(problem.prompt),
        "answer": answer,
        "reference": problem.answer,
        "right": right,
        "first_wrong_step": None if right else judge(answer, problem.question, problem.reference).first_wrong_step,
    }


def pairs_from_answers(rows: Sequence[dict]) -> Dataset:
    """Pairs of labelled answers: each wrong one with the right one of the same prompt that is nearest in length.

    The reference stands in for a right answer. Wrong answers whose length differs by more than a tenth from every right one are left
    out, with a line that says how many.

    Args:
        rows: as `labelled_answer` makes them; rows whose `right` is null are not judged and not used.

    Raises:
        ValueError: a column is missing, or no pair comes about.
    """
    groups: dict[str, list[dict]] = defaultdict(list)
    for index, row in enumerate(rows):
        if not {"prompt", "answer", "right"} <= set(row) or row["right"] not in (True, False, None):
            raise UserError(
                f"`answers`: row {index} must have `prompt`, `answer` and `right` (true, false or null), got {sorted(row)}."
            )
        prompt = _as_messages(row["prompt"], "user", f"`answers`: row {index}: `prompt`")
        groups[json.dumps(prompt)].append(row)
    pairs, left_out = [], 0
    for prompt, answers in groups.items():
        rights = {a["answer"] for a in answers if a["right"]} | {a["reference"] for a in answers if a.get("reference")}
        for wrong in dict.fromkeys(a["answer"] for a in answers if a["right"] is False and a["answer"].strip()):
            near = sorted(rights - {wrong}, key=lambda right: (abs(len(right) - len(wrong)), right))
            if near and abs(len(near[0]) - len(wrong)) <= LENGTH_BOUND * len(near[0]):
                pairs.append(_sampled_pair(json.loads(prompt), near[0], wrong))
            else:
                left_out += 1
    if left_out:
        logger.warning("%d wrong answers have no right one of about their length and are left out", left_out)
    if not pairs:
        raise UserError("`answers`: no prompt has a right and a wrong answer of about the same length.")
    return checked_pairs(pairs)


def _sampled_pair(prompt: list[dict], right: str, wrong: str) -> dict:
    step = judge(wrong, prompt[-1]["content"], right).first_wrong_step
    sides = {"chosen": right, "rejected": wrong}
    return {"prompt": prompt, **sides, "kind": "sampled", "step": step, "span": list(_changed(right, wrong))}


def pairs_of(records: Sequence[dict], seed: int = 0, kinds: Sequence[str] | None = None) -> Dataset:
    """Pairs of labelled answers, pairs as they are and checked, or worked answers beside the same with an error injected."""
    first = next(iter(records))
    if {"answer", "right"} <= set(first):
        return pairs_from_answers(records)
    if "chosen" in first or "rejected" in first:
        return checked_pairs(records)
    return preference_pairs(records, seed, kinds)
