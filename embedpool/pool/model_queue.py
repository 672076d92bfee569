"""The queue of one model: a `queue.Queue` bounded in texts and served in fair order.

Start-time fair queueing, text by text: a text starts at max(v, its flow's last finish) and finishes its tokens ÷ weight
later, where v is the largest start of a text whose turn it was; the smallest start comes first. So a one-text query
overtakes the rest of a 10,000-text request and nothing starves. A batch holds the text whose turn it is, and of those
waiting behind it the ones that ride along well; riding along moves nobody else's turn. A text equal to one that runs
already does not wait at all: it shares that one's vector.
"""

from __future__ import annotations

import bisect
import collections
import contextlib
import itertools
import queue
import time
from collections.abc import Callable, Hashable, Iterator, Sequence

from embedpool.pool.job import Job, Row

WINDOW = 256  # rows a batch is chosen from
JOINABLE_S = 1.0  # a running batch is joined no longer than this, so that one which hangs gathers nobody

_Entry = tuple[float, int, Row]  # start, sequence; no two entries are alike in these


class QueueClosed(Exception):
    """The model takes no new requests: it was replaced, disabled or removed."""


class ModelQueue(queue.Queue[Job]):
    """`qsize()` and `maxsize` count texts. All state is guarded by the one lock of `queue.Queue`."""

    def __init__(self, max_size: int, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(max_size)
        self._clock = clock

    # --- the primitives that queue.Queue lets a subclass redefine

    def _init(self, maxsize: int) -> None:
        self._waiting: list[_Entry] = []  # in the order of service
        self._equal: dict[Hashable, list[_Entry]] = {}  # the same entries, by what their vector depends on
        self._running: dict[Hashable, tuple[Row, float]] = {}  # likewise; joinable until
        self._returned: collections.deque[list[Row]] = collections.deque()  # batches to be run again
        self._returned_last = False  # such a batch was taken last
        self._sequence = itertools.count()
        self._virtual_time = 0.0
        self._closed = self._stopped = False

    def _qsize(self) -> int:
        return len(self._waiting) + sum(map(len, self._returned))

    def _put(self, item: Job) -> None:
        flow = item.flow
        for at, tokens in enumerate(item.tokens):
            row = Row(item, at)
            if self._joins(row):
                continue
            flow.waiting += 1
            start = max(self._virtual_time, flow.finish)
            flow.finish = start + (tokens or 1) / flow.weight
            entry = (start, next(self._sequence), row)
            if self._waiting and entry < self._waiting[-1]:
                bisect.insort(self._waiting, entry)
            else:
                self._waiting.append(entry)
            self._equal.setdefault(row.same_as, []).append(entry)

    def _joins(self, row: Row) -> bool:
        """Whether an equal text runs, which then has this one as a further twin."""
        running, until = self._running.get(row.same_as, (None, 0.0))
        if running is None or self._clock() >= until:
            return False
        running.twins.append(row)
        return True

    def _get(self) -> Job:
        return self._remove([0])[0].job

    def _remove(self, places: Sequence[int]) -> list[Row]:
        """Take out the entries at these places, ascending, each with its equals wherever they wait."""
        self._virtual_time = max(self._virtual_time, self._waiting[0][0])
        taken = [self._waiting[place] for place in places]
        numbers = {entry[1] for entry in taken}
        for place in reversed(places):
            del self._waiting[place]
        rows = []
        for entry in taken:
            row = entry[2]
            equals = self._equal.pop(row.same_as, None)
            if equals is None:
                continue  # it is a twin of one before it
            rows.append(row)
            for other in equals:
                other[2].job.flow.waiting -= 1
                if other is not entry:
                    row.twins.append(other[2])
                    if other[1] not in numbers:
                        del self._waiting[bisect.bisect_left(self._waiting, other)]
        return rows

    # --- the pool's two ways in and one way out

    def admit(self, job: Job) -> None:
        """Put the first job of a request, now or never. Raises `queue.Full`, QueueClosed."""
        with self.mutex:
            if self._closed:
                raise QueueClosed
            if not self._fits(job, self.maxsize):
                raise queue.Full
            self._put(job)
            if self._waiting:  # else all of it has joined what runs
                self.not_empty.notify()

    def put_back(self, rows: Sequence[Row]) -> None:
        """Let rows that were taken run again, as a batch of their own: before all that waits, but in turn with it.

        So one that is lost again and again keeps nobody from being served. The queue may be full by now.
        """
        with self.mutex:
            self._returned.append(list(rows))
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
            if self._waiting:  # else all of it has joined what runs
                self.not_empty.notify()

    def _has_room_to_feed(self, job: Job) -> bool:
        return self._fits(job, self.maxsize if job.flow.waiting == 0 else self.maxsize // 2)

    def _fits(self, job: Job, bound: int) -> bool:
        """A job larger than the bound, cut before the queue was made smaller, fits an empty queue."""
        return not self._qsize() or self._qsize() + len(job) <= bound

    def take(
        self,
        choose: Callable[[Sequence[Row]], Sequence[int]],
        timeout_s: float | None,
        *,
        enough_texts: int = 1,
        max_wait_s: float = 0.0,
        leaving: Callable[[], bool] = lambda: False,
    ) -> list[Row]:
        """The rows of one batch, under one lock, each with its equals as twins.

        `choose` is given the first WINDOW rows in the order of service and names places in it, ascending, the first
        row's among them. Waits up to `timeout_s` (None: until woken) for a row and up to `max_wait_s` for
        `enough_texts`. [] means that nothing came, or that `wake()` was called. `leaving()` is asked under the lock: a
        `wake()` after it turned true is not missed.
        """
        with self.mutex:
            if not self._qsize() and not leaving():
                self.not_empty.wait(timeout_s)
            if leaving():
                self.not_empty.notify()  # what woke this worker is for another
                return []
            if self._returned and not (self._returned_last and self._waiting):
                self._returned_last = True
                rows = self._returned.popleft()
                self._let_others_on()
                return rows
            self._returned_last = False
            if self._waiting and max_wait_s:
                until = self._clock() + max_wait_s
                while 0 < len(self._waiting) < enough_texts and (remaining := until - self._clock()) > 0:
                    self.not_empty.wait(remaining)
            if not self._waiting:
                return []
            rows = self._remove(choose([entry[2] for entry in self._waiting[:WINDOW]]))
            self._let_others_on()
            return rows

    def _let_others_on(self) -> None:
        """There is room, and perhaps more work."""
        self.not_full.notify_all()
        if self._qsize():
            self.not_empty.notify()

    @contextlib.contextmanager
    def joinable(self, rows: Sequence[Row]) -> Iterator[None]:
        """While it lasts, texts equal to those of `rows`, which run, are put as their twins."""
        with self.mutex:
            until = self._clock() + JOINABLE_S
            mine = {row.same_as: (row, until) for row in rows}
            self._running.update(mine)
        try:
            yield
        finally:
            with self.mutex:
                for key, value in mine.items():
                    if self._running.get(key) is value:
                        del self._running[key]

    def take_all(self) -> list[Row]:
        """Everything that waits, for a model that cannot serve it."""
        with self.mutex:
            rows = self._remove(range(len(self._waiting))) if self._waiting else []
            rows += itertools.chain.from_iterable(self._returned)
            self._returned.clear()
            self.not_full.notify_all()
            return rows

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
