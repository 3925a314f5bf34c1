"""The one forward: the noise level as an input, logits to keep, scores of targets, and all of it together."""

import copy
import inspect
import math

import pytest
import torch
from collators import collator_of
from transformers import LlamaForCausalLM

from llm_diffusion import generate
from llm_diffusion.models.attention import causal_attention, patch_causal_attention
from llm_diffusion.models.conversion import convert_to_diffusion, set_final_causal_ratio
from llm_diffusion.models.forward import TimeEmbedding, add_row_scores, attach, forward_state
from llm_diffusion.objective.attention_masks import annealed

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


class Plain(torch.nn.Module):
    """A model without `logits_to_keep`."""

    class Output:
        def __init__(self, logits):
            self.logits = logits

    def __init__(self):
        super().__init__()
        self.head = torch.nn.Linear(4, 7)
        self.register_buffer("table", torch.arange(3))

    def forward(self, hidden, scale=1.0):
        return self.Output(self.head(hidden) * scale)


@pytest.mark.parametrize(
    "keep",
    [
        0,
        2,
        torch.tensor([0, 2]),
        torch.tensor([[0, 2], [1, 1]]),
        torch.tensor([[True, False, True], [False, True, False]]),
    ],
    ids=["all", "last", "columns", "per row", "mask"],
)
def test_logits_to_keep_as_in_transformers(keep, random_llama):
    """Every form gives what a model of transformers gives that has the keyword itself."""
    model, hidden = Plain(), torch.randn(2, 3, 4)
    every = model(hidden).logits
    state = forward_state(model)
    assert forward_state(model) is state
    llama, ids = random_llama(), torch.randint(3, 400, (2, 3))
    own, full = llama(ids, logits_to_keep=keep).logits, llama(ids).logits
    got = model(hidden, logits_to_keep=keep).logits
    assert got.shape[:-1] == own.shape[:-1]
    # Ours must come from where each of its rows came from.
    places = [int(torch.isclose(full.flatten(0, 1), row, atol=1e-5).all(-1).nonzero()[0]) for row in own.flatten(0, -2)]
    torch.testing.assert_close(got.flatten(0, -2), every.flatten(0, 1)[places])


@pytest.mark.parametrize("ratio", [None, 0.4])
def test_all_of_it_together(timed, ratio):
    """Noise level, lifted mask and scores against full logits of a 4-D mask; in one forward over the class's own."""
    model = timed(mask_token_id=77)
    if ratio is not None:
        set_final_causal_ratio(model, ratio)
    add_row_scores(model)
    add_row_scores(model)  # twice is once
    assert model.diffusion_forward.original.__func__ is type(model).forward
    assert inspect.signature(model.forward) == inspect.signature(type(model)(model.config).forward)
    mask = torch.ones_like(IDS)
    mask[1, :2] = 0
    times, targets = torch.rand(IDS.shape), IDS.masked_fill((IDS % 2 == 0) | (mask == 0), -100)
    full = annealed(mask, ratio or 0.0)
    logits = model(IDS, attention_mask=full, timesteps=times).logits[targets != -100]
    want = torch.nn.functional.cross_entropy(logits, targets[targets != -100], reduction="none")
    for each in (model, copy.deepcopy(model)):
        found = each(IDS, mask, timesteps=times, score_targets=targets)["nll"]
        torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4)
    with causal_attention(model):
        causal = model(IDS, timesteps=times).logits
        torch.testing.assert_close(
            model(IDS[:, :5], timesteps=times[:, :5]).logits, causal[:, :5], rtol=1e-4, atol=1e-4
        )


class RenamedCache(LlamaForCausalLM):
    """A forward that calls the cache as transformers 5.24 does."""

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, *, cache=None, **kwargs):
        return super().forward(input_ids, attention_mask, position_ids, past_key_values=cache, **kwargs)


def test_a_cache_goes_by_the_name_that_the_forward_has(random_llama, tokenizer):
    model, ids = random_llama(), torch.tensor([[5, 6, 7]])
    renamed = RenamedCache(copy.deepcopy(model.config)).eval()
    renamed.load_state_dict(model.state_dict())
    answers = []
    for one in (model, renamed):
        convert_to_diffusion(one, copy.deepcopy(tokenizer), attention="block")
        answers.append(one.generate(ids, max_new_tokens=8))
    assert torch.equal(*answers)
