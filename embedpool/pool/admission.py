"""The road of a request through one model: it is measured, what is known is taken from the cache, the rest
waits in the queue, and all of it is finished."""

from __future__ import annotations

import contextlib
import dataclasses
import queue
import threading
from collections.abc import Callable

from embedpool.errors import (
    DeadlineExceeded,
    EmbedpoolError,
    ModelDisabled,
    ModelFailed,
    ModelLoading,
    Overloaded,
    ShuttingDown,
    UpstreamError,
)
from embedpool.pool.cache import ModelCache
from embedpool.pool.model_queue import ModelQueue, QueueClosed
from embedpool.pool.replica_set import ReplicaSet
from embedpool.pool.request import Call, Request, Result
from embedpool.pool.settings import PoolSettings
from embedpool.pool.stats import ModelStats
from embedpool.tasks.embed import Embed
from embedpool.tasks.item import Item
from embedpool.tasks.task import Task
from embedpool.tasks.tokenizer import Tokenizer

LOOK_EVERY_S = 1.0  # whether the client of a request that waits is still there


@dataclasses.dataclass(eq=False)
class Admission:
    """Serves requests, each in its own thread, through the model's queue; `tokenizer` opens it, or waits so long."""

    queue: ModelQueue
    replicas: ReplicaSet
    tokenizer: Callable[[float], Tokenizer]
    stats: ModelStats
    cache: ModelCache
    settings: PoolSettings

    def __post_init__(self) -> None:
        self._inside: set[Request] = set()
        # Guards `_inside`. Requests' threads take it on their way in and out, one that stops the model waits on it.
        self._changed = threading.Condition()

    def serve(self, task: Task, call: Call) -> Result:
        """Measure, queue, wait, gather, finish.

        Raises QueueClosed if the model was replaced before the request was admitted; the caller looks the name up anew.
        """
        self.refuse_unless_serving()
        request = Request(task, call)
        with self._changed:
            self._inside.add(request)
        try:
            result = self._serve(request)
        except EmbedpoolError as error:
            if not (call.is_patient and error.status == Overloaded.status):
                self.stats.refused(task.name, error.code)
            raise
        finally:
            request.abandoned = True  # what a batch holds already is dropped before it costs compute
            if request.left > 0:
                self.queue.withdraw(request)
            with self._changed:
                self._inside.discard(request)
                self._changed.notify_all()
        self.stats.answered(task.name, result)
        return result

    def refuse_unless_serving(self) -> None:
        """Raises ModelDisabled, ModelFailed and ModelLoading."""
        replicas, name = self.replicas, self.replicas.spec.model
        if not replicas.spec.enabled:
            raise ModelDisabled(f"{name!r} is disabled")
        if self.queue.is_closed:
            return  # the model was replaced just now: the caller looks its name up anew
        state = replicas.state
        if state == "failed":
            raise ModelFailed(f"{name!r} failed: {replicas.trouble}", retry_after_s=replicas.retry_after_s)
        if state == "loading" and replicas.loads_first:
            raise ModelLoading(f"{name!r} is being loaded", retry_after_s=2.0)

    def _serve(self, request: Request) -> Result:
        clock, task, call = self.settings.clock, request.task, request.call
        spec = self.replicas.spec
        self._require_no_rest(call)  # before it is measured, as all of these
        if self.queue.full() and not self.queue.is_closed:
            raise self._overloaded()
        if width := self.replicas.widths.get(task.name):
            call.require_room(len(task) * width, width)
        tokenizer = self.tokenizer(max(call.deadline - clock(), 0))
        if refusal := task.refusal(spec.model, tokenizer):
            raise refusal
        measured = task.measure(spec.driver.config, tokenizer, lambda: self._require_time(call))
        measured_at = clock()
        if task.of_tokens:
            widths = self.replicas.widths
            width = widths.get(task.of_tokens) or widths.get(Embed.name) or 0  # an embedder's tokens are mostly as wide
            call.require_room(sum(item.tokens for item in measured.items) * width, width)
        request.expect(measured)
        try:
            self._enqueue(request, self.cache.find(request, measured.items))
            self._wait(request)
        except (TimeoutError, queue.Full):
            raise DeadlineExceeded(f"no answer within {call.timeout_s:g} s") from None
        raw = request.gather()
        call.require_room(raw.numbers, raw.width)
        errors = dict(sorted(request.errors.items()))
        rows = task.finish(raw, spec.driver.config, tokenizer, errors)
        counted = round(request.counted) or sum(item.tokens for item in measured.items if item.index not in errors)
        return Result(
            model=spec.model,
            space=self.replicas.space,
            rows=rows,
            width=raw.width,
            tokens=counted,
            truncated=sorted(set(request.truncated)),  # of a pair both parts may be
            measure_ms=1000 * (measured_at - call.arrived_at),
            queue_ms=1000 * max(request.started_at - call.arrived_at, 0),
            compute_ms=1000 * request.compute_s,
            total_ms=1000 * (clock() - call.arrived_at),
            replicas=sorted(request.replicas),
            cached=request.cached,
            errors=errors,
        )

    def _require_no_rest(self, call: Call) -> None:
        """Raises UpstreamError if a remote service asks for a pause that is longer than the request may take."""
        rest_s = self.replicas.rest_s
        if rest_s and self.settings.clock() + rest_s >= call.deadline:
            says = f"the remote service asks for a pause of {rest_s:.0f} s"
            raise UpstreamError(says, remote_status=429, retry_after_s=rest_s)

    def _require_time(self, call: Call) -> None:
        """Raises DeadlineExceeded."""
        if self.settings.clock() >= call.deadline:
            raise DeadlineExceeded(f"no answer within {call.timeout_s:g} s: its texts were still being tokenised")

    def _wait(self, request: Request) -> None:
        """Until it is done, or its client has gone. Raises its error, and TimeoutError at its deadline."""
        clock, deadline = self.settings.clock, request.call.deadline
        while not request.is_done and deadline - clock() > LOOK_EVERY_S:
            with contextlib.suppress(TimeoutError):
                request.wait(LOOK_EVERY_S)
            request.is_wanted(clock())
        request.wait(max(deadline - clock(), 0))

    def _enqueue(self, request: Request, items: list[Item]) -> None:
        """All items, as there is room for them; the first now or never."""
        put = 0
        while put < len(items) and request.error is None:
            try:
                left_s = request.call.deadline - self.settings.clock()
                put += self.queue.feed(items[put:], left_s) if put else self.queue.admit(items)
            except queue.Full:
                if put:
                    raise
                raise self._overloaded() from None
            except QueueClosed:
                if not put:
                    raise
                raise ShuttingDown(f"{self.replicas.spec.model!r} is stopping") from None
            self.replicas.need_one()

    def _overloaded(self) -> Overloaded:
        """The error for a full queue, with the time until the waiting items should be done, by the measured rate."""
        rate = self.stats.texts_per_busy_s() * max(len(self.replicas), 1)
        drained_s = min(max(self.queue.qsize() / rate, 1.0), 60.0) if rate else 1.0
        retry_after_s = max(drained_s, self.replicas.rest_s)
        message = f"the queue of {self.replicas.spec.model!r} is full ({self.queue.maxsize} texts)"
        return Overloaded(message, retry_after_s=retry_after_s)

    # --- leaving

    def give_up(self, timeout_s: float) -> int:
        """Wait for the requests inside, then fail those that are left; how many that were."""
        with self._changed:
            self._changed.wait_for(lambda: not self._inside, timeout_s)
            left = list(self._inside)
        self.queue.stop()
        stopping = ShuttingDown(f"{self.replicas.spec.model!r} is stopping")
        self.fail_waiting(stopping)
        for request in left:
            request.fail(stopping)
        return len(left)

    def fail_waiting(self, error: EmbedpoolError) -> None:
        """Fail every request that has an item in the queue."""
        for item in self.queue.take_all():
            for equal in item.equals:
                equal.request.fail(error)
