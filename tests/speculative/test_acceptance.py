"""Acceptance: greedy against a plain loop, sampling against exact probabilities."""

from __future__ import annotations

import pytest
import torch

from llm_diffusion.models.sampling import sample
from llm_diffusion.objective.noise import uniform
from llm_diffusion.speculative.acceptance import accept_greedy, accept_sampled


def greedy_by_hand(draft: list[int], best: list[int]) -> tuple[int, int]:
    accepted = 0
    while accepted < len(draft) and draft[accepted] == best[accepted]:
        accepted += 1
    return accepted, best[accepted]


def test_greedy_accepts_what_a_loop_would() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(300, 5, 3, generator=generator)
    draft = torch.randint(3, (300, 4), generator=generator)
    accepted, token = accept_greedy(draft, logits)
    want = [greedy_by_hand(d, best) for d, best in zip(draft.tolist(), logits.argmax(-1).tolist(), strict=True)]
    assert list(zip(accepted.tolist(), token.tolist(), strict=True)) == want
    assert set(accepted.tolist()) == {0, 1, 2, 3, 4}


@pytest.mark.parametrize("kind", ["other", "same", "never", "peaked"])
def test_accepted_and_drawn_tokens_follow_the_target(kind: str) -> None:
    """100,000 drafts of two tokens over a vocabulary of 4: every pair of tokens as often as under the target alone."""
    n, generator = 100_000, torch.Generator().manual_seed(1)
    target = torch.randn(3, 4, generator=generator).mul(1.5).softmax(-1)
    draft_probs = torch.randn(2, 4, generator=generator).mul(1.5).softmax(-1)
    if kind == "same":
        draft_probs = target[:2]
    if kind == "never":  # what is drafted is what the target would never say
        target[:2, 0] = 0
        target = target / target.sum(-1, keepdim=True)
        draft_probs = torch.tensor([[1.0, 0, 0, 0]]).expand(2, -1)
    if kind == "peaked":
        draft_probs = torch.tensor([[0, 0, 1.0, 0]]).expand(2, -1)
    rows = torch.arange(n)
    noise = [uniform(0, rows[:, None], torch.arange(k), stream) for stream, k in enumerate((2, 2, 3))]
    draft = sample(draft_probs.expand(n, -1, -1), noise[0])
    accepted, token = accept_sampled(draft, draft_probs.expand(n, -1, -1), target.expand(n, -1, -1), *noise[1:])
    first = torch.where(accepted > 0, draft[:, 0], token)
    counts = torch.bincount(first, minlength=4) / n
    assert (counts - target[0]).abs().sum() / 2 < 0.005  # total variation; sampling error is 0.003
    second = torch.where(accepted > 1, draft[:, 1], token)[accepted > 0]
    if kind != "never":
        counts = torch.bincount(second, minlength=4) / len(second)
        assert (counts - target[1]).abs().sum() / 2 < 0.01
    if kind == "same":
        assert (accepted == 2).all()
        assert (torch.bincount(token, minlength=4) / n - target[2]).abs().sum() / 2 < 0.005
    if kind == "never":
        assert (accepted == 0).all() and (token != 0).all()


def test_sampling_by_inverse_transform() -> None:
    weights = torch.tensor([0.0, 2.0, 0.0, 1.0, 1.0, 0.0])
    noise = (torch.arange(1000) + 0.5) / 1000
    tokens = sample(weights.expand(1000, -1), noise)
    assert torch.bincount(tokens, minlength=6).tolist() == [0, 500, 0, 250, 250, 0]
    assert sample(weights, torch.tensor(1 - 2.0**-24)).item() == 4
