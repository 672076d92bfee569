"""How fast a remote service may be called, as its refusals (429) tell: pauses, and how many calls at once."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

FIRST_PAUSE_S = 0.1  # doubled with each refusal after a pause
LONGEST_GUESS_S = 30.0
LONGEST_PAUSE_S = 3600.0  # that a service can ask for
GROWTH = 0.1  # of a call at once, for as many answers as there are calls at once


class Pace:
    """Additive increase and multiplicative decrease, as of TCP's window (RFC 5681). Not thread-safe.

    A refusal halves the calls that are made at once, and each call that is served adds a small part of one: one that is
    too many costs a refusal. `Retry-After` says how long the pause is at least.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self.at_once = math.inf  # calls
        self._clock = clock
        self._refusals = 0  # in a row
        self._refused_at = -math.inf
        self._rests_until = -math.inf

    @property
    def rest_s(self) -> float:
        """Seconds until it may be called again."""
        return max(self._rests_until - self._clock(), 0.0)

    def served(self) -> None:
        """A call was answered."""
        self._refusals = 0
        self.at_once += GROWTH / self.at_once

    def refused(self, began_at: float, running: int, retry_after_s: float | None) -> None:
        """A call that began then was refused, one of so many that ran at once.

        Those that were under way when another was refused say nothing new.
        """
        now = self._clock()
        if began_at > self._refused_at:
            self._refused_at = now
            self._refusals += 1
            self.at_once = max(min(self.at_once, running) / 2, 1.0)
        guess_s = FIRST_PAUSE_S * 2.0 ** min(self._refusals - 1, 20) * (1 + random.random())  # noqa: S311  (no secret)
        pause_s = max(min(guess_s, LONGEST_GUESS_S), min(retry_after_s or 0.0, LONGEST_PAUSE_S))
        self._rests_until = max(self._rests_until, now + pause_s)
