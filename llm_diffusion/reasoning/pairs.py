"""Preference pairs: a right worked answer and a wrong one, made from it by a named error or written by a model.

    pairs = preference_pairs("tiny", seed=0)           # prompt, chosen, rejected, kind, step, span

Both texts of a pair are read and evaluated afresh: the chosen one is right, the rejected one wrong in the way of its kind, and
their lengths differ by a tenth at most. The mix of kinds is that of two diffusion models on GSM8K (a slip in 35 to 38 % of their
wrong answers, too few steps in 52 to 54 %, too many in 17 to 18 %).
"""

from __future__ import annotations

import hashlib
import http.client
import json
import logging
import os
import random
import re
import time
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from os.path import commonprefix
from pathlib import Path
from typing import Any

from datasets import Dataset

from .. import UserError
from ..data.rows import source_row
from ..models.files import write_text
from ..objective.settings import read_path
from .arithmetic_errors import UNIT_FACTORS, Trace, Wrong
from .problems import WORKED_FORMS, Problem, is_right, load_records, read_problem
from .text_errors import LENGTH_BOUND, WEIGHTS, errors_of
from .worked_answers import Span, equations, evaluate, judge, step_at, step_spans

logger = logging.getLogger(__name__)
KINDS = tuple(WEIGHTS)
RIGHT_ANSWER_KINDS = ("unpropagated_slip", "corrupted_reasoning")  # controls: the answer is right, a step is not
NATURAL_KINDS = ("sampled", "labelled")  # a model's own wrong answers, and those that people or a judge handed back


def preference_pairs(
    records_or_dataset: str | Dataset | Iterable[dict], seed: int = 0, kinds: Sequence[str] | None = None
) -> Dataset:
    """One pair of every record that an error fits.

    The noise of a pair is keyed by the seed and the text of its record: neither the order of the records nor how they are
    spread over workers matters.

    Args:
        records_or_dataset: records of the forms in `problems`, or the name of a dataset ("tiny", a file, a hub name).
        seed: any integer.
        kinds: only these errors, a subset of `KINDS`.

    Returns:
        rows of TRL's conversational preference format: `prompt`, `chosen` and `rejected` (messages), `kind`, `step` (of the
        rejected answer, from 0), `span` ([start, end], characters of the rejected answer in which the error was put).

    Raises:
        ValueError: unknown kind, a record that cannot be read, or no record that an error fits.
    """
    if kinds is not None and (not kinds or isinstance(kinds, str) or set(kinds) - set(KINDS)):
        raise UserError(f"`kinds` must be a non-empty list of names among {list(KINDS)}, got {kinds!r}.")
    records = load_records(records_or_dataset, seed=seed) if isinstance(records_or_dataset, str) else records_or_dataset
    if not isinstance(records, Iterable):
        raise UserError(f"`records` must be rows, or the name of a dataset, got {records!r:.80}.")
    found: dict[tuple[str, str], dict | None] = {}
    n_records = n_false = 0
    for record in map(source_row, records):
        try:
            problem = read_problem(record)
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise UserError(f"`records`: row {n_records} ({record!r:.80}) cannot be read: {error}") from error
        holds = checked(problem)
        found[problem.question, problem.answer] = preference_pair(problem, seed, kinds) if holds else None
        n_records, n_false = n_records + 1, n_false + (not holds)
    rows = [row for row in found.values() if row is not None]
    if len(rows) < n_records:
        reasons = f"{n_false} do not hold themselves, {n_records - len(found)} are duplicates, no error fits the others"
        logger.warning("%d of %d records give no pair: %s", n_records - len(rows), n_records, reasons)
    if not rows:
        raise UserError(f"`records`: none gives a pair (kinds {list(kinds or KINDS)}); try other kinds or records.")
    return Dataset.from_list(rows)


def preference_pair(problem: Problem, seed: int = 0, kinds: Sequence[str] | None = None) -> dict | None:
    """The pair of one problem; None: no error of `kinds` fits."""
    rng, errors = _rng(seed, problem.question, problem.answer), errors_of(Trace(problem))
    possible = [kind for kind in KINDS if kind in errors and (kinds is None or kind in kinds)]
    # Weighted draw without replacement (Efraimidis and Spirakis 2006): the largest of u^(1/w) comes first.
    for kind in sorted(possible, key=lambda kind: rng.random() ** (1 / WEIGHTS[kind]), reverse=True):
        for wrong in verified(problem, kind, seed):
            return _row(problem.prompt, problem.answer, wrong.text, kind, wrong.span)
    return None


def _rng(seed: int, *texts: str) -> random.Random:
    digest = hashlib.sha256("\0".join(texts).encode()).hexdigest()
    return random.Random(f"{seed}/{digest}")


def _row(prompt: Iterable[dict], chosen: str, rejected: str, kind: str, span: Span) -> dict:
    sides = {"chosen": chosen, "rejected": rejected}
    answers = {name: [{"role": "assistant", "content": text}] for name, text in sides.items()}
    step = step_at(rejected, span[0])
    return {"prompt": list(prompt), **answers, "kind": kind, "step": step, "span": list(span)}


def verified(problem: Problem, kind: str, seed: int = 0) -> Iterator[Wrong]:
    """The wrong answers of one kind that hold what the kind declares, in a seeded order."""
    trace = Trace(problem)
    error = errors_of(trace).get(kind)
    edits = list(error(trace)) if error else []
    _rng(seed, problem.question, problem.answer, kind).shuffle(edits)
    for edit in edits[:200]:  # then the next kind is tried
        wrong = trace.apply(edit)
        if wrong is not None and is_declared(trace, kind, wrong):
            yield wrong


def checked(problem: Problem) -> bool:
    """Whether the right answer is right: its answer by the form's own rule, and every equation by re-evaluation."""
    steps_hold = problem.form not in WORKED_FORMS or not judge(problem.answer).false_steps
    return steps_hold and is_right(problem, problem.answer)


def is_declared(trace: Trace, kind: str, wrong: Wrong) -> bool:
    """Whether a wrong answer, read afresh, is wrong in the way of its kind and within the bound on lengths."""
    text, chosen = wrong.text, trace.text
    if not text.strip() or text == chosen or abs(len(text) - len(chosen)) > LENGTH_BOUND * len(chosen):
        return False
    found = judge(text, reference=trace.problem.reference)
    if kind in ("truncation", "repetition") and trace.final is not None:
        steps = [text[start:end].strip() for start, end in step_spans(text)]
        repeated = kind == "truncation" or len(set(steps)) < len(steps)
        return repeated and found.answer is None and not found.false_steps  # no number cut in two, a second error
    if trace.answer is None:
        return not is_right(trace.problem, text)
    if found.answer is None or found.right != (kind in RIGHT_ANSWER_KINDS):
        return False
    if kind in ("calculation_slip", "unpropagated_slip", "unit_error"):
        missed = [(e.value, e.exact) for e in equations(text) if not e.holds and kind == "unit_error"]
        by_units = all(any(x * f == y or y * f == x for f in UNIT_FACTORS) for x, y in missed)
        return by_units and found.false_steps == [step_at(text, wrong.span[0])]
    results, answer = [e.value for e in equations(text)], evaluate(found.answer)
    if kind == "premature_answer" and answer not in results[:-1] or kind == "corrupted_reasoning" and answer in results:
        return False
    return not found.false_steps


def write_rows(path: str | Path, rows: Iterable[dict]) -> None:
    """One JSON object a line; the file appears when all of it is written."""
    write_text(read_path("output", path), "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def checked_pairs(rows: Iterable[dict]) -> Dataset:
    """Pairs as `preference_pairs` makes them, or with `prompt`, `chosen` and `rejected` alone (text or messages).

    A pair that bears the name of an injected error is re-evaluated: it must be wrong in that way.

    Raises:
        ValueError: a column is missing, a side is empty, both are the same, or a pair is not what its kind says.
    """
    found = [_checked_pair(row, f"`pairs`: row {index}") for index, row in enumerate(rows)]
    if not found:
        raise UserError("`pairs`: there is no pair.")
    return Dataset.from_list(found)


def _checked_pair(row: dict, where: str) -> dict:
    missing = [name for name in ("prompt", "chosen", "rejected") if row.get(name) is None]
    if missing:
        raise UserError(f"{where} lacks {missing}, it has {sorted(row)}; `prompt`, `chosen` and `rejected` are needed.")
    prompt = _as_messages(row["prompt"], "user", f"{where}: `prompt`")
    sides = {name: _as_messages(row[name], "assistant", f"{where}: `{name}`") for name in ("chosen", "rejected")}
    chosen, rejected = (side[-1]["content"] for side in sides.values())
    if chosen.strip() == rejected.strip():
        raise UserError(f"{where}: `chosen` and `rejected` are the same; change one of them or leave the row out.")
    kind, span = row.get("kind") or "labelled", row.get("span") or _changed(chosen, rejected)
    if kind not in KINDS + NATURAL_KINDS:
        raise UserError(f"{where}: `kind` must be one of {list(KINDS + NATURAL_KINDS)}, got {kind!r}.")
    match span:
        case [int(start), int(end)] if 0 <= start <= end <= len(rejected):
            span = start, end
        case _:
            raise UserError(f"{where}: `span` must be a start and an end within the rejected answer, got {span}.")
    if kind in KINDS:
        trace = Trace(read_problem({"messages": [*prompt, *sides["chosen"]]}))
        if not is_declared(trace, kind, Wrong(rejected, span)):
            raise UserError(f"{where}: the rejected answer is not wrong by {kind}; correct it, or leave `kind` out.")
    step = step_at(rejected, span[0]) if row.get("step") is None else row["step"]
    return {"prompt": prompt, **sides, "kind": kind, "step": step, "span": list(span)}


def _as_messages(side: str | list[dict], role: str, where: str) -> list[dict]:
    messages = [{"role": role, "content": side}] if isinstance(side, str) else side
    if not isinstance(messages, list) or not messages or not all(map(_is_message, messages)):
        raise UserError(f"{where} must be text or messages with `role` and `content`, got {side!r}.")
    if not (messages[-1]["content"] or "").strip():
        raise UserError(f"{where} is empty; give it a text or leave the row out.")
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def _is_message(turn: Any) -> bool:
    texts = isinstance(turn, dict) and {"role", "content"} <= set(turn)
    return texts and isinstance(turn["role"], str) and isinstance(turn["content"], str | None)


def _changed(chosen: str, rejected: str) -> Span:
    """The characters of the rejected text between what both texts begin and end with."""
    start = len(commonprefix([chosen, rejected]))
    return start, len(rejected) - len(commonprefix([chosen[start:][::-1], rejected[start:][::-1]]))


def labelled_answer(problem: Problem, answer: str, right: bool | None) -> dict:
    """A row for people or a judge: `right` is theirs to change, None is not judged yet."""
    found = judge(answer, problem.question, problem.reference)
    row = {"prompt": list(problem.prompt), "answer": answer, "reference": problem.answer, "right": right}
    return row | {"first_wrong_step": None if right else found.first_wrong_step}


def pairs_from_answers(rows: Sequence[dict]) -> Dataset:
    """Pairs of labelled answers: each wrong one with the right one of the same prompt that is nearest in length.

    The reference stands in for a right answer. Wrong answers whose length differs by more than a tenth from every right one
    are left out, with a line that counts them.

    Args:
        rows: as `labelled_answer` makes them; rows whose `right` is null are not judged and not used.

    Raises:
        ValueError: a column is missing, or no pair comes about.
    """
    groups: dict[str, list[dict]] = defaultdict(list)
    for index, row in enumerate(rows):
        where = f"`answers`: row {index}"
        texts = isinstance(row.get("answer"), str) and isinstance(row.get("reference"), str | None)
        if not texts or not {"prompt", "right"} <= set(row) or row["right"] not in (True, False, None):
            wanted = "`prompt`, `answer` (text), `right` (true, false, null)"
            raise UserError(f"{where} must have {wanted}, got {row!r:.200}.")
        groups[json.dumps(_as_messages(row["prompt"], "user", f"{where}: `prompt`"))].append(row)
    pairs, left_out = [], 0
    for key, answers in groups.items():
        prompt = json.loads(key)
        rights = {a["answer"] for a in answers if a["right"]} | {a["reference"] for a in answers if a.get("reference")}
        for wrong in dict.fromkeys(a["answer"] for a in answers if a["right"] is False and a["answer"].strip()):
            right = min(rights - {wrong}, key=lambda right: (abs(len(right) - len(wrong)), right), default=None)
            if right is None or abs(len(right) - len(wrong)) > LENGTH_BOUND * len(right):
                left_out += 1
                continue
            step = judge(wrong, prompt[-1]["content"], right).first_wrong_step
            pairs.append(_row(prompt, right, wrong, "sampled", _changed(right, wrong)) | {"step": step})
    if left_out:
        logger.warning("%d wrong answers have no right one of about their length and are left out", left_out)
    if not pairs:
        raise UserError("`answers`: no prompt has a right and a wrong answer of about the same length.")
    return checked_pairs(pairs)


def pairs_of(records: Sequence[dict], seed: int = 0, kinds: Sequence[str] | None = None) -> Dataset:
    """Pairs of labelled answers, pairs that are checked, or of worked answers with an error injected; by their columns."""
    columns = set(records[0])
    if kinds is not None and columns & {"right", "chosen", "rejected"}:
        raise UserError("`kinds` chooses the errors that are injected into right answers; leave it out for other rows.")
    if {"answer", "right"} <= columns:
        return pairs_from_answers(records)
    return checked_pairs(records) if columns & {"chosen", "rejected"} else preference_pairs(records, seed, kinds)


INSTRUCTIONS = """You check a worked answer to a question. Its steps are numbered. A right solution is given for comparison; \
another way to the same result is right too.
Reply with one JSON object and nothing else: {"right": true or false, "first_wrong_step": a step number or null}.
"right" says whether the final result is right, "first_wrong_step" is the first step with a mistake in reasoning or arithmetic."""
TRIES = 4
AGAIN = {408, 409, 429, 500, 502, 503, 504}  # statuses that may pass


class LLMJudge:
    """One label an answer, at temperature 0.

    Args:
        url: of the API, up to `/v1` or to `/chat/completions`.
        model: its name there.
        key: sent as a bearer token; default: the environment's OPENAI_API_KEY, or none.
        timeout: seconds to wait for one reply.
        pause: seconds before the second try; doubled before each further one.
    """

    def __init__(self, url: str, model: str, *, key: str | None = None, timeout: float = 120, pause: float = 1) -> None:
        if not re.match(r"https?://[^/\s]+", url):
            raise UserError(f"`judge`: {url!r} is no URL; give one such as 'http://localhost:8000/v1'.")
        if "@" in url.split("/")[2]:
            raise UserError(
                "`judge`: a URL gets into reports; give the key in the variable OPENAI_API_KEY instead of in it."
            )
        if not model:
            raise UserError("`judge_model` is needed with `judge`: the name of the model there.")
        self.url = url.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
        self.model, self.timeout, self.pause = model, timeout, pause
        self.key = os.environ.get("OPENAI_API_KEY") if key is None else key

    def __call__(self, question: str, answer: str, reference: str) -> dict[str, Any]:
        """`right` and `first_wrong_step`, counted from 0, None where every step is right.

        Raises:
            ConnectionError: no reply, or none that is a label, after some tries.
        """
        steps = [f"{i}. {answer[a:b].strip()}" for i, (a, b) in enumerate(step_spans(answer), start=1)]
        task = "\n".join([f"Question:\n{question}\n\nRight solution:\n{reference}\n\nAnswer to check:", *steps])
        messages = [{"role": "system", "content": INSTRUCTIONS}, {"role": "user", "content": task}]
        body = {"model": self.model, "messages": messages, "temperature": 0, "seed": 0}
        for attempt in range(TRIES):
            time.sleep(self.pause * 2 ** (attempt - 1) if attempt else 0)
            try:
                return _label(self._post(body), max(1, len(steps)))
            except (OSError, http.client.HTTPException, ValueError) as error:
                reason = str(error) or type(error).__name__
                if isinstance(error, urllib.error.HTTPError) and error.code not in AGAIN:
                    break
        raise ConnectionError(f"`judge`: no label from {self.model!r} at {self.url}, try {attempt + 1}: {reason}.")

    def _post(self, body: dict[str, Any]) -> str:
        request = urllib.request.Request(self.url, json.dumps(body).encode(), {"Content-Type": "application/json"})
        if self.key:  # which no redirect takes elsewhere
            request.add_unredirected_header("Authorization", f"Bearer {self.key}")
        with urllib.request.urlopen(request, timeout=self.timeout) as response:
            reply = response.read().decode()
        try:
            return json.loads(reply)["choices"][0]["message"]["content"] or ""
        except (ValueError, LookupError, TypeError) as error:
            raise ValueError(f"the reply is no chat completion: {reply[:80]!r}") from error


def _label(reply: str, n_steps: int) -> dict[str, Any]:
    """The last JSON object of a reply, which may stand in a fence or behind the judge's own reasoning."""
    for found in reversed(re.findall(r"\{[^{}]*\}", reply)):
        try:
            label = json.loads(found)
        except ValueError:
            continue
        right, step = label.get("right"), label.get("first_wrong_step")
        if isinstance(right, bool) and (step is None or type(step) is int and 1 <= step <= n_steps):
            return {"right": right, "first_wrong_step": None if step is None else step - 1}
    raise ValueError(f"the reply holds no label: {reply[:80]!r}")
