r"""Planning puzzles whose answers are checked by the rules of the game: countdown and sudoku.

    countdown   15,44,79,50 (reach the last number)   44-15=29,79-29=50   or   79-(44-15)   or   79-(44-15)=50
    sudoku      1000\n0002\n4003\n0000 (0 is blank)   1234\n3412\n4123\n2341

Purpose: any right answer counts, not only the one that a file holds, in whatever way a model writes it.
Trade-off: a line of text around a grid or a marked answer is passed over, prose within equations is not. Alternative: equality with the
reference, which calls other right answers wrong.

References: countdown with every number used once, one operation an equation: Gandhi et al. 2024 (arXiv 2404.03683, Stream of Search).
"""

from __future__ import annotations

import re
import string

from .worked_answers import evaluate, final_answer, number

_NUMBER = r"-?\d+(?:\.\d+)?"
_EXPRESSION = re.compile(rf"[\s(]*{_NUMBER}[\s)]*(?:[-+*/][\s(]*{_NUMBER}[\s)]*)*")
_LEAF = re.compile(r"(?:^-|(?<=[-+*/(])-)?\d+(?:\.\d+)?")  # a sign is a sign only where no number stands before it
_SIGNS = str.maketrans({"×": "*", "·": "*", "÷": "/", "−": "-", "–": "-"})


def reaches_countdown(numbers: str, answer: str) -> bool:
    """Whether the equations of `answer` hold, use each number once (results too) and end at the last number of `numbers`.

    Args:
        numbers: separated by commas, the target last.
        answer: equations separated by commas, semicolons or line ends, or one expression: what it marks as its answer, or else its first
            paragraph.
    """
    marked = final_answer(answer)
    text = answer.strip().split("\n\n")[0] if marked is None else marked
    text = text.translate(_SIGNS).strip().rstrip(".")
    *pool, target = [number(n) for n in numbers.split(",")]
    for equation in re.split(r"[,;\n]", text):
        left, _, stated = equation.partition("=")
        value = evaluate(left) if _EXPRESSION.fullmatch(left) else None
        if value is None or ("=" in equation and evaluate(stated) != value):
            return False
        for leaf in _LEAF.findall(re.sub(r"\s", "", left)):
            if number(leaf) not in pool:
                return False
            pool.remove(number(leaf))
        pool.append(value)
    return pool == [target]


def solves_sudoku(puzzle: str, answer: str) -> bool:
    """Whether `answer` fills the blanks ("0") of an n² x n² `puzzle`, both digits row by row: rows, columns, boxes once each.

    The grid of an answer is its last lines that are digits (and blanks, bars or commas) alone.
    """
    given = puzzle.split()
    n = len(given)
    side, filled = round(n**0.5), _last_grid(answer)
    if side * side != n or [len(row) for row in filled] != [n] * n or any(len(row) != n for row in given):
        return False
    digits = set(string.digits[1 : n + 1])
    cells = [
        {filled[r + i][c + j] for i in range(side) for j in range(side)}
        for r in range(0, n, side)
        for c in range(0, n, side)
    ]
    kept = all(g in ("0", f) for a, b in zip(given, filled, strict=True) for g, f in zip(a, b, strict=True))
    return kept and all(set(group) == digits for group in [*filled, *zip(*filled, strict=True), *cells])


def _last_grid(text: str) -> list[str]:
    grid: list[str] = []
    for line in reversed(text.splitlines()):
        row = re.sub(r"[\s|,]", "", line)
        if row.isdecimal():
            grid.insert(0, row)
        elif grid:
            break
    return grid
