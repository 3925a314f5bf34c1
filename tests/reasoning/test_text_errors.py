"""Errors of logic, hops and rows, each against what the rule says in words."""

import re

import pytest

from llm_diffusion.data.tiny import tiny_dataset
from llm_diffusion.reasoning.arithmetic_errors import Trace
from llm_diffusion.reasoning.pairs import preference_pairs, verified
from llm_diffusion.reasoning.problems import read_problem
from llm_diffusion.reasoning.text_errors import errors_of

LOGIQA = {
    "context": "All cats sleep by day.",
    "query": "What follows?",
    "options": ["Some dogs sleep.", "Cats sleep.", "Nothing sleeps."],
    "correct_option": 1,
    "rationale": "All cats are sleepers by day. If it is day, then Tom sleeps, since Tom is a cat like any other.",
}
HOTPOTQA = {
    "question": "Where was the author of Emma Blue born?",
    "answer": "Bath",
    "type": "bridge",
    "supporting_facts": [["Emma Blue", 0], ["Jane Roe", 0]],
    "context": [
        ["Emma Blue", ["Emma Blue is a novel by Jane Roe, who never saw it printed."]],
        ["Jane Roe", ["Jane Roe was born in Bath."]],
        ["John Doe", ["John Doe sings."]],
    ],
}


def made(record, kind):
    return [(w.text, w.text[slice(*w.span)]) for w in verified(read_problem(record), kind)]


def test_quantifiers_are_flipped_and_the_option_is_wrong():
    answer = read_problem(LOGIQA).answer
    found = made(LOGIQA, "quantifier_flip")
    assert {piece for _, piece in found} == {"Some", "no"}
    for text, piece in found:
        old = {"Some": "All", "no": "any"}[piece]
        assert re.sub(r"is [AC]\.$", "is B.", text) == re.sub(rf"\b{old}\b", piece, answer, count=1)


def test_halves_change_places():
    found = {text.rpartition("\n")[0] for text, _ in made(LOGIQA, "converse")}
    day = "If Tom sleeps, since Tom is a cat like any other, then it is day."
    assert found == {
        LOGIQA["rationale"].replace("All cats are sleepers by day", "All sleepers by day are cats"),
        LOGIQA["rationale"].partition(" If")[0] + " " + day,
    }
    assert {text[-2] for text, _ in made(LOGIQA, "converse")} == {"A", "C"}
    (row,) = preference_pairs(
        [{"prompt": "Which is greater, 45 or 37?", "completion": "45 is greater than 37."}], kinds=["converse"]
    )
    assert row["rejected"][0]["content"] == "37 is greater than 45."


def test_other_options():
    answer = read_problem(LOGIQA).answer
    assert {t for t, _ in made(LOGIQA, "wrong_option")} == {answer.replace("is B.", f"is {x}.") for x in "AC"}
    yes = {"question": "Were Ann Lee and Bob Roy both singers?", "answer": "yes", "type": "comparison"}
    assert made(yes, "wrong_option") == [("The answer is no.", "no")]


def test_the_bridge_leads_elsewhere():
    (found,) = made(HOTPOTQA, "wrong_bridge_entity")
    body = "Emma Blue is a novel by John Doe, who never saw it printed. John Doe was born in Bath."
    assert found == (body + "\nThe answer is Jane Roe.", "John Doe")  # hop one is taken for the answer
    bare = {"question": "Who taught the pupil of Corliss Archer in the film Kiss Me?", "answer": "Chief Protocol"}
    assert ("The answer is Corliss Archer.", "Corliss Archer") in made(bare, "wrong_bridge_entity")


@pytest.mark.parametrize("form", ["sort", "reverse", "compare", "fill", "sudoku"])
def test_rows_differ_in_the_declared_place(form):
    for example in tiny_dataset(12, 2, kinds=(form,)):
        answer = example["messages"][-1]["content"]
        for kind in errors_of(Trace(read_problem(example))):
            for text, _ in made(example, kind):
                assert len(text) == len(answer) or form in ("fill", "compare")
                changed = [(x, y) for x, y in zip(answer.split(), text.split(), strict=True) if x != y]
                if kind == "swapped_items":
                    assert sorted(text) == sorted(answer) and text != answer
                    assert form == "sudoku" or changed == [changed[0], changed[0][::-1]]
                elif form in ("sort", "reverse"):  # repetition
                    (pair,) = changed
                    assert text.split().count(pair[1]) == 2
                elif form == "fill":
                    gap = example["messages"][0]["content"].split()[3:].index("_")
                    (place,) = [i for i, t in enumerate(text.split()) if t != answer.split()[i]]
                    assert (place == gap) is (kind != "misread_number")
                    (pair,) = changed
                    if kind == "off_by_one":
                        assert abs(int(pair[0]) - int(pair[1])) == 1


def test_answers_without_equations_are_wrong_at_the_end():
    record = {"problem": "Find it for 12.", "solution": "There are 36 ways, and half of them count: $\\boxed{p - 18}$."}
    texts = {kind: {t for t, _ in made(record, kind)} for kind in ("calculation_slip", "operator_swap")}
    assert record["solution"].replace("p - 18", "p + 18") in texts["operator_swap"]
    assert record["solution"].replace("18", "19") in texts["calculation_slip"]
    boxed = {**record, "solution": record["solution"].replace("p - 18", "18")}
    assert {t for t, _ in made(boxed, "premature_answer")} == {boxed["solution"].replace("{18}", "{36}")}
