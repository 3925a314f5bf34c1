"""Calibration against models whose confidence is known to be right or wrong; ends of answers; traces."""

import pytest
from evaluation.test_likelihood import Oracle, Row, Whole
from oracle import MarkovChain
from transformers.modeling_outputs import CausalLMOutput

import llm_diffusion as ld
from llm_diffusion.data.tiny import tiny_dataset
from llm_diffusion.evaluation.answers import encode_prompts, evaluate_answers
from llm_diffusion.evaluation.calibration import (
    calibration,
    denoising_trace,
    eos_positions,
    reference_rows,
)

CHAIN = MarkovChain(n_states=4, length=16)


class Boaster(Whole):
    """The oracle, ten times as sure of itself."""

    def forward(self, *arguments, **keywords):
        return CausalLMOutput(logits=10 * super().forward(*arguments, **keywords).logits)


def chain_rows(n):
    return [Row(tuple(ids), 0, i) for i, ids in enumerate(CHAIN.sample(n, seed=3).tolist())]


def test_a_perfect_model_is_calibrated_and_a_boaster_is_not() -> None:
    rows = chain_rows(400)
    fair = calibration(Whole(CHAIN), rows, batch_size=100)
    assert fair.error < 0.02
    assert all(abs(c - r) < 0.06 for c, r, n in fair.bins if n > 1000) and sum(n for *_, n in fair.bins) > 5000
    boast = calibration(Boaster(CHAIN), rows, batch_size=100)
    assert boast.error > 0.15 and boast.bins[-1][0] > 0.98 > boast.bins[-1][1]


def test_calibration_does_not_depend_on_batches() -> None:
    rows, model = chain_rows(10), Oracle(CHAIN, attention="block", block_length=4, clean_context="block")
    small, large = calibration(model, rows, batch_size=3), calibration(model, rows, batch_size=10)
    assert small.error == pytest.approx(large.error, abs=1e-4)
    assert sum(n for *_, n in small.bins) == sum(n for *_, n in large.bins) > 100


def test_reference_rows_end_with_the_end_token(tiny) -> None:
    _, tokenizer = tiny
    (example,) = tiny_dataset(1, split="test")
    (row,) = reference_rows(tokenizer, [example], 1024)
    assert tokenizer.decode(row.ids[row.first :]) == example["messages"][-1]["content"] + tokenizer.eos_token
    (cut,) = reference_rows(tokenizer, [example], 8)
    assert len(cut.ids) == 8 and cut.ids == row.ids[-8:] and cut.first == max(1, 8 - (len(row.ids) - row.first))


def test_ends_of_answers(tiny) -> None:
    model, tokenizer = tiny
    examples = list(tiny_dataset(12, split="test"))
    report = evaluate_answers(model, tokenizer, examples, autoregressive=True, max_new_tokens=60)
    found = eos_positions(tokenizer, examples, report)
    right = [a == e["messages"][-1]["content"] for a, e in zip(report.answers, examples, strict=True)]
    assert all(a == b for (a, b), hit in zip(found["pairs"], right, strict=True) if hit) and sum(right) > 8
    assert found["accuracy"] >= 100 * sum(right) / 12
    short = evaluate_answers(model, tokenizer, examples, autoregressive=True, max_new_tokens=2)
    assert eos_positions(tokenizer, examples, short)["ended"] == 0


def test_the_trace_ends_with_the_answer(tiny) -> None:
    model, tokenizer = tiny
    (example,) = tiny_dataset(1, split="test")
    settings = {"max_new_tokens": 8, "steps": 4, "eos_early_stop": False}
    steps = denoising_trace(model, tokenizer, example, settings)
    assert len(steps) == 4 and all(len(words) == 8 for words in steps)
    batch = encode_prompts(tokenizer, [example["messages"][:1]])
    ids = ld.generate(model, **batch, **settings)[0, batch["input_ids"].shape[1] :]
    assert [word for word, _ in steps[-1]] == [tokenizer.decode([i]).replace("\n", " / ") for i in ids.tolist()]
    assert [sum(state == "new" for _, state in words) for words in steps] == [2, 2, 2, 2]
    assert [sum(state == "mask" for _, state in words) for words in steps] == [6, 4, 2, 0]
