"""One driver instance and the threads that run batches in it: opens it, serves, opens it anew when it breaks."""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Protocol

from embedpool.errors import EmbedpoolError, UpstreamError
from embedpool.pool.model_queue import ModelQueue
from embedpool.pool.worker import DriverBroken, DriverLost, Worker

if TYPE_CHECKING:
    from embedpool.drivers.base import Driver

logger = logging.getLogger(__name__)

BACKOFF_FIRST_S = 0.5
BACKOFF_LONGEST_S = 60.0
LOSSES_TO_FIND_A_TEXT = 8  # halving a batch of 64, and the text alone
BACKOFF_LONGEST_AFTER_S = ((DriverBroken, 1.0), (UpstreamError, 5.0))  # it does load; it costs little to ask


class Owner(Protocol):
    """What a replica asks of the model it belongs to. Called on the replica's threads."""

    queue: ModelQueue

    @property
    def driver_config(self) -> object:
        """driver.config as it is now."""

    def is_surplus(self, replica: Replica) -> bool:
        """Whether there are more replicas than may be; if so this one is removed already when this returns."""

    def open_driver(self) -> Driver:
        """An open driver, or an exception."""

    def make_worker(self, name: str, driver: Driver) -> Worker:
        """A worker on the model's queue."""

    def inflight(self, driver: Driver) -> int:
        """Batches at once."""

    def idle_timeout_s(self) -> float | None:
        """When an idle replica should ask to retire; None: it stays."""

    @property
    def probe_idle_s(self) -> float | None:
        """After how long without work the driver is tried with a text; None: never."""

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
        self._losses = 0  # likewise, of drivers that a batch has ended
        self.last_error: str | None = None
        self.retry_at = 0.0  # on the clock, while failed
        self._longest_backoff_s = BACKOFF_LONGEST_S
        self.description: Mapping[str, object] = {}
        self._owner = owner
        self._clock = clock
        self._stop = threading.Event()
        self._leave = threading.Event()  # the driver is broken, or the replica retires or stops
        self._retired = False
        self._lock = threading.Lock()
        self._running: dict[int, float] = {}  # the threads in which a batch runs, since when
        self._driver: Driver | None = None  # while it serves
        self._siblings: list[threading.Thread] = []
        self._last_busy = self._proved_at = clock()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    @property
    def busy(self) -> bool:
        """Whether a batch runs."""
        return bool(self._running)

    def stuck_s(self, longest_s: float) -> float:
        """How long it has been stuck: every thread of it in a batch of more than `longest_s` seconds. Else 0."""
        with self._lock:
            threads = 1 + sum(thread.is_alive() for thread in self._siblings)
            if self.state != "ready" or len(self._running) < threads:
                return 0.0
            shortest_s = self._clock() - max(self._running.values())
        return shortest_s if shortest_s > longest_s else 0.0

    def start(self) -> None:
        """Begin to load."""
        self._thread.start()

    def stop(self) -> None:
        """Finish the running batches and close."""
        self._stop.set()
        self._leave_loops()

    def join(self, timeout_s: float | None) -> bool:
        """Whether the threads ended in time."""
        if self._thread.ident is None:
            return True
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
                except Exception as error:  # a fault of ours, or no thread to be had: as a broken driver
                    logger.exception("%s: unexpected", self.name)
                    self._failed(error)
                finally:
                    _close(driver, self.name)
                if self._retired:
                    break
                if self._setbacks > 1:
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
        except BaseException as error:  # a panic in a Rust library is no Exception
            logger.warning("%s did not load: %s", self.name, error)
            self._failed(error)
            return None
        logger.info("%s loaded in %.1f s", self.name, self._clock() - started)
        self.description = driver.description
        self._last_busy = self._proved_at = self._clock()
        return driver

    def _failed(self, error: BaseException) -> None:
        if isinstance(error, DriverLost):
            self._losses += 1
        else:
            self.failures += 1
        is_said = isinstance(error, EmbedpoolError | DriverBroken)
        self.last_error = str(error) if is_said else f"{type(error).__name__}: {error}"
        self._longest_backoff_s = next(
            (s for kind, s in BACKOFF_LONGEST_AFTER_S if isinstance(error, kind)), BACKOFF_LONGEST_S
        )
        self.retry_at = self._clock() + self._backoff_s()
        self._become("failed")

    def _serve(self, driver: Driver) -> None:
        self._driver = driver
        try:
            self._become("ready")
            driver.watch(self._owner.queue.wake)
            self.adjust()
            self._loop(driver, 1)
        finally:
            self._leave_loops()
            with self._lock:
                self._driver, siblings, self._siblings = None, self._siblings, []
            for thread in siblings:
                thread.join()

    def adjust(self) -> None:
        """Follow the spec as it is now: the driver's own settings, and how many batches run at once."""
        with self._lock:
            driver = self._driver
            if driver is None:
                return
            driver.configure(self._owner.driver_config)
            self._siblings = [t for t in self._siblings if t.is_alive()]
            for number in range(len(self._siblings) + 2, self._owner.inflight(driver) + 1):
                thread = threading.Thread(
                    target=self._loop, args=(driver, number), name=f"{self.name}/{number}", daemon=True
                )
                self._siblings.append(thread)
                thread.start()

    def _loop(self, driver: Driver, number: int) -> None:
        """One worker's life. Only the lead, number 1, asks to retire; the others leave when fewer are wanted."""
        lead = number == 1
        while not self._leave.is_set() and (lead or number <= self._owner.inflight(driver)):
            worker = self._owner.make_worker(self.name, driver)  # anew: the spec may have changed its limits
            idle_s = self._owner.idle_timeout_s() if lead else None
            leaving = functools.partial(self._is_stale, driver, idle_s) if lead else self._leave.is_set
            try:
                if driver.lost:
                    raise DriverBroken(driver.lost)
                served = worker.step(self._wait_s(idle_s) if lead else None, on_work=self._begin_work, leaving=leaving)
                if lead and not served:
                    self._probe_if_due(driver)
            except DriverBroken as error:
                self._end_work(served=False)
                self._broke(error)
                continue
            if served:
                self._end_work(served=worker.successes > 0)
            idle = not served and idle_s is not None and self._idle_for(idle_s)
            if lead and ((idle and self._owner.may_retire(self)) or self._owner.is_surplus(self)):
                self._retired = True
                self._leave_loops()

    def _wait_s(self, idle_s: float | None) -> float | None:
        """How long the lead may wait for work before it looks around."""
        waits = []
        for since, whole_s in ((self._last_busy, idle_s), (self._proved_at, self._owner.probe_idle_s)):
            if whole_s is not None:
                left_s = since + whole_s - self._clock()
                waits.append(left_s if left_s > 0 else whole_s)  # it has looked already, and stays
        return min(waits, default=None)

    def _probe_if_due(self, driver: Driver) -> None:
        """What no batch has proved for a while a text does. Raises DriverBroken."""
        probe_s = self._owner.probe_idle_s
        with self._lock:
            if probe_s is None or self._running or self._clock() - self._proved_at < probe_s:
                return
            self._running[threading.get_ident()] = self._clock()
        try:
            driver.probe()
        except BaseException as error:
            raise DriverBroken(f"{type(error).__name__}: {error}") from error
        finally:
            with self._lock:
                self._running.pop(threading.get_ident(), None)
                self._proved_at = self._clock()

    def _broke(self, error: DriverBroken) -> None:
        """The first of its threads to say so is enough."""
        with self._lock:
            if self._leave.is_set():
                return
            self._leave.set()
        logger.warning("%s is broken and is opened anew: %s", self.name, error)
        self._failed(error)
        self._leave_loops()

    def _is_stale(self, driver: Driver, idle_s: float | None) -> bool:
        """Whether the lead must look around instead of waiting for work: to leave, or for another idle time."""
        return self._leave.is_set() or driver.lost is not None or self._owner.idle_timeout_s() != idle_s

    def _leave_loops(self) -> None:
        self._leave.set()
        self._owner.queue.wake()

    def _begin_work(self) -> None:
        with self._lock:
            self._running[threading.get_ident()] = self._clock()
        self._owner.grow()

    def _end_work(self, *, served: bool) -> None:
        with self._lock:
            self._running.pop(threading.get_ident(), None)
            self._last_busy = self._clock()
            if served:
                self._proved_at = self._clock()
                self.failures = self._losses = 0

    def _idle_for(self, idle_s: float) -> bool:
        with self._lock:
            return not self._running and self._clock() - self._last_busy >= idle_s

    def _become(self, state: str) -> None:
        self.state = state
        self._owner.replica_changed(self)

    @property
    def _setbacks(self) -> int:
        """What there is to wait for: failures, and losses beyond those that it takes to find one culprit."""
        return self.failures + max(self._losses - LOSSES_TO_FIND_A_TEXT, 0)

    def _backoff_s(self) -> float:
        if not self._setbacks:
            return 0.0
        return float(min(BACKOFF_FIRST_S * 2 ** min(self._setbacks - 1, 10), self._longest_backoff_s))


def _close(driver: Driver, name: str) -> None:
    try:
        driver.close()
    except Exception:
        logger.exception("%s: the driver did not close cleanly", name)
