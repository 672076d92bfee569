"""How long the lanes of a model will be busy: its batches are cut to end in turns."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Lanes:
    """The batches that run for one model, one in each lane (a thread), and when each will have ended by its cost."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._ends: dict[int, float] = {}  # by thread, on the clock

    def busy_s(self) -> float:
        """How long until the last of them has ended."""
        with self._lock:
            return max([end - self._clock() for end in self._ends.values()] + [0.0])

    def begin(self, seconds: float) -> None:
        """In this thread a batch begins that will take so long."""
        with self._lock:
            self._ends[threading.get_ident()] = self._clock() + seconds

    def end(self) -> None:
        """In this thread none runs any more."""
        with self._lock:
            self._ends.pop(threading.get_ident(), None)
