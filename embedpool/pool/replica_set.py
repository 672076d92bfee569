"""The replicas of one model: their number, the threads that run them, and the state that follows from theirs."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from embedpool.config.spec import ModelSpec
from embedpool.errors import ModelFailed
from embedpool.pool.backoff import Backoff
from embedpool.pool.cache import Cache, ModelCache
from embedpool.pool.model_queue import ModelQueue
from embedpool.pool.planner import Planner, Slots
from embedpool.pool.quarantine import Quarantine
from embedpool.pool.replica import Replica
from embedpool.pool.runner import Runner
from embedpool.pool.settings import PoolSettings
from embedpool.pool.stats import ModelStats
from embedpool.tasks.driver import Progress

logger = logging.getLogger(__name__)

FAILURES_BEFORE_FAILED = 3
SHORTEST_IDLE_S = 0.02
CLOSE_TIMEOUT_S = 5.0  # for a running batch and the driver's close


@dataclasses.dataclass(eq=False)
class ReplicaSet:
    """Grows while work waits, shrinks when idle.

    `before_load` is called before each load. `on_ready` is called each time a replica has become ready, `on_failed`
    with the reason each time all have failed. All three are called on a replica's thread.
    """

    spec: ModelSpec
    settings: PoolSettings
    queue: ModelQueue
    stats: ModelStats
    cache: ModelCache = dataclasses.field(default_factory=lambda: ModelCache(Cache()))
    before_load: Callable[[], object] = lambda: None
    on_ready: Callable[[], None] = lambda: None
    on_failed: Callable[[str], None] = lambda reason: None

    def __post_init__(self) -> None:
        self.last_error: str | None = None
        self._last_error_at = 0.0
        self.progress: Progress | None = None  # of what is being opened, as it was reported last
        self.space = ""  # whose numbers all rows are; empty before the first load
        self.widths: Mapping[str, int | None] = {}  # numbers of a vector by task; empty before the first load
        self.loads_first = False  # the first load, at start or to prove itself: requests do not wait for it
        self.settled = threading.Event()  # the first load succeeded or failed
        self.stopped = False
        # Guards how many replicas there are and which threads they have. It may be taken while no other lock is held,
        # and inside it the queue's lock and a replica's, for a moment each. Callbacks are called outside of it.
        self._lock = threading.RLock()
        self._replicas: tuple[Replica, ...] = ()
        self._retiring: set[Replica] = set()
        self._number = 0
        self._memory: dict[str, Any] = {}
        self._quarantine = Quarantine(self.settings.clock)
        self._slots = Slots(self.settings.clock)
        self._backoff = Backoff()  # of loads on demand, whose replicas are gone when they have failed
        self._retry_at = 0.0  # on the clock: before, no load on demand is tried again

    def __len__(self) -> int:
        return len(self._replicas)

    # --- what their states add up to

    @property
    def state(self) -> str:
        """idle, loading, ready or failed."""
        replicas = self._replicas
        if any(r.state == "ready" for r in replicas):
            return "failed" if self._stuck_s(replicas) else "ready"
        if not replicas:
            return "failed" if self.settings.clock() < self._retry_at else "idle"
        limit = 1 if self.loads_first else FAILURES_BEFORE_FAILED
        return "failed" if all(r.backoff.failures >= limit for r in replicas) else "loading"

    def _stuck_s(self, replicas: Sequence[Replica]) -> float:
        """How long every ready one has been stuck: in batches that have outlived any request. Else 0.

        Its threads cannot be stopped, but nobody need wait for them; when they come back the model is ready again.
        """
        stuck = [r.stuck_s(self.settings.request_timeout_s) for r in replicas if r.state == "ready"]
        return min(stuck, default=0.0)

    @property
    def trouble(self) -> str | None:
        """What is wrong, if something is: that it is stuck, else the last error."""
        if stuck_s := self._stuck_s(self._replicas):
            return f"it is stuck: its batches have been running for {stuck_s:.0f} s"
        return self.last_error

    @property
    def last_error_age_s(self) -> float | None:
        """How long ago the last error was; None without one."""
        return None if self.last_error is None else self.settings.clock() - self._last_error_at

    @property
    def retry_after_s(self) -> float:
        """How long until the next attempt of a failed model, and a second at least."""
        return max(min((r.retry_at for r in self._replicas), default=self._retry_at) - self.settings.clock(), 1.0)

    @property
    def rest_s(self) -> float:
        """Seconds until a remote service takes a batch again; 0 unless it has asked for a pause."""
        places = [runner.place for r in self._replicas if r.state == "ready" and (runner := r.runner)]
        return min((place.rest_s() if place.facts.paces else 0.0 for place in places), default=0.0)

    def counts(self) -> dict[str, object]:
        """How many there are, idle and busy, and what an open one says of itself, for /status."""
        replicas = self._replicas
        busy = sum(bool(r.running) for r in replicas)
        ready = sum(r.state == "ready" for r in replicas)
        return {
            "replicas": len(replicas),
            "replicas_idle": max(ready - busy, 0),
            "replicas_busy": busy,
            "replicas_stuck": sum(self._stuck_s([r]) > 0 for r in replicas),
            "rest_s": round(self.rest_s, 1),
            "progress": None if (progress := self.progress) is None else progress._asdict(),
            "space": self.space,
            "runs_on": next((dict(r.description) for r in replicas if r.description), {}),
            "replicas_on": [r.where() for r in replicas],
        }

    def report(self, progress: Progress | None) -> None:
        """How far something is that is being opened; None when it is open. On any thread."""
        self.progress = progress

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
                self._quarantine.clear()  # a higher limit may let them pass
            self.spec = spec
        for _ in range(spec.scaling.min):
            self._add_if(lambda: len(self) < spec.scaling.min)
        for replica in self._replicas:
            self._adjust(replica)
        self.queue.wake()  # idle times may have changed

    def failed_without_one(self, error: BaseException, says: str | None) -> None:
        """A load on demand has failed, or what must precede it."""
        with self._lock:
            self.last_error, self._last_error_at = says, self.settings.clock()
            self._backoff.failed(error)
            self._retry_at = self.settings.clock() + self._backoff.pause_s

    def need_one(self) -> None:
        """Work was put into the queue. Under the lock of `_retires`, so that no work is left without a replica."""
        self._add_if(lambda: not self._replicas)

    def _grow(self) -> None:
        """One more if work waits behind what was just taken and all are at work."""
        if self.queue.qsize() and self._may_grow():
            with contextlib.suppress(RuntimeError):  # no thread to be had: the ones there are go on
                self._add_if(self._may_grow)

    def _may_grow(self) -> bool:
        replicas = self._replicas
        return len(replicas) < self.spec.scaling.max and all(r.state == "ready" and r.running for r in replicas)

    def _add_if(self, is_wanted: Callable[[], bool]) -> None:
        with self._lock:
            if self.stopped or not self.spec.enabled or not is_wanted():
                return
            self._number += 1
            name = f"{self.spec.model}#{self._number}"
            replica = Replica(name, self._open, self._slots, self.settings, self._replica_changed)
            before, self._replicas = self._replicas, (*self._replicas, replica)
            try:
                self._start_thread(replica, self._live, name)
            except RuntimeError:  # the system has no thread to give
                self._replicas = before
                raise

    def _retires(self, replica: Replica, *, is_idle: bool) -> bool:
        """Whether it leaves, since there are too many or an idle one is not needed; then it is removed already."""
        with self._lock:
            scaling = self.spec.scaling
            needed = max(scaling.min, 1 if self.loads_first else 0)
            is_surplus = len(self) > scaling.max
            if not is_surplus and not (is_idle and len(self) > needed and not self.queue.qsize()):
                return False
            self._replicas = tuple(r for r in self._replicas if r is not replica)
            self._retiring.add(replica)
            return True

    def stop(self, timeout_s: float) -> None:
        """End every replica, also those that retire already."""
        with self._lock:
            self.stopped = True
            ending = [*self._replicas, *self._retiring]
        self.settled.set()  # nobody waits for a load that will not be
        for replica in ending:
            replica.stopping.set()
            replica.leaving.set()
        self.queue.wake()
        deadline = time.monotonic() + max(timeout_s, CLOSE_TIMEOUT_S)
        for replica in ending:
            for lead in replica.threads[:1]:
                lead.join(max(deadline - time.monotonic(), 0))
                if lead.is_alive():
                    logger.error("%s did not stop; its batch hangs", replica.name)

    # --- the threads of a replica

    def _start_thread(self, replica: Replica, run: Callable[..., object], name: str, *arguments: int) -> None:
        """Called with the lock held, so that a stop sees the thread, and no replica, without the other."""
        thread = threading.Thread(target=run, args=(replica, *arguments), name=name, daemon=True)
        replica.threads.append(thread)  # before it can run: who is stuck is told by how many there are
        try:
            thread.start()
        except RuntimeError:  # the system has no thread to give
            replica.threads.remove(thread)
            raise

    def _live(self, replica: Replica) -> None:
        """The life of a lead: open, serve, close, and again until the replica retires or is stopped."""
        try:
            retired = False
            while not (retired or replica.stopping.is_set()):
                if not replica.open():
                    retired = self._retires(replica, is_idle=True)
                    if retired and not self.stopped and replica.failure:
                        self.failed_without_one(replica.failure, replica.last_error)
                    retired = retired or replica.stopping.wait(replica.pause_s)
                    continue
                try:
                    retired = self._serve(replica)
                except Exception as error:  # a fault of ours, or no thread to be had: as a broken driver
                    logger.exception("%s: unexpected", replica.name)
                    replica.fail(error)
                finally:
                    replica.close()
                if replica.backoff.setbacks > 1 and not retired:
                    replica.stopping.wait(replica.backoff.pause_s)
        finally:
            replica.become("closed")

    def _serve(self, replica: Replica) -> bool:
        """Step an open replica, with a further thread for each slot, until it leaves; whether it retires.

        The lead returns after its siblings have ended, and only then closes the driver.
        """
        assert replica.runner is not None
        try:
            replica.become("ready")
            replica.runner.place.watch(self.queue.wake)
            self._adjust(replica)
            return self._loop(replica, 1)
        finally:
            replica.leaving.set()
            self.queue.wake()
            with self._lock:
                siblings = replica.threads[1:]
                del replica.threads[1:]
            for thread in siblings:
                thread.join()

    def _loop(self, replica: Replica, number: int) -> bool:
        """One thread's batches. Only the lead, number 1, retires; the others leave when fewer are wanted.

        The lead looks around instead of waiting for work when it is to leave, and when its idle time has changed.
        """
        while not replica.leaving.is_set() and (number == 1 or number <= self._inflight(replica)):
            if number > 1:
                replica.step(None, on_work=self._grow, leaving=replica.leaving.is_set)
                continue
            idle_s, probe_s = self._idle_timeout_s(), self.settings.probe_idle_s

            def must_look(idle_s: float | None = idle_s) -> bool:
                return replica.is_leaving_or_lost or self._idle_timeout_s() != idle_s

            waits_s = replica.wait_s(idle_s, probe_s)
            had_work = replica.step(waits_s, on_work=self._grow, leaving=must_look, probe_s=probe_s)
            is_idle = not had_work and replica.is_idle_for(idle_s)
            if not replica.leaving.is_set() and self._retires(replica, is_idle=is_idle):
                return True
        return False

    def _idle_timeout_s(self) -> float | None:
        """When an idle replica should ask to retire; None: it stays."""
        scaling = self.spec.scaling
        return max(scaling.idle_ttl_s, SHORTEST_IDLE_S) if len(self) > scaling.min else None

    # --- what they are made of

    def _open(self, name: str) -> Runner:
        """An open place, and what serves the queue with it. On the lead thread."""
        self.before_load()
        try:
            place = self.settings.open_place(self.spec, self._memory, self.report)
        finally:
            self.report(None)
        with self._lock:
            self.space = self.space or place.facts.space
        if self.space != place.facts.space:
            place.close()
            says = "its files have changed since it was loaded first; to serve them as they are, switch it off and on"
            raise ModelFailed(says)
        self.widths = place.facts.tasks
        self.cache.opened(place.facts)
        keep = functools.partial(self.cache.keep, place.facts)
        return Runner(name, place, self.queue, self._quarantine, self.stats, self.settings.clock, keep)

    def _adjust(self, replica: Replica) -> None:
        """Make an open replica follow the spec as it is now: its driver's settings, its planner, its threads."""
        with self._lock:
            runner = replica.runner
            if runner is None or replica.leaving.is_set():
                return
            config, settings = self.spec.driver.config, self.settings
            runner.place.configure(config)
            most = config.max_batch_texts or settings.max_batch_texts
            facts = runner.place.facts
            replica.planner = Planner(
                most, settings.max_batch_tokens, settings.max_batch_s, facts.cost, facts.pads, config.max_batch_chars
            )
            replica.threads[1:] = [thread for thread in replica.threads[1:] if thread.is_alive()]
            for number in range(len(replica.threads) + 1, self._inflight(replica) + 1):
                self._start_thread(replica, self._loop, f"{replica.name}/{number}", number)
            self._count_slots()

    def _inflight(self, replica: Replica) -> int:
        """Batches at once in a replica; 0 while it is not open."""
        runner = replica.runner
        return self.spec.queue.max_inflight_per_replica or runner.place.facts.slots if runner else 0

    def _count_slots(self) -> None:
        """Only slots of ready replicas come free, so only these count."""
        with self._lock:
            self._slots.count = max(sum(self._inflight(r) for r in self._replicas if r.state == "ready"), 1)

    def _replica_changed(self, replica: Replica) -> None:
        """On the replica's own threads."""
        self._count_slots()
        if replica.state == "ready":
            self._backoff, self._retry_at = Backoff(), 0.0
            self.loads_first = False
            self.settled.set()
            self.on_ready()
        elif replica.state == "failed":
            self.queue.wake()  # its other threads are to leave
            self.last_error, self._last_error_at = replica.last_error, self.settings.clock()
            with self._lock:
                failed = self.state == "failed"
            if failed:
                self.on_failed(replica.last_error or "")
                self.settled.set()
        else:
            self._retiring.discard(replica)
