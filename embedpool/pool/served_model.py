"""One model: the door where its texts are measured and split, its queue, its replicas, its state."""

from __future__ import annotations

import dataclasses
import math
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from embedpool.config.spec import HttpConfig, ModelSpec
from embedpool.errors import (
    DeadlineExceeded,
    EmbedpoolError,
    InvalidRequest,
    ModelDisabled,
    ModelFailed,
    ModelLoading,
    Overloaded,
    ShuttingDown,
    UnsupportedOption,
)
from embedpool.pool.answer import gather
from embedpool.pool.door import Measured, limit_fault, measure, prompted
from embedpool.pool.job import Flow, Ids, Job, split
from embedpool.pool.model_queue import ModelQueue, QueueClosed
from embedpool.pool.replica_set import Engine, ReplicaSet
from embedpool.pool.request import EmbedOptions, EmbedRequest, EmbedResult
from embedpool.pool.stats import ModelStats

if TYPE_CHECKING:
    from embedpool.drivers.base import Meter, Token


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
        self.stats = ModelStats(spec.model, engine.observer)
        self.queue = ModelQueue(self._queue_bound(spec, engine), engine.clock)
        self._engine = engine
        self._on_ready = on_ready
        self.replicas = ReplicaSet(
            spec,
            engine,
            self.queue,
            self.stats,
            on_ready=lambda: self._on_ready(self),
            on_failed=lambda reason: self._fail_waiting(ModelFailed(f"{self.spec.model!r} failed: {reason}")),
        )
        self._flows: set[Flow] = set()  # of the requests inside
        self._lock = threading.Lock()
        self._flow_left = threading.Condition(self._lock)  # told once it is draining
        self._draining = False

    @property
    def spec(self) -> ModelSpec:
        """What is served now; its replicas follow the same."""
        return self.replicas.spec

    # --- the road of a request, in its own thread

    def embed(self, request: EmbedRequest) -> EmbedResult:
        """Measure, split, queue, wait, gather, finish.

        Raises QueueClosed if the model was replaced before the request was admitted; the caller looks the name up anew.
        """
        self._refuse_unless_serving()
        timeout_s = min(request.timeout_s or math.inf, self._engine.request_timeout_s)
        partial = request.options.on_error == "partial"
        deadline = self._engine.clock() + timeout_s
        flow = Flow(
            deadline, request.weight, request.client_gone, partial=partial, trace=request.trace, hops=request.hops
        )
        with self._lock:
            self._flows.add(flow)
        try:
            result = self._embed(request, flow, timeout_s)
        except EmbedpoolError as error:
            if not (request.asks_again and isinstance(error, Overloaded)):
                self.stats.refused(error.code)
            raise
        finally:
            flow.abandoned = True  # what is still queued is dropped before it costs compute
            flow.jobs.clear()  # which refer to it: else both would stay until garbage is collected
            with self._lock:
                self._flows.discard(flow)
                if self._draining:
                    self._flow_left.notify_all()
        self.stats.answered(result)
        return result

    def _refuse_unless_serving(self) -> None:
        state = self.state
        name = self.spec.model
        if state == "disabled":
            raise ModelDisabled(f"{name!r} is disabled")
        if state == "failed":
            wait_s = self.replicas.retry_at - self._engine.clock()
            raise ModelFailed(f"{name!r} failed: {self.replicas.trouble}", retry_after_s=max(wait_s, 1.0))
        if state == "loading" and self.replicas.loads_first:
            raise ModelLoading(f"{name!r} is being loaded", retry_after_s=2.0)

    def _embed(self, request: EmbedRequest, flow: Flow, timeout_s: float) -> EmbedResult:
        clock = self._engine.clock
        arrived = clock()
        spec = self.spec
        if self.queue.full() and not self._draining:
            raise self._overloaded()  # before its texts are measured
        meter = self.replicas.meter(max(flow.deadline - clock(), 0))
        measured = measure(request, spec.driver.config, meter)
        measured_at = clock()
        try:
            for job in self._split(flow, measured):
                if flow.error is not None:
                    raise flow.error
                self._enqueue(job)
            for job in flow.jobs:
                job.wait(max(flow.deadline - clock(), 0))
        except (TimeoutError, queue.Full):
            raise DeadlineExceeded(f"no answer within {timeout_s:g} s") from None
        return gather(flow, measured, request.options, spec, arrived_at=arrived, measured_at=measured_at, now=clock())

    def tokens(self, texts: Sequence[str], options: EmbedOptions, *, special: bool) -> list[list[Token]]:
        """The tokens of the texts behind their prompt. Raises UnsupportedOption for a remote model."""
        meter = self._tokenizer()
        behind_prompt, _ = prompted(texts, options, self.spec.driver.config, meter)
        return meter.tokens(behind_prompt, special=special)

    def decode(self, ids: Sequence[Ids], *, skip_special: bool) -> list[str]:
        """The texts of token ids. Raises UnsupportedOption for a remote model."""
        return self._tokenizer().decode(ids, skip_special=skip_special)

    def _tokenizer(self) -> Meter:
        if isinstance(self.spec.driver.config, HttpConfig):
            raise UnsupportedOption(f"{self.spec.model!r} is remote: its tokens are known only there")
        self._refuse_unless_serving()
        return self.replicas.meter(self._engine.request_timeout_s)

    def _split(self, flow: Flow, measured: Measured) -> Iterator[Job]:
        texts, ids, tokens = measured.texts, measured.ids, measured.tokens
        if measured.refused:
            kept = measured.kept
            if not kept:
                return iter(())
            texts, tokens = [texts[i] for i in kept], [tokens[i] for i in kept]
            ids = None if ids is None else [ids[i] for i in kept]
        return split(
            flow,
            texts,
            ids,
            tokens,
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
        self.replicas.need_one()

    def _overloaded(self) -> Overloaded:
        message = f"the queue of {self.spec.model!r} is full ({self.queue.maxsize} texts)"
        return Overloaded(message, retry_after_s=self.retry_after_s())

    def retry_after_s(self) -> float:
        """When what waits now should be done, by the measured rate."""
        rate = self.stats.texts_per_busy_s() * max(len(self.replicas), 1)
        return min(max(self.queue.qsize() / rate, 1.0), 60.0) if rate else 1.0

    # --- life

    @property
    def state(self) -> str:
        """What a request would meet."""
        if not self.spec.enabled:
            return "disabled"
        return "draining" if self._draining else self.replicas.state

    def start(self, *, prove: bool = False) -> None:
        """Begin to load in the background; with `prove` also a model of min 0, so that its first load is seen."""
        wanted = max(self.spec.scaling.min, 1 if prove else 0)
        self.replicas.start(wanted if self.spec.enabled else 0)

    def wait_settled(self, timeout_s: float | None = None) -> bool:
        """Wait for the first load. True once it succeeded or failed."""
        return self.replicas.settled.wait(timeout_s)

    @property
    def settled(self) -> bool:
        """Whether the first load has ended."""
        return self.replicas.settled.is_set()

    def require_loaded(self, timeout_s: float) -> None:
        """Wait for the first load. Raises ModelFailed with the reason unless it succeeded in time."""
        settled = self.wait_settled(timeout_s)
        if self.replicas.stopped:
            raise ShuttingDown(f"{self.spec.model!r} is stopping")
        if not settled or self.state == "failed":
            reason = self.replicas.last_error if settled else f"not ready within {timeout_s:g} s"
            raise ModelFailed(f"{self.spec.model!r} did not load: {reason}")

    @property
    def is_serving(self) -> bool:
        """Whether a request would be served now."""
        return self.state in ("ready", "idle")

    @property
    def takes_requests(self) -> bool:
        """Whether a request would be served or wait to be."""
        return self.is_serving or (self.state == "loading" and not self.replicas.loads_first)

    def update(self, spec: ModelSpec) -> None:
        """Take over a spec of the same `load_key`: applies at once."""
        self.queue.resize(self._queue_bound(spec, self._engine))
        self.replicas.update(spec)

    def check(self, spec: ModelSpec) -> None:
        """Raise InvalidRequest for a spec of the same `load_key` that this model cannot follow."""
        limit = getattr(spec.driver.config, "max_seq_length", None)
        if limit and (fault := limit_fault(limit, self.replicas.meter())):
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
        self.replicas.stop(timeout_s)
        return len(left)

    def _fail_waiting(self, error: EmbedpoolError) -> None:
        for row in self.queue.take_all():
            for equal in (row, *row.twins):
                equal.job.fail(error)

    @staticmethod
    def _queue_bound(spec: ModelSpec, engine: Engine) -> int:
        return spec.queue.max_size or engine.max_queue_per_model

    def snapshot(self) -> dict[str, Any]:
        """The model's entry in /status."""
        return {
            "model": self.spec.model,
            "alias": self.spec.alias,
            "enabled": self.spec.enabled,
            "state": self.state,
            "driver_type": self.spec.driver.type,
            **self.replicas.counts(),
            "queue_len": self.queue.qsize(),
            "queue_max": self.queue.maxsize,
            "scaling": dataclasses.asdict(self.spec.scaling),
            "counters": self.stats.snapshot(),
            "last_error": self.replicas.trouble,
        }
