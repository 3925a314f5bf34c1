"""Self-generated prompts and answers: seeded, different, token for token what the base says alone, and kept for the same weights."""

import itertools

import pytest
import torch
from datasets import Dataset

from llm_diffusion import UserError
from llm_diffusion.data.tiny import tiny_examples
from llm_diffusion.evaluation.answers import evaluate_answers
from llm_diffusion.generation.generate import generate_autoregressive
from llm_diffusion.generation.self_generated import (
    BATCH_SIZE,
    GenerationCache,
    answered_by_base,
    generate_answers,
    generate_prompts,
    user_turn,
)
from llm_diffusion.models.loading import load_diffusion_model


@pytest.fixture(scope="module")
def tiny():
    return load_diffusion_model("tiny", attention="lossless", device="cpu")


def test_prompts_are_whole_different_and_the_same_for_a_seed(tiny):
    model, tokenizer = tiny
    prompts = generate_prompts(model, tokenizer, 12, seed=3)
    assert prompts == generate_prompts(model, tokenizer, 12, seed=3)
    assert prompts != generate_prompts(model, tokenizer, 12, seed=4)
    texts = [tokenizer.decode(ids) for ids in prompts]
    before, behind = user_turn(tokenizer)
    assert len(set(texts)) == 12
    assert all(text.startswith(before) and text.endswith(behind) and len(text) > len(before + behind) for text in texts)


def test_answers_are_those_to_each_prompt_alone(tiny):
    model, tokenizer = tiny
    prompts = generate_prompts(model, tokenizer, 5, seed=0)
    rows = generate_answers(model, tokenizer, prompts, max_new_tokens=12)
    for prompt, row in zip(prompts, rows, strict=True):
        alone = generate_autoregressive(model, torch.tensor([prompt]), max_new_tokens=12, do_sample=False)[0].tolist()
        assert row["input_ids"] == alone
        assert row["labels"] == [-100] * len(prompt) + alone[len(prompt) :]


def test_what_was_generated_is_not_generated_again(tiny, tmp_path):
    model, tokenizer = tiny
    cache = tmp_path / "deeper" / "generated.jsonl"
    prompts = generate_prompts(model, tokenizer, 4, seed=0, cache=cache)
    whole = generate_answers(model, tokenizer, prompts, max_new_tokens=8, cache=cache)
    lines = cache.read_text().splitlines(keepends=True)
    assert len(lines) == 1 + 4  # a round of prompts, and the answers
    cache.write_text("".join(lines[:-1]) + lines[-1][:-9])  # killed while it wrote
    assert list(generate_answers(model, tokenizer, prompts, max_new_tokens=8, cache=cache)) == list(whole)
    assert sorted(cache.read_text().splitlines(keepends=True)) == sorted(lines)
    assert generate_prompts(model, tokenizer, 4, seed=0, cache=cache) == prompts
    assert list(generate_answers(model, tokenizer, prompts[::-1], max_new_tokens=8, cache=cache)) == list(whole)[::-1]
    assert len(cache.read_text().splitlines()) == len(lines)


def test_another_model_generates_its_own(random_llama, tmp_path):
    one, other = (GenerationCache(random_llama(seed=seed), tmp_path / "generated.jsonl") for seed in (0, 1))
    assert one.key("answer", 8, [5, 6]) != other.key("answer", 8, [5, 6])
    assert one.key("answer", 8, [5, 6]) == GenerationCache(random_llama(seed=0)).key("answer", 8, [5, 6])


def test_a_model_without_a_template_and_one_that_repeats_itself_are_refused(tiny, random_llama):
    model, tokenizer = tiny
    kept, tokenizer.chat_template = tokenizer.chat_template, None
    with pytest.raises(UserError, match="chat template"):
        generate_prompts(model, tokenizer, 1)
    tokenizer.chat_template = kept
    with pytest.raises(UserError, match="`max_examples`"):  # nothing is over after two tokens
        generate_prompts(model, tokenizer, BATCH_SIZE, max_new_tokens=2)


WRONG = {"role": "assistant", "content": "wrong"}


def test_answers_of_the_base_take_the_place_of_the_datas(tiny):
    model, tokenizer = tiny
    chats = Dataset.from_list(
        [
            {"messages": [*row["messages"][:1], WRONG]}
            for row in itertools.islice(tiny_examples(3, "test", ("sort",)), 3)
        ]
    )
    answered = answered_by_base(model, tokenizer, chats, max_new_tokens=40)
    want = evaluate_answers(model, tokenizer, list(chats), autoregressive=True, max_new_tokens=40).answers
    for row, chat, text in zip(answered, chats, want, strict=True):
        prompt = tokenizer.apply_chat_template(chat["messages"][:-1], add_generation_prompt=True, return_dict=False)
        written = row["input_ids"][len(prompt) :]
        assert row["input_ids"][: len(prompt)] == prompt and row["labels"] == [-100] * len(prompt) + written
        assert tokenizer.decode(written) == text + "<|im_end|>"
    with pytest.raises(ValueError, match="answers_from_base"):  # a cut would be a false end
        answered_by_base(model, tokenizer, chats, max_new_tokens=3)
    with pytest.raises(ValueError, match="answers_from_base"):
        answered_by_base(model, tokenizer, Dataset.from_list([{"text": "2+2=4"}]))
