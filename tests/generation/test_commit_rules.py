"""Commit rules against slow references written row by row."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_diffusion.generation.commit_rules import (
    CONFIDENCES,
    commit_entropy_bound,
    commit_factor,
    commit_quota,
    commit_threshold,
    confidence,
    edits,
    perturb,
    ranks,
    revise_p2,
    revise_remdm,
    step_quota,
)
from llm_diffusion.objective.noise import (
    uniform,
)

few = settings(max_examples=40, deadline=None, derandomize=True)
seeds = st.integers(0, 2**31 - 1)


def ragged(seed: int, n_rows: int = 5, length: int = 12, ties: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, L) scores in [0, 1], all different in a row unless `ties`, and (B, L) eligibility, one row without any."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.stack([torch.randperm(length, generator=generator) for _ in range(n_rows)]) / (length - 1)
    if ties:
        scores = (scores * 3).round() / 3
    share = torch.rand(n_rows, 1, generator=generator)
    share[0] = 0.0
    return scores, torch.rand(n_rows, length, generator=generator) < share


def by_hand(scores: torch.Tensor, eligible: torch.Tensor, quota: torch.Tensor) -> torch.Tensor:
    """Sorts every row in Python; of equal scores the leftmost comes first."""
    chosen = torch.zeros_like(eligible)
    for row, count in enumerate(quota.tolist()):
        candidates = eligible[row].nonzero().flatten().tolist()
        for position in sorted(candidates, key=lambda i: (-scores[row, i].item(), i))[:count]:
            chosen[row, position] = True
    return chosen


def llada_transfer(scores: torch.Tensor, eligible: torch.Tensor, quota: torch.Tensor) -> torch.Tensor:
    """As in LLaDA's generate.py: a topk per row."""
    chosen = torch.zeros_like(eligible)
    confidence = torch.where(eligible, scores, -torch.inf)
    for j in range(len(quota)):
        _, select = torch.topk(confidence[j], k=int(quota[j]))
        chosen[j, select] = True
    return chosen


def fast_dllm_transfer(scores: torch.Tensor, eligible: torch.Tensor, threshold: float) -> torch.Tensor:
    """Everything at or above the threshold, and the best one in any case."""
    chosen = torch.zeros_like(eligible)
    for j in range(len(scores)):
        candidates = eligible[j].nonzero().flatten().tolist()
        if candidates:
            chosen[j, max(candidates, key=lambda i: scores[j, i].item())] = True  # the first one of equals
        for i in candidates:
            chosen[j, i] |= scores[j, i].item() >= threshold
    return chosen


@few
@given(seed=seeds)
def test_quota_is_lladas(seed: int) -> None:
    scores, eligible = ragged(seed)
    quota = (eligible.sum(-1) * torch.rand(5, generator=torch.Generator().manual_seed(seed))).ceil().long()
    assert torch.equal(commit_quota(scores, eligible, quota), llada_transfer(scores, eligible, quota))


@few
@given(seed=seeds, quota=st.lists(st.integers(0, 20), min_size=5, max_size=5))
def test_quota_with_ties_and_more_than_there_is(seed: int, quota: list[int]) -> None:
    scores, eligible = ragged(seed, ties=True)
    chosen = commit_quota(scores, eligible, torch.tensor(quota))
    assert torch.equal(chosen, by_hand(scores, eligible, torch.tensor(quota)))
    assert torch.equal(chosen.sum(-1), torch.minimum(torch.tensor(quota), eligible.sum(-1)))
    assert not (chosen & ~eligible).any()


@few
@given(seed=seeds)
def test_ranks_order_the_eligible_ones(seed: int) -> None:
    scores, eligible = ragged(seed, ties=True)
    found = ranks(scores, eligible)
    assert torch.equal(found.sort(-1).values, torch.arange(12).expand(5, -1))
    for row in range(5):
        own = found[row][eligible[row]]
        assert sorted(own.tolist()) == list(range(len(own)))
        ordered = scores[row][found[row].argsort()][: len(own)]
        assert (ordered.diff() <= 0).all()


@few
@given(seed=seeds, threshold=st.sampled_from([-1.0, 0.0, 1 / 3, 0.5, 0.9, 1.0, 2.0]), ties=st.booleans())
def test_threshold_is_fast_dllms(seed: int, threshold: float, ties: bool) -> None:
    scores, eligible = ragged(seed, ties=ties)
    chosen = commit_threshold(scores, eligible, threshold)
    assert torch.equal(chosen, fast_dllm_transfer(scores, eligible, threshold))
    assert torch.equal(chosen.any(-1), eligible.any(-1))
    assert not (chosen & ~eligible).any()


@few
@given(seed=seeds, low=st.floats(0, 1), high=st.floats(0, 1))
def test_a_lower_threshold_commits_no_less(seed: int, low: float, high: float) -> None:
    scores, eligible = ragged(seed)
    low, high = sorted((low, high))
    fewer, more = (commit_threshold(scores, eligible, threshold) for threshold in (high, low))
    assert not (fewer & ~more).any()
    assert torch.equal(commit_threshold(scores, eligible, 0.0), eligible)
    assert torch.equal(commit_threshold(scores, eligible, 2.0), commit_quota(scores, eligible, torch.ones(5)))


@pytest.mark.parametrize("length", [3, 40, 2000])  # sorts that are not stable are often stable when short
def test_ties_go_to_the_leftmost(length: int) -> None:
    scores = torch.full((2, length), 0.5)
    eligible = torch.ones(2, length, dtype=torch.bool)
    eligible[1, 0] = False
    one = commit_quota(scores, eligible, torch.tensor([1, 2]))
    assert one[0].nonzero().flatten().tolist() == [0] and one[1].nonzero().flatten().tolist() == [1, 2]
    best = commit_threshold(scores, eligible, 0.9)
    assert best[0].nonzero().flatten().tolist() == [0] and best[1].nonzero().flatten().tolist() == [1]


@few
@given(cases=st.lists(st.tuples(st.integers(0, 40), st.integers(1, 50)), min_size=1, max_size=8))
def test_step_quota_deals_as_llada(cases: list[tuple[int, int]]) -> None:
    masks, steps = (torch.tensor(column) for column in zip(*cases, strict=True))
    left, dealt = masks.clone(), []
    for done in range(int(steps.max())):
        quota = torch.where(done < steps, step_quota(left, steps - done), 0)
        dealt.append(quota)
        left = left - quota
    assert (left == 0).all()
    for row, (n, s) in enumerate(cases):
        expected = [n // s + (i < n % s) for i in range(s)]
        assert [quota[row].item() for quota in dealt][:s] == expected and sum(expected) == n


def test_when_no_step_is_left_everything_is_committed() -> None:
    assert step_quota(torch.tensor([5, 0]), torch.tensor([0, 0])).tolist() == [5, 0]


def softmax64(logits: torch.Tensor) -> torch.Tensor:
    return logits.double().exp() / logits.double().exp().sum(-1, keepdim=True)


def top_two_gap(p: torch.Tensor) -> torch.Tensor:
    ordered = p.sort(-1, descending=True).values
    return ordered[..., 0] - ordered[..., 1]


CONFIDENCE = {
    "low_confidence": lambda p, tokens: (p * torch.nn.functional.one_hot(tokens, p.shape[-1])).sum(-1),
    "entropy": lambda p, tokens: (p * p.log()).sum(-1),
    "margin": lambda p, tokens: top_two_gap(p),
}


@pytest.mark.parametrize("kind", CONFIDENCE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_confidence_by_formula(kind: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(2, 9, 11, generator=generator)).to(dtype)
    tokens = torch.randint(11, (2, 9), generator=generator)  # proposals need not be the best tokens
    score = confidence(logits, tokens, kind)
    assert score.dtype == torch.float32 and score.shape == (2, 9)
    torch.testing.assert_close(score.double(), CONFIDENCE[kind](softmax64(logits), tokens), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", CONFIDENCE)
def test_a_sharper_prediction_is_surer_and_a_banned_token_harmless(kind: str) -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1e9]) * torch.tensor([[0.5], [1.0], [3.0]])
    score = confidence(logits, torch.zeros(3, dtype=torch.long), kind)
    assert score.isfinite().all() and (score.diff() > 0).all()
    torch.testing.assert_close(score, confidence(logits[:, :3], torch.zeros(3, dtype=torch.long), kind))


def test_random_confidence_is_the_noise_it_is_given() -> None:
    noise = torch.rand(2, 3)
    assert torch.equal(confidence(torch.zeros(2, 3, 4), torch.zeros(2, 3).long(), "random", noise), noise)


def test_the_tables_cover_every_kind() -> None:
    assert {*CONFIDENCE, "random", "left_to_right"} == set(CONFIDENCES)


# -- factor, entropy bound, order temperature


def fast_dllm_factor(scores: torch.Tensor, eligible: torch.Tensor, factor: float) -> torch.Tensor:
    """The largest n with (n + 1) (1 - c_n) <= f, row by row, in float64; at least one."""
    chosen = torch.zeros_like(eligible)
    for j in range(len(scores)):
        order = sorted(eligible[j].nonzero().flatten().tolist(), key=lambda i: (-scores[j, i].item(), i))
        fits = [n for n, i in enumerate(order, start=1) if (n + 1) * (1 - scores[j, i].item()) <= factor]
        for i in order[: max(fits, default=1)]:
            chosen[j, i] = True
    return chosen


@few
@given(seed=seeds, factor=st.floats(0.05, 6), ties=st.booleans())
def test_factor_is_the_papers(seed: int, factor: float, ties: bool) -> None:
    scores, eligible = ragged(seed, ties=ties)
    assert torch.equal(commit_factor(scores, eligible, factor), fast_dllm_factor(scores, eligible, factor))


def test_the_last_candidate_is_judged_too() -> None:
    """The published loop accepts the last one when it is the first to fail."""
    scores, eligible = torch.tensor([[0.99, 0.98, 0.1]]), torch.ones(1, 3, dtype=torch.bool)
    assert commit_factor(scores, eligible, 1.0).tolist() == [[True, True, False]]


def eb_sampler(scores, eligible, entropy, bound):
    """The longest prefix of the order whose entropies sum, less the largest, to at most the bound; row by row."""
    chosen = torch.zeros_like(eligible)
    for j in range(len(scores)):
        order = sorted(eligible[j].nonzero().flatten().tolist(), key=lambda i: (-scores[j, i].item(), i))
        best = 0
        for k in range(1, len(order) + 1):
            values = [entropy[j, i].item() for i in order[:k]]
            if k == 1 or sum(values) - max(values) <= bound:
                best = k
        for i in order[:best]:
            chosen[j, i] = True
    return chosen


@few
@given(seed=seeds, bound=st.sampled_from([0.0, 0.07, 0.33, 1.01, 2.57, 50.0]), by_entropy=st.booleans())
def test_entropy_bound_is_the_papers(seed: int, bound: float, by_entropy: bool) -> None:
    scores, eligible = ragged(seed)
    # Sixteenths are exact in fp32, in any order of summation.
    entropy = torch.randint(0, 40, scores.shape, generator=torch.Generator().manual_seed(seed)) / 16
    if by_entropy:
        scores = -entropy
    chosen = commit_entropy_bound(scores, eligible, entropy, bound)
    assert torch.equal(chosen, eb_sampler(scores, eligible, entropy, bound))
    assert torch.equal(chosen.any(-1), eligible.any(-1))


def test_a_perturbed_order_draws_without_replacement() -> None:
    """Every set of two of four positions as often as softmax(score / temperature), drawn one after the other, says."""
    score, temperature = torch.tensor([0.1, 0.5, 0.9, 0.4]), 0.3
    p = (score / temperature).softmax(-1).tolist()
    n = 200_000
    noise = uniform(torch.arange(n)[:, None], torch.arange(4))
    everyone = torch.ones(n, 4, dtype=torch.bool)
    order = perturb(score.expand(n, -1), temperature, noise)
    chosen = commit_quota(order, everyone, torch.full((n,), 2))
    code = (chosen * torch.tensor([1, 2, 4, 8])).sum(-1)
    share = torch.bincount(code, minlength=16) / n
    for i in range(4):
        for j in range(i):
            want = p[i] * p[j] / (1 - p[i]) + p[j] * p[i] / (1 - p[j])
            assert abs(share[2**i + 2**j].item() - want) < 0.004
    flat = torch.full((6,), 1 / 6)
    assert (share[[3, 5, 6, 9, 10, 12]] - flat).abs().max() > 0.05, "no order at all would pass"


def test_left_to_right_is_the_order_of_the_text() -> None:
    score = confidence(torch.zeros(2, 5, 3), torch.zeros(2, 5).long(), "left_to_right")
    eligible = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 0, 1, 1]]).bool()
    chosen = commit_quota(score, eligible, torch.tensor([2, 2]))
    assert chosen.tolist() == [[True, True, False, False, False], [False, True, False, True, False]]


# -- revision


@few
@given(seed=seeds, ties=st.booleans())
def test_p2_leaves_the_least_sure_masked(seed: int, ties: bool) -> None:
    scores, open_ = ragged(seed, ties=ties)
    generator = torch.Generator().manual_seed(seed + 1)
    masked = open_ & (torch.rand(open_.shape, generator=generator) < 0.5)
    n_masked = torch.randint(0, 14, (5,), generator=generator)
    commit, remask = revise_p2(scores, masked, open_, n_masked)
    for j in range(5):
        order = sorted(open_[j].nonzero().flatten().tolist(), key=lambda i: (scores[j, i].item(), i))
        low = set(order[: int(n_masked[j])])
        assert {i for i in order if i not in low and masked[j, i]} == set(commit[j].nonzero().flatten().tolist())
        assert {i for i in low if not masked[j, i]} == set(remask[j].nonzero().flatten().tolist())
    assert not ((commit | remask) & ~open_).any()


LOOP = (0.55, 0.2, 0.8)


def share_of_masks(time: float, kind: str) -> float:
    """1 - alpha, in plain numbers."""
    t_on, t_off, alpha_on = LOOP
    if kind != "loop":
        return time
    if time > t_on:
        return 1 - (1 - time) / (1 - t_on) * alpha_on
    return 1 - alpha_on if time > t_off else time / t_off * (1 - alpha_on)


@pytest.mark.parametrize("kind", ["cap", "rescale", "loop"])
@pytest.mark.parametrize("eta", [0.0, 0.1, 0.5, 1.0])
def test_remdm_keeps_the_share_of_masks(eta: float, kind: str) -> None:
    """The paper's theorem: whatever is masked again, at every s a position is a mask with probability 1 - alpha_s."""
    n, steps = 40_000, 16
    open_ = torch.ones(1, n, dtype=torch.bool)
    masked, again = open_.clone(), 0
    for left in range(steps, 0, -1):
        noise = uniform(left, torch.arange(n)[None])
        left_ = torch.tensor([left])
        commit, remask = revise_remdm(left_, steps, eta, masked, open_, noise, kind, loop=LOOP)
        assert not (commit & ~masked).any() and not (remask & masked).any()
        masked = masked & ~commit | remask
        again += int(remask.sum())
        assert not remask.any() or kind != "loop" or LOOP[1] < left / steps <= LOOP[0]
        assert masked.float().mean().item() == pytest.approx(share_of_masks((left - 1) / steps, kind), abs=0.012)
    assert not masked.any()
    assert (again > 0) == (eta > 0)


def remdm(left, steps, eta, masked, kind, confidence):
    """Of one row: how likely every position changes, by the formulas of the paper, position by position."""
    t, s = left / steps, (left - 1) / steps
    alpha_t, alpha_s = 1 - share_of_masks(t, kind), 1 - share_of_masks(s, kind)
    highest = min(1.0, (1 - alpha_s) / alpha_t) if alpha_t > 0 else 1.0
    total = sum(math.exp(-p) for p, m in zip(confidence, masked, strict=True) if not m)
    rates = []
    for p, m in zip(confidence, masked, strict=True):
        if kind == "conf":  # of masks the paper's psi is infinite, their share nothing
            sigma = 0.0 if m else math.exp(-p) / total * eta * highest
        elif kind == "loop" and not LOOP[1] < t <= LOOP[0]:
            sigma = 0.0
        else:
            sigma = eta * highest if kind == "rescale" else min(eta, highest)
        rates.append((alpha_s - (1 - sigma) * alpha_t) / (1 - alpha_t) if m else sigma)
    return rates


@few
@given(
    seed=seeds,
    kind=st.sampled_from(["cap", "rescale", "conf", "loop"]),
    left=st.integers(1, 10),
    eta=st.sampled_from([0.0, 0.02, 0.4, 1.0]),
)
def test_remdm_rates_are_the_papers(seed: int, kind: str, left: int, eta: float) -> None:
    """A number just below the rate of a position changes it, one just above does not."""
    generator = torch.Generator().manual_seed(seed)
    confidence = torch.rand(3, 7, generator=generator)
    masked = torch.rand(3, 7, generator=generator) < 0.5
    open_ = torch.ones(3, 8, dtype=torch.bool)
    open_[:, 7] = False
    pad = torch.nn.functional.pad
    want = torch.tensor(
        [remdm(left, 10, eta, m, kind, c) for m, c in zip(masked.tolist(), confidence.tolist(), strict=True)]
    )
    for offset, changes in ((-1e-5, True), (1e-5, False)):
        noise = (want + offset).clamp(0, 1)
        rules = torch.full((3,), left), 10, eta, pad(masked, (0, 1)), open_, pad(noise, (0, 1))
        commit, remask = revise_remdm(*rules, kind, pad(confidence, (0, 1)), LOOP)
        sure = (want > 1e-4) & (want < 1 - 1e-4) if not changes else want > 1e-4
        assert torch.equal((commit | remask)[:, :7][sure], torch.full_like(masked[sure], changes))
        assert not (commit & ~pad(masked, (0, 1))).any() and not (remask & pad(masked, (0, 1))).any()
        assert not (commit | remask)[:, 7].any()
    assert not (remask[:, :7] & (want == 0)).any()


def test_edits_need_another_token_and_enough_probability() -> None:
    probability = torch.tensor([[0.9, 0.9, 0.5, 0.9, 0.51]])
    tokens, ids = torch.tensor([[1, 2, 3, 4, 5]]), torch.tensor([[1, 9, 9, 9, 9]])
    editable = torch.tensor([[1, 1, 1, 0, 1]]).bool()
    chosen = edits(probability, tokens, ids, editable, 0.5)
    assert chosen.tolist() == [[False, True, False, False, True]]


def test_no_rule_waits_for_the_device() -> None:
    """On the meta device nothing has a value: a rule that reads one, as every host synchronisation does, raises."""

    def meta(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="meta")

    score, eligible, count = meta(3, 7), meta(3, 7, dtype=torch.bool), meta(3, dtype=torch.long)
    tokens = meta(3, 7, dtype=torch.long)
    for kind in CONFIDENCES:
        assert confidence(meta(3, 7, 11), tokens, kind, score).shape == (3, 7)
    for chosen in (
        commit_quota(score, eligible, count),
        commit_threshold(score, eligible, 0.9),
        commit_factor(score, eligible, 1.0),
        commit_entropy_bound(score, eligible, score, 0.1),
        perturb(score, 0.5, score),
        *revise_p2(score, eligible, eligible, count),
        *revise_remdm(count, 8, 0.1, eligible, eligible, score),
        *revise_remdm(count, 8, 0.1, eligible, eligible, score, "conf", score),
        *revise_remdm(count, 8, 0.1, eligible, eligible, score, "loop"),
        edits(score, tokens, tokens, eligible, 0.5),
    ):
        assert chosen.shape == (3, 7) and chosen.is_meta
