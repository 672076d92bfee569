"""One placed driver, step by step: it is opened, serves batches, breaks or is lost, is closed, and is opened anew.

The threads that take these steps are its set's (replica_set.py): a lead, which opens and closes, and one more for each
further slot.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections.abc import Callable, Mapping

from embedpool.errors import EmbedpoolError, UpstreamError, for_the_log
from embedpool.pool.backoff import Backoff
from embedpool.pool.planner import Planner, Slots
from embedpool.pool.runner import DriverBroken, DriverLost, Runner
from embedpool.pool.settings import PoolSettings

logger = logging.getLogger(__name__)

LONGEST_ASKED_S = 3600.0  # of a service that asks for a pause when it is opened
WHERE = ("pid", "node_ip", "node", "resources")  # of a place's description: what differs from replica to replica
REST_LOOK_S = 0.25  # whether to go on letting a remote service rest


@dataclasses.dataclass(eq=False)
class Replica:
    """States: loading, ready, failed, closed; `on_change` is called after each change, on the thread that made it.

    `open_runner` opens a place and gives what runs batches in it.
    """

    name: str
    open_runner: Callable[[str], Runner]
    slots: Slots
    settings: PoolSettings
    on_change: Callable[[Replica], None] = lambda replica: None

    def __post_init__(self) -> None:
        self.state = "loading"
        self.backoff = Backoff()
        self.last_error: str | None = None
        self.failure: BaseException | None = None  # the last
        self.retry_at = 0.0  # on the clock, while failed
        self.description: Mapping[str, object] = {}
        self.runner: Runner | None = None  # while it is open
        self.planner: Planner  # set before it steps, and anew when the model's spec changes
        self.stopping = threading.Event()  # it is to end
        self.leaving = threading.Event()  # its threads are to leave the driver: it is broken, retires or stops
        self.threads: list[threading.Thread] = []  # the lead, then its siblings
        self.running: dict[int, float] = {}  # the threads in which a batch runs, since when
        self._clock = self.settings.clock
        self._last_busy = self._proved_at = self._clock()
        # Guards what its threads write about their work. Held for a few instructions, with no other lock inside.
        self._lock = threading.Lock()

    @property
    def is_leaving_or_lost(self) -> bool:
        """Whether its threads are to leave the driver, or will have to."""
        return self.leaving.is_set() or (self.runner is not None and self.runner.place.lost is not None)

    def where(self) -> dict[str, object]:
        """Its name, its state and, while it is open, what its place says of where it runs."""
        description = self.description if self.runner else {}
        return {"replica": self.name, "state": self.state} | {k: description[k] for k in WHERE if k in description}

    def stuck_s(self, longest_s: float) -> float:
        """How long it has been stuck: every thread of it in a batch of more than `longest_s` seconds. Else 0."""
        with self._lock:
            alive = sum(thread.is_alive() for thread in self.threads)
            if self.state != "ready" or len(self.running) < max(alive, 1):
                return 0.0
            shortest_s = self._clock() - max(self.running.values())
        return shortest_s if shortest_s > longest_s else 0.0

    # --- steps of its life, on the lead thread

    def open(self) -> bool:
        """Open the driver; whether that succeeded. The set then says that it is ready."""
        self.leaving.clear()
        if self.stopping.is_set():
            return False
        started = self._clock()
        try:
            self.runner = self.open_runner(self.name)
        except BaseException as error:  # a panic in a Rust library is no Exception
            logger.warning("%s did not load: %s", self.name, for_the_log(error))
            self.fail(error)
            return False
        self._last_busy = self._proved_at = self._clock()
        logger.info("%s loaded in %.1f s", self.name, self._clock() - started)
        self.description = self.runner.place.facts.description
        return True

    def close(self) -> None:
        """Give the driver back; no thread steps any more."""
        runner, self.runner = self.runner, None
        try:
            if runner is not None:
                runner.place.close()
        except Exception:
            logger.exception("%s: the driver did not close cleanly", self.name)

    def fail(self, error: BaseException) -> None:
        """It cannot serve, and is to be opened anew at `retry_at`."""
        self.backoff.failed(error)
        is_said = isinstance(error, EmbedpoolError | DriverBroken)
        self.last_error = str(error) if is_said else f"{type(error).__name__}: {error}"
        asked_s = min(error.retry_after_s or 0.0, LONGEST_ASKED_S) if isinstance(error, UpstreamError) else 0.0
        self.failure = error
        self.retry_at = self._clock() + max(self.backoff.pause_s, asked_s)
        self.become("failed")

    @property
    def pause_s(self) -> float:
        """Seconds until it is to be opened again."""
        return max(self.retry_at - self._clock(), 0.0)

    def become(self, state: str) -> None:
        """Change the state, and say so."""
        self.state = state
        self.on_change(self)

    # --- a step of any of its threads

    def step(
        self,
        timeout_s: float | None,
        *,
        on_work: Callable[[], None] = lambda: None,
        leaving: Callable[[], bool] = lambda: False,
        probe_s: float | None = None,
    ) -> bool:
        """Serve one batch of waiting items; without work probe the driver if nothing has proved it for `probe_s`.

        Whether there was work within `timeout_s`, before the thread was `leaving`; `on_work` is called before it is
        run. When the driver turns out to be broken all threads are told to leave it.
        """
        runner = self.runner
        assert runner is not None
        served = False
        try:
            place = runner.place
            if place.lost:
                raise DriverLost(place.lost.reason)
            paces = place.facts.paces
            if paces and not place.takes_a_batch(REST_LOOK_S if timeout_s is None else min(timeout_s, REST_LOOK_S)):
                return False
            items = runner.queue.take(
                lambda window: self.planner.plan_under_lock(window, self.slots),  # as it is when the wait is over
                timeout_s,
                enough=self.planner.max_items,
                max_wait_s=self.settings.max_wait_s,
                leaving=lambda: leaving() or (paces and not place.takes_a_batch()),
            )
            if not items:
                self._probe_if_due(runner, probe_s)
                return False
            with self._lock:
                self.running[threading.get_ident()] = self._clock()
            served = runner.run(items, on_work)
        except DriverBroken as error:
            self._broke(error)
        finally:
            self.slots.end()
            with self._lock:
                if self.running.pop(threading.get_ident(), None) is not None:
                    self._last_busy = self._clock()
                if served:
                    self._proved_at = self._clock()
                    self.backoff.served()
        return True

    def _broke(self, error: DriverBroken) -> None:
        """The first of its threads to say so is enough."""
        with self._lock:
            if self.leaving.is_set():
                return
            self.leaving.set()
        logger.warning("%s is broken and is opened anew: %s", self.name, error)
        self.fail(error)

    def wait_s(self, idle_s: float | None, probe_s: float | None) -> float | None:
        """How long the lead may wait for work before it looks whether to retire or to probe."""
        waits = []
        for since, whole_s in ((self._last_busy, idle_s), (self._proved_at, probe_s)):
            if whole_s is not None:
                left_s = since + whole_s - self._clock()
                waits.append(left_s if left_s > 0 else whole_s)  # it has looked already, and stays
        return min(waits, default=None)

    def is_idle_for(self, idle_s: float | None) -> bool:
        """Whether no batch has run for so long; never for None."""
        with self._lock:
            return idle_s is not None and not self.running and self._clock() - self._last_busy >= idle_s

    def _probe_if_due(self, runner: Runner, probe_s: float | None) -> None:
        """Raises DriverBroken."""
        with self._lock:
            if probe_s is None or self.running or self._clock() - self._proved_at < probe_s:
                return
            self.running[threading.get_ident()] = self._clock()
        try:
            runner.place.probe()
        except BaseException as error:
            raise DriverBroken(f"{type(error).__name__}: {for_the_log(error)}") from error
        finally:
            with self._lock:
                del self.running[threading.get_ident()]
                self._proved_at = self._clock()
