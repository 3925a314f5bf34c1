"""What a denoising step costs beside its arithmetic, in both engines: waits for the device, compiled models."""

import pytest
import torch
from test_block_decoding import block_model, left_padded
from test_engine import Waits
from torch.overrides import TorchFunctionMode

from llm_diffusion import generate

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
