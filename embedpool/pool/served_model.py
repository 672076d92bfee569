"""One model: the door where its texts are measured and split, its queue, its replicas, its state."""

from __future__ import annotations

import dataclasses
import logging
import math
import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import TimeoutError as FutureTimeout
from typing import TYPE_CHECKING, Any

from embedpool.config.spec import ModelSpec
from embedpool.errors import (
    DeadlineExceeded,
    EmbedpoolError,
    InvalidRequest,
    ModelDisabled,
    ModelFailed,
    ModelLoading,
    Overloaded,
    ShuttingDown,
)
from embedpool.pool.answer import gather
from embedpool.pool.batcher import Batcher
from embedpool.pool.door import Measured, limit_fault, measure
from embedpool.pool.job import Flow, Job, split
from embedpool.pool.model_queue import ModelQueue, QueueClosed
from embedpool.pool.replica import Replica, count_replicas
from embedpool.pool.request import EmbedRequest, EmbedResult
from embedpool.pool.stats import ModelStats
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

    open_driver: Callable[[ModelSpec], Driver]
    open_meter: Callable[[ModelSpec], Meter]
    request_timeout_s: float = 120.0
    max_queue_per_model: int = 1000
    max_batch_texts: int = 64
    max_batch_tokens: int = 16384
    max_batch_s: float = math.inf
    max_wait_s: float = 0.0
    clock: Callable[[], float] = time.monotonic


class ServedModel:
    """States: idle, loading, ready, failed, disabled, draining.

    `on_ready` is called on a replica's thread each time one has become ready.
    """

    def __init__(
        self,
        spec: ModelSpec,
        engine: Engine,
        *,
        on_ready: Callable[[ServedModel], None] = lambda served: None,
    ) -> None:
        self.spec = spec
        self.stats = ModelStats()
        self.queue = ModelQueue(self._queue_bound(spec, engine), engine.clock)
        self.last_error: str | None = None
        self._engine = engine
        self._on_ready = on_ready
        self._lock = threading.RLock()
        self._replicas: tuple[Replica, ...] = ()
        self._retiring: set[Replica] = set()
        self._replica_number = 0
        self._meter: Meter | None = None
        self._flows: set[Flow] = set()  # of the requests inside
        self._flow_left = threading.Condition(self._lock)
        self._draining = self._stopped = False
        self._proved = False  # has been ready once
        self._must_load_first = False  # the first load at start: requests get 503 and do not wait
        self._settled = threading.Event()

    # --- the road of a request, in its own thread

    def embed(self, request: EmbedRequest) -> EmbedResult:
        """Measure, split, queue, wait, gather, finish.

        Raises QueueClosed if the model was replaced before the request was admitted; the caller looks the name up anew.
        """
        self._refuse_unless_serving()
        timeout_s = min(request.timeout_s or math.inf, self._engine.request_timeout_s)
        flow = Flow(self._engine.clock() + timeout_s, request.weight, request.client_gone)
        with self._flow_left:
            self._flows.add(flow)
        try:
            result = self._embed(request, flow, timeout_s)
        except EmbedpoolError as error:
            self.stats.refused(error.code)
            raise
        finally:
            flow.abandoned = True  # what is still queued is dropped before it costs compute
            with self._flow_left:
                self._flows.discard(flow)
                self._flow_left.notify_all()
        self.stats.answered(len(request.texts), result.tokens, len(result.truncated))
        return result

    def _refuse_unless_serving(self) -> None:
        state = self.state
        name = self.spec.model
        if state == "disabled":
            raise ModelDisabled(f"{name!r} is disabled")
        if state == "failed":
            wait_s = min((r.retry_at for r in self._replicas), default=0.0) - self._engine.clock()
            raise ModelFailed(f"{name!r} failed: {self.last_error}", retry_after_s=max(wait_s, 1.0))
        if state == "loading" and self._must_load_first:
            raise ModelLoading(f"{name!r} is being loaded", retry_after_s=2.0)

    def _embed(self, request: EmbedRequest, flow: Flow, timeout_s: float) -> EmbedResult:
        clock = self._engine.clock
        arrived = clock()
        spec = self.spec
        if self.queue.full():
            raise self._overloaded()  # before its texts are measured
        measured = measure(request, spec.driver.config, self.meter())
        try:
            for job in self._split(flow, measured):
                if flow.error is not None:
                    raise flow.error
                self._enqueue(job)
            for job in flow.jobs:
                job.future.result(max(flow.deadline - clock(), 0))
        except (FutureTimeout, queue.Full):
            raise DeadlineExceeded(f"no answer within {timeout_s:g} s") from None
        return gather(flow.jobs, measured, request.options, spec, arrived_at=arrived, now=clock())

    def _split(self, flow: Flow, measured: Measured) -> Iterator[Job]:
        return split(
            flow,
            measured.texts,
            measured.ids,
            measured.tokens,
            group=measured.group,
            variant=measured.variant,
            max_texts=min(self._engine.max_batch_texts, self.queue.maxsize),
            max_tokens=self._engine.max_batch_tokens,
        )

    def _enqueue(self, job: Job) -> None:
        flow = job.flow
        if not flow.jobs:
            try:
                self.queue.admit(job)
            except queue.Full:
                raise self._overloaded() from None
        else:
            try:
                self.queue.feed(job, flow.deadline - self._engine.clock())
            except QueueClosed:
                raise ShuttingDown(f"{self.spec.model!r} is stopping") from None
        flow.jobs.append(job)
        self._add_replica_if(lambda: not self._replicas)

    def _overloaded(self) -> Overloaded:
        message = f"the queue of {self.spec.model!r} is full ({self.queue.maxsize} texts)"
        return Overloaded(message, retry_after_s=self.retry_after_s())

    def meter(self) -> Meter:
        """The model's meter, opened on first use."""
        if self._meter is None:
            with self._lock:
                self._meter = self._meter or self._engine.open_meter(self.spec)
        return self._meter

    def retry_after_s(self) -> float:
        """When what waits now should be done, by the measured rate."""
        rate = self.stats.texts_per_busy_s() * max(len(self._replicas), 1)
        return min(max(self.queue.qsize() / rate, 1.0), 60.0) if rate else 1.0

    # --- life

    @property
    def state(self) -> str:
        """What a request would meet."""
        if not self.spec.enabled:
            return "disabled"
        if self._draining:
            return "draining"
        replicas = self._replicas
        if any(r.state == "ready" for r in replicas):
            return "ready"
        if not replicas:
            return "idle"
        limit = FAILURES_BEFORE_FAILED if self._proved else 1
        return "failed" if all(r.failures >= limit for r in replicas) else "loading"

    def start(self, *, prove: bool = False) -> None:
        """Begin to load in the background; with `prove` also a model of min 0, so that its first load is seen."""
        if not self.spec.enabled:
            self._settled.set()
            return
        wanted = max(self.spec.scaling.min, 1 if prove else 0)
        self._must_load_first = wanted > 0
        if not wanted:
            self._settled.set()
        with self._lock:  # the first to fail must not be taken for all
            for _ in range(wanted):
                self._add_replica_if(lambda: len(self._replicas) < wanted)

    def wait_settled(self, timeout_s: float | None = None) -> bool:
        """Wait for the first load. True once it succeeded or failed."""
        return self._settled.wait(timeout_s)

    @property
    def settled(self) -> bool:
        """Whether the first load has ended."""
        return self._settled.is_set()

    def require_loaded(self, timeout_s: float) -> None:
        """Wait for the first load. Raises ModelFailed with the reason unless it succeeded in time."""
        settled = self._settled.wait(timeout_s)
        if not settled or self.state == "failed":
            reason = self.last_error if settled else f"not ready within {timeout_s:g} s"
            raise ModelFailed(f"{self.spec.model!r} did not load: {reason}")

    @property
    def is_serving(self) -> bool:
        """Whether a request would be served now."""
        return self.state in ("ready", "idle")

    @property
    def takes_requests(self) -> bool:
        """Whether a request would be served or wait to be."""
        return self.is_serving or (self.state == "loading" and not self._must_load_first)

    def update(self, spec: ModelSpec) -> None:
        """Take over a spec of the same `load_key`: applies at once."""
        with self._lock:
            self.spec = spec
            self.queue.resize(self._queue_bound(spec, self._engine))
        for _ in range(spec.scaling.min):
            self._add_replica_if(lambda: len(self._replicas) < spec.scaling.min)
        for replica in self._replicas:
            replica.adjust()
        self.queue.wake()  # idle times may have changed

    def check(self, spec: ModelSpec) -> None:
        """Raise InvalidRequest for a spec of the same `load_key` that this model cannot follow."""
        limit = getattr(spec.driver.config, "max_seq_length", None)
        if limit and (fault := limit_fault(limit, self.meter())):
            path = "driver_config.max_seq_length"
            raise InvalidRequest(f"{path}: {fault}", fields={path: fault})

    def close(self) -> None:
        """Take no new request."""
        self._draining = True
        self.queue.close()

    def drain(self, timeout_s: float) -> int:
        """Close, wait for the requests inside, stop the replicas. Gives the number of requests given up."""
        self.close()
        with self._flow_left:
            self._flow_left.wait_for(lambda: not self._flows, timeout_s)
            left = list(self._flows)
        self.queue.stop()
        stopping = ShuttingDown(f"{self.spec.model!r} is stopping")
        self._fail_waiting(stopping)
        for flow in left:
            for job in list(flow.jobs):
                job.fail(stopping)
        with self._lock:
            self._stopped = True
            leaving = [*self._replicas, *self._retiring]
        for replica in leaving:
            replica.stop()
        deadline = time.monotonic() + max(timeout_s, CLOSE_TIMEOUT_S)
        for replica in leaving:
            if not replica.join(max(deadline - time.monotonic(), 0)):
                logger.error("%s did not stop; its batch hangs", replica.name)
        return len(left)

    def _fail_waiting(self, error: EmbedpoolError) -> None:
        for row in self.queue.take_all():
            for equal in (row, *row.twins):
                equal.job.fail(error)

    @staticmethod
    def _queue_bound(spec: ModelSpec, engine: Engine) -> int:
        return spec.queue.max_size or engine.max_queue_per_model

    # --- scaling

    def _add_replica_if(self, wanted: Callable[[], bool]) -> None:
        with self._lock:
            if self._stopped or not self.spec.enabled or not wanted():
                return
            self._replica_number += 1
            replica = Replica(f"{self.spec.model}#{self._replica_number}", self, self._engine.clock)
            before, self._replicas = self._replicas, (*self._replicas, replica)
            try:
                replica.start()
            except RuntimeError:  # the system has no thread to give
                self._replicas = before
                raise

    def grow(self) -> None:
        """One replica more if work waits behind what was just taken and all replicas are at work."""
        if self.queue.qsize() and len(self._replicas) < self.spec.scaling.max:
            self._add_replica_if(
                lambda: (
                    len(self._replicas) < self.spec.scaling.max
                    and all(r.state == "ready" and r.busy for r in self._replicas)
                )
            )

    def idle_timeout_s(self) -> float | None:
        """See Owner."""
        scaling = self.spec.scaling
        return max(scaling.idle_ttl_s, SHORTEST_IDLE_S) if len(self._replicas) > scaling.min else None

    def may_retire(self, replica: Replica) -> bool:
        """See Owner. Under the lock that `_enqueue` looks under after its put, so no job is left without a replica."""
        with self._lock:
            needed = max(self.spec.scaling.min, 1 if self._must_load_first else 0)
            if len(self._replicas) <= needed or self.queue.qsize():
                return False
            self._replicas = tuple(r for r in self._replicas if r is not replica)
            self._retiring.add(replica)
            return True

    # --- what replicas ask and tell; called on their threads

    def open_driver(self) -> Driver:
        """See Owner."""
        self.meter()  # so that the first request does not pay for it
        return self._engine.open_driver(self.spec)

    @property
    def driver_config(self) -> object:
        """See Owner."""
        return self.spec.driver.config

    def make_worker(self, name: str, driver: Driver) -> Worker:
        """See Owner."""
        cost = driver.cost
        batcher = Batcher(
            driver.max_batch_texts or self._engine.max_batch_texts,
            self._engine.max_batch_tokens,
            max_s=self._engine.max_batch_s,
            fixed_s=cost.fixed_s if cost else None,
            token_s=cost.token_s if cost else None,
        )
        return Worker(
            name,
            driver,
            self.queue,
            batcher,
            self.stats,
            max_wait_s=self._engine.max_wait_s,
            clock=self._engine.clock,
        )

    def inflight(self, driver: Driver) -> int:
        """See Owner."""
        return self.spec.queue.max_inflight_per_replica or driver.parallel

    def replica_changed(self, replica: Replica) -> None:
        """See Owner."""
        if replica.state == "ready":
            self._proved = True
            self._must_load_first = False
            self._settled.set()
            self._on_ready(self)
        elif replica.state == "failed":
            self.last_error = replica.last_error
            with self._lock:
                failed = self.state == "failed"
            if failed:
                self._fail_waiting(ModelFailed(f"{self.spec.model!r} failed: {self.last_error}"))
                self._settled.set()
        else:
            self._retiring.discard(replica)

    def snapshot(self) -> dict[str, Any]:
        """The model's entry in /status."""
        return {
            "model": self.spec.model,
            "alias": self.spec.alias,
            "enabled": self.spec.enabled,
            "state": self.state,
            "driver_type": self.spec.driver.type,
            **count_replicas(self._replicas),
            "queue_len": self.queue.qsize(),
            "queue_max": self.queue.maxsize,
            "scaling": dataclasses.asdict(self.spec.scaling),
            "counters": self.stats.snapshot(),
            "last_error": self.last_error,
        }
