"""The rate limit of an API key: a token bucket that holds a second's worth."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class RateLimit:
    """A token bucket that may be overdrawn: a request larger than a second's worth is let in, and paid off after.

    Otherwise a large request could never be let in at all. Thread-safe.
    """

    def __init__(self, rate_per_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate_per_s = rate_per_s
        self._most = max(rate_per_s, 1.0)
        self._clock = clock
        self._left = self._most
        self._at = clock()
        self._lock = threading.Lock()

    def take(self, amount: float) -> float:
        """Take it and give 0, or take nothing and give the seconds until something may be taken."""
        with self._lock:
            now = self._clock()
            self._left = min(self._most, self._left + (now - self._at) * self._rate_per_s)
            self._at = now
            if self._left < min(amount, 1.0):
                return (min(amount, 1.0) - self._left) / self._rate_per_s
            self._left -= amount
            return 0.0
