"""Block decoding with its cache against forwards over the whole text, and against what training computes."""

import pytest
import torch
from collators import collator_of
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from llm_diffusion import (
    convert_to_diffusion,
    generate,
    load_diffusion_model,
    probe_attention,
)
from llm_diffusion.models.checkpoints import TINY_MODEL_PATH
from llm_diffusion.objective.attention_masks import additive, block_decoding
from llm_diffusion.objective.modes import IGNORE_INDEX

MODES = [("causal", True), ("causal", False), ("block", True), ("block", False)]


def block_model(block_length=4, clean_context="causal", shift=True, implementation="sdpa", seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=2,
        initializer_range=0.3,  # sharp enough that greedy choices are not ties
        attn_implementation=implementation,
    )
    tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL_PATH)
    return convert_to_diffusion(
        LlamaForCausalLM(config).eval(),
        tokenizer,
        attention="block",
        block_length=block_length,
        clean_context=clean_context,
        right_shift_logits=shift,
    )


def left_padded(lengths, seed=1):
    torch.manual_seed(seed)
    width = max(lengths)
    ids, mask = torch.zeros(len(lengths), width, dtype=torch.long), torch.zeros(len(lengths), width, dtype=torch.long)
    for row, n in enumerate(lengths):
        ids[row, width - n :], mask[row, width - n :] = torch.randint(5, 400, (n,)), 1
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize(("clean", "shift"), MODES)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "settings", [{}, {"threshold": 0.3}, {"steps": 6}, {"steps": 3}, {"temperature": 0.8, "seed": 3}]
)
def test_cached_equals_full_forwards(clean, shift, implementation, settings):
    model = block_model(4, clean, shift, implementation)
    batch = left_padded([9, 3, 8, 1])
    options = {"max_new_tokens": 11, "eos_token_id": [2, 50, 51], "pad_token_id": 0, **settings}
    cached = generate(model, **batch, **options, return_dict_in_generate=True)
    full = generate(model, **batch, **options, return_dict_in_generate=True, use_cache=False)
    assert torch.equal(cached.sequences, full.sequences)
    assert torch.equal(cached.nfe, full.nfe + 1)  # the prefill


@pytest.mark.parametrize("shift", [True, False])
def test_some_rows_end_in_the_first_block_and_no_prompt_fills_one(shift):
    model, batch = block_model(8, shift=shift), left_padded([3, 1, 5, 2, 4, 7])
    first = generate(model, **batch, max_new_tokens=20, eos_token_id=None)[:, 7]
    options = {"max_new_tokens": 20, "eos_token_id": first[:3].tolist(), "pad_token_id": 0}
    cached, full = (generate(model, **batch, **options, use_cache=use) for use in (None, False))
    assert torch.equal(cached, full) and cached.shape[1] > 15  # the other rows went on


@pytest.mark.parametrize(("clean", "shift"), MODES)
@pytest.mark.parametrize(
    "settings",
    [
        {"factor": 1.2},
        {"entropy_bound": 1.0, "remasking": "entropy"},
        {"remasking": "left_to_right"},
        {"alg_temp": 0.3},
        {"guidance_scale": 2.0, "threshold": 0.3},
        {"repetition_penalty": 1.4},
        {"bad_words_ids": [[50, 51], [60]], "threshold": 0.05},
        {"threshold": 0.05, "editing_threshold": 0.1, "max_post_steps": 3},
        {"revision": "p2", "steps": 15},
        {"revision": "remdm", "remasking": "random", "eta": 0.4, "steps": 12},
        {"revision": "remdm-conf", "remasking": "random", "eta": 1.0, "steps": 20},
    ],
    ids=str,
)
def test_every_rule_is_the_same_with_a_cache(clean, shift, settings):
    """Rows stop at different times; the tokens, the passes and how sure they were must not know of the cache."""
    model, batch = block_model(4, clean, shift), left_padded([9, 3, 8, 1])
    options = {"max_new_tokens": 11, "eos_token_id": list(range(2, 40)), "pad_token_id": 0, **settings}
    options |= {"return_dict_in_generate": True, "output_history": True}
    cached = generate(model, **batch, **options)
    full = generate(model, **batch, **options, use_cache=False)
    assert torch.equal(cached.sequences, full.sequences)
    assert torch.equal(cached.nfe, full.nfe + (2 if "guidance_scale" in settings else 1))
    torch.testing.assert_close(cached.confidence[-1], full.confidence[-1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("clean", "shift"), MODES)
def test_a_ragged_batch_equals_one_by_one(clean, shift):
    model, lengths = block_model(4, clean, shift), [10, 4, 7, 2]
    batch = left_padded(lengths)
    options = {"max_new_tokens": 9, "eos_token_id": None, "threshold": 0.4}
    together = generate(model, **batch, **options)
    for row, n in enumerate(lengths):
        alone = generate(model, batch["input_ids"][row : row + 1, -n:], **options)
        assert torch.equal(alone[0], together[row, -n - 9 :])


@pytest.mark.parametrize(("clean", "shift"), MODES)
@pytest.mark.parametrize("prompt", [0, 6])
def test_training_forward_gives_the_logits_of_decoding(clean, shift, prompt):
    """[noisy ; clean] in one pass = for each block, a forward over the text with that block noisy."""
    b, length = 4, 12
    model = block_model(b, clean, shift)
    ids = left_padded([length, length])["input_ids"]
    collator = collator_of(
        0,
        model.config.diffusion["mask_token_id"],
        right_shift_logits=shift,
        attention="block",
        block_length=b,
        clean_context=clean,
    )
    labels = ids.clone()
    labels[:, :prompt] = IGNORE_INDEX
    rows = [{"input_ids": row, "labels": label} for row, label in zip(ids.tolist(), labels.tolist(), strict=True)]
    noisy = collator.corrupt(collator(rows), seed=0, step=0)
    with torch.no_grad():
        logits = model(**noisy["inputs"]).logits
    start = prompt // b * b  # blocks of prompt alone have no noisy copy
    half = noisy["inputs"]["input_ids"][:, : length - start]
    assert logits.shape[1] == 2 * length - start
    compared = 0
    for first in range(start, length, b):
        mixed = ids.clone()
        mixed[:, first : first + b] = half[:, first - start : first - start + b]
        mask = block_decoding(torch.ones_like(ids), b, clean, torch.full((2,), first // b))
        with torch.no_grad():
            expected = model(mixed, attention_mask=additive(mask)).logits
        for place in range(max(first, prompt), first + b):
            read = place - int(shift)
            if read < 0:
                continue
            # A block's first token is read from the clean half when shifted.
            from_clean = shift and place % b == 0
            row = read + (length - start if from_clean else -start)
            torch.testing.assert_close(logits[:, row], expected[:, read], rtol=1e-4, atol=1e-4)
            target = noisy["targets"][:, row]
            assert ((target == IGNORE_INDEX) | (target == ids[:, place])).all()
            assert not from_clean or (target == ids[:, place]).all()
            compared += 1
    assert compared == length - prompt - int(shift and not prompt)


def test_blocks_of_one_are_the_autoregressive_model():
    """With a causal clean half and the shifted read-out every token is read from clean text: the bound is the AR loss."""
    model = block_model(block_length=1)
    ids = left_padded([14, 14])["input_ids"]
    collator = collator_of(
        0, model.config.diffusion["mask_token_id"], attention="block", block_length=1, right_shift_logits=True
    )
    noisy = collator.corrupt(collator([{"input_ids": row} for row in ids.tolist()]), seed=0, step=0)
    keep = noisy["targets"] != IGNORE_INDEX
    with torch.no_grad():
        logits = model(**noisy["inputs"]).logits[keep]
        expected = model(ids, labels=ids).loss
        nll = torch.nn.functional.cross_entropy(logits, noisy["targets"][keep], reduction="none")
    assert (noisy["weights"][keep] * nll).sum() / (2 * 13) == pytest.approx(expected.item(), rel=1e-5)


def test_greedy_first_tokens_of_blocks_are_the_autoregressive_ones():
    model = block_model(block_length=1)
    batch = left_padded([6])
    ours = generate(model, **batch, max_new_tokens=8, eos_token_id=None)
    theirs = type(model).generate(
        model,
        **batch,
        max_new_tokens=8,
        do_sample=False,
        eos_token_id=None,
        suppress_tokens=[model.config.diffusion["mask_token_id"]],
    )
    assert torch.equal(ours, theirs)


def test_answers_end_in_their_block_and_never_hold_masks():
    model = block_model(block_length=4)
    mask_id = model.config.diffusion["mask_token_id"]
    ends = 0
    for seed in range(15):
        ends_at = torch.randint(5, 400, (60,), generator=torch.Generator().manual_seed(seed)).tolist()
        output = generate(model, **left_padded([5, 8], seed), max_new_tokens=10, eos_token_id=ends_at, pad_token_id=0)
        assert not (output == mask_id).any()
        ends += int((output[:, -1] == 0).any() or output.shape[1] < 18)
    assert ends > 2  # rows did end early


def test_an_empty_prompt_is_answered():
    model = block_model()
    output = generate(model, torch.zeros(1, 0, dtype=torch.long), max_new_tokens=6, eos_token_id=None)
    assert output.shape == (1, 6)


def test_conversion_keeps_the_model_causal_and_says_block(tmp_path):
    model = block_model()
    assert probe_attention(model) == "block"
    assert getattr(model.config, "is_causal", None) is not False
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(TINY_MODEL_PATH, mask_token="<|mask|>").save_pretrained(tmp_path)
    reloaded, _ = load_diffusion_model(str(tmp_path))
    assert reloaded.config.diffusion["block_length"] == 4
    with pytest.raises(ValueError, match="block_length"):
        load_diffusion_model(str(tmp_path), block_length=8)
    with pytest.raises(ValueError, match="right_shift_logits"):
        load_diffusion_model(str(tmp_path), right_shift_logits=False)
    with pytest.raises(ValueError, match="block_length"):
        generate(reloaded, **left_padded([4]), block_length=8)
