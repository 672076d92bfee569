"""One step of a replica's thread: a batch is taken from the queue and run, and every item gets its row or its error."""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence

from embedpool import tracing
from embedpool.errors import (
    ClientGone,
    DeadlineExceeded,
    EmbedpoolError,
    InferenceFailed,
    UnsupportedTask,
    UpstreamError,
    forget_frames,
)
from embedpool.pool.model_queue import ModelQueue
from embedpool.pool.planner import Planner, Slots
from embedpool.pool.quarantine import Quarantine
from embedpool.pool.request import Request
from embedpool.pool.stats import ModelStats
from embedpool.tasks.item import Batch, Item
from embedpool.tasks.place import Loss, Place
from embedpool.tasks.rows import Answer, Rows

logger = logging.getLogger(__name__)

LOSSES_FORGIVEN = 2  # of an item: one in a batch with others, and one alone; the next puts it into quarantine


class DriverBroken(Exception):
    """The driver itself is at fault and must be opened anew."""


class DriverLost(DriverBroken):
    """A batch ended the place, which must be opened anew; each item of the batch has its answer, or waits again."""


class Runner:
    """Serves the queue of a model with one open place; up to `facts.slots` threads step it at once.

    `planner` is replaced when the model's spec changes; a thread that plans just then uses the one or the other.
    """

    def __init__(
        self,
        name: str,
        place: Place,
        queue: ModelQueue,
        planner: Planner,
        stats: ModelStats,
        *,
        quarantine: Quarantine,
        slots: Slots,
        max_wait_s: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name = name
        self.place = place
        self.planner = planner
        self._queue = queue
        self._stats = stats
        self._quarantine = quarantine
        self._slots = slots
        self._max_wait_s = max_wait_s
        self._clock = clock

    def step(
        self,
        timeout_s: float | None = 0.0,
        *,
        on_work: Callable[[], None] = lambda: None,
        leaving: Callable[[], bool] = lambda: False,
    ) -> bool | None:
        """Serve one batch of what waits: whether a driver call succeeded.

        None if nothing came within `timeout_s`, or the thread is `leaving`. `on_work` is called after items were taken
        and before they run. On return each item that was taken has its answer, whatever happens, or is in the queue
        again. Raises DriverBroken after that if the driver must be opened anew.
        """
        items = self._queue.take(
            self._plan, timeout_s, enough=self.planner.max_items, max_wait_s=self._max_wait_s, leaving=leaving
        )
        if not items:
            return None
        try:
            on_work()
            items = [item for item in items if self._is_wanted(item) and not self._is_quarantined(item)]
            return self._run(items) if items else False
        except DriverBroken:
            raise
        except Exception as error:
            logger.exception("%s: a batch failed outside its driver", self.name)
            _fail(items, InferenceFailed(f"{self.name}: the batch was given up: {type(error).__name__}"))
            return False
        finally:
            self._slots.end()

    def _plan(self, window: Sequence[Item]) -> Sequence[int]:
        """Called with the queue's lock held."""
        try:
            places = self.planner.choose(window, self._slots.busy_s(), self._slots.count)
            self._slots.begin(self.planner.predicted_s([window[place].tokens for place in places]))
            return places
        except Exception:
            logger.exception("%s: the planner failed; the next item goes alone", self.name)
            return [0]

    # --- what runs at all

    def _is_wanted(self, item: Item) -> bool:
        """Drop what is past its deadline, given up, or without a client, before it costs compute.

        An item that somebody else waits for too goes to the first of its duplicates that is wanted.
        """
        wanted = [equal for equal in (item, *item.duplicates) if self._still_waits(equal.request)]
        if not wanted:
            return False
        if wanted[0] is not item:
            item.request, item.index = wanted[0].request, wanted[0].index
        item.duplicates = wanted[1:]
        return True

    def _still_waits(self, request: Request) -> bool:
        if request.is_done:
            return False
        if request.abandoned or self._clock() >= request.call.deadline:
            request.fail(DeadlineExceeded("the request's deadline passed while its items waited"))
        elif self._client_gone(request):
            request.fail(ClientGone("the client closed its connection"))
        return not request.is_done

    def _client_gone(self, request: Request) -> bool:
        try:
            return request.call.client_gone()
        except Exception:
            logger.exception("%s: asking for the client of a request failed", self.name)
            return False

    def _is_quarantined(self, item: Item) -> bool:
        reason = self._quarantine.reason(item)
        if reason:
            _fail_item(item, f"not tried again for a while, since the model failed on it: {reason}")
        return bool(reason)

    # --- a batch, and who is to blame if it fails

    def _run(self, items: list[Item]) -> bool:
        """Whether a call succeeded. A batch that content may have failed is bisected: only the item at fault fails."""
        try:
            rows = self._call(items)
        except UpstreamError as error:
            if error.content_may_cause and len(items) > 1:
                return self._halve(items)
            _fail(items, error)
        except EmbedpoolError as error:
            _fail(items, error)
        except DriverLost:  # by another batch, while this one waited to be alone: it has not run
            self._queue.put_back(items)
            raise
        except BaseException as error:  # a panic in a Rust library is no Exception
            logger.warning("%s: a batch of %d failed: %s: %s", self.name, len(items), type(error).__name__, error)
            return self._blame(items, error)
        else:
            self._scatter(items, rows)
            return True
        return False

    def _blame(self, items: list[Item], error: BaseException) -> bool:
        fault = self._fault_of_driver()
        if loss := self.place.lost:
            self._hand_back(items, loss)
            raise DriverLost(loss.reason) from error
        if fault:
            _fail(items, InferenceFailed(f"the model failed: {type(error).__name__}: {error}"))
            raise DriverBroken(fault) from error
        if len(items) > 1:
            return self._halve(items)
        _fail_item(items[0], f"the model failed on it: {type(error).__name__}: {error}")
        return False

    def _fault_of_driver(self) -> str | None:
        """What is wrong with it whatever the items are."""
        if not self.place.lost:
            try:
                self.place.probe()
            except BaseException as error:
                return f"{type(error).__name__}: {error}"
        return None

    def _halve(self, items: list[Item]) -> bool:
        middle = len(items) // 2
        try:
            succeeded = self._run(items[:middle])
        except DriverLost:
            self._queue.put_back(items[middle:])
            raise
        except DriverBroken:
            _fail(items[middle:], InferenceFailed("the model failed on another part of the batch"))
            raise
        return self._run(items[middle:]) or succeeded

    def _hand_back(self, items: list[Item], loss: Loss) -> None:
        """Another replica, or this one when it is open again, runs them again: as they were if none can be at fault.

        Otherwise in halves, each as the only batch of its place: only an item that is alone when a place is lost,
        twice, is at fault itself and goes into quarantine.
        """
        if loss.innocent:
            self._queue.put_back(items)
        elif len(items) > 1:
            for item in items:
                item.losses = 1
            middle = len(items) // 2
            self._queue.put_back(items[:middle])
            self._queue.put_back(items[middle:])
        elif items[0].losses < LOSSES_FORGIVEN:
            items[0].losses += 1
            self._queue.put_back(items)
        else:
            self._quarantine.add(items[0], loss.reason)
            _fail_item(items[0], f"the model failed on it: {loss.reason}")

    def _call(self, items: list[Item]) -> Rows:
        """One driver call; its answer checked for count and shape."""
        started = self._clock()
        group, facts = items[0].group, self.place.facts
        if group.task not in facts.tasks:
            raise UnsupportedTask(f"{self.name}: this model cannot {group.task}; it can {', '.join(facts.tasks)}")
        batch = Batch(group.task, items, json.loads(group.options) if group.options else {})
        calls = [request.call for request in {item.request: None for item in items}]
        seen = {"embedpool.replica": self.name, "embedpool.texts": len(items)}
        with (
            self._alone(items),
            self._queue.joinable(items),
            tracing.batch("batch", [call.trace for call in calls], seen, hops=max(call.hops for call in calls)),
        ):
            answer = self.place.run(batch)
        elapsed = self._clock() - started
        if fault := answer.rows.fault(len(items), facts.width):
            raise ValueError(f"the driver gave {fault}")
        for request in {equal.request for item in items for equal in (item, *item.duplicates)}:
            request.ran(self.name, started, elapsed)
        if answer.tokens is not None or answer.truncated:
            _report(items, answer)
        lengths = [item.tokens for item in items]
        self._stats.batch(len(items), sum(lengths), max(lengths) * len(items), elapsed)
        return answer.rows

    @contextlib.contextmanager
    def _alone(self, items: list[Item]) -> Iterator[None]:
        """A batch with which a place was lost runs as the only one of its next; not at all if that is lost too."""
        if not items[0].losses:
            yield
            return
        with self.place.alone():
            if self.place.lost:
                raise DriverLost(self.place.lost.reason)
            yield

    def _scatter(self, items: list[Item], rows: Rows) -> None:
        for row, (item, finite) in enumerate(zip(items, rows.finite().tolist(), strict=True)):
            if not finite:
                _fail_item(item, "the model gave a vector that is not finite")
                continue
            item.request.fill(item.index, rows, row)
            for duplicate in item.duplicates:
                duplicate.request.fill(duplicate.index, rows, row)


def _report(items: list[Item], answer: Answer) -> None:
    """What a remote service says of the items: its token count, shared out by length, and which ones it cut."""
    estimated = sum(item.tokens for item in items) or 1
    truncated = set(answer.truncated)
    for row, item in enumerate(items):
        tokens = (answer.tokens or 0) * item.tokens / estimated
        for equal in (item, *item.duplicates):
            equal.request.note(equal.index, tokens, is_truncated=row in truncated)


def _fail(items: list[Item], error: EmbedpoolError) -> None:
    forget_frames(error)
    for item in items:
        for equal in (item, *item.duplicates):
            equal.request.lose(equal.index, error)


def _fail_item(item: Item, message: str) -> None:
    """Fail the requests of one item, naming it by its place in each."""
    for equal in (item, *item.duplicates):
        task = equal.request.task
        if task.partial:
            equal.request.lose(equal.index, InferenceFailed(message))  # the answer says which
            continue
        where = task.where(equal.index)
        equal.request.lose(equal.index, InferenceFailed(f"{where}: {message}", fields={where: message}))
