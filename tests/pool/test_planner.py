"""Batches that cost little: the plan is a pure function."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from embedpool.pool.planner import QUERIES_ABOUT_S, UNKNOWN_FIXED_TOKENS, Planner, Slots, cuts
from embedpool.tasks.driver import Cost
from embedpool.tasks.item import Group, Item
from tests.pool.scripted import PATIENCE_S, Asked, in_thread

LENGTHS = st.lists(st.integers(0, 300), min_size=1, max_size=40).map(sorted)
FIXED = st.floats(0, 1000)


def price(lengths: list[int], ends: list[int], fixed: float) -> float:
    """What a plan costs, in padded tokens."""
    starts = [0, *ends[:-1]]
    return sum(fixed + (end - start) * lengths[end - 1] for start, end in zip(starts, ends, strict=True))


def optimum(lengths: list[int], fixed: float, max_tokens: int, max_items: int) -> float:
    """The cheapest plan within the limits, by looking at every cut."""
    best = [0.0]
    for end in range(1, len(lengths) + 1):
        best.append(
            min(
                best[start] + fixed + (end - start) * lengths[end - 1]
                for start in range(end)
                if end - start == 1 or ((end - start) <= max_items and (end - start) * lengths[end - 1] <= max_tokens)
            )
        )
    return best[-1]


@settings(max_examples=400, deadline=None)
@given(LENGTHS, FIXED, st.integers(1, 4000), st.integers(1, 64))
def test_a_plan_covers_every_text_once_within_the_limits(
    lengths: list[int], fixed: float, max_tokens: int, max_items: int
) -> None:
    """Each text is in one batch; a batch over a limit holds one text alone."""
    ends = cuts(lengths, fixed, max_tokens, max_items)
    assert ends == sorted(set(ends))
    assert (ends[0] > 0, ends[-1]) == (True, len(lengths))
    for start, end in zip([0, *ends[:-1]], ends, strict=True):
        assert end - start <= max_items
        assert end - start == 1 or (end - start) * lengths[end - 1] <= max_tokens


@settings(max_examples=400, deadline=None)
@given(LENGTHS, FIXED, st.integers(1, 4000), st.integers(1, 64))
@example([0, 0], 1.0, 1, 2)
@example([3, 3, 21, 45, 69, 86, 99, 108, 116, 125, 171], 271.0, 512, 64)
def test_no_plan_within_the_limits_is_cheaper(
    lengths: list[int], fixed: float, max_tokens: int, max_items: int
) -> None:
    """The cuts are the best there are; so without limits they are never worse than one batch of all."""
    found = price(lengths, cuts(lengths, fixed, max_tokens, max_items), fixed)
    assert found == pytest.approx(optimum(lengths, fixed, max_tokens, max_items))
    assert found <= sum(fixed + length for length in lengths) + 1e-6
    unbound = price(lengths, cuts(lengths, fixed, 10**9, 10**9), fixed)
    assert unbound <= min(found, fixed + len(lengths) * lengths[-1]) + 1e-6


def chosen(planner: Planner, *lengths: int, groups: tuple[str | None, ...] = ()) -> list[int]:
    """Places chosen from a window of texts of these lengths."""
    items = [
        Asked("x" * length, group=Group("embed", groups[i] or "") if groups else Group("embed")).items[0]
        for i, length in enumerate(lengths)
    ]
    return planner.choose(items)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 300), st.sampled_from([None, "a", "b"])), min_size=1, max_size=60),
    st.integers(1, 16),
    st.integers(1, 2000),
)
def test_the_one_whose_turn_it_is_always_goes(window: list, max_items: int, max_tokens: int) -> None:
    """The batch holds the first of the window, is within the limits, and mixes no groups."""
    lengths, groups = zip(*window, strict=True)
    places = chosen(Planner(max_items, max_tokens), *lengths, groups=groups)
    assert places[0] == 0
    assert places == sorted(set(places))
    assert len(places) <= max_items
    assert len(places) == 1 or len(places) * max(lengths[i] for i in places) <= max_tokens
    assert {groups[i] for i in places} == {groups[0]}


def test_a_long_text_does_not_make_short_ones_pay() -> None:
    """Thirty short texts and a long one are two batches; whose turn it is decides which comes first."""
    planner = Planner(64, 16_384)
    assert chosen(planner, *[8] * 30, 500) == list(range(30))
    assert chosen(planner, 500, *[8] * 30) == [0]


def test_nearly_equal_texts_share_a_batch() -> None:
    """A second call would cost more than the padding."""
    assert chosen(Planner(64, 16_384), 8, 10, 9, 12) == [0, 1, 2, 3]


def test_no_batch_is_planned_to_run_longer_than_it_may() -> None:
    """A query waits for the running batch: `max_batch_ms` bounds it by the costs fitted at warm-up."""
    planner = Planner(64, 16_384, max_s=0.05, cost=Cost(0.002, 0.0001))
    assert planner.largest_tokens() == 480
    assert 3 <= len(chosen(planner, *[100] * 30)) <= 4
    assert Planner(64, 16_384, max_s=0.05).largest_tokens() == 16_384
    assert Planner(64, 16_384, cost=Cost(0.002, 0.0001)).largest_tokens() == 480
    assert Planner(64, 16_384, cost=Cost(0.01, 0.0001)).largest_tokens() == 900  # ten fixed costs
    assert Planner(64, 100, max_s=0.05, cost=Cost(0.002, 0.0001)).largest_tokens() == 100


@settings(deadline=None)
@given(slots=st.integers(1, 5), data=st.data())
def test_slots_come_free_in_turns(slots: int, data: st.DataObject) -> None:
    """However the slots of a busy model begin, soon one of them comes free within the longest batch ÷ slots."""
    longest_s = 1.0
    planner = Planner(10_000, 100_000, max_s=longest_s, cost=Cost(0.01, 0.0001))
    ends = sorted(data.draw(st.lists(st.floats(0, longest_s), min_size=slots, max_size=slots), label="first ends"))
    waits = []
    for _ in range(4 * slots):
        now = ends.pop(0)
        busy_s = max([end - now for end in ends], default=0.0)
        ends = sorted([*ends, now + planner.predicted_s([1] * planner.largest_tokens(busy_s, slots))])
        waits.append(ends[0] - now)
    assert max(waits[2 * slots :]) <= longest_s / slots + 0.001
    assert sum(waits[2 * slots :]) >= 2 * longest_s - 0.001 * slots, "batches are as long as they may be"


def test_batches_are_shorter_while_queries_wait_beside_other_work() -> None:
    """And a while after that. Queries alone, or other work alone, do not count; where a bound is set, it holds."""
    now = [100.0]
    slots, planner = Slots(lambda: now[0]), Planner(64, 16_384, cost=Cost(0.002, 0.0001))
    query, others = Asked("a").items, Asked("b", "c").items
    assert not any(map(slots.queries_are_about, ([*query, *query], others)))
    bulk = Asked("d", is_bulk=True).items  # a line of a batch is no query, though it has one text
    assert not any(map(slots.queries_are_about, ([*bulk, *bulk], [*bulk, *others])))
    assert Slots(lambda: now[0]).queries_are_about([*query, *bulk])
    assert slots.queries_are_about([*others, *query])
    now[0] += QUERIES_ABOUT_S - 0.1
    assert slots.queries_are_about(others)
    now[0] += 0.2
    assert not slots.queries_are_about(others)
    query, others, bulk = (
        Asked(*["x" * 10] * count, is_bulk=is_bulk).items for count, is_bulk in ((1, False), (60, False), (60, True))
    )
    assert planner.largest_tokens() == 480
    for window, longest_s in (
        ([*query, *others], 0.025),
        ([*others, *query], 0.025),
        ([*bulk, *query], 0.025),
        ([*query, *bulk], 0.0125),  # what nobody waits for delays a query less
    ):
        shorter = dataclasses.replace(planner, max_s=longest_s)
        places = planner.plan_under_lock(window, Slots(lambda: now[0]))
        assert 10 * len(places) <= shorter.largest_tokens() < 10 * len(places) + 10
        bounded = dataclasses.replace(planner, max_s=0.04)
        assert len(bounded.plan_under_lock(window, Slots(lambda: now[0]))) == 38


def test_bulk_work_that_takes_long_leaves_queries_a_slot() -> None:
    """It waits while the others run as long, and no longer; what somebody waits for never does."""
    now = [100.0]
    planner = Planner(64, 16_384, cost=Cost(0.002, 0.001))

    def planned(window: list[Item], others_busy_s: float | None, count: int = 2) -> int:
        slots = Slots(lambda: now[0])
        slots.count = count
        slots.queries_are_about([*Asked("q").items, *Asked("a", "b").items])
        if others_busy_s is not None:
            in_thread(slots.begin, others_busy_s).result(PATIENCE_S)
        return planner.plan_under_lock(window, slots)[0]

    long, short = Asked("x" * 100, is_bulk=True).items, Asked("y", is_bulk=True).items
    window = [*long, *Asked("z" * 100, is_bulk=True).items, *short]
    assert planned(window, 1.0) == 2
    assert [planned(window, busy_s) for busy_s in (0.02, None)] == [0, 0]
    assert planned(window, None, count=1) == 0
    assert planned([*long, *Asked("x" * 60, is_bulk=True).items, *long], 1.0) == 1, "nothing shorter is there to do"
    assert planned([*Asked("x" * 100).items, *short], 1.0) == 0
    assert planned([*Asked("x" * 100, "y").items, *short], 1.0) == 0


def test_many_slots_do_not_make_a_batch_of_nothing() -> None:
    """The first batch of an idle model may run for two fixed costs at least, however many slots there are."""
    assert Planner(64, 16_384, cost=Cost(0.004, 0.0001)).largest_tokens(slots=100) == 40


def test_where_nothing_pads_a_batch_is_filled_in_the_order_of_service() -> None:
    """A remote service has its own way with lengths, and is called as seldom as can be; options still part batches."""
    lengths = (3, 300, 5, 200, 7, 100)
    groups = (None, None, "{}", None, None, None)
    assert chosen(Planner(4, 100, pads=False), *lengths) == [0, 1, 2, 3]
    assert chosen(Planner(4, 100, pads=False), *lengths, groups=groups) == [0, 1, 3, 4]


def test_where_texts_share_rows_a_batch_costs_its_tokens() -> None:
    """Long and short ones go together, in the order of service, until the batch would run longer than it may."""
    planner = Planner(64, 16_384, max_s=0.05, cost=Cost(0.002, 0.0001), pads=False)
    assert chosen(planner, 3, 300, 5, 150, 7, 100, 1) == [0, 1, 2, 3, 4]
    assert chosen(planner, 600, 1) == [0]
    assert planner.predicted_s([3, 300, 5]) == pytest.approx(0.002 + 308 * 0.0001)


@pytest.mark.parametrize(("max_chars", "places"), [(None, [0, 1, 2, 3]), (31, [0, 1, 2, 3]), (30, [0, 1, 2]), (1, [0])])
def test_a_call_may_have_a_bound_in_characters(max_chars: int | None, places: list[int]) -> None:
    """Nobody is passed over for it, and a text that is longer goes alone."""
    assert chosen(Planner(4, 100, pads=False, max_chars=max_chars), 10, 10, 10, 1, 1) == places


def test_a_batch_takes_nothing_from_far_behind() -> None:
    """What rides along from behind much work is time that the requests before it lose."""
    planner = Planner(64, 16384, 0.05, Cost(0.001, 0.0005))  # 98 tokens are the longest batch
    near = [20] * 10
    far = [200] * 6
    assert chosen(planner, 3, *near, *far, 3) == [0]
    assert chosen(planner, 3, *near, 3) == [0, 11]
    assert chosen(Planner(64, 16384), 3, *near, *far, 3) != [
        0
    ]  # where nothing is known of the cost, padding alone counts


def test_a_call_that_costs_much_makes_larger_batches() -> None:
    """The fixed cost of a call, in tokens, decides how much padding is worth saving one."""
    lengths = [10, 10, 10, 40]
    assert chosen(Planner(64, 16_384, cost=Cost(0.0001, 0.0001)), *lengths) == [0, 1, 2]
    assert chosen(Planner(64, 16_384, cost=Cost(0.1, 0.0001)), *lengths) == [0, 1, 2, 3]
    assert Planner(64, 16_384).fixed_tokens == UNKNOWN_FIXED_TOKENS
