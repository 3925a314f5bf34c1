"""Scores: exact match by kind, tokens per forward, and batches that start where the model expects."""

import itertools

import pytest
import torch
from datasets import Dataset

import llm_diffusion as ld
from llm_diffusion.data.tiny import tiny_examples
from llm_diffusion.evaluation.answers import (
    AnswerReport,
    answered_by_base,
    encode_prompts,
    evaluate_answers,
    prompt_and_reference,
)

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
    asked = examples(6, ("sort", "reverse", "compare"))
    answers = evaluate_answers(model, tokenizer, asked, **settings).answers
    graded = [
        with_reference(e, f" {a}\n" if e["kind"] != "sort" else a + "!") for e, a in zip(asked, answers, strict=True)
    ]
    graded[1] = with_reference(graded[1], "no such answer")
    report = evaluate_answers(model, tokenizer, graded, **settings)
    assert report.answers == answers
    assert report.exact_match == {"sort": 0.0, "reverse": 50.0, "compare": 100.0}
    assert report.mean == 50.0
    if autoregressive:
        assert report.tokens_per_forward == 1


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


def test_answers_of_the_base_take_the_place_of_the_datas(tiny):
    model, tokenizer = tiny
    chats = Dataset.from_list([with_reference(example, "wrong") for example in examples(3)])
    answered = answered_by_base(model, tokenizer, chats, max_new_tokens=40)
    want = evaluate_answers(model, tokenizer, list(chats), autoregressive=True, max_new_tokens=40).answers
    assert [row["messages"][-1]["content"] for row in answered] == want
    assert [row["messages"][:-1] for row in answered] == [row["messages"][:-1] for row in chats]
    with pytest.raises(ValueError, match="no answer is over after 3 tokens"):  # a cut would be a false end
        answered_by_base(model, tokenizer, chats, max_new_tokens=3)
    with pytest.raises(ValueError, match="answers_from_base"):
        answered_by_base(model, tokenizer, Dataset.from_list([{"text": "2+2=4"}]))
