"""The embedded task: every answer recomputed from the question's text by another program."""

import itertools
import re

import pytest

from llm_diffusion.data.tiny import (
    KINDS,
    SPLITS,
    is_right,
    tiny_dataset,
    tiny_examples,
)

N = 150


def take(n, *args, **options):
    return list(itertools.islice(tiny_examples(*args, **options), n))


def text_of(example):
    return tuple(message["content"] for message in example["messages"])


# -- another way to every answer; a solver raises or returns the answer's text


def solve_arithmetic(question):
    """Reads the story sentence by sentence and writes down what happens."""
    *story, query = re.findall(r"[^.?]+[.?]", question)
    first = re.fullmatch(r"(\w+) has (\d+) (\w+)\.", story[0].strip())
    name, have, thing = first[1], int(first[2]), first[3]
    assert query.strip() == f"How many {thing} does {name} have now?"
    lines = []
    for sentence in (s.strip() for s in story[1:]):
        assert sentence.startswith(name + " ")
        numbers = [int(n) for n in re.findall(r"\d+", sentence)]
        if " gets " in sentence:
            assert sentence == f"{name} gets {numbers[0]} more."
            lines.append(f"{have}+{numbers[0]}={have + numbers[0]}.")
            have += numbers[0]
        elif " gives away " in sentence:
            lines.append(f"{have}-{numbers[0]}={have - numbers[0]}.")
            have -= numbers[0]
        else:
            assert sentence == f"{name} buys {numbers[0]} bags of {numbers[1]} {thing}."
            bought = sum(numbers[1] for _ in range(numbers[0]))
            lines += [f"{numbers[0]}*{numbers[1]}={bought}.", f"{have}+{bought}={have + bought}."]
            have += bought
        assert have >= 0
    return " ".join([*lines, f"The answer is {have}."])


def solve_sort(question):
    letters = question.removeprefix("Sort the letters: ").split(" ")
    assert len(letters) == len(set(letters))
    return " ".join(letter for letter in "abcdefghijklmnopqrstuvwxyz" if letter in letters)


def solve_reverse(question):
    return question.removeprefix("Reverse the letters: ")[::-1]


def solve_compare(question):
    word, first, second = re.fullmatch(r"Which is (greater|smaller), (\d+) or (\d+)\?", question).groups()
    assert first != second
    low, high = sorted((first, second), key=lambda digits: (len(digits), digits))
    return f"{high} is greater than {low}." if word == "greater" else f"{low} is smaller than {high}."


def solve_fill(question):
    terms = question.removeprefix("Fill the gap: ").split(" ")
    gap = terms.index("_")
    known = [(i, int(term)) for i, term in enumerate(terms) if term != "_"]
    (i, a), (j, b) = known[:2]
    step = (b - a) / (j - i)
    assert all(value == a + step * (k - i) for k, value in known)
    terms[gap] = f"{a + step * (gap - i):g}"
    return " ".join(terms)


def solutions(cells):
    """All solutions of a 4x4 sudoku by backtracking, cell by cell."""
    if "0" not in cells:
        yield cells
        return
    at = cells.index("0")
    row, column = divmod(at, 4)
    for digit in "1234":
        seen = (
            cells[r * 4 + c]
            for r in range(4)
            for c in range(4)
            if r == row or c == column or (r // 2 == row // 2 and c // 2 == column // 2)
        )
        if digit not in seen:
            yield from solutions(cells[:at] + digit + cells[at + 1 :])


def solve_sudoku(question):
    cells = question.removeprefix("Solve the sudoku:\n").replace("\n", "")
    assert 9 <= cells.count("0") <= 12
    (only,) = solutions(cells)
    return "\n".join(only[i : i + 4] for i in range(0, 16, 4))


SOLVERS = {
    "arithmetic": solve_arithmetic,
    "sort": solve_sort,
    "reverse": solve_reverse,
    "compare": solve_compare,
    "fill": solve_fill,
    "sudoku": solve_sudoku,
}


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_answer_is_the_one_another_program_finds(kind, split):
    for example in take(N, seed=1, split=split, kinds=(kind,)):
        question, answer = text_of(example)
        assert example["kind"] == kind
        assert answer == SOLVERS[kind](question), question


def test_sudoku_answers_obey_the_rules():
    for example in take(N, kinds=("sudoku",)):
        question, answer = text_of(example)
        givens, grid = question.split("\n")[1:], answer.split("\n")
        boxes = [[grid[r + i][c + j] for i in (0, 1) for j in (0, 1)] for r in (0, 2) for c in (0, 2)]
        for unit in [*grid, *zip(*grid, strict=True), *boxes]:
            assert sorted(unit) == list("1234")
        for shown, solved in zip("".join(givens), "".join(grid), strict=True):
            assert shown in ("0", solved)


def test_equations_in_stories_hold():
    for example in take(N, kinds=("arithmetic",)):
        *equations, final = text_of(example)[1].removesuffix(".").split(". ")
        for equation in equations:
            left, right = equation.split("=")
            a, operation, b = re.fullmatch(r"(\d+)([-+*])(\d+)", left).groups()
            assert {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[operation] == int(right)
        assert final == f"The answer is {right}"


def test_every_operation_and_size_occurs():
    """A generator stuck on one kind of sentence would pass the tests above."""
    stories = " ".join(text_of(example)[0] for example in take(N, kinds=("arithmetic",)))
    assert all(phrase in stories for phrase in (" gets ", " gives away ", " bags of "))
    lengths = {len(text_of(example)[1].split()) for example in take(N, kinds=("sort",))}
    assert lengths == set(range(4, 9))
    gaps = {text_of(example)[0].split().index("_") - 3 for example in take(N, kinds=("fill",))}
    assert gaps >= set(range(6))


# -- the stream


def test_splits_share_no_question():
    """Also across seeds, or a model trained on one seed has seen what another seed holds out."""
    questions = {
        split: {text_of(example)[0] for seed in range(3) for example in take(400, seed=seed, split=split)}
        for split in SPLITS
    }
    assert not questions["train"] & questions["test"]
    assert min(map(len, questions.values())) > 900


def test_the_seed_fixes_the_stream():
    assert take(60, seed=5) == take(60, seed=5)
    assert take(30, seed=5) == take(60, seed=5)[:30]
    assert not {text_of(e) for e in take(60, seed=5)} & {text_of(e) for e in take(60, seed=6)}
    assert take(60, seed=5) != take(60, seed=5, split="test")


def test_kinds_take_turns():
    assert [example["kind"] for example in take(13)] == [KINDS[i % len(KINDS)] for i in range(13)]
    assert {example["kind"] for example in take(9, kinds=("sort", "fill"))} == {"sort", "fill"}


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"split": "validation"}, "`split`.*'validation'"),
        ({"kinds": ("sort", "poetry")}, "`kinds`.*poetry"),
        ({"kinds": ()}, "`kinds`"),
    ],
)
def test_unknown_splits_and_kinds_are_refused(options, named):
    with pytest.raises(ValueError, match=named):
        take(1, **options)
    with pytest.raises(ValueError, match=named):
        tiny_dataset(1, **options)


def test_the_dataset_is_the_stream():
    dataset = tiny_dataset(14, seed=3, split="test", kinds=("sort", "compare"))
    assert dataset.column_names == ["messages", "kind"]
    assert dataset.to_list() == take(14, seed=3, split="test", kinds=("sort", "compare"))
    for example in dataset:
        assert [message["role"] for message in example["messages"]] == ["user", "assistant"]


def test_is_right_is_exact_up_to_surrounding_blanks():
    for example in take(12):
        answer = text_of(example)[1]
        assert is_right(example, answer)
        assert is_right(example, f"\n {answer} ")
        assert not is_right(example, answer + "1")
        assert not is_right(example, answer[1:])
        assert not is_right(example, "")


# -- with the shipped tokenizer


def test_every_text_survives_the_tokenizer(tokenizer):
    for split in SPLITS:
        for example in take(120, seed=2, split=split):
            for text in text_of(example):
                assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
            conversation = tokenizer.apply_chat_template(example["messages"], tokenize=False)
            ids = tokenizer(conversation)["input_ids"]
            assert tokenizer.decode(ids) == conversation
            assert None not in ids


def test_the_chat_template_marks_the_answer_and_ends_it(tokenizer):
    for example in take(12):
        encoded = tokenizer.apply_chat_template(
            example["messages"], return_dict=True, return_assistant_tokens_mask=True
        )
        marked = [i for i, m in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if m]
        assert marked[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(marked[:-1]) == text_of(example)[1]
        prompt = tokenizer.apply_chat_template(example["messages"][:1], add_generation_prompt=True, return_dict=True)[
            "input_ids"
        ]
        # What the model is asked to continue is what it was trained on.
        assert encoded["input_ids"][: len(prompt)] == prompt
        assert encoded["input_ids"][len(prompt) : len(prompt) + len(marked)] == marked
        # Every turn ends with the end token, not only the answer.
        assert encoded["input_ids"].count(tokenizer.eos_token_id) == 2
