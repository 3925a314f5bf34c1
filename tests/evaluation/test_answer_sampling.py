"""A model's own answers, labelled: seeded, checked, and the same as one would draw by hand."""

import pytest

from llm_diffusion.evaluation.answer_sampling import sample_answers
from llm_diffusion.evaluation.answers import evaluate_answers
from llm_diffusion.reasoning.problems import is_right, load_records, read_problem

SETTINGS = {"max_new_tokens": 12, "block_length": 4, "steps": 12}


def problems():
    return [read_problem(record) for record in load_records("tiny", 4, "test")]


def test_rounds_are_seeded_and_labelled_by_checking(tiny):
    rows = sample_answers(*tiny, problems(), 2, seed=3, temperature=1.5, **SETTINGS)
    assert [row["prompt"][0]["content"] for row in rows[::2]] == [p.question for p in problems()]
    examples = [p.example() for p in problems()]
    for i in (0, 1):
        drawn = evaluate_answers(*tiny, examples, temperature=1.5, seed=3 + i, **SETTINGS).answers
        assert [row["answer"] for row in rows[i::2]] == drawn
    assert [row["right"] for row in rows] == [
        is_right(p, row["answer"]) for p, row in zip([p for p in problems() for _ in range(2)], rows, strict=True)
    ]
    assert {row["answer"] for row in rows[::2]} != {row["answer"] for row in rows[1::2]}


@pytest.mark.parametrize(
    ("n", "given", "settings", "message"),
    [(0, 1, {}, "`samples`"), (2, 0, {}, "`problems` is empty"), (2, 1, {"temperature": 0}, "`temperature` 0")],
)
def test_bad_input(tiny, n, given, settings, message):
    with pytest.raises(ValueError, match=message):
        sample_answers(*tiny, problems()[:given], n, **settings)
