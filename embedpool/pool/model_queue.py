"""The queue of one model: a `queue.Queue` of items, bounded and served in fair order.

Start-time fair queueing, item by item: an item starts at max(v, its request's last finish) and finishes its tokens ÷
weight later, where v is the largest start of an item whose turn it was; the smallest start comes first. So a one-text
query overtakes the rest of a 10,000-text request and nothing starves. A batch holds the item whose turn it is, and of
those waiting behind it the ones that ride along well; riding along moves nobody else's turn. A duplicate of an item
that runs already does not wait at all: it shares that one's row.
"""

from __future__ import annotations

import bisect
import collections
import contextlib
import itertools
import queue
import time
from collections.abc import Callable, Iterator, Sequence

from embedpool.pool.request import Request
from embedpool.tasks.item import Item

WINDOW = 256  # items a batch is planned from
JOINABLE_S = 1.0  # a running batch is joined no longer than this, so that one which hangs gathers nobody

_Entry = tuple[float, int, Item]  # start, sequence; no two entries are alike in these
Plan = Callable[[Sequence[Item]], Sequence[int]]


class QueueClosed(Exception):
    """The model takes no new requests: it was replaced, disabled or removed."""


class ModelQueue(queue.Queue[Item]):
    """`qsize()` and `maxsize` count items.

    All state, and `waiting` and `finish` of requests, is guarded by the one lock of `queue.Queue`. Requests' threads
    wait for `not_full` and put, replicas' threads wait for `not_empty` and take. Under the lock nothing waits and no
    other lock is taken but those of the planner's `Slots`.
    """

    def __init__(self, max_size: int, clock: Callable[[], float] = time.monotonic, burst: int = 64) -> None:
        super().__init__(max_size)
        self._clock = clock
        self._burst = burst  # items of a request that are put at once: about a batch

    # --- the primitives that queue.Queue lets a subclass redefine

    def _init(self, maxsize: int) -> None:
        self._waiting: list[_Entry] = []  # in the order of service
        self._equal: dict[bytes, list[_Entry]] = {}  # the same entries, by their items' keys
        self._running: dict[bytes, tuple[Item, float]] = {}  # likewise; joinable until
        self._returned: collections.deque[list[Item]] = collections.deque()  # batches to be run again
        self._returned_last = False  # such a batch was taken last
        self._sequence = itertools.count()
        self._virtual_time = 0.0
        self._closed = self._stopped = False

    def _qsize(self) -> int:
        return len(self._waiting) + sum(map(len, self._returned))

    def _put(self, item: Item) -> None:
        if self._joins(item):
            return
        request: Request = item.request
        request.waiting += 1
        start = max(self._virtual_time, request.finish)
        request.finish = start + (item.tokens or 1) / request.call.weight
        entry = (start, next(self._sequence), item)
        if self._waiting and entry < self._waiting[-1]:
            bisect.insort(self._waiting, entry)
        else:
            self._waiting.append(entry)
        self._equal.setdefault(item.key, []).append(entry)

    def _joins(self, item: Item) -> bool:
        """Whether an equal item runs, of which this one then is a duplicate."""
        running, until = self._running.get(item.key, (None, 0.0))
        if running is None or self._clock() >= until:
            return False
        running.duplicates.append(item)
        return True

    def _get(self) -> Item:
        return self._remove([0])[0]

    def _remove(self, places: Sequence[int]) -> list[Item]:
        """Take out the entries at these places, ascending, each with its duplicates wherever they wait."""
        self._virtual_time = max(self._virtual_time, self._waiting[0][0])
        taken = [self._waiting[place] for place in places]
        numbers = {entry[1] for entry in taken}
        for place in reversed(places):
            del self._waiting[place]
        items = []
        for entry in taken:
            item = entry[2]
            equals = self._equal.pop(item.key, None)
            if equals is None:
                continue  # it is a duplicate of one before it
            items.append(item)
            for other in equals:
                other[2].request.waiting -= 1
                if other is not entry:
                    item.duplicates.append(other[2])
                    if other[1] not in numbers:
                        del self._waiting[bisect.bisect_left(self._waiting, other)]
        return items

    # --- the pool's two ways in and one way out

    def admit(self, items: Sequence[Item]) -> int:
        """Put the first items of a request, a burst or as many as there is room for; how many that were.

        Raises `queue.Full` if there is no room for one of them, QueueClosed.
        """
        with self.mutex:
            if self._closed:
                raise QueueClosed
            return self._put_some(items)

    def feed(self, items: Sequence[Item], timeout_s: float) -> int:
        """Put further items of an admitted request, at least one of them, as room appears; how many that were.

        Raises `queue.Full` after `timeout_s`, QueueClosed after `stop()`.
        """
        deadline = self._clock() + timeout_s
        with self.mutex:
            request = items[0].request
            while not self._stopped and self._qsize() >= self._bound(is_fresh=not request.waiting):
                remaining = deadline - self._clock()
                if remaining <= 0:
                    raise queue.Full
                self.not_full.wait(remaining)
            if self._stopped:
                raise QueueClosed
            return self._put_some(items)

    def _put_some(self, items: Sequence[Item]) -> int:
        is_fresh = not items[0].request.waiting
        put = 0
        for item in items[: self._burst]:
            if self._qsize() >= self._bound(is_fresh=is_fresh, put=put):
                break
            self._put(item)
            put += 1
        if not put:
            raise queue.Full
        if self._waiting:  # else all of them have joined what runs
            self.not_empty.notify()
        return put

    def _bound(self, *, is_fresh: bool, put: int = 0) -> int:
        """How full the queue may be for the next item of a request, `put` of which have just got in.

        The first item of a fresh request, which had none waiting, may use any room, so that bulk work keeps out no
        query and queries starve no bulk work. The burst behind it may fill three quarters of the queue, all else half.
        """
        if not is_fresh:
            return self.maxsize // 2
        return self.maxsize - self.maxsize // 4 if put else self.maxsize

    def put_back(self, items: Sequence[Item]) -> None:
        """Let items that were taken run again, as a batch of their own. The queue may be full by now.

        `take` alternates between such batches and what waits, so one that is lost again and again starves nobody.
        """
        with self.mutex:
            self._returned.append(list(items))
            self.not_empty.notify()

    def take(
        self,
        plan_under_lock: Plan,
        timeout_s: float | None,
        *,
        enough: int = 1,
        max_wait_s: float = 0.0,
        leaving: Callable[[], bool] = lambda: False,
    ) -> list[Item]:
        """The items of one batch, each with its duplicates.

        `plan_under_lock` is given the first WINDOW items in the order of service and names places in it, ascending, the
        first one's among them; requests wait to get in until it returns. Waits up to `timeout_s` (None: until woken)
        for an item and up to `max_wait_s` for `enough` of them. [] means that nothing came, or that `wake()` was
        called. `leaving()` is asked under the lock: a `wake()` after it turned true is not missed.
        """
        with self.mutex:
            if not self._qsize() and not leaving():
                self.not_empty.wait(timeout_s)
            if leaving():
                self.not_empty.notify()  # what woke this thread is for another
                return []
            if self._returned and not (self._returned_last and self._waiting):
                self._returned_last = True
                items = self._returned.popleft()
                self._let_others_on()
                return items
            self._returned_last = False
            if self._waiting and max_wait_s:
                until = self._clock() + max_wait_s
                while 0 < len(self._waiting) < enough and (remaining := until - self._clock()) > 0:
                    self.not_empty.wait(remaining)
            if not self._waiting:
                return []
            items = self._remove(plan_under_lock([entry[2] for entry in self._waiting[:WINDOW]]))
            self._let_others_on()
            return items

    def _let_others_on(self) -> None:
        """There is room, and perhaps more work."""
        self.not_full.notify_all()
        if self._qsize():
            self.not_empty.notify()

    @contextlib.contextmanager
    def joinable(self, items: Sequence[Item]) -> Iterator[None]:
        """While it lasts, items equal to these, which run, become their duplicates instead of waiting."""
        with self.mutex:
            until = self._clock() + JOINABLE_S
            mine = {item.key: (item, until) for item in items}
            self._running.update(mine)
        try:
            yield
        finally:
            with self.mutex:
                for key, value in mine.items():
                    if self._running.get(key) is value:
                        del self._running[key]

    def take_all(self) -> list[Item]:
        """Everything that waits, for a model that cannot serve it."""
        with self.mutex:
            items = self._remove(range(len(self._waiting))) if self._waiting else []
            items += itertools.chain.from_iterable(self._returned)
            self._returned.clear()
            self.not_full.notify_all()
            return items

    # --- control

    @property
    def is_closed(self) -> bool:
        """Whether no new request is admitted."""
        return self._closed

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
        """Let every waiting `take` return, so that its thread looks around."""
        with self.mutex:
            self.not_empty.notify_all()
