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
@pytest.mark.parametrize("places", [[0, 3], []])
def test_rate_is_that_of_simulated_cycles(texts, places):
    costs, rng = PassCosts(*(Curve((1, 80), (dear, 3 * dear)) for dear in (1.0, 0.4, 1.3))), random.Random(0)
    schedule = DraftSchedule(4, costs, ends=[4.0, 1.0, 2.0, 3.0])
    schedule.tokens, schedule.drafts = {True: 25.0, False: 32.0}, {True: 10.0, False: 10.0}
    cycles, tokens, seconds = 40_000, 0.0, 0.0
    for _ in range(cycles):
        ended = rng.choices(range(4), schedule.ends, k=texts)
        drafts_again = any(place not in places for place in ended)
        seconds += costs.both(texts * 4 * 3) if places else costs.verify(texts * 4)
        seconds += costs.draft(texts * 4) if drafts_again else 0
        tokens += sum(2.5 if place in places else 3.2 for place in ended) / texts
    assert schedule.rate(places, texts) == pytest.approx(tokens / seconds, rel=0.01)


def test_free_passes_are_drafted_ahead_for_every_place_and_dear_ones_not_at_all():
    assert sorted(DraftSchedule(4, FLAT).choose(1)) == [0, 1, 2, 3]
    schedule = DraftSchedule(4, STEEP)
    assert [schedule.choose(1) for _ in range(REST + 1)] == [None] * (REST + 1)
    assert schedule.resting == 0


def test_it_learns_that_drafts_are_never_right_and_tries_again():
    schedule = DraftSchedule(8, same_for_all((1, 2, 80), (1.0, 1.5, 1.5)))
    cycles = 0
    while schedule.choose(1) is not None and cycles < 200:
        schedule.learn([0], [True])
        schedule.learn([0], [False])
        cycles += 1
    assert cycles < 50  # one token for more than one pass does not pay
    for _ in range(REST):
        assert schedule.choose(1) is None
    schedule.learn([7] * 60, [True] * 30 + [False] * 30)
    assert schedule.choose(1)


def test_copies_pay_by_what_they_yield():
    costs = PassCosts(*(Curve((1, 9), (first, last)) for first, last in ((1.0, 3.0), (2.0, 2.0), (9.0, 9.0))))
    schedule, copies = DraftSchedule(9, costs), Yield(9)
    schedule.drafts, schedule.tokens = (
        {True: 10.0, False: 10.0},
        {True: 20.0, False: 20.0},
    )  # 2 tokens in 5 seconds, or 1 in 1
    copies.tokens, copies.cycles = 12.0, 4.0
    assert schedule.copies_pay(copies, 1)  # 3 tokens in 3 seconds
    copies.add([0])
    assert copies.mean == 13 / 5 and not schedule.copies_pay(copies, 1)
    schedule.tokens[False] = 60.0  # 6 tokens in 5 seconds
    copies.add([4] * 10)
    assert not schedule.copies_pay(Yield(4), 1) and schedule.copies_pay(copies, 1) == (copies.mean / 3 >= 1.2)
