"""The queue of one model: a `queue.Queue` of items, bounded and served in fair order (fair_order.py).

A batch holds the item whose turn it is, and of those waiting behind it the ones that ride along well. A duplicate of an
item that runs already does not wait at all: it shares that one's row.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import queue
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

from embedpool.pool.fair_order import FairOrder
from embedpool.pool.request import Request
from embedpool.tasks.item import Item

WINDOW = 256  # items a batch is planned from, at most
JOINABLE_S = 1.0  # a running batch is joined no longer than this, so that one which hangs gathers nobody

_Entry = tuple[int, Item]  # a number of its own
Plan = Callable[[Sequence[Item]], Sequence[int]]


def work_of(item: Item) -> int:
    """Its share of the machine, in tokens."""
    return item.tokens or 1


def _likeness(request: Request) -> tuple[int, int] | None:
    """Equal for requests of as many texts, whose lengths differ by less than a factor of 8 on the average.

    None for a single text: those are queries, which are to pass documents.
    """
    count = len(request.task)
    return (count, (int(request.left) // count).bit_length() // 3) if count > 1 else None


class QueueClosed(Exception):
    """The model takes no new requests: it was replaced, disabled or removed."""


class ModelQueue(queue.Queue[Item]):
    """`qsize()` and `maxsize` count items.

    All state, and `waiting` and `left` of requests, is guarded by the one lock of `queue.Queue`. Requests' threads
    wait for `not_full` and put, replicas' threads wait for `not_empty` and take. Under the lock nothing waits and no
    other lock is taken but those of the planner's `Slots` and of a driver that tells whether it takes a batch.
    """

    def __init__(
        self,
        max_size: int,
        clock: Callable[[], float] = time.monotonic,
        burst: int = 64,
        most_requests: int = 256,
    ) -> None:
        """`most_requests` may be served at once, and each is to find room for its first item."""
        super().__init__(max_size)
        self._clock = clock
        self._most_requests = most_requests
        self._burst = burst  # items of a request that are put at once: about a batch

    # --- the primitives that queue.Queue lets a subclass redefine

    def _init(self, maxsize: int) -> None:
        self._order = FairOrder()
        self._waiting: dict[Request, dict[int, Item]] = {}  # the items of each, by their numbers, in order
        self._count = 0
        self._equal: dict[bytes, list[_Entry]] = {}  # the same items, by their keys
        self._running: dict[bytes, tuple[Item, float]] = {}  # likewise; joinable until
        self._returned: collections.deque[list[Item]] = collections.deque()  # batches to be run again
        self._returned_last = False  # such a batch was taken last
        self._numbers = itertools.count()
        self._closed = self._stopped = False

    def _qsize(self) -> int:
        return self._count + sum(map(len, self._returned))

    def _put(self, item: Item) -> None:
        request: Request = item.request
        if request not in self._order:
            call = request.call
            request.left = max(request.tokens, work_of(item))
            caller = call.caller, call.is_bulk  # what nobody waits for is a caller of its own
            self._order.enter(request, caller, call.weight, call.share, request.left, alike=_likeness(request))
        if self._joins(item):
            self._order.serve(work_of(item))
            self._is_through(item)
            return
        number = next(self._numbers)
        self._waiting.setdefault(request, {})[number] = item
        self._count += 1
        request.waiting += 1
        self._equal.setdefault(item.key, []).append((number, item))

    def _joins(self, item: Item) -> bool:
        """Whether an equal item runs, of which this one then is a duplicate."""
        running, until = self._running.get(item.key, (None, 0.0))
        if running is None or self._clock() >= until:
            return False
        running.duplicates.append(item)
        return True

    def _get(self) -> Item:
        return self._remove(self._first(1))[0]

    def _first(self, count: int) -> list[_Entry]:
        """So many waiting items, in the order of service."""
        return list(itertools.islice((entry for request in self._order for entry in self._items_of(request)), count))

    def _items_of(self, request: Request) -> Iterable[_Entry]:
        return self._waiting.get(request, {}).items()

    def _remove(self, entries: Sequence[_Entry]) -> list[Item]:
        """Take out these, each with its duplicates wherever they wait."""
        items = []
        work = 0.0
        for _, item in entries:
            equals = self._equal.pop(item.key, None)
            if equals is None:
                continue  # it is a duplicate of one before it
            items.append(item)
            for number, equal in equals:
                if equal is not item:
                    item.duplicates.append(equal)
                self._forget(number, equal)
                work += work_of(equal)
        self._order.serve(work)
        for item in items:
            for equal in item.equals:
                self._is_through(equal)
        return items

    def _forget(self, number: int, item: Item) -> None:
        """It waits no more."""
        request: Request = item.request
        of_request = self._waiting[request]
        del of_request[number]
        if not of_request:
            del self._waiting[request]
        self._count -= 1
        request.waiting -= 1

    def _is_through(self, item: Item) -> None:
        """After its work is done; with its last item a request leaves the order."""
        request: Request = item.request
        request.left -= work_of(item)
        if request.left <= 0 and not request.waiting:
            self._order.leave(request)

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
        if self._count:  # else all of them have joined what runs
            self.not_empty.notify()
        return put

    def _bound(self, *, is_fresh: bool, put: int = 0) -> int:
        """How full the queue may be for the next item of a request, `put` of which have just got in.

        The first item of a fresh request, which had none waiting, may use any room, so that bulk work keeps out no
        query and queries starve no bulk work. For these a place is kept for each request that may be served at once,
        up to half of the queue; the others fill the rest.
        """
        if is_fresh and not put:
            return self.maxsize
        return self.maxsize - min(self._most_requests, self.maxsize // 2)

    def withdraw(self, request: Request) -> None:
        """Nobody waits for a request any more: its items make room."""
        with self.mutex:
            for number, item in list(self._items_of(request)):
                equals = [entry for entry in self._equal.pop(item.key) if entry[0] != number]
                if equals:
                    self._equal[item.key] = equals
                self._forget(number, item)
            self._order.withdraw(request)
            for batch in list(self._returned):
                batch[:] = [item for item in batch if any(e.request is not request for e in item.equals)]
                if not batch:
                    self._returned.remove(batch)
            self.not_full.notify_all()

    def requests(self) -> set[Request]:
        """Those that have items here."""
        with self.mutex:
            returned = itertools.chain.from_iterable(self._returned)
            return {*self._waiting, *(equal.request for item in returned for equal in item.equals)}

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

        `plan_under_lock` is given the first WINDOW items in the order of service and names places in it, ascending;
        requests wait to get in until it returns. Waits up to `timeout_s` (None: until woken)
        for an item and up to `max_wait_s` for `enough` of them. [] means that nothing came, or that `wake()` was
        called. `leaving()` is asked under the lock: a `wake()` after it turned true is not missed.
        """
        with self.mutex:
            if not self._qsize() and not leaving():
                self.not_empty.wait(timeout_s)
            if leaving():
                self.not_empty.notify()  # what woke this thread is for another
                return []
            if self._returned and not (self._returned_last and self._count):
                self._returned_last = True
                items = self._returned.popleft()
                self._let_others_on()
                return items
            self._returned_last = False
            if self._count and max_wait_s:
                until = self._clock() + max_wait_s
                while 0 < self._count < enough and (remaining := until - self._clock()) > 0:
                    self.not_empty.wait(remaining)
            if not self._count:
                return []
            window = self._first(WINDOW)
            items = self._remove([window[place] for place in plan_under_lock([item for _, item in window])])
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
            items = self._remove(self._first(self._count))
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
