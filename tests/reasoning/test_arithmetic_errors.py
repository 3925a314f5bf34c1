"""Every kind of error on generated worked answers, judged by arithmetic of the test's own.

The test reads `a+b=c` with a regular expression and Python's `eval`; it shares no code with what made the errors or checked them.
"""

import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llm_diffusion.reasoning.arithmetic_errors import ARITHMETIC_ERRORS
from llm_diffusion.reasoning.pairs import RIGHT_ANSWER_KINDS, checked, verified
from llm_diffusion.reasoning.problems import read_problem

ARITHMETIC_KINDS = [error.__name__ for error in ARITHMETIC_ERRORS]
EQUATION = re.compile(r"(?<![\d.])(\d+(?:\.\d+)?(?:[-+*/]\d+(?:\.\d+)?)+)=(\d+(?:\.\d+)?)(?![\d.]*\d)")
FINAL = re.compile(r"(?:#### |The answer is )(\d+(?:\.\d+)?)")


def recomputed(text):
    """Equations as (left, value said, value by Python), each once a step, and the final answer."""
    found = [[(left, float(said), eval(left)) for left, said in EQUATION.findall(step)] for step in split(text)]
    finals = FINAL.findall(text)
    return [list(dict.fromkeys(step)) for step in found], float(finals[-1]) if finals else None


def split(text):
    return re.split(r"\n|(?<=[.]) ", text)


def false_steps(text):
    return [i for i, step in enumerate(recomputed(text)[0]) if any(abs(said - right) > 1e-9 for _, said, right in step)]


@st.composite
def worked(draw):
    """A problem whose steps each go on from the last result, said plainly or with GSM8K's annotations."""
    annotated, n = draw(st.booleans()), draw(st.integers(2, 6))
    total = draw(st.integers(13, 90))
    question, steps = f"Ann has {total} minutes of film.", []
    for _ in range(n):
        sign, by = draw(st.sampled_from("+-*")), draw(st.integers(2, 60))
        by = by % 8 + 2 if sign == "*" else by
        new = {"+": total + by, "-": total - by, "*": total * by}[sign]
        if new <= 12:
            sign, new = "+", total + by
        question += f" Then comes a step of {by}."
        said = f"{total}{sign}{by}"
        steps.append(f"So far she has {said} = <<{said}={new}>>{new} of them" if annotated else f"{said}={new}.")
        total = new
    final = "\n".join([*steps, f"#### {total}"]) if annotated else " ".join([*steps, f"The answer is {total}."])
    return {"question": question + " How many minutes is that?", "answer": final}


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(worked(), st.integers(0, 3))
@pytest.mark.parametrize("kind", [*ARITHMETIC_KINDS, "truncation", "repetition"])
def test_every_kind_is_wrong_as_it_says(kind, record, seed):
    problem = read_problem(record)
    assert checked(problem) and problem.answer == record["answer"]
    for _, wrong in zip(range(3), verified(problem, kind, seed), strict=False):
        steps, final = recomputed(wrong.text)
        right_steps, right_final = recomputed(record["answer"])
        a, b = wrong.span
        assert 0 <= a <= b <= len(wrong.text) and wrong.text != record["answer"]
        assert wrong.text[:a] == record["answer"][:a]
        assert abs(len(wrong.text) - len(record["answer"])) <= 0.1 * len(record["answer"])
        where = sum(len(piece) + 1 <= a for piece in accumulated(wrong.text))
        if kind in ("truncation", "repetition"):
            assert final is None and not false_steps(wrong.text)
            if kind == "repetition":
                said = split(wrong.text)
                assert len(set(said)) < len(said)
            continue
        assert (final == right_final) is (kind in RIGHT_ANSWER_KINDS)
        if kind in ("calculation_slip", "unpropagated_slip", "unit_error"):
            assert false_steps(wrong.text) == [where]
            if kind == "unit_error":
                factors = {said / right for _, said, right in steps[where]}
                assert all(round(max(f, 1 / f), 6) in (60, 100, 12, 7, 1000) for f in factors)
        else:
            assert false_steps(wrong.text) == []
        if kind == "premature_answer":
            assert final in [said for step in steps[:-1] for _, said, _ in step] and steps == right_steps
        if kind == "corrupted_reasoning":
            assert final not in [said for step in steps for _, said, _ in step]
        if kind in ("calculation_slip", "unit_error", "operator_swap", "misread_number", "off_by_one"):
            propagated(steps, final, where)
        if kind == "unpropagated_slip":
            assert [step for i, step in enumerate(steps) if i != where] == [
                step for i, step in enumerate(right_steps) if i != where
            ]


def accumulated(text):
    """The text up to the end of each step."""
    ends = [m.start() for m in re.finditer(r"\n|(?<=[.]) ", text)]
    return [text[:end] for end in ends]


def propagated(steps, final, where):
    """After the error, every step goes on from what the step before it said, and the answer is what the last one says."""
    chain = [step[-1] for step in steps if step]
    for (_, said, _), (left, _, _) in list(zip(chain, chain[1:], strict=False))[where:]:
        assert float(re.match(r"[\d.]+", left)[0]) == said
    assert final == chain[-1][1]


@pytest.mark.parametrize("kind", ARITHMETIC_KINDS)
def test_every_kind_comes_about(kind):
    """On fixed problems of four and five steps, so that the property above is not empty."""
    long = "So after that she has "
    steps = [("30+25", 55), ("55-17", 38), ("38*4", 152), ("152+59", 211), ("211-33", 178)]
    question = "Ann has 30 minutes. Steps of 25, 17, 4, 59 and 33 follow. How many minutes at the end?"
    answer = "\n".join([f"{long}{s} = <<{s}={v}>>{v} minutes" for s, v in steps] + ["#### 178"])
    assert next(verified(read_problem({"question": question, "answer": answer}), kind), None) is not None


def by_hand(kind, question, answer):
    return {w.text for w in verified(read_problem({"question": question, "answer": answer}), kind)}


def test_what_the_errors_look_like():
    question = "Tom has 77 apples. Tom gives away 67. Tom gets 73 more. How many apples does Tom have now?"
    answer = "77-67=10. 10+73=83. The answer is 83."  # 10 is a usual number: nothing is computed through it
    assert by_hand("calculation_slip", question, answer) >= {"77-67=10. 10+73=93. The answer is 93."}
    question = "Tom has 23 apples. Tom gets 45 more. Tom gives away 19. How many apples does Tom have now?"
    answer = "23+45=68. 68-19=49. The answer is 49."
    assert "23+45=78. 78-19=59. The answer is 59." in by_hand("calculation_slip", question, answer)
    assert "23+45=78. 68-19=49. The answer is 49." in by_hand("unpropagated_slip", question, answer)
    assert by_hand("operator_swap", question, answer) == {
        "23+45=68. 68+19=87. The answer is 87."
    }  # 23-45 is below zero
    assert "23+54=77. 77-19=58. The answer is 58." in by_hand("misread_number", question, answer)
    assert by_hand("premature_answer", question, answer) == {"23+45=68. 68-19=49. The answer is 68."}
    assert "23+45=68. 68-20=48. The answer is 48." in by_hand("off_by_one", question, answer)
    assert "23+45=68. 68-23=45. The answer is 45." in by_hand("operand_swap", question, answer)
    assert "23+45=68. 68+19=87. The answer is 49." in by_hand("corrupted_reasoning", question, answer)
    longer = "Tom first has 23+45=68. Then he has 68-19=49. The answer is 49."
    assert longer.removesuffix(" 49.") in by_hand("truncation", question, longer)
    looped = "Tom first has 23+45=68. Tom first has 23+45=68. Tom first has"
    assert looped in {text[: len(looped)] for text in by_hand("repetition", question, longer)}


def test_prose_in_front_of_an_annotation_is_changed_with_it():
    question = "She has 35 large and 14 small stickers, 6 of each are old. How many are there?"
    answer = "There are 35 large stickers + 14 small ones = <<35+14=49>>49 stickers in the big box.\n#### 49"
    assert by_hand("operator_swap", question, answer) == {answer.replace("+", "-").replace("49", "21")}
    assert answer.replace("14", "41").replace("49", "76") in by_hand("misread_number", question, answer)
