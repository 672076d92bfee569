"""The thread of one replica: `run()` is a loop around `step()`."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from embedpool.errors import ClientGone, DeadlineExceeded, EmbedpoolError, InferenceFailed, UpstreamError
from embedpool.pool.batcher import Batcher
from embedpool.pool.job import Job, Row
from embedpool.pool.model_queue import ModelQueue
from embedpool.pool.request import Vectors
from embedpool.pool.stats import ModelStats

if TYPE_CHECKING:
    from embedpool.drivers.base import Driver

logger = logging.getLogger(__name__)


class DriverBroken(Exception):
    """The driver itself is at fault and must be opened anew."""


class Worker:
    """Takes what waits, makes batches, runs them in one driver. Used by one thread at a time."""

    def __init__(
        self,
        name: str,
        driver: Driver,
        queue: ModelQueue,
        batcher: Batcher,
        stats: ModelStats,
        *,
        max_wait_s: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name = name
        self._driver = driver
        self._queue = queue
        self._batcher = batcher
        self._stats = stats
        self._max_wait_s = max_wait_s
        self._clock = clock
        self.successes = 0  # driver calls

    def step(
        self,
        timeout_s: float | None = 0.0,
        *,
        on_work: Callable[[], None] = lambda: None,
        leaving: Callable[[], bool] = lambda: False,
    ) -> bool:
        """Serve one round of waiting jobs; False if none came within `timeout_s`, or the worker is `leaving`.

        `on_work` is called after jobs were taken and before they run. Every future of a taken job is resolved on
        return, whatever happens. Raises DriverBroken after that if the driver must be opened anew.
        """
        jobs = self._queue.take(self._batcher.max_texts, timeout_s, max_wait_s=self._max_wait_s, leaving=leaving)
        if not jobs:
            return False
        try:
            on_work()
            for batch in self._batcher.plan([job for job in jobs if self._is_wanted(job)]):
                if rows := [row for row in batch if self._is_wanted(row.job)]:
                    self._run(rows)
        except DriverBroken:
            raise
        except Exception:
            logger.exception("%s: a batch failed outside its driver", self.name)
        finally:
            for job in jobs:
                job.fail(InferenceFailed(f"{self.name}: the batch was given up"))
        return True

    def _is_wanted(self, job: Job) -> bool:
        """Drop what is past its deadline, given up, or without a client, before it costs compute."""
        if job.future.done():
            return False
        if job.flow.error is not None:
            job.fail(job.flow.error)
        elif job.flow.abandoned or self._clock() >= job.flow.deadline:
            job.fail(DeadlineExceeded("the request's deadline passed while its texts waited"))
        elif self._client_gone(job):
            job.fail(ClientGone("the client closed its connection"))
        return not job.future.done()

    def _client_gone(self, job: Job) -> bool:
        try:
            return job.flow.client_gone()
        except Exception:
            logger.exception("%s: asking for the client of a request failed", self.name)
            return False

    def _run(self, rows: list[Row]) -> None:
        """One batch into its jobs. A batch that content may have failed is bisected: only the culprit's job fails."""
        try:
            vectors = self._embed(rows)
        except UpstreamError as error:
            if error.content_may_cause and len(rows) > 1:
                self._halve(rows)
            else:
                _fail(rows, error)
        except EmbedpoolError as error:
            _fail(rows, error)
        except BaseException as error:  # a panic in a Rust library is no Exception
            logger.warning("%s: a batch of %d failed: %s: %s", self.name, len(rows), type(error).__name__, error)
            self._blame(rows, error)
        else:
            self._scatter(rows, vectors)

    def _blame(self, rows: list[Row], error: BaseException) -> None:
        try:
            self._driver.probe()
        except BaseException as probe_error:
            _fail(rows, InferenceFailed(f"the model failed: {type(error).__name__}: {error}"))
            raise DriverBroken(f"{type(probe_error).__name__}: {probe_error}") from error
        if len(rows) > 1:
            self._halve(rows)
            return
        _fail_text(rows[0], f"the model failed on it: {type(error).__name__}: {error}")

    def _halve(self, rows: list[Row]) -> None:
        middle = len(rows) // 2
        try:
            self._run(rows[:middle])
        except DriverBroken:
            _fail(rows, InferenceFailed("the model failed on another part of the batch"))
            raise
        self._run(rows[middle:])

    def _embed(self, rows: list[Row]) -> Vectors:
        """One driver call; its answer checked for count and shape."""
        started = self._clock()
        jobs = {id(row.job): row.job for row in rows}.values()
        for job in jobs:
            job.started_at = job.started_at or started
            job.replica = self.name
        head = rows[0].job
        ids = None if head.ids is None else [row.job.ids[row.at] for row in rows]  # type: ignore[index]
        answer = self._driver.embed([row.text for row in rows], ids, json.loads(head.group) if head.group else {})
        elapsed = self._clock() - started
        vectors = answer.vectors
        if vectors.ndim != 2 or vectors.shape[0] != len(rows):
            raise ValueError(f"the driver gave vectors of shape {vectors.shape} for {len(rows)} texts")
        for job in jobs:
            job.compute_s += elapsed
        if answer.tokens is not None:
            estimated = sum(row.tokens for row in rows) or 1
            for row in rows:
                row.job.counted += answer.tokens * row.tokens / estimated
        for i in answer.truncated:
            rows[i].job.truncated.append(rows[i].at)
        lengths = [row.tokens for row in rows]
        self.successes += 1
        self._stats.batch(len(rows), sum(lengths), max(lengths) * len(rows), elapsed)
        return vectors

    def _scatter(self, rows: list[Row], vectors: Vectors) -> None:
        good: Any = np.isfinite(vectors).all(axis=1)
        for row, vector, finite in zip(rows, vectors, good.tolist(), strict=True):
            if finite:
                row.job.fill(row.at, vector)
            else:
                _fail_text(row, "the model gave a vector that is not finite")


def _fail(rows: list[Row], error: EmbedpoolError) -> None:
    for row in rows:
        row.job.fail(error)


def _fail_text(row: Row, message: str) -> None:
    """Fail one text's request, naming the text by its place in the request."""
    where = f"texts[{row.job.offset + row.at}]"
    row.job.fail(InferenceFailed(f"{where}: {message}", fields={where: message}))
