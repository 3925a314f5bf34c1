"""Records of every form, right and wrong answers to each, and puzzles: against brute force, the definition, and answers as models write."""

import itertools
import operator
import random
from fractions import Fraction

import pytest

from llm_diffusion.data.tiny import is_right as tiny_is_right
from llm_diffusion.data.tiny import tiny_examples
from llm_diffusion.reasoning.problems import (
    extract,
    f1,
    is_right,
    load_records,
    normalised_text,
    reaches_countdown,
    read_problem,
    solves_sudoku,
)

GSM8K = {"question": "Tom has 3 bags of 12. How many?", "answer": "He has 3*12=<<3*12=36>>36.\n#### 36"}
MATH = {"problem": "Half of one?", "solution": "It is $\\boxed{\\frac{1}{2}}$.", "answer": "\\frac{1}{2}", "level": 1}
LOGIQA = {
    "context": "All cats sleep.",
    "query": "What follows?",
    "options": ["Some dogs sleep.", "If it is a cat, then it sleeps.", "Nothing sleeps."],
    "correct_option": 1,
}
HOTPOTQA = {
    "question": "Where was the author of Emma Blue born?",
    "answer": "the Bath, England",
    "type": "bridge",
    "supporting_facts": {"title": ["Emma Blue", "Jane Roe"], "sent_id": [0, 1]},
    "context": {
        "title": ["Emma Blue", "Jane Roe", "John Doe"],
        "sentences": [
            ["Emma Blue is a novel by Jane Roe."],
            ["Jane Roe writes.", " Jane Roe was born in the Bath, England."],
            ["John Doe sings."],
        ],
    },
}
COUNTDOWN = {"input": "15,44,79,50", "output": "44-15=29,79-29=50"}
SUDOKU = {"input": "1000\n0002\n4003\n0000", "output": "1234\n3412\n4123\n2341"}
EVERY_FORM = (GSM8K, MATH, LOGIQA, HOTPOTQA, COUNTDOWN, SUDOKU)


@pytest.mark.parametrize("record", EVERY_FORM, ids=lambda r: next(iter(r)))
def test_the_answer_of_a_record_is_right_and_another_is_not(record):
    problem = read_problem(record)
    assert is_right(problem, problem.answer) and is_right(read_problem(problem.example()), problem.answer)
    for wrong in ("", "I do not know", "The answer is 17.", "#### 17"):
        assert not is_right(problem, wrong)


@pytest.mark.parametrize(
    ("record", "answer", "found", "right"),
    [
        (GSM8K, "3*12 is 36", "36", True),  # the last number, where none is marked
        (GSM8K, "so\n#### $36.00 dollars", "36.00", True),
        (GSM8K, "#### 36\nor rather\n#### 37", "37", False),
        (GSM8K, "\\boxed{36{,}000}", "36{,}000", False),
        (GSM8K, "pages 12-36", "36", True),  # a dash is no sign
        (GSM8K, "it fell to −36 degrees", "−36", False),
        (GSM8K | {"answer": "#### -36000"}, "#### −36\\,000", "−36\\,000", True),
        (GSM8K | {"answer": "#### -36"}, "it fell to −36 degrees", "−36", True),
        (MATH, "The answer is 0.5.", "0.5", True),
        (MATH, "it is 1/2", None, False),
        (MATH, "$\\boxed{\\dfrac12}$", "\\dfrac12", True),
        (LOGIQA, "B", "B", True),
        (LOGIQA, "The answer is (B) because", "B", True),
        (LOGIQA, "A is wrong, so I take C", "C", False),
        (HOTPOTQA, "Bath England", "Bath England", True),  # articles and punctuation do not count
        (HOTPOTQA, "Long story. The answer is Bath.", "Bath", False),
    ],
)
def test_extraction(record, answer, found, right):
    problem = read_problem(record)
    assert extract(problem, answer) == found
    assert is_right(problem, answer) is right


def test_word_overlap():
    problem = read_problem(HOTPOTQA)
    assert f1(problem, "Bath") == pytest.approx(2 * 1 / (1 + 2))
    assert f1(problem, "The answer is the Bath, England.") == 1 and f1(problem, "London") == 0
    yes = read_problem({**HOTPOTQA, "answer": "yes"})
    assert f1(yes, "yes indeed") == 0 and f1(yes, "Yes.") == 1
    assert normalised_text("The U.S.  of an A") == "us of"


def test_parts_of_the_records():
    logic, hop = read_problem(LOGIQA), read_problem(HOTPOTQA)
    assert logic.question.endswith("A. Some dogs sleep.\nB. If it is a cat, then it sleeps.\nC. Nothing sleeps.")
    assert logic.answer == "The answer is B." and read_problem({**LOGIQA, "correct_option": "B"}) == logic
    assert read_problem({**LOGIQA, "correct_option": None, "label": "b"}) == logic
    assert read_problem({**LOGIQA, "rationale": "Cats sleep."}).answer == "Cats sleep.\nThe answer is B."
    assert hop.answer.startswith("Emma Blue is a novel by Jane Roe. Jane Roe was born")
    assert hop.bridge == "Jane Roe" and hop.entities == ("John Doe",)
    lists = {**HOTPOTQA, "supporting_facts": [["Emma Blue", 0], ["Jane Roe", 1]]}
    lists["context"] = [list(pair) for pair in zip(*HOTPOTQA["context"].values(), strict=True)]
    assert read_problem(lists) == hop
    bare = {name: HOTPOTQA[name] for name in ("question", "answer", "type")}
    assert read_problem(bare).answer == "The answer is the Bath, England." and read_problem(bare).entities == (
        "Emma Blue",
    )


def test_tiny_tasks_by_rule_as_by_reference():
    """The rules know nothing of the references; the answer to the next question of the kind is wrong."""
    examples = list(itertools.islice(tiny_examples(5, "test"), 120))
    for example, other in zip(examples, examples[6:], strict=False):
        problem, answer = read_problem(example), other["messages"][-1]["content"]
        assert is_right(problem, problem.answer)
        assert is_right(problem, answer) is tiny_is_right(example, answer) or example["kind"] == "arithmetic"
        if problem.form not in ("gsm8k",):
            assert problem.form == example["kind"]
            changed = list(problem.answer)
            i = random.Random(problem.answer).choice([i for i, c in enumerate(changed) if c.isalnum()])
            changed[i] = "9" if changed[i] != "9" else "8"
            assert not is_right(problem, "".join(changed))


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"a": 1}, "columns ['a']"),
        ({"question": "q", "answer": ""}, "empty"),
        ({"question": "q", "answer": 3}, "`answer` (text)"),
        ({**LOGIQA, "correct_option": 7}, "an index of 3 options, got 7"),
        ({"problem": "p", "solution": "no box"}, "no boxed answer"),
        ({"messages": [{"role": "user", "content": "hi"}]}, "assistant turn"),
    ],
)
def test_bad_records(record, message):
    with pytest.raises(ValueError) as error:
        read_problem(record)
    assert message in str(error.value)


def test_records_by_name(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"question": "q", "answer": "#### 1"}\n' * 3)
    assert len(load_records(str(file))) == 3 and len(load_records(str(file), 2)) == 2
    assert load_records("tiny", 5, "test") != load_records("tiny", 5, "train")
    with pytest.raises(FileNotFoundError):
        load_records(str(tmp_path / "none.jsonl"))


# -- puzzles, by their rules

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
