"""A model's own prompts and answers: seeded, different, token for token what it says alone, and resumable."""

import pytest
import torch

from llm_diffusion import UserError
from llm_diffusion.generation.generate import generate_autoregressive
from llm_diffusion.generation.own_text import read_answers, user_turn, write_answers, write_prompts
from llm_diffusion.models.loading import load_diffusion_model


@pytest.fixture(scope="module")
def tiny():
    return load_diffusion_model("tiny", attention="lossless", device="cpu")


def test_prompts_are_whole_different_and_the_same_for_a_seed(tiny):
    model, tokenizer = tiny
    prompts = write_prompts(model, tokenizer, 12, seed=3)
    assert prompts == write_prompts(model, tokenizer, 12, seed=3)
    assert prompts != write_prompts(model, tokenizer, 12, seed=4)
    texts = [tokenizer.decode(ids) for ids in prompts]
    before, behind = user_turn(tokenizer)
    assert len(set(texts)) == 12
    assert all(text.startswith(before) and text.endswith(behind) and len(text) > len(before + behind) for text in texts)


def test_answers_are_those_to_each_prompt_alone(tiny):
    model, tokenizer = tiny
    prompts = write_prompts(model, tokenizer, 5, seed=0)
    rows = write_answers(model, tokenizer, prompts, max_new_tokens=12)
    for prompt, row in zip(prompts, rows, strict=True):
        alone = generate_autoregressive(model, torch.tensor([prompt]), max_new_tokens=12, do_sample=False)[0].tolist()
        assert row["input_ids"] == alone
        assert row["labels"] == [-100] * len(prompt) + alone[len(prompt) :]


def test_what_was_answered_is_not_answered_again(tiny, tmp_path, monkeypatch):
    model, tokenizer = tiny
    prompts, cache = write_prompts(model, tokenizer, 4, seed=0), tmp_path / "deeper" / "answers.jsonl"
    whole = write_answers(model, tokenizer, prompts, max_new_tokens=8, cache=cache)
    lines = cache.read_text().splitlines(keepends=True)
    cache.write_text("".join(lines[:-1]) + lines[-1][:-9])  # killed while it wrote
    assert len(read_answers(cache)) == 3
    assert list(write_answers(model, tokenizer, prompts, max_new_tokens=8, cache=cache)) == list(whole)
    size = cache.stat().st_size
    assert list(write_answers(model, tokenizer, prompts[::-1], max_new_tokens=8, cache=cache)) == list(whole)[::-1]
    assert cache.stat().st_size == size


def test_a_model_without_a_template_is_refused(tiny):
    model, tokenizer = tiny
    kept, tokenizer.chat_template = tokenizer.chat_template, None
    with pytest.raises(UserError, match="chat template"):
        write_prompts(model, tokenizer, 1)
    tokenizer.chat_template = kept
