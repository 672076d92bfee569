"""Run a batch in a place, give every item its row or its error, and find the item at fault by bisection."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from embedpool import tracing
from embedpool.bounds import CallBudget
from embedpool.errors import EmbedpoolError, InferenceFailed, UnsupportedTask, UpstreamError, for_the_log
from embedpool.pool.model_queue import ModelQueue
from embedpool.pool.quarantine import Quarantine
from embedpool.pool.request import Known, blame, fail, for_callers_of, give, told_of_each
from embedpool.pool.stats import ModelStats
from embedpool.tasks.driver import PROBE_TEXT, Loss, Place, call_tokens
from embedpool.tasks.item import Batch, Group, Item
from embedpool.tasks.rows import Answer
from embedpool.tasks.task import kinds_of

logger = logging.getLogger(__name__)

LOSSES_SPARED = 3  # in which a batch is believed to have had no part; then it is bisected, as any other
MOST_POSTPONED = 6  # refusals of one batch and its halves while others are answered; then it is the item
LOSSES_FORGIVEN = 2  # an item with so many losses goes into quarantine at its next: it was alone for the last two
SEARCH_SHARE, SEARCH_RESERVE = 0.5, 200.0  # calls; a text among 64 costs 12


class DriverBroken(Exception):
    """The driver itself is at fault and must be opened anew."""


class DriverLost(DriverBroken):
    """A batch ended the place, which must be opened anew; each item of the batch has its answer, or waits again."""


@dataclasses.dataclass
class Runner:
    """Runs batches of a model in one open place; up to `facts.slots` threads at once."""

    name: str
    place: Place
    queue: ModelQueue
    quarantine: Quarantine
    stats: ModelStats
    clock: Callable[[], float]
    keep: Callable[[Sequence[tuple[Item, Known]]], None] = lambda given: None  # rows that may be asked for again

    def __post_init__(self) -> None:
        self._searches = CallBudget(SEARCH_SHARE, SEARCH_RESERVE)
        self._answered = 0  # calls; about, since several threads count

    def run(self, items: list[Item], on_work: Callable[[], None] = lambda: None) -> bool:
        """Run what was taken from the queue, after `on_work`: whether a driver call succeeded.

        On return each item has its answer, whatever happens, or is in the queue again. Raises DriverBroken after that
        if the driver must be opened anew.
        """
        try:
            on_work()
            items = [item for item in items if self._is_to_run(item)]
            return self._run(items) if items else False
        except DriverBroken:
            raise
        except Exception as error:
            logger.exception("%s: a batch failed outside its driver", self.name)
            fail(items, InferenceFailed(f"{self.name}: the batch was given up: {type(error).__name__}"))
            return False

    def _is_to_run(self, item: Item) -> bool:
        """Drop an item before it costs compute if nobody waits for it or if it is in quarantine.

        An item that somebody else waits for too goes to the first of its duplicates that is wanted.
        """
        now = self.clock()
        wanted = [equal for equal in item.equals if equal.request.is_wanted(now)]
        if not wanted:
            return False
        first, *item.duplicates = wanted
        item.request, item.index, item.piece = first.request, first.index, first.piece
        if reason := self.quarantine.reason(item):
            blame(item, InferenceFailed(f"not tried again for a while, since the model failed on it: {reason}"))
        return not reason

    # --- who is at fault if it fails

    def _run(self, items: list[Item]) -> bool:
        """Whether a call succeeded. A batch that content may have failed is bisected: only the item at fault fails."""
        try:
            return self._attempt(items)
        except UpstreamError as error:
            if error.content_may_cause:
                return self._search(items, error)
            self._refuse(items, error)
            return False

    def _attempt(self, items: list[Item], *, is_search: bool = False) -> bool:
        """As `_run`. Raises UpstreamError, after which the items have no answer."""
        try:
            answer = self._call(items, is_search=is_search)
        except UpstreamError:
            raise
        except EmbedpoolError as error:
            fail(items, error)
        except DriverLost:  # by another batch, while this one waited to be alone: it has not run
            self.queue.put_back(items)
            raise
        except BaseException as error:  # a panic in a Rust library is no Exception
            logger.warning("%s: a batch of %d failed: %s: %s", self.name, len(items), type(error).__name__, error)
            return self._after_failure(items, error)
        else:
            self._answered += 1
            self.keep(give(items, answer))
            return True
        return False

    def _search(self, items: list[Item], error: UpstreamError) -> bool:
        """Find the items that a remote service fails on, by halving; as soon as it fails on all, the rest fails as one.

        Whether a call succeeded.
        """
        left: list[list[Item]] = []
        succeeded = False
        try:
            left = self._suspects(items, error, is_known=False)
            while left:
                items = [item for item in left.pop() if self._is_to_run(item)]  # a search may take long
                if not items:
                    continue
                if not self._searches.spend():
                    raise error.without_words()
                try:
                    if self._attempt(items, is_search=True):
                        succeeded = True
                        self._searches.refund()  # these would have been called for anyway
                except UpstreamError as found:
                    left += self._suspects(items, found, is_known=True)
        except UpstreamError as last:
            of_one = last.without_words() if left else last
            self._refuse([*items, *itertools.chain.from_iterable(left)], of_one)
        except DriverBroken:
            self.queue.put_back(list(itertools.chain.from_iterable(left)))
            raise
        return succeeded

    def _suspects(self, items: list[Item], error: UpstreamError, *, is_known: bool) -> list[list[Item]]:
        """The parts of a batch that failed among which further items at fault may be; one that is found gets its error.

        `is_known` says that the service has lately served others. Raises UpstreamError if no item is at fault.
        """
        said = for_callers_of(items, error)
        if named := [item for row, item in enumerate(items) if row in error.rows]:
            for item in named:
                blame(item, said)
            return [others] if (others := [item for item in items if item not in named]) else []
        if not error.content_may_cause:
            raise error
        is_alone = len(items) == 1
        if is_alone and not is_known and len(items[0].request.task) == 1:
            raise error  # its only input: nobody asks which
        if is_alone and is_known and not self._searches.spend():
            raise error.without_words()
        if is_alone or not is_known:
            self._require_the_probe(items[0].group, error)
        if is_alone:
            blame(items[0], said)
            return []
        return _halves(items)[::-1]  # the first is looked at first

    def _require_the_probe(self, group: Group, error: UpstreamError) -> None:
        """Raise the error unless the service takes a known text with the same options: then an item is at fault.

        If it is busy, that is raised.
        """
        probe = Batch(group.task, [Item((PROBE_TEXT,), 0)], _options_of(group))
        try:
            answer = self.place.run(probe)
            if answer.errors or not answer.rows.finite().all():
                raise error
        except Exception as fault:
            says = "%s: no text of the batch is at fault: a known one fails, too: %s"
            logger.info(says, self.name, type(fault).__name__)
            raise fault if isinstance(fault, UpstreamError) and fault.is_busy else error from None

    def _refuse(self, items: list[Item], error: UpstreamError) -> None:
        """Let a busy service rest, and try again; else they all fail."""
        if error.is_busy:
            self._postpone(items, error)
        else:
            fail(items, for_callers_of(items, error))

    def _postpone(self, items: list[Item], error: UpstreamError) -> None:
        """The service asks for a pause. These items run after it; a request that cannot wait so long fails now.

        A batch that is refused again, while the service answers others, comes back in halves: it may be too large, or
        one of its items is the cause. One that is alone then gets the error.
        """
        rest_s = self.place.rest_s()
        until = self.clock() + rest_s
        mine = {equal.request for item in items for equal in item.equals}
        for request in mine | self.queue.requests():
            if request.call.deadline <= until:
                request.fail(error.after_s(rest_s) if mine == {request} else error.after_s(rest_s).without_words())
        for item in items:
            if self._answered > item.answered or not item.postponed:
                item.postponed, item.answered = item.postponed + 1, self._answered
        if len(items) == 1 and items[0].postponed > MOST_POSTPONED:
            blame(items[0], for_callers_of(items, error.after_s(rest_s)))
        items = [item for item in items if self._is_to_run(item)]
        parts = _halves(items) if items and items[0].postponed > 1 else [items]
        for part in filter(None, parts):
            self.queue.put_back(part)

    def _after_failure(self, items: list[Item], error: BaseException) -> bool:
        """Hand the batch back if the place is lost, fail it if the driver fails at its probe too, else bisect it."""
        fault, says = None, f"{type(error).__name__}: {error}"
        try:
            if not self.place.lost:
                self.place.probe()
        except BaseException as failed:
            fault = f"{type(failed).__name__}: {for_the_log(failed)}"
        if loss := self.place.lost:
            self._hand_back(items, loss)
            raise DriverLost(loss.reason) from error
        if fault:
            fail(items, InferenceFailed(f"the model failed: {says}"))
            raise DriverBroken(fault) from error
        if len(items) > 1:
            return self._halve(items)
        blame(items[0], InferenceFailed(f"the model failed on it: {says}"))
        return False

    def _halve(self, items: list[Item]) -> bool:
        first, second = _halves(items)
        try:
            succeeded = self._run(first)
        except DriverLost:
            self.queue.put_back(second)
            raise
        except DriverBroken:
            fail(second, InferenceFailed("the model failed on another part of the batch"))
            raise
        return self._run(second) or succeeded

    def _hand_back(self, items: list[Item], loss: Loss) -> None:
        """Another replica, or this one when it is open again, runs them again: as they were if none can be at fault.

        Otherwise in halves, each as the only batch of its place: only an item that is alone when a place is lost,
        twice, is at fault itself and goes into quarantine. A loss that seems innocent is believed to be so a few times
        only, since an item that ends its whole machine looks innocent; one that was announced, until the deadline.
        """
        if loss.announced:
            self.queue.put_back(items)
        elif loss.innocent and items[0].spared < LOSSES_SPARED:
            for item in items:
                item.spared += 1
            self.queue.put_back(items)
        elif len(items) > 1:
            for item in items:
                item.losses = 1
            for half in _halves(items):
                self.queue.put_back(half)
        elif items[0].losses < LOSSES_FORGIVEN:
            items[0].losses += 1
            self.queue.put_back(items)
        else:
            self.quarantine.add(items[0], loss.reason)
            blame(items[0], InferenceFailed(f"the model failed on it: {loss.reason}"))

    # --- the call

    def _call(self, items: list[Item], *, is_search: bool = False) -> Answer:
        """One driver call; its answer checked for count and shape."""
        started = self.clock()
        group, facts = items[0].group, self.place.facts
        if group.task not in facts.tasks:
            able = ", ".join(kinds_of(facts.tasks))
            raise UnsupportedTask(f"{self.name}: this model cannot {group.task}; it can {able}")
        batch = Batch(group.task, items, _options_of(group), is_search)
        if not is_search:
            self._searches.earn()
        calls = [request.call for request in {item.request: None for item in items}]
        seen = {"embedpool.replica": self.name, "embedpool.texts": len(items)}
        passed_on = tracing.batch(
            "batch",
            [call.trace for call in calls],
            seen,
            hops=max(call.hops for call in calls),
            no_store=not all(call.writes_cache for call in calls),
        )
        with self._alone(items), self.queue.joinable(items), passed_on:
            answer = self.place.run(batch)
        elapsed_s = self.clock() - started
        if fault := answer.rows.fault(len(items), facts.tasks[group.task]):
            raise ValueError(f"the driver gave {fault}")
        lengths = [item.tokens for item in items]
        self._note(items, answer, started, elapsed_s)
        self.stats.batch(len(items), sum(lengths), call_tokens(lengths, pads=facts.pads), elapsed_s)
        return answer

    def _note(self, items: list[Item], answer: Answer, started: float, elapsed_s: float) -> None:
        """Tell the requests of the batch, and what a remote service says."""
        for request in {equal.request for item in items for equal in item.equals}:
            request.ran(self.name, started, elapsed_s)
        for item, (tokens, is_truncated) in zip(items, told_of_each(items, answer), strict=False):
            for equal in item.equals:
                equal.request.note(equal.index, tokens, is_truncated=is_truncated)

    @contextlib.contextmanager
    def _alone(self, items: list[Item]) -> Iterator[None]:
        """A batch that was running when a place was lost runs with no other beside it.

        It does not run if this place is lost, too, while it waits for that.
        """
        if not items[0].losses:
            yield
            return
        with self.place.alone():
            if self.place.lost:
                raise DriverLost(self.place.lost.reason)
            yield


def _halves(items: list[Item]) -> list[list[Item]]:
    middle = len(items) // 2
    return [items[:middle], items[middle:]]


def _options_of(group: Group) -> dict[str, Any]:
    return json.loads(group.options) if group.options else {}
