"""Scores of texts against exact log-probabilities: unbiased, exact one token a step, and quiet where noise is shared."""

from __future__ import annotations

import pytest
import torch
from collators import collator_of
from oracle import MarkovChain

from llm_diffusion.models.lm_head import scores_of_logits
from llm_diffusion.objective.estimators import aligned_positions, elbo_draws, pair_times, trajectory_draws
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


def test_common_tokens_are_masked_together() -> None:
    """Also behind an inserted token, where positions differ."""
    rows = [{"prompt_ids": [1, 2], "chosen_ids": [3, 4, 5, 1, 2, 3, 4, 0], "rejected_ids": [3, 5, 5, 1, 2, 3, 4, 0]}]
    inserted = [{**rows[0], "rejected_ids": [0, *rows[0]["chosen_ids"]]}]
    for noisy in collator().corrupt(collator()(rows), seed=1, step=0):
        assert torch.equal(*noisy["masked"])
    same = total = 0
    batch = collator()(inserted)
    for step in range(50):
        for noisy in collator().corrupt(batch, seed=1, step=step):
            same += (noisy["masked"][0, 2:10] == noisy["masked"][1, 3:11]).sum()
            total += 8
    assert same / total > 0.9


@pytest.mark.parametrize("shift", [False, True])
def test_elbo_score_is_unbiased(shift: bool) -> None:
    batch = pairs(48)
    scores = torch.stack([score_of(CHAIN, batch, seed, shift, n_draws=4) for seed in range(24)]).double()
    error = (scores - exact(CHAIN, batch)).mean(0)  # of 24 estimates, per row
    mean, spread = error.mean(), error.std() / len(error) ** 0.5
    assert abs(mean) < 3 * spread + 1e-9, (mean, spread)
    assert spread < 0.2  # so that a bias of a nat would show


def test_elbo_score_is_unbiased_in_blocks() -> None:
    """Each block has a time of its own: the weights still average to one a token."""
    maskable = torch.ones(2, 12, dtype=torch.bool)
    part = torch.arange(12).expand(2, -1) // 4
    position, keys = torch.arange(12).expand(2, -1), torch.tensor([3, 3])
    total = torch.zeros(2, 12)
    for step in range(250):
        times = pair_times(0, step, keys)
        for masked, weights, _ in elbo_draws(0, step, keys, times, position, maskable, part, 4):
            total += masked * weights / 1000
    torch.testing.assert_close(total, torch.ones(2, 12), atol=0.15, rtol=0)


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
    values = []
    n = len(batch["input_ids"]) // 2
    for seed in range(24):
        seeds = [seed] * 4 if shared else [1000 + 4 * seed + i for i in range(4)]
        chosen, rejected = slice(0, n), slice(n, 2 * n)
        sides = [
            score_of(chain, batch, own, **options)[side]
            for (chain, side), own in zip(
                [(POLICY, chosen), (CHAIN, chosen), (POLICY, rejected), (CHAIN, rejected)], seeds, strict=True
            )
        ]
        values.append(sides[0] - sides[1] - sides[2] + sides[3])
    return torch.stack(values).std(0).mean().item()


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
