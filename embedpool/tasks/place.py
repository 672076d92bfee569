"""What the pool asks of a place, which is where a driver runs: a driver, and whether it is still there."""

from __future__ import annotations

import abc
import contextlib
import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from embedpool.tasks.driver import Facts
from embedpool.tasks.item import Batch
from embedpool.tasks.rows import Answer


@dataclasses.dataclass(frozen=True, slots=True)
class Loss:
    """Why a place can serve no more. An `innocent` one is of a kind that no item can have caused."""

    reason: str
    innocent: bool = False


class Place(abc.ABC):
    """An open driver where it runs. `lost` is set, once, when it can serve no more."""

    facts = Facts()

    def __init__(self) -> None:
        self.lost: Loss | None = None
        self._on_lost: Callable[[], None] | None = None

    @abc.abstractmethod
    def run(self, batch: Batch) -> Answer:
        """See Driver. Raises anything when the place is lost meanwhile."""

    @abc.abstractmethod
    def probe(self) -> None:
        """See Driver."""

    def configure(self, config: Any) -> None:  # noqa: B027  (most places have nothing to change)
        """See Driver."""

    def close(self) -> None:  # noqa: B027  (likewise)
        """End it; what it held is the system's again."""

    def alone(self) -> AbstractContextManager[None]:
        """While it lasts the caller's batch is the only one: if the place is lost then, it is by that batch."""
        return contextlib.nullcontext()

    def watch(self, on_lost: Callable[[], None]) -> None:
        """Have `on_lost` called, on any thread, when the place is lost; at once if it is."""
        self._on_lost = on_lost
        if self.lost:
            on_lost()

    def _lose(self, loss: Loss) -> None:
        """`lost` is set before `_on_lost` is read, and `watch` does it the other way round: one of them sees both."""
        self.lost = self.lost or loss
        if self._on_lost:
            self._on_lost()
