"""A job: a run of texts of one request that fits a batch. A request is a flow of jobs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, InvalidStateError
from typing import NamedTuple

import numpy as np

from embedpool.errors import EmbedpoolError
from embedpool.pool.request import Vectors

Ids = Sequence[int]  # token ids of one text, special tokens included


class Flow:
    """What the jobs of one request share. `finish` and `waiting` belong to the queue and its lock."""

    __slots__ = ("abandoned", "client_gone", "deadline", "error", "finish", "jobs", "waiting", "weight")

    def __init__(self, deadline: float, weight: float, client_gone: Callable[[], bool]) -> None:
        self.deadline = deadline
        self.weight = weight
        self.client_gone = client_gone
        self.abandoned = False
        self.jobs: list[Job] = []
        self.error: EmbedpoolError | None = None  # the first one; no further job is worth computing
        self.finish = 0.0
        self.waiting = 0


class Job:
    """Texts `offset` … `offset + len(texts)` of a request, on their way to `future`.

    `tokens` counts each text (estimated for remote models, whose `ids` are None). Only jobs with equal `group` may
    share a batch. The worker that takes a job fills it row by row; the future resolves once, with the job or an error.
    """

    __slots__ = (
        "_missing", "compute_s", "counted", "flow", "future", "group", "ids", "offset", "queued_at", "replica",
        "started_at", "texts", "tokens", "truncated", "vectors",
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
    ) -> None:
        self.flow = flow
        self.texts = texts
        self.ids = ids
        self.tokens = tokens
        self.offset = offset
        self.group = group
        self.future: Future[Job] = Future()
        self.vectors: Vectors | None = None
        self.queued_at = self.started_at = self.compute_s = 0.0
        self.replica = ""
        self.counted = 0.0  # tokens as counted by a remote service
        self.truncated: list[int] = []  # rows cut by a remote service
        self._missing = len(texts)

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def cost(self) -> float:
        """What the queue's fair order charges for this job."""
        return sum(self.tokens) or 1

    def fill(self, row: int, vector: Vectors) -> None:
        """Place one vector; the last one resolves the future."""
        if self.vectors is None:
            self.vectors = np.empty((len(self.texts), vector.shape[0]), dtype=np.float32)
        self.vectors[row] = vector
        self._missing -= 1
        if not self._missing:
            with contextlib.suppress(InvalidStateError):  # given up in this very moment
                self.future.set_result(self)

    def fail(self, error: EmbedpoolError) -> None:
        """Resolve the future with an error, unless it is resolved."""
        if not self.future.done() and self.flow.error is None:
            self.flow.error = error
        with contextlib.suppress(InvalidStateError):
            self.future.set_exception(error)


class Row(NamedTuple):
    """Text number `at` of a job, as it travels in a batch."""

    job: Job
    at: int

    @property
    def text(self) -> str:
        """The text itself."""
        return self.job.texts[self.at]

    @property
    def tokens(self) -> int:
        """Its token count."""
        return self.job.tokens[self.at]


def split(
    flow: Flow,
    texts: Sequence[str],
    ids: Sequence[Ids] | None,
    tokens: Sequence[int],
    *,
    group: str | None,
    max_texts: int,
    max_tokens: int,
) -> Iterator[Job]:
    """The texts of a request as jobs in order, each within `max_texts` and, where it has two, `max_tokens`."""

    def run(start: int, end: int) -> Job:
        part = slice(start, end)
        own_ids = ids[part] if ids is not None else None
        return Job(flow, texts[part], own_ids, tokens[part], offset=start, group=group)

    start = total = 0
    for end, count in enumerate(tokens):
        if end > start and (end - start >= max_texts or total + count > max_tokens):
            yield run(start, end)
            start, total = end, 0
        total += count
    yield run(start, len(texts))
