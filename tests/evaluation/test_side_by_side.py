"""Side by side: the judge's figure is transformers' own loss, and an untrained conversion is told from its base."""

import pytest
import torch

from llm_diffusion import DiffusionInference
from llm_diffusion.evaluation.side_by_side import nll_per_token, side_by_side


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
