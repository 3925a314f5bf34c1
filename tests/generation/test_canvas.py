"""What a denoising step costs beside its arithmetic, in both engines, compiled too; and the approximate cache against Fast-dLLM's algorithm."""

import pytest
import torch
from generation.test_blocks import block_model, left_padded
from torch._dynamo.utils import counters
from torch.overrides import TorchFunctionMode
from training.test_engine import Waits
from transformers import AutoTokenizer, DynamicCache, GPT2Config, GPT2LMHeadModel, StableLmConfig, StableLmForCausalLM

from llm_diffusion import DiffusionGenerationConfig, convert_to_diffusion, generate
from llm_diffusion.generation.canvas import CanvasCache, check_canvas_cache, fill_masks
from llm_diffusion.generation.inference import fill_gaps
from llm_diffusion.models.attention import patch_causal_attention
from llm_diffusion.models.checkpoints import TINY_MODEL_PATH
from llm_diffusion.models.conversion import set_final_causal_ratio
from llm_diffusion.models.patching import Patch

MASK = 31


class Reads(TorchFunctionMode):
    """Lists read from a tensor, which a dispatch mode does not see on a CPU."""

    count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.Tensor.tolist
        return func(*args, **(kwargs or {}))


def waits_of(model, batch, **settings):
    """How often the host waits for the device, and forward passes of the batch."""
    passes, inner = [], model.forward
    model.forward = lambda *args, **kwargs: passes.append(1) or inner(*args, **kwargs)
    try:
        with Waits() as waits, Reads() as reads:
            output = generate(
                model, **batch, max_new_tokens=8, pad_token_id=0, return_dict_in_generate=True, **settings
            )
    finally:
        model.forward = inner
    return waits.count + reads.count, len(passes), output


RULES = [
    {},
    {"steps": 6},
    {"threshold": 0.3},
    {"factor": 1.0},
    {"entropy_bound": 1.0},
    {"temperature": 1.0, "top_p": 0.9},
    {"guidance_scale": 2.0},
    {"repetition_penalty": 1.3, "bad_words_ids": [[3, 4]]},
    {"revision": "p2", "steps": 12},
    {"threshold": 0.3, "editing_threshold": 0.3},
]
START, END = 4, 2  # reads of a call, before the first pass, one of them to check what is given, and behind the last one


@pytest.mark.parametrize("settings", RULES, ids=str)
@pytest.mark.parametrize("block_length", [None, 4])
@pytest.mark.parametrize("lengths", [[7, 7, 7], [7, 1, 4]], ids=["even", "ragged"])
def test_the_host_waits_once_a_pass(random_diffuser, settings, block_length, lengths):
    """Of padded rows the host library reads the padding mask once more."""
    batch = left_padded(lengths)
    batch["input_ids"] %= MASK - 1
    ends = [2, 3] if "revision" not in settings else None
    found = waits_of(random_diffuser(True), batch, block_length=block_length, eos_token_id=ends, **settings)
    waits, passes, output = found
    assert passes >= output.nfe.max() / (2 if "guidance_scale" in settings else 1)
    assert waits <= START + END + passes * (1 if lengths == [7, 7, 7] else 2)


@pytest.mark.parametrize("settings", RULES, ids=str)
def test_the_host_waits_once_a_pass_with_a_cache(settings):
    waits, passes, _ = waits_of(block_model(4), left_padded([9, 3, 8]), eos_token_id=[2, 50], **settings)
    assert waits <= START + 1 + END + passes  # the prefill is read too


def test_the_waits_are_counted(random_diffuser):
    """A pass is never free of one: what decides whether there is another is read."""
    batch = left_padded([7, 7])
    batch["input_ids"] %= MASK - 1
    waits, passes, output = waits_of(random_diffuser(True), batch, eos_token_id=None)
    assert passes == 8 and waits >= passes
    assert output.nfe.tolist() == [8, 8]
    waits, passes, _ = waits_of(block_model(4), batch, eos_token_id=None)
    assert waits >= passes - 1  # the prefill


def test_no_pass_is_made_for_rows_that_are_done(random_diffuser):
    """The longest row's passes are all there are."""
    batch = left_padded([7, 1, 4, 5])
    batch["input_ids"] %= MASK - 1
    ends = list(range(2, 10))
    _, passes, output = waits_of(random_diffuser(True), batch, eos_token_id=ends, threshold=0.3)
    assert len(set(output.nfe.tolist())) > 1
    assert passes == output.nfe.max()


def one_layer(random_diffuser, random_llama, attention):
    if attention == "bidirectional":
        return random_diffuser(True, num_hidden_layers=1)
    tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL_PATH)
    return convert_to_diffusion(random_llama(num_hidden_layers=1), tokenizer, attention="block", block_length=4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("attention", "how", "graphs", "settings"),
    [
        ("bidirectional", "forward", 1, {"threshold": 0.3, "block_length": 5}),
        # The whole canvas, a block, the last block.
        ("bidirectional", "in place", 3, {"threshold": 0.3, "block_length": 4, "approximate_cache": "dual"}),
        ("bidirectional", "wrapped", 1, {"revision": "p2", "steps": 8}),
        # The prompt, a first block, and blocks behind a finished one; the cache's length once as a number, then as a variable.
        ("block", "forward", 6, {"threshold": 0.3}),
    ],
)
def test_a_compiled_model_says_the_same_from_few_graphs(
    random_diffuser, random_llama, attention, how, graphs, settings
):
    """Rows end at different times, and a second batch of that shape comes: no graph of its own for either."""
    torch._dynamo.reset()
    model = one_layer(random_diffuser, random_llama, attention)
    batches = [left_padded([7, 1, 4, 5], seed) for seed in range(2)]
    for batch in batches:
        batch["input_ids"] %= MASK - 1
    settings = {**settings, "max_new_tokens": 18, "pad_token_id": 0, "return_dict_in_generate": True}
    settings["eos_token_id"] = [*range(2, 8), *range(MASK + 1, min(200, model.config.vocab_size))]
    want = [generate(model, **batch, **settings) for batch in batches]
    assert len({n for output in want for n in output.nfe.tolist()}) > 1 or "revision" in settings
    options = {"backend": "eager", "dynamic": True}
    if how == "forward":
        model.forward = torch.compile(model.forward, **options)
    elif how == "in place":
        model.compile(**options)
    else:
        model = torch.compile(model, **options)
    counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=False, fail_on_recompile_limit_hit=True):
        found = [generate(model, **batch, **settings) for batch in batches]
    for ours, theirs in zip(found, want, strict=True):
        assert torch.equal(ours.sequences, theirs.sequences) and torch.equal(ours.nfe, theirs.nfe)
    assert 1 <= counters["stats"]["unique_graphs"] <= graphs
    assert not counters["graph_break"]


NEW = 12
REACHES = ("prefix", "dual")


def small_prompts(lengths, seed=0):
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
        batch = small_prompts([length], seed)
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


CACHE_RULES = [
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
@pytest.mark.parametrize("settings", CACHE_RULES, ids=str)
def test_refreshed_in_every_pass_it_is_exact(random_diffuser, right_shift, reach, settings):
    model, batch = random_diffuser(right_shift), small_prompts([7, 2, 5, 1])
    settings = {"max_new_tokens": NEW, "eos_token_id": [2, 3, 4, 5], "pad_token_id": 0, **settings}
    exact = generate(model, **batch, **settings, return_dict_in_generate=True)
    settings |= {"approximate_cache": reach, "cache_refresh_steps": 1}
    cached = generate(model, **batch, **settings, return_dict_in_generate=True)
    assert torch.equal(cached.sequences, exact.sequences)
    assert torch.equal(cached.nfe, exact.nfe)
    assert torch.equal(cached.tokens_per_forward, exact.tokens_per_forward)


@pytest.mark.parametrize("reach", REACHES)
def test_one_pass_over_one_block_is_exact(random_diffuser, reach):
    model, batch = random_diffuser(True), small_prompts([7, 2])
    settings = {"max_new_tokens": NEW, "eos_token_id": None, "steps": 1}
    assert torch.equal(
        generate(model, **batch, **settings, approximate_cache=reach), generate(model, **batch, **settings)
    )


@pytest.mark.parametrize("right_shift", [True, False])
@pytest.mark.parametrize("reach", REACHES)
@pytest.mark.parametrize("settings", CACHE_RULES, ids=str)
def test_a_ragged_batch_with_a_cache_equals_one_by_one(random_diffuser, right_shift, reach, settings):
    """Rows wait for each other at the end of a block; neither tokens nor passes may know."""
    model, lengths = random_diffuser(right_shift), [7, 2, 5, 1]
    batch = small_prompts(lengths)
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
            model, **small_prompts([7]), max_new_tokens=NEW, eos_token_id=None, return_dict_in_generate=True, **settings
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
    batch = small_prompts([5] * 8)
    answers = {
        generate(model, **batch, **settings, approximate_cache=reach).numpy().tobytes() for reach in (None, *REACHES)
    }
    assert len(answers) == 3


def test_what_is_kept_is_what_the_whole_forward_computed(random_diffuser):
    model, batch = random_diffuser(True), small_prompts([6, 3])
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
    batch = small_prompts([6])
    output = generate(
        model, **batch, max_new_tokens=NEW, eos_token_id=None, block_length=4, threshold=0.5, approximate_cache=reach
    )
    want = fast_dllm(model, batch["input_ids"][0].tolist(), reach, block_length=4, threshold=0.5)
    assert output[0].tolist() == want[-1]


def test_where_it_is_refused(random_diffuser, random_llama, tokenizer):
    batch = small_prompts([4])
    blocks = convert_to_diffusion(random_llama(), tokenizer, attention="block", block_length=4)
    with pytest.raises(ValueError, match="approximate_cache"):
        generate(blocks, **batch, max_new_tokens=8, approximate_cache="dual")
    annealed = random_diffuser(True)
    set_final_causal_ratio(annealed, 0.5)
    with pytest.raises(ValueError, match="approximate_cache"):
        generate(annealed, **batch, max_new_tokens=8, approximate_cache="dual")
