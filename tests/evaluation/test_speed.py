"""Sweeps: every setting is measured as `evaluate_answers` measures it, clocks run in order, and the frontier is the frontier."""

import pytest
import torch

from llm_diffusion.data.tiny import tiny_dataset
from llm_diffusion.evaluation.answers import evaluate_answers
from llm_diffusion.evaluation.speed import (
    _Clock,
    default_grid,
    grid,
    sweep,
)


def test_grid() -> None:
    assert grid({"threshold": [0.5, 0.9], "block_length": [8]}) == [
        {"threshold": 0.5, "block_length": 8},
        {"threshold": 0.9, "block_length": 8},
    ]
    for axes in ({"threshold": 0.5}, {"threshold": []}):
        with pytest.raises(ValueError, match="`sweep.threshold` must be a list"):
            grid(axes)


def test_sweep_measures_every_way(tiny) -> None:
    model, tokenizer = tiny
    examples = list(tiny_dataset(6, split="test"))
    settings = {"max_new_tokens": 12, "block_length": 6}
    base, *points = sweep(model, tokenizer, examples, settings, grid({"threshold": [0.3, 0.99]}))
    assert base.settings is None and base.tokens_per_forward == 1
    for point, threshold in zip(points, (0.3, 0.99), strict=True):
        assert point.settings == {**settings, "threshold": threshold}
        report = evaluate_answers(model, tokenizer, examples, **point.settings)
        assert point.exact_match == report.mean and point.tokens_per_forward == report.tokens_per_forward
        assert all(1 <= n <= 12 for n in report.tokens)
    assert points[0].tokens_per_forward > points[1].tokens_per_forward >= 1
    for point in (base, *points):
        assert 0 < point.first_token <= point.last_token and point.tokens_per_second > 0 and point.memory is None
    everyone = (base, *points)
    best = max(p.exact_match for p in everyone), max(p.tokens_per_second for p in everyone)
    for point in everyone:
        beaten = any(
            (o.exact_match, o.tokens_per_second) != (point.exact_match, point.tokens_per_second)
            and o.exact_match >= point.exact_match
            and o.tokens_per_second >= point.tokens_per_second
            for o in everyone
        )
        assert point.on_frontier == (not beaten)
    assert any(p.on_frontier and p.tokens_per_second == best[1] for p in everyone)


def test_the_clock_stops_at_the_first_known_token() -> None:
    clock = _Clock(mask_token_id=9)
    clock.put(torch.tensor([[1, 2, 3]]))
    clock.put_draft(torch.tensor([[9, 5, 9]]))  # a token further right does not count
    assert clock.first is None
    clock.put_draft(torch.tensor([[4, 5, 9]]))
    first = clock.first
    assert first > 0
    clock.put(torch.tensor([[4, 5, 6]]))
    clock.end()
    assert clock.first == first


def test_tokens_are_counted_through_the_end(tiny) -> None:
    model, tokenizer = tiny
    examples = list(tiny_dataset(6, split="test"))
    report = evaluate_answers(model, tokenizer, examples, autoregressive=True, max_new_tokens=60)
    for answer, tokens, ended in zip(report.answers, report.tokens, report.ended, strict=True):
        assert tokens == len(tokenizer(answer)["input_ids"]) + ended


def test_default_grid(tiny) -> None:
    assert {"threshold": 0.9} in default_grid(tiny[0]) and len(default_grid(tiny[0])) == 6
