"""Figures of a logging period, from sums that are kept on the device and gathered once.

Trade-off: ratios of sums over the whole period and all processes, so that they do not depend on how batches were cut up. Alternative: the
host's means of per-batch means.
"""

from __future__ import annotations

import math

import torch

LEVELS = ("low", "middle", "high")  # thirds of the mask probability


def by_level(terms: torch.Tensor, levels: torch.Tensor) -> dict[str, torch.Tensor]:
    """Sum and count of the NLL in each third of the noise, (n,) each; what was read from clean text has none."""
    third = torch.where(levels > 0, (levels * len(LEVELS)).long().clamp(max=len(LEVELS) - 1), -1)
    sums = {f"nll_{name}": (terms * (third == i)).sum() for i, name in enumerate(LEVELS)}
    return sums | {f"n_{name}": (third == i).sum() for i, name in enumerate(LEVELS)}


def metric_values(sums: dict[str, float], bounded: bool) -> dict[str, float]:
    """Metrics by name; those that nothing was counted for are left out.

    Args:
        sums: what the trainer added up, over all processes.
        bounded: whether the terms make a bound on the text's NLL; what a drafter says to whole blocks does not.
    """
    ratios = {
        "nelbo": ("nll", "maskable"),
        "masked_accuracy": ("right", "scored"),
        "masked_nll": ("terms", "scored"),
        "masked_entropy": ("entropy", "scored"),
        "mask_ratio": ("masked", "maskable"),
        **{f"masked_nll_{name}_noise": (f"nll_{name}", f"n_{name}") for name in LEVELS},
        "distillation_loss": ("distillation", "teacher_mask"),
        "teacher_ratio": ("teacher_mask", "listened"),
        "accepted_length": ("accepted", "blocks"),
    }
    values = {name: sums[over] / sums[under] for name, (over, under) in ratios.items() if sums.get(under)}
    if not bounded:
        values.pop("nelbo", None)
    if "nelbo" in values:
        values["perplexity_bound"] = math.exp(min(values["nelbo"], 700.0))
    return values
