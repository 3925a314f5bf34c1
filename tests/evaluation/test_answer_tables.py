"""Single answers in the report: counts that are known beforehand, from prompts and from the harness's samples."""

import json

import pytest

from llm_diffusion.data.tiny import tiny_dataset
from llm_diffusion.evaluation.answer_tables import (
    answer_tables,
    as_example,
    as_problem,
    compared_answers,
    compared_tasks,
    judged_steps,
    worked_of_tasks,
)
from llm_diffusion.evaluation.statistics import compare, mcnemar_exact, wilson_interval
from llm_diffusion.reasoning.problems import read_problem

GSM8K = {"question": "Tom has 3 bags of 12 and eats 6. How many?", "answer": "He had 3*12=36. Then 36-6=30.\n#### 30"}
COUNTDOWN = {"input": "15,44,79,50", "output": "44-15=29,79-29=50"}
RIGHT = "He had 3*12=36. Then 36-6=30.\n#### 30"
FALSE = "He had 3*12=35. Then 35-6=29.\n#### 29"
LUCKY = "He had 3*12=36. Also 12+6=18. Then 36-6=30. So it is 30"  # unmarked, and a step that nobody uses
BY_WORDS = "I think he has 7.\n#### 7"


def test_shares_and_differences_are_those_of_compare():
    problems = [read_problem({**GSM8K, "kind": kind}) for kind in "aab"] + [read_problem({**COUNTDOWN, "kind": "b"})]
    answers = {"one": [RIGHT, FALSE, FALSE, "79-(44-15)"], "two": [RIGHT, RIGHT, LUCKY, "79+44"]}
    rows = {row["what"]: row for row in compared_answers(problems, answers, seed=3)}
    assert list(rows) == ["prompts: a", "prompts: b", "prompts: all kinds"]
    want, whole = compare(problems, answers, seed=3), rows["prompts: all kinds"]
    for name in answers:
        score = want.scores[name]["all"]
        assert whole["shares"][name] == pytest.approx((score.exact_match, *score.interval))
        assert rows["prompts: a"]["shares"][name][0] == want.scores[name]["a"].exact_match
    (found,), expected = whole["differences"], want.differences[0]
    assert (found["points"], found["only_first"], found["only_second"]) == (25.0, 1, 2)
    assert found["interval"] == expected.interval and found["p_value"] == mcnemar_exact(1, 2)
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


def test_a_judge_is_heard_beside():
    heard = []

    def says_right(question, answer, reference):
        heard.append((question, answer, reference))
        return {"right": True, "first_wrong_step": None}

    problem = read_problem(GSM8K)
    found = judged_steps([(problem, RIGHT), (problem, FALSE)], says_right)
    assert found["summary"]["judge: right, %"] == 100 and found["summary"]["judge agrees on right, %"] == 50
    assert heard == [(GSM8K["question"], RIGHT, GSM8K["answer"]), (GSM8K["question"], FALSE, GSM8K["answer"])]


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
