"""Ends foreseen at the first step: against full logits, plain loops, and decoding with the length given."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.streamers import BaseStreamer

from llm_diffusion import generate
from llm_diffusion.generation.config import DiffusionGenerationConfig
from llm_diffusion.generation.lengths import (
    end_probabilities,
    fill_sized,
    predict_lengths,
    quantile_lengths,
)
from llm_diffusion.generation.step import fill_behind_ends

MASK, EOS = 31, 2
few = settings(max_examples=50, deadline=None, derandomize=True)
curves = st.lists(st.floats(0, 1), min_size=1, max_size=9)


def prompts() -> tuple[torch.Tensor, torch.Tensor]:
    """Two prompts, the first of three tokens, padded on the left, the second of five."""
    ids = torch.tensor([[0, 0, 5, 6, 7], [8, 9, 10, 11, 12]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    return ids, mask


@pytest.mark.parametrize("shift", [True, False])
def test_the_end_is_read_from_full_logits(random_diffuser, shift: bool) -> None:
    model, (ids, mask), ends = random_diffuser(shift), prompts(), torch.tensor([EOS, 4])
    canvas = torch.cat([ids, torch.full((2, 6), MASK)], -1)
    canvas[0, 6], canvas[1, 8] = 14, EOS  # known tokens
    mask = torch.cat([mask, torch.ones(2, 6, dtype=torch.long)], -1)
    got = end_probabilities(model, canvas, mask, 5, ends)
    for row in range(2):
        alone = canvas[row][mask[row].bool()][None]
        start = alone.shape[1] - 6
        logits = model(input_ids=alone).logits[0].double()
        logits[:, MASK] = -torch.inf
        for place in range(6):
            read = start + place - (1 if shift else 0)
            want = logits[read].softmax(-1)[ends].sum()
            if (row, place) in ((0, 1), (1, 3)):
                want = torch.tensor(float(row))
            assert got[row, place].item() == pytest.approx(want.item(), abs=1e-5)


@few
@given(curve=curves, quantile=st.floats(0.01, 0.99))
def test_the_quantile_is_the_first_place_that_reaches_it(curve: list[float], quantile: float) -> None:
    curve, quantile = torch.tensor(curve), torch.tensor(quantile).item()
    want = next((i + 1 for i, p in enumerate(curve.tolist()) if p >= quantile), len(curve) + 1)
    assert quantile_lengths(curve[None], quantile).item() == want


def config(**options: object) -> DiffusionGenerationConfig:
    common = {"max_new_tokens": 12, "mask_token_id": MASK, "eos_token_id": EOS, "pad_token_id": 0, "initial_length": 3}
    return DiffusionGenerationConfig(**{**common, **options})


@pytest.mark.parametrize("quantile", [0.02, 0.05, 0.1])
def test_canvases_double_until_the_answer_ends_in_them(random_diffuser, quantile: float) -> None:
    """Row by row, every canvas in turn."""
    model, (ids, mask), chosen = random_diffuser(True), prompts(), config(length_quantile=quantile)
    lengths, nfe = predict_lengths(model, ids, mask, chosen, longest=10)
    for row in range(2):
        tried = 0
        for width in (3, 6, 10):
            tried += 1
            alone = torch.cat([ids[row][mask[row].bool()], torch.full((width,), MASK)])[None]
            said = end_probabilities(model, alone, torch.ones_like(alone), alone.shape[1] - width, torch.tensor([EOS]))
            want = quantile_lengths(said, quantile).item()
            if want <= width:
                break
        assert (lengths[row].item(), nfe[row].item()) == (min(want, 10), tried)


@pytest.mark.parametrize("margin", [0, 2])
def test_a_sized_canvas_is_a_canvas_of_that_size(random_diffuser, margin: int) -> None:
    """Token for token what plain decoding of the row alone says when it is given that many new tokens."""
    model, (ids, mask) = random_diffuser(True, seed=3), prompts()
    chosen = config(length_quantile=0.04, length_margin=margin)
    lengths, passes = predict_lengths(model, ids, mask, chosen, longest=12)
    lengths = (lengths + margin).clamp(max=12)
    output = fill_sized(model, ids, mask, chosen)
    assert output.sequences.shape == (2, 17) and not (output.sequences == MASK).any()
    for row in range(2):
        alone, n = ids[row][mask[row].bool()][None], int(lengths[row])
        plain = generate(
            model,
            alone,
            max_new_tokens=n,
            mask_token_id=MASK,
            eos_token_id=EOS,
            pad_token_id=EOS,
            return_dict_in_generate=True,
        )
        answer = plain.sequences[0, alone.shape[1] :]
        assert torch.equal(output.sequences[row, 5 : 5 + len(answer)], answer)
        if n == 12 or (answer == EOS).any():
            assert passes[row] < output.nfe[row] <= passes[row] + plain.nfe[0]


def test_a_canvas_that_was_too_short_goes_on(random_diffuser) -> None:
    """Without an end token in it, the text so far is the prompt of the next canvas."""
    model, (ids, mask) = random_diffuser(True, seed=1), prompts()
    seen = []
    output = fill_sized(
        model,
        ids,
        mask,
        config(length_quantile=0.01, initial_length=2, suppress_tokens=[EOS]),
        lambda c, sure: seen.append((c.clone(), sure.clone())),
    )
    assert not torch.isin(output.sequences[:, 5:], torch.tensor([EOS, MASK])).any()
    assert output.nfe.min() > 12  # one token a step, and the first steps
    assert torch.equal(seen[-1][0], output.sequences) and (seen[-1][1][:, 5:] > 0).all()


@pytest.mark.parametrize("options", [{}, {"block_length": 2, "steps": 9}, {"threshold": 0.1}], ids=str)
def test_canvases_that_go_on_do_not_depend_on_the_batch(random_diffuser, options) -> None:
    """One row has less room left than others, and a shorter canvas."""
    (ids, mask), chosen = prompts(), config(length_quantile=0.05, initial_length=2, **options)
    for seed in range(6):
        model = random_diffuser(True, seed=seed)
        both = fill_sized(model, ids, mask, chosen)
        for row in range(2):
            alone = ids[row][mask[row].bool()][None]
            want = fill_sized(model, alone, torch.ones_like(alone), chosen)
            assert both.sequences[row, 5:].tolist() == want.sequences[0, alone.shape[1] :].tolist()
            assert both.nfe[row] == want.nfe[0]


class Tokens(BaseStreamer):
    """All that were put, one behind the other."""

    def __init__(self) -> None:
        self.puts: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        self.puts += value.flatten().tolist()

    def end(self) -> None:
        pass


def test_nothing_behind_an_end_is_streamed(random_diffuser) -> None:
    """A row is seen to have ended in the step that ends it."""
    for seed in range(6):
        streamer = Tokens()
        settings = {"length_quantile": 0.01, "initial_length": 4, "length_margin": 2, "block_length": 1}
        ends = {"mask_token_id": MASK, "eos_token_id": [2, 3, 7, 11, 13, 17, 19, 23], "max_new_tokens": 12}
        ids = generate(random_diffuser(True, seed=seed), torch.tensor([[5, 6]]), streamer=streamer, **settings, **ends)
        assert streamer.puts == ids[0].tolist()


def test_a_row_that_is_given_up_is_decoded_no_further(random_diffuser) -> None:
    """On this canvas and on those that would come behind it; the other row is as in company."""
    model, (ids, mask) = random_diffuser(True, seed=1), prompts()
    chosen = config(length_quantile=0.01, initial_length=2, suppress_tokens=[EOS])
    whole = fill_sized(model, ids, mask, chosen)
    some = fill_sized(model, ids, mask, chosen, lambda *_: torch.tensor([True, False]))
    assert torch.equal(some.sequences[1], whole.sequences[1]) and some.nfe[1] == whole.nfe[1]
    assert some.nfe[0] < 4 < 12 < whole.nfe[0]


def test_sized_canvases_through_generate(random_diffuser) -> None:
    model, (ids, mask) = random_diffuser(True, seed=3), prompts()
    settings = {"mask_token_id": MASK, "eos_token_id": EOS, "pad_token_id": 0, "max_new_tokens": 12}
    output = generate(
        model, ids, mask, length_quantile=0.04, initial_length=3, return_dict_in_generate=True, **settings
    )
    whole = fill_sized(model, ids, mask, config(length_quantile=0.04)).sequences
    ended = (whole[:, 5:] == EOS).long().cumsum(-1) - (whole[:, 5:] == EOS).long() > 0
    want = whole[:, 5:].masked_fill(ended, 0)[:, : output.sequences.shape[1] - 5]
    assert torch.equal(output.sequences[:, 5:], want)
    with pytest.raises(ValueError, match="`length_quantile`"):
        generate(model, ids, mask, length_quantile=0.5, **{**settings, "eos_token_id": None})
    with pytest.raises(ValueError, match="length_quantile"):
        generate(model, ids, mask, length_quantile=1.0, **settings)


def test_a_sized_canvas_shrinks_to_its_first_end() -> None:
    """What stands behind a committed end is no longer decoded, whatever is open before it."""
    ids = torch.tensor([[5, MASK, EOS, MASK, MASK], [5, MASK, 6, MASK, EOS]])
    was_open, eos = torch.ones_like(ids, dtype=torch.bool), torch.tensor([EOS])
    was_open[:, 0] = False
    busy = torch.tensor([False, False])
    sized = fill_behind_ends(ids, was_open, eos, config(length_quantile=0.5), busy)
    assert sized.tolist() == [[5, MASK, EOS, EOS, EOS], [5, MASK, 6, MASK, EOS]]
    whole = fill_behind_ends(ids, was_open, eos, config(), busy)
    assert torch.equal(whole, ids)
