"""One placed driver, step by step: it is opened, serves batches, breaks or is lost, is closed, and is opened anew.

The threads that take these steps are its set's (replica_set.py): a lead, which opens and closes, and one more for each
further slot.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping

from embedpool.errors import EmbedpoolError, UpstreamError
from embedpool.pool.runner import DriverBroken, DriverLost, Runner

logger = logging.getLogger(__name__)

BACKOFF_FIRST_S = 0.5
BACKOFF_LONGEST_S = 60.0
LOSSES_TO_FIND_AN_ITEM = 8  # halving a batch of 64, and the item alone
BACKOFF_LONGEST_AFTER_S = ((DriverBroken, 1.0), (UpstreamError, 5.0))  # it does load, so trying again costs little


class Replica:
    """States: loading, ready, failed, closed; `on_change` is called after each change, on the thread that made it."""

    def __init__(
        self,
        name: str,
        open_runner: Callable[[str], Runner],
        on_change: Callable[[Replica], None] = lambda replica: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name = name
        self.state = "loading"
        self.failures = 0  # in a row, without a served batch between
        self.last_error: str | None = None
        self.retry_at = 0.0  # on the clock, while failed
        self.description: Mapping[str, object] = {}
        self.runner: Runner | None = None  # while it is open
        self.stopping = threading.Event()  # it is to end
        self.threads: list[threading.Thread] = []  # the lead, then its siblings
        self._open_runner = open_runner
        self._on_change = on_change
        self._clock = clock
        self._losses = 0  # in a row, likewise, of places that a batch has ended
        self._longest_backoff_s = BACKOFF_LONGEST_S
        self._leave = threading.Event()  # its threads are to leave the driver: it is broken, retires or stops
        # Guards what its threads write about their work. Held for a few instructions, with no other lock inside.
        self._lock = threading.Lock()
        self._running: dict[int, float] = {}  # the threads in which a batch runs, since when
        self._last_busy = self._proved_at = clock()

    # --- seen from any thread

    @property
    def is_busy(self) -> bool:
        """Whether a batch runs."""
        return bool(self._running)

    @property
    def is_leaving(self) -> bool:
        """Whether its threads are to leave the driver."""
        return self._leave.is_set()

    @property
    def is_lost(self) -> bool:
        """Whether its place is."""
        return self.runner is not None and self.runner.place.lost is not None

    def stuck_s(self, longest_s: float) -> float:
        """How long it has been stuck: every thread of it in a batch of more than `longest_s` seconds. Else 0."""
        with self._lock:
            alive = sum(thread.is_alive() for thread in self.threads)
            if self.state != "ready" or len(self._running) < max(alive, 1):
                return 0.0
            shortest_s = self._clock() - max(self._running.values())
        return shortest_s if shortest_s > longest_s else 0.0

    def stop(self) -> None:
        """Let it end after the running batches. The queue must be woken after this, as after `leave`."""
        self.stopping.set()
        self._leave.set()

    def leave(self) -> None:
        """Let its threads leave the driver."""
        self._leave.set()

    # --- steps of its life, on the lead thread

    def open(self) -> bool:
        """Open the driver; whether that succeeded."""
        self._leave.clear()
        if self.stopping.is_set():
            return False
        started = self._clock()
        try:
            runner = self._open_runner(self.name)
        except BaseException as error:  # a panic in a Rust library is no Exception
            logger.warning("%s did not load: %s", self.name, error)
            self.fail(error)
            return False
        logger.info("%s loaded in %.1f s", self.name, self._clock() - started)
        self.description = runner.place.facts.description
        self._last_busy = self._proved_at = self._clock()
        self.runner = runner
        self.become("ready")
        return True

    def close(self) -> None:
        """Give the driver back; no thread steps any more."""
        runner, self.runner = self.runner, None
        if runner is not None:
            try:
                runner.place.close()
            except Exception:
                logger.exception("%s: the driver did not close cleanly", self.name)

    def fail(self, error: BaseException) -> None:
        """It cannot serve, and is to be opened anew at `retry_at`."""
        if isinstance(error, DriverLost):
            self._losses += 1
        else:
            self.failures += 1
        is_said = isinstance(error, EmbedpoolError | DriverBroken)
        self.last_error = str(error) if is_said else f"{type(error).__name__}: {error}"
        longest = (s for kind, s in BACKOFF_LONGEST_AFTER_S if isinstance(error, kind))
        self._longest_backoff_s = next(longest, BACKOFF_LONGEST_S)
        self.retry_at = self._clock() + self.backoff_s
        self.become("failed")

    def become(self, state: str) -> None:
        """Change the state, and say so."""
        self.state = state
        self._on_change(self)

    @property
    def setbacks(self) -> int:
        """Failures, and losses beyond those that it takes to find one item at fault."""
        return self.failures + max(self._losses - LOSSES_TO_FIND_AN_ITEM, 0)

    @property
    def backoff_s(self) -> float:
        """How long to wait before it is opened again."""
        if not self.setbacks:
            return 0.0
        return float(min(BACKOFF_FIRST_S * 2 ** min(self.setbacks - 1, 10), self._longest_backoff_s))

    # --- a step of any of its threads

    def step(
        self,
        timeout_s: float | None,
        *,
        on_work: Callable[[], None] = lambda: None,
        leaving: Callable[[], bool] = lambda: False,
        probe_s: float | None = None,
    ) -> bool:
        """Serve one batch, see Runner.step; without work probe the driver if nothing has proved it for `probe_s`.

        Whether there was work. When the driver turns out to be broken all threads are told to leave it.
        """
        runner = self.runner
        assert runner is not None

        def begin() -> None:
            with self._lock:
                self._running[threading.get_ident()] = self._clock()
            on_work()

        try:
            if runner.place.lost:
                raise DriverBroken(runner.place.lost.reason)
            succeeded = runner.step(timeout_s, on_work=begin, leaving=leaving)
            if succeeded is None:
                self._probe_if_due(runner, probe_s)
                return False
        except DriverBroken as error:
            self._end_work(served=False)
            self._broke(error)
        else:
            self._end_work(served=succeeded)
        return True

    def wait_s(self, idle_s: float | None, probe_s: float | None) -> float | None:
        """How long the lead may wait for work before it looks whether to retire or to probe."""
        waits = []
        for since, whole_s in ((self._last_busy, idle_s), (self._proved_at, probe_s)):
            if whole_s is not None:
                left_s = since + whole_s - self._clock()
                waits.append(left_s if left_s > 0 else whole_s)  # it has looked already, and stays
        return min(waits, default=None)

    def is_idle_for(self, idle_s: float) -> bool:
        """Whether no batch has run for so long."""
        with self._lock:
            return not self._running and self._clock() - self._last_busy >= idle_s

    def _probe_if_due(self, runner: Runner, probe_s: float | None) -> None:
        """Raises DriverBroken."""
        with self._lock:
            if probe_s is None or self._running or self._clock() - self._proved_at < probe_s:
                return
            self._running[threading.get_ident()] = self._clock()
        try:
            runner.place.probe()
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
        self.fail(error)

    def _end_work(self, *, served: bool) -> None:
        with self._lock:
            self._running.pop(threading.get_ident(), None)
            self._last_busy = self._clock()
            if served:
                self._proved_at = self._clock()
                self.failures = self._losses = 0
