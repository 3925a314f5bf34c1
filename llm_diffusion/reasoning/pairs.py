"""Preference pairs: a right worked answer, and a wrong one made from it by one named error.

    from llm_diffusion.preferences import preference_pairs
    pairs = preference_pairs("tiny", seed=0)           # prompt, chosen, rejected, kind, step, span

Purpose: data for Diffusion-DPO whose two sides differ in one known place, so that the noise of both can be shared.
Every pair is checked by reading and re-evaluating both texts afresh: the chosen one is right, the rejected one wrong in the way
that its kind declares, and their lengths differ by a tenth at most.
Trade-off: errors by rule, with the mix that two real diffusion models showed on GSM8K (a slip in 35 to 38 % of their wrong answers,
too few steps in 52 to 54 %, too many in 17 to 18 %). Alternative: the model's own wrong answers (`answer_sampling`).
"""

from __future__ import annotations

import hashlib
import logging
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from fractions import Fraction

from datasets import Dataset, Features, Value
from datasets import List as ListOf

from .. import UserError
from .arithmetic_errors import UNIT_FACTORS, Trace, Wrong
from .problems import (
    Problem,
    is_right,
    load_records,
    read_problem,
)
from .text_errors import LENGTH_BOUND, WEIGHTS, errors_of
from .worked_answers import (
    Judgement,
    equations,
    evaluate,
    final_answer,
    judge,
    number,
    step_at,
    step_spans,
)

logger = logging.getLogger(__name__)
KINDS = tuple(WEIGHTS)
RIGHT_ANSWER_KINDS = ("unpropagated_slip", "corrupted_reasoning")  # controls: the answer is right, a step is not
NATURAL_KINDS = ("sampled", "labelled")  # a model's own wrong answers, and those that people or a judge handed back
_MESSAGES = ListOf({"role": Value("string"), "content": Value("string")})
FEATURES = Features(
    prompt=_MESSAGES,
    chosen=_MESSAGES,
    rejected=_MESSAGES,
    kind=Value("string"),
    step=Value("int64"),
    span=ListOf(Value("int64")),
)
_CANDIDATES = 200  # tried of one kind before the next kind is


def preference_pairs(
    records_or_dataset: str | Dataset | Iterable[dict], seed: int = 0, kinds: Sequence[str] | None = None
) -> Dataset:
    """One pair of every record that an error fits.

    The noise of a pair is keyed by the seed and the text of its record: neither the order of the records nor how they are spread
    over workers matters.

    Args:
        records_or_dataset: records of the forms in `problems`, a `Dataset` of them, or the name of one ("tiny", a file, a hub name).
        seed: any integer.
        kinds: only these errors, a subset of `KINDS`.

    Returns:
        rows of TRL's conversational preference format: `prompt`, `chosen` and `rejected` (messages), `kind`, `step` (of the rejected
        answer, from 0), `span` ([start, end], characters of the rejected answer in which the error was put).

    Raises:
        ValueError: unknown kind, a record that cannot be read, or no record that an error fits.
    """
    check_kinds(kinds)
    records = load_records(records_or_dataset, seed=seed) if isinstance(records_or_dataset, str) else records_or_dataset
    rows, left_out, seen = [], Counter(), set()
    for index, record in enumerate(records):
        try:
            problem = read_problem(record)
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise UserError(f"`records`: row {index}: {error}") from error
        row = preference_pair(problem, seed, kinds)
        if (problem.prompt[-1]["content"], problem.answer) in seen:
            left_out["are there twice"] += 1
        elif row is None:
            left_out["have no error that fits" if checked(problem) else "do not hold themselves"] += 1
        else:
            rows.append(row)
        seen.add((problem.prompt[-1]["content"], problem.answer))
    if left_out:
        said = ", ".join(f"{count} {why}" for why, count in left_out.items())
        logger.warning(
            "%d of %d records give no pair: %s", sum(left_out.values()), len(rows) + sum(left_out.values()), said
        )
    if not rows:
        raise UserError(
            f"`records`: no record gives a pair (kinds {list(kinds or KINDS)}); try other kinds or records."
        )
    return Dataset.from_list(rows, features=FEATURES)


def check_kinds(kinds: Sequence[str] | None) -> None:
    if kinds is not None and (not kinds or isinstance(kinds, str) or set(kinds) - set(KINDS)):
        raise UserError(f"`kinds` must be a non-empty list of names among {list(KINDS)}, got {kinds!r}.")


def preference_pair(problem: Problem, seed: int = 0, kinds: Sequence[str] | None = None) -> dict | None:
    """The pair of one problem; None: no error of `kinds` fits, or the problem's own answer does not hold."""
    if not checked(problem):
        return None
    digest = hashlib.sha256(f"{problem.question}\0{problem.answer}".encode()).hexdigest()
    rng = random.Random(f"{seed}/{digest}")
    errors = errors_of(Trace(problem))
    possible = [k for k in KINDS if k in errors and (kinds is None or k in kinds)]
    # Weighted draw without replacement (Efraimidis and Spirakis 2006): the largest of u^(1/w) comes first.
    for kind in sorted(possible, key=lambda k: rng.random() ** (1 / WEIGHTS[k]), reverse=True):
        wrong = next(verified(problem, kind, seed), None)
        if wrong is not None:
            return pair_row(problem, wrong.text, kind, step_at(wrong.text, wrong.span[0]), wrong.span)
    return None


def pair_row(problem: Problem, rejected: str, kind: str, step: int, span: tuple[int, int]) -> dict:
    sides = {
        name: [{"role": "assistant", "content": text}]
        for name, text in (("chosen", problem.answer), ("rejected", rejected))
    }
    return {"prompt": list(problem.prompt), **sides, "kind": kind, "step": step, "span": list(span)}


def verified(problem: Problem, kind: str, seed: int = 0) -> Iterator[Wrong]:
    """The wrong answers of one kind that hold what the kind declares, in a seeded order."""
    trace = Trace(problem)
    digest = hashlib.sha256(f"{problem.question}\0{problem.answer}\0{kind}".encode()).hexdigest()
    edits = list(errors_of(trace).get(kind, lambda trace: ())(trace))
    random.Random(f"{seed}/{digest}").shuffle(edits)
    for edit in edits[:_CANDIDATES]:
        wrong = trace.apply(edit)
        if wrong is not None and is_declared(trace, kind, wrong):
            yield wrong


def checked(problem: Problem) -> bool:
    """Whether the right answer is right: its answer by the form's own rule, and every equation by re-evaluation."""
    return is_right(problem, problem.answer) and (
        problem.form not in ("gsm8k", "math") or not judge(problem.answer).false_steps
    )


def is_declared(trace: Trace, kind: str, wrong: Wrong) -> bool:
    """Whether a wrong answer, read afresh, is wrong in the way of its kind and within the bound on lengths."""
    problem, chosen, text = trace.problem, trace.text, wrong.text
    if not text.strip() or text == chosen or abs(len(text) - len(chosen)) > LENGTH_BOUND * len(chosen):
        return False
    if kind in ("truncation", "repetition") and final_answer(chosen) is not None:
        said = [text[a:b].strip() for a, b in step_spans(text)]
        whole = (
            final_answer(text) is None and not judge(text).false_steps
        )  # a number cut in two would be a second error
        return whole and (kind == "truncation" or len(set(said)) < len(said))
    if trace.answer is None:
        return not is_right(problem, text)
    found = judge(text, reference=problem.reference)
    if found.answer is None or found.right != (kind in RIGHT_ANSWER_KINDS):
        return False
    if kind in ("calculation_slip", "unpropagated_slip", "unit_error"):
        step = step_at(text, wrong.span[0])
        return found.false_steps == [step] and (kind != "unit_error" or _off_by_a_factor(text, step))
    return not found.false_steps and _DECLARED.get(kind, lambda *_: True)(found, text)


def _off_by_a_factor(text: str, step: int) -> bool:
    """Whether the false equations of a step miss their value by a unit's factor."""
    ratios = set()
    for e in equations(text):
        exact = evaluate(text[slice(*e.left_span)])
        if not e.holds and step_at(text, e.value_span[0]) == step and exact:
            ratios.add(number(text[slice(*e.value_span)]) / exact)
    return bool(ratios) and all(r in UNIT_FACTORS or 1 / r in UNIT_FACTORS for r in ratios)


def _results(text: str) -> list[Fraction]:
    return [number(text[slice(*e.value_span)].lstrip("-")) for e in equations(text)]


_DECLARED: dict[str, Callable[[Judgement, str], bool]] = {
    "premature_answer": lambda found, text: evaluate(found.answer) in _results(text)[:-1],
    "corrupted_reasoning": lambda found, text: evaluate(found.answer) not in _results(text),
}
