"""The noise level as an input: sinusoids against the table of the seed, a bit-equal start, and what carries it where."""

import copy
import math

import pytest
import torch
from collators import collator_of

from llm_diffusion import generate
from llm_diffusion.models.attention import patch_causal_attention
from llm_diffusion.models.conversion import convert_to_diffusion
from llm_diffusion.models.forward import TimeEmbedding, attach

IDS = torch.randint(3, 400, (2, 9), generator=torch.Generator().manual_seed(1))
BLOCKS = {"attention": "block", "block_length": 4}


@pytest.fixture
def timed(random_llama, tokenizer):
    """A converted model with a time embedding whose last layer is not zero any more."""

    def build(**options):
        model = convert_to_diffusion(random_llama(), tokenizer, time_embedding=True, **options)
        torch.manual_seed(1)
        torch.nn.init.normal_(model.time_embedding.down.weight, std=0.5)
        return model

    return build


def test_sinusoids_are_a_table_read_between_its_rows():
    embedding, times = TimeEmbedding(8, dim=6, max_timesteps=50), torch.tensor([0.0, 0.013, 0.5, 0.99, 1.0])
    table = torch.zeros(50, 6)
    for t in range(50):
        for i in range(3):
            frequency = math.exp(i * -math.log(10_000.0) / 3)
            table[t, i], table[t, 3 + i] = math.sin(t * frequency), math.cos(t * frequency)
    seen = []
    embedding.up.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    embedding(times)
    for row, time in zip(seen[0], times.tolist(), strict=True):
        low, share = int(time * 49), time * 49 - int(time * 49)
        want = table[low] * (1 - share) + table[min(low + 1, 49)] * share
        torch.testing.assert_close(row, want, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_the_converted_model_starts_bit_equal(random_llama):
    model = random_llama()
    patch_causal_attention(model)
    want = model(IDS).logits
    attach(model)
    attach(model)  # twice is once
    assert torch.equal(model(IDS, timesteps=torch.rand(IDS.shape)).logits, want)


@torch.no_grad()
def test_left_out_it_is_the_share_of_masks(timed):
    model = timed()
    ids, mask = IDS.clone(), torch.ones_like(IDS)
    ids[0, 3:6], mask[1, 7:] = model.config.diffusion["mask_token_id"], 0
    ids[1, 0] = model.config.diffusion["mask_token_id"]
    times = torch.tensor([[3 / 9], [1 / 7]]).expand(IDS.shape)
    want = model(ids, attention_mask=mask, timesteps=times).logits
    assert torch.equal(model(ids, attention_mask=mask).logits, want)
    assert not torch.equal(model(ids, attention_mask=mask, timesteps=times / 2).logits, want)


@torch.no_grad()
def test_a_copy_embeds_with_its_own_weights(timed):
    model = timed()
    want = model(IDS, timesteps=torch.ones(IDS.shape)).logits
    twin = copy.deepcopy(model)
    torch.nn.init.zeros_(twin.time_embedding.down.weight)
    assert torch.equal(model(IDS, timesteps=torch.ones(IDS.shape)).logits, want)
    assert not torch.equal(twin(IDS, timesteps=torch.ones(IDS.shape)).logits, want)


@pytest.mark.parametrize("options", [{}, BLOCKS])
def test_training_hands_over_the_mask_probability(options):
    settings = {"pad_token_id": 0, "mask_token_id": 500, "time_embedding": True, "noise_schedule": "cosine", **options}
    collator = collator_of(**settings)
    batch = collator([{"input_ids": list(range(3, 23))}, {"input_ids": list(range(3, 14))}])
    noisy = collator.corrupt(batch, seed=0, step=0, rows=torch.arange(2), n_rows=2)
    noise = noisy["inputs"]["timesteps"]
    assert noise.shape == noisy["inputs"]["input_ids"].shape
    want = 1 - (1 - torch.cos(math.pi / 2 * (1 - noisy["times"])))  # the cosine schedule's mask probability
    if options:
        length = noise.shape[1] // 2
        torch.testing.assert_close(noise[:, :length], want)
        assert (noise[:, length:] == 0).all()  # clean context
    else:
        torch.testing.assert_close(noise, want)


@pytest.mark.parametrize("use_cache", [True, False])
@torch.no_grad()
def test_decoding_hands_over_the_share_of_masks_in_the_block(timed, use_cache):
    """Seen at the embedding itself: what a block model is told at every forward."""
    model, told = timed(**BLOCKS), []
    model.time_embedding.register_forward_pre_hook(lambda module, args: told.append(args[0]))
    prompt = torch.tensor([[5, 6, 7, 8]])
    generate(model, prompt, max_new_tokens=8, steps=8, use_cache=use_cache, eos_token_id=None)
    shares = [round(float(times.max()), 2) for times in told]
    want = [1.0, 0.75, 0.5, 0.25] * 2
    assert shares == ([0.0] + want if use_cache else want)
    for times in told:  # all of a block is told the same, the text before it nothing
        assert set(times.unique().tolist()) <= {0.0, float(times.max())}
        assert not use_cache or times.shape[1] <= 8


@torch.no_grad()
def test_cached_and_whole_decoding_agree(timed):
    model = timed(**BLOCKS)
    prompts = torch.tensor([[5, 6, 7, 8, 9], [0, 11, 12, 13, 14]])
    mask = (prompts > 0).long()
    outputs = [
        generate(model, prompts, mask, max_new_tokens=11, use_cache=use_cache, eos_token_id=None)
        for use_cache in (True, False)
    ]
    assert torch.equal(*outputs)
