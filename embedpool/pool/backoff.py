"""How long to wait before a driver is opened again."""

from __future__ import annotations

from embedpool.errors import UpstreamError
from embedpool.pool.runner import DriverBroken, DriverLost
from embedpool.tasks.driver import NoRoom

FIRST_S = 0.5
LONGEST_S = 60.0
# A driver that does load costs little to try again; one without room is asked for again before anybody can think that
# it is wanted no more.
LONGEST_AFTER_S = ((DriverBroken, 1.0), (UpstreamError, 5.0), (NoRoom, 1.0))
LOSSES_TO_FIND_AN_ITEM = 8  # halving a batch of 64, and the item alone


class Backoff:
    """Doubles with each failure in a row. Losses count beyond those that it takes to find one item at fault."""

    def __init__(self) -> None:
        self.failures = self._losses = 0  # in a row
        self._longest_s = LONGEST_S

    def failed(self, error: BaseException) -> None:
        """Opening the driver, or serving with it, failed with this error."""
        if isinstance(error, DriverLost):
            self._losses += 1
        else:
            self.failures += 1
        self._longest_s = next((s for kind, s in LONGEST_AFTER_S if isinstance(error, kind)), LONGEST_S)

    def served(self) -> None:
        """A batch has been served."""
        self.failures = self._losses = 0

    @property
    def setbacks(self) -> int:
        """How many there are to wait for."""
        return self.failures + max(self._losses - LOSSES_TO_FIND_AN_ITEM, 0)

    @property
    def pause_s(self) -> float:
        """Seconds until the next attempt; 0 without a setback."""
        return min(FIRST_S * 2.0 ** min(self.setbacks - 1, 10), self._longest_s) if self.setbacks else 0.0
