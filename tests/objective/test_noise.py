"""Seeded noise: its distribution, and what it does and does not depend on."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_diffusion.objective import noise
from llm_diffusion.objective.noise import (
    MASK_STREAM,
    MIN_TIME,
    ORDER_STREAM,
    TIME_STREAM,
    content_keys,
    draw_exact_mask,
    draw_mask,
    draw_tokens,
    hash_keys,
    ranks,
    row_keys,
    stratified_times,
    times_of_segments,
    uniform,
)

N = 1 << 16
COUNT = torch.arange(N)
few = settings(max_examples=25, deadline=None, derandomize=True)
seeds = st.integers(0, 2**31 - 1)

# Every part of a key, one at a time, counts up while the others stand still.
COUNTERS = {
    "seed": (COUNT, 3, 5, 7, MASK_STREAM),
    "step": (0, COUNT, 5, 7, MASK_STREAM),
    "row": (0, 3, COUNT, 7, MASK_STREAM),
    "position": (0, 3, 5, COUNT, MASK_STREAM),
    "stream": (0, 3, 5, 7, COUNT),
    "alone": (COUNT,),
}
every_counter = pytest.mark.parametrize("parts", COUNTERS.values(), ids=COUNTERS.keys())


def fmix32(h: int) -> int:
    """The finaliser of MurmurHash3 (Appleby's MurmurHash3.cpp, in the public domain) on Python's integers."""
    h ^= h >> 16
    h = h * 0x85EBCA6B % 2**32
    h ^= h >> 13
    h = h * 0xC2B2AE35 % 2**32
    return h ^ h >> 16


def key_of(*parts: int) -> int:
    """Every part is mixed into the key of those before it, as the digits of a number of base 31 are."""
    key = 0
    for part in parts:
        key = fmix32((fmix32(part % 2**32) + 0x9E3779B9 + 31 * key) % 2**32)
    return key


def ks_distance(values: torch.Tensor) -> float:
    """Kolmogorov's distance between the sample and U(0, 1); above 2 / sqrt(n) once in 1500 samples."""
    grid = torch.arange(len(values) + 1) / len(values)
    ordered = values.sort().values
    return torch.maximum((ordered - grid[:-1]).abs().max(), (ordered - grid[1:]).abs().max()).item()


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    return torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1].item()


def chi_square(a: torch.Tensor, b: torch.Tensor, bins: int = 16) -> float:
    """Of the pairs against independent uniforms, in standard deviations: sees dependence that a correlation misses."""
    cells = (a * bins).long().clamp(max=bins - 1) * bins + (b * bins).long().clamp(max=bins - 1)
    expected = len(a) / bins**2
    freedom = bins**2 - 1
    return (((cells.bincount(minlength=bins**2) - expected) ** 2 / expected).sum().item() - freedom) / (
        2 * freedom
    ) ** 0.5


@every_counter
def test_uniform_is_uniform(parts: tuple) -> None:
    values = uniform(*parts)
    assert values.dtype == torch.float32 and values.shape == (N,)
    assert 0 < values.min() and values.max() < 1
    assert abs(values.mean() - 1 / 2) < 4 * (1 / 12 / N) ** 0.5
    assert abs(values.var() - 1 / 12) < 4 * (1 / 180 / N) ** 0.5
    assert ks_distance(values) < 2 / N**0.5


def test_keys_are_the_same_in_every_version() -> None:
    """A run that is resumed, or repeated with a later version, draws the noise it drew before."""
    assert fmix32(1) == 0x514E28B7  # as published
    parts = [(0,), (1,), (2**32 - 1,), (-1,), (2**40 + 3,), (0, 0), (0, 1), (1, 0), (7, 3, 11, 2**31, 5)]
    for given_parts in parts:
        first, *rest = given_parts
        assert hash_keys(torch.tensor([first]), *rest).tolist() == [key_of(*given_parts)]
        assert uniform(torch.tensor(first), *rest).item() == (key_of(*given_parts) // 512 + 0.5) / 2**23
    row = torch.tensor([[9, 4, 4, 8]])
    want = fmix32(sum(key_of(token, place) for place, token in enumerate([4, 4, 8])) % 2**32)
    assert content_keys(row, torch.tensor([[0, 1, 1, 1]])).tolist() == [want]


def test_streams_differ() -> None:
    streams = {name: value for name, value in vars(noise).items() if name.endswith("_STREAM")}
    assert len(streams) == len(set(streams.values())) == 9


def test_uniform_is_above_zero_for_the_lowest_key() -> None:
    lowest = torch.tensor([83408389])  # found by search; chance meets one in 2^24
    assert hash_keys(lowest).item() >> 8 == 0
    assert uniform(lowest) > 0


@every_counter
@pytest.mark.parametrize("lag", [1, 2, 256])
def test_neighbours_are_independent(parts: tuple, lag: int) -> None:
    values = uniform(*parts)
    assert abs(correlation(values[lag:], values[:-lag])) < 4 / N**0.5
    assert abs(chi_square(values[lag:], values[:-lag])) < 4


@pytest.mark.parametrize(
    "one, other",
    [
        ((0, 0, 0, COUNT, MASK_STREAM), (1, 0, 0, COUNT, MASK_STREAM)),
        ((0, 0, 0, COUNT, MASK_STREAM), (0, 1, 0, COUNT, MASK_STREAM)),
        ((0, 0, 0, COUNT, MASK_STREAM), (0, 0, 1, COUNT, MASK_STREAM)),
        ((1, 0, 0, COUNT, MASK_STREAM), (0, 1, 0, COUNT, MASK_STREAM)),
        ((0, 0, COUNT, 7, MASK_STREAM), (0, 0, 7, COUNT, MASK_STREAM)),
        ((0, 0, COUNT, MASK_STREAM), (0, 0, COUNT, TIME_STREAM)),
        ((0, 0, COUNT, ORDER_STREAM), (0, 0, COUNT, TIME_STREAM)),
        ((COUNT,), (COUNT, 0)),
    ],
)
def test_seeds_steps_rows_and_streams_are_independent(one: tuple, other: tuple) -> None:
    a, b = uniform(*one), uniform(*other)
    assert abs(correlation(a, b)) < 4 / N**0.5
    assert abs(chi_square(a, b)) < 4


def test_keys_do_not_collide_more_than_chance() -> None:
    keys = hash_keys(0, torch.arange(4)[:, None, None], torch.arange(64)[:, None], torch.arange(256))
    assert ((keys >= 0) & (keys < 2**32)).all()
    assert keys.numel() - keys.unique().numel() <= 3  # 0.5 expected of 65536 draws out of 2^32


def test_parts_broadcast() -> None:
    rows, position = torch.arange(3)[:, None], torch.arange(5)
    values = uniform(4, 2, rows, position)
    assert values.shape == (3, 5)
    assert values[2, 4] == uniform(4, 2, torch.tensor(2), 4)


@few
@given(seed=seeds, step=st.integers(0, 10**6), n_rows=st.integers(1, 64), low=st.sampled_from([0.0, MIN_TIME, 0.3]))
def test_one_time_in_every_stratum(seed: int, step: int, n_rows: int, low: float) -> None:
    times = stratified_times(seed, step, torch.arange(n_rows), n_rows, low=low)
    assert times.dtype == torch.float32 and low <= times.min() and times.max() <= 1
    within = (times.sort().values - low) / (1 - low) * n_rows - torch.arange(n_rows)
    assert (within > -1e-4).all() and (within < 1 + 1e-4).all()
    assert within.max() - within.min() < 1e-4  # as in VDM, one offset for all of them


@few
@given(data=st.data(), seed=seeds, step=st.integers(0, 1000), n_rows=st.integers(1, 32))
def test_times_do_not_depend_on_how_the_batch_is_cut(data: st.DataObject, seed: int, step: int, n_rows: int) -> None:
    whole = stratified_times(seed, step, torch.arange(n_rows), n_rows)
    order = torch.tensor(data.draw(st.permutations(range(n_rows))))
    size = data.draw(st.integers(1, n_rows))
    parts = [stratified_times(seed, step, rows, n_rows) for rows in order.split(size)]
    assert torch.equal(torch.cat(parts), whole[order])


@pytest.mark.parametrize("n_rows, row", [(1, 0), (8, 5)])
@pytest.mark.parametrize("key", ["seed", "step"])
def test_time_of_one_row_is_uniform(n_rows: int, row: int, key: str) -> None:
    draws, rows = 600, torch.tensor([row])
    keys = [(i, 3) if key == "seed" else (3, i) for i in range(draws)]
    times = torch.cat([stratified_times(*k, rows, n_rows) for k in keys])
    assert ks_distance((times - MIN_TIME) / (1 - MIN_TIME)) < 2 / draws**0.5
    assert abs(correlation(times[1:], times[:-1])) < 4 / draws**0.5


def test_times_are_not_in_row_order() -> None:
    rows = torch.arange(64)
    ties = [correlation(stratified_times(0, step, rows, 64), rows) for step in range(100)]
    assert abs(sum(ties) / 100) < 4 * (1 / 63 / 100) ** 0.5
    assert max(map(abs, ties)) < 0.6


@pytest.mark.parametrize("probability", [0.05, 0.5, 0.95])
def test_mask_is_bernoulli(probability: float) -> None:
    n_rows, length = 512, 128
    maskable = torch.ones(n_rows, length, dtype=torch.bool)
    masked = draw_mask(0, 0, torch.arange(n_rows), torch.full((n_rows, 1), probability), maskable)
    spread = probability * (1 - probability)
    assert abs(masked.float().mean() - probability) < 4 * (spread / masked.numel()) ** 0.5
    # Tokens of a row are masked independently: the count's variance is the binomial one.
    assert masked.sum(-1).float().var() / (length * spread) == pytest.approx(1, abs=4 * (2 / n_rows) ** 0.5)
    assert masked.sum(0).float().var() / (n_rows * spread) == pytest.approx(1, abs=4 * (2 / length) ** 0.5)


def test_mask_takes_a_probability_per_token() -> None:
    probability = torch.tensor([0.0, 1.0, 0.3]).repeat(4096, 1)
    masked = draw_mask(0, 0, torch.arange(4096), probability, torch.ones(4096, 3, dtype=torch.bool))
    assert not masked[:, 0].any() and masked[:, 1].all()
    assert abs(masked[:, 2].float().mean() - 0.3) < 4 * (0.21 / 4096) ** 0.5


@few
@given(data=st.data(), seed=seeds, n_rows=st.integers(1, 6), length=st.integers(1, 20))
def test_mask_stays_inside_maskable(data: st.DataObject, seed: int, n_rows: int, length: int) -> None:
    flags = st.lists(st.booleans(), min_size=length, max_size=length)
    maskable = torch.tensor(data.draw(st.lists(flags, min_size=n_rows, max_size=n_rows)))
    rows = torch.arange(n_rows)
    everything = draw_mask(seed, 0, rows, torch.ones(n_rows, 1), maskable)
    assert torch.equal(everything, maskable)
    some = draw_mask(seed, 0, rows, torch.full((n_rows, 1), 0.5), maskable)
    assert not (some & ~maskable).any()


@few
@given(data=st.data(), seed=seeds, step=st.integers(0, 1000))
def test_mask_of_a_row_is_its_own(data: st.DataObject, seed: int, step: int) -> None:
    """Whatever the batch, its order, and the padding before, after and in between."""
    lengths = data.draw(st.lists(st.integers(1, 12), min_size=2, max_size=6))
    chosen = data.draw(st.permutations(range(len(lengths))))[: data.draw(st.integers(1, len(lengths)))]
    probability = torch.full((len(chosen), 1), 0.5)
    maskable = torch.zeros(len(chosen), 40, dtype=torch.bool)
    for place, row in enumerate(chosen):
        where = data.draw(st.sets(st.integers(0, 39), min_size=lengths[row], max_size=lengths[row]))
        maskable[place, list(where)] = True
    masked = draw_mask(seed, step, torch.tensor(chosen), probability, maskable)
    for place, row in enumerate(chosen):
        alone = torch.ones(1, lengths[row], dtype=torch.bool)
        expected = draw_mask(seed, step, torch.tensor([row]), probability[:1], alone)
        assert torch.equal(masked[place][maskable[place]], expected[0])


@pytest.mark.parametrize("low, high", [(0.1, 0.2), (0.3, 0.9)])
def test_a_higher_probability_masks_more(low: float, high: float) -> None:
    maskable, rows = torch.ones(8, 64, dtype=torch.bool), torch.arange(8)
    fewer, more = (draw_mask(0, 0, rows, torch.full((8, 1), p), maskable) for p in (low, high))
    assert not (fewer & ~more).any() and more.sum() > fewer.sum()


@few
@given(data=st.data())
def test_content_keys_see_tokens_and_their_order_only(data: st.DataObject) -> None:
    row = data.draw(st.lists(st.integers(0, 9), min_size=2, max_size=10))
    shuffled = data.draw(st.permutations(row))
    left, right = data.draw(st.integers(0, 4)), data.draw(st.integers(0, 4))
    pad = data.draw(st.integers(0, 9))  # may well be a token of the row

    def key(tokens: list[int], left: int, right: int, pad: int) -> int:
        ids = torch.tensor([[pad] * left + tokens + [pad] * right])
        attended = torch.tensor([[0] * left + [1] * len(tokens) + [0] * right])
        return content_keys(ids, attended).item()

    own = key(row, 0, 0, 0)
    assert own == key(row, left, right, pad)
    assert (own == key(shuffled, left, right, pad)) == (row == list(shuffled))
    assert own != key(row + [pad], 0, 0, 0)


def test_content_keys_of_many_rows_differ() -> None:
    ids = torch.cartesian_prod(*[torch.arange(8)] * 4)
    keys = content_keys(ids, torch.ones_like(ids))
    assert keys.shape == (4096,) and keys.unique().numel() == 4096
    assert ks_distance(uniform(0, 0, keys, TIME_STREAM)) < 2 / 4096**0.5


@few
@given(st.data())
def test_exact_masks_have_the_count_that_the_time_says(data) -> None:
    """In every part by itself; which tokens is as good as random, and others than maskable never."""
    lengths = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    part = torch.tensor([[i for i, n in enumerate(lengths) for _ in range(n)]])
    maskable = torch.tensor([data.draw(st.lists(st.booleans(), min_size=sum(lengths), max_size=sum(lengths)))])
    # Between the steps of every count up to 6, where rounding decides nothing.
    unit = torch.tensor([(data.draw(st.integers(0, 59)) + 0.5) / 60 for _ in lengths])
    times = (MIN_TIME + (1 - MIN_TIME) * unit)[part[0]][None]
    masked, share = draw_exact_mask(3, 1, torch.tensor([9]), times, maskable, part)
    assert not (masked & ~maskable).any()
    for i in range(len(lengths)):
        inside = part == i
        n = int((maskable & inside).sum())
        k = int((masked & inside).sum())
        if n:
            assert k == math.ceil(float(unit[i]) * n)
            assert share[inside].unique().item() == pytest.approx(k / n)


def test_exact_masks_choose_every_token_alike() -> None:
    rows, ones = torch.arange(6000), torch.ones(6000, 5, dtype=torch.bool)
    times = torch.full((6000, 5), MIN_TIME + (1 - MIN_TIME) * 0.4)
    masked, _ = draw_exact_mask(0, 0, rows, times, ones, torch.zeros(6000, 5, dtype=torch.long))
    assert (masked.sum(-1) == 2).all()
    assert (masked.float().mean(0) - 0.4).abs().max() < 0.025


def test_times_of_segments_are_golden_ratios_apart() -> None:
    """And each alone is uniform; the first is the row's own."""
    rows = torch.linspace(MIN_TIME, 1, 1000, dtype=torch.float64)
    times = times_of_segments(rows, torch.arange(5).expand(1000, -1))
    assert times.min() >= MIN_TIME and times.max() <= 1
    unit, golden = (times - MIN_TIME) / (1 - MIN_TIME), (5**0.5 - 1) / 2
    for k in range(5):
        apart = (unit[:, k] - (rows - MIN_TIME) / (1 - MIN_TIME) - k * golden).remainder(1)
        assert torch.minimum(apart, 1 - apart).max() < 1e-6
        assert ks_distance(unit[:, k].float()) < 3 / 1000


def test_random_tokens_are_uniform_and_of_the_row_alone() -> None:
    rows, maskable = torch.arange(2000), torch.ones(2000, 6, dtype=torch.bool)
    tokens = draw_tokens(1, 2, rows, maskable, 7)
    counts = tokens.flatten().bincount(minlength=7)
    assert tokens.shape == (2000, 6) and len(counts) == 7
    assert (counts - 12_000 / 7).abs().max() < 4 * (12_000 * 6 / 49) ** 0.5
    assert abs(chi_square(tokens[:, 0] / 7, tokens[:, 1] / 7, bins=7)) < 4
    inside = torch.tensor([[False, True, True, False, True]])
    assert torch.equal(draw_tokens(1, 2, rows[[9]], inside, 7)[inside], tokens[9, :3])


@few
@given(st.data())
def test_ranks_are_places_in_the_order_of_the_noise(data: st.DataObject) -> None:
    """By sorting every segment in Python."""
    lengths = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    part = [i for i, n in enumerate(lengths) for _ in range(n)]
    flags = [data.draw(st.lists(st.booleans(), min_size=len(part), max_size=len(part))) for _ in range(2)]
    values = [data.draw(st.permutations(range(len(part)))) for _ in range(2)]
    rank, sizes = ranks(torch.tensor(values) / len(part), torch.tensor(flags), torch.tensor([part, part]))
    for r in range(2):
        for i, number in enumerate(part):
            inside = [j for j in range(len(part)) if part[j] == number and flags[r][j]]
            assert sizes[r, i] == max(len(inside), 1)
            before = sum(values[r][j] < values[r][i] for j in inside)
            assert rank[r, i] == before if flags[r][i] else rank[r, i] >= len(inside)


def test_rows_of_the_same_content_have_noise_of_their_own() -> None:
    a, b = [5, 6, 7], [5, 7, 6]
    keys = row_keys(torch.tensor([a, b, a, a, b]), torch.ones(5, 3, dtype=torch.long)).tolist()
    assert len(set(keys)) == 5
    # The first of its content is the same wherever it stands.
    assert row_keys(torch.tensor([b, a]), torch.ones(2, 3, dtype=torch.long)).tolist() == [keys[1], keys[0]]
    assert row_keys(torch.tensor([b, b, a]), torch.ones(3, 3, dtype=torch.long)).tolist() == [keys[1], keys[4], keys[0]]
