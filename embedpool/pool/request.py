"""A request inside the pool: its caller, its items, and the rows that have come back."""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from embedpool.config.spec import ModelSpec
from embedpool.errors import (
    ClientGone,
    DeadlineExceeded,
    EmbedpoolError,
    InferenceFailed,
    UpstreamError,
    forget_frames,
)
from embedpool.tasks.item import Item
from embedpool.tasks.rows import Answer, Rows
from embedpool.tasks.task import Measured, Task
from embedpool.tracing import Trace

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class Call:
    """For whom a request is served, and until when. Made once, in web/submit.py; whatever serves the request reads it.

    `arrived_at` is on the pool's clock. `client_gone()` tells, from any thread, that nobody waits for the answer any
    more.
    """

    arrived_at: float
    timeout_s: float
    age_s: float = 0.0  # when it arrived: since its first byte, which a slow client sends long before its last
    caller: str = ""  # the id of an API key
    weight: float = 1.0  # the caller's part of the machine, beside other callers
    share: float = 1.0  # this request's part of it, beside others of the caller
    is_bulk: bool = False  # of work that nobody waits for, whose requests share a weight of their own
    client_gone: Callable[[], bool] = lambda: False
    require: Callable[[ModelSpec], None] = lambda spec: None  # raises Forbidden for a model that is not for the caller
    # raises AnswerTooLarge for so many numbers, of vectors of this width
    require_room: Callable[[int, int], None] = lambda numbers, width: None
    is_patient: bool = False  # when the queue is full it will ask again, so it has not been refused
    hops: int = 0  # servers of this kind that it has come through
    reads_cache: bool = True
    writes_cache: bool = True
    trace: Trace = dataclasses.field(default_factory=dict)

    @property
    def deadline(self) -> float:
        """On the pool's clock."""
        return self.arrived_at + self.timeout_s - self.age_s


@dataclasses.dataclass(frozen=True, slots=True)
class Result:
    """The result of a request: `rows` in the order of its inputs, in their final form; times are in milliseconds.

    `space` is whose numbers these are, `width` that of the model's own vectors. `errors` holds, by their indices, the
    inputs that failed where the request is partial; their rows mean nothing.
    """

    model: str
    space: str
    rows: Rows
    width: int
    tokens: int
    truncated: list[int]
    measure_ms: float  # spent on token ids, before the queue
    queue_ms: float
    compute_ms: float
    total_ms: float
    replicas: list[str]
    cached: int = 0  # items whose rows had been computed before
    errors: Mapping[int, EmbedpoolError] = dataclasses.field(default_factory=dict)

    @property
    def vectors(self) -> Any:
        """The values of dense rows, of shape (inputs, width)."""
        return self.rows.values


class Known(NamedTuple):
    """A row, and what a remote service said of its input: about how many tokens it has, and whether it truncated it."""

    row: Rows
    tokens: float = 0.0
    is_truncated: bool = False


class Request:
    """A task on its way. It is done once: with a row or an error for every item, or with an error for all of them.

    `waiting` and `left` belong to the queue and are guarded by its lock.
    """

    __slots__ = (
        "_done", "_lock", "_missing", "_pieces", "_rows", "abandoned", "cached", "call", "compute_s", "counted",
        "error", "errors", "is_done", "left", "replicas", "started_at", "task", "tokens", "truncated", "waiting",
    )  # fmt: skip

    def __init__(self, task: Task, call: Call) -> None:
        self.task = task
        self.call = call
        self.abandoned = False  # nobody waits for it any more
        self.is_done = False
        self.error: EmbedpoolError | None = None
        self.errors: dict[int, EmbedpoolError] = {}  # of single inputs, where it goes on without them
        self.started_at = self.compute_s = 0.0
        self.replicas: set[str] = set()
        self.counted = 0.0  # tokens as counted by a remote service
        self.truncated: list[int] = []  # inputs cut before the queue, or by a remote service
        self.waiting = 0  # items in the queue
        self.left = 0.0  # tokens of its items that have not left the queue
        self.tokens = 0  # of all its items that are to be computed
        self.cached = 0  # items whose rows had been computed before
        self._rows: list[Rows | None] = [None] * len(task)  # each alone
        self._pieces: dict[int, list[Rows | None]] = {}  # likewise, of inputs with several items
        self._missing = 0
        # `_lock` guards what replicas' threads write: rows, errors, `is_done` and the sums. It is held for a few
        # instructions, and never while another lock is taken. `_done` is held from the start until the request is
        # done; the request's own thread waits for it, and no one else does.
        self._lock = threading.Lock()
        self._done = threading.Lock()
        self._done.acquire()

    def expect(self, measured: Measured) -> None:
        """Its items are to come back; without any it is done."""
        for item in measured.items:
            item.request = self
        with self._lock:
            self.truncated = measured.truncated
            self.errors.update({i: error.of_input(i, None) for i, error in measured.refused.items()})
            self._missing = len(measured.items)
            if self._missing > len(self._rows) - len(measured.refused):
                items_of = Counter(item.index for item in measured.items)
                self._pieces = {index: [None] * count for index, count in items_of.items() if count > 1}
            self.tokens = sum(item.tokens or 1 for item in measured.items)
            if not self._missing and not self.is_done:
                self._finish()

    def recall(self, item: Item, known: Known) -> None:
        """One of its items is known, which then is not queued."""
        self.cached += 1
        self.tokens -= item.tokens or 1
        if known.tokens or known.is_truncated:
            self.note(item.index, known.tokens, is_truncated=known.is_truncated)
        self.fill(item, known.row)

    def wait(self, timeout_s: float) -> None:
        """Until it is done. Raises its error, and TimeoutError."""
        if not self.is_done:
            if not self._done.acquire(timeout=timeout_s):
                raise TimeoutError
            self._done.release()
        if self.error is not None:
            raise self.error

    def is_wanted(self, now: float) -> bool:
        """Whether somebody waits for it still; if not, it fails with the reason."""
        if not self.is_done and (self.abandoned or now >= self.call.deadline):
            self.fail(DeadlineExceeded("the request's deadline passed while its items waited"))
        elif not self.is_done and self._client_gone():
            self.fail(ClientGone("the client closed its connection"))
        return not self.is_done

    def _client_gone(self) -> bool:
        try:
            return self.call.client_gone()
        except Exception:
            logger.exception("asking for the client of a request failed")
            return False

    def fill(self, item: Item, row: Rows) -> None:
        """The row of an item, alone; the last one completes the request."""
        with self._lock:
            pieces = self._pieces.get(item.index)
            rows, place = (self._rows, item.index) if pieces is None else (pieces, item.piece)
            if item.index in self.errors or rows[place] is not None:
                return
            rows[place] = row
            whole = [piece for piece in pieces if piece is not None] if pieces is not None else []
            if pieces is None or len(whole) < len(pieces):
                self._settle(1)
                return
        merged = self.task.merged(item.index, whole)  # the pieces are let go of as soon as they are all there
        with self._lock:
            self._rows[item.index] = merged
            del self._pieces[item.index]
            self._settle(1)

    def fail_input(self, index: int, error: EmbedpoolError) -> None:
        """An input failed: the request fails, or goes on without it. A second failure of it changes nothing."""
        if not self.task.partial:
            self.fail(error)
            return
        with self._lock:
            missing = sum(row is None for row in self._pieces.get(index, self._rows[index : index + 1]))
            if index not in self.errors and missing:
                self.errors[index] = error
                self._settle(missing)  # its other items change nothing any more

    def _settle(self, items: int) -> None:
        """So many more are not waited for. Called with the lock held."""
        self._missing -= items
        if not self._missing and not self.is_done:
            self._finish()

    def fail(self, error: EmbedpoolError) -> None:
        """It is done, with this error, unless it is done already."""
        with self._lock:
            if not self.is_done:
                self.error = error
                self._finish()

    def ran(self, replica: str, started_at: float, compute_s: float) -> None:
        """Note a batch in which items of this request ran."""
        with self._lock:
            self.started_at = min(self.started_at or started_at, started_at)
            self.compute_s += compute_s
            self.replicas.add(replica)

    def note(self, index: int, tokens: float, *, is_truncated: bool) -> None:
        """Note a remote service's report on an input: the tokens it counted, about, and whether it truncated it."""
        with self._lock:
            self.counted += tokens
            if is_truncated:
                self.truncated.append(index)

    def gather(self) -> Rows:
        """The rows of a request that is done, in order."""
        return Rows.gather(self._rows)

    def _finish(self) -> None:
        """Called with the lock held."""
        self.is_done = True
        self._done.release()


# --- what becomes of the items of a batch, and of their duplicates


def told_of_each(items: list[Item], answer: Answer) -> list[tuple[float, bool]]:
    """What a remote service says of each: its token count, shared out by length, and whether it truncated the input.

    Nothing where it says nothing.
    """
    if answer.tokens is None and not answer.truncated:
        return []
    each = (answer.tokens or 0) / (sum(item.tokens for item in items) or 1)
    return [(each * item.tokens, i in answer.truncated) for i, item in enumerate(items)]


def give(items: list[Item], answer: Answer) -> list[tuple[Item, Known]]:
    """Each gets its row, unless it has an error of its own or a row that is not finite; gives those that got one."""
    given: list[tuple[Item, Known]] = []
    told = told_of_each(items, answer)
    for i, (item, finite) in enumerate(zip(items, answer.rows.finite().tolist(), strict=True)):
        if error := answer.errors.get(i):
            blame(item, for_callers_of(items, error))
            continue
        if not finite:
            blame(item, InferenceFailed("the model gave a vector that is not finite"))
            continue
        row = answer.rows.row(i)
        for equal in item.equals:
            equal.request.fill(equal, row)
        given.append((item, Known(row, *told[i]) if told else Known(row)))
    return given


def fail(items: list[Item], error: EmbedpoolError) -> None:
    """All of them get this error."""
    forget_frames(error)
    for item in items:
        for equal in item.equals:
            equal.request.fail_input(equal.index, error)


def blame(item: Item, error: EmbedpoolError) -> None:
    """An item is at fault: its requests fail, naming it by its place in each, or go on without it."""
    forget_frames(error)
    for equal in item.equals:
        task = equal.request.task  # the answer of a partial one says which
        where = None if task.partial else task.where(equal.index)
        equal.request.fail_input(equal.index, error.of_input(equal.index, where))


def for_callers_of(items: list[Item], error: EmbedpoolError) -> EmbedpoolError:
    """What may be told of a failed call of these: a service's own words only if they are all of one request."""
    if not isinstance(error, UpstreamError) or error.message == error.for_the_log:
        return error
    requests = {equal.request for item in items for equal in item.equals}
    return error.without_words() if len(requests) > 1 else error
