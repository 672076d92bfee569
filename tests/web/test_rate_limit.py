"""A caller's rate."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedpool.web.rate_limit import RateLimit


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_seconds_worth_is_in_hand() -> None:
    """Then the rate decides, and how long to wait is told."""
    clock = Clock()
    allowance = RateLimit(10, clock)
    assert [allowance.take(1) for _ in range(10)] == [0] * 10
    assert allowance.take(1) == pytest.approx(0.1)
    clock.now = 0.1
    assert allowance.take(1) == 0
    assert allowance.take(1) > 0


def test_a_large_request_is_let_in_and_paid_off() -> None:
    """Else it could never be let in."""
    clock = Clock()
    allowance = RateLimit(10, clock)
    assert allowance.take(110) == 0
    assert allowance.take(1) == pytest.approx(10.1)
    clock.now = 10.1
    assert allowance.take(1) == 0


def test_less_than_one_a_second() -> None:
    """One at once, and the next after its time."""
    clock = Clock()
    allowance = RateLimit(0.5, clock)
    assert allowance.take(1) == 0
    assert allowance.take(1) == pytest.approx(2.0)
    clock.now = 2.0
    assert allowance.take(1) == 0


@settings(max_examples=200, deadline=None, database=None)
@given(st.floats(0.5, 100), st.lists(st.tuples(st.floats(0, 2), st.integers(1, 50)), min_size=1, max_size=40))
def test_in_the_long_run_it_is_the_rate(rate: float, asked: list[tuple[float, int]]) -> None:
    """What is let in is never more than the rate, a second's worth and one request; who waits as told is let in."""
    clock = Clock()
    allowance = RateLimit(rate, clock)
    taken, largest = 0, 0
    for pause, amount in asked:
        clock.now += pause
        largest = max(largest, amount)
        wait_s = allowance.take(amount)
        if wait_s:
            clock.now += wait_s * 1.000001 + 1e-9
            assert allowance.take(amount) == 0
        taken += amount
    assert taken <= rate * clock.now + max(rate, 1) + largest
