"""The way from causal to bidirectional: schedules against their formulas, masks against what they must do to attention."""

import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llm_diffusion import UserError
from llm_diffusion.objective.annealing import SCHEDULES, Annealing, AnnealingSettings, stochastic
from llm_diffusion.objective.attention_masks import (
    additive,
    annealed,
    bidirectional,
    block_causal,
)
from llm_diffusion.objective.settings import check_settings

ONE_TEXT = torch.ones(1, 12, dtype=torch.long)


NAMES = {
    "initial": "initial_causal_ratio",
    "final": "final_causal_ratio",
    "decay": "annealing_decay",
    "points": "annealing_points",
}


def annealing(schedule="linear", total_steps=100, mode="soft", **options):
    if schedule == "step":
        options.setdefault("points", [[10, 0.8], [50, 0.25]])
    options = {NAMES[name]: value for name, value in options.items()}
    return Annealing(AnnealingSettings(annealing=mode, annealing_schedule=schedule, **options), total_steps)


def attend(bias, seed=0):
    """Softmax attention of random queries, keys and values under an additive (B, 1, L, L) mask."""
    generator = torch.Generator().manual_seed(seed)
    length = bias.shape[-1]
    q, k, v = (torch.randn(1, 1, length, 8, generator=generator) for _ in range(3))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)


@pytest.mark.parametrize(
    ("schedule", "formula"),
    [
        ("linear", lambda p: 1 - p),
        ("cosine", lambda p: 0.5 * (1 + math.cos(math.pi * p))),
        ("exponential", lambda p: (math.exp(-5 * p) - math.exp(-5)) / (1 - math.exp(-5))),
        ("step", lambda p: 1.0 if p < 0.1 else 0.8 if p < 0.5 else 0.25),
    ],
)
def test_schedules(schedule, formula):
    for step in range(100):
        assert annealing(schedule).causal_ratio(step) == pytest.approx(formula(step / 100), abs=1e-12)
        between = annealing(schedule, initial=0.9, final=0.2).causal_ratio(step)
        assert between == pytest.approx(0.2 + 0.7 * formula(step / 100), abs=1e-12)


def test_points_may_stand_in_any_order():
    assert [annealing("step", points=[[50, 0.25], [10, 0.8]]).causal_ratio(step) for step in (9, 10, 49, 50)] == [
        1.0,
        0.8,
        0.8,
        0.25,
    ]


@given(st.sampled_from(SCHEDULES), st.integers(0, 300))
def test_the_ratio_falls_from_its_start_to_its_end_and_stays(schedule, step):
    path = annealing(schedule, final=0.1)
    assert path.causal_ratio(0) == pytest.approx(1.0)
    assert path.causal_ratio(step) >= path.causal_ratio(step + 1)
    assert path.causal_ratio(100 + step) == 0.1


def test_blocks_double_until_the_target():
    path = annealing(mode="block", total_steps=30)
    assert [path.block_length(step, 8) for step in (0, 9, 10, 19, 20, 29, 30, 99)] == [1, 1, 2, 2, 4, 4, 8, 8]
    assert [path.block_length(step, 6) for step in (0, 10, 20, 29, 30)] == [1, 2, 4, 4, 6]
    assert path.block_length(0, 1) == path.block_length(50, 1) == 1


@pytest.mark.parametrize("mode", ["soft", "stochastic", "block"])
def test_every_way_starts_causal_and_ends_without_a_mask(mode):
    start = annealing(mode=mode).mask(ONE_TEXT, 0, seed=0, longest=12)
    torch.testing.assert_close(attend(start), attend(additive(block_causal(ONE_TEXT, 1))), atol=0, rtol=0)
    assert annealing(mode=mode).mask(ONE_TEXT, 100, seed=0, longest=12) is None


def test_a_soft_mask_scales_the_shares_of_the_future():
    """Second formula: the softmax's shares of later keys times 1 - ratio, normalised again."""
    generator = torch.Generator().manual_seed(3)
    scores, later = torch.randn(12, 12, generator=generator), torch.ones(12, 12).triu(1).bool()
    for ratio in (0.0, 0.3, 0.99, 1.0):
        shares = scores.softmax(-1) * torch.where(later, 1 - ratio, 1.0)
        want = shares / shares.sum(-1, keepdim=True)
        got = (scores + annealed(ONE_TEXT, ratio)[0, 0]).softmax(-1)
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-5)


def test_stochastic_masks_open_the_future_at_the_asked_rate():
    documents, past = torch.ones(1, 60, dtype=torch.long), torch.ones(60, 60).tril().bool()
    draws = torch.stack([stochastic(documents, 0.3, seed=1, step=step)[0] for step in range(50)])
    assert draws[:, past].all()
    assert draws[:, ~past].float().mean() == pytest.approx(0.7, abs=0.005)
    assert not torch.equal(draws[0], draws[1])
    assert torch.equal(draws[7], stochastic(documents, 0.3, seed=1, step=7)[0])
    assert not torch.equal(draws[7], stochastic(documents, 0.3, seed=2, step=7)[0])


@pytest.mark.parametrize("mode", ["soft", "stochastic", "block"])
@pytest.mark.parametrize("step", [0, 40, 99])
def test_annealed_texts_of_a_packed_row_never_see_each_other_or_padding(mode, step):
    documents = torch.tensor([[1, 1, 1, 2, 2, 3, 3, 3, 0, 0]])
    mask = annealing(mode=mode).mask(documents, step, seed=0, longest=16)
    hidden = ~bidirectional(documents)[:, None]
    assert (mask[hidden] == torch.finfo(mask.dtype).min).all()
    assert (mask[0, 0].diagonal()[:8] == 0).all()


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"annealing": "hard"}, "annealing"),
        ({"annealing_schedule": "sudden"}, "annealing_schedule"),
        ({"annealing_steps": 0}, "annealing_steps"),
        ({"initial_causal_ratio": 1.5}, "initial_causal_ratio"),
        ({"final_causal_ratio": 1.0}, "final_causal_ratio"),
        ({"initial_causal_ratio": 0.2, "final_causal_ratio": 0.5}, "final_causal_ratio"),
        ({"annealing": None, "final_causal_ratio": 0.5}, "final_causal_ratio"),
        ({"annealing": "block", "final_causal_ratio": 0.5}, "annealing"),
        ({"annealing_decay": 0}, "annealing_decay"),
        ({"annealing_schedule": "step"}, "annealing_points"),
        ({"annealing_points": [[1, 0.5]]}, "annealing_points"),
        ({"annealing_schedule": "step", "annealing_points": [[1, 2.0]]}, "annealing_points"),
        ({"annealing_schedule": "step", "annealing_points": [[1, -0.5]]}, "annealing_points"),
        ({"annealing_schedule": "step", "annealing_points": [[1, 0.5], [2, 0.5, 3]]}, "annealing_points"),
        ({"annealing_schedule": "step", "annealing_points": [[1, "x"]]}, "annealing_points[0][1]"),
        ({"annealing": "block", "initial_causal_ratio": 0.5}, "annealing"),
    ],
)
def test_bad_settings_are_named(options, field):
    chosen = AnnealingSettings(**{"annealing": "soft", **options})
    with pytest.raises(UserError, match=re.escape(f"`{field}`")):
        check_settings(chosen)
        chosen.check_annealing()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"annealing": None},
        {"annealing": "block"},
        {"initial_causal_ratio": 0.5, "final_causal_ratio": 0.5},
        {"annealing_schedule": "step", "annealing_points": [[0, 1.0], [5, 0.0]]},
    ],
)
def test_settings_that_go_together_pass(options):
    chosen = AnnealingSettings(**{"annealing": "soft", **options})
    check_settings(chosen)
    chosen.check_annealing()


@pytest.mark.parametrize("mode", ["soft", "stochastic"])
def test_what_is_left_of_causality_is_a_soft_mask_for_good(mode):
    for step in (100, 500):
        found = annealing(mode=mode, final=0.25).mask(ONE_TEXT, step, seed=0, longest=12)
        assert torch.equal(found, annealed(ONE_TEXT, 0.25))
    assert annealing(mode=mode, final=0.25).mask(ONE_TEXT, 0, seed=0, longest=12).shape == (1, 1, 12, 12)
