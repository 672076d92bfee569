"""The road of a request through one model: it is measured, admitted to the queue, waited for, and finished."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence

from embedpool.config.spec import ModelSpec
from embedpool.errors import (
    DeadlineExceeded,
    EmbedpoolError,
    ModelDisabled,
    ModelFailed,
    ModelLoading,
    Overloaded,
    ShuttingDown,
    UnsupportedOption,
)
from embedpool.pool.model_queue import ModelQueue, QueueClosed
from embedpool.pool.replica_set import ReplicaSet
from embedpool.pool.request import Call, Request, Result
from embedpool.pool.settings import PoolSettings
from embedpool.pool.stats import ModelStats
from embedpool.tasks.embed import EmbedOptions, prompted
from embedpool.tasks.item import Ids, Item
from embedpool.tasks.task import Measured, Task
from embedpool.tasks.tokenizer import Token, Tokenizer


class TokenizerOnce:
    """A model's tokenizer, opened on first use: by a request, or by the first replica that loads."""

    def __init__(self, open_tokenizer: Callable[[], Tokenizer]) -> None:
        self._open = open_tokenizer
        self._tokenizer: Tokenizer | None = None
        # Held while the tokenizer is being opened, which may take as long as a download. Nobody takes another lock
        # inside it, and whoever waits for it has a deadline.
        self._lock = threading.Lock()

    def get(self, timeout_s: float = -1) -> Tokenizer:
        """Raises DeadlineExceeded if another thread opens it for too long, and what opening it raises."""
        if self._tokenizer is None:
            if not self._lock.acquire(timeout=timeout_s):
                raise DeadlineExceeded("the deadline passed while the model's tokenizer was being opened")
            try:
                self._tokenizer = self._tokenizer or self._open()
            finally:
                self._lock.release()
        return self._tokenizer


class Admission:
    """Serves requests, each in its own thread, through the model's queue."""

    def __init__(
        self,
        model_queue: ModelQueue,
        replicas: ReplicaSet,
        tokenizer: TokenizerOnce,
        stats: ModelStats,
        settings: PoolSettings,
    ) -> None:
        self._queue = model_queue
        self._replicas = replicas
        self._tokenizer = tokenizer
        self._stats = stats
        self._settings = settings
        self._inside: set[Request] = set()
        # Guards `_inside`. Requests' threads take it on their way in and out, one that stops the model waits on it.
        self._changed = threading.Condition()

    @property
    def _spec(self) -> ModelSpec:
        return self._replicas.spec

    def serve(self, task: Task, call: Call) -> Result:
        """Measure, queue, wait, gather, finish.

        Raises QueueClosed if the model was replaced before the request was admitted; the caller looks the name up anew.
        """
        self._refuse_unless_serving()
        request = Request(task, call)
        with self._changed:
            self._inside.add(request)
        try:
            result = self._serve(request)
        except EmbedpoolError as error:
            if not (call.is_patient and isinstance(error, Overloaded)):
                self._stats.refused(error.code)
            raise
        finally:
            request.abandoned = True  # what is still queued is dropped before it costs compute
            with self._changed:
                self._inside.discard(request)
                self._changed.notify_all()
        self._stats.answered(result)
        return result

    def _refuse_unless_serving(self) -> None:
        name, replicas = self._spec.model, self._replicas
        if not self._spec.enabled:
            raise ModelDisabled(f"{name!r} is disabled")
        state = replicas.state
        if state == "failed":
            wait_s = replicas.retry_at - self._settings.clock()
            raise ModelFailed(f"{name!r} failed: {replicas.trouble}", retry_after_s=max(wait_s, 1.0))
        if state == "loading" and replicas.loads_first:
            raise ModelLoading(f"{name!r} is being loaded", retry_after_s=2.0)

    def _serve(self, request: Request) -> Result:
        clock, task, call = self._settings.clock, request.task, request.call
        spec = self._spec
        if self._queue.full() and not self._queue.is_closed:
            raise self._overloaded()  # before it is measured
        measured = task.measure(spec.driver.config, self._tokenizer.get(max(call.deadline - clock(), 0)))
        measured_at = clock()
        request.truncated = measured.truncated
        request.expect(measured.items, measured.refused)
        try:
            self._enqueue(request, measured.items)
            request.wait(max(call.deadline - clock(), 0))
        except (TimeoutError, queue.Full):
            raise DeadlineExceeded(f"no answer within {call.timeout_s:g} s") from None
        return self._result(request, measured, spec, measured_at)

    def _enqueue(self, request: Request, items: list[Item]) -> None:
        """All items, as there is room for them; the first now or never."""
        put = 0
        while put < len(items) and request.error is None:
            if not put:
                try:
                    put = self._queue.admit(items)
                except queue.Full:
                    raise self._overloaded() from None
            else:
                try:
                    put += self._queue.feed(items[put:], request.call.deadline - self._settings.clock())
                except QueueClosed:
                    raise ShuttingDown(f"{self._spec.model!r} is stopping") from None
            self._replicas.need_one()

    def _result(self, request: Request, measured: Measured, spec: ModelSpec, measured_at: float) -> Result:
        raw = request.gather()
        errors = dict(sorted(request.errors.items()))
        rows = request.task.finish(raw, spec.driver.config, errors)
        arrived_at, now = request.call.arrived_at, self._settings.clock()
        return Result(
            model=spec.model,
            rows=rows,
            width=raw.width,
            tokens=round(request.counted) or sum(i.tokens for i in measured.items if i.index not in errors),
            truncated=sorted(request.truncated),
            measure_ms=1000 * (measured_at - arrived_at),
            queue_ms=1000 * max(request.started_at - arrived_at, 0),
            compute_ms=1000 * request.compute_s,
            total_ms=1000 * (now - arrived_at),
            replicas=sorted(request.replicas),
            errors=errors,
        )

    def _overloaded(self) -> Overloaded:
        message = f"the queue of {self._spec.model!r} is full ({self._queue.maxsize} texts)"
        return Overloaded(message, retry_after_s=self.retry_after_s())

    def retry_after_s(self) -> float:
        """When what waits now should be done, by the measured rate."""
        rate = self._stats.texts_per_busy_s() * max(len(self._replicas), 1)
        return min(max(self._queue.qsize() / rate, 1.0), 60.0) if rate else 1.0

    # --- requests that need no model

    def tokens(self, texts: Sequence[str], options: EmbedOptions, *, special: bool) -> list[list[Token]]:
        """The tokens of the texts behind their prompt. Raises UnsupportedOption for a remote model."""
        tokenizer = self._own_tokenizer()
        behind_prompt, _ = prompted(texts, options, self._spec.driver.config, tokenizer)
        return tokenizer.tokens(behind_prompt, special=special)

    def decode(self, ids: Sequence[Ids], *, skip_special: bool) -> list[str]:
        """The texts of token ids. Raises UnsupportedOption for a remote model."""
        return self._own_tokenizer().decode(ids, skip_special=skip_special)

    def _own_tokenizer(self) -> Tokenizer:
        if self._spec.driver.config.is_remote:
            raise UnsupportedOption(f"{self._spec.model!r} is remote: its tokens are known only there")
        self._refuse_unless_serving()
        return self._tokenizer.get(self._settings.request_timeout_s)

    # --- leaving

    def give_up(self, timeout_s: float) -> int:
        """Wait for the requests inside, then fail those that are left; how many that were."""
        with self._changed:
            self._changed.wait_for(lambda: not self._inside, timeout_s)
            left = list(self._inside)
        self._queue.stop()
        stopping = ShuttingDown(f"{self._spec.model!r} is stopping")
        self.fail_waiting(stopping)
        for request in left:
            request.fail(stopping)
        return len(left)

    def fail_waiting(self, error: EmbedpoolError) -> None:
        """Fail every request that has an item in the queue."""
        for item in self._queue.take_all():
            for equal in (item, *item.duplicates):
                equal.request.fail(error)
