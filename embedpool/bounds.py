"""Bounds of what may be held at once, and of what may be tried again; and the way back of memory that is free."""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Callable

from embedpool.errors import Overloaded

RETRY_AFTER_S = 2.0


class Budget:
    """Counts bytes that are held, in memory or on a disk. Thread-safe."""

    def __init__(self, most_bytes: int, full: str) -> None:
        """`full` says to whom there is no room why."""
        self._most_bytes = most_bytes
        self._full = full
        self._bytes = 0
        self._lock = threading.Lock()

    def take(self, size: int) -> int:
        """Count so many, and give their number. Raises Overloaded, unless nothing else is held."""
        with self._lock:
            if self._bytes and self._bytes + size > self._most_bytes:
                raise Overloaded(self._full, retry_after_s=RETRY_AFTER_S)
            self._bytes += size
        return size

    def give_back(self, size: int) -> None:
        """What `take` gave."""
        if size:
            with self._lock:
                self._bytes -= size


class CallBudget:
    """Further attempts are a share of the calls, beside a reserve, so that a service in trouble is not given more."""

    def __init__(self, share: float, reserve: float) -> None:
        self._share, self._reserve = share, reserve
        self._left = reserve
        self._lock = threading.Lock()

    def earn(self) -> None:
        """A call is made."""
        with self._lock:
            self._left = min(self._left + self._share, self._reserve)

    def spend(self) -> bool:
        """Whether one more attempt may be made."""
        with self._lock:
            if self._left < 1:
                return False
            self._left -= 1
            return True

    def refund(self) -> None:
        """An attempt was worth a call."""
        with self._lock:
            self._left = min(self._left + 1, self._reserve)


def give_back_memory() -> None:
    """Return free memory to the system: glibc keeps what many threads have freed for as long as it likes."""
    if trim := _trim():
        trim(0)  # without the GIL


@functools.cache
def _trim() -> Callable[[int], int] | None:
    return getattr(ctypes.CDLL(None), "malloc_trim", None)
