"""Answers: exact match by kind, tokens per forward, batches that start where the model expects; sampled answers; speed against quality."""

from __future__ import annotations

import itertools

import pytest
import torch

import llm_diffusion as ld
from llm_diffusion.data.tiny import tiny_dataset, tiny_examples
from llm_diffusion.evaluation.answers import (
    AnswerReport,
    _Clock,
    default_grid,
    encode_prompts,
    evaluate_answers,
    grid,
    over_processes,
    place,
    prompt_and_reference,
    sample_answers,
    sweep,
)
from llm_diffusion.reasoning.problems import is_right, load_records, read_problem

SETTINGS = {"max_new_tokens": 10, "threshold": 0.9}


def examples(n=6, kinds=("sort", "reverse", "compare")):
    return list(itertools.islice(tiny_examples(3, "test", kinds), n))


def with_reference(example, answer):
    """The same question with another reference answer."""
    return {**example, "messages": [example["messages"][0], {"role": "assistant", "content": answer}]}


def test_answers_are_those_of_generate_one_by_one(tiny):
    model, tokenizer = tiny
    report = evaluate_answers(model, tokenizer, examples(), **SETTINGS)
    rates = []
    for example, answer in zip(examples(), report.answers, strict=True):
        encoded = encode_prompts(tokenizer, [example["messages"][:1]])
        output = ld.generate(model, **encoded, return_dict_in_generate=True, **SETTINGS)
        ids = output.sequences[0, encoded["input_ids"].shape[1] :]
        assert answer == tokenizer.decode(ids, skip_special_tokens=True)
        rates.append(output.tokens_per_forward.item())
    assert report.tokens_per_forward == pytest.approx(sum(rates) / len(rates))
    assert report.seconds > 0


@pytest.mark.parametrize("autoregressive", [False, True])
def test_exact_match_counts_by_kind(tiny, autoregressive):
    """References are made from the model's own answers: which of them match is then known, whatever it has learned."""
    model, tokenizer = tiny
    settings = {**SETTINGS, "autoregressive": autoregressive}
    chosen = examples(6, ("sort", "reverse", "compare"))
    answers = evaluate_answers(model, tokenizer, chosen, **settings).answers
    graded = [
        with_reference(e, f" {a}\n" if e["kind"] != "sort" else a + "!") for e, a in zip(chosen, answers, strict=True)
    ]
    graded[1] = with_reference(graded[1], "no such answer")
    report = evaluate_answers(model, tokenizer, graded, **settings)
    assert report.answers == answers
    assert report.exact_match == {"sort": 0.0, "reverse": 50.0, "compare": 100.0}
    assert report.mean == 50.0
    if autoregressive:
        assert report.tokens_per_forward == 1


@pytest.mark.parametrize("settings", [{"temperature": 1.0, "num_return_sequences": 2}, {}], ids=str)
def test_one_answer_to_each_of_some_examples(tiny, settings):
    with pytest.raises(ld.UserError, match="`num_return_sequences`=2" if settings else "`examples` are empty"):
        evaluate_answers(*tiny, examples() if settings else [], **settings)


def test_the_mean_is_over_kinds():
    assert AnswerReport(exact_match={"a": 100.0, "b": 0.0, "c": 20.0}).mean == 40.0


def test_examples_without_kind_and_of_other_shapes_are_scored(tiny):
    model, tokenizer = tiny
    shapes = [
        {"prompt": "3 6 9", "completion": "x"},
        {"text": "3 6 912 15 18"},
        {"prompt": [{"role": "user", "content": "hi"}], "completion": [{"role": "assistant", "content": "x"}]},
    ]
    report = evaluate_answers(model, tokenizer, shapes, max_new_tokens=3)
    assert set(report.exact_match) == {"all"}
    assert len(report.answers) == 3


def test_prompt_and_reference_of_every_shape():
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    assert prompt_and_reference({"messages": turns}) == (turns[:1], "a")
    assert prompt_and_reference({"prompt": turns[:1], "completion": turns[1:]}) == (turns[:1], "a")
    assert prompt_and_reference({"prompt": "q", "completion": "a"}) == ("q", "a")
    assert "".join(prompt_and_reference({"text": "abcde"})) == "abcde"


def test_prompts_are_padded_on_the_left(tiny):
    _, tokenizer = tiny
    conversation = [{"role": "user", "content": "Sort the letters: k d e a"}]
    prompts = ["3 6", conversation, "3 6 9 12"]
    batch = encode_prompts(tokenizer, prompts)
    alone = [
        tokenizer("3 6")["input_ids"],
        tokenizer.apply_chat_template(conversation, add_generation_prompt=True, return_dict=True)["input_ids"],
        tokenizer("3 6 9 12")["input_ids"],
    ]
    for ids, mask, want in zip(batch["input_ids"], batch["attention_mask"], alone, strict=True):
        assert ids[len(ids) - len(want) :].tolist() == want
        assert mask.tolist() == [0] * (len(ids) - len(want)) + [1] * len(want)
    assert torch.equal(
        batch["input_ids"][batch["attention_mask"] == 0].unique(), torch.tensor([tokenizer.pad_token_id])
    )


SAMPLING = {"max_new_tokens": 12, "block_length": 4, "steps": 12}


def problems():
    return [read_problem(record) for record in load_records("tiny", 4, "test")]


def test_rounds_are_seeded_and_labelled_by_checking(tiny):
    rows = sample_answers(*tiny, problems(), 2, seed=3, temperature=1.5, **SAMPLING)
    assert [row["prompt"][0]["content"] for row in rows[::2]] == [p.question for p in problems()]
    examples = [p.example() for p in problems()]
    for i in (0, 1):
        drawn = evaluate_answers(*tiny, examples, temperature=1.5, seed=3 + i, **SAMPLING).answers
        assert [row["answer"] for row in rows[i::2]] == drawn
    assert [row["right"] for row in rows] == [
        is_right(p, row["answer"]) for p, row in zip([p for p in problems() for _ in range(2)], rows, strict=True)
    ]
    assert {row["answer"] for row in rows[::2]} != {row["answer"] for row in rows[1::2]}


@pytest.mark.parametrize(
    ("n", "given", "settings", "message"),
    [(0, 1, {}, "`samples`"), (2, 0, {}, "`problems` is empty"), (2, 1, {"temperature": 0}, "`temperature` 0")],
)
def test_samples_that_cannot_be_drawn(tiny, n, given, settings, message):
    with pytest.raises(ValueError, match=message):
        sample_answers(*tiny, problems()[:given], n, **settings)


def test_grid() -> None:
    assert grid({"threshold": [0.5, 0.9], "block_length": [8]}) == [
        {"threshold": 0.5, "block_length": 8},
        {"threshold": 0.9, "block_length": 8},
    ]
    for axes in ({"threshold": 0.5}, {"threshold": []}):
        with pytest.raises(ValueError, match="`sweep.threshold` must be a list"):
            grid(axes)


def test_sweep_measures_every_way(tiny) -> None:
    model, tokenizer = tiny
    examples = list(tiny_dataset(6, split="test"))
    settings = {"max_new_tokens": 12, "block_length": 6}
    common = {**settings, "factor": 1.0}  # of which a point's rule takes the place
    base, *points = sweep(model, tokenizer, examples, common, grid({"threshold": [0.3, 0.99]}))
    assert base.settings is None and base.tokens_per_forward == 1
    for point, threshold in zip(points, (0.3, 0.99), strict=True):
        assert point.settings == {**settings, "threshold": threshold}
        report = evaluate_answers(model, tokenizer, examples, **point.settings)
        assert point.exact_match == report.mean and point.tokens_per_forward == report.tokens_per_forward
        assert all(1 <= n <= 12 for n in report.tokens)
    assert points[0].tokens_per_forward > points[1].tokens_per_forward >= 1
    for point in (base, *points):
        assert 0 < point.first_token <= point.last_token and point.tokens_per_second > 0 and point.memory is None
    everyone = (base, *points)
    best = max(p.exact_match for p in everyone), max(p.tokens_per_second for p in everyone)
    for point in everyone:
        beaten = any(
            (o.exact_match, o.tokens_per_second) != (point.exact_match, point.tokens_per_second)
            and o.exact_match >= point.exact_match
            and o.tokens_per_second >= point.tokens_per_second
            for o in everyone
        )
        assert point.on_frontier == (not beaten)
    assert any(p.on_frontier and p.tokens_per_second == best[1] for p in everyone)


def test_the_clock_stops_at_the_first_known_token() -> None:
    clock = _Clock(mask_token_id=9)
    clock.put(torch.tensor([[1, 2, 3]]))
    clock.put_draft(torch.tensor([[9, 5, 9]]))  # a token further right does not count
    assert clock.first is None
    clock.put_draft(torch.tensor([[4, 5, 9]]))
    first = clock.first
    assert first > 0
    clock.put(torch.tensor([[4, 5, 6]]))
    clock.end()
    assert clock.first == first


def test_tokens_are_counted_through_the_end(tiny) -> None:
    model, tokenizer = tiny
    examples = list(tiny_dataset(6, split="test"))
    report = evaluate_answers(model, tokenizer, examples, autoregressive=True, max_new_tokens=60)
    for answer, tokens, ended in zip(report.answers, report.tokens, report.ended, strict=True):
        assert tokens == len(tokenizer(answer)["input_ids"]) + ended


def test_default_grid(tiny) -> None:
    assert {"threshold": 0.9} in default_grid(tiny[0]) and len(default_grid(tiny[0])) == 6


def test_one_process_does_everything():
    assert place() == (0, 1)
    assert over_processes(lambda items: [2 * item for item in items], [3, 1]) == [6, 2]
    assert over_processes(lambda items: items, []) == []
