"""Quarantine for items that ended a place: clients retry after an error, and no text may end the next place, too."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from embedpool.tasks.item import Item

QUARANTINE_S = 600.0  # not for ever: it may have been the machine's fault
MOST_REMEMBERED = 1000


class Quarantine:
    """Of one model. Its lock guards the table alone; a replica's thread holds it for one look-up."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._until: dict[bytes, tuple[float, str]] = {}  # by the items' keys, in the order of time; and the reason

    def add(self, item: Item, reason: str) -> None:
        """Remember an item, and forget the oldest beyond the bound."""
        with self._lock:
            self._until.pop(item.key, None)
            self._until[item.key] = (self._clock() + QUARANTINE_S, reason)
            if len(self._until) > MOST_REMEMBERED:
                del self._until[next(iter(self._until))]

    def clear(self) -> None:
        """Give all of them another chance."""
        with self._lock:
            self._until.clear()

    def reason(self, item: Item) -> str | None:
        """Why an item is not computed; None if nothing is known against it."""
        if not self._until:
            return None
        with self._lock:
            until, reason = self._until.get(item.key, (0.0, None))
        return reason if self._clock() < until else None
