"""The texts that ended a driver, so that one which is sent again, as clients do on an error, does not end another."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from embedpool.pool.job import Row

REMEMBERED_S = 600.0  # not for ever: it may have been the machine's fault
MOST_REMEMBERED = 1000


class Culprits:
    """Of one model. Thread-safe."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._until: dict[int, tuple[float, str]] = {}  # by a hash of the text, in the order of time; and the reason

    def add(self, row: Row, reason: str) -> None:
        """Remember the text of a row, and forget the oldest beyond the bound."""
        with self._lock:
            self._until.pop(hash(row.same_as), None)
            self._until[hash(row.same_as)] = (self._clock() + REMEMBERED_S, reason)
            if len(self._until) > MOST_REMEMBERED:
                del self._until[next(iter(self._until))]

    def clear(self) -> None:
        """Give all of them another chance."""
        with self._lock:
            self._until.clear()

    def reason(self, row: Row) -> str | None:
        """Why the text of a row is not computed; None if nothing is known against it."""
        if not self._until:
            return None
        with self._lock:
            until, reason = self._until.get(hash(row.same_as), (0.0, None))
        return reason if self._clock() < until else None
