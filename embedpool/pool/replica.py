"""One driver instance and the threads that run batches in it: opens it, serves, opens it anew when it breaks."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Protocol

from embedpool.pool.model_queue import ModelQueue
from embedpool.pool.worker import DriverBroken, Worker

if TYPE_CHECKING:
    from embedpool.drivers.base import Driver

logger = logging.getLogger(__name__)

BACKOFF_FIRST_S = 0.5
BACKOFF_LONGEST_S = 60.0


class Owner(Protocol):
    """What a replica asks of the model it belongs to. Called on the replica's threads."""

    queue: ModelQueue

    def open_driver(self) -> Driver:
        """An open driver, or an exception."""

    def make_worker(self, name: str, driver: Driver) -> Worker:
        """A worker on the model's queue."""

    def inflight(self, driver: Driver) -> int:
        """Batches at once."""

    def idle_timeout_s(self) -> float | None:
        """When an idle replica should ask to retire; None: it stays."""

    def may_retire(self, replica: Replica) -> bool:
        """Whether this replica is not needed; if so it is removed already when this returns."""

    def grow(self) -> None:
        """Work waits behind what was just taken."""

    def replica_changed(self, replica: Replica) -> None:
        """It became ready, failed or closed."""


class Replica:
    """States: loading, ready, failed, closed. The driver is opened, used and closed on the replica's own threads."""

    def __init__(self, name: str, owner: Owner, clock: Callable[[], float] = time.monotonic) -> None:
        self.name = name
        self.state = "loading"
        self.failures = 0  # in a row, without a served batch between
        self.last_error: str | None = None
        self.retry_at = 0.0  # on the clock, while failed
        self.description: Mapping[str, object] = {}
        self._owner = owner
        self._clock = clock
        self._stop = threading.Event()
        self._leave = threading.Event()  # the driver is broken, or the replica retires or stops
        self._retired = False
        self._lock = threading.Lock()
        self._busy = 0
        self._last_busy = clock()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    @property
    def busy(self) -> bool:
        """Whether a batch runs."""
        return self._busy > 0

    def start(self) -> None:
        """Begin to load."""
        self._thread.start()

    def stop(self) -> None:
        """Finish the running batches and close."""
        self._stop.set()
        self._leave_loops()

    def join(self, timeout_s: float | None) -> bool:
        """Whether the threads ended in time."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                driver = self._open()
                if driver is None:
                    if self._owner.may_retire(self) or self._stop.wait(self._backoff_s()):
                        break
                    continue
                try:
                    self._serve(driver)
                finally:
                    _close(driver, self.name)
                if self._retired:
                    break
                if self.failures > 1:
                    self._stop.wait(self._backoff_s())
        finally:
            self._become("closed")

    def _open(self) -> Driver | None:
        self._leave.clear()
        if self._stop.is_set():
            return None
        started = self._clock()
        try:
            driver = self._owner.open_driver()
        except Exception as error:
            logger.warning("%s did not load: %s", self.name, error)
            self._failed(error)
            return None
        logger.info("%s loaded in %.1f s", self.name, self._clock() - started)
        self.description = driver.description
        self._last_busy = self._clock()
        self._become("ready")
        return driver

    def _failed(self, error: Exception) -> None:
        self.failures += 1
        self.last_error = f"{type(error).__name__}: {error}"
        self.retry_at = self._clock() + self._backoff_s()
        self._become("failed")

    def _serve(self, driver: Driver) -> None:
        siblings = [
            threading.Thread(target=self._loop, args=(driver, False), name=f"{self.name}/{i}", daemon=True)
            for i in range(2, self._owner.inflight(driver) + 1)
        ]
        for thread in siblings:
            thread.start()
        self._loop(driver, True)
        for thread in siblings:
            thread.join()

    def _loop(self, driver: Driver, lead: bool) -> None:
        """One worker's life. Only the lead asks to retire."""
        worker = self._owner.make_worker(self.name, driver)
        while not self._leave.is_set():
            idle_s = self._owner.idle_timeout_s() if lead else None
            try:
                if worker.step(idle_s, on_work=self._begin_work, leaving=self._leave.is_set):
                    self._end_work(served=True)
                elif idle_s is not None and self._idle_for(idle_s) and self._owner.may_retire(self):
                    self._retired = True
                    self._leave_loops()
            except DriverBroken as error:
                self._end_work(served=False)
                if not self._leave.is_set():
                    logger.warning("%s is broken and is opened anew: %s", self.name, error)
                    self._failed(error)
                    self._leave_loops()

    def _leave_loops(self) -> None:
        self._leave.set()
        self._owner.queue.wake()

    def _begin_work(self) -> None:
        with self._lock:
            self._busy += 1
        self._owner.grow()

    def _end_work(self, *, served: bool) -> None:
        with self._lock:
            self._busy -= 1
            self._last_busy = self._clock()
            if served:
                self.failures = 0

    def _idle_for(self, idle_s: float) -> bool:
        with self._lock:
            return self._busy == 0 and self._clock() - self._last_busy >= idle_s

    def _become(self, state: str) -> None:
        self.state = state
        self._owner.replica_changed(self)

    def _backoff_s(self) -> float:
        return float(min(BACKOFF_FIRST_S * 2 ** (self.failures - 1), BACKOFF_LONGEST_S)) if self.failures else 0.0


def _close(driver: Driver, name: str) -> None:
    try:
        driver.close()
    except Exception:
        logger.exception("%s: the driver did not close cleanly", name)
