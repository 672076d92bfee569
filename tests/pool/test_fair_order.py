"""Requests end in the order of an ideal server that all of them share, and no later but for what runs."""

from __future__ import annotations

import itertools
import random
from fractions import Fraction
from typing import NamedTuple

from hypothesis import given, settings
from hypothesis import strategies as st

from embedpool.pool.fair_order import FairOrder
from embedpool.pool.model_queue import ModelQueue
from tests.pool.scripted import Asked

WEIGHTS = {"a": 1, "b": 3}
STEP = st.tuples(st.sampled_from("abc"), st.floats(0.001, 1000), st.integers(1, 50), st.booleans())


class Arrival(NamedTuple):
    at: int
    caller: str
    items: int


def _arrivals(callers: str, latest: int) -> st.SearchStrategy[list[Arrival]]:
    one = st.builds(Arrival, st.integers(0, latest), st.sampled_from(callers), st.integers(1, 12))
    return st.lists(one, min_size=1, max_size=12).map(sorted)


# A later request of one caller of several puts off the ideal ends of its others alone, and what was served by then
# stays served: so the bound is exact for one caller, and for several whose requests are all there.
ARRIVALS = _arrivals("a", 40) | _arrivals("ab", 0)


def ideal_ends(arrivals: list[Arrival]) -> list[Fraction]:
    """When a server of one item a second that all share at every moment ends each: callers by weight, then equally."""
    left = [Fraction(arrival.items) for arrival in arrivals]
    ends: list[Fraction | None] = [None] * len(arrivals)
    now = Fraction(0)
    while None in ends:
        active = [i for i, a in enumerate(arrivals) if a.at <= now and ends[i] is None]
        coming = min((a.at for a in arrivals if a.at > now), default=None)
        if not active:
            assert coming is not None
            now = Fraction(coming)
            continue
        callers = {arrivals[i].caller for i in active}
        weights = sum(WEIGHTS[caller] for caller in callers)
        rates = {}
        for i in active:
            beside = sum(arrivals[j].caller == arrivals[i].caller for j in active)
            rates[i] = Fraction(WEIGHTS[arrivals[i].caller], weights * beside)
        step = min(left[i] / rates[i] for i in active)
        if coming is not None:
            step = min(step, coming - now)
        now += step
        for i in active:
            left[i] -= rates[i] * step
            if left[i] == 0:
                ends[i] = now
    return [end for end in ends if end is not None]


def real_ends(arrivals: list[Arrival], slots: int, batch: int) -> list[int]:
    """When the queue ends each: a batch of up to so many items in each slot, at one item a second in all."""
    numbers = itertools.count()
    waiting = ModelQueue(10_000, lambda: 0.0)
    requests = [
        Asked(*(f"{next(numbers)}" for _ in range(a.items)), caller=a.caller, weight=WEIGHTS[a.caller])
        for a in arrivals
    ]
    for request in requests:
        for item in request.items:
            item.tokens = 1
        request.tokens = len(request.items)
    ends = [0] * len(arrivals)
    free = [0] * slots
    came = 0
    while came < len(arrivals) or waiting.qsize():
        now = min(free)
        if not waiting.qsize():
            now = max(now, arrivals[came].at)
        while came < len(arrivals) and arrivals[came].at <= now:
            requests[came].admitted_to(waiting)
            came += 1
        items = waiting.take(lambda window: range(min(batch, len(window))), 0)
        over = now + len(items) * slots
        free[free.index(min(free))] = over
        for item in items:
            number = requests.index(item.request)
            ends[number] = max(ends[number], over)
    return ends


@settings(max_examples=300, deadline=None, database=None)
@given(ARRIVALS)
def test_one_item_at_a_time_no_request_ends_later_than_under_sharing(arrivals: list[Arrival]) -> None:
    """But for one item, which was running when it came."""
    for real, ideal in zip(real_ends(arrivals, 1, 1), ideal_ends(arrivals), strict=True):
        assert real <= ideal + 1


@settings(max_examples=300, deadline=None, database=None)
@given(_arrivals("ab", 40))
def test_what_a_later_request_of_one_caller_puts_off_is_all_that_others_lose(arrivals: list[Arrival]) -> None:
    """Its caller's earlier requests may have been served first, by what was known then."""
    ideal = ideal_ends(arrivals)
    for number, (arrival, real) in enumerate(zip(arrivals, real_ends(arrivals, 1, 1), strict=True)):
        put_off = sum(
            other.items
            for i, other in enumerate(arrivals)
            if other.caller != arrival.caller
            and any(i < j and later.caller == other.caller and later.at > other.at for j, later in enumerate(arrivals))
        )
        assert real <= ideal[number] + 1 + put_off


@settings(max_examples=300, deadline=None, database=None)
@given(ARRIVALS, st.integers(1, 3), st.integers(1, 8))
def test_with_batches_it_is_no_later_than_the_longest_of_each_slot(
    arrivals: list[Arrival], slots: int, batch: int
) -> None:
    """A batch cannot be interrupted, and a slot that runs alone has only its part of the machine: so its own last one
    counts, too."""
    for real, ideal in zip(real_ends(arrivals, slots, batch), ideal_ends(arrivals), strict=True):
        assert real <= ideal + (slots + 1) * batch * slots


def test_equal_requests_are_first_come_first_served() -> None:
    """Whole ones, not text by text in turns."""
    order = FairOrder()
    for key in range(5):
        order.enter(key, "", 1, 1, 10)
        order.serve(1)
    assert list(order) == [0, 1, 2, 3, 4]


def test_a_query_passes_the_rest_of_a_long_request() -> None:
    """However far that is."""
    order = FairOrder()
    order.enter("long", "", 1, 1, 10_000)
    order.serve(500)
    order.enter("query", "", 1, 1, 10)
    assert list(order) == ["query", "long"]


def test_one_that_has_left_may_come_again() -> None:
    """What the ideal server still does of its first work does not count for its second."""
    order = FairOrder()
    order.enter("twice", "", 1, 1, 10)
    order.enter("other", "", 1, 1, 100)
    order.leave("twice")
    order.enter("twice", "", 1, 1, 1000)
    assert list(order) == ["other", "twice"]
    order.serve(40)
    assert list(order) == ["other", "twice"]


def test_requests_of_as_many_texts_are_first_come_first_served() -> None:
    """Whichever has the longer ones, within reason."""
    waiting, chance = ModelQueue(10_000, lambda: 0.0), random.Random(3)

    def come(number: int) -> Asked:
        request = Asked(*(f"{number} {i}" for i in range(8)))
        for item in request.items:
            item.tokens = chance.randint(33, 200)
        request.tokens = sum(item.tokens for item in request.items)
        return request.admitted_to(waiting)

    requests: list[Asked] = []
    ended: list[int] = []
    while len(ended) < 100:
        requests.append(come(1000 + len(requests)))
        for _ in range(8 if len(requests) > 16 else 0):
            (item,) = waiting.take(lambda window: [0], 0)
            if not item.request.waiting:
                ended.append(requests.index(item.request))
    assert max(abs(place - number) for place, number in enumerate(ended)) <= 1


def test_what_is_withdrawn_is_nobodys_burden() -> None:
    """Its caller's other requests have its share, and it comes back as new."""
    order = FairOrder()
    order.enter("gone", "a", 1, 1, 100)
    order.enter("stays", "a", 1, 1, 100)
    order.enter("other", "b", 1, 1, 150)
    assert list(order) == ["other", "gone", "stays"]
    order.withdraw("gone")
    assert list(order) == ["stays", "other"]
    order.withdraw("gone")
    assert "gone" not in order


@settings(max_examples=200, deadline=None, database=None)
@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.floats(0.001, 1000), st.integers(1, 50), st.booleans()), max_size=40)
)
def test_any_sequence_loses_nobody(steps: list[tuple[str, float, int, bool]]) -> None:
    """Every request that has not left is in the order, once, whatever rounding does."""
    order = FairOrder()
    inside: list[int] = []
    for number, (caller, weight, work, leaves) in enumerate(steps):
        order.enter(number, caller, weight, 1, work)
        inside.append(number)
        order.serve(work * 0.7)
        if leaves:
            gone = inside.pop(0)
            (order.leave if number % 2 else order.withdraw)(gone)
        assert sorted(order) == sorted(inside)
