"""Bounds what the bodies of all requests hold at once: a body and its texts, from being parsed until it is answered."""

from __future__ import annotations

import threading

from embedpool.errors import Overloaded

INTAKE = "embedpool.intake"
FREE_BYTES = 1 << 16  # a body of up to so many bytes is not counted
LARGE_BYTES = 4 << 20  # of larger ones one is parsed at a time
RETRY_AFTER_S = 2.0


class Intake:
    """Counts bytes of bodies. Thread-safe."""

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._bytes = 0
        self._lock = threading.Lock()
        self.one_at_a_time = threading.Lock()  # while a large body is parsed

    def take(self, size: int) -> int:
        """Count a body; gives how much of it counts. Raises Overloaded, unless nothing else is held."""
        if size <= FREE_BYTES:
            return 0
        with self._lock:
            if self._bytes and self._bytes + size > self._most_bytes:
                raise Overloaded("the bodies of other requests fill the memory for them", retry_after_s=RETRY_AFTER_S)
            self._bytes += size
        return size

    def give_back(self, size: int) -> None:
        """What `take` gave."""
        if size:
            with self._lock:
                self._bytes -= size
