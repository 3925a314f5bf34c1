"""Errors in answers without arithmetic: logic, hops between articles, items in a row, answers that do not end well.

Rewordings are by rule (all for some, "if A then B" for "if B then A"), so that each can be checked again by rule.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import combinations, pairwise

from .arithmetic_errors import ARITHMETIC_ERRORS, Edit, Error, Trace
from .problems import LETTERS
from .worked_answers import Span, step_spans

LENGTH_BOUND = 0.1  # of the right answer's length: longer or shorter wrong answers would teach a length
_QUANTIFIERS = "all some every some each some some all any no no some none some".split() + (
    "always sometimes never sometimes sometimes always must may may must only even".split()
)
QUANTIFIERS = dict(zip(_QUANTIFIERS[::2], _QUANTIFIERS[1::2], strict=True))
# Statements whose two halves can change places: (before)(first)(between)(second)(after)
_CONVERSES = (
    r"\b([Ii]f )(\w[^,.;\n]*?)(,? then )(\w[^.;\n]*?)([.;\n]|$)",
    r"\b([Aa]ll |[Ee]very )([\w' -]+?)( are | is an? )([\w' -]+?)([,.;\n]|$)",
    r"()\b([\w'][\w' -]*?)( implies | requires | causes | is greater than | is smaller than )([\w' -]+?)([,.;\n]|$)",
)


def _reworded(trace: Trace, span: Span, new: str) -> Iterator[Edit]:
    """A changed stretch of the answer and, where it stands before a final answer with options, a wrong one of these."""
    options = _other_options(trace) if trace.final and span[1] <= trace.final[0] else []
    return (Edit({span: new, trace.final: option}) for option in options) if options else iter([Edit({span: new})])


def _other_options(trace: Trace) -> list[str]:
    return [letter for letter in LETTERS[: len(trace.problem.options)] if letter != trace.problem.reference]


def wrong_option(trace: Trace) -> Iterator[Edit]:
    """Another option is picked: the conclusion does not follow from what stands before it."""
    flipped = {"yes": ["no"], "no": ["yes"]}.get(trace.problem.reference.lower(), [])
    return (Edit({trace.final: option}) for option in _other_options(trace) or flipped if trace.final)


def quantifier_flip(trace: Trace) -> Iterator[Edit]:
    """One quantifier of the rationale is another (all for some), and the option picked is wrong."""
    for match in re.finditer(r"[A-Za-z]+", trace.text):
        if new := QUANTIFIERS.get(match.group().lower()):
            yield from _reworded(trace, match.span(), new.capitalize() if match.group()[0].isupper() else new)


def converse(trace: Trace) -> Iterator[Edit]:
    """The two halves of one implication or comparison change places; where there are options, a wrong one is picked."""
    for match in (match for pattern in _CONVERSES for match in re.finditer(pattern, trace.text)):
        before, first, between, second, after = match.groups()
        yield from _reworded(trace, match.span(), f"{before}{second}{between}{first}{after}")


def wrong_bridge_entity(trace: Trace) -> Iterator[Edit]:
    """The first hop leads to another entity, or is taken for the answer itself."""
    bridge, others = trace.problem.bridge or "", trace.problem.entities
    for entity in others if trace.final else ():
        hops = [m.span() for m in re.finditer(re.escape(bridge), trace.text[: trace.final[0]])] if bridge else []
        answers = [entity] if not hops else [bridge] if bridge != trace.problem.reference else others
        yield from (Edit({**dict.fromkeys(hops, entity), trace.final: answer}) for answer in answers)


def _items(trace: Trace) -> list[re.Match]:
    return list(re.finditer(r"\d" if trace.problem.form == "sudoku" else r"\w+", trace.text))


def swapped_items(trace: Trace) -> Iterator[Edit]:
    """Two items (letters, terms, cells) stand in each other's place."""
    for a, b in combinations(_items(trace), 2):
        yield Edit({(a.start(), b.end()): b.group() + trace.text[a.end() : b.start()] + a.group()})


def truncation(trace: Trace) -> Iterator[Edit]:
    """The text ends before the answer is given."""
    text = trace.text
    for cut in range(-int(-(1 - LENGTH_BOUND) * len(text) // 1), trace.final[0] + 1) if trace.final else ():
        yield Edit({(len(text[:cut].rstrip()), len(text)): ""})


def repetition(trace: Trace) -> Iterator[Edit]:
    """A step stands there again and again in place of the answer; in a row, an item stands in its neighbour's place."""
    text = trace.text
    if trace.final is None:
        yield from (Edit({item.span(): before.group()}) for before, item in pairwise(_items(trace)))
    for start, end in (step for step in step_spans(text) if trace.final and step[1] <= trace.final[0]):
        looped, rest = (text[start:end] + text[end]) * len(text), len(text) - end - 1
        for length in range(rest, rest - int(LENGTH_BOUND * len(text)) - 1, -1):
            yield Edit({(end + 1, len(text)): looped[: max(0, length)].rstrip()})


TEXT_ERRORS: dict[Error, int] = {
    quantifier_flip: 20,
    converse: 20,
    wrong_option: 10,
    wrong_bridge_entity: 30,
    swapped_items: 25,
    truncation: 3,
    repetition: 3,
}
ERRORS = {error.__name__: error for error in (*ARITHMETIC_ERRORS, *TEXT_ERRORS)}
WEIGHTS = {error.__name__: weight for error, weight in (ARITHMETIC_ERRORS | TEXT_ERRORS).items()}
# By the form of a problem; where the final answer can be traced to a result, every kind of arithmetic error.
_KINDS = {
    "gsm8k": "calculation_slip premature_answer operator_swap truncation repetition",
    "math": "calculation_slip premature_answer operator_swap truncation repetition",
    "logiqa": "quantifier_flip converse wrong_option truncation repetition",
    "hotpotqa": "wrong_bridge_entity wrong_option truncation repetition",
    "sort": "swapped_items repetition",
    "reverse": "swapped_items repetition",
    "sudoku": "swapped_items repetition misread_number",
    "compare": "converse misread_number",
    "fill": "swapped_items misread_number off_by_one calculation_slip",
}


def errors_of(trace: Trace) -> dict[str, Error]:
    """The kinds of error that an answer allows, by name."""
    found = {kind: ERRORS[kind] for kind in _KINDS.get(trace.problem.form, "").split()}
    return found if trace.answer is None else found | {error.__name__: error for error in ARITHMETIC_ERRORS}
