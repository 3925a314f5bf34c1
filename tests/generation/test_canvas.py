"""What a denoising step costs beside its arithmetic, in both engines: waits for the device, compiled models."""

import pytest
import torch
from generation.test_blocks import block_model, left_padded
from torch._dynamo.utils import counters
from torch.overrides import TorchFunctionMode
from training.test_engine import Waits
from transformers import AutoTokenizer

from llm_diffusion import convert_to_diffusion, generate
from llm_diffusion.models.checkpoints import TINY_MODEL_PATH

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
                model, **batch, max_new_tokens=12, pad_token_id=0, return_dict_in_generate=True, **settings
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
START, END = 3, 2  # reads of a call, before the first pass and behind the last one


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
def test_the_host_waits_once_a_pass_and_once_a_block(settings):
    waits, passes, _ = waits_of(block_model(4), left_padded([9, 3, 8]), eos_token_id=[2, 50], **settings)
    assert waits <= START + END + passes + 4  # blocks


def test_the_waits_are_counted(random_diffuser):
    """A pass is never free of one: what decides whether there is another is read."""
    batch = left_padded([7, 7])
    batch["input_ids"] %= MASK - 1
    waits, passes, output = waits_of(random_diffuser(True), batch, eos_token_id=None)
    assert passes == 12 and waits >= passes
    assert output.nfe.tolist() == [12, 12]
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
    settings["eos_token_id"] = [*range(2, 8), *range(31, 200)]
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
