"""From causal to bidirectional attention, as a function of the optimiser step.

Three kinds: a soft bias on the future (`attention_masks.annealed`), a random 0/1 mask of it (`stochastic`), and blocks that grow.
The soft mask is the mean of the random one, without its noise. An annealed step needs a 4-D mask; at the target it is gone.

References: DiffuLLaMA (arXiv 2410.17891, section 3.2) for random masks, LLaDA 2.0 (arXiv 2512.15745) for growing blocks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from .. import UserError
from .attention_masks import additive, annealed, bidirectional, block_causal
from .noise import uniform
from .settings import read_value, setting

SCHEDULES = ("linear", "cosine", "exponential", "step")
KINDS = ("soft", "stochastic", "block")
ANNEALING_STREAM = 4


@dataclass
class AnnealingSettings:
    """Settings of annealing from causal attention."""

    annealing: str | None = setting(
        None,
        "From causal attention by a soft bias, random masks or growing blocks (with block attention: `block`); None: at once.",
        choices=KINDS,
    )
    annealing_steps: int | None = setting(
        None,
        "Optimiser steps since the model was autoregressive until the target is reached; None: to the end of this run.",
        min=1,
    )
    annealing_schedule: str = setting("cosine", "How the causal ratio falls.", choices=SCHEDULES)
    initial_causal_ratio: float = setting(1.0, "Causal ratio at the start; 1 is causal.", min=0, max=1)
    final_causal_ratio: float = setting(
        0.0, "Causal ratio for good, in evaluation and generation too; 0 is bidirectional.", min=0, below=1
    )
    annealing_decay: float = setting(
        5.0, "Of `exponential`: exp(-decay * progress), rescaled so that it ends without a jump.", above=0
    )
    annealing_points: list[list[float]] | None = setting(
        None, "Of `step`: [[step, share], …]: from that step on, this share of the distance is still to go."
    )

    def check_annealing(self) -> None:
        """Raises UserError for settings that do not go together."""
        if self.annealing is None and self.final_causal_ratio:
            raise UserError("`final_causal_ratio` belongs to `annealing`; set that to 'soft' or 'stochastic'.")
        if self.final_causal_ratio > self.initial_causal_ratio:
            raise UserError(
                f"`final_causal_ratio` ({self.final_causal_ratio}) must not be above `initial_causal_ratio` "
                f"({self.initial_causal_ratio})."
            )
        if self.annealing == "block" and (self.initial_causal_ratio, self.final_causal_ratio) != (1.0, 0.0):
            raise UserError("`annealing`='block' grows from causal to the target; leave the causal ratios at 1 and 0.")
        if (self.annealing_schedule == "step") != bool(self.annealing_points):
            raise UserError(
                "`annealing_points` belong to `annealing_schedule`='step', which needs them: [[step, share], …]."
            )
        read_value("annealing_points", self.annealing_points, list[list[float]] | None)
        if any(len(point) != 2 or not 0 <= point[1] <= 1 for point in self.annealing_points or []):
            raise UserError(
                f"`annealing_points` must be [step, share] pairs with shares in [0, 1], got {self.annealing_points}."
            )


@dataclass
class Annealing:
    """What the settings mean at every optimiser step, `total_steps` of which lead to the target."""

    settings: AnnealingSettings
    total_steps: int

    @property
    def grows_blocks(self) -> bool:
        return self.settings.annealing == "block"

    def causal_ratio(self, step: int) -> float:
        """How causal attention still is after `step` optimiser steps."""
        if step >= self.total_steps:
            return self.settings.final_causal_ratio
        settings, progress = self.settings, step / self.total_steps
        if settings.annealing_schedule == "linear":
            share = 1 - progress
        elif settings.annealing_schedule == "cosine":
            share = 0.5 * (1 + math.cos(math.pi * progress))
        elif settings.annealing_schedule == "exponential":
            decay = settings.annealing_decay
            share = math.expm1(decay * (1 - progress)) / math.expm1(decay)
        else:
            points = sorted(settings.annealing_points or [], reverse=True)
            share = next((share for start, share in points if step >= start), 1.0)
        final = settings.final_causal_ratio
        return final + share * (settings.initial_causal_ratio - final)

    def block_length(self, step: int, target: int) -> int:
        """Blocks of 1, 2, 4, … up to `target` tokens, each length equally long; blocks of one are causal."""
        if step >= self.total_steps:
            return target
        doublings = max(1, math.ceil(math.log2(target)))
        return min(target, 2 ** (step * doublings // self.total_steps))

    def mask(self, document_ids: torch.Tensor, step: int, seed: int, longest: int) -> torch.Tensor | None:
        """(B, L) -> (B, 1, L, L) additive mask of this step towards bidirectional attention; None: it is reached.

        Args:
            document_ids: see `attention_masks`.
            seed: of the stochastic masks.
            longest: length of the longest text there may be, which growing blocks end at.
        """
        ratio, over = self.causal_ratio(step), step >= self.total_steps
        if self.grows_blocks:
            return None if over else additive(block_causal(document_ids, self.block_length(step, longest)))
        if over or self.settings.annealing == "soft":
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
