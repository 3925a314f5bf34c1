"""The way from causal to bidirectional attention, as a function of the optimiser step.

Three ways: a soft bias on the future (`attention_masks.annealed`), a random 0/1 mask of it (`stochastic`), and blocks that grow.
The soft mask is the mean of the random one, without its noise.
Trade-off: an annealed step needs a 4-D mask, which costs the fastest kernels; at the target it is gone. Alternative: no annealing
at all, which under LoRA and at small budgets is often no worse: measure.

References: DiffuLLaMA (arXiv 2410.17891, section 3.2) for random masks, LLaDA 2.0 (arXiv 2512.15745) for growing blocks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from .. import UserError
from .attention_masks import (
    additive,
    annealed,
    bidirectional,
    block_causal,
)
from .noise import uniform

SCHEDULES = ("linear", "cosine", "exponential", "step")
MODES = ("soft", "stochastic", "block")
ANNEALING_STREAM = 4


@dataclass
class Annealing:
    """Settings of the way, and what they say of every optimiser step.

    Args:
        mode: "soft", "stochastic" or "block".
        total_steps: optimiser steps until the target is reached.
        schedule: of the causal ratio: "linear", "cosine", "exponential" or "step".
        initial, final: causal ratio at the start and for good; 1 is causal, 0 bidirectional.
        decay: of "exponential": exp(-decay * progress), rescaled so that it ends at `final` without a jump.
        points: of "step", (step, share) pairs: from that step on, this share of the way is still to go.

    Raises:
        ValueError: unknown mode or schedule, or a number out of range.
    """

    mode: str
    total_steps: int
    schedule: str = "cosine"
    initial: float = 1.0
    final: float = 0.0
    decay: float = 5.0
    points: list[list[float]] | None = None

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise UserError(f"`annealing` must be one of {MODES} or None, got {self.mode!r}.")
        if self.schedule not in SCHEDULES:
            raise UserError(f"`annealing_schedule` must be one of {SCHEDULES}, got {self.schedule!r}.")
        if self.total_steps < 1:
            raise UserError(f"`annealing_steps` must be at least 1, got {self.total_steps}.")
        if not 0 <= self.final < 1 or not self.final <= self.initial <= 1:
            raise UserError(
                "`initial_causal_ratio` and `final_causal_ratio` must satisfy 0 <= final <= initial <= 1 and final < 1, got "
                f"{self.initial} and {self.final}."
            )
        if self.mode == "block" and (self.initial, self.final) != (1.0, 0.0):
            raise UserError("`annealing`='block' grows from causal to the target; leave the causal ratios at 1 and 0.")
        if self.schedule == "exponential" and self.decay <= 0:
            raise UserError(f"`annealing_decay` must be above 0, got {self.decay}.")
        if (self.schedule == "step") != bool(self.points):
            raise UserError(
                "`annealing_points` belong to `annealing_schedule`='step', which needs them: [[step, share], …]."
            )
        if any(len(point) != 2 or not 0 <= point[1] <= 1 for point in self.points or []):
            raise UserError(f"`annealing_points` must be [step, share] pairs with shares in [0, 1], got {self.points}.")

    def causal_ratio(self, step: int) -> float:
        """How causal attention still is after `step` optimiser steps."""
        if step >= self.total_steps:
            return self.final
        progress = step / self.total_steps
        if self.schedule == "linear":
            share = 1 - progress
        elif self.schedule == "cosine":
            share = 0.5 * (1 + math.cos(math.pi * progress))
        elif self.schedule == "exponential":
            share = math.expm1(self.decay * (1 - progress)) / math.expm1(self.decay)
        else:
            share = next((share for start, share in sorted(self.points or [], reverse=True) if step >= start), 1.0)
        return self.final + share * (self.initial - self.final)

    def block_length(self, step: int, target: int) -> int:
        """Blocks of 1, 2, 4, … up to `target` tokens, each length equally long; blocks of one are causal."""
        if step >= self.total_steps:
            return target
        doublings = max(1, math.ceil(math.log2(target)))
        return min(target, 2 ** (step * doublings // self.total_steps))

    def mask(self, document_ids: torch.Tensor, step: int, seed: int, longest: int) -> torch.Tensor | None:
        """(B, L) -> (B, 1, L, L) additive mask of this step on the way to bidirectional attention; None: it is reached.

        Args:
            document_ids: see `attention_masks`.
            seed: of the stochastic masks.
            longest: length of the longest text there may be, which growing blocks end at.
        """
        ratio = self.causal_ratio(step)
        if self.mode == "block":
            return (
                additive(block_causal(document_ids, self.block_length(step, longest)))
                if step < self.total_steps
                else None
            )
        if self.mode == "soft" or step >= self.total_steps:
            return annealed(document_ids, ratio) if ratio else None
        return additive(stochastic(document_ids, ratio, seed, step))


def stochastic(document_ids: torch.Tensor, ratio: float, seed: int, step: int) -> torch.Tensor:
    """Every pair of a token and a later one is open with probability 1 - ratio, one draw a step for all rows and layers.

    Args:
        document_ids: (B, L), see `attention_masks`.
        seed, step: key of the draw.

    Returns:
        (B, L, L) bool.
    """
    index = torch.arange(document_ids.shape[-1], device=document_ids.device)
    opened = uniform(seed, step, index[:, None], index, ANNEALING_STREAM) >= ratio
    return bidirectional(document_ids) & (opened | (index[:, None] >= index))
