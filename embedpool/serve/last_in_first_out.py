"""Chooses the request thread that is woken for a request."""

from __future__ import annotations

import threading
from collections import deque
from typing import Any

from typing_extensions import override


class LastInFirstOut(threading.Condition):
    """Wakes the thread that has waited for the shortest time."""

    _waiters: deque[Any]  # of the standard library's own, which wakes the first of them

    @override
    def notify(self, n: int = 1) -> None:
        self._waiters.rotate(n)
        super().notify(n)
