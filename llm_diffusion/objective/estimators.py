"""Masks and weights of likelihood estimators: what one sample of the bound sees of a text, and how its terms count.

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
Trade-off: exact counts and strata, because noise in t is most of the noise. Alternative: independent times, as in training.

References: LLaDA (arXiv 2502.09992, eq. 6) for exact counts, VDM (arXiv 2107.00630, appendix I.1) for strata, BD3LM (arXiv 2503.09573,
section 3) for blocks, ARDM (arXiv 2110.02037, section 3) for orders.
"""

from __future__ import annotations

import torch

from .. import UserError
from .noise import (
    MASK_STREAM,
    ORDER_STREAM,
    TIME_STREAM,
    uniform,
)

ESTIMATORS = ("uniform", "stratified", "exact_count", "per_block", "any_order", "left_to_right")
REPLICATES = 8  # independent parts of the samples, from which the standard error comes
LEAST_LEVEL = 2.0**-24  # half a step of `noise.uniform`: no weight is infinite, and the bias is below what fp32 holds


def check_estimator(estimator: str, n_samples: int, replicates: int) -> None:
    """Raises ValueError for an unknown estimator or samples that cannot be dealt out to the replicates."""
    if estimator not in ESTIMATORS:
        raise UserError(f"`estimator` must be one of {ESTIMATORS}, got {estimator!r}.")
    if replicates < 2 or n_samples < replicates or n_samples % replicates:
        raise UserError(
            "`n_samples` must be a multiple of `replicates` (at least 2), from which the standard error comes; "
            f"got {n_samples} and {replicates}."
        )


def draw(
    part: torch.Tensor, key: int, estimator: str, n_samples: int, replicates: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Masks of the scored tokens of a row, and their weights; the mean over a replicate's samples is unbiased.

    Args:
        part: (n,) number of the block of every token that may be masked, rising from the left; with n = 0, D = replicates.
        key: of the row's noise.
        n_samples: rows D of the result; orders of "any_order", D = n_samples times the longest part; "left_to_right" has one order.
        replicates: independent parts of the samples, which stand together; strata are spread over each.

    Returns:
        `(masked, weights)`, (D, n) bool and fp64; a token that is not masked has no weight.
    """
    if not len(part):
        return torch.zeros(replicates, 0, dtype=torch.bool), torch.zeros(replicates, 0, dtype=torch.float64)
    position, keys = torch.arange(len(part)), torch.tensor(key)
    sizes = (part[:, None] == part).sum(-1)
    if estimator in ("any_order", "left_to_right"):
        order = torch.arange(n_samples)[:, None]
        noise = uniform(seed, keys, order, position, ORDER_STREAM)
        rank = _ranks(noise if estimator == "any_order" else position[None] / len(part), part)[:, None]
        steps = int(sizes.max())
        step = torch.arange(steps)[:, None]
        return (rank >= step).flatten(0, 1), steps * (rank == step).flatten(0, 1).double()
    sample, size = torch.arange(n_samples)[:, None], n_samples // replicates
    if estimator == "uniform":
        level = uniform(seed, keys, sample, part, TIME_STREAM).double()
    else:
        # Every block starts its strata elsewhere; each level alone is uniform.
        start = uniform(seed, keys, sample // size, part, TIME_STREAM).double()
        level = ((sample % size) / size + start) % 1.0
    level = level.clamp(min=LEAST_LEVEL)
    noise = uniform(seed, keys, sample, position, MASK_STREAM)
    if estimator in ("uniform", "stratified"):
        masked = noise < level
        return masked, masked / level
    count = (level * sizes).ceil()
    masked = _ranks(noise, part) < count
    return masked, masked * sizes / count


def _ranks(noise: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """Place of every token among those of its part, sorted by noise in [0, 1): (D, n), (n,) -> (D, n)."""
    order = (part + noise.double()).argsort(-1).argsort(-1)
    return order - (part < part[:, None]).sum(-1)


def share_masked(masked: torch.Tensor, part: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """Noise level of every token of a row, the share of its part's scored tokens that is masked: (D, n), (n,), (L,) -> (D, L)."""
    counts = torch.zeros(len(masked), int(whole.max()) + 1).index_add(1, part, masked.float())
    sizes = torch.zeros(counts.shape[1]).index_add(0, part, torch.ones(len(part)))
    return (counts / sizes.clamp(min=1))[:, whole]
