"""How fast a model answers, and what speed costs: decoding settings swept, the AR decoding of the same weights beside them.

Trade-off: every setting answers the same prompts once in one batch (tokens a second), and the first few one by one (latency).
Alternative: a serving benchmark with arrivals, which measures the server.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from .. import UserError
from ..generation.generate import generate, generate_autoregressive
from ..models.patching import base_of
from ..models.record import record_of
from .answers import encode_prompts, evaluate_answers, prompt_and_reference

LATENCY_PROMPTS = 4
THRESHOLDS = (0.5, 0.7, 0.8, 0.9, 0.95, 0.99)


@dataclass
class Point:
    """Speed and quality of one way to decode.

    Args:
        settings: of the decoding; None: the AR model's greedy one.
        exact_match: percent, mean over the kinds of tasks.
        tokens_per_second: in one batch, end tokens included.
        tokens_per_forward: mean over the answers.
        first_token, last_token: seconds from the call until the first token of an answer is known, and until the answer is; median of
            single prompts.
        memory: peak of the batch in bytes, where the device counts it (CUDA).
        on_frontier: no other point is both faster and better.
    """

    settings: dict[str, Any] | None
    exact_match: float
    tokens_per_second: float
    tokens_per_forward: float
    first_token: float
    last_token: float
    memory: int | None = None
    on_frontier: bool = False


class _Clock(BaseStreamer):
    """Notes when the first token of the one answer is known."""

    def __init__(self, mask_token_id: int) -> None:
        self.mask, self.first, self.prompt_seen = mask_token_id, None, False
        self.started = time.perf_counter()

    def _note(self) -> None:
        if self.first is None:
            self.first = time.perf_counter() - self.started

    def put(self, value: torch.Tensor) -> None:
        if self.prompt_seen and value.numel():
            self._note()
        self.prompt_seen = True

    def put_draft(self, value: torch.Tensor) -> None:
        if int(value[0, 0]) != self.mask:
            self._note()

    def end(self) -> None:
        self._note()


def grid(axes: dict[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """All combinations: `{"threshold": [0.5, 0.9], "block_length": [8]}` -> two settings.

    Raises:
        ValueError: an axis that is no list, or has nothing on it.
    """
    for name, values in axes.items():
        if not isinstance(values, list | tuple) or not values:
            raise UserError(f"`sweep.{name}` must be a list of values, got {values!r}.")
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def default_grid(model: torch.nn.Module) -> list[dict[str, Any]]:
    """Thresholds; a drafter, whose answers do not depend on them, has one way to decode."""
    return [{}] if record_of(model).mode.drafts else grid({"threshold": THRESHOLDS})


def _latency(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    example: dict,
    settings: dict[str, Any] | None,
    longest: int,
) -> tuple[float, float]:
    """Seconds to the first and to the last token of one answer."""
    batch = encode_prompts(tokenizer, [prompt_and_reference(example)[0]]).to(base_of(model).device)
    clock = _Clock(tokenizer.mask_token_id)
    if settings is None:
        generate_autoregressive(model, **batch, max_new_tokens=longest, do_sample=False, streamer=clock)
    else:
        generate(model, **batch, **settings, streamer=clock)
    return clock.first, time.perf_counter() - clock.started


def measure_point(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[dict],
    settings: dict[str, Any] | None,
    longest: int,
) -> Point:
    """One way to decode; `settings` None is the AR model's, of `longest` tokens at most."""
    cuda = base_of(model).device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    given = {"autoregressive": True, "max_new_tokens": longest} if settings is None else settings
    report = evaluate_answers(model, tokenizer, examples, **given)
    memory = torch.cuda.max_memory_allocated() if cuda else None
    times = [_latency(model, tokenizer, example, settings, longest) for example in examples[:LATENCY_PROMPTS]]
    first, last = (statistics.median(values) for values in zip(*times, strict=True))
    speed = sum(report.tokens) / report.seconds
    return Point(settings, report.mean, speed, report.tokens_per_forward, first, last, memory)


def sweep(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[dict],
    settings: dict[str, Any],
    points: Sequence[dict[str, Any]],
    base: tuple[torch.nn.Module, PreTrainedTokenizerBase] | None = None,
) -> list[Point]:
    """The AR decoding of the same weights or of `base`, then every point of a grid over common `settings`.

    A first round warms up and is not counted.
    """
    longest = settings.get("max_new_tokens", 128)
    measure_point(model, tokenizer, examples[:1], {**settings, **points[0]}, longest)
    found = [measure_point(*(base or (model, tokenizer)), examples, None, longest)]
    found += [measure_point(model, tokenizer, examples, {**settings, **point}, longest) for point in points]
    for point in found:
        point.on_frontier = not any(_dominates(other, point) for other in found)
    return found


def _dominates(other: Point, point: Point) -> bool:
    mine, others = (point.exact_match, point.tokens_per_second), (other.exact_match, other.tokens_per_second)
    return others != mine and all(b >= a for a, b in zip(mine, others, strict=True))
