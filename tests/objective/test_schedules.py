"""Noise schedules: weights follow from probabilities, and the NELBO does not depend on the schedule."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from oracle import MarkovChain

from llm_diffusion.objective.noise import MIN_TIME, NOISE_SCHEDULES, get_noise_schedule

# 1 - alpha(t) in fp64, written down again from the papers.
MASK_PROBABILITY = {
    "linear": lambda t: t,
    "cosine": lambda t: math.cos(math.pi / 2 * (1 - t)),
    "beta_linear": lambda t: (1 - math.exp(-(0.1 * t + 9.95 * t * t))) / (1 - math.exp(-10.05)),
    "beta_cosine": lambda t: (
        1 - math.cos(math.pi / 2 * (t + 0.008) / 1.008) ** 2 / math.cos(math.pi / 2 * 0.008 / 1.008) ** 2
    ),
}

every_schedule = pytest.mark.parametrize("name", sorted(NOISE_SCHEDULES))


def all_visible_patterns(length: int) -> torch.Tensor:
    """(2^L, L) bool, every subset once."""
    return torch.tensor(list(itertools.product([True, False], repeat=length)))


@pytest.mark.parametrize("n_states, stay", [(2, 0.8), (3, 0.8), (3, 0.2)])
def test_oracle_conditionals_equal_enumeration(n_states: int, stay: float) -> None:
    chain = MarkovChain(n_states, length=4, stay=stay)
    every_x = torch.tensor(list(itertools.product(range(n_states), repeat=4)))
    p_x = chain.log_prob(every_x).exp()
    assert p_x.sum() == pytest.approx(1)
    visible = all_visible_patterns(4)
    x = every_x[[5]].expand(len(visible), -1)
    fits = ((every_x[None] == x[:, None]) | ~visible[:, None]).all(-1)  # (patterns, sequences)
    one_hot = torch.nn.functional.one_hot(every_x, n_states).double()
    joint = torch.einsum("ms,s,sik->mik", fits.double(), p_x, one_hot)
    expected = joint / joint.sum(-1, keepdim=True)
    torch.testing.assert_close(chain.log_conditionals(x, visible).exp(), expected, rtol=1e-12, atol=1e-12)
    logits = chain(x.masked_fill(~visible, chain.mask_token_id))
    torch.testing.assert_close(logits.softmax(-1)[..., :-1], expected, rtol=1e-12, atol=1e-12)
    assert (logits.softmax(-1)[..., -1] == 0).all()


@every_schedule
def test_weight_is_minus_alpha_prime_over_one_minus_alpha(name: str) -> None:
    t = torch.linspace(MIN_TIME, 1, 500).requires_grad_()
    probability, weight = get_noise_schedule(name)(t)
    (slope,) = torch.autograd.grad(probability.sum(), t)  # p' = -alpha'
    torch.testing.assert_close(weight, slope / probability, rtol=1e-5, atol=1e-5)


@every_schedule
def test_against_closed_form_in_double_precision(name: str) -> None:
    p, h = MASK_PROBABILITY[name], 1e-6
    for t in (MIN_TIME, 0.01, 0.1, 0.5, 0.9, 0.999):
        probability, weight = get_noise_schedule(name)(torch.tensor(t))
        assert probability.item() == pytest.approx(p(t), rel=1e-4)
        assert weight.item() == pytest.approx((p(t + h) - p(t - h)) / (2 * h) / p(t), rel=1e-4)


@every_schedule
def test_probability_rises_from_nothing_to_one(name: str) -> None:
    schedule = get_noise_schedule(name)
    probability, weight = schedule(torch.linspace(MIN_TIME, 1, 1000))
    assert (probability.diff() > 0).all() and (weight.diff() < 0).all()
    assert probability[-1] == pytest.approx(1, abs=1e-6) and 0 < probability[0] < 2 * MIN_TIME
    assert weight.isfinite().all() and (weight >= 0).all()
    assert schedule(torch.tensor(1e-6))[0] < 1e-5


@every_schedule
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_closed_forms_are_fp32_and_keep_the_shape(name: str, dtype: torch.dtype) -> None:
    for result in get_noise_schedule(name)(torch.full((2, 3), 0.25, dtype=dtype)):
        assert result.dtype == torch.float32 and result.shape == (2, 3)


@every_schedule
@pytest.mark.parametrize("seed", range(3))
def test_nelbo_by_quadrature_is_the_exact_likelihood(name: str, seed: int) -> None:
    """With exact conditionals the bound is tight, so that every schedule must give -log p(x)."""
    chain = MarkovChain(n_states=3, length=5)
    x = chain.sample(1, seed)
    visible = all_visible_patterns(chain.length)
    log_probs = chain.log_conditionals(x.expand(len(visible), -1), visible)
    ce = -log_probs.gather(-1, x.expand(len(visible), -1)[..., None]).squeeze(-1)
    cost = (ce * ~visible).sum(-1)  # (2^L,)
    n_masked = (~visible).sum(-1)
    nodes, areas = np.polynomial.legendre.leggauss(32)
    probability, weight = (v.double() for v in get_noise_schedule(name)(torch.from_numpy((nodes + 1) / 2)))
    p = probability[:, None]
    pattern_probability = p**n_masked * (1 - p) ** (chain.length - n_masked)  # (times, 2^L)
    nelbo = (torch.from_numpy(areas / 2) * weight * (pattern_probability @ cost)).sum()
    assert nelbo.item() == pytest.approx(-chain.log_prob(x).item(), rel=1e-5)


@pytest.mark.parametrize("name", ["beta_linear", "beta_cosine"])
def test_schedules_by_beta_follow_their_thousand_steps(name: str) -> None:
    """Against the products of the discrete betas."""
    steps = torch.arange(1, 1001, dtype=torch.float64)
    if name == "beta_linear":
        betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    else:
        alpha = torch.cos((torch.arange(1001, dtype=torch.float64) / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2
        betas = (1 - alpha[1:] / alpha[:-1]).clamp(0.0001, 0.9999)
    want = 1 - torch.cumprod(1 - betas, 0)
    probability, _ = get_noise_schedule(name)(steps / 1000)
    torch.testing.assert_close(probability.double(), want, atol=2e-3, rtol=0)


@pytest.mark.parametrize("name", ["", "Linear", "quadratic"])
def test_unknown_name_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="noise_schedule"):
        get_noise_schedule(name)
