"""Countdown and sudoku by their rules: against brute force, the definition, and answers as models write them."""

import itertools
import operator
import random
from fractions import Fraction

import pytest

from llm_diffusion.reasoning.planning import reaches_countdown, solves_sudoku

NUMBERS = "15,44,79,50"


def test_sudoku_against_all_grids():
    """Every filling of the second puzzle's two blank rows: those that solve it by rule are those of the definition."""
    puzzle = "1234\n3412\n0000\n0000"
    rows = ["".join(row) for row in itertools.permutations("1234")]
    for third, fourth in itertools.product(rows, rows):
        grid = ["1234", "3412", third, fourth]
        columns = all(len({row[c] for row in grid}) == 4 for c in range(4))
        boxes = all(len({grid[r + i][c + j] for i in (0, 1) for j in (0, 1)}) == 4 for r in (0, 2) for c in (0, 2))
        assert solves_sudoku(puzzle, "\n".join(grid)) is (columns and boxes)
    assert not solves_sudoku(puzzle, "4321\n2143\n1234\n3412")  # solved, with other givens
    assert not solves_sudoku(puzzle, "1234\n3412\n2143") and not solves_sudoku(puzzle, "")


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("44-15=29,79-29=50", True),
        ("79-44=35,35+15=50", True),
        ("79-44=36,36+15=50", False),  # does not hold
        ("44+15=59", False),  # does not end there
        ("79-29=50", False),  # 29 is not there
        ("35+15=50", False),
        ("44-15=29,79-29=50,", False),
        ("", False),
    ],
)
def test_countdown(answer, right):
    assert reaches_countdown(NUMBERS, answer) is right


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("79-(44-15)", True),
        ("79-(44-15)=50", True),
        ("79 − 44 + 15 = 50.", True),
        ("44-15=29\n79-29=50", True),
        ("15-44=-29,79+-29=50", True),  # a result below zero is a number too
        ("15-44=-29, 79 - -29 = 108", False),
        (" 44-15=29,79-29=50\n\nAnd so on.", True),
        ("79-44=35\n\n35+15=50", False),
        ("First I subtract.\n#### 44-15=29,79-29=50", True),
        ("The answer is $\\boxed{79-(44-15)}$.", True),
        ("79-44+15+0", False),  # a number that is not there
        ("79-44=35", False),  # 15 is left over
        ("79-15-15+1", False),
        ("50", False),
        ("79-(44-15)=51", False),
        ("79-(44-15", False),
        ("79-44+15,", False),
        ("(79)(44)15", False),
        ("79-44+15**1", False),
        ("__import__('os')", False),
    ],
)
def test_countdown_as_models_write_it(answer, right):
    assert reaches_countdown(NUMBERS, answer) is right


def test_no_number_may_be_glued_or_hidden():
    assert not reaches_countdown("1,2,12", "12") and not reaches_countdown("1,2,12", "1 2")
    assert not reaches_countdown("2,3,8", "2**3") and not reaches_countdown("7,2,3", "7//2")
    assert not reaches_countdown("5,1,2", ".5*1*4") and not reaches_countdown("100,5,5", "5%100")
    assert reaches_countdown("3,2,4,6", "3/2=1.5,1.5*4=6") and reaches_countdown("3,2,4,6", "3/2*4")
    assert reaches_countdown("1,1,2", "1+1=2") and not reaches_countdown("1,2,2", "1+1=2")


def test_countdown_against_brute_force():
    """Random expressions with brackets: right where their own value (on exact fractions) is the target and nothing is left over."""
    signs = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
    rng = random.Random(0)
    for _ in range(300):
        pool = [rng.randrange(1, 30) for _ in range(rng.randrange(2, 6))]
        terms = [(str(n), Fraction(n)) for n in pool]
        while len(terms) > 1:
            (a, x), (b, y) = (terms.pop(rng.randrange(len(terms))) for _ in range(2))
            sign = rng.choice([s for s in signs if s != "/" or y])
            terms.append((f"({a}{sign}{b})", signs[sign](x, y)))
        text, value = terms[0]
        if value.denominator > 1 or value < 0:
            continue
        numbers = ",".join(map(str, [*rng.sample(pool, len(pool)), value]))
        assert reaches_countdown(numbers, text), (numbers, text)
        assert not reaches_countdown(numbers.rpartition(",")[0] + f",{value + 1}", text)
        assert not reaches_countdown("31," + numbers, text)  # one number is left over
        assert not reaches_countdown(numbers.partition(",")[2], text)  # one is used that is not there


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("1234\n3412\n4123\n2341", True),
        ("The grid:\n1 2 3 4\n3 4 1 2\n4 1 2 3\n2 3 4 1\nThat is all.", True),
        ("12|34\n34|12\n41|23\n23|41", True),
        ("1000\n0002\n4003\n0000\n\nis solved by\n1234\n3412\n4123\n2341", True),
        ("1234\n1234\n3412\n4123\n2341", False),  # five rows are no grid
        ("1234\n3412\n4123\n2341\n\nor\n\n1234\n3412\n2143\n4321", False),  # the last grid counts
        ("1234341241232341", False),
    ],
)
def test_sudoku_as_models_write_it(answer, right):
    assert solves_sudoku("1000\n0002\n4003\n0000", answer) is right
