r"""Worked answers: their steps, equations and final answer; every equation evaluated again.

    Natalia sold 48/2 = <<48/2=24>>24 clips in May.          one step, two equations (said, and annotated)
    She sold 48+24 = <<48+24=72>>72 clips altogether.
    #### 72                                                  the final answer

Only equations between numbers are evaluated (a few LaTeX commands included); sentences and algebra are left unjudged.
"""

from __future__ import annotations

import ast
import operator
import re
from bisect import bisect_right
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

NUMBER = re.compile(r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+")
_N = f"(?:{NUMBER.pattern})"
_ATOM = rf"[($£€\-−]{{0,5}}\s*(?:\\[dt]?frac\{{{_N}\}}\{{{_N}\}}|{_N})\s*\\?%?\){{0,5}}"
OPERATOR = r"(?:[-+*/×÷·^−–]|[xX](?=\s*[($£€]*\s*[\d.])|\\times|\\cdot|\\div)"
_SAID = re.compile(
    rf"(?<!\d)({_ATOM}(?:\s*{OPERATOR}\s*{_ATOM}){{1,30}})\s*=\s*\\?[$£€]?\s*(-?{_N})(?:\\?(%))?"
    r"(?![.,]?\d|[\w\\^/*:(]|\s\d|\s*[-+*/×÷^−–]\s*(?:[\d($£€\\]|[A-Za-z]\b)|\s*[xX]\s*[\d($£€])"
)
_ANNOTATED = re.compile(rf"<<([^<>=]+)=(-?{_N})(%)?[^<>=]*>>")
_STEP_END = re.compile(r"(?<=[.!?])\s+|\n+")
_BRACED = r"[^{}]*"
for _ in range(6):  # braces within braces
    _BRACED = rf"(?:[^{{}}]|\{{{_BRACED}\}})*"
_FINAL = (
    re.compile(rf"\\boxed\{{({_BRACED})\}}"),
    re.compile(r"####\s*(.+)"),
    re.compile(r"(?:^|\n)A:\s*(.+)"),
    re.compile(r"[Tt]he (?:final )?answer is:?\s*(.+?)(?=[.!]?\s*$|[.!]?\n)"),
)
_NAMES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen "
    "nineteen twenty thirty forty fifty sixty seventy eighty ninety hundred thousand once twice thrice half third quarter double "
    "triple dozen"
)
_VALUES = [*range(21), *range(30, 100, 10), 100, 1000, 1, 2, 3, 2, 3, 4, 2, 3, 12]
_WORDS = dict(zip(_NAMES.split(), map(Fraction, _VALUES), strict=True))
# Numbers that a solver may bring along: small counts, and the factors between units.
COMMON_NUMBERS = frozenset(map(Fraction, (0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 24, 30, 31, 52, 60, 100, 365, 1000)))
_THOUSANDS = re.compile(r"(?<=\d)(?:,|\{,\}|\\[,!])(?=\d{3})")
_PLAIN = re.compile(r"(?:[\s\d.+*/()-]|(?<=\d)[eE](?=[-+]?\d))+")
PLAIN_SIGNS = str.maketrans("×·xX÷−–", "****/--")
_BINARY = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
_LARGEST = 10**9  # of the numbers that a solver would write
_LARGEST_POWER = 64
_LONGEST = 400  # characters of an expression
Span = tuple[int, int]  # start and end, characters of a text


class Equation(NamedTuple):
    """`left = value` in a text: what stands there, and the exact value of the left side."""

    left_span: Span
    value_span: Span
    annotated: bool
    value: Fraction
    exact: Fraction
    holds: bool


@lru_cache(maxsize=4096)
def evaluate(expression: str) -> Fraction | None:
    """The exact value of an arithmetic expression, plain or in simple LaTeX; None: it is no such expression."""
    if len(expression) > _LONGEST:
        return None
    plain = re.sub(r"(?<![\d.])(\d+)\s*\\[dt]?frac\{(\d+)\}\{(\d+)\}", r"(\1+\2/\3)", expression)  # a mixed number
    plain = re.sub(r"\\[dt]?frac\{([^{}]*)\}\{([^{}]*)\}", r"((\1)/(\2))", plain)
    plain = re.sub(r"\\times|\\cdot", "*", plain.replace("\\div", "/")).translate(PLAIN_SIGNS)
    plain = re.sub(rf"({_N})\s*\\?%", r"(\1/100)", plain)
    plain = re.sub(r"[$£€\\]", "", _THOUSANDS.sub("", plain)).replace("^", "**")
    plain = re.sub(r"(?<![\d.])0+(?=\d)", "", plain).strip()
    if not _PLAIN.fullmatch(plain):  # Python has other literals, and warns of some words behind a number
        return None
    try:
        return _value(ast.parse(plain, mode="eval").body)
    except (SyntaxError, ValueError, KeyError, ZeroDivisionError, RecursionError):
        return None


def _value(node: ast.expr) -> Fraction:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return Fraction(str(node.value))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand)
    if not isinstance(node, ast.BinOp):
        raise ValueError("not arithmetic")
    left, right = _value(node.left), _value(node.right)
    if isinstance(node.op, ast.Pow) and right.denominator == 1 and abs(right) <= _LARGEST_POWER and abs(left) <= 1e6:
        return left**right
    return _BINARY[type(node.op)](left, right)


@lru_cache(maxsize=4096)
def number(text: str) -> Fraction:
    return Fraction(text.replace(",", ""))


def writable(value: Fraction | None, before: str = "") -> bool:
    """Positive, of a believable size, and with no more decimals than two (or than were there)."""
    decimals = max(2 if "." in before else 0, len(before.partition(".")[2]))
    return value is not None and 0 < value < _LARGEST and (value * 10**decimals).denominator == 1


def written(value: Fraction, before: str = "") -> str:
    """A number in the manner of the one that stood there: commas, decimals."""
    comma = "," if "," in before else ""
    if value.denominator == 1:
        return f"{int(value):{comma}}"
    decimals = next(d for d in range(1, 20) if (value * 10**d).denominator == 1)
    return f"{float(value):{comma}.{max(decimals, len(before.partition('.')[2]))}f}"


def numbers_in(text: str) -> set[Fraction]:
    """All numbers of a text, those written as words (and `half`, `twice`, `dozen`) too."""
    words = {_WORDS[word] for word in re.findall(r"[a-z]+", text.lower()) if word in _WORDS}
    return words | {number(digits) for digits in NUMBER.findall(text)}


def agrees(exact: Fraction, written: str, percent: bool = False) -> bool:
    """Whether `written` is `exact`, or `exact` rounded or cut off at the decimals that are written."""
    unit = Fraction(1, 10 ** len(written.partition(".")[2]))
    for scale in (1, 100) if percent else (1,):
        off, step = abs(exact - number(written) / scale), unit / scale
        if off == 0 or off < step and (exact / step).denominator > 1:
            return True
    return False


@lru_cache(maxsize=256)  # of one answer they are needed again and again
def equations(text: str) -> tuple[Equation, ...]:
    """The equations between numbers, in the order of their values; those with a letter or an unknown are left out."""
    found, kept = [(match, match.start(1), True) for match in _ANNOTATED.finditer(text)], []
    visible = re.sub(r"<<[^<>]*>>", lambda match: " " * len(match.group()), text)
    for match in _SAID.finditer(visible):
        start = match.end(1) - len(match.group(1).lstrip())
        before, glued = visible[:start].rstrip()[-1:], visible[:start][-1:]
        if before and (before in "+*/×÷·^_−–-){\\0123456789" or glued.isalnum() or glued in "._}"):
            continue  # a piece of a longer expression, with an unknown in it
        if visible[start] in "-−" and before.isalnum() or re.search(r"\s[xX]$", visible[:start].rstrip()):
            continue  # "n - 3 + 2 = 6", "60 students x 2/3 = 40"
        found.append((match, start, False))
    for match, start, annotated in found:
        exact, percent = evaluate(match.group(1)), "%" in (match.group(3) or match.group(1))
        if exact is not None:
            left = start, start + len(match.group(1).strip())
            holds = agrees(exact, match.group(2), percent)
            kept.append(Equation(left, match.span(2), annotated, number(match.group(2)), exact, holds))
    return tuple(sorted(kept, key=lambda e: e.value_span))


@lru_cache(maxsize=256)
def step_spans(text: str) -> tuple[Span, ...]:
    """Character spans of the steps: lines, and the sentences of a line."""
    ends = [(0, 0), *(match.span() for match in _STEP_END.finditer(text)), (len(text), len(text))]
    return tuple((start, end) for (_, start), (end, _) in pairwise(ends) if text[start:end].strip())


def step_at(text: str, position: int) -> int:
    """Index of the step that holds a character position; that of the last step after its end."""
    return max(0, bisect_right([start for start, _ in step_spans(text)], position) - 1)


def step_span(text: str, position: int) -> Span:
    return step_spans(text)[step_at(text, position)]


def final_span(text: str) -> Span | None:
    r"""Span of the final answer: in the last `\boxed{}`, after `####` or `A:`, or after "The answer is"."""
    for pattern in _FINAL:
        if matches := list(pattern.finditer(text)):
            start = matches[-1].start(1)
            end = start + len(matches[-1][1].rstrip(" ."))
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
        first_wrong_step: the first with a false equation or a number that comes from nowhere; where every step holds and
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
    span, answer, right = final_span(text), final_answer(text), None
    if reference is not None:
        right = answer is not None and same_answer(answer, final_answer(reference) or reference)
    steps, known = step_spans(text), numbers_in(question) | COMMON_NUMBERS
    false, strange, used = set(), set(), {}
    for e in equations(text):
        i, value = step_at(text, e.value_span[0]), abs(e.value)
        if not e.holds:
            false.add(i)
        if question and not numbers_in(text[slice(*e.left_span)]) <= known:
            strange.add(i)
        known.add(value)
        states_answer = i + 1 == len(steps) or span is not None and steps[i][0] <= span[0] <= steps[i][1]
        used[i] = used.get(i, False) or states_answer or value in numbers_in(text[steps[i][1] :])
    wrong = false | strange
    if not wrong and right is False:
        wrong = {step_at(text, len(text) if span is None else span[0])}
    told = [text[start:end].strip() for start, end in steps]
    superfluous = {i for i, step in enumerate(told) if step in told[:i]} | {i for i in used if not used[i]}
    return Judgement(answer, right, min(wrong, default=None), sorted(false), sorted(superfluous))


def normalised(answer: str) -> str:
    r"""An answer without what does not count: blanks, `$`, `\left`, units in `\text{}`, case, a full stop, braces that LaTeX can do without."""
    text = re.sub(
        r"(?<![\d/])(\d+)\s+(\d+)/(\d+)", r"\1\\frac{\2}{\3}", answer
    )  # before the blank goes: 2 1/2 is not 21/2
    text = re.sub(r"\\(?:left|right|!|,|;|:|displaystyle)|\^\\circ|\^\{\\circ\}|\\?[$%]|\s", "", text)
    text = re.sub(r"\\(frac|sqrt)(\d)", r"\\\1{\2}", re.sub(r"\\[dt]frac", r"\\frac", text))
    text = re.sub(rf"(\\frac\{{{_BRACED}\}})(\d)", r"\1{\2}", text)
    text = re.sub(r"(?<=.)\\(?:text|mbox|mathrm)\{[^{}]*\}(?:\^\d)?$", "", text)  # a unit
    text = re.sub(r"\\(?:text|mbox|mathrm)\{([^{}]*)\}", r"\1", text)
    text = _THOUSANDS.sub("", text).rstrip(".").lower()
    return re.sub(r"\(([a-z])\)", r"\1", text) if len(text) == 3 else text  # an option: (C)


def same_answer(one: str, other: str) -> bool:
    """Whether two final answers are the same, as numbers where both are numbers."""
    left, right = normalised(one), normalised(other)
    value = evaluate(left)
    return left == right or value is not None and value == evaluate(right)
