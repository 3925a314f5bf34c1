"""Measuring by several processes, which `accelerate launch` or torchrun started: items are dealt out, results come back to all of them.

Every process must call these together, and needs all weights. With one process they do nothing.
Trade-off: items are dealt like cards, so that long ones, which are put first, spread evenly. Alternative: a queue, which a few thousand
items of known length do not need.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

Item, Result = TypeVar("Item"), TypeVar("Result")


def place() -> tuple[int, int]:
    """Number of this process, and how many there are."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return 0, 1  # without a state of the host, which the first of its kind fixes for good
    state = PartialState(cpu=not torch.accelerator.is_available())  # what a trainer has made before wins
    return state.process_index, state.num_processes


def dealt(items: Sequence[Item], split: bool = True) -> Sequence[Item]:
    """What this process works on: every n-th item, or all of them."""
    index, count = place() if split else (0, 1)
    return items[index::count]


def gathered(mine: Result, split: bool = True) -> list[Result]:
    """What every process has, in their order."""
    return gather_object([mine]) if split and place()[1] > 1 else [mine]


def in_order(parts: Sequence[Sequence[Result]]) -> list[Result]:
    """One result an item, in the order of the items that `dealt` dealt out."""
    whole: list[Result] = [None] * sum(map(len, parts))
    for index, part in enumerate(parts):
        whole[index :: len(parts)] = part
    return whole


def over_processes(work: Callable[[Sequence[Item]], Sequence[Result]], items: Sequence[Item]) -> list[Result]:
    """`work(items)`, one result an item, done by all processes together."""
    mine = dealt(items)
    return in_order(gathered(list(work(mine)) if mine else []))
