"""Noise of preference pairs: the draws that a score is estimated from, shared by all that is compared.

A score of a text is the mean over draws of sum_i w_i log p(x_i | visible), in two ways:

    elbo         draw j masks k of n tokens, k / n from the j-th of equal strata, and weighs them n / k: unbiased for -NELBO
    trajectory   the tokens are dealt in random order to num_steps groups; draw j masks groups j, j + 1, … and scores group j

    trajectory of 4 steps    draw 0   M M M M M M M M     scored: x . . x . . . .
                             draw 1   a M M d M M M M             . x . . . . x .
                             draw 2   a b M d M M g M             . . x . x . . .
                             draw 3   a b c d e M g M             . . . . . x . x

What enters a loss is a difference of four scores. Policy and reference are asked under the very same masks (VRPO), and the two texts of a
pair share the noise of the tokens that they have in common, so that what they do not differ in cancels.
Trade-off: masks of the two texts are equal where the texts are, and independent where they are not, which keeps every single score
unbiased. Alternative: one mask by position, which an inserted token puts out of step.

References: VRPO (LLaDA 1.5, arXiv 2505.19223, section 3), LLaDA (arXiv 2502.09992, eq. 6) for exact counts.
"""

from __future__ import annotations

from collections.abc import Iterator
from difflib import SequenceMatcher

import torch

from .noise import (
    MASK_STREAM,
    MIN_TIME,
    TIME_STREAM,
    draw_exact_mask,
    hash_keys,
    ranks,
    stratified_times,
    times_of_parts,
    uniform,
)

SCORES = ("elbo", "trajectory")
Draw = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def aligned_positions(chosen: list[int], rejected: list[int]) -> tuple[list[int], list[int]]:
    """A key for every token of two texts, equal for tokens that they have in common, or that take each other's place.

    Every key stands once in each text.
    """
    ours, theirs = list(range(len(chosen))), [-1] * len(rejected)
    blocks = SequenceMatcher(a=chosen, b=rejected, autojunk=False).get_opcodes()
    for _, start, end, other, other_end in blocks:
        for i in range(other, other_end):
            inside = start + i - other
            theirs[i] = inside if inside < end else len(chosen) + i
    return ours, theirs


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
    part: torch.Tensor,
    n_draws: int,
) -> Iterator[Draw]:
    """Draws with an exact number of masks, times in equal strata, one mask a time (VRPO's optimal use of a budget).

    Args:
        seed, step: of the noise.
        keys: (B,) keys of the rows; the two texts of a pair have the same.
        times: (B,) see `pair_times`.
        position: (B, L) key of every maskable token, see `aligned_positions`.
        maskable: (B, L) bool.
        part: (B, L) number of the text or block of every token; each part has its own time.
        n_draws: how many.

    Yields:
        (B, L) bool masks, (B, L) weights, (B, L) mask probability.
    """
    for draw in range(n_draws):
        of_rows = MIN_TIME + (1 - MIN_TIME) * (draw + times) / n_draws
        own = hash_keys(keys, draw)
        masked, probability = draw_exact_mask(
            seed, step, own, times_of_parts(of_rows, part), maskable, part, position=position
        )
        yield masked, 1 / probability, probability


def trajectory_draws(
    seed: int,
    step: int,
    keys: torch.Tensor,
    position: torch.Tensor,
    maskable: torch.Tensor,
    part: torch.Tensor,
    num_steps: int,
) -> Iterator[Draw]:
    """One denoising trajectory of `num_steps` steps, backwards in noise; in each, what it reveals. Arguments as `elbo_draws`.

    log p(y_t | y_t+1) of the tokens that step t reveals, summed over the steps: every token once. What belongs to the noise and not
    to the model is the same for policy and reference and left out. In expectation a bound that is looser than the ELBO's, and exact
    with one token a step; with less noise. A part of fewer tokens than steps has as many steps as tokens.
    """
    rank, n = ranks(uniform(seed, step, keys[:, None], position, MASK_STREAM), maskable, part)
    steps = n.clamp(max=num_steps)
    group = rank * steps // n
    n_draws = int(steps[maskable].max()) if maskable.any() else 1
    for draw in range(n_draws):
        masked = maskable & (group >= draw)
        hidden = torch.zeros_like(part).scatter_add(-1, part, masked.long()).gather(-1, part)
        yield masked, n_draws * (group == draw).float(), hidden / n
