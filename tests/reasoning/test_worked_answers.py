"""Worked answers re-evaluated: numbers against Python's own arithmetic, texts as people write them, and judgements with known causes."""

import ast
import operator
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_diffusion.reasoning.worked_answers import (
    agrees,
    equations,
    evaluate,
    final_answer,
    judge,
    number,
    numbers_in,
    same_answer,
    step_at,
    step_spans,
)

WENG = "Weng earns 12/60 = $<<12/60=0.2>>0.2 per minute.\nWorking 50 minutes, she earned 0.2 x 50 = $<<0.2*50=10>>10.\n#### 10"


def said(text):
    """Left side, value and whether it holds, of every equation."""
    return [(text[slice(*e.left_span)], text[slice(*e.value_span)], e.holds) for e in equations(text)]


OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}


@given(
    st.integers(0, 500),
    st.lists(st.tuples(st.sampled_from("+-*/"), st.integers(1, 60), st.booleans()), min_size=1, max_size=4),
)
def test_evaluation_is_pythons_own(first, rest):
    text = str(first)
    for sign, value, grouped in rest:
        text = f"({text}){sign}{value}" if grouped else f"{text}{sign}{value}"
    assert float(evaluate(text)) == pytest.approx(eval(text, {"__builtins__": {}}), rel=1e-12)
    latex = text.replace("*", " \\times ").replace("/", " \\div ")
    assert evaluate(latex) == evaluate(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("$1,250 + $850", 2100),
        ("50*20%", 10),
        ("\\frac{3}{4} \\cdot 8", 6),
        ("2^5", 32),
        (" − 3 + 5", 2),
        ("007+1", 8),
        (".5*4", 2),
    ],
)
def test_other_spellings(text, value):
    assert evaluate(text) == value


@pytest.mark.parametrize(
    "text", ["x+1", "1/0", "2**999999999", "__import__('os')", "", "3+", "1 if 2 else 3", "9" * 5000 + "+1"]
)
def test_what_is_no_arithmetic(text):
    assert evaluate(text) is None


@pytest.mark.parametrize(
    ("exact", "written", "holds"),
    [
        (Fraction(1, 3), "0.33", True),
        (Fraction(2, 3), "0.67", True),
        (Fraction(2, 3), "0.66", True),  # cut off
        (Fraction(2, 3), "0.68", False),
        (Fraction(1000), "1001", False),
        (Fraction(5, 2), "3", True),
        (Fraction(5, 2), "4", False),
        (Fraction(1, 4), "0.25", True),
        (Fraction(1, 4), "0.24", False),
    ],
)
def test_rounded_values(exact, written, holds):
    assert agrees(exact, written) is holds


def test_equations_said_and_annotated():
    assert said(WENG) == [
        ("12/60", "0.2", True),
        ("12/60", "0.2", True),
        ("0.2*50", "10", True),
        ("0.2 x 50", "10", True),
    ]
    assert said("77-67=10. 10+73=84. The answer is 84.") == [("77-67", "10", True), ("10+73", "84", False)]
    assert said("It is 20% * 50 = 10, or $\\frac{1}{5} \\cdot 50 = 10$; 5/20*100 = 25%.") == [
        ("20% * 50", "10", True),
        ("$\\frac{1}{5} \\cdot 50", "10", True),
        ("5/20*100", "25", True),
    ]


@pytest.mark.parametrize(
    "text",
    [
        "3x-5=16",
        "a_1 + 2 = 4",
        "n - 3 + 2 = 6",
        "f(2) + 3 = 9",
        "22 - 16 = 16 + x - 16",
        "60 students x 2/3 = 40",
        "8 x 1 1/2 = 12",
        "2+2 = 5x",
        "\\sqrt{9 + 16} = 5",
        "3 - 1 = 2 - x",
    ],
)
def test_algebra_and_units_are_left_unjudged(text):
    assert not [e for e in said(text) if not e[2]]


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (WENG, "10"),
        ("so \\boxed{\\frac{3}{4}} of \\boxed{p - q}.", "p - q"),
        ("so \\boxed{\\frac{3", None),
        ("2+2=4. The answer is 4.", "4"),
        ("The final answer is: No. 5.\nDone", "No. 5"),
        ("3 + 4 = 7\nA: 7", "7"),
        ("no idea", None),
        ("2+2=4.\n#### ", None),
    ],
)
def test_final_answers(text, answer):
    assert final_answer(text) == answer


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("1,040", "1040", True),
        ("$5.00", "5", True),
        ("\\dfrac{1}{2}", "\\frac12", True),
        ("\\left( 3, \\frac{\\pi}{2} \\right)", "(3,\\frac{\\pi}{2})", True),
        ("10\\text{ cm}", "10", True),
        ("\\frac{1}{2}", "0.5", True),
        ("\\text{Evelyn}", "evelyn", True),
        ("5", "6", False),
        ("p-q", "q-p", False),
        ("3", "\\frac{1}{3}", False),
        ("10{,}000", "10,000", True),
        ("11\\sqrt2", "11\\sqrt{2}", True),
        ("\\frac{270}7\\text{ degrees}", "\\frac{270}{7}", True),
        ("\\frac9{19}", "\\dfrac{9}{19}", True),
        ("\\frac{\\sqrt3}2", "\\frac{\\sqrt{3}}{2}", True),
        ("-1\\frac{4}{5}", "-1.8", True),
        ("2 1/2", "2.5", True),
        ("2 1/2", "21/2", False),
        ("\\text{(C)}", "C", True),
    ],
)
def test_same_answers(one, other, same):
    assert same_answer(one, other) is same and same_answer(other, one) is same


def test_steps_and_numbers():
    assert [WENG[a:b] for a, b in step_spans(WENG)] == WENG.split("\n")
    assert [step_at(WENG, i) for i in (0, WENG.index("Working"), len(WENG))] == [0, 1, 2]
    assert numbers_in("Half of 1,200 and twice .5: twelve") == {Fraction(n) for n in ("2", "1200", "0.5", "12")}
    assert number("1,234.5") == Fraction("1234.5")


QUESTION = "Tom has 77 apples. Tom gives away 67. Tom gets 73 more. How many apples does Tom have now?"
RIGHT = "77-67=10. 10+73=83. The answer is 83."


@pytest.mark.parametrize(
    ("text", "right", "first_wrong", "superfluous"),
    [
        (RIGHT, True, None, []),
        ("77-67=11. 11+73=84. The answer is 84.", False, 0, []),  # a slip that the rest goes on with
        ("77-67=10. 10+73=84. The answer is 83.", True, 1, [1]),  # a slip that nothing follows from
        ("77-67=10. 10+43=53. The answer is 53.", False, 1, []),  # 43 comes from nowhere
        ("77+67=144. 144+73=217. The answer is 217.", False, 2, []),  # holds step by step: the answer is what is wrong
        ("77-67=10. 77-67=10. 10+73=83. The answer is 83.", True, None, [1]),
        ("77-67=10. 67+73=140. 10+73=83. The answer is 83.", True, None, [1]),
        ("77-67=10. 10+73=83. The answer", False, 2, [1]),  # no answer: the last result is used by nothing
    ],
)
def test_judgements(text, right, first_wrong, superfluous):
    found = judge(text, QUESTION, RIGHT)
    assert (found.right, found.first_wrong_step, found.superfluous) == (right, first_wrong, superfluous)


@given(st.lists(st.integers(10, 99), min_size=2, max_size=6), st.integers(1, 9))
def test_a_chain_of_sums_is_right_until_one_value_is_moved(terms, move):
    """Built and spoilt by the test itself."""
    total, steps = terms[0], []
    for term in terms[1:]:
        steps.append(f"{total}+{term}={total + term}.")
        total += term
    assert judge(" ".join(steps)).false_steps == []
    for i, step in enumerate(steps):
        left, value = step[:-1].split("=")
        spoilt = [*steps[:i], f"{left}={int(value) + move}.", *steps[i + 1 :]]
        assert judge(" ".join(spoilt)).false_steps == [i]
        assert ast.literal_eval(value) != int(value) + move


@given(st.integers(-999, 999), st.integers(1, 99), st.integers(2, 99))
def test_a_fraction_is_the_same_however_it_is_written(whole, numerator, denominator):
    sign, value = "-" if whole < 0 else "", abs(whole) + Fraction(numerator, denominator)
    mixed = rf"{sign}{abs(whole)}\frac{{{numerator}}}{{{denominator}}}"
    top = abs(whole) * denominator + numerator
    for other in (rf"{sign}\dfrac{{{top}}}{{{denominator}}}", f"{sign}{top}/{denominator}"):
        assert same_answer(mixed, other) and evaluate(mixed) == (-value if sign else value)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("text", ["5in", "5or6", "1_000", "0b11", "5is6"])
def test_words_behind_a_number_are_no_arithmetic_and_bring_no_warning(text):
    assert evaluate(text) is None
