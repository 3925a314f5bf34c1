"""Noise schedules of masked diffusion: how likely a token is masked at time t, and what its loss then weighs.

A schedule is the survival probability alpha(t), falling from 1 at t=0 to 0 at t=1. A token is masked with probability
p(t) = 1 - alpha(t), and in the negative ELBO its cross-entropy weighs w(t) = -alpha'(t) / (1 - alpha(t)).
The NELBO does not depend on the schedule (substitute u = p(t)); only the variance of its estimate does.


References: MDLM (arXiv 2406.07524, eq. 10-11), LLaDA (arXiv 2502.09992, eq. 3), SMDM (arXiv 2410.18514), DDPM (arXiv 2006.11239,
section 4) and Improved DDPM (arXiv 2102.09672, eq. 17) for the schedules by beta.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from .. import UserError

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


def beta_linear(t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """DDPM's betas from 1e-4 to 0.02 over 1000 steps, in continuous time: alpha = exp(-(0.1 t + 9.95 t^2)). Shapes as `linear`.

    Rescaled so that nothing survives t = 1, where the original leaves 4e-5; the weight does not change by that.
    """
    t = t.float()
    hazard = 0.1 * t + 9.95 * t**2
    return torch.expm1(-hazard) / math.expm1(-10.05), (0.1 + 19.9 * t) / torch.expm1(hazard)


def beta_cosine(t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Improved DDPM's: alpha = cos^2(pi/2 (t + s) / (1 + s)) / cos^2(pi/2 s / (1 + s)), s = 0.008. Shapes as `linear`."""
    start, t = math.pi / 2 * 0.008 / 1.008, t.float()
    passed = math.pi / 2 * t / 1.008
    # cos^2 a - cos^2 b = sin(a + b) sin(b - a): no cancellation at small times.
    difference = torch.sin(2 * start + passed) * torch.sin(passed)
    weight = math.pi / 2 / 1.008 * torch.sin(2 * (start + passed)) / difference
    # The slope at t = 1 is zero up to rounding.
    return (difference / math.cos(start) ** 2).clamp(max=1), weight.clamp(min=0)


NOISE_SCHEDULES: dict[str, NoiseSchedule] = {
    "linear": linear,
    "cosine": cosine,
    "beta_linear": beta_linear,
    "beta_cosine": beta_cosine,
}


def get_noise_schedule(name: str) -> NoiseSchedule:
    """The schedule called `name`; ValueError when there is none."""
    if name not in NOISE_SCHEDULES:
        raise UserError(f"`noise_schedule` must be one of {sorted(NOISE_SCHEDULES)}, got {name!r}.")
    return NOISE_SCHEDULES[name]
