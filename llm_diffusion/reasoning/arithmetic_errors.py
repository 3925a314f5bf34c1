"""Errors in a worked answer that reckons: one cause is put in, everything that follows from it is reckoned again.

    Tom has 23 apples …          23+45=68. 68-10=58. The answer is 58.
    calculation_slip             23+45=78. 78-10=68. The answer is 68.
    unpropagated_slip            23+45=78. 68-10=58. The answer is 58.
    operator_swap                23+45=68. 68+10=78. The answer is 78.

Trade-off: few sites, each of them certain. Alternative: editing any digit, whose consequences nobody can name.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from fractions import Fraction

from .number_trace import (
    LARGEST,
    Trace,
    Wrong,
    writable,
    written,
)
from .worked_answers import (
    COMMON_NUMBERS,
    NUMBER,
    OPERATOR,
    evaluate,
    number,
    step_at,
    step_spans,
)

_OPERATORS = re.compile(OPERATOR)
_SWAPS = dict(zip("+ - − – * / x X × ÷ ·".split(), "- + + + / * ÷ ÷ ÷ × /".split(), strict=True)) | {
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
            if value * factor < LARGEST and (value * factor * 100).denominator == 1:
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
            if new is None or not writable(new, "") or new == value or end > trace.final[0]:
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


ARITHMETIC_ERRORS: dict[str, Callable[[Trace, random.Random], Iterator[Wrong | None]]] = {
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
