"""How fast a job is, and how long the rest of it takes."""

from __future__ import annotations

import collections
import time
from collections.abc import Callable

KEPT = 20  # windows


class Speed:
    """Of the last windows, by bytes of the input, since requests differ in length."""

    def __init__(self, at_bytes: int, total_bytes: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._total_bytes = total_bytes
        self._requests = 0
        self._known = collections.deque([(clock(), at_bytes, 0)], KEPT + 1)

    def add(self, at_bytes: int, requests: int) -> None:
        """A window is done, up to there."""
        self._requests += requests
        self._known.append((self._clock(), at_bytes, self._requests))

    @property
    def requests_s(self) -> float:
        """Requests a second."""
        (begun, _, before), (now, _, after) = self._known[0], self._known[-1]
        return (after - before) / max(now - begun, 1e-3)

    @property
    def seconds_left(self) -> float:
        """At this speed."""
        (begun, first, _), (now, last, _) = self._known[0], self._known[-1]
        return (self._total_bytes - last) * (now - begun) / max(last - first, 1)
