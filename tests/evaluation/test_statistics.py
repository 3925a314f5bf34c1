"""Intervals and tests against published figures and simulation; comparisons of answers whose counts are known."""

from __future__ import annotations

import json
import math
import random

import pytest
import torch

from llm_diffusion import DiffusionInference
from llm_diffusion.data.tiny import tiny_dataset
from llm_diffusion.evaluation.answers import as_example, as_problem, evaluate_answers
from llm_diffusion.evaluation.statistics import (
    answer_tables,
    bootstrap_interval,
    compared_answers,
    compared_tasks,
    judged_steps,
    mcnemar_exact,
    nll_per_token,
    paired,
    side_by_side,
    wilson_interval,
    worked_of_tasks,
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


def test_bootstrap_covers_the_mean_as_often_as_promised():
    rng, hits = random.Random(0), 0
    for trial in range(200):
        low, high = bootstrap_interval([rng.gauss(3, 2) for _ in range(40)], 0.9, 300, seed=trial)
        hits += low <= 3 <= high
    assert 0.82 * 200 <= hits <= 0.96 * 200
    assert bootstrap_interval([1.0, 2.0, 4.0]) == bootstrap_interval([1.0, 2.0, 4.0])


def test_known_counts():
    found = paired("x", {"a": [1] * 4 + [0] * 8, "b": [0] * 2 + [1] * 10, "c": [1] * 12})
    assert found["n"] == 12
    assert found["shares"]["a"] == pytest.approx([100 * x for x in (4 / 12, *wilson_interval(4, 12))])
    assert [(d["first"], d["second"]) for d in found["differences"]] == [("a", "b"), ("a", "c"), ("b", "c")]
    first = found["differences"][0]
    assert (first["only_first"], first["only_second"], first["p_value"]) == (2, 8, mcnemar_exact(2, 8))
    assert first["points"] == pytest.approx(50) and first["interval"][0] <= 50 <= first["interval"][1]
    points = [100.0 * (b - a) for a, b in zip([1] * 4 + [0] * 8, [0] * 2 + [1] * 10, strict=True)]
    assert first["interval"] == bootstrap_interval(points)


def test_word_overlap_stands_beside():
    hop = read_problem({"question": "Who?", "answer": "Ann Lee", "type": "bridge"})
    sums = read_problem({"question": "1+1?", "answer": "#### 2"})
    rows = compared_answers([hop, sums, hop], {"m": ["Lee", "#### 2", "Ann Lee"], "o": ["Lee", "#### 2", "Bob"]})
    shares = {row["what"]: row["shares"]["m"] for row in rows}
    names = ("hotpotqa", "gsm8k", "all kinds", "F1")
    assert [shares[f"prompts: {name}"][0] for name in names] == pytest.approx([50, 100, 200 / 3, 250 / 3])
    assert shares["prompts: F1"][1:] == pytest.approx([100 * x for x in bootstrap_interval([2 / 3, 1.0])])
    (difference,) = rows[-1]["differences"]
    assert difference["points"] == pytest.approx(-50) and (difference["only_first"], difference["only_second"]) == (
        1,
        0,
    )


def test_the_base_is_right_where_it_is_the_same(tiny):
    """The embedded AR base solves its own tasks: the checks agree with the references."""
    problems = [read_problem(record) for record in load_records("tiny", 12, "test")]
    examples = [problem.example() for problem in problems]
    answers = evaluate_answers(*tiny, examples, autoregressive=True, max_new_tokens=80).answers
    share, *_ = compared_answers(problems, {"base": answers})[-1]["shares"]["base"]
    same = [a.strip() == p.answer for a, p in zip(answers, problems, strict=True)]
    assert share == pytest.approx(100 * sum(same) / len(same)) and share > 80


GSM8K = {"question": "Tom has 3 bags of 12 and eats 6. How many?", "answer": "He had 3*12=36. Then 36-6=30.\n#### 30"}
COUNTDOWN = {"input": "15,44,79,50", "output": "44-15=29,79-29=50"}
RIGHT = "He had 3*12=36. Then 36-6=30.\n#### 30"
FALSE = "He had 3*12=35. Then 35-6=29.\n#### 29"
LUCKY = "He had 3*12=36. Also 12+6=18. Then 36-6=30. So it is 30"  # unmarked, and a step that nobody uses
BY_WORDS = "I think he has 7.\n#### 7"


def test_answers_are_compared_by_kind_and_together():
    problems = [read_problem({**GSM8K, "kind": kind}) for kind in "aab"] + [read_problem({**COUNTDOWN, "kind": "b"})]
    answers = {"one": [RIGHT, FALSE, FALSE, "79-(44-15)"], "two": [RIGHT, RIGHT, LUCKY, "79+44"]}
    rows = {row["what"]: row for row in compared_answers(problems, answers, seed=3)}
    assert list(rows) == ["prompts: a", "prompts: b", "prompts: all kinds"]
    assert rows["prompts: a"]["shares"]["one"][0] == 50 and rows["prompts: a"]["n"] == 2
    right = {"one": [True, False, False, True], "two": [True, True, True, False]}
    assert rows["prompts: all kinds"] == paired("prompts: all kinds", right, seed=3)
    (alone,) = compared_answers(problems[:1], {"one": answers["one"][:1]})
    assert alone["differences"] == [] and alone["n"] == 1


def sample(doc_id, value, kind="none", doc=None, answer="", **more):
    return {
        "doc_id": doc_id,
        "filter": kind,
        "metrics": ["exact_match", *more],
        "exact_match": value,
        "doc": doc or {},
        "resps": [[answer]],
        **more,
    }


def test_tasks_are_compared_document_by_document():
    """Samples come in any order; what is not right or wrong is left out."""
    one = {
        "a": [sample(1, 1.0, f1=0.5), sample(0, 0, f1=0.25)],
        "b": [sample(0, True, "strict"), sample(0, False, "loose")],
    }
    two = {
        "a": [sample(0, 1, f1=1.0), sample(1, 1, f1=1.0)],
        "b": [sample(0, False, "strict"), sample(0, False, "loose")],
    }
    rows = {row["what"]: row for row in compared_tasks({"one": one, "two": two})}
    assert list(rows) == ["a, exact_match", "b, exact_match (strict)", "b, exact_match (loose)"]
    first = rows["a, exact_match"]
    assert first["shares"]["one"] == pytest.approx((50.0, *(100 * x for x in wilson_interval(1, 2))))
    assert first["differences"][0]["only_second"] == 1 and first["differences"][0]["only_first"] == 0
    assert rows["b, exact_match (strict)"]["differences"][0]["points"] == -100


def test_steps_of_worked_answers():
    problem = read_problem(GSM8K)
    found = judged_steps([(problem, text) for text in (RIGHT, FALSE, LUCKY, BY_WORDS)])
    labels = [(row["right"], row["first_wrong_step"], row["superfluous"]) for row in found["answers"]]
    assert labels == [(True, None, []), (False, 0, []), (True, None, [1]), (False, 1, [])]
    assert found["summary"] == {
        "worked answers": 4,
        "right, %": 50.0,
        "with an equation, %": 75.0,
        "with a wrong step, %": 50.0,
        "first wrong step, mean": 1.5,
        "with a superfluous step, %": 25.0,
    }
    assert judged_steps([(read_problem(COUNTDOWN), "50")]) == {}


def test_a_judge_stands_beside():
    calls = []

    def always_right(question, answer, reference):
        calls.append((question, answer, reference))
        return {"right": True, "first_wrong_step": None}

    problem = read_problem(GSM8K)
    found = judged_steps([(problem, RIGHT), (problem, FALSE)], always_right)
    assert found["summary"]["judge: right, %"] == 100 and found["summary"]["judge agrees on right, %"] == 50
    assert calls == [(GSM8K["question"], RIGHT, GSM8K["answer"]), (GSM8K["question"], FALSE, GSM8K["answer"])]


def test_worked_answers_of_tasks_are_those_before_extraction():
    rows = [sample(1, 0, kind, GSM8K, FALSE) for kind in ("strict", "loose")] + [sample(0, 1, "strict", GSM8K, RIGHT)]
    scored = {**sample(0, 1, doc=GSM8K), "resps": [[(-1.5, False)]]}
    found = worked_of_tasks({"gsm8k": rows, "choices": [scored], "lambada": [sample(0, 1, doc={"words": "a"})]})
    assert [answer for _, answer in found] == [RIGHT, FALSE]


def test_everything_together_is_written():
    found = answer_tables([read_problem(GSM8K)], {"m": [FALSE]}, {"m": {"gsm8k": [sample(0, 1, "s", GSM8K, RIGHT)]}})
    assert [row["what"] for row in found["paired"]] == ["prompts: gsm8k", "gsm8k, exact_match (s)"]
    assert [row["right"] for row in found["worked"]["m"]["answers"]] == [False, True]
    json.dumps(found)
    assert answer_tables([], {}, {}) == {"paired": [], "worked": {}}


def test_records_of_every_shape_are_examples():
    (chat,) = tiny_dataset(1)
    assert as_example(chat) is chat and as_problem(chat).kind == "arithmetic"
    assert as_example(COUNTDOWN)["prompt"][0]["content"] == COUNTDOWN["input"]
    assert as_problem({"text": "abcdef"}).reference == "def"
    logiqa = {"text": "Cats sleep.", "question": "Then?", "options": ["No.", "Yes."], "answer": 1}
    assert as_problem(logiqa).form == "logiqa" and as_example(logiqa)["completion"][0]["content"] == "The answer is B."


def test_nll_per_token_is_the_loss_of_transformers(random_llama, tokenizer):
    model, start = random_llama(), len(tokenizer("Tom has")["input_ids"])
    ids = tokenizer("Tom has 23 apples", return_tensors="pt")["input_ids"]
    labels = ids.clone()
    labels[:, :start] = -100
    with torch.no_grad():
        expected = model(ids, labels=labels).loss.item()
    assert nll_per_token(model, tokenizer, ["Tom has"], [" 23 apples"]) == pytest.approx(expected, rel=1e-5)
    assert nll_per_token(model, tokenizer, ["Tom has"], [""]) == float("inf")


def test_side_by_side_tells_an_untrained_conversion_from_its_base(caplog):
    """The embedded base answers; decoded by unmasking without any training it does not, and the figures show it."""
    prompts = ["Sort the letters: k d e a", "Which is greater, 45 or 37?"]
    settings = {"max_new_tokens": 12, "block_length": 4}

    def load(name):
        return DiffusionInference.from_pretrained(name, device="cpu", **settings)

    rows = side_by_side(["tiny"], prompts, load, settings, chat=True)
    assert [(row.model, row.pipeline) for row in rows] == [("tiny", "arm"), ("tiny", "diffusion")]
    arm, diffusion = rows
    assert arm.texts == ["a d e k", "45 is greater than 37."] != diffusion.texts
    assert arm.tokens_per_forward == 1.0 and diffusion.tokens_per_forward > 0
    assert diffusion.nll_per_token > arm.nll_per_token + 1
    assert caplog.text.count("its answers mean nothing") == 1
