"""The work of a replica's thread: `Replica` loops around `step()`."""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from embedpool import tracing
from embedpool.errors import ClientGone, DeadlineExceeded, EmbedpoolError, InferenceFailed, UpstreamError, forget_frames
from embedpool.pool.batcher import Batcher
from embedpool.pool.culprits import Culprits
from embedpool.pool.job import Job, Row
from embedpool.pool.lanes import Lanes
from embedpool.pool.model_queue import ModelQueue
from embedpool.pool.request import Vectors
from embedpool.pool.stats import ModelStats

if TYPE_CHECKING:
    from embedpool.drivers.base import Driver, Embeddings

logger = logging.getLogger(__name__)

LOSSES_OF_A_CULPRIT = 2  # the first, in whatever company, and one alone; the next is the last


class DriverBroken(Exception):
    """The driver itself is at fault and must be opened anew."""


class DriverLost(DriverBroken):
    """So must one that a batch has ended; the driver is not at fault, and each of the texts has an answer or a turn."""


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
        culprits: Culprits,
        lanes: Lanes,
        max_wait_s: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name = name
        self._driver = driver
        self._queue = queue
        self._batcher = batcher
        self._stats = stats
        self._culprits = culprits
        self._lanes = lanes
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

        `on_work` is called after jobs were taken and before they run. On return each text that was taken has its
        answer, whatever happens, or is in the queue again. Raises DriverBroken after that if the driver must be opened
        anew.
        """
        rows = self._queue.take(
            self._choose,
            timeout_s,
            enough_texts=self._batcher.max_texts,
            max_wait_s=self._max_wait_s,
            leaving=leaving,
        )
        if not rows:
            return False
        try:
            on_work()
            if rows := [row for row in rows if self._is_wanted(row) and not self._has_ended_a_driver(row)]:
                self._run(rows)
        except DriverBroken:
            raise
        except Exception as error:
            logger.exception("%s: a batch failed outside its driver", self.name)
            _fail(rows, InferenceFailed(f"{self.name}: the batch was given up: {type(error).__name__}"))
        finally:
            self._lanes.end()
        return True

    def _choose(self, window: Sequence[Row]) -> Sequence[int]:
        try:
            places = self._batcher.choose(window, self._lanes.busy_s())
            self._lanes.begin(self._batcher.predicted_s([window[place].tokens for place in places]))
            return places
        except Exception:
            logger.exception("%s: the batcher failed; the next text goes alone", self.name)
            return [0]

    def _is_wanted(self, row: Row) -> bool:
        """Drop what is past its deadline, given up, or without a client, before it costs compute.

        A row that somebody else waits for too is taken over by the first of its twins that is wanted.
        """
        wanted = [equal for equal in (row, *row.twins) if self._still_waits(equal.job)]
        if not wanted:
            return False
        if wanted[0] is not row:
            row.job, row.at = wanted[0].job, wanted[0].at
        row.twins = wanted[1:]
        return True

    def _has_ended_a_driver(self, row: Row) -> bool:
        reason = self._culprits.reason(row)
        if reason:
            _fail_text(row, f"not tried again for a while, since the model failed on it: {reason}")
        return bool(reason)

    def _still_waits(self, job: Job) -> bool:
        if job.is_done:
            return False
        if job.flow.error is not None:
            job.fail(job.flow.error)
        elif job.flow.abandoned or self._clock() >= job.flow.deadline:
            job.fail(DeadlineExceeded("the request's deadline passed while its texts waited"))
        elif self._client_gone(job):
            job.fail(ClientGone("the client closed its connection"))
        return not job.is_done

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
        except DriverLost:  # by another batch, while this one waited to be alone: it has not run
            self._queue.put_back(rows)
            raise
        except BaseException as error:  # a panic in a Rust library is no Exception
            logger.warning("%s: a batch of %d failed: %s: %s", self.name, len(rows), type(error).__name__, error)
            self._blame(rows, error)
        else:
            self._scatter(rows, vectors)

    def _blame(self, rows: list[Row], error: BaseException) -> None:
        fault = self._fault_of_driver()
        if self._driver.lost:
            self._hand_back(rows, self._driver.lost)
            raise DriverLost(self._driver.lost) from error
        if fault:
            _fail(rows, InferenceFailed(f"the model failed: {type(error).__name__}: {error}"))
            raise DriverBroken(fault) from error
        if len(rows) > 1:
            self._halve(rows)
            return
        _fail_text(rows[0], f"the model failed on it: {type(error).__name__}: {error}")

    def _fault_of_driver(self) -> str | None:
        """What is wrong with it whatever the texts are."""
        if not self._driver.lost:
            try:
                self._driver.probe()
            except BaseException as error:
                return f"{type(error).__name__}: {error}"
        return None

    def _halve(self, rows: list[Row]) -> None:
        middle = len(rows) // 2
        try:
            self._run(rows[:middle])
        except DriverLost:
            self._queue.put_back(rows[middle:])
            raise
        except DriverBroken:
            _fail(rows[middle:], InferenceFailed("the model failed on another part of the batch"))
            raise
        self._run(rows[middle:])

    def _hand_back(self, rows: list[Row], reason: str) -> None:
        """Another replica, or this one when it is open again, runs the halves, each as the only batch of its driver.

        Only a text that is alone when a driver is lost, twice, is at fault itself, and remembered.
        """
        if len(rows) > 1:
            for row in rows:
                row.losses = 1
            middle = len(rows) // 2
            self._queue.put_back(rows[:middle])
            self._queue.put_back(rows[middle:])
        elif rows[0].losses < LOSSES_OF_A_CULPRIT:
            rows[0].losses += 1
            self._queue.put_back(rows)
        else:
            self._culprits.add(rows[0], reason)
            _fail_text(rows[0], f"the model failed on it: {reason}")

    def _embed(self, rows: list[Row]) -> Vectors:
        """One driver call; its answer checked for count and shape."""
        started = self._clock()
        ids = None if rows[0].ids is None else [row.ids or () for row in rows]
        group = rows[0].job.group
        flows = list({row.job.flow: None for row in rows})
        hops = max(flow.hops for flow in flows)
        facts = {"embedpool.replica": self.name, "embedpool.texts": len(rows)}
        with (
            self._apart(rows),
            self._queue.joinable(rows),
            tracing.batch("batch", [flow.trace for flow in flows], facts, hops=hops),
        ):
            answer = self._driver.embed([row.text for row in rows], ids, json.loads(group) if group else {})
        elapsed = self._clock() - started
        vectors = answer.vectors
        expected = (len(rows), self._driver.dim or vectors.shape[-1])
        if vectors.shape != expected:
            raise ValueError(f"the driver gave vectors of shape {vectors.shape}, not {expected}")
        for flow in {equal.job.flow for row in rows for equal in (row, *row.twins)}:
            flow.ran(self.name, started, elapsed)
        if answer.tokens is not None or answer.truncated:
            _report(rows, answer)
        self.successes += 1
        lengths = [row.tokens for row in rows]
        self._stats.batch(len(rows), sum(lengths), max(lengths) * len(rows), elapsed)
        return vectors

    @contextlib.contextmanager
    def _apart(self, rows: list[Row]) -> Iterator[None]:
        """What a driver was lost with runs as the only batch of its next; not at all if that is lost meanwhile, too."""
        if not rows[0].losses:
            yield
            return
        with self._driver.alone():
            if self._driver.lost:
                raise DriverLost(self._driver.lost)
            yield

    def _scatter(self, rows: list[Row], vectors: Vectors) -> None:
        good: Any = np.isfinite(vectors).all(axis=1)
        for row, vector, finite in zip(rows, vectors, good.tolist(), strict=True):
            if not finite:
                _fail_text(row, "the model gave a vector that is not finite")
                continue
            row.job.fill(row.at, vector)
            for twin in row.twins:
                twin.job.fill(twin.at, vector)


def _report(rows: list[Row], answer: Embeddings) -> None:
    """What a remote service says of the texts: its token count, shared out by length, and what it truncated."""
    estimated = sum(row.tokens for row in rows) or 1
    for row in rows:
        for equal in (row, *row.twins):
            equal.job.counted += (answer.tokens or 0) * row.tokens / estimated
    for i in answer.truncated:
        for equal in (rows[i], *rows[i].twins):
            equal.job.truncated.append(equal.at)


def _fail(rows: list[Row], error: EmbedpoolError) -> None:
    forget_frames(error)
    for row in rows:
        for equal in (row, *row.twins):
            equal.job.lose(equal.at, error)


def _fail_text(row: Row, message: str) -> None:
    """Fail the requests of one text, naming it by its place in each."""
    for equal in (row, *row.twins):
        if equal.job.flow.partial:
            equal.job.lose(equal.at, InferenceFailed(message))  # the answer says which
            continue
        where = f"texts[{equal.job.offset + equal.at}]"
        equal.job.lose(equal.at, InferenceFailed(f"{where}: {message}", fields={where: message}))
