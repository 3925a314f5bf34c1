"""What is drafted ahead, against a simulation of cycles, and decoding without drafts where they do not pay."""

import random

import pytest

from llm_diffusion.speculative.schedule import REST, Curve, DraftSchedule, PassCosts, Yield


def same_for_all(*curve) -> PassCosts:
    return PassCosts(*[Curve(*curve)] * 3)


FLAT = same_for_all((1, 80), (1.0, 1.0))
STEEP = same_for_all((1, 80), (1.0, 80.0))


def test_costs_between_and_beyond_what_was_measured():
    costs = Curve((1, 8, 16), (1.0, 2.0, 4.0))
    assert [costs(rows) for rows in (1, 8, 12, 16, 32)] == [1.0, 2.0, 3.0, 4.0, 8.0]


@pytest.mark.parametrize("texts", [1, 3])
def test_rate_is_that_of_simulated_cycles(texts):
    costs, rng, places = (
        PassCosts(*(Curve((1, 80), (dear, 3 * dear)) for dear in (1.0, 0.4, 1.3))),
        random.Random(0),
        [0, 3],
    )
    schedule = DraftSchedule(4, costs, ends=[4.0, 1.0, 2.0, 3.0])
    schedule.ahead.tokens, schedule.ahead.cycles = 25.0, 10.0
    schedule.right[:3], schedule.drafts[:3] = [9.0, 8.0, 5.0], [10.0] * 3
    tokens, seconds = 0.0, 0.0
    for _ in range(40_000):
        ended = rng.choices(range(4), schedule.ends, k=texts)
        drafts_again = any(place not in places for place in ended)
        seconds += costs.both(texts * 4 * 3) + (costs.draft(texts * 4) if drafts_again else 0)
        tokens += sum(2.5 if place in places else 3.2 for place in ended) / texts
    assert schedule.rate(places, texts) == pytest.approx(tokens / seconds, rel=0.01)


@pytest.mark.parametrize("a_row", [0.0, 0.02, 0.2])
def test_trees_grow_until_a_row_costs_more_than_its_token_brings(a_row):
    """Simulated cycles in which the token of rank r is right with a probability that falls with r; every tree tells of smaller ones."""
    rng, chances = random.Random(1), [0.8 / (rank + 1) for rank in range(31)]
    costs = PassCosts(*(Curve((1, 33), (1.0, 1.0 + 32 * slope)) for slope in (a_row, 0.0, 9.0)))
    schedule = DraftSchedule(8, costs)
    for _ in range(4000):
        rate, n = schedule.best_tree(1)
        right = [rank for rank in range(n) if rng.random() < chances[rank]]
        schedule.learn_tree([right], n, [0])
    rates = [(1 + sum(chances[:n])) / (2 + a_row * n) for n in range(1, 32)]
    assert rate == pytest.approx(max(rates), rel=0.1)
    assert rates[schedule.best_tree(1)[1] - 1] > 0.97 * max(rates)


def test_blocks_tell_of_trees_and_old_outcomes_count_half():
    schedule = DraftSchedule(4, FLAT)
    first = schedule.yields()
    assert first[3] == 2.5 and first[-1] < 4  # half of a block; with trees of any size at most all of it
    schedule.learn([3, 3, 0, 1] * 100, [False] * 400)
    assert schedule.yields()[1:4] == pytest.approx([1.75, 2.25, 2.75], abs=0.05)
    assert schedule.ends[3] > schedule.ends[0] > schedule.ends[2] and sum(schedule.ends) <= 256
    assert schedule.ahead.cycles == 2  # made ahead were none; what was guessed of them counts half since


def test_free_passes_are_drafted_ahead_for_every_place_and_dear_ones_not_at_all():
    assert sorted(DraftSchedule(4, FLAT).choose(1)) == [0, 1, 2, 3]
    schedule = DraftSchedule(4, STEEP)
    assert [schedule.choose(1) for _ in range(REST + 1)] == [None] * (REST + 1)
    assert schedule.resting == 0


def test_it_learns_that_drafts_are_never_right_and_tries_again():
    schedule = DraftSchedule(8, same_for_all((1, 2, 80), (1.0, 1.5, 1.5)))
    cycles = 0
    while (places := schedule.choose(1)) is not None and cycles < 200:
        if places:
            schedule.learn([0], [True])
        else:
            schedule.learn_tree([[]], schedule.best_tree(1)[1], [0])
        cycles += 1
    assert cycles < 50  # one token for more than one pass does not pay
    for _ in range(REST):
        assert schedule.choose(1) is None
    schedule.learn([7] * 60, [True] * 30 + [False] * 30)
    assert schedule.choose(1)


def test_copies_pay_by_what_they_yield():
    costs = PassCosts(*(Curve((1, 9), (first, last)) for first, last in ((1.0, 3.0), (2.0, 2.0), (9.0, 9.0))))
    schedule, copies = DraftSchedule(9, costs), Yield(9)
    schedule.right = [1.0] + [0.0] * 30  # 1.25 tokens in 3.25 seconds, or 1 in 1
    copies.tokens, copies.cycles = 12.0, 4.0
    assert schedule.copies_pay(copies, 1)  # 3 tokens in 3 seconds
    copies.add([0])
    assert copies.mean == 13 / 5 and not schedule.copies_pay(copies, 1)
    schedule.right = [4.0] * 8 + [0.0] * 23  # 9 tokens in 5 seconds
    copies.add([4] * 10)
    assert not schedule.copies_pay(Yield(4), 1) and schedule.copies_pay(copies, 1) == (copies.mean / 3 >= 1.8)
