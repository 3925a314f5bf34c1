r"""Worked answers: their steps, equations and final answer; every equation evaluated again.

    Natalia sold 48/2 = <<48/2=24>>24 clips in May.          one step, two equations (said, and annotated)
    She sold 48+24 = <<48+24=72>>72 clips altogether.
    #### 72                                                  the final answer

Purpose: one reading of GSM8K, MATH and plain arithmetic text, for whoever judges worked answers or makes wrong ones.
Trade-off: only equations between numbers are evaluated (a few LaTeX commands included); sentences and algebra are left unjudged.
Alternative: a language model as the judge, which reads everything and is itself sometimes wrong.
"""

from __future__ import annotations

import ast
import operator
import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

from .. import UserError

NUMBER = re.compile(r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+")
_N = f"(?:{NUMBER.pattern})"
_ATOM = rf"[($£€\-−]{{0,5}}\s*(?:\\[dt]?frac\{{{_N}\}}\{{{_N}\}}|{_N})\s*\\?%?\){{0,5}}"
OPERATOR = r"(?:[-+*/×÷·^−–]|[xX](?=\s*[($£€]*\s*[\d.])|\\times|\\cdot|\\div)"
_EXPRESSION = rf"{_ATOM}(?:\s*{OPERATOR}\s*{_ATOM}){{1,30}}"
_SAID = re.compile(
    rf"(?<!\d)({_EXPRESSION})\s*=\s*\\?[$£€]?(-?{_N})(?:\\?(%))?"
    r"(?![.,]?\d|[\w\\^/*:(]|\s\d|\s*[-+*/×÷^−–]\s*(?:[\d($£€\\]|[A-Za-z]\b)|\s*[xX]\s*[\d($£€])"
)
_ANNOTATED = re.compile(rf"<<([^<>=]+)=(-?{_N})(%)?[^<>=]*>>")
_STEP_END = re.compile(r"(?<=[.!?])\s+|\n+")
_FINAL = (
    re.compile(r"####\s*(?P<a>.+)"),
    re.compile(r"(?:^|\n)A:\s*(?P<a>.+)"),
    re.compile(r"[Tt]he (?:final )?answer is:?\s*(?P<a>.+?)(?=[.!]?\s*$|[.!]?\n)"),
)
_WORDS = dict(
    zip(
        "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
        "eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety hundred thousand once twice thrice half "
        "third quarter double triple dozen".split(),
        [*range(21), *range(30, 100, 10), 100, 1000, 1, 2, 3, 2, 3, 4, 2, 3, 12],
        strict=True,
    )
)
# Numbers that a solver may bring along: small counts, and the factors between units.
COMMON_NUMBERS = frozenset(map(Fraction, (0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 24, 30, 31, 52, 60, 100, 365, 1000)))
_BINARY = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
}
_LARGEST_POWER = 64
_LONGEST = 400  # characters of an expression
LARGEST = 10**9  # of the numbers that a solver would write
Span = tuple[int, int]  # start and end, characters of a text


class Equation(NamedTuple):
    """`left = value` in a text; the spans are character positions."""

    left_span: tuple[int, int]
    value_span: tuple[int, int]
    annotated: bool
    holds: bool


@lru_cache(maxsize=4096)
def evaluate(expression: str) -> Fraction | None:
    """The exact value of an arithmetic expression, plain or in simple LaTeX; None: it is no such expression."""
    if len(expression) > _LONGEST:
        return None
    plain = re.sub(r"\\[dt]?frac\{([^{}]*)\}\{([^{}]*)\}", r"((\1)/(\2))", expression)
    plain = re.sub(r"\\times|\\cdot|[×·xX]", "*", plain)
    plain = re.sub(r"\\div|÷", "/", plain)
    plain = re.sub(rf"({_N})\s*\\?%", r"(\1/100)", plain)
    plain = re.sub(r"(?<=\d),(?=\d{3})|[$£€\\]", "", plain).replace("^", "**")
    plain = re.sub(r"(?<![\d.])0+(?=\d)", "", re.sub("[−–]", "-", plain)).strip()
    try:
        return _value(ast.parse(plain, mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError):
        return None


def _value(node: ast.expr) -> Fraction:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return Fraction(str(node.value))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand)
    if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        left, right = _value(node.left), _value(node.right)
        if isinstance(node.op, ast.Pow) and (right.denominator != 1 or abs(right) > _LARGEST_POWER or abs(left) > 1e6):
            raise UserError("not a power of numbers that a worked answer holds")
        return _BINARY[type(node.op)](left, right)
    raise UserError("not arithmetic")


def number(text: str) -> Fraction:
    return Fraction(text.replace(",", ""))


def writable(value: Fraction | None, before: str = "") -> bool:
    """Positive, of a believable size, and with no more decimals than two (or than were there)."""
    decimals = max(2 if "." in before else 0, len(before.partition(".")[2]))
    return value is not None and 0 < value < LARGEST and (value * 10**decimals).denominator == 1


def written(value: Fraction, before: str = "") -> str:
    """A number in the manner of the one that stood there: commas, decimals."""
    comma = "," if "," in before else ""
    if value.denominator == 1:
        return f"{int(value):{comma}}"
    decimals = next(d for d in range(1, 20) if (value * 10**d).denominator == 1)
    return f"{float(value):{comma}.{max(decimals, len(before.partition('.')[2]))}f}"


def numbers_in(text: str) -> set[Fraction]:
    """All numbers of a text, those written as words (and `half`, `twice`, `dozen`) too."""
    words = {_WORDS[w] for w in re.findall(r"[a-z]+", text.lower()) if w in _WORDS}
    return {number(m.group()) for m in NUMBER.finditer(text)} | set(map(Fraction, words))


def agrees(exact: Fraction, written: str, percent: bool = False) -> bool:
    """Whether `written` is `exact`, or `exact` rounded or cut off at the decimals that are written."""
    unit = Fraction(1, 10 ** len(written.partition(".")[2]))
    value = number(written)
    for candidate in (value, value / 100) if percent else (value,):
        step = unit / 100 if candidate != value else unit
        if (exact / step).denominator == 1:
            if exact == candidate:
                return True
        elif abs(exact - candidate) < step:
            return True
    return False


@lru_cache(maxsize=256)  # one answer is asked for its equations and steps again and again
def equations(text: str) -> tuple[Equation, ...]:
    """The equations between numbers, in the order of their values; those with a letter or an unknown are left out."""
    found = [_equation(m, m.start(1), m.end(1), m.span(2), True) for m in _ANNOTATED.finditer(text)]
    kept = [
        i for m in re.finditer(r"<<[^<>]*>>|[^<]|<", text) if not m.group().startswith("<<") for i in range(*m.span())
    ]
    visible = "".join(text[i] for i in kept)
    for m in _SAID.finditer(visible):
        begin = m.end(1) - len(m.group(1).lstrip())
        before, glued = visible[:begin].rstrip()[-1:], visible[:begin][-1:]
        if before and (before in "+*/×÷·^_−–-){\\0123456789" or glued.isalnum() or glued in "._}"):
            continue  # a piece of a longer expression, with an unknown in it
        if visible[begin] in "-−" and before.isalnum() or re.search(r"\s[xX]$", visible[:begin].rstrip()):
            continue  # "n - 3 + 2 = 6", "60 students x 2/3 = 40"
        left = (kept[begin], kept[begin + len(m.group(1).strip()) - 1] + 1)
        found.append(_equation(m, *left, (kept[m.start(2)], kept[m.end(2) - 1] + 1), False))
    return tuple(sorted((e for e in found if e is not None), key=lambda e: e.value_span))


def _equation(match: re.Match, start: int, end: int, value_span: tuple[int, int], annotated: bool) -> Equation | None:
    exact = evaluate(match.group(1))
    if exact is None:
        return None
    return Equation(
        (start, end), value_span, annotated, agrees(exact, match.group(2), "%" in (match.group(3) or match.group(1)))
    )


@lru_cache(maxsize=256)
def step_spans(text: str) -> tuple[tuple[int, int], ...]:
    """Character spans of the steps: lines, and the sentences of a line."""
    spans, start = [], 0
    for end in [*_STEP_END.finditer(text), None]:
        stop = end.start() if end else len(text)
        if text[start:stop].strip():
            spans.append((start, stop))
        start = end.end() if end else stop
    return tuple(spans)


def step_at(text: str, position: int) -> int:
    """Index of the step that holds a character position; that of the last step after its end."""
    return max(0, bisect_right([start for start, _ in step_spans(text)], position) - 1)


def step_span(text: str, position: int) -> Span:
    """The step that holds a character position."""
    return step_spans(text)[step_at(text, position)]


def boxed_span(text: str) -> tuple[int, int] | None:
    r"""Span of what stands in the last `\boxed{…}`; None: there is none, or it never ends."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    start, depth = start + len("\\boxed{"), 1
    for i in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if depth == 0:
            return start, i
    return None


def final_span(text: str) -> tuple[int, int] | None:
    r"""Span of the final answer: after `####` or `A:`, in the last `\boxed{}`, or after "The answer is"."""
    if (boxed := boxed_span(text)) is not None:
        return boxed
    for pattern in _FINAL:
        if matches := list(pattern.finditer(text)):
            start, end = matches[-1].span("a")
            end -= len(text[start:end]) - len(text[start:end].rstrip(" ."))
            return (start, end) if end > start else None
    return None


def final_answer(text: str) -> str | None:
    span = final_span(text)
    return None if span is None else text[slice(*span)]


@dataclass(frozen=True)
class Judgement:
    """What re-evaluating a worked answer finds. Steps are counted from 0.

    Args:
        answer: the final answer as written; None: there is none.
        right: whether it is the reference; None without one.
        first_wrong_step: the first with a false equation or with a number that comes from nowhere; where every step holds and
            the answer is still wrong, the step that states it (the last, if none does).
        false_steps: all steps with a false equation.
        superfluous: steps that repeat an earlier one, or whose results nobody uses.
    """

    answer: str | None
    right: bool | None
    first_wrong_step: int | None
    false_steps: list[int]
    superfluous: list[int]


def judge(text: str, question: str = "", reference: str | None = None) -> Judgement:
    """Re-evaluates a worked answer step by step.

    Args:
        question: where the numbers may come from; "": their origin is not judged.
        reference: a worked answer, or the right final answer alone.
    """
    span, found, steps = final_span(text), equations(text), step_spans(text)
    right = None
    if reference is not None:
        wanted = final_answer(reference)
        right = span is not None and same_answer(text[slice(*span)], reference if wanted is None else wanted)
    false = sorted({step_at(text, e.value_span[0]) for e in found if not e.holds})
    wrong = list(false)
    if question:
        wrong += _from_nowhere(text, found, numbers_in(question) | COMMON_NUMBERS)
    if not wrong and right is False:
        wrong = [step_at(text, len(text) if span is None else span[0])]
    return Judgement(
        None if span is None else text[slice(*span)],
        right,
        min(wrong, default=None),
        false,
        _superfluous(text, found, steps, span),
    )


def _from_nowhere(text: str, found: Sequence[Equation], known: set[Fraction]) -> list[int]:
    """Steps that reckon with a number which neither the question nor an earlier step knows."""
    known, steps = set(known), []
    for e in found:
        if not {number(m.group()) for m in NUMBER.finditer(text[slice(*e.left_span)])} <= known:
            steps.append(step_at(text, e.value_span[0]))
        known.add(number(text[slice(*e.value_span)].lstrip("-")))
    return steps


def _superfluous(
    text: str, found: Sequence[Equation], steps: Sequence[tuple[int, int]], final: tuple[int, int] | None
) -> list[int]:
    said = [text[a:b].strip() for a, b in steps]
    extra = {i for i, step in enumerate(said) if step in said[:i]}
    useful: dict[int, bool] = {}
    for e in found:
        i, value = step_at(text, e.value_span[0]), number(text[slice(*e.value_span)].lstrip("-"))
        later = numbers_in(text[steps[i][1] :]) if i + 1 < len(steps) else set()
        states_answer = final is not None and steps[i][0] <= final[0] <= steps[i][1]
        useful[i] = useful.get(i, False) or value in later or states_answer or i + 1 == len(steps)
    return sorted(extra | {i for i, used in useful.items() if not used})


def normalised(answer: str) -> str:
    r"""An answer without what does not count: blanks, `$`, `\left`, units in `\text{}`, case, a full stop."""
    text = re.sub(r"\\(?:left|right|!|,|;|:|displaystyle)|\^\\circ|\^\{\\circ\}|\\?[$%]|\s", "", answer)
    text = re.sub(r"\\[dt]frac", r"\\frac", text)
    text = re.sub(r"\\frac(\d)(\d)", r"\\frac{\1}{\2}", text)
    without_units = re.sub(r"(?<=.)\\(?:text|mbox|mathrm)\{[^{}]*\}(?:\^\d)?$", "", text)
    text = re.sub(r"\\(?:text|mbox|mathrm)\{([^{}]*)\}", r"\1", without_units)
    return re.sub(r"(?<=\d),(?=\d{3})", "", text).rstrip(".").lower()


def same_answer(one: str, other: str) -> bool:
    """Whether two final answers are the same, as numbers where both are numbers."""
    left, right = normalised(one), normalised(other)
    if left == right:
        return True
    values = evaluate(left), evaluate(right)
    return None not in values and values[0] == values[1]
