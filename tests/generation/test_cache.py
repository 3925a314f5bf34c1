"""The approximate cache against Fast-dLLM's algorithm over the host's own cache, and against decoding without one."""

import pytest
import torch
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel, StableLmConfig, StableLmForCausalLM

from llm_diffusion import DiffusionGenerationConfig, convert_to_diffusion, generate
from llm_diffusion.generation.cache import CanvasCache, check_canvas_cache
from llm_diffusion.generation.canvas import fill_masks
from llm_diffusion.generation.infilling import fill_gaps
from llm_diffusion.models.attention import patch_causal_attention
from llm_diffusion.models.conversion import set_final_causal_ratio
from llm_diffusion.models.patching import Patch

MASK, NEW = 31, 12
REACHES = ("prefix", "dual")


def left_padded(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    rows = [torch.randint(2, MASK, (n,), generator=generator).tolist() for n in lengths]
    return {
        "input_ids": torch.tensor([[0] * (width - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows]),
    }


@torch.no_grad()
def fast_dllm(model, prompt, reach, *, block_length, threshold=None, per_block=None, refresh=None, grow=False):
    """One row, in plain Python: the canvas after every pass. Kept keys stand before the computed ones, in any order."""
    shift = int(model.config.diffusion["right_shift_logits"])
    x, canvases = [*prompt, *[MASK] * NEW], []
    for start in range(len(prompt), len(x), block_length):
        end = min(start + block_length, len(x))
        width = end if grow else len(x)
        step, cache = 0, None
        while MASK in x[start:end]:
            if step == 0 or (refresh and step % refresh == 0):
                cache, fed = DynamicCache(), list(range(width))
                past = cache
            else:
                fed = list(range(start - shift, end if reach == "dual" else width))
                kept = [column for column in range(width) if column not in fed]
                past = DynamicCache([(layer.keys[:, :, kept], layer.values[:, :, kept]) for layer in cache.layers])
            logits = model(
                torch.tensor([[x[column] for column in fed]]),
                position_ids=torch.tensor([fed]),
                attention_mask=torch.zeros(1, 1, len(fed), width),
                past_key_values=past,
                use_cache=True,
            ).logits[0]
            if past is not cache:  # what was computed again is what the next pass starts from
                for old, new in zip(cache.layers, past.layers, strict=True):
                    old.keys[:, :, fed], old.values[:, :, fed] = (
                        new.keys[:, :, -len(fed) :],
                        new.values[:, :, -len(fed) :],
                    )
            logits[:, MASK] = -1e9
            best = {}
            for column in range(start, end):
                if x[column] == MASK:
                    p, token = logits[fed.index(column - shift)].float().softmax(-1).max(-1)
                    best[column] = (p.item(), token.item())
            order = sorted(best, key=lambda column: (-best[column][0], column))
            if threshold is not None:
                chosen = [column for column in order if best[column][0] >= threshold] or order[:1]
            else:
                chosen = order[: -(-len(order) // (per_block - step))]
            for column in chosen:
                x[column] = best[column][1]
            step += 1
            canvases.append(list(x))
    return canvases


@pytest.mark.parametrize("right_shift", [True, False])
@pytest.mark.parametrize("reach", REACHES)
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"threshold": 0.5, "block_length": 6}, {"threshold": 0.5, "block_length": 6}),
        ({"steps": 9, "block_length": 4}, {"per_block": 3, "block_length": 4}),
        ({"block_length": 5, "cache_refresh_steps": 2}, {"threshold": 2.0, "block_length": 5, "refresh": 2}),
        ({"threshold": 0.3}, {"threshold": 0.3, "block_length": NEW}),
        ({"block_length": 4, "grow_canvas": True}, {"threshold": 2.0, "block_length": 4, "grow": True}),
    ],
    ids=str,
)
def test_equals_fast_dllm_forward_for_forward(random_diffuser, right_shift, reach, ours, theirs):
    model = random_diffuser(right_shift)
    for seed, length in enumerate((1, 7)):
        batch = left_padded([length], seed)
        output = generate(
            model,
            **batch,
            max_new_tokens=NEW,
            eos_token_id=None,
            approximate_cache=reach,
            return_dict_in_generate=True,
            output_history=True,
            **ours,
        )
        want = fast_dllm(model, batch["input_ids"][0].tolist(), reach, **theirs)
        assert [canvas[0].tolist() for canvas in output.history] == want
        assert output.nfe.tolist() == [len(want)]


RULES = [
    {"threshold": 0.4, "block_length": 5},
    {"steps": 6, "block_length": 4, "temperature": 0.8, "seed": 3},
    {"threshold": 0.4, "block_length": 4, "grow_canvas": True},
    {"guidance_scale": 2.0, "threshold": 0.4, "block_length": 6},
    {"revision": "p2", "steps": 15, "block_length": 4},
    {"revision": "remdm", "remasking": "random", "eta": 0.4, "steps": 12, "block_length": 6},
    {"threshold": 0.1, "editing_threshold": 0.2, "max_post_steps": 3, "block_length": 4},
]


@pytest.mark.parametrize("right_shift", [True, False])
@pytest.mark.parametrize("reach", REACHES)
@pytest.mark.parametrize("settings", RULES, ids=str)
def test_refreshed_in_every_pass_it_is_exact(random_diffuser, right_shift, reach, settings):
    model, batch = random_diffuser(right_shift), left_padded([7, 2, 5, 1])
    settings = {"max_new_tokens": NEW, "eos_token_id": [2, 3, 4, 5], "pad_token_id": 0, **settings}
    exact = generate(model, **batch, **settings, return_dict_in_generate=True)
    settings |= {"approximate_cache": reach, "cache_refresh_steps": 1}
    cached = generate(model, **batch, **settings, return_dict_in_generate=True)
    assert torch.equal(cached.sequences, exact.sequences)
    assert torch.equal(cached.nfe, exact.nfe)
    assert torch.equal(cached.tokens_per_forward, exact.tokens_per_forward)


@pytest.mark.parametrize("reach", REACHES)
def test_one_pass_over_one_block_is_exact(random_diffuser, reach):
    model, batch = random_diffuser(True), left_padded([7, 2])
    settings = {"max_new_tokens": NEW, "eos_token_id": None, "steps": 1}
    assert torch.equal(
        generate(model, **batch, **settings, approximate_cache=reach), generate(model, **batch, **settings)
    )


@pytest.mark.parametrize("right_shift", [True, False])
@pytest.mark.parametrize("reach", REACHES)
@pytest.mark.parametrize("settings", RULES, ids=str)
def test_a_ragged_batch_equals_one_by_one(random_diffuser, right_shift, reach, settings):
    """Rows wait for each other at the end of a block; neither tokens nor passes may know."""
    model, lengths = random_diffuser(right_shift), [7, 2, 5, 1]
    batch = left_padded(lengths)
    settings = {"max_new_tokens": NEW, "eos_token_id": [2, 3, 4, 5], "approximate_cache": reach, **settings}
    together = generate(model, **batch, **settings, pad_token_id=0, return_dict_in_generate=True)
    for row, n in enumerate(lengths):
        own = {name: value[row : row + 1, -n:] for name, value in batch.items()}
        alone = generate(model, **own, **settings, pad_token_id=0, return_dict_in_generate=True)
        answer = alone.sequences[0, n:].tolist()
        assert together.sequences[row, 7:].tolist() == answer + [0] * (together.sequences.shape[1] - 7 - len(answer))
        assert together.nfe[row] == alone.nfe[0]


@pytest.mark.parametrize("right_shift", [True, False])
@pytest.mark.parametrize("reach", REACHES)
def test_gaps_in_rows_of_any_length(random_diffuser, right_shift, reach):
    """Rows with fewer masks are filled up with columns that must leave their keys as they are."""
    model = random_diffuser(right_shift)
    rows = [[5, MASK, 7, MASK, MASK, 9, 4, MASK, 3], [MASK, 6, 8], [3, 4, MASK, MASK, 8]]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    settings = DiffusionGenerationConfig(mask_token_id=MASK, approximate_cache=reach)
    together = fill_masks(model, ids, mask, settings)
    for row, own in enumerate(rows):
        alone = fill_masks(model, torch.tensor([own]), torch.ones(1, len(own), dtype=torch.long), settings)
        assert together.sequences[row, : len(own)].tolist() == alone.sequences[0].tolist()
        assert together.nfe[row] == alone.nfe[0] == own.count(MASK)
    assert len(fill_gaps(model, [[5, 6], [7, 8]], settings, max_gap_length=3)) == 1


def widths(model, **settings):
    """Columns of every forward."""
    seen, inner = [], model.forward

    def forward(*args, **kwargs):
        seen.append(kwargs["input_ids"].shape[-1])
        return inner(*args, **kwargs)

    with Patch() as patch:
        patch.set(model, "forward", forward)
        output = generate(
            model, **left_padded([7]), max_new_tokens=NEW, eos_token_id=None, return_dict_in_generate=True, **settings
        )
    return seen, output


def test_only_what_is_said_is_computed(random_diffuser):
    """And every forward counts, whatever its width."""
    model, settings = random_diffuser(True), {"block_length": 4, "steps": 9}
    check_canvas_cache(model)  # probes once
    for reach, narrow in (("prefix", [13, 9, 5]), ("dual", [5, 5, 5])):
        seen, output = widths(model, approximate_cache=reach, **settings)
        assert seen == [width for n in narrow for width in (19, n, n)]
        assert output.nfe.tolist() == [9]
        assert output.tokens_per_forward.tolist() == [pytest.approx(12 / 9)]
    seen, _ = widths(model, approximate_cache="dual", cache_refresh_steps=2, **settings)
    assert seen == [19, 5, 19] * 3


def test_it_is_approximate(random_diffuser):
    """Some answers differ from the model's own and from each other, or nothing was kept."""
    model, settings = random_diffuser(False), {"max_new_tokens": NEW, "eos_token_id": None, "block_length": 4}
    batch = left_padded([5] * 8)
    answers = {
        generate(model, **batch, **settings, approximate_cache=reach).numpy().tobytes() for reach in (None, *REACHES)
    }
    assert len(answers) == 3


def test_what_is_kept_is_what_the_whole_forward_computed(random_diffuser):
    model, batch = random_diffuser(True), left_padded([6, 3])
    ids, mask = batch["input_ids"], batch["attention_mask"]
    inputs = {**batch, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0), "logits_to_keep": torch.tensor([[4, 5]] * 2)}
    block = torch.tensor([[0, 0, 0, 0, 1, 1]] * 2).bool()
    host, cache = DynamicCache(), CanvasCache("dual")
    with torch.no_grad():
        want = model(**{k: v for k, v in inputs.items() if k != "logits_to_keep"}, past_key_values=host).logits
        first = model(**cache.inputs(inputs, 0, block, shift=True), past_key_values=cache, use_cache=True).logits
        torch.testing.assert_close(first, want[:, 4:])
        for ours, theirs in zip(cache.layers, host.layers, strict=True):
            assert torch.equal(ours.keys[:, :, :-1], theirs.keys) and torch.equal(ours.values[:, :, :-1], theirs.values)
        changed = {**inputs, "input_ids": ids.clone()}
        changed["input_ids"][:, 5] = 9
        again = cache.inputs(changed, 0, block, shift=True)
        assert again["input_ids"].tolist() == changed["input_ids"][:, 3:].tolist()
        model(**again, past_key_values=cache, use_cache=True)
    for ours, theirs in zip(cache.layers, host.layers, strict=True):
        assert torch.equal(ours.keys[:, :, :3], theirs.keys[:, :, :3])
    assert not torch.equal(cache.layers[0].keys[:, :, 5], host.layers[0].keys[:, :, 5])


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["gpt2", "stablelm"])
@pytest.mark.parametrize("reach", REACHES)
def test_other_architectures(family, implementation, reach):
    torch.manual_seed(0)
    small = {"vocab_size": 32, "initializer_range": 0.4, "attn_implementation": implementation, "eos_token_id": 2}
    if family == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, **small)).eval()
    else:
        shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        model = StableLmForCausalLM(StableLmConfig(num_key_value_heads=2, **shape, **small)).eval()
    patch_causal_attention(model)
    model.config.diffusion = {"attention": "bidirectional", "right_shift_logits": True, "mask_token_id": MASK}
    batch = left_padded([6])
    output = generate(
        model, **batch, max_new_tokens=NEW, eos_token_id=None, block_length=4, threshold=0.5, approximate_cache=reach
    )
    want = fast_dllm(model, batch["input_ids"][0].tolist(), reach, block_length=4, threshold=0.5)
    assert output[0].tolist() == want[-1]


def test_where_it_is_refused(random_diffuser, random_llama, tokenizer):
    model, batch = random_diffuser(True), left_padded([4])
    for settings, named in (
        ({"approximate_cache": "both"}, "`approximate_cache` must be 'prefix', 'dual' or None, got 'both'"),
        ({"approximate_cache": True}, "`approximate_cache` must be"),
        ({"approximate_cache": "dual", "use_cache": False}, "`use_cache`=False"),
        ({"cache_refresh_steps": 2}, "`cache_refresh_steps`=2 belongs to `approximate_cache`"),
        ({"approximate_cache": "dual", "cache_refresh_steps": 0}, "`cache_refresh_steps` must be at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=named):
            generate(model, **batch, **settings)
    blocks = convert_to_diffusion(random_llama(), tokenizer, attention="block", block_length=4)
    with pytest.raises(ValueError, match="`attention`='block' has an exact cache"):
        generate(blocks, **batch, max_new_tokens=8, approximate_cache="dual")
    annealed = random_diffuser(True)
    set_final_causal_ratio(annealed, 0.5)
    with pytest.raises(ValueError, match="gives other logits when keys and values are kept"):
        generate(annealed, **batch, max_new_tokens=8, approximate_cache="dual")
