"""The queue of one model: a `queue.Queue` bounded in texts and served in fair order.

Start-time fair queueing: a job starts at max(v, its flow's last finish) and finishes its cost ÷ weight later, where v
is the largest start handed out; the smallest start is served first. So a one-text query overtakes the tail of a
10,000-text request and nothing starves.
"""

from __future__ import annotations

import heapq
import itertools
import queue
import time
from collections.abc import Callable

from embedpool.pool.job import Job


class QueueClosed(Exception):
    """The model takes no new requests: it was replaced, disabled or removed."""


class ModelQueue(queue.Queue[Job]):
    """`qsize()` and `maxsize` count texts. All state is guarded by the one lock of `queue.Queue`."""

    def __init__(self, max_size: int, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(max_size)
        self._clock = clock

    # --- the primitives that queue.Queue lets a subclass redefine

    def _init(self, maxsize: int) -> None:
        self._heap: list[tuple[float, int, Job]] = []
        self._sequence = itertools.count()
        self._texts = 0
        self._virtual_time = 0.0
        self._closed = self._stopped = False

    def _qsize(self) -> int:
        return self._texts

    def _put(self, item: Job) -> None:
        flow = item.flow
        start = max(self._virtual_time, flow.finish)
        flow.finish = start + item.cost / flow.weight
        flow.waiting += 1
        item.queued_at = self._clock()
        self._texts += len(item)
        heapq.heappush(self._heap, (start, next(self._sequence), item))

    def _get(self) -> Job:
        start, _, job = heapq.heappop(self._heap)
        self._virtual_time = max(self._virtual_time, start)
        job.flow.waiting -= 1
        self._texts -= len(job)
        return job

    # --- the pool's two ways in and one way out

    def admit(self, job: Job) -> None:
        """Put the first job of a request, now or never. Raises `queue.Full`, QueueClosed."""
        with self.mutex:
            if self._closed:
                raise QueueClosed
            if not self._fits(job, self.maxsize):
                raise queue.Full
            self._put(job)
            self.not_empty.notify()

    def feed(self, job: Job, timeout_s: float) -> None:
        """Put a further job of an admitted request as room appears.

        Raises `queue.Full` after `timeout_s`, QueueClosed after `stop()`.

        Half of the queue is for first jobs, so that bulk work never shuts the door on a query; but a flow that has
        nothing waiting may use any room, so that queries never starve bulk work.
        """
        deadline = self._clock() + timeout_s
        with self.mutex:
            while not self._stopped and not self._has_room_to_feed(job):
                remaining = deadline - self._clock()
                if remaining <= 0:
                    raise queue.Full
                self.not_full.wait(remaining)
            if self._stopped:
                raise QueueClosed
            self._put(job)
            self.not_empty.notify()

    def _has_room_to_feed(self, job: Job) -> bool:
        return self._fits(job, self.maxsize if job.flow.waiting == 0 else self.maxsize // 2)

    def _fits(self, job: Job, bound: int) -> bool:
        """A job larger than the bound, cut before the queue was made smaller, fits an empty queue."""
        return not self._texts or self._texts + len(job) <= bound

    def take(
        self,
        max_texts: int,
        timeout_s: float | None,
        *,
        max_wait_s: float = 0.0,
        leaving: Callable[[], bool] = lambda: False,
    ) -> list[Job]:
        """Jobs of up to `max_texts` texts together, but at least one, under one lock.

        Waits up to `timeout_s` (None: until woken) for the first and up to `max_wait_s` for more. [] means that nothing
        came, or that `wake()` was called. `leaving()` is asked under the lock: a `wake()` after it turned true is
        not missed.
        """
        with self.mutex:
            if not self._heap and not leaving():
                self.not_empty.wait(timeout_s)
            if leaving():
                self.not_empty.notify()  # what woke this worker is for another
                return []
            if self._heap and max_wait_s:
                until = self._clock() + max_wait_s
                while self._texts < max_texts and (remaining := until - self._clock()) > 0:
                    self.not_empty.wait(remaining)
            jobs: list[Job] = []
            texts = 0
            while self._heap and (not jobs or texts + len(self._heap[0][2]) <= max_texts):
                jobs.append(self._get())
                texts += len(jobs[-1])
            if jobs:
                self.not_full.notify_all()
            if self._heap:
                self.not_empty.notify()
            return jobs

    def take_all(self) -> list[Job]:
        """Everything that waits, for a model that cannot serve it."""
        with self.mutex:
            jobs = [self._get() for _ in range(len(self._heap))]
            self.not_full.notify_all()
            return jobs

    # --- control

    def close(self) -> None:
        """Admit no new request; admitted ones may still be fed."""
        with self.mutex:
            self._closed = True

    def stop(self) -> None:
        """Nothing gets in any more."""
        with self.mutex:
            self._closed = self._stopped = True
            self.not_full.notify_all()

    def resize(self, max_size: int) -> None:
        """Change the bound; what already waits stays."""
        with self.mutex:
            self.maxsize = max_size
            self.not_full.notify_all()

    def wake(self) -> None:
        """Let every waiting `take` return, so that its worker looks around."""
        with self.mutex:
            self.not_empty.notify_all()
