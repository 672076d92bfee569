"""The replicas of one model: how many there are, what they are opened with, and what their states add up to."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from embedpool.config.spec import ModelSpec
from embedpool.errors import DeadlineExceeded
from embedpool.pool.batcher import Batcher
from embedpool.pool.culprits import Culprits
from embedpool.pool.lanes import Lanes
from embedpool.pool.model_queue import ModelQueue
from embedpool.pool.replica import Replica
from embedpool.pool.stats import ModelStats, Observer
from embedpool.pool.worker import Worker

if TYPE_CHECKING:
    from embedpool.drivers.base import Driver, Meter

logger = logging.getLogger(__name__)

FAILURES_BEFORE_FAILED = 3
SHORTEST_IDLE_S = 0.02
CLOSE_TIMEOUT_S = 5.0  # for a running batch and the driver's close


@dataclasses.dataclass(frozen=True)
class Engine:
    """What every model of a pool shares."""

    open_driver: Callable[[ModelSpec, dict[str, Any]], Driver]  # with what the drivers of a served model remember
    open_meter: Callable[[ModelSpec], Meter]
    request_timeout_s: float = 120.0
    max_queue_per_model: int = 1000
    max_batch_texts: int = 64
    max_batch_tokens: int = 16384
    max_batch_s: float | None = None
    max_wait_s: float = 0.0
    probe_idle_s: float | None = None
    clock: Callable[[], float] = time.monotonic
    observer: Observer = Observer()


class ReplicaSet:
    """Grows while work waits, shrinks when idle; the Owner of its replicas.

    `on_ready` is called each time a replica has become ready, `on_failed` with the reason each time all have failed;
    both on a replica's thread.
    """

    def __init__(
        self,
        spec: ModelSpec,
        engine: Engine,
        queue: ModelQueue,
        stats: ModelStats,
        *,
        on_ready: Callable[[], None],
        on_failed: Callable[[str], None],
    ) -> None:
        self.spec = spec
        self.queue = queue
        self.last_error: str | None = None
        self.loads_first = False  # the first load, at start or to prove itself: requests do not wait for it
        self.settled = threading.Event()  # the first load succeeded or failed
        self._engine = engine
        self._stats = stats
        self._on_ready = on_ready
        self._on_failed = on_failed
        self._lock = threading.RLock()
        self._replicas: tuple[Replica, ...] = ()
        self._retiring: set[Replica] = set()
        self._number = 0
        self._memory: dict[str, Any] = {}
        self._culprits = Culprits(engine.clock)
        self._lanes = Lanes(engine.clock)
        self._meter: Meter | None = None
        self._meter_lock = threading.Lock()  # its own: opening may take as long as a download
        self.stopped = False

    def __len__(self) -> int:
        return len(self._replicas)

    @property
    def state(self) -> str:
        """idle, loading, ready or failed."""
        replicas = self._replicas
        if any(r.state == "ready" for r in replicas):
            return "failed" if self.stuck_s else "ready"
        if not replicas:
            return "idle"
        limit = 1 if self.loads_first else FAILURES_BEFORE_FAILED
        return "failed" if all(r.failures >= limit for r in replicas) else "loading"

    @property
    def stuck_s(self) -> float:
        """How long every ready replica has been stuck: in batches that have outlived any request. Else 0.

        Its threads cannot be stopped, but nobody need wait for them; when they come back the model is ready again.
        """
        stuck = [r.stuck_s(self._engine.request_timeout_s) for r in self._replicas if r.state == "ready"]
        return min(stuck, default=0.0)

    @property
    def trouble(self) -> str | None:
        """What is wrong, if something is: that it is stuck, else the last error."""
        if stuck_s := self.stuck_s:
            return f"it is stuck: its batches have been running for {stuck_s:.0f} s"
        return self.last_error

    @property
    def retry_at(self) -> float:
        """When the next attempt of a failed model is, on the clock."""
        return min((r.retry_at for r in self._replicas), default=0.0)

    def meter(self, timeout_s: float = -1) -> Meter:
        """The model's meter, opened on first use. Raises DeadlineExceeded if another thread opens it for too long."""
        if self._meter is None:
            if not self._meter_lock.acquire(timeout=timeout_s):
                raise DeadlineExceeded("the deadline passed while the model's tokenizer was being opened")
            try:
                self._meter = self._meter or self._engine.open_meter(self.spec)
            finally:
                self._meter_lock.release()
        return self._meter

    # --- how many

    def start(self, wanted: int) -> None:
        """Begin the first load with so many replicas; 0 is idle."""
        self.loads_first = wanted > 0
        if not wanted:
            self.settled.set()
        with self._lock:  # the first to fail must not be taken for all
            for _ in range(wanted):
                self._add_if(lambda: len(self) < wanted)

    def update(self, spec: ModelSpec) -> None:
        """Follow a spec of the same `load_key`."""
        with self._lock:
            if spec.driver.config != self.spec.driver.config:
                self._culprits.clear()  # a higher limit may let them pass
            self.spec = spec
        for _ in range(spec.scaling.min):
            self._add_if(lambda: len(self) < spec.scaling.min)
        for replica in self._replicas:
            replica.adjust()
        self.queue.wake()  # idle times may have changed

    def need_one(self) -> None:
        """Work was put into the queue. Under the lock of `may_retire`, so that no work is left without a replica."""
        self._add_if(lambda: not self._replicas)

    def _add_if(self, wanted: Callable[[], bool]) -> None:
        with self._lock:
            if self.stopped or not self.spec.enabled or not wanted():
                return
            self._number += 1
            replica = Replica(f"{self.spec.model}#{self._number}", self, self._engine.clock)
            before, self._replicas = self._replicas, (*self._replicas, replica)
            try:
                replica.start()
            except RuntimeError:  # the system has no thread to give
                self._replicas = before
                raise

    def stop(self, timeout_s: float) -> None:
        """End every replica, also those that retire already."""
        with self._lock:
            self.stopped = True
            leaving = [*self._replicas, *self._retiring]
        self.settled.set()  # nobody waits for a load that will not be
        for replica in leaving:
            replica.stop()
        deadline = time.monotonic() + max(timeout_s, CLOSE_TIMEOUT_S)
        for replica in leaving:
            if not replica.join(max(deadline - time.monotonic(), 0)):
                logger.error("%s did not stop; its batch hangs", replica.name)

    def counts(self) -> dict[str, object]:
        """How many there are, idle and busy, and what they run on, for /status."""
        replicas = self._replicas
        busy = sum(r.busy for r in replicas)
        ready = sum(r.state == "ready" for r in replicas)
        return {
            "replicas": len(replicas),
            "replicas_idle": max(ready - busy, 0),
            "replicas_busy": busy,
            "replicas_stuck": sum(r.stuck_s(self._engine.request_timeout_s) > 0 for r in replicas),
            "runs_on": next((dict(r.description) for r in replicas if r.description), {}),
        }

    # --- what replicas ask and tell, see Owner; called on their threads

    def grow(self) -> None:
        """One more if work waits behind what was just taken and all are at work."""
        if self.queue.qsize() and len(self) < self.spec.scaling.max:
            with contextlib.suppress(RuntimeError):  # no thread to be had: the ones there are go on
                self._add_if(self._may_grow)

    def _may_grow(self) -> bool:
        at_work = all(r.state == "ready" and r.busy for r in self._replicas)
        return len(self) < self.spec.scaling.max and at_work

    def idle_timeout_s(self) -> float | None:
        """See Owner."""
        scaling = self.spec.scaling
        return max(scaling.idle_ttl_s, SHORTEST_IDLE_S) if len(self) > scaling.min else None

    @property
    def probe_idle_s(self) -> float | None:
        """See Owner."""
        return self._engine.probe_idle_s

    def may_retire(self, replica: Replica) -> bool:
        """See Owner."""
        with self._lock:
            needed = max(self.spec.scaling.min, 1 if self.loads_first else 0)
            if len(self) <= needed or self.queue.qsize():
                return False
            self._replicas = tuple(r for r in self._replicas if r is not replica)
            self._retiring.add(replica)
            return True

    def is_surplus(self, replica: Replica) -> bool:
        """See Owner."""
        with self._lock:
            if len(self) <= self.spec.scaling.max:
                return False
            self._replicas = tuple(r for r in self._replicas if r is not replica)
            self._retiring.add(replica)
            return True

    def open_driver(self) -> Driver:
        """See Owner."""
        self.meter()  # so that the first request does not pay for it
        return self._engine.open_driver(self.spec, self._memory)

    @property
    def driver_config(self) -> object:
        """See Owner."""
        return self.spec.driver.config

    def make_worker(self, name: str, driver: Driver) -> Worker:
        """See Owner."""
        engine = self._engine
        ready = sum(replica.state == "ready" for replica in self._replicas)  # others have no lanes that come free
        batcher = Batcher(
            driver.max_batch_texts or engine.max_batch_texts,
            engine.max_batch_tokens,
            max_s=engine.max_batch_s,
            cost=driver.cost,
            lanes=self.inflight(driver) * max(ready, 1),
        )
        return Worker(
            name,
            driver,
            self.queue,
            batcher,
            self._stats,
            culprits=self._culprits,
            lanes=self._lanes,
            max_wait_s=engine.max_wait_s,
            clock=engine.clock,
        )

    def inflight(self, driver: Driver) -> int:
        """See Owner."""
        return self.spec.queue.max_inflight_per_replica or driver.parallel

    def replica_changed(self, replica: Replica) -> None:
        """See Owner."""
        if replica.state == "ready":
            self.loads_first = False
            self.settled.set()
            self._on_ready()
        elif replica.state == "failed":
            self.last_error = replica.last_error
            with self._lock:
                failed = self.state == "failed"
            if failed:
                self._on_failed(replica.last_error or "")
                self.settled.set()
        else:
            self._retiring.discard(replica)
