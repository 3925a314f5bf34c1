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
    costs = PassCosts(*(Curve((1, 80), (dear, 3 * dear)) for dear in (1.0, 0.4, 1.3)))
    rng, places = random.Random(0), [0, 3]
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
        schedule.learn_tree([right], n, [(0, True)])
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
    assert schedule.ahead.cycles == 4 and schedule.ahead.mean == 2.5  # made ahead were none


def test_free_passes_are_drafted_ahead_for_every_place_and_dear_ones_not_at_all():
    assert sorted(DraftSchedule(4, FLAT).choose(1)) == [0, 1, 2, 3]
    schedule = DraftSchedule(4, STEEP)
    assert [schedule.choose(1) for _ in range(REST)] == [None] * REST
    assert schedule.choose(1) is not None  # tried again


PLAIN = PassCosts(
    Curve((1, 4, 8, 16, 32), (0.044, 0.08, 0.1, 0.107, 0.143)),
    Curve((8, 24), (0.1, 0.12)),
    Curve((16, 32, 72), (0.107, 0.143, 0.173)),
)


def decode(schedule: DraftSchedule, right: float, passes: int, rng: random.Random) -> tuple[float, int]:
    """Tokens a second to those without drafts, and drafts tried, where each place of a block is right with this probability."""
    costs, b, seconds, tokens, tried = schedule.costs, schedule.block_length, 0.0, 0, 0
    for _ in range(passes):
        places, accepted = schedule.choose(1), 0
        tried += places is not None
        n = schedule.best_tree(1)[1]
        longest = b - 1 if places else min(n, b - 1)
        while places is not None and accepted < longest and rng.random() < right:
            accepted += 1
        if places is None:
            seconds += costs.verify(1)
        elif places:
            seconds += costs.both(b * (1 + len(places))) + (accepted not in places) * costs.draft(b)
            schedule.learn([accepted], [True])
        else:
            seconds += costs.draft(b) + costs.verify(n + 1)
            schedule.learn_tree([list(range(accepted))], n, [(accepted, accepted < longest or longest == b - 1)])
        tokens += accepted + 1
    return tokens * costs.verify(1) / seconds, tried


@pytest.mark.parametrize("right", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("costs", [same_for_all((1, 2, 80), (1.0, 1.5, 1.5)), PLAIN])
def test_drafts_that_do_not_pay_cost_little_and_are_tried_again(costs, right, caplog):
    caplog.set_level("INFO")
    schedule, rng = DraftSchedule(8, costs), random.Random(0)
    assert decode(schedule, right, 2500, rng)[0] > (1.3 if right == 0.9 else 0.97)
    assert caplog.text.count("too few for what passes cost") == (right != 0.9)
    before, tried = decode(schedule, right, 2500, rng)
    assert before > 0.99 and tried >= 4
    assert decode(schedule, 0.95, 2500, rng)[0] > 1.1  # of another text
    assert decode(schedule, 0.95, 1000, rng)[1] == 1000


def test_it_learns_for_ever():
    """Counts that halve must not vanish: a process may decode millions of tokens."""
    costs = PassCosts(*(Curve((1, 80), (dear, 2 * dear)) for dear in (1.0, 0.1, 9.0)))
    for back in (False, True):
        schedule = DraftSchedule(8, costs)
        for _ in range(2000):
            schedule.choose(1)
            schedule.learn_tree([[0]] * 200, 3, [(1, True)] * 200)
            schedule._forget(back)
        assert min(schedule.ends + schedule.drafts) > 0 and schedule.ahead.cycles > 0
        assert schedule.choose(1) == [] and schedule.yields()[3] == pytest.approx(2, abs=0.1)


def test_a_tree_that_ends_first_tells_no_end_of_a_block():
    """Ends behind the tree are shared out as they were before: a block of 8 whose ends are all alike."""
    schedule, rng = DraftSchedule(8, FLAT), random.Random(0)
    for _ in range(20):
        ends = [rng.randrange(8) for _ in range(200)]
        schedule.learn_tree([[]] * 200, 3, [(min(end, 3), end < 3) for end in ends])
    assert [count / sum(schedule.ends) for count in schedule.ends] == pytest.approx([1 / 8] * 8, abs=0.05)


@pytest.mark.parametrize("texts", [1, 8])
def test_rows_of_all_texts_cost(texts):
    costs = PassCosts(*(Curve((1, 1001), (1.0, 1.0 + 1000 * slope)) for slope in (0.01, 0.02, 9.0)))
    schedule, yields = DraftSchedule(8, costs), DraftSchedule(8, costs).yields()
    rates = [yields[n] / (2 + 0.01 * (texts * (n + 1) - 1) + 0.02 * (texts * 8 - 1)) for n in range(1, len(yields))]
    assert schedule.best_tree(texts) == (pytest.approx(max(rates)), 1 + rates.index(max(rates)))


def test_long_blocks_are_drafted_whole():
    costs = PassCosts(*(Curve((1, 101), (first, last)) for first, last in ((1.0, 1.5), (1.0, 1.0), (9.0, 9.0))))
    schedule = DraftSchedule(64, costs)
    for _ in range(40):
        assert schedule.choose(1) is not None
        schedule.learn([63] * 8, [False] * 8)
    assert schedule.best_tree(1)[1] == 63 and schedule.yields()[-1] > 55


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
    assert copies.mean / 3 < 1.8 and not schedule.copies_pay(copies, 1)
    assert not schedule.copies_pay(Yield(4), 1)
