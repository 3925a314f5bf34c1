"""Errors in a worked answer that reckons: one cause is put in, everything that follows from it is reckoned again.

    Tom has 23 apples …          23+45=68. 68-10=58. The answer is 58.
    calculation_slip             23+45=78. 78-10=68. The answer is 68.
    unpropagated_slip            23+45=78. 68-10=58. The answer is 58.
    operator_swap                23+45=68. 68+10=78. The answer is 78.

Every number of the text is traced: it defines a result, quotes one, or is given. Where the trace is not sure (the same number is
given and a result, or is a usual one) no error is put, so that exactly one thing is wrong.
Trade-off: few sites, each of them certain. Alternative: editing any digit, whose consequences nobody can name.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

from .problems import Problem
from .worked_answers import (
    COMMON_NUMBERS,
    NUMBER,
    OPERATOR,
    Equation,
    equations,
    evaluate,
    final_span,
    number,
    numbers_in,
    step_at,
    step_spans,
)

_OPERATORS = re.compile(OPERATOR)
_SWAPS = {
    "+": "-",
    "-": "+",
    "−": "+",
    "–": "+",
    "*": "/",
    "/": "*",
    "x": "÷",
    "X": "÷",
    "×": "÷",
    "÷": "×",
    "·": "/",
} | {
    "\\times": "\\div",
    "\\div": "\\times",
    "\\cdot": "\\div",
}
# Factors that are forgotten or applied twice, and the words that call for them.
UNIT_FACTORS = {
    "percent": 100,
    "%": 100,
    "cent": 100,
    "hour": 60,
    "minute": 60,
    "dozen": 12,
    "week": 7,
    "feet": 12,
    "foot": 12,
    "meter": 100,
    "year": 12,
    "gram": 1000,
    "liter": 1000,
}
_PLAIN = str.maketrans("−–×÷·xX", "--*/***")
_LARGEST = 10**9


class Wrong(NamedTuple):
    """A wrong answer and the characters of it in which the error was put."""

    text: str
    span: tuple[int, int]


class Token(NamedTuple):
    """A number in the text; `defines` and `quotes` are results, by index."""

    span: tuple[int, int]
    value: Fraction
    defines: int | None
    quotes: int | None


@dataclass
class Result:
    value: Fraction
    equations: list[Equation]
    sure: bool  # no other number of the problem looks the same


class Trace:
    """The numbers of a worked answer, and where each comes from.

    Args:
        answer_stays: the final answer is left as it is, whatever happens before it.
    """

    def __init__(self, problem: Problem, answer_stays: bool = False) -> None:
        self.problem, self.text = problem, problem.answer
        self.equations, self.final = equations(self.text), final_span(self.text)
        self.given = numbers_in(problem.question)
        self.results: list[Result] = []
        self.tokens: list[Token] = []
        defining = {e.value_span[0] + (self.text[e.value_span[0]] == "-"): e for e in self.equations}
        latest: dict[Fraction, int] = {}
        for match in NUMBER.finditer(self.text):
            value, equation = number(match.group()), defining.get(match.start())
            quotes, defines = latest.get(value), None
            if equation is not None:
                defines, quotes = self._result(value, equation, latest), None
            self.tokens.append(Token(match.span(), value, defines, quotes))
        self.finals = [
            i for i, t in enumerate(self.tokens) if self.final and self.final[0] <= t.span[0] < self.final[1]
        ]
        self.fixed = {i: self.tokens[i].value for i in self.finals} if answer_stays else {}

    def _result(self, value: Fraction, equation: Equation, latest: dict[Fraction, int]) -> int:
        """The index of the result that an equation defines; said and annotated forms of one equation define one result."""
        known = latest.get(value)
        if known is not None and self._same_left(self.results[known].equations[-1], equation):
            self.results[known].equations.append(equation)
            return known
        sure = known is None and value not in self.given | COMMON_NUMBERS
        if known is not None:
            self.results[known].sure = False
        self.results.append(Result(value, [equation], sure))
        latest[value] = len(self.results) - 1
        return latest[value]

    def _same_left(self, one: Equation, other: Equation) -> bool:
        step = [step_at(self.text, e.value_span[0]) for e in (one, other)]
        values = [evaluate(self.text[slice(*e.left_span)]) for e in (one, other)]
        return step[0] == step[1] and values[0] == values[1]

    def operands(self, result: int) -> list[list[int]]:
        """Tokens on the left of a result, by place: place p of every form of its equation.

        In front of an annotation whose said form is no equation ("3 large + 42 = <<3+42=45>>"), the same numbers of the same step
        belong to the places too.
        """
        forms = [self._inside(e.left_span) for e in self.results[result].equations]
        places = [list(place) for place in zip(*forms, strict=True)] if len({len(f) for f in forms}) == 1 else []
        first = self.results[result].equations[0]
        if first.annotated and places:
            start = step_spans(self.text)[step_at(self.text, first.value_span[0])][0]
            said = [i for i in self._inside((start, first.left_span[0])) if self.tokens[i].defines is None]
            for place in places:
                place[:0] = [i for i in said if self.tokens[i].value == self.tokens[place[0]].value]
        return places

    def _inside(self, span: tuple[int, int]) -> list[int]:
        return [i for i, t in enumerate(self.tokens) if span[0] <= t.span[0] < span[1]]

    def answer_result(self) -> int | None:
        """The result that the final answer quotes; None: the answer is not traced."""
        quoted = {self.tokens[i].quotes if self.tokens[i].defines is None else None for i in self.finals}
        return quoted.pop() if len(quoted) == 1 else None

    def rewrite(
        self,
        *,
        tokens: dict[int, Fraction] | None = None,
        texts: dict[tuple[int, int], str] | None = None,
        results: dict[int, Fraction] | None = None,
    ) -> Wrong | None:
        """The text with a cause put in and every result after it reckoned again.

        Args:
            tokens: numbers that are written otherwise, whatever they quote.
            texts: replaced stretches of text (operators, whole steps); numbers inside them are gone.
            results: results that are believed to be these.

        Returns:
            None where a consequence is not a number that a solver would write, or cannot be traced.
        """
        tokens, texts, env = {**(tokens or {}), **self.fixed}, dict(texts or {}), dict(results or {})
        pieces: list[tuple[tuple[int, int], str]] = list(texts.items())
        for i, token in enumerate(self.tokens):
            if any(a <= token.span[0] < b for a, b in texts):
                continue
            value = self._now(i, tokens, env, pieces)
            if value is None:
                return None
            if value != token.value:
                pieces.append((token.span, written(value, self.text[slice(*token.span)])))
        return _assemble(self.text, pieces)

    def _now(self, i: int, tokens: dict[int, Fraction], env: dict[int, Fraction], pieces: list) -> Fraction | None:
        token = self.tokens[i]
        if i in tokens:
            return tokens[i]
        if token.defines is None:
            return token.value if token.quotes is None else env.get(token.quotes, token.value)
        if token.defines not in env:
            result = self.results[token.defines]
            left = self._left(result.equations[0], pieces)
            if left is not None:
                env[token.defines] = left
                sure = result.sure and _writable(left, self.text[slice(*token.span)])
                if not sure:
                    return None
        return env.get(token.defines, token.value)

    def _left(self, equation: Equation, pieces: list[tuple[tuple[int, int], str]]) -> Fraction | None:
        """The new value of an equation; None: nothing on its left has changed."""
        a, b = equation.left_span
        inside = [((x - a, y - a), text) for (x, y), text in pieces if a <= x and y <= b]
        if not inside:
            return None
        value = evaluate(_assemble(self.text[a:b], inside).text)
        return Fraction(-1) if value is None else value  # not writable: refused by the caller


def _assemble(text: str, pieces: list[tuple[tuple[int, int], str]]) -> Wrong:
    out, position, first = [], 0, None
    for (a, b), new in sorted(pieces):
        out += [text[position:a], new]
        if first is None:
            first = (a, a + len(new))
        position = b
    return Wrong("".join([*out, text[position:]]), first or (0, 0))


def _writable(value: Fraction, before: str) -> bool:
    """Positive, of a believable size, and with no more decimals than two (or than were there)."""
    decimals = max(2 if "." in before else 0, len(before.partition(".")[2]))
    return 0 < value < _LARGEST and (value * 10**decimals).denominator == 1


def written(value: Fraction, before: str) -> str:
    """A number in the manner of the one that stood there: commas, decimals."""
    comma = "," if "," in before else ""
    if value.denominator == 1:
        return f"{int(value):{comma}}"
    decimals = next(d for d in range(1, 20) if (value * 10**d).denominator == 1)
    return f"{float(value):{comma}.{max(decimals, len(before.partition('.')[2]))}f}"


def _shuffled(rng: random.Random, items: list) -> list:
    return rng.sample(items, len(items))


def slips(value: Fraction, rng: random.Random) -> list[Fraction]:
    """What a number becomes by a slip: one more or less, a lost or extra carry, two digits in the wrong order."""
    unit = Fraction(1, 1 if value.denominator == 1 else 10)
    found = [value + d * unit for d in (1, -1, 2, -2)] + [value + d for d in (10, -10) if value > 20]
    if value.denominator == 1:
        digits = str(int(value))
        found += [Fraction(digits[:i] + digits[i + 1] + digits[i] + digits[i + 2 :]) for i in range(len(digits) - 1)]
    return _shuffled(rng, sorted({v for v in found if v > 0 and v != value}))


def _traced_results(trace: Trace, rng: random.Random) -> list[int]:
    return _shuffled(rng, [i for i, r in enumerate(trace.results) if r.sure])


def calculation_slip(trace: Trace, rng: random.Random) -> Iterator[Wrong | None]:
    """One result is reckoned wrong; the steps after it go on with it."""
    for result in _traced_results(trace, rng):
        for value in slips(trace.results[result].value, rng):
            yield trace.rewrite(results={result: value})


def unpropagated_slip(trace: Trace, rng: random.Random) -> Iterator[Wrong | None]:
    """One result is written wrong; the steps after it go on with the right one."""
    for result in _traced_results(trace, rng):
        defining = [i for i, t in enumerate(trace.tokens) if t.defines == result]
        for value in slips(trace.results[result].value, rng):
            yield trace.rewrite(tokens=dict.fromkeys(defining, value), results={result: trace.results[result].value})


def unit_error(trace: Trace, rng: random.Random) -> Iterator[Wrong | None]:
    """One result is too large or too small by a unit's factor, percent and "per" included."""
    said = (trace.problem.question + trace.text).lower()
    factors = sorted({Fraction(f) for word, f in UNIT_FACTORS.items() if word in said})
    for result in _traced_results(trace, rng):
        value = trace.results[result].value
        for factor in _shuffled(rng, factors + [1 / f for f in factors]):
            if value * factor < _LARGEST and (value * factor * 100).denominator == 1:
                yield trace.rewrite(results={result: value * factor})


def operator_swap(trace: Trace, rng: random.Random) -> Iterator[Wrong | None]:
    """One operator is its inverse: + for -, x for ÷."""
    for result in _shuffled(rng, list(range(len(trace.results)))):
        for place in _shuffled(rng, _operators(trace, result)):
            yield trace.rewrite(texts={span: _SWAPS[trace.text[slice(*span)]] for span in place})


def _operators(trace: Trace, result: int) -> list[list[tuple[int, int]]]:
    """Spans of the operators of a result, by place in its equations; none where what is said in front of an annotation differs."""
    forms = [_operator_spans(trace.text, *e.left_span) for e in trace.results[result].equations]
    forms += filter(None, [_said_operators(trace, result)])
    kinds = {tuple(_SWAPS.get(trace.text[slice(*span)], "").translate(_PLAIN) for span in form) for form in forms}
    if len(kinds) != 1 or "" in next(iter(kinds)):
        return []
    return [list(place) for place in zip(*forms, strict=True)]


def _said_operators(trace: Trace, result: int) -> list[tuple[int, int]]:
    """Operators in front of an annotation whose said form is no equation ("3 large + 42 = <<3+42=45>>")."""
    found = trace.results[result].equations
    if not all(e.annotated for e in found):
        return []
    end = found[0].left_span[0] - len("<<")
    start = step_spans(trace.text)[step_at(trace.text, end)][0]
    return _operator_spans(
        trace.text, max([start, *(e.value_span[1] for e in trace.equations if e.value_span[1] <= end)]), end
    )


def _operator_spans(text: str, start: int, end: int) -> list[tuple[int, int]]:
    """Operators between two operands: set off by blanks, or beside a digit; not the hyphens, slashes and signs of words."""
    spans = [(start + m.start(), start + m.end()) for m in _OPERATORS.finditer(text[start:end])]
    return [
        (a, b)
        for a, b in spans
        if text[start:a].strip(" ($") and not (text[a - 1].isalpha() or text[b : b + 1].isalpha())
    ]


def operand_swap(trace: Trace, rng: random.Random) -> Iterator[Wrong | None]:
    """One operand is another number of the question."""
    given = sorted({number(m.group()) for m in NUMBER.finditer(trace.problem.question)} - {0})
    for result in _shuffled(rng, list(range(len(trace.results)))):
        places = trace.operands(result)
        there = {trace.tokens[i].value for place in places for i in place}
        for place in _shuffled(rng, places):
            for value in _shuffled(rng, [v for v in given if v not in there]):
                yield trace.rewrite(tokens=dict.fromkeys(place, value))


def misread_number(trace: Trace, rng: random.Random) -> Iterator[Wrong | None]:
    """A number of the question is read wrong, wherever it is used."""
    quoted = {t.value for t in trace.tokens if t.quotes is not None}
    given = {number(m.group()) for m in NUMBER.finditer(trace.problem.question)} - quoted
    for value in _shuffled(rng, sorted(given)):
        uses = [
            i for i, t in enumerate(trace.tokens) if t.value == value and t.defines is None and i not in trace.finals
        ]
        for wrong in slips(value, rng):
            if uses and wrong not in trace.given | COMMON_NUMBERS:
                yield trace.rewrite(tokens=dict.fromkeys(uses, wrong))


def off_by_one(trace: Trace, rng: random.Random) -> Iterator[Wrong | None]:
    """One operand is a count one too high or too low."""
    for result in _shuffled(rng, list(range(len(trace.results)))):
        for place in _shuffled(rng, trace.operands(result)):
            value = trace.tokens[place[-1]].value
            for wrong in _shuffled(rng, [value - 1, value + 1]):
                if value.denominator == 1 and wrong > 0:
                    yield trace.rewrite(tokens=dict.fromkeys(place, wrong))


def premature_answer(trace: Trace, rng: random.Random) -> Iterator[Wrong | None]:
    """The answer given is an intermediate result."""
    for result in _shuffled(rng, list(range(len(trace.results)))):
        if result != trace.answer_result() and len(trace.finals) == 1:
            yield trace.rewrite(tokens={trace.finals[0]: trace.results[result].value})


def skipped_step(trace: Trace, rng: random.Random) -> Iterator[Wrong | None]:
    """A step is not taken: words of the question stand in its place, and the steps after it use what it began with."""
    steps = step_spans(trace.text)
    for result in _traced_results(trace, rng):
        spans = {steps[step_at(trace.text, e.value_span[0])] for e in trace.results[result].equations}
        inside = {t.defines for t in trace.tokens for a, b in spans if a <= t.span[0] < b and t.defines is not None}
        if len(spans) != 1 or inside != {result} or result == trace.answer_result():
            continue
        (span,) = spans
        for place in _shuffled(rng, trace.operands(result)):
            for said in _restated(trace.problem.question, span[1] - span[0], rng):
                yield trace.rewrite(texts={span: said}, results={result: trace.tokens[place[-1]].value})


def _restated(question: str, length: int, rng: random.Random) -> list[str]:
    """Runs of whole words of the question, about as long as the step in whose place they stand."""
    words = question.split()
    runs = [" ".join(words[i:j]) for i in range(len(words)) for j in range(i + 1, min(len(words), i + length) + 1)]
    near = sorted(set(runs), key=lambda run: (abs(len(run) + 1 - length), run))[:8]
    return [run.rstrip(".,?!:") + "." for run in _shuffled(rng, near)]


def extra_step(trace: Trace, rng: random.Random) -> Iterator[Wrong | None]:
    """After the answer is found, a number of the question is added, taken away or multiplied once more."""
    answer = trace.answer_result()
    if answer is None or trace.final is None:
        return
    value, last = trace.results[answer].value, trace.results[answer].equations[-1]
    end = step_spans(trace.text)[step_at(trace.text, last.value_span[0])][1]
    places = _shuffled(rng, [trace.tokens[place[-1]].value for place in trace.operands(answer)] + sorted(trace.given))
    for sign in _shuffled(rng, ["+", "-", "*"]):
        for operand in places:
            said = f"{written(value, '')}{sign}{written(operand, '')}"
            new = evaluate(said)
            if new is None or not _writable(new, "") or new == value or end > trace.final[0]:
                continue
            equation = f"<<{said}={written(new, '')}>>" if last.annotated or "<<" in trace.text else f"{said}="
            step = f"{trace.text[end : end + 1] or ' '}{equation}{written(new, '')}."
            yield trace.rewrite(texts={(end, end): step}, tokens=dict.fromkeys(trace.finals, new))
            inline = {(e.left_span[1],) * 2: f"{sign}{written(operand, '')}" for e in trace.results[answer].equations}
            if not _said_operators(trace, answer):
                yield trace.rewrite(texts=inline)


def corrupted_reasoning(trace: Trace, rng: random.Random) -> Iterator[Wrong | None]:
    """The steps go wrong by another error, and the answer is right all the same."""
    kept = Trace(trace.problem, answer_stays=True)
    for cause in _shuffled(rng, [operator_swap, operand_swap, misread_number]):
        yield from cause(kept, rng)


RECKONING_ERRORS: dict[str, Callable[[Trace, random.Random], Iterator[Wrong | None]]] = {
    f.__name__: f
    for f in (
        calculation_slip,
        unpropagated_slip,
        operator_swap,
        operand_swap,
        misread_number,
        skipped_step,
        extra_step,
        premature_answer,
        unit_error,
        off_by_one,
        corrupted_reasoning,
    )
}
