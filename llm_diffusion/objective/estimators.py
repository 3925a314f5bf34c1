"""Masks and weights of estimators: of a text's likelihood, and of the scores that preferences compare.

    -log p(x | context)  <=  NELBO(x)  =  E[ sum over masked i of w * -log p(x_i | visible) ]

    estimator       noise of one sample                                                    weight of a masked token
    uniform         t uniform, every token masked with probability t                       1 / t
    stratified      the same, t spread evenly over the samples of a replicate              1 / t
    exact_count     exactly k of the n tokens masked, k spread evenly over 1 … n           n / k
    per_block       as exact_count, block after block, nothing behind a block being seen   n / k
    any_order       a random order, one token a step: n forward passes                     1, on the next token alone
    left_to_right   the order of the text, one token a step: no noise                      1, on the next token alone

All but the last and, for a bidirectional model, `per_block` have the same expectation. Block models work inside each block, all blocks
of a text in one pass: to them `per_block` is `exact_count`.

References: LLaDA (arXiv 2502.09992, eq. 6) for exact counts, VDM (arXiv 2107.00630, appendix I.1) for strata, BD3LM (arXiv 2503.09573,
section 3) for blocks, ARDM (arXiv 2110.02037, section 3) for orders.

A preference score of a text is the mean over draws of sum_i w_i log p(x_i | visible), in two ways:

    elbo         draw j masks k of n tokens, k / n from the j-th of equal strata, and weighs them n / k: unbiased for -NELBO
    trajectory   the tokens are dealt in random order to num_steps groups; draw j masks groups j, j + 1, … and scores group j

    trajectory of 4 steps    draw 0   M M M M M M M M     scored: x . . x . . . .
                             draw 1   a M M d M M M M             . x . . . . x .
                             draw 2   a b M d M M g M             . . x . x . . .
                             draw 3   a b c d e M g M             . . . . . x . x

What enters a loss is a difference of four scores. Policy and reference see the very same masks (VRPO, arXiv 2505.19223, section 3),
and the two texts of a pair share the noise of the tokens that they have in common, so that what they do not differ in cancels;
where they differ the masks are independent, which keeps every single score unbiased.
"""

from __future__ import annotations

from collections.abc import Iterator
from difflib import SequenceMatcher

import torch

from .. import UserError
from .noise import (
    MASK_STREAM,
    MIN_TIME,
    ORDER_STREAM,
    TIME_STREAM,
    draw_exact_mask,
    hash_keys,
    ranks,
    stratified_times,
    times_of_segments,
    uniform,
)
from .settings import check_value

ESTIMATORS = ("uniform", "stratified", "exact_count", "per_block", "any_order", "left_to_right")
REPLICATES = 8  # independent parts of the samples, from which the standard error comes
MAX_SAMPLES = 2**16  # whose masks fit into memory
LEAST_LEVEL = 2.0**-24  # half a step of `noise.uniform`: no weight is infinite, and the bias is below what fp32 holds


def check_estimator(estimator: str, n_samples: int, replicates: int) -> None:
    """Raises ValueError for an unknown estimator or samples that cannot be dealt out to the replicates."""
    if estimator not in ESTIMATORS:
        raise UserError(f"`estimator` must be one of {ESTIMATORS}, got {estimator!r}.")
    check_value("replicates", replicates, int, {"min": 2})
    check_value("n_samples", n_samples, int, {"min": 2, "max": MAX_SAMPLES})
    if n_samples < replicates or n_samples % replicates:
        raise UserError(
            "`n_samples` must be a multiple of `replicates`, from which the standard error comes; "
            f"got {n_samples} and {replicates}."
        )


def draw(
    segment_ids: torch.Tensor, key: int, estimator: str, n_samples: int, replicates: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Masks of the scored tokens of a row, and their weights; the mean over a replicate's samples is unbiased.

    Args:
        segment_ids: (n,) number of the block of every token that may be masked, rising from the left; with n = 0, D = replicates.
        key: of the row's noise.
        n_samples: rows D of the result; orders of "any_order", D = n_samples times the longest block; "left_to_right" has one order.
        replicates: independent parts of the samples, which stand together; strata are spread over each.

    Returns:
        `(masked, weights)`, (D, n) bool and fp64; a token that is not masked has no weight.
    """
    if not len(segment_ids):
        return torch.zeros(replicates, 0, dtype=torch.bool), torch.zeros(replicates, 0, dtype=torch.float64)
    position, keys = torch.arange(len(segment_ids)), torch.tensor(key)
    whole = torch.ones(n_samples, len(segment_ids), dtype=torch.bool)
    if estimator in ("any_order", "left_to_right"):
        noise = uniform(seed, keys, torch.arange(n_samples)[:, None], position, ORDER_STREAM)
        noise = noise if estimator == "any_order" else (position / len(segment_ids)).expand_as(noise)
        rank, sizes = ranks(noise, whole, segment_ids.expand_as(noise))
        rank, steps = rank[:, None], int(sizes.max())
        step = torch.arange(steps)[:, None]
        return (rank >= step).flatten(0, 1), steps * (rank == step).flatten(0, 1).double()
    sample, size = torch.arange(n_samples)[:, None], n_samples // replicates
    if estimator == "uniform":
        level = uniform(seed, keys, sample, segment_ids, TIME_STREAM).double()
    else:
        # Every block starts its strata elsewhere; each level alone is uniform.
        start = uniform(seed, keys, sample // size, segment_ids, TIME_STREAM).double()
        level = ((sample % size) / size + start) % 1.0
    level = level.clamp(min=LEAST_LEVEL)
    noise = uniform(seed, keys, sample, position, MASK_STREAM)
    if estimator in ("uniform", "stratified"):
        masked = noise < level
        return masked, masked / level
    rank, sizes = ranks(noise, whole, segment_ids.expand_as(noise))
    count = (level * sizes).ceil()
    masked = rank < count
    return masked, masked * sizes / count


def share_masked(masked: torch.Tensor, segment_ids: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """Noise level of every token of a row, the share of its segment's scored tokens that is masked: (D, n), (n,), (L,) -> (D, L)."""
    counts = torch.zeros(len(masked), int(whole.max()) + 1).index_add(1, segment_ids, masked.float())
    sizes = torch.zeros(counts.shape[1]).index_add(0, segment_ids, torch.ones(len(segment_ids)))
    return (counts / sizes.clamp(min=1))[:, whole]


SCORES = ("elbo", "trajectory")
Draw = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def aligned_positions(chosen: list[int], rejected: list[int]) -> tuple[list[int], list[int]]:
    """A key for every token of two texts, equal for tokens that they have in common, or that take each other's place.

    Every key stands once in each text.
    """
    theirs: list[int] = []
    for _, start, end, other, other_end in SequenceMatcher(a=chosen, b=rejected, autojunk=False).get_opcodes():
        places = range(start, start + other_end - other)
        theirs += [place if place < end else len(chosen) + other - start + place for place in places]
    return list(range(len(chosen))), theirs


def pair_times(seed: int, step: int, keys: torch.Tensor, n_pairs: int | None = None) -> torch.Tensor:
    """Where every pair's first stratum is entered, in (0, 1): (B,) places in the global batch of `n_pairs` -> (B,).

    Over the pairs of an optimiser step these are stratified too. Without `n_pairs`, `keys` are any keys, and all is random.
    """
    if n_pairs is None:
        return uniform(seed, step, keys, TIME_STREAM)
    return stratified_times(seed, step, keys, n_pairs, low=0.0)


def elbo_draws(
    seed: int,
    step: int,
    keys: torch.Tensor,
    times: torch.Tensor,
    position: torch.Tensor,
    maskable: torch.Tensor,
    segment_ids: torch.Tensor,
    n_draws: int,
) -> Iterator[Draw]:
    """Draws with an exact number of masks, times in equal strata, one mask a time (VRPO's optimal use of a budget).

    Args:
        seed, step: of the noise.
        keys: (B,) keys of the rows; the two texts of a pair have the same.
        times: (B,) see `pair_times`.
        position: (B, L) key of every maskable token, see `aligned_positions`.
        maskable: (B, L) bool.
        segment_ids: (B, L) number of the text or block of every token; each segment has its own time.
        n_draws: how many.

    Yields:
        (B, L) bool masks, (B, L) weights, (B, L) mask probability.
    """
    for draw in range(n_draws):
        of_rows = MIN_TIME + (1 - MIN_TIME) * (draw + times) / n_draws
        own = hash_keys(keys, draw)
        masked, probability = draw_exact_mask(
            seed, step, own, times_of_segments(of_rows, segment_ids), maskable, segment_ids, position=position
        )
        yield masked, 1 / probability, probability


def trajectory_draws(
    seed: int,
    step: int,
    keys: torch.Tensor,
    position: torch.Tensor,
    maskable: torch.Tensor,
    segment_ids: torch.Tensor,
    num_steps: int,
) -> Iterator[Draw]:
    """One denoising trajectory of `num_steps` steps, backwards in noise; in each, what it reveals. Arguments as `elbo_draws`.

    log p(y_t | y_t+1) of the tokens that step t reveals, summed over the steps: every token once. What belongs to the noise and not
    to the model is the same for policy and reference and left out. In expectation a bound that is looser than the ELBO's, and exact
    with one token a step; with less noise. A segment of fewer tokens than steps has as many steps as tokens.
    """
    rank, n = ranks(uniform(seed, step, keys[:, None], position, MASK_STREAM), maskable, segment_ids)
    steps = n.clamp(max=num_steps)
    group = rank * steps // n
    n_draws = int(steps[maskable].max()) if maskable.any() else 1
    for draw in range(n_draws):
        masked = maskable & (group >= draw)
        hidden = torch.zeros_like(segment_ids).scatter_add(-1, segment_ids, masked.long()).gather(-1, segment_ids)
        yield masked, n_draws * (group == draw).float(), hidden / n
