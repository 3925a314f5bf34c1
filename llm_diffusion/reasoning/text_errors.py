"""Errors in answers that do not reckon: logic, hops between articles, items in a row, and answers that end too early or never.

Trade-off: rewordings by rule (all for some, "if A then B" for "if B then A"), each of which can be checked again by rule.
Alternative: a language model that writes wrong rationales, more varied and unverified.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator

from .arithmetic_errors import slips
from .number_trace import Wrong, written
from .problems import LETTERS, Problem
from .worked_answers import (
    NUMBER,
    final_span,
    number,
    step_spans,
)

LENGTH_BOUND = 0.1  # of the right answer's length: longer or shorter wrong answers would teach a length
QUANTIFIERS = {
    "all": "some",
    "some": "all",
    "every": "some",
    "each": "some",
    "any": "no",
    "no": "some",
    "none": "some",
    "always": "sometimes",
    "sometimes": "always",
    "never": "sometimes",
    "must": "may",
    "may": "must",
    "only": "even",
}
# Statements whose two halves can change places: (before)(first)(between)(second)(after)
_CONVERSES = (
    re.compile(r"\b(If )(\w[^,.;\n]*?)(,? then )(\w[^.;\n]*?)([.;\n]|$)"),
    re.compile(r"\b(if )(\w[^,.;\n]*?)(,? then )(\w[^.;\n]*?)([.;\n]|$)"),
    re.compile(r"\b([Aa]ll |[Ee]very )([\w' -]+?)( are | is an? )([\w' -]+?)([,.;\n]|$)"),
    re.compile(
        r"()\b([\w'][\w' -]*?)( implies | requires | causes | is greater than | is smaller than )([\w' -]+?)([,.;\n]|$)"
    ),
)
Error = Callable[[Problem, random.Random], Iterator[Wrong | None]]


def _replace(text: str, span: tuple[int, int], new: str) -> Wrong:
    return Wrong(text[: span[0]] + new + text[span[1] :], (span[0], span[0] + len(new)))


def _with_answer(problem: Problem, wrong: Wrong, answer: str) -> Wrong:
    """The final answer of a wrong text replaced too; the error before it stays where it is."""
    span = final_span(wrong.text)
    if span is None or wrong.span[1] > span[0]:
        return wrong
    return Wrong(_replace(wrong.text, span, answer).text, wrong.span)


def _other_letters(problem: Problem, rng: random.Random) -> list[str]:
    letters = [letter for letter in LETTERS[: len(problem.options)] if letter != problem.reference]
    return rng.sample(letters, len(letters))


def wrong_option(problem: Problem, rng: random.Random) -> Iterator[Wrong | None]:
    """Another option is picked: the conclusion is not supported by what is said before it."""
    span = final_span(problem.answer)
    flipped = {"yes": "no", "no": "yes"}.get(problem.reference.lower())
    options = _other_letters(problem, rng) if problem.options else [flipped] if flipped else []
    for option in options if span else []:
        yield _replace(problem.answer, span, option)


def quantifier_flip(problem: Problem, rng: random.Random) -> Iterator[Wrong | None]:
    """One quantifier of the rationale is another (all for some), and the option picked is wrong."""
    words = [m for m in re.finditer(r"[A-Za-z]+", problem.answer) if m.group().lower() in QUANTIFIERS]
    for match in rng.sample(words, len(words)):
        new = QUANTIFIERS[match.group().lower()]
        new = new.capitalize() if match.group()[0].isupper() else new
        for letter in _other_letters(problem, rng):
            yield _with_answer(problem, _replace(problem.answer, match.span(), new), letter)


def converse(problem: Problem, rng: random.Random) -> Iterator[Wrong | None]:
    """The two halves of one implication or comparison change places; where there are options, a wrong one is picked."""
    found = [m for pattern in _CONVERSES for m in pattern.finditer(problem.answer)]
    for match in rng.sample(found, len(found)):
        before, first, between, second, after = match.groups()
        wrong = _replace(problem.answer, match.span(), f"{before}{second}{between}{first}{after}")
        for letter in _other_letters(problem, rng) if problem.options else [None]:
            yield wrong if letter is None else _with_answer(problem, wrong, letter)


def wrong_bridge_entity(problem: Problem, rng: random.Random) -> Iterator[Wrong | None]:
    """The first hop leads to another entity, or is taken for the answer itself."""
    span = final_span(problem.answer)
    if span is None:
        return
    others = rng.sample(problem.entities, len(problem.entities))
    for answer in others:
        if problem.bridge is not None and problem.bridge in problem.answer[: span[0]]:
            for entity in others:
                start = problem.answer.index(problem.bridge)
                body = problem.answer[: span[0]].replace(problem.bridge, entity)
                final = problem.bridge if problem.bridge != problem.reference else answer
                yield Wrong(body + final + problem.answer[span[1] :], (start, start + len(entity)))
        else:
            yield _replace(problem.answer, span, answer)


def truncation(problem: Problem, rng: random.Random) -> Iterator[Wrong | None]:
    """The text ends before the answer is given."""
    text, span = problem.answer, final_span(problem.answer)
    first = -int(-(1 - LENGTH_BOUND) * len(text) // 1)
    if span is not None and first <= span[0]:
        for cut in rng.sample(range(first, span[0] + 1), span[0] + 1 - first):
            kept = text[:cut].rstrip()
            yield Wrong(kept, (len(kept), len(kept)))


def repetition(problem: Problem, rng: random.Random) -> Iterator[Wrong | None]:
    """A step is said again and again until the text is as long as the right one; the answer is never given."""
    text, span = problem.answer, final_span(problem.answer)
    for start, end in rng.sample(steps := step_spans(text), len(steps)):
        separator = text[end : end + 1]
        if span is not None and end <= span[0] and separator:
            looped = text[:end] + (separator + text[start:end]) * len(text)
            for length in range(len(text), int((1 - LENGTH_BOUND) * len(text)), -1):
                kept = looped[:length].rstrip()
                yield Wrong(kept, (end + 1, len(kept)))


def slipped_answer(problem: Problem, rng: random.Random) -> Iterator[Wrong | None]:
    """A number of the final answer is reckoned wrong, in an answer whose steps are no plain equations."""
    span = final_span(problem.answer)
    matches = list(NUMBER.finditer(problem.answer, *span)) if span else []
    for match in rng.sample(matches, len(matches)):
        for value in slips(number(match.group()), rng):
            yield _replace(problem.answer, match.span(), written(value, match.group()))


def early_answer(problem: Problem, rng: random.Random) -> Iterator[Wrong | None]:
    """The answer given is another number that the steps hold."""
    span = final_span(problem.answer)
    if span is not None and NUMBER.fullmatch(problem.answer, *span):
        others = list(dict.fromkeys(m.group() for m in NUMBER.finditer(problem.answer, 0, span[0])))
        for other in rng.sample(others, len(others)):
            yield _replace(problem.answer, span, other)


def swapped_sign(problem: Problem, rng: random.Random) -> Iterator[Wrong | None]:
    """A sign of the final answer is the other one."""
    start, end = final_span(problem.answer) or (0, 0)
    signs = list(
        re.finditer(
            r"(?<=[\w)}] )[-+](?= [\w({\\])|(?<=[\w)}])[-+](?=[\w({\\])|(?<![^(,])-(?=\d)", problem.answer[start:end]
        )
    )
    for match in rng.sample(signs, len(signs)):
        span = (start + match.start(), start + match.end())
        yield _replace(problem.answer, span, {"+": "-", "-": "+"}[match.group()])


def _items(problem: Problem) -> list[re.Match]:
    return list(re.finditer(r"\d" if problem.form == "sudoku" else r"\w+", problem.answer))


def swapped_items(problem: Problem, rng: random.Random) -> Iterator[Wrong | None]:
    """Two items (letters, terms, cells) stand in each other's place."""
    items = _items(problem)
    pairs = [(a, b) for i, a in enumerate(items) for b in items[i + 1 :] if a.group() != b.group()]
    for a, b in rng.sample(pairs, len(pairs)):
        middle = problem.answer[a.end() : b.start()]
        yield _replace(problem.answer, (a.start(), b.end()), b.group() + middle + a.group())


def repeated_item(problem: Problem, rng: random.Random) -> Iterator[Wrong | None]:
    """An item stands in its neighbour's place too."""
    items = _items(problem)
    for i in rng.sample(range(1, len(items)), len(items) - 1):
        yield _replace(problem.answer, items[i].span(), items[i - 1].group())


def _changed_item(
    problem: Problem, rng: random.Random, given: bool, changes: Callable[[int], list[int]]
) -> Iterator[Wrong | None]:
    """A numeric item that the question gives (or leaves blank) is another number."""
    if problem.form == "compare":
        places = [(m, True) for m in re.finditer(r"\d+", problem.answer)]
    else:
        shown = re.findall(r"\d" if problem.form == "sudoku" else r"\w+", problem.question.split(":", 1)[-1])
        places = [(m, s not in "0_") for m, s in zip(_items(problem), shown, strict=True)]
    sites = [m for m, is_given in places if is_given == given]
    for match in rng.sample(sites, len(sites)):
        for value in changes(int(match.group())):
            if value >= 0:
                yield _replace(problem.answer, match.span(), str(value))


def misread_item(problem: Problem, rng: random.Random) -> Iterator[Wrong | None]:
    """A number that the question gives is copied wrong."""
    if problem.form == "sudoku":
        return _changed_item(problem, rng, True, lambda v: rng.sample([d for d in (1, 2, 3, 4) if d != v], 3))
    return _changed_item(problem, rng, True, lambda v: rng.sample([v + 1, v - 1, v + 10, v - 10], 4))


def off_by_one_item(problem: Problem, rng: random.Random) -> Iterator[Wrong | None]:
    """The number that fills the gap is one too high or too low."""
    return _changed_item(problem, rng, False, lambda v: rng.sample([v - 1, v + 1], 2))


def slipped_item(problem: Problem, rng: random.Random) -> Iterator[Wrong | None]:
    """The number that fills the gap is reckoned wrong by more than one."""
    return _changed_item(problem, rng, False, lambda v: rng.sample([v - 10, v - 2, v + 2, v + 10], 4))


_ENDINGS: dict[str, Error] = {"truncation": truncation, "repetition": repetition}
_WORKED: dict[
    str, Error
] = {  # where the answer cannot be traced; else the kinds of `arithmetic_errors` take these names
    "calculation_slip": slipped_answer,
    "premature_answer": early_answer,
    "operator_swap": swapped_sign,
    **_ENDINGS,
}
_ROW: dict[str, Error] = {"swapped_items": swapped_items, "repetition": repeated_item}
TEXT_ERRORS: dict[str, dict[str, Error]] = {
    "gsm8k": _WORKED,
    "math": _WORKED,
    "logiqa": {
        "quantifier_flip": quantifier_flip,
        "converse": converse,
        "wrong_option": wrong_option,
        **_ENDINGS,
    },
    "hotpotqa": {"wrong_bridge_entity": wrong_bridge_entity, "wrong_option": wrong_option, **_ENDINGS},
    "sort": _ROW,
    "reverse": _ROW,
    "sudoku": {**_ROW, "misread_number": misread_item},
    "compare": {"converse": converse, "misread_number": misread_item},
    "fill": {
        "swapped_items": swapped_items,
        "misread_number": misread_item,
        "off_by_one": off_by_one_item,
        "calculation_slip": slipped_item,
    },
}
