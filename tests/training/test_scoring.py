"""Figures of a logging period: thirds of the noise by hand, and nothing where nothing was counted."""

from __future__ import annotations

import math

import pytest
import torch

from llm_diffusion.training.scoring import by_level, metric_values


def test_thirds_of_the_noise() -> None:
    terms, levels = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0]), torch.tensor([0.0, 0.2, 0.5, 0.9, 1.0])
    sums = {name: value.item() for name, value in by_level(terms, levels).items()}
    assert sums == {"nll_low": 2, "nll_middle": 4, "nll_high": 24, "n_low": 1, "n_middle": 1, "n_high": 2}


def test_ratios_of_sums() -> None:
    sums = {"nll": 6.0, "maskable": 4.0, "terms": 3.0, "scored": 2.0, "right": 1.0, "entropy": 0.5, "masked": 2.0}
    values = metric_values({**sums, "nll_low": 0.0, "n_low": 0.0}, bounded=True)
    assert values["nelbo"] == 1.5 and values["perplexity_bound"] == pytest.approx(math.exp(1.5))
    assert values["masked_nll"] == 1.5 and values["masked_accuracy"] == 0.5 and values["mask_ratio"] == 0.5
    assert "masked_nll_low_noise" not in values and "accepted_length" not in values
    assert {"nelbo", "perplexity_bound"}.isdisjoint(metric_values(sums, bounded=False))
    assert metric_values({}, bounded=True) == {}
    assert metric_values({"maskable": 0.0, "from_teacher": 2.0, "distillation": 1.0}, True) == {
        "distillation_loss": 0.5
    }
