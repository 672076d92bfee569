"""A job: a run of texts of one request that fits a batch. A request is a flow of jobs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator, Sequence

import numpy as np

from embedpool.errors import EmbedpoolError
from embedpool.pool.request import Vectors
from embedpool.tracing import Trace

Ids = Sequence[int]  # token ids of one text, special tokens included


class Flow:
    """What the jobs of one request share. `finish` and `waiting` belong to the queue and its lock."""

    __slots__ = (
        "_lock", "abandoned", "client_gone", "compute_s", "deadline", "error", "finish", "hops", "jobs", "partial",
        "replicas", "started_at", "trace", "waiting", "weight",
    )  # fmt: skip

    def __init__(
        self,
        deadline: float,
        weight: float,
        client_gone: Callable[[], bool],
        *,
        partial: bool = False,
        trace: Trace | None = None,
        hops: int = 0,
    ) -> None:
        self.deadline = deadline
        self.weight = weight
        self.client_gone = client_gone
        self.partial = partial  # a text that fails takes no other with it
        self.trace = trace or {}
        self.hops = hops
        self.abandoned = False
        self.jobs: list[Job] = []
        self.error: EmbedpoolError | None = None  # the first one; no further job is worth computing
        self.started_at = self.compute_s = 0.0
        self.replicas: set[str] = set()
        self.finish = 0.0
        self.waiting = 0
        self._lock = threading.Lock()

    def ran(self, replica: str, started_at: float, compute_s: float) -> None:
        """Note a batch in which texts of this request ran."""
        with self._lock:
            self.started_at = min(self.started_at or started_at, started_at)
            self.compute_s += compute_s
            self.replicas.add(replica)


class Job:
    """Texts `offset` … `offset + len(texts)` of a request, on their way to `vectors`.

    `tokens` counts each text (estimated for remote models, whose `ids` are None). Only texts of equal `group` may share
    a batch; those of equal text and `variant` have equal vectors. Several workers may fill a job at once, row by row;
    it is done once, with its vectors or an error.
    """

    __slots__ = (
        "_lock", "_missing", "_pending", "_settled", "counted", "error", "flow", "group", "ids", "is_done", "lost",
        "offset", "texts", "tokens", "truncated", "variant", "vectors",
    )  # fmt: skip

    def __init__(
        self,
        flow: Flow,
        texts: Sequence[str],
        ids: Sequence[Ids] | None,
        tokens: Sequence[int],
        *,
        offset: int = 0,
        group: str | None = None,
        variant: Hashable = None,
    ) -> None:
        self.flow = flow
        self.texts = texts
        self.ids = ids
        self.tokens = tokens
        self.offset = offset
        self.group = group
        self.variant = variant
        self.is_done = False
        self.error: EmbedpoolError | None = None
        self.vectors: Vectors | None = None
        self.counted = 0.0  # tokens as counted by a remote service
        self.truncated: list[int] = []  # rows cut by a remote service
        self.lost: dict[int, EmbedpoolError] = {}  # rows that failed, where the request goes on without them
        self._missing = len(texts)
        self._settled = bytearray(len(texts))  # which rows are filled or lost
        self._lock = threading.Lock()
        self._pending = threading.Lock()  # held until it is done
        self._pending.acquire()

    def __len__(self) -> int:
        return len(self.texts)

    def wait(self, timeout_s: float) -> None:
        """Until it is done. Raises its error, and TimeoutError."""
        if not self.is_done:
            if not self._pending.acquire(timeout=timeout_s):
                raise TimeoutError
            self._pending.release()
        if self.error is not None:
            raise self.error

    def fill(self, row: int, vector: Vectors) -> None:
        """Place one vector; the last one completes the job."""
        with self._lock:
            if self.vectors is None:
                self.vectors = np.empty((len(self.texts), vector.shape[0]), dtype=np.float32)
            if not self._settled[row]:
                self.vectors[row] = vector
                self._settle(row)

    def lose(self, row: int, error: EmbedpoolError) -> None:
        """A text failed: its request fails, or goes on without it. Saying so twice is saying it once."""
        if not self.flow.partial:
            self.fail(error)
            return
        with self._lock:
            if not self._settled[row]:
                self.lost[row] = error
                self._settle(row)

    def fail(self, error: EmbedpoolError) -> None:
        """It is done, with this error, unless it is done already."""
        with self._lock:
            if not self.is_done:
                self.error = error
                self.flow.error = self.flow.error or error
                self._finish()

    def _settle(self, row: int) -> None:
        """With the lock held."""
        self._settled[row] = 1
        self._missing -= 1
        if not self._missing and not self.is_done:
            self._finish()

    def _finish(self) -> None:
        """With the lock held."""
        self.is_done = True
        self._pending.release()


class Row:
    """Text number `at` of a job, as it waits and travels in a batch. `twins` are equal rows that share its vector.

    `losses` is 1 once a driver was lost in a batch with it, and more by each time it was alone then.
    """

    __slots__ = ("at", "job", "losses", "tokens", "twins")

    def __init__(self, job: Job, at: int) -> None:
        self.job = job
        self.at = at
        self.tokens = job.tokens[at]
        self.twins: list[Row] = []
        self.losses = 0

    @property
    def text(self) -> str:
        """The text itself."""
        return self.job.texts[self.at]

    @property
    def ids(self) -> Ids | None:
        """Its token ids."""
        return None if self.job.ids is None else self.job.ids[self.at]

    @property
    def same_as(self) -> Hashable:
        """Equal for rows that have equal vectors."""
        return self.text, self.job.group, self.job.variant


def split(
    flow: Flow,
    texts: Sequence[str],
    ids: Sequence[Ids] | None,
    tokens: Sequence[int],
    *,
    group: str | None,
    variant: Hashable = None,
    max_texts: int,
    max_tokens: int,
) -> Iterator[Job]:
    """The texts of a request as jobs in order, each within `max_texts` and, where it has two, `max_tokens`."""

    def run(start: int, end: int) -> Job:
        part = slice(start, end)
        own_ids = ids[part] if ids is not None else None
        return Job(flow, texts[part], own_ids, tokens[part], offset=start, group=group, variant=variant)

    start = total = 0
    for end, count in enumerate(tokens):
        if end > start and (end - start >= max_texts or total + count > max_tokens):
            yield run(start, end)
            start, total = end, 0
        total += count
    yield run(start, len(texts))
