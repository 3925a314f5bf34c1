"""Intervals and tests against published figures and simulation; comparisons of answers whose counts are known."""

import math
import random

import pytest
from rich.console import Console

from llm_diffusion.evaluation.statistics import (
    answer_problems,
    bootstrap_interval,
    compare,
    mcnemar_exact,
    wilson_interval,
)
from llm_diffusion.reasoning.problems import load_records, read_problem


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    # Newcombe (1998), Statistics in Medicine 17:857, table I: score method without continuity correction
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_intervals_are_newcombes(right, n, low, high):
    assert wilson_interval(right, n) == pytest.approx((low, high), abs=5e-5)
    assert wilson_interval(n - right, n) == pytest.approx((1 - high, 1 - low), abs=5e-5)


@pytest.mark.parametrize(("a", "b"), [(0, 0), (0, 6), (6, 0), (3, 12), (10, 10), (1, 1), (40, 70)])
def test_mcnemar_counts_every_outcome(a, b):
    """By enumeration: outcomes of a + b fair coins at least as unequal as this one."""
    n = a + b
    want = sum(math.comb(n, k) for k in range(n + 1) if abs(2 * k - n) >= abs(a - b)) / 2**n
    assert mcnemar_exact(a, b) == pytest.approx(want, rel=1e-12)


def test_bootstrap_covers_the_mean_as_often_as_it_says():
    rng, hits = random.Random(0), 0
    for trial in range(200):
        low, high = bootstrap_interval([rng.gauss(3, 2) for _ in range(40)], 0.9, 300, seed=trial)
        hits += low <= 3 <= high
    assert 0.82 * 200 <= hits <= 0.96 * 200
    assert bootstrap_interval([1.0, 2.0, 4.0]) == bootstrap_interval([1.0, 2.0, 4.0])


def test_known_counts():
    problems = [
        read_problem({"question": f"What is 7+{i}?", "answer": f"7+{i}={7 + i}\n#### {7 + i}"}) for i in range(12)
    ]
    right, wrong = [p.answer for p in problems], ["7+1=9. 7+1=9. #### 99"] * 12
    found = compare(problems, {"a": right[:4] + wrong[4:], "b": wrong[:2] + right[2:], "c": right})
    assert found.scores["a"]["all"].exact_match == pytest.approx(100 * 4 / 12)
    assert found.scores["a"]["all"].interval == pytest.approx([100 * x for x in wilson_interval(4, 12)])
    assert (
        found.scores["a"]["all"].false_step == found.scores["a"]["all"].superfluous_step == pytest.approx(100 * 8 / 12)
    )
    assert found.scores["c"]["all"].false_step == 0
    first = found.differences[0]
    assert (first.first, first.second, first.only_first, first.only_second) == ("a", "b", 2, 8)
    assert first.points == pytest.approx(50) and first.interval[0] <= 50 <= first.interval[1]
    assert first.p_value == mcnemar_exact(2, 8) and len(found.differences) == 3
    console = Console(width=110, record=True, file=open("/dev/null", "w"))
    for table in found.tables():
        console.print(table)
    text = console.export_text()
    assert "33.3 [13.8, 60.9]" in text and "b - a" in text and f"{mcnemar_exact(2, 8):.2g}" in text


def test_kinds_and_word_overlap():
    hop = read_problem({"question": "Who?", "answer": "Ann Lee", "type": "bridge"})
    reckoning = read_problem({"question": "1+1?", "answer": "#### 2"})
    found = compare([hop, reckoning], {"m": ["Lee", "#### 2"]})
    assert found.scores["m"]["hotpotqa"].f1 == pytest.approx(200 / 3) and found.scores["m"]["gsm8k"].f1 is None
    assert [s.exact_match for s in found.scores["m"].values()] == [0, 100, 50]
    assert "F1" in str([list(t.columns[0].cells) for t in found.tables()])


def test_bad_input():
    problem = read_problem({"question": "1+1?", "answer": "#### 2"})
    with pytest.raises(ValueError, match="needs problems and answers"):
        compare([], {"a": []})
    with pytest.raises(ValueError, match="'a' has 2 answers to 1 problems"):
        compare([problem], {"a": ["1", "2"]})


def test_the_base_is_right_where_it_says_so(tiny):
    """The embedded AR base solves its own tasks: the checks agree with the references."""
    model, tokenizer = tiny
    problems = [read_problem(record) for record in load_records("tiny", 12, "test")]
    answers = answer_problems(model, tokenizer, problems, autoregressive=True, max_new_tokens=80)
    score = compare(problems, {"base": answers}).scores["base"]["all"]
    same = [a.strip() == p.answer for a, p in zip(answers, problems, strict=True)]
    assert score.exact_match == pytest.approx(100 * sum(same) / len(same)) and score.exact_match > 80
