"""Decoding and likelihood in half precision, of very long rows, of one token, and with padding on either side."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer

import llm_diffusion as ld
from llm_diffusion.evaluation.likelihood import Row, autoregressive_rows, bound_rows
from llm_diffusion.generation.canvas import fill_masks
from llm_diffusion.models.checkpoints import TINY_MODEL_PATH

MASK = 431
MODES = {
    "bidirectional": {},
    "timed": {"time_embedding": True},
    "block": {"attention": "block"},
    "lossless": {"attention": "lossless"},
}
HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
IDS = torch.tensor([[0, 0, 5, 6, 7], [9, 10, 11, 12, 13]])


@pytest.fixture(scope="module")
def modes(random_llama):
    """Converted models by mode, in fp32. Shared: tests must leave them as they are."""
    tokenizer, found = AutoTokenizer.from_pretrained(TINY_MODEL_PATH), {}
    for name, options in MODES.items():
        model = random_llama(vocab_size=512)
        with torch.no_grad():
            model.lm_head.weight.mul_(2)  # sure answers, which rounding cannot reorder
        model = ld.convert_to_diffusion(model, tokenizer, **options)
        found[name] = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])) if name == "lossless" else model
    return found


RULES = {
    "one a pass": {},
    "steps": {"steps": 4},
    "threshold": {"threshold": 0.9},
    "guided": {"guidance_scale": 1.5},
    "uncached": {"use_cache": False},
    "cached": {"approximate_cache": "dual", "block_length": 4},
    "sampled": {"temperature": 0.7, "top_p": 0.9},
}
DECODERS = [
    (mode, rule)
    for mode in MODES
    for rule in RULES
    if not (mode == "lossless" and rule not in ("one a pass", "sampled"))
    and not (rule == "cached" and mode != "bidirectional")
]


@HALVES
@pytest.mark.parametrize(("mode", "rule"), DECODERS)
def test_decoders_in_half_precision(modes, mode, rule, dtype):
    """None stops on non-finite logits, and no mask is left."""
    half, settings = copy.deepcopy(modes[mode]).to(dtype), {"max_new_tokens": 8, "eos_token_id": None, **RULES[rule]}
    found = ld.generate(half, IDS, (IDS != 0).long(), **settings)
    assert found.shape == (2, 13) and not (found[:, 5:] == MASK).any()


@HALVES
@pytest.mark.parametrize("mode", ["bidirectional", "timed", "block"])
def test_the_bound_in_half_precision(modes, mode, dtype):
    rows = [Row(tuple(range(5, 14)), 2), Row((5, 6), 1, 1)]
    want = bound_rows(modes[mode], rows, n_samples=8)
    found = bound_rows(copy.deepcopy(modes[mode]).to(dtype), rows, n_samples=8)
    assert found.nats == pytest.approx(want.nats, rel=0.05 if dtype == torch.bfloat16 else 0.01)
    exact = autoregressive_rows(modes[mode], rows).nats
    assert autoregressive_rows(copy.deepcopy(modes[mode]).to(dtype), rows).nats == pytest.approx(exact, rel=0.05)


@HALVES
@pytest.mark.parametrize("mode", ["bidirectional", "block"])
def test_padding_on_either_side_is_nothing(modes, mode, dtype):
    model = copy.deepcopy(modes[mode]).to(dtype)
    row = [5, 6, 7, MASK, MASK, 8, MASK, 9]
    left, right = torch.tensor([[0] * 3 + row]), torch.tensor([row + [0] * 3])
    config = ld.DiffusionGenerationConfig(mask_token_id=MASK, use_cache=False)
    filled = [fill_masks(model, ids, (ids != 0).long(), config).sequences for ids in (left, right)]
    assert torch.equal(filled[0][:, 3:], filled[1][:, :-3])


@pytest.mark.parametrize("mode", ["bidirectional", "block"])
@pytest.mark.parametrize("ids", [[[MASK]], [[MASK] * 9], [[5] * 8 + [MASK]], [[MASK] + [5] * 8]])
def test_one_token_and_all_masked(modes, mode, ids):
    config = ld.DiffusionGenerationConfig(mask_token_id=MASK, use_cache=False)
    found = fill_masks(modes[mode], torch.tensor(ids), torch.ones_like(torch.tensor(ids)), config)
    assert not (found.sequences == MASK).any()
    assert torch.equal(found.sequences[torch.tensor(ids) != MASK], torch.tensor(ids)[torch.tensor(ids) != MASK])


def test_a_row_without_a_mask_stays(modes):
    config = ld.DiffusionGenerationConfig(mask_token_id=MASK)
    assert torch.equal(fill_masks(modes["bidirectional"], IDS, (IDS != 0).long(), config).sequences, IDS)


def test_ten_thousand_tokens(random_llama, tokenizer):
    model = random_llama(num_hidden_layers=1, max_position_embeddings=12_000)
    model = ld.convert_to_diffusion(model, tokenizer).to(torch.float16)
    ids = torch.randint(5, 400, (1, 10_000), generator=torch.Generator().manual_seed(0))
    found = ld.generate(model, ids, max_new_tokens=4, steps=1, eos_token_id=None)
    assert found.shape == (1, 10_004) and not (found == MASK).any()
