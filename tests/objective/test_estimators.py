"""Scores of texts against exact log-probabilities: unbiased, exact one token a step, and quiet where noise is shared."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from collators import collator_of
from oracle import MarkovChain

from llm_diffusion import UserError
from llm_diffusion.models.lm_head import scores_of_logits
from llm_diffusion.objective.estimators import (
    ESTIMATORS,
    aligned_positions,
    check_estimator,
    draw,
    elbo_draws,
    pair_times,
    share_masked,
    trajectory_draws,
)
from llm_diffusion.objective.modes import IGNORE_INDEX
from llm_diffusion.training.collator import DataCollatorForDiffusionPreference
from llm_diffusion.training.scoring import compute_diffusion_score

LENGTH = 32
CHAIN = MarkovChain(n_states=6, length=LENGTH)
POLICY = MarkovChain(n_states=6, length=LENGTH, stay=0.915)  # 0.05 nats a token away from CHAIN


def as_model(chain: MarkovChain, shift: bool = False):
    """The perfect masked model of a chain, called as one that `add_row_scores` has seen."""

    def model(input_ids: torch.Tensor, score_targets: torch.Tensor, **_: object):
        logits = chain(input_ids)
        if shift:
            logits = logits.roll(-1, 1)
        at = (score_targets != IGNORE_INDEX).nonzero(as_tuple=True)
        return {**scores_of_logits(logits[at], score_targets[at]), "at": at}

    return model


def collator(**options) -> DataCollatorForDiffusionPreference:
    options = {"right_shift_logits": False, **options}
    return DataCollatorForDiffusionPreference(collator_of(pad_token_id=0, mask_token_id=CHAIN.mask_token_id, **options))


def pairs(n: int, prompt: int = 8, errors: int = 2, seed: int = 0) -> dict[str, torch.Tensor]:
    """A batch of answers drawn from the chain, each beside itself with some tokens replaced."""
    chosen = CHAIN.sample(n, seed)
    rejected = chosen.clone()
    generator = torch.Generator().manual_seed(seed)
    for row in range(n):
        places = prompt + torch.randperm(LENGTH - prompt, generator=generator)[:errors]
        rejected[row, places] = (rejected[row, places] + 1) % CHAIN.n_states
    rows = [
        {"prompt_ids": c[:prompt].tolist(), "chosen_ids": c[prompt:].tolist(), "rejected_ids": r[prompt:].tolist()}
        for c, r in zip(chosen, rejected, strict=True)
    ]
    return collator()(rows)


def repeated(
    batch: dict[str, torch.Tensor], times: int
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor | int]]:
    """Every pair so many times, and the keys of noise of its own for each: what many seeds would give, in one batch."""
    n = len(batch["input_ids"]) // 2
    both = {
        name: value.unflatten(0, (2, n)).repeat(1, times, *[1] * (value.dim() - 1)) for name, value in batch.items()
    }
    return {name: value.flatten(0, 1) for name, value in both.items()}, {
        "rows": torch.arange(n * times),
        "n_rows": n * times,
    }


def score_of(chain: MarkovChain, batch: dict, seed: int, shift: bool = False, **options) -> torch.Tensor:
    own = collator(right_shift_logits=shift)
    draws = own.corrupt(batch, seed=seed, step=0, **options)
    return compute_diffusion_score(as_model(chain, shift), draws).log_probs.sum(-1)


def exact(chain: MarkovChain, batch: dict, prompt: int = 8) -> torch.Tensor:
    """log p(answer | prompt)."""
    steps = chain.transition().log()[batch["input_ids"][:, :-1], batch["input_ids"][:, 1:]]
    return steps[:, prompt - 1 :].sum(-1)


@pytest.mark.parametrize(
    "chosen, rejected, expected",
    [
        ("abcdef", "abxdef", [0, 1, 2, 3, 4, 5]),  # a replaced token takes the other's place
        ("abcdef", "abcxdef", [0, 1, 2, 9, 3, 4, 5]),  # what is inserted has noise of its own
        ("abcdef", "abef", [0, 1, 4, 5]),
        ("abcdef", "abxyzef", [0, 1, 2, 3, 10, 4, 5]),
        ("ab", "xy", [0, 1]),
        ("ab", "", []),
    ],
)
def test_texts_are_aligned(chosen: str, rejected: str, expected: list[int]) -> None:
    ours, theirs = aligned_positions([ord(letter) for letter in chosen], [ord(letter) for letter in rejected])
    assert ours == list(range(len(chosen)))
    assert theirs == expected and len(set(theirs)) == len(theirs)


def test_long_texts_of_few_words_are_aligned() -> None:
    """difflib leaves out what is frequent in 200 tokens or more, unless told not to."""
    words = [1, 2] * 150
    assert aligned_positions(words, [9, *words])[1] == [300, *range(300)]


def test_common_tokens_are_masked_together() -> None:
    """Also behind an inserted token, where positions differ."""
    rows = [{"prompt_ids": [1, 2], "chosen_ids": [3, 4, 5, 1, 2, 3, 4, 0], "rejected_ids": [3, 5, 5, 1, 2, 3, 4, 0]}]
    inserted = [{**rows[0], "rejected_ids": [0, *rows[0]["chosen_ids"]]}]
    for noisy in collator().corrupt(collator()(rows), seed=1, step=0):
        assert torch.equal(*noisy["masked"])
    batch, keys = repeated(collator()(inserted), 100)
    for noisy in collator().corrupt(batch, seed=1, step=0, **keys):
        assert (noisy["masked"][:100, 2:10] == noisy["masked"][100:, 3:11]).float().mean() > 0.9


@pytest.mark.parametrize("shift", [False, True])
def test_elbo_score_is_unbiased(shift: bool) -> None:
    batch = pairs(48)
    many, keys = repeated(batch, 24)
    scores = score_of(CHAIN, many, 0, shift, n_draws=4, **keys).double().view(2, 24, 48).transpose(0, 1).flatten(1)
    error = (scores - exact(CHAIN, batch)).mean(0)  # of 24 estimates, per row
    mean, spread = error.mean(), error.std() / len(error) ** 0.5
    assert abs(mean) < 3 * spread + 1e-9, (mean, spread)
    assert spread < 0.2  # so that a bias of a nat would show


def test_elbo_score_is_unbiased_in_blocks() -> None:
    """Each block has a time of its own: the weights still average to one a token."""
    maskable, keys = torch.ones(500, 12, dtype=torch.bool), torch.arange(500)
    position = torch.arange(12).expand(500, -1)
    draws = elbo_draws(0, 3, keys, pair_times(0, 3, keys), position, maskable, position // 4, 4)
    total = sum((masked * weights).mean(0) / 4 for masked, weights, _ in draws)
    torch.testing.assert_close(total, torch.ones(12), atol=0.15, rtol=0)


def test_trajectory_one_token_a_step_is_exact() -> None:
    batch = pairs(6)
    for chain in (CHAIN, POLICY):
        score = score_of(chain, batch, 5, score="trajectory", n_draws=LENGTH)
        torch.testing.assert_close(score.double(), exact(chain, batch), atol=1e-5 * 24, rtol=1e-5)


def test_trajectory_scores_every_token_once() -> None:
    batch = pairs(3)
    for steps in (1, 5, 20, 100):
        draws = list(collator().corrupt(batch, seed=0, step=0, score="trajectory", n_draws=steps))
        assert len(draws) == min(steps, 24)
        scored = torch.stack([noisy["targets"] != -100 for noisy in draws])
        assert torch.equal(scored.sum(0), batch["completion_mask"])
        seen = torch.stack([noisy["masked"] for noisy in draws]).sum((1, 2))
        assert (seen.diff() < 0).all()  # every step reveals something
        sizes = scored[:, 0].sum(-1)
        assert sizes.max() - sizes.min() <= 1


def test_trajectory_is_a_bound_that_tightens() -> None:
    batch = pairs(96)
    gaps = []
    for steps in (1, 4, 12):
        errors = torch.stack(
            [score_of(CHAIN, batch, seed, score="trajectory", n_draws=steps) for seed in range(4)]
        ) - exact(CHAIN, batch)
        gaps.append(errors.mean().item())
    assert gaps[0] < gaps[1] < gaps[2] < 0, gaps


def test_policy_is_at_the_stated_distance() -> None:
    p, q = POLICY.transition(), CHAIN.transition()
    assert (p * (p / q).log()).sum(-1).mean() == pytest.approx(0.05, abs=0.001)


def spread(shared: bool, batch: dict, **options) -> float:
    """Standard deviation over seeds of the preference score, in nats."""
    many, keys = repeated(batch, 24)
    policy_chosen, base_chosen, policy_rejected, base_rejected = (
        score_of(chain, many, 0 if shared else 1000 + i, **keys, **options).view(2, 24, -1)[side]
        for i, (chain, side) in enumerate([(POLICY, 0), (CHAIN, 0), (POLICY, 1), (CHAIN, 1)])
    )
    return (policy_chosen - base_chosen - policy_rejected + base_rejected).std(0).mean().item()


def test_shared_masks_leave_a_quarter_of_the_noise() -> None:
    batch = pairs(12)
    alone, together = spread(False, batch, n_draws=8), spread(True, batch, n_draws=8)
    assert together < 0.25 * alone, (together, alone)


def test_noise_is_of_the_pair_not_of_the_batch() -> None:
    batch = pairs(4)
    whole = score_of(CHAIN, batch, 0, rows=torch.arange(4), n_rows=4)
    half = {name: value[[2, 3, 6, 7]] for name, value in batch.items()}
    torch.testing.assert_close(score_of(CHAIN, half, 0, rows=torch.tensor([2, 3]), n_rows=4), whole[[2, 3, 6, 7]])
    padded = {name: torch.nn.functional.pad(value, (0, 5)) for name, value in half.items()}
    fixed = score_of(CHAIN, half, 0)
    # The oracle knows no padding, so the masks themselves are compared.
    for a, b in zip(collator().corrupt(half, seed=0, step=0), collator().corrupt(padded, seed=0, step=0), strict=True):
        assert torch.equal(a["masked"], b["masked"][:, :LENGTH])
    torch.testing.assert_close(fixed, score_of(CHAIN, batch, 0)[[2, 3, 6, 7]])
    assert not torch.allclose(fixed, score_of(CHAIN, half, 1))


def test_times_are_stratified_over_draws_and_pairs() -> None:
    keys = torch.arange(4)
    starts = pair_times(0, 3, keys, n_pairs=4)
    assert sorted((starts * 4).long().tolist()) == [0, 1, 2, 3]
    maskable, part = torch.ones(4, 64, dtype=torch.bool), torch.zeros(4, 64, dtype=torch.long)
    position = torch.arange(64).expand(4, -1)
    counts = [
        masked.sum(-1) for masked, _, _ in elbo_draws(0, 3, keys, starts, position, maskable, part, 8)
    ]  # 32 strata of two counts each
    assert sorted((count.item() - 1) // 2 for draw in counts for count in draw) == list(range(32))


def test_parts_end_at_their_own_pace() -> None:
    """A block of two tokens takes two steps of a trajectory of four, one of one token one."""
    maskable = torch.tensor([[True] * 7])
    part = torch.tensor([[0, 0, 0, 0, 1, 1, 2]])
    draws = list(trajectory_draws(0, 0, torch.tensor([1]), torch.arange(7)[None], maskable, part, num_steps=4))
    revealed = torch.stack([weights[0] for _, weights, _ in draws])
    assert len(draws) == 4 and torch.equal(revealed.sum(0), torch.full((7,), 4.0))
    assert revealed[:2, 4:6].sum() == 8 and revealed[0, 6] == 4
    assert draws[0][2][0].tolist() == [1.0] * 7 and sorted(draws[1][2][0].tolist())[:3] == [0.0, 0.5, 0.5]


def test_draws_of_a_pair_have_the_count_of_their_stratum() -> None:
    """k = ceil(u n) of n tokens, u = (draw + time) / draws, in exact arithmetic."""
    keys, n, n_draws = torch.arange(6), 1000, 3
    times = torch.tensor([0.0005, 0.1235, 0.2505, 0.5, 0.7505, 0.9995])
    maskable, part = torch.ones(6, n, dtype=torch.bool), torch.zeros(6, n, dtype=torch.long)
    position = torch.arange(n).expand(6, -1)
    for draw_number, (masked, weights, levels) in enumerate(
        elbo_draws(0, 3, keys, times, position, maskable, part, n_draws)
    ):
        for row, time in enumerate((5, 1235, 2505, 5000, 7505, 9995)):
            exact = (draw_number + Fraction(time, 10_000)) / n_draws * n
            k = int(masked[row].sum())
            assert k in (-(-exact // 1), -(-(exact - Fraction(1, 1000)) // 1), -(-(exact + Fraction(1, 1000)) // 1))
            assert levels[row].unique().item() == pytest.approx(k / n)
            assert weights[row].unique().item() == pytest.approx(n / k)


def test_draws_without_places_are_random_and_with_them_strata() -> None:
    keys = torch.arange(512)
    for n_pairs in (None, 512):
        times = pair_times(1, 2, keys, n_pairs)
        assert times.min() > 0 and times.max() < 1
        assert abs(times.mean() - 0.5) < 4 / (12 * 512) ** 0.5
        assert (len(set((times * 512).long().tolist())) == 512) == (n_pairs is not None)


def test_a_trajectory_of_nothing_is_one_empty_draw() -> None:
    nothing = torch.zeros(1, 4, dtype=torch.bool)
    args = (torch.tensor([1]), torch.arange(4)[None], nothing, torch.zeros(1, 4, dtype=torch.long))
    ((masked, _, levels),) = trajectory_draws(0, 0, *args, num_steps=3)
    assert not masked.any() and (levels == 0).all()


# -- draws for likelihoods

PARTS = torch.tensor([0, 0, 0, 1, 1, 1, 1, 1, 1, 2])  # blocks of 3, 6 and 1 tokens
SIZES = torch.tensor([3, 6, 1])[PARTS]


@pytest.mark.parametrize("estimator", ["exact_count", "per_block"])
def test_exact_counts_of_a_replicate_are_every_count_once(estimator: str) -> None:
    """With as many samples as tokens, in blocks that divide them: every count as often, each weighed n / k."""
    masked, weights = draw(PARTS, 5, estimator, n_samples=18, replicates=3, seed=1)
    assert masked.shape == weights.shape == (18, 10) and weights.dtype == torch.float64
    assert (weights[~masked] == 0).all()
    for replicate in range(3):
        own = slice(6 * replicate, 6 * replicate + 6)
        for number, size in enumerate((3, 6, 1)):
            inside = PARTS == number
            counts = masked[own, inside].sum(-1)
            assert sorted(counts.tolist()) == [k for k in range(1, size + 1) for _ in range(6 // size)]
            totals = weights[own, inside].sum(-1)
            torch.testing.assert_close(totals, torch.full((6,), float(size), dtype=torch.float64))
    first, other = draw(PARTS, 5, estimator, 18, 3, seed=2)[0], draw(PARTS, 6, estimator, 18, 3, seed=1)[0]
    assert not torch.equal(masked, first) and not torch.equal(masked, other)
    assert not torch.equal(masked[:6], masked[6:12])


@pytest.mark.parametrize("estimator", ["uniform", "stratified"])
def test_levels_are_uniform_or_strata_and_the_share_that_is_masked(estimator: str) -> None:
    """The level of a sample is known from its weights; of 400 tokens about that share is masked."""
    n, samples, replicates = 400, 512, 8
    parts = torch.arange(2 * n) // n
    masked, weights = draw(parts, 3, estimator, samples, replicates, seed=4)
    for inside in (parts == 0, parts == 1):
        level = torch.where(masked, 1 / weights.clamp(min=1e-9), 0)[:, inside].amax(-1)
        known = level > 0
        assert known.float().mean() > 0.98
        torch.testing.assert_close(weights[:, inside], masked[:, inside] / level.clamp(min=1e-9)[:, None])
        share = masked[:, inside].double().mean(-1)
        assert ((share - level).abs() <= 4.5 * (level * (1 - level) / n) ** 0.5 + 0.01).all()
        strata = 0
        for replicate in range(replicates):
            own, there = (value[64 * replicate : 64 * replicate + 64] for value in (level, known))
            starts = (own[there] * 64) % 1  # strata of one replicate are all entered at the same place
            strata += bool((starts - starts[0]).abs().min() < 1e-6 and starts.std() < 1e-3)
            if estimator == "stratified":
                assert len(set((own[there] * 64).long().tolist())) == int(there.sum())
        assert strata == (8 if estimator == "stratified" else 0)
        assert abs(level.mean() - 0.5) < 0.06 and level.max() > 0.97
    both = masked.view(samples, 2, n).double().mean(-1)
    assert not torch.allclose(both[:, 0], both[:, 1], atol=0.1)  # every block has levels of its own


@pytest.mark.parametrize("estimator", ["any_order", "left_to_right"])
def test_orders_ask_for_every_token_once(estimator: str) -> None:
    """Step s of an order masks what is not known after s tokens of each block, and asks for the next of each."""
    masked, weights = draw(PARTS, 5, estimator, n_samples=4, replicates=2, seed=1)
    steps, orders = 6, set()
    assert masked.shape == weights.shape == (24, 10)
    for order in range(4):
        own = slice(steps * order, steps * order + steps)
        asked = weights[own] > 0
        assert (asked.sum(0) == 1).all() and set(weights[own][asked].tolist()) == {float(steps)}
        when = asked.int().argmax(0)
        for number in range(3):
            size = int((PARTS == number).sum())
            assert sorted(when[PARTS == number].tolist()) == list(range(size))
        for step in range(steps):
            assert torch.equal(masked[own][step], when >= step)
        orders.add(tuple(when.tolist()))
    if estimator == "left_to_right":
        assert orders == {(0, 1, 2, 0, 1, 2, 3, 4, 5, 0)}
    else:
        assert len(orders) == 4


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_nothing_to_score_is_a_draw_a_replicate(estimator: str) -> None:
    masked, weights = draw(PARTS[:0], 5, estimator, n_samples=8, replicates=4, seed=0)
    assert masked.shape == weights.shape == (4, 0) and masked.dtype == torch.bool and weights.dtype == torch.float64


def test_levels_of_a_row_are_the_shares_of_its_blocks() -> None:
    masked = torch.rand(5, 10, generator=torch.Generator().manual_seed(0)) < 0.5
    whole = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 2, 3])  # the last block scores nothing
    found = share_masked(masked, PARTS, whole)
    assert found.shape == (5, 12)
    for sample in range(5):
        for column, number in enumerate(whole.tolist()):
            inside = masked[sample][PARTS == number].tolist()
            assert found[sample, column] == pytest.approx(sum(inside) / len(inside) if inside else 0.0)


@pytest.mark.parametrize(
    ("estimator", "n_samples", "replicates", "named"),
    [
        ("uniform", 8, 4, None),
        ("any_order", 2, 2, None),
        ("exact_count", 2**16, 8, None),
        ("", 8, 4, "estimator"),
        ("uniform", 8, 1, "replicates"),
        ("uniform", 1, 2, "n_samples"),
        ("uniform", 2**16 + 8, 8, "n_samples"),
        ("uniform", 4, 8, "n_samples"),
        ("uniform", 12, 8, "n_samples"),
    ],
)
def test_samples_are_dealt_out_evenly(estimator: str, n_samples: int, replicates: int, named: str | None) -> None:
    if named is None:
        check_estimator(estimator, n_samples, replicates)
        return
    with pytest.raises(UserError, match=f"`{named}`"):
        check_estimator(estimator, n_samples, replicates)
