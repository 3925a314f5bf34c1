"""Noise schedules of masked diffusion: how likely a token is masked at time t, and what its loss then weighs.

A schedule is the survival probability alpha(t), falling from 1 at t=0 to 0 at t=1. A token is masked with probability
p(t) = 1 - alpha(t), and in the negative ELBO its cross-entropy weighs w(t) = -alpha'(t) / (1 - alpha(t)).
The NELBO does not depend on the schedule (substitute u = p(t)); only the variance of its estimate does.

Trade-off: one plain function a schedule, closed forms in fp32, no classes. Alternative: `diffusers` schedulers, which carry
state and step logic that a masked objective does not need.

References: MDLM (arXiv 2406.07524, eq. 10-11), LLaDA (arXiv 2502.09992, eq. 3), SMDM (arXiv 2410.18514).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

NoiseSchedule = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def linear(t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """alpha = 1 - t: mask probability t, weight 1/t.

    Args:
        t: times in (0, 1], any shape.

    Returns:
        `(mask_probability, weight)`, fp32, of the same shape.
    """
    t = t.float()
    return t, 1 / t


def cosine(t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """alpha = 1 - cos(pi/2 (1 - t)): more time at high noise; weight pi/2 tan(pi/2 (1 - t)). Shapes as `linear`."""
    angle = math.pi / 2 * (1 - t.float())
    return torch.cos(angle), math.pi / 2 * torch.tan(angle)


NOISE_SCHEDULES: dict[str, NoiseSchedule] = {"linear": linear, "cosine": cosine}


def get_noise_schedule(name: str) -> NoiseSchedule:
    """The schedule called `name`; ValueError when there is none."""
    if name not in NOISE_SCHEDULES:
        raise ValueError(f"`noise_schedule` must be one of {sorted(NOISE_SCHEDULES)}, got {name!r}.")
    return NOISE_SCHEDULES[name]
