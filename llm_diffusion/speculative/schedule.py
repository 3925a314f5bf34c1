"""How much to draft ahead, and whether at all, from what a pass costs on this machine and how far drafts were right so far.

With b tokens a block, there are four ways to go on:

    passes of a cycle                                                     seconds, measured            tokens it yields
    one row, without a draft                                              V(1)                         1
    a draft; then the verification of a tree of n tokens                  D(b) + V(n + 1)              1, and how often each of n is right
    a verification with the next drafts for k places where it may end     B(b (1 + k)) + miss D(b)     what blocks yielded, made ahead or not
    the verification of a draft that was copied from the text             V(b)                         what copies yielded so far
"""

from __future__ import annotations

import logging
import time
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from transformers import DynamicCache

from ..models.forward import forward_state
from ..models.patching import base_of
from .adapters import AdapterSwitch

logger = logging.getLogger(__name__)

VERIFY, DRAFT, BOTH = (1, 4, 8, 16, 32), (8, 24), (16, 32, 72)  # rows of the passes that are timed
CONTEXT, REPEATS = 64, 3
REST, LONGEST_REST = 64, 1024  # tokens decoded without drafts before the next ones are tried: twice as many every time
PROBES = 2  # drafts that are tried then
MEMORY = 256  # outcomes after which older ones count half
PRIOR = 4.0  # outcomes that the first guess counts for
NODES = 31  # tokens of a tree at most, where blocks are no longer; the next 32 would be right once in four cycles


@dataclass
class Curve:
    """Seconds of a pass over some rows, between and beyond the measured ones along a line."""

    rows: tuple[int, ...]
    seconds: tuple[float, ...]

    def __call__(self, rows: int) -> float:
        at = min(max(bisect_left(self.rows, rows), 1), len(self.rows) - 1)
        (low, high), (first, last) = self.rows[at - 1 : at + 1], self.seconds[at - 1 : at + 1]
        return first + (last - first) * (rows - low) / (high - low)


@dataclass
class PassCosts:
    """Of passes with the adapters off, on, and on for a part of the rows."""

    verify: Curve
    draft: Curve
    both: Curve


@torch.no_grad()
def measure_costs(model: torch.nn.Module, switch: AdapterSwitch) -> PassCosts:
    """Times passes behind a short prefix; takes about as long as thirty of them."""
    base, cache = base_of(model), DynamicCache()

    def run(rows: int, **options: object) -> float:
        ids = torch.ones((1, rows), dtype=torch.long, device=base.device)
        start = time.perf_counter()
        place = torch.zeros_like(ids)  # models with learned positions may have few
        logits = base(input_ids=ids, position_ids=place, past_key_values=cache, use_cache=True, **options).logits
        logits[0, -1, 0].item()  # waits for a GPU
        return time.perf_counter() - start

    def curve(sizes: tuple[int, ...], first: Callable[[int], int | None]) -> Curve:
        times: dict[int, list[float]] = {rows: [] for rows in sizes}
        for _ in range(REPEATS):  # size by size, so that a slow moment meets one time of each
            for rows in sizes:
                switch.first = first(rows)
                times[rows].append(run(rows, logits_to_keep=rows))
                cache.crop(-rows)
        # Noise only adds, and fewer rows never cost more.
        return Curve(sizes, tuple(accumulate((min(times[rows]) for rows in reversed(sizes)), min))[::-1])

    switch.first = None
    run(CONTEXT, logits_to_keep=1)
    return PassCosts(curve(VERIFY, lambda n: None), curve(DRAFT, lambda n: 0), curve(BOTH, lambda n: n // 2))


def schedule_of(model: torch.nn.Module, block_length: int, switch: AdapterSwitch) -> DraftSchedule:
    """The schedule of a model, made when it first decodes on this device, in this type and with as many threads."""
    state, base = forward_state(model), base_of(model)
    key = base.device, base.dtype, torch.get_num_threads(), block_length
    if state.draft_schedule is None or state.draft_schedule[0] != key:
        state.draft_schedule = key, DraftSchedule(block_length, measure_costs(model, switch))
    return state.draft_schedule[1]


class Yield:
    """Tokens a cycle of one kind, from a first guess of half a block on."""

    def __init__(self, block_length: int) -> None:
        self.tokens, self.cycles = PRIOR * (block_length + 1) / 2, PRIOR

    def add(self, accepted: list[int]) -> None:
        """Of every text how many drafted tokens were right."""
        self.tokens, self.cycles = self.tokens + sum(accepted) + len(accepted), self.cycles + len(accepted)

    @property
    def mean(self) -> float:
        return self.tokens / self.cycles


@dataclass
class DraftSchedule:
    """Chooses what the next cycle does; kept with the model, so that it learns over calls.

    Args:
        block_length: b.
        costs: of passes on this machine.

    Attributes:
        right, drafts: of drafts with a pass of their own, how often the likeliest, second likeliest, … token was right, and how many
            drafts had it.
    """

    block_length: int
    costs: PassCosts
    ends: list[float] = field(default_factory=list)  # how often blocks ended behind 0, …, b - 1 tokens
    seen: int = 0  # drafts, ever
    rest: int = REST  # the next rest
    resting: int = 0  # tokens left of this one
    probes: int = 0  # drafts left to try although they do not pay
    told: bool = False

    def __post_init__(self) -> None:
        b = self.block_length
        self.ahead = Yield(b)  # of drafts made in advance
        self.ends = self.ends or [PRIOR / b] * b
        # The first guess: half of a block is right, of trees as large as you like all of it.
        self.guess = [PRIOR / 2 * min(1, (b - 1) / (rank + 1)) ** 2 for rank in range(max(NODES, b - 1))]
        self.right, self.drafts = list(self.guess), [PRIOR] * len(self.guess)

    def choose(self, texts: int) -> list[int] | None:
        """For how many accepted tokens the next drafts are made ahead, the likeliest first; None: decode one token without a draft."""
        if self.resting > 0:
            self.resting -= 1
            return None
        likely = sorted(range(self.block_length), key=lambda place: -self.ends[place])
        rates = [self.rate(likely[:n], texts) for n in range(self.block_length + 1)]
        best = max(range(len(rates)), key=rates.__getitem__)
        # Few drafts prove little: they are given up when they are worse by more than chance.
        doubt = 1 + PRIOR / (PRIOR + self.seen)
        if rates[best] * doubt >= 1 / self.costs.verify(texts):
            self.rest, self.probes = REST, PROBES
            return likely[:best]
        if self.probes:
            self.probes -= 1
            return likely[:best]
        if not self.told:
            self.told = True
            logger.info(
                "drafts yield %.2f tokens, too few for what passes cost here: decoding without them, and trying again after %d tokens, "
                "then after twice as many",
                self.yields()[self.best_tree(texts)[1]],
                REST,
            )
        self._forget(back=False)  # so that a few good drafts bring them back
        self.resting, self.rest, self.probes = self.rest - 1, min(2 * self.rest, LONGEST_REST), PROBES
        return None

    def _forget(self, back: bool) -> None:
        """Halves what was counted, where it is more than a guess; `back`: half of the way to the first guess."""
        first, b = Yield(self.block_length), self.block_length
        self.ends = [(count + PRIOR / b) / 2 for count in self.ends]
        for rank, guess in enumerate(self.guess):
            if back or self.drafts[rank] > 2 * PRIOR:
                self.right[rank] = (self.right[rank] + back * guess) / 2
                self.drafts[rank] = (self.drafts[rank] + back * PRIOR) / 2
        if back or self.ahead.cycles > 2 * PRIOR:
            self.ahead.tokens = (self.ahead.tokens + back * first.tokens) / 2
            self.ahead.cycles = (self.ahead.cycles + back * first.cycles) / 2

    def yields(self) -> list[float]:
        """Tokens of a cycle whose draft had a pass of its own, by how many tokens the draft has, from 0 to the largest tree."""
        return list(accumulate((right / n for right, n in zip(self.right, self.drafts, strict=True)), initial=1.0))

    def best_tree(self, texts: int) -> tuple[float, int]:
        """Tokens a second of each of `texts` with trees of the best size, and this size."""
        draft = self.costs.draft(texts * self.block_length)
        rates = [tokens / (draft + self.costs.verify(texts * (n + 1))) for n, tokens in enumerate(self.yields())]
        best = max(range(1, len(rates)), key=rates.__getitem__)
        return rates[best], best

    def copies_pay(self, copies: Yield, texts: int) -> bool:
        """Whether a draft that needs no pass yields more tokens a second than one that does, and than none."""
        others = max(self.best_tree(texts)[0], 1 / self.costs.verify(texts))
        return copies.mean / self.costs.verify(texts * self.block_length) >= others

    def rate(self, places: list[int], texts: int) -> float:
        """Tokens a second of each of `texts`, when drafts are made ahead for these places."""
        if not places:
            return self.best_tree(texts)[0]
        b, hit = self.block_length, sum(self.ends[place] for place in places) / sum(self.ends)
        seconds = self.costs.both(texts * b * (1 + len(places)))
        seconds += (1 - hit**texts) * self.costs.draft(texts * b)  # one text that misses takes a pass
        return (hit * self.ahead.mean + (1 - hit) * self.yields()[b - 1]) / seconds

    def learn(self, accepted: list[int], ahead: list[bool]) -> None:
        """Of every text how many tokens of a block were right, and whether it was drafted ahead."""
        self.ahead.add([right for right, kind in zip(accepted, ahead, strict=True) if kind])
        behind = [list(range(right)) for right, kind in zip(accepted, ahead, strict=True) if not kind]
        self.learn_tree(behind, self.block_length - 1, [(right, True) for right in accepted])

    def learn_tree(self, ranks: list[list[int]], n: int, ends: list[tuple[int, bool]]) -> None:
        """What verifications told.

        Args:
            ranks: of every draft of n tokens with a pass of its own, which of them were right, the likeliest being 0.
            ends: of every text, how many best guesses were right, and whether the next one was drafted, or none was left.
        """
        for end, known in ends:
            # Where the tree ended first, a block might have gone on: as others did.
            places = range(end, end + 1) if known else range(end, self.block_length)
            total = sum(self.ends[place] for place in places)
            for place in places:
                self.ends[place] += self.ends[place] / total
        for rank in range(n):
            self.right[rank] += sum(rank in right for right in ranks)
            self.drafts[rank] += len(ranks)
        self.seen += len(ends)
        if sum(self.ends) > MEMORY:
            self._forget(back=True)  # what was not tried since is tried again one day
