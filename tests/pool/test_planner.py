"""Batches that cost little: the plan is a pure function."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from embedpool.tasks.driver import Cost
from embedpool.pool.batcher import UNKNOWN_FIXED_TOKENS, Batcher, cut
from embedpool.pool.job import Row
from tests.pool.scripted import job_of

LENGTHS = st.lists(st.integers(0, 300), min_size=1, max_size=40).map(sorted)
FIXED = st.floats(0, 1000)


def price(lengths: list[int], ends: list[int], fixed: float) -> float:
    """What a plan costs, in padded tokens."""
    starts = [0, *ends[:-1]]
    return sum(fixed + (end - start) * lengths[end - 1] for start, end in zip(starts, ends, strict=True))


def optimum(lengths: list[int], fixed: float, max_tokens: int, max_texts: int) -> float:
    """The cheapest plan within the limits, by looking at every cut."""
    best = [0.0]
    for end in range(1, len(lengths) + 1):
        best.append(
            min(
                best[start] + fixed + (end - start) * lengths[end - 1]
                for start in range(end)
                if end - start == 1 or ((end - start) <= max_texts and (end - start) * lengths[end - 1] <= max_tokens)
            )
        )
    return best[-1]


@settings(max_examples=400, deadline=None)
@given(LENGTHS, FIXED, st.integers(1, 4000), st.integers(1, 64))
def test_a_plan_covers_every_text_once_within_the_limits(
    lengths: list[int], fixed: float, max_tokens: int, max_texts: int
) -> None:
    """Each text is in one batch; a batch over a limit holds one text alone."""
    ends = cut(lengths, fixed, max_tokens, max_texts)
    assert ends == sorted(set(ends))
    assert (ends[0] > 0, ends[-1]) == (True, len(lengths))
    for start, end in zip([0, *ends[:-1]], ends, strict=True):
        assert end - start <= max_texts
        assert end - start == 1 or (end - start) * lengths[end - 1] <= max_tokens


@settings(max_examples=400, deadline=None)
@given(LENGTHS, FIXED, st.integers(1, 4000), st.integers(1, 64))
@example([0, 0], 1.0, 1, 2)
@example([3, 3, 21, 45, 69, 86, 99, 108, 116, 125, 171], 271.0, 512, 64)
def test_no_plan_within_the_limits_is_cheaper(
    lengths: list[int], fixed: float, max_tokens: int, max_texts: int
) -> None:
    """The cuts are the best there are; so without limits they are never worse than one batch of all."""
    found = price(lengths, cut(lengths, fixed, max_tokens, max_texts), fixed)
    assert found == pytest.approx(optimum(lengths, fixed, max_tokens, max_texts))
    assert found <= sum(fixed + length for length in lengths) + 1e-6
    unbound = price(lengths, cut(lengths, fixed, 10**9, 10**9), fixed)
    assert unbound <= min(found, fixed + len(lengths) * lengths[-1]) + 1e-6


def chosen(batcher: Batcher, *lengths: int, groups: tuple[str | None, ...] = ()) -> list[int]:
    """Places chosen from a window of texts of these lengths."""
    rows = [Row(job_of("x" * length, group=groups[i] if groups else None), 0) for i, length in enumerate(lengths)]
    return batcher.choose(rows)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 300), st.sampled_from([None, "a", "b"])), min_size=1, max_size=60),
    st.integers(1, 16),
    st.integers(1, 2000),
)
def test_the_one_whose_turn_it_is_always_goes(window: list, max_texts: int, max_tokens: int) -> None:
    """The batch holds the first of the window, is within the limits, and mixes no groups."""
    lengths, groups = zip(*window, strict=True)
    places = chosen(Batcher(max_texts, max_tokens), *lengths, groups=groups)
    assert places[0] == 0
    assert places == sorted(set(places))
    assert len(places) <= max_texts
    assert len(places) == 1 or len(places) * max(lengths[i] for i in places) <= max_tokens
    assert {groups[i] for i in places} == {groups[0]}


def test_a_long_text_does_not_make_short_ones_pay() -> None:
    """Thirty short texts and a long one are two batches; whose turn it is decides which comes first."""
    batcher = Batcher(64, 16_384)
    assert chosen(batcher, *[8] * 30, 500) == list(range(30))
    assert chosen(batcher, 500, *[8] * 30) == [0]


def test_nearly_equal_texts_share_a_batch() -> None:
    """A second call would cost more than the padding."""
    assert chosen(Batcher(64, 16_384), 8, 10, 9, 12) == [0, 1, 2, 3]


def test_no_batch_is_planned_to_run_longer_than_it_may() -> None:
    """A query waits for the running batch: `max_batch_ms` bounds it by the costs fitted at warm-up."""
    batcher = Batcher(64, 16_384, max_s=0.05, cost=Cost(0.002, 0.0001))
    assert batcher.largest_tokens() == 480
    assert 3 <= len(chosen(batcher, *[100] * 30)) <= 4
    assert Batcher(64, 16_384, max_s=0.05).largest_tokens() == 16_384
    assert Batcher(64, 16_384, cost=Cost(0.002, 0.0001)).largest_tokens() == 480
    assert Batcher(64, 16_384, cost=Cost(0.01, 0.0001)).largest_tokens() == 900  # ten fixed costs
    assert Batcher(64, 100, max_s=0.05, cost=Cost(0.002, 0.0001)).largest_tokens() == 100


@settings(deadline=None)
@given(lanes=st.integers(1, 5), data=st.data())
def test_lanes_come_free_in_turns(lanes: int, data: st.DataObject) -> None:
    """However the lanes of a busy model begin, soon one of them comes free within the longest batch ÷ lanes."""
    longest_s = 1.0
    batcher = Batcher(10_000, 100_000, max_s=longest_s, cost=Cost(0.01, 0.0001), lanes=lanes)
    ends = sorted(data.draw(st.lists(st.floats(0, longest_s), min_size=lanes, max_size=lanes), label="first ends"))
    waits = []
    for _ in range(4 * lanes):
        now = ends.pop(0)
        busy_s = max([end - now for end in ends], default=0.0)
        ends = sorted([*ends, now + batcher.predicted_s([1] * batcher.largest_tokens(busy_s))])
        waits.append(ends[0] - now)
    assert max(waits[2 * lanes :]) <= longest_s / lanes + 0.001
    assert sum(waits[2 * lanes :]) >= 2 * longest_s - 0.001 * lanes, "batches are as long as they may be"


def test_many_lanes_do_not_make_a_batch_of_nothing() -> None:
    """The first batch of an idle model may run for two fixed costs at least, however many lanes there are."""
    assert Batcher(64, 16_384, cost=Cost(0.004, 0.0001), lanes=100).largest_tokens(0.0) == 40


def test_a_call_that_costs_much_makes_larger_batches() -> None:
    """The fixed cost of a call, in tokens, decides how much padding is worth saving one."""
    lengths = [10, 10, 10, 40]
    assert chosen(Batcher(64, 16_384, cost=Cost(0.0001, 0.0001)), *lengths) == [0, 1, 2]
    assert chosen(Batcher(64, 16_384, cost=Cost(0.1, 0.0001)), *lengths) == [0, 1, 2, 3]
    assert Batcher(64, 16_384).fixed_tokens == UNKNOWN_FIXED_TOKENS
