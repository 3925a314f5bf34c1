"""Errors in worked arithmetic: one cause is put in, and every result that follows from it is computed again.

    Tom has 23 apples …          23+45=68. 68-10=58. The answer is 58.
    calculation_slip             23+45=78. 78-10=68. The answer is 68.
    unpropagated_slip            23+45=78. 68-10=58. The answer is 58.
    operator_swap                23+45=68. 68+10=78. The answer is 78.

A kind of error lists the `Edit`s that a `Trace` allows; `Trace.apply` makes a wrong answer of one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import NamedTuple

from .problems import WORKED_FORMS, Problem
from .worked_answers import (
    COMMON_NUMBERS,
    NUMBER,
    OPERATOR,
    Equation,
    Span,
    equations,
    evaluate,
    final_span,
    number,
    numbers_in,
    step_span,
    writable,
    written,
)

_OPERATOR = re.compile(rf"(?<![^\W\d_]){OPERATOR}(?![^\W\d_])")  # not the hyphens, slashes and signs of words
_LATEX = {"\\times": "\\div", "\\div": "\\times", "\\cdot": "\\div"}
_SWAPS = dict(zip("+-−–*/xX×÷·", "-+++/*÷÷÷×/", strict=True)) | _LATEX
_PLAIN = str.maketrans("−–×÷·xX", "--*/***")
_SIGN = re.compile(r"(?<=[\w)}] )[-+](?= [\w({\\])|(?<=[\w)}])[-+](?=[\w({\\])|(?<![^(,])-(?=\d)")  # also of letters
# Factors that are forgotten or applied twice, and the words that call for them.
UNIT_FACTORS = {7: "week", 12: "year dozen feet foot", 60: "minute hour", 100: "% cent meter", 1000: "gram liter"}


class Edit(NamedTuple):
    """One cause: stretches of the answer that are replaced, or results (by index) that are taken to be others."""

    texts: dict[Span, str]
    results: dict[int, Fraction] = {}


class Wrong(NamedTuple):
    """A wrong answer and the characters of it in which the error was put."""

    text: str
    span: Span


class Token(NamedTuple):
    """A number of the text. It defines or quotes the result of that index; None: it comes from elsewhere."""

    span: Span
    text: str
    value: Fraction
    result: int | None
    defines: bool


class Trace:
    """The numbers of an answer and where each comes from: results, what quotes them, and what is given.

    Where a number could come from two places (a result that the question holds too, a usual small one), nothing is
    computed through it: a guess would put in a second error. An answer without equations can be edited all the same.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem, self.text = problem, problem.answer
        self.numerals = {number(match.group()) for match in NUMBER.finditer(problem.question)}
        self.final, self.given = final_span(self.text), numbers_in(problem.question)
        self.tokens: list[Token] = []
        latest: dict[Fraction, int] = {}
        results: dict[tuple[Fraction, Span], list[Equation]] = {}  # by value and step
        defining = {e.value_span[0] + (self.text[e.value_span[0]] == "-"): e for e in equations(self.text)}
        for match in NUMBER.finditer(self.text):
            value, equation = number(match.group()), defining.get(match.start())
            if equation is not None:
                key = value, step_span(self.text, match.start())
                results.setdefault(key, []).append(equation)
                latest[value] = list(results).index(key)
            self.tokens.append(Token(match.span(), match.group(), value, latest.get(value), equation is not None))
        self.results = list(results.values())  # "48/2 = <<48/2=24>>24" is one result by two equations
        values = [value for value, _ in results]
        ambiguous = self.given | COMMON_NUMBERS
        self.sure = {i: value for i, value in enumerate(values) if values.count(value) == 1 and value not in ambiguous}
        self.finals = self.inside(self.final or (0, 0))
        quoted = {None if token.defines else token.result for token in self.finals}
        # The result that the final answer quotes; None: the answer cannot be traced.
        self.answer = quoted.pop() if len(quoted) == 1 and problem.form in WORKED_FORMS else None
        self.stated = self.finals or [token for token in self.tokens if token.value not in self.given]  # by itself

    def inside(self, *spans: Span) -> list[Token]:
        return [token for token in self.tokens if any(a <= token.span[0] < b for a, b in spans)]

    def forms(self, result: list[Equation]) -> list[Span]:
        """Where the left of a result stands: its equations, and the words before them ("3 large + 42 = <<3+42=45>>")."""
        spans = [e.left_span for e in result]
        end = min(spans)[0]
        before = [e.value_span[1] for e in equations(self.text) if e.value_span[1] <= end]
        return [*spans, (max([step_span(self.text, end)[0], *before]), end)]

    def operands(self, result: list[Equation]) -> list[list[Token]]:
        """The numbers on the left of a result, by value; those that stand there twice are left out."""
        numbers = [token for token in self.inside(*self.forms(result)) if not token.defines]
        values = [token.value for token in self.inside(result[0].left_span)]
        return [[t for t in numbers if t.value == value] for value in values if values.count(value) == 1]

    def operators(self, result: list[Equation]) -> list[list[Span]]:
        """Spans of the operators of a result, by place in its forms; none where these differ in their signs."""
        forms = []
        for a, b in self.forms(result) if all(e.annotated for e in result) else [e.left_span for e in result]:
            first = b - len(self.text[a:b].lstrip(" ($")) + 1  # an operator stands between two operands
            forms += filter(None, [[match.span() for match in _OPERATOR.finditer(self.text, first, b)]])
        kinds = {tuple(_SWAPS.get(self.text[a:b], "").translate(_PLAIN) for a, b in form) for form in forms}
        same = len(kinds) == 1 and "" not in next(iter(kinds))
        return [list(place) for place in zip(*forms, strict=True)] if same else []

    def apply(self, edit: Edit) -> Wrong | None:
        """The answer with one cause put in and what follows from it computed again.

        Returns:
            None where a consequence is no number that a solver would write, or cannot be traced.
        """
        pieces, values = dict(edit.texts), dict(edit.results)
        for token in self.tokens:
            if any(a <= token.span[0] < b for a, b in edit.texts):
                continue
            if token.defines and token.result not in values:
                a, b = self.results[token.result][0].left_span
                inside = {(x - a, y - a): new for (x, y), new in pieces.items() if a <= x and y <= b}
                left = _replaced(self.text[a:b], inside).text
                if left != self.text[a:b]:
                    values[token.result] = value = evaluate(left)
                    if token.result not in self.sure or not writable(value, token.text):
                        return None
            value = values.get(token.result, token.value)
            if value != token.value:
                pieces[token.span] = written(value, token.text)
        return _replaced(self.text, pieces)


def _replaced(text: str, pieces: dict[Span, str]) -> Wrong:
    first = (0, 0)
    for (a, b), new in sorted(pieces.items(), reverse=True):
        first = (a, a + len(new)) if text[a:b] != new else first
        text = text[:a] + new + text[b:]
    return Wrong(text, first)


def slips(value: Fraction) -> list[Fraction]:
    """What a number becomes by a slip: one or two more or less, a lost or extra carry, two digits swapped."""
    unit = Fraction(1, 1 if value.denominator == 1 else 10)
    found = {value + d * unit for d in (1, -1, 2, -2)} | {value + d for d in (10, -10) if value > 20}
    if value.denominator == 1:
        digits = str(int(value))
        found |= {Fraction(digits[:i] + digits[i + 1] + digits[i] + digits[i + 2 :]) for i in range(len(digits) - 1)}
    return sorted(v for v in found if v > 0 and v != value)


def _as(tokens: list[Token], value: Fraction) -> Edit:
    """The same number put in the place of all `tokens`."""
    return Edit({token.span: written(value, token.text) for token in tokens})


def calculation_slip(trace: Trace) -> Iterator[Edit]:
    """One result is computed wrong; the steps after it go on with it."""
    if trace.answer is None:
        return (_as([token], value) for token in trace.stated for value in slips(token.value))
    return (Edit({}, {i: value}) for i, before in trace.sure.items() for value in slips(before))


def unpropagated_slip(trace: Trace) -> Iterator[Edit]:
    """One result is written wrong; the steps after it go on with the right one."""
    for i, before in trace.sure.items():
        defining = [token for token in trace.tokens if token.defines and token.result == i]
        yield from (_as(defining, value) for value in slips(before))


def unit_error(trace: Trace) -> Iterator[Edit]:
    """One result is too large or too small by a unit's factor, percent and "per" included."""
    told = (trace.problem.question + trace.text).lower()
    factors = [Fraction(f) for f, words in UNIT_FACTORS.items() if any(word in told for word in words.split())]
    for i, before in trace.sure.items():
        values = [before * factor for f in factors for factor in (f, 1 / f)]
        yield from (Edit({}, {i: value}) for value in values if writable(value, "0.00"))


def operator_swap(trace: Trace) -> Iterator[Edit]:
    """One operator is its inverse: + for -, x for ÷."""
    places = [place for result in trace.results for place in trace.operators(result)]
    if trace.answer is None and trace.final is not None:
        start, end = trace.final
        places = [[(start + m.start(), start + m.end())] for m in _SIGN.finditer(trace.text[start:end])]
    return (Edit({(a, b): _SWAPS[trace.text[a:b]] for a, b in place}) for place in places)


def operand_swap(trace: Trace) -> Iterator[Edit]:
    """One operand is another number of the question."""
    for result in trace.results:
        there = {token.value for token in trace.inside(*trace.forms(result))} | {0}
        others = sorted(trace.numerals - there)
        yield from (_as(place, value) for place in trace.operands(result) for value in others)


def misread_number(trace: Trace) -> Iterator[Edit]:
    """A number of the question is read wrong, wherever it is used; in a puzzle, a cell."""
    if trace.problem.form == "sudoku":
        cells = zip(re.finditer(r"\d", trace.text), re.findall(r"\d", trace.problem.question), strict=True)
        yield from (Edit({cell.span(): digit}) for cell, shown in cells if shown != "0" for digit in "1234")
        return
    free = [token for token in trace.tokens if not token.defines and token not in trace.finals]
    quoted = {token.value for token in free if token.result is not None}
    for value in sorted(trace.numerals - quoted):
        uses = [token for token in free if token.value == value]
        yield from (_as(uses, v) for v in slips(value) if uses and v not in trace.given | COMMON_NUMBERS)


def off_by_one(trace: Trace) -> Iterator[Edit]:
    """One operand is a count one too high or too low; in a row, the number that fills the gap is."""
    places = [place for result in trace.results for place in trace.operands(result)]
    for place in [[token] for token in trace.stated] if trace.answer is None else places:
        value = place[0].value
        yield from (_as(place, v) for v in (value - 1, value + 1) if v > 0 and v.denominator == 1)


def premature_answer(trace: Trace) -> Iterator[Edit]:
    """The answer given is another number that the steps hold."""
    if len(trace.finals) == 1 and (trace.answer is not None or NUMBER.fullmatch(trace.text, *trace.final)):
        others = dict.fromkeys(token.value for token in trace.inside((0, trace.final[0])))
        yield from (_as(trace.finals, value) for value in others)


def skipped_step(trace: Trace) -> Iterator[Edit]:
    """A step is not taken: words of the question stand in its place, and the steps after it use what it began with."""
    for i in trace.sure.keys() - {trace.answer}:
        left = trace.results[i][0].left_span
        span = step_span(trace.text, left[0])
        if {token.result for token in trace.inside(span) if token.defines} == {i}:
            for told in _restated(trace.problem.question, span[1] - span[0]):
                yield from (Edit({span: told}, {i: token.value}) for token in trace.inside(left))


def _restated(question: str, length: int) -> list[str]:
    """Runs of whole words of the question, about as long as the step in whose place they stand."""
    words = question.split()
    runs = {" ".join(words[i:j]) for i in range(len(words)) for j in range(i + 1, min(len(words), i + length) + 1)}
    near = sorted(runs, key=lambda run: (abs(len(run) + 1 - length), run))[:8]
    return [run.rstrip(".,?!:") + "." for run in near]


def extra_step(trace: Trace) -> Iterator[Edit]:
    """After the answer is found, a number is added, taken away or multiplied: in a step, or in the last equation."""
    answer, before = trace.results[trace.answer], trace.finals[0].value
    end = step_span(trace.text, answer[-1].value_span[0])[1]
    operands = sorted({place[0].value for place in trace.operands(answer)} | trace.given)
    for by in (sign + written(operand) for sign in "+-*" for operand in operands):
        left = written(before) + by
        value = evaluate(left)
        if writable(value) and value != before and end <= trace.final[0]:
            equation = f"<<{left}={value}>>{value}" if "<<" in trace.text else f"{left}={value}"
            step = f"{trace.text[end : end + 1] or ' '}{equation}."
            yield Edit({(end, end): step, **_as(trace.finals, value).texts})
            if not all(e.annotated for e in answer):  # else words before the annotation would be without it
                yield Edit({(e.left_span[1],) * 2: by for e in answer})


def corrupted_reasoning(trace: Trace) -> Iterator[Edit]:
    """The steps go wrong by another error, and the answer is right all the same."""
    kept = {token.span: token.text for token in trace.finals}
    for cause in (operator_swap, operand_swap, misread_number):
        yield from (Edit({**edit.texts, **kept}) for edit in cause(trace))


Error = Callable[[Trace], Iterator[Edit]]
# With their relative frequencies; a kind that does not fit an answer leaves its share to the others.
ARITHMETIC_ERRORS: dict[Error, int] = {
    calculation_slip: 25,
    unpropagated_slip: 5,
    skipped_step: 25,
    premature_answer: 10,
    extra_step: 12,
    operator_swap: 6,
    operand_swap: 6,
    misread_number: 6,
    off_by_one: 4,
    unit_error: 4,
    corrupted_reasoning: 5,
}
