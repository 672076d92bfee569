"""How fast a remote service is called once it has refused calls for being too many."""

from __future__ import annotations

import math

import pytest

from embedpool.drivers import pace
from embedpool.drivers.pace import GROWTH, LONGEST_PAUSE_S, Pace


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def refuse(paced: Pace, clock: Clock, running: int = 8, retry_after_s: float | None = None) -> None:
    """A call after the pause before, with others beside it."""
    clock.now += paced.rest_s + 1
    paced.refused(clock.now, running, retry_after_s)


def test_without_a_refusal_nothing_is_held_back(clock: Clock) -> None:
    """However many calls there are."""
    paced = Pace(clock)
    paced.served()
    assert (paced.at_once, paced.rest_s) == (math.inf, 0.0)


def test_each_refusal_halves_the_calls_at_once_and_each_answer_adds_to_them(clock: Clock) -> None:
    """Down to one, and up again, slowly: by a part of one for as many answers as there are calls at once."""
    paced = Pace(clock)
    seen = []
    for _ in range(4):
        refuse(paced, clock)
        seen.append(paced.at_once)
    assert seen == [4, 2, 1, 1]
    paced.served()
    assert paced.at_once == 1 + GROWTH
    for _ in range(1000):
        paced.served()
    assert paced.at_once > 8


def test_calls_that_were_under_way_tell_nothing_new(clock: Clock) -> None:
    """Eight calls that are refused together are one refusal."""
    paced = Pace(clock)
    began_at = clock.now
    clock.now += 1
    for running in range(8, 0, -1):
        paced.refused(began_at, running, None)
    assert paced.at_once == 4
    assert paced.rest_s <= 2 * pace.FIRST_PAUSE_S


def test_pauses_grow_until_a_call_is_answered(clock: Clock) -> None:
    """Where the service does not say how long."""
    paced = Pace(clock)
    pauses = []
    for _ in range(12):
        refuse(paced, clock)
        pauses.append(paced.rest_s)
    assert all(pace.FIRST_PAUSE_S * 2**i <= pause for i, pause in enumerate(pauses[:8]))
    assert max(pauses) <= pace.LONGEST_GUESS_S + 1e-6
    clock.now += paced.rest_s
    paced.served()
    refuse(paced, clock)
    assert paced.rest_s <= 2 * pace.FIRST_PAUSE_S


@pytest.mark.parametrize(("asked_s", "least_s"), [(7.0, 7.0), (0.0, pace.FIRST_PAUSE_S), (1e9, LONGEST_PAUSE_S)])
def test_a_pause_is_as_long_as_it_is_asked_for(clock: Clock, asked_s: float, least_s: float) -> None:
    """Retry-After: 0 is a pause, too, and no service turns a model off for good."""
    paced = Pace(clock)
    refuse(paced, clock, retry_after_s=asked_s)
    assert least_s <= paced.rest_s <= max(least_s, 2 * pace.FIRST_PAUSE_S)
    clock.now += least_s + 1
    assert paced.rest_s == 0
