"""Gaps of unknown length, on a small model that has learned to count: only one length fits between two numbers."""

import pytest
import torch

import llm_diffusion as ld
from llm_diffusion.generation.infilling import fill_gaps

MASK = 31


@pytest.fixture(scope="module")
def counter(random_diffuser):
    """A bidirectional model of texts n, n + 1, n + 2, … (mod 30), trained by masked prediction for a few seconds."""
    model = random_diffuser(False, hidden_size=48, intermediate_size=96, initializer_range=0.08).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(400):
        start = torch.randint(30, (48, 1), generator=generator)
        length = int(torch.randint(4, 15, (), generator=generator))
        ids = (start + torch.arange(length)) % 30
        hidden = torch.rand(ids.shape, generator=generator) < torch.rand(48, 1, generator=generator)
        logits = model(torch.where(hidden, MASK, ids)).logits
        loss = torch.nn.functional.cross_entropy(logits[hidden], ids[hidden])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def settings(**own):
    return ld.DiffusionGenerationConfig(mask_token_id=MASK, eos_token_id=None, max_new_tokens=1, **own)


@pytest.mark.parametrize("own", [{}, {"threshold": 0.9}], ids=str)
@pytest.mark.parametrize(
    ("pieces", "want"),
    [
        ([[3, 4, 5], [7, 8, 9]], [[6]]),
        ([[3, 4, 5], [9, 10, 11]], [[6, 7, 8]]),
        ([[12, 13, 14], [20, 21, 22]], [[15, 16, 17, 18, 19]]),
        ([[3, 4, 5], [7, 8, 9], [13, 14, 15]], [[6], [10, 11, 12]]),
    ],
    ids=str,
)
def test_the_length_that_fits_is_found(counter, pieces, want, own):
    assert fill_gaps(counter, pieces, settings(**own), max_gap_length=7) == want


def test_candidates_do_not_depend_on_the_batch(counter):
    pieces = [[3, 4, 5], [9, 10, 11]]
    assert fill_gaps(counter, pieces, settings(), 7, batch_size=2) == fill_gaps(counter, pieces, settings(), 7)


@pytest.mark.parametrize(
    ("pieces", "longest", "named"),
    [
        ([[3, 4]], 4, "`pieces`.*1"),
        ([[3], [4]], 0, "`max_gap_length`.*0"),
        ([[3], [4]], 2.5, "`max_gap_length`.*2.5"),
        ([[3] * 30, [4] * 30], 8, "`max_gap_length`=8.*68.*64"),
    ],
    ids=["one piece", "no room", "half a token", "too long"],
)
def test_bad_input_is_named(counter, pieces, longest, named):
    with pytest.raises(ValueError, match=named):
        fill_gaps(counter, pieces, settings(), longest)


def test_models_that_do_not_see_what_follows_are_refused(random_llama, tokenizer):
    model = ld.convert_to_diffusion(random_llama(), tokenizer, attention="block", block_length=4)
    with pytest.raises(ValueError, match="`attention`='block'.*behind a gap"):
        fill_gaps(model, [[3], [4]], settings())
