"""Where every number of a worked answer comes from, and the same answer reckoned again from a changed number.

    23+45=68. 68-10=58. The answer is 58.      68 and 58 are results; the second 68 and the last 58 quote them; the rest is given

Purpose: one cause can be put into a right answer, and everything that follows from it follows.
Trade-off: where a number could come from two places (a result that the question holds too, or a usual small one) the answer is not
reckoned through it. Alternative: guessing, which puts a second error in unseen.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

from .problems import Problem
from .worked_answers import (
    COMMON_NUMBERS,
    NUMBER,
    Equation,
    equations,
    evaluate,
    final_span,
    number,
    numbers_in,
    step_at,
    step_spans,
)

LARGEST = 10**9  # of the numbers that a solver would write


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
                sure = result.sure and writable(left, self.text[slice(*token.span)])
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


def writable(value: Fraction, before: str) -> bool:
    """Positive, of a believable size, and with no more decimals than two (or than were there)."""
    decimals = max(2 if "." in before else 0, len(before.partition(".")[2]))
    return 0 < value < LARGEST and (value * 10**decimals).denominator == 1


def written(value: Fraction, before: str) -> str:
    """A number in the manner of the one that stood there: commas, decimals."""
    comma = "," if "," in before else ""
    if value.denominator == 1:
        return f"{int(value):{comma}}"
    decimals = next(d for d in range(1, 20) if (value * 10**d).denominator == 1)
    return f"{float(value):{comma}.{max(decimals, len(before.partition('.')[2]))}f}"
