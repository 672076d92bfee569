"""A driver in a process of its own: a crash, a hang or a leak in the model ends that process and nothing else.

The child opens the model's own driver and runs its batches. Each of the batches that may run at once has a lane: a pipe
for the texts and a block of shared memory for the vectors. The parent notices at once when the child is gone, and says
so in `lost`; the replica then opens a new one.
"""

from __future__ import annotations

import atexit
import contextlib
import heapq
import multiprocessing
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import psutil

from embedpool.config.spec import Isolation
from embedpool.drivers.base import Cost, Driver, Embeddings, Ids, available_cores
from embedpool.errors import EmbedpoolError, ModelFailed

if TYPE_CHECKING:
    from embedpool.config.spec import ModelSpec

BLOCK_FLOATS = 1 << 18  # of a lane; what is larger goes through the pipe
LOOK_S = 0.25  # between looks at a batch that takes long
CLOSE_TIMEOUT_S = 5.0
MB = 1 << 20


class _Call(NamedTuple):
    texts: Sequence[str]
    ids: Sequence[Ids] | None
    options: Mapping[str, Any]


class _Opened(NamedTuple):
    parallel: int
    max_batch_texts: int | None
    cost: Cost | None
    dim: int | None
    description: Mapping[str, object]


class _InBlock(NamedTuple):
    """Vectors of this shape lie in the lane's block."""

    shape: tuple[int, ...]
    tokens: int | None
    truncated: Sequence[int]


class ChildDriver(Driver):
    """`make` makes the driver that the child opens; `prepare` is called there first. Both must be picklable.

    A batch of more than `batch_timeout_s`, by default `longest_batch_s`, has the child ended.
    """

    def __init__(
        self,
        spec: ModelSpec,
        make: Callable[[], Driver],
        prepare: Callable[[], None] | None,
        longest_batch_s: float,
    ) -> None:
        self._name = spec.model
        self._make = make
        self._prepare = prepare
        self._longest_batch_s = longest_batch_s
        self._lanes = spec.queue.max_inflight_per_replica or available_cores()
        self._free = list(range(self._lanes))  # a heap: a lone batch is always run by the thread that opened the model
        self._lane_came_free = threading.Condition()
        self._ended = threading.Event()
        self._closing = False
        self._on_lost: Callable[[], None] = lambda: None
        assert isinstance(spec.driver.config, Isolation)
        self.configure(spec.driver.config)

    def configure(self, config: Isolation) -> None:
        """Limits apply at once."""
        self._batch_timeout_s = config.batch_timeout_s or self._longest_batch_s
        self._max_rss_mb = config.max_rss_mb

    def open(self) -> None:
        """Start the child and wait until its driver is open."""
        context = multiprocessing.get_context("spawn")
        pipes = [context.Pipe() for _ in range(self._lanes)]
        self._connections = [ours for ours, _ in pipes]
        theirs = [their for _, their in pipes]
        blocks = [context.RawArray("f", BLOCK_FLOATS) for _ in pipes]
        self._blocks = [np.frombuffer(block, dtype=np.float32) for block in blocks]
        self._process = context.Process(
            target=_serve, args=(self._make, self._prepare, theirs, blocks), name=self._name, daemon=True
        )
        self._process.start()
        atexit.register(self._kill)
        for connection in theirs:
            connection.close()
        self._watcher = threading.Thread(target=self._wait_for_end, name=f"watch-{self._name}", daemon=True)
        self._watcher.start()
        try:
            opened: _Opened = self._receive(0)
            self._check_size()
        except BaseException as error:
            self.close()
            if self.lost and isinstance(error, ChildProcessError):
                raise ModelFailed(f"{self._name!r} did not load: {self.lost}") from None
            raise
        self.parallel, self.max_batch_texts = opened.parallel, opened.max_batch_texts
        self.cost, self.dim = opened.cost, opened.dim
        self.description = {**opened.description, "isolation": "process", "pid": self._process.pid}

    def embed(self, texts: Sequence[str], ids: Sequence[Ids] | None, options: Mapping[str, Any]) -> Embeddings:
        """See Driver. Raises what the child's driver raises, and ChildProcessError when the child is `lost`."""
        with self._lane() as lane:
            answer = self._ask(lane, _Call(texts, ids, options))
            if isinstance(answer, _InBlock):
                vectors = self._blocks[lane][: int(np.prod(answer.shape))].reshape(answer.shape).copy()
                answer = Embeddings(vectors, answer.tokens, answer.truncated)
        self._check_size()
        assert isinstance(answer, Embeddings)
        return answer

    def probe(self) -> None:
        """See Driver."""
        with self._lane() as lane:
            self._ask(lane, None)

    def watch(self, on_lost: Callable[[], None]) -> None:
        """See Driver."""
        self._on_lost = on_lost
        if self.lost:
            on_lost()

    def close(self) -> None:
        """End the child; what it held is the system's again."""
        self._closing = True
        for connection in self._connections:
            connection.close()  # which the child takes as the end
        if not self._ended.wait(CLOSE_TIMEOUT_S):
            self._kill()
        self._watcher.join()
        atexit.unregister(self._kill)
        self._process.close()
        self._blocks = []

    @contextlib.contextmanager
    def _lane(self) -> Iterator[int]:
        """The first free one."""
        with self._lane_came_free:
            self._lane_came_free.wait_for(lambda: self._free)
            lane = heapq.heappop(self._free)
        try:
            yield lane
        finally:
            with self._lane_came_free:
                heapq.heappush(self._free, lane)
                self._lane_came_free.notify()

    def _ask(self, lane: int, call: _Call | None) -> Any:
        with contextlib.suppress(BrokenPipeError):  # said better below
            self._connections[lane].send(call)
        return self._receive(lane, time.monotonic() + self._batch_timeout_s)

    def _receive(self, lane: int, deadline: float | None = None) -> Any:
        """What the child answers. Raises it if it is an error, and ChildProcessError if the child ends first."""
        connection = self._connections[lane]
        try:
            while not connection.poll(LOOK_S):
                if deadline is not None and time.monotonic() > deadline:
                    self._end(f"its process was ended, because a batch took more than {self._batch_timeout_s:g} s")
                self._check_size()
            answer = connection.recv()
        except (EOFError, OSError):
            self._ended.wait()
            raise ChildProcessError(self.lost) from None
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def _check_size(self) -> None:
        """End the child if it has grown too large."""
        if self._max_rss_mb is None or self.lost:
            return
        with contextlib.suppress(psutil.Error):
            rss_mb = psutil.Process(self._process.pid).memory_info().rss // MB
            if rss_mb > self._max_rss_mb:
                self._end(f"its process held {rss_mb} MB, more than max_rss_mb {self._max_rss_mb},")

    def _end(self, reason: str) -> None:
        self.lost = self.lost or reason
        self._kill()

    def _kill(self) -> None:
        self._process.kill()

    def _wait_for_end(self) -> None:
        """The one thread that waits for the child."""
        wait([self._process.sentinel])
        self._process.join()
        self.lost = self.lost or f"its process {_how(self._process.exitcode)}"
        self._ended.set()
        if not self._closing:
            self._on_lost()


def _how(exit_code: int | None) -> str:
    """What an exit code says of an end."""
    if exit_code is not None and exit_code < 0:
        return f"was ended by {signal.Signals(-exit_code).name}"
    return f"ended with exit code {exit_code}"


# --- in the child


def _serve(
    make: Callable[[], Driver],
    prepare: Callable[[], None] | None,
    connections: Sequence[Connection],
    blocks: Sequence[Any],
) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):  # meant for the whole group; the parent decides when this one ends
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if prepare:
        prepare()
    driver = make()
    try:
        driver.open()
    except BaseException as error:
        connections[0].send(_portable(error))
        os._exit(1)
    facts = driver.parallel, driver.max_batch_texts, driver.cost, driver.dim, driver.description
    connections[0].send(_Opened(*facts))
    for lane in list(zip(connections, blocks, strict=True))[1:]:
        threading.Thread(target=_run_lane, args=(driver, *lane), daemon=True).start()
    _run_lane(driver, connections[0], blocks[0])  # in the thread that opened the model, which matters to torch
    os._exit(0)  # nothing is left worth waiting for


def _run_lane(driver: Driver, connection: Connection, block: Any) -> None:
    """Answer calls until the parent closes its end."""
    view = np.frombuffer(block, dtype=np.float32)
    with contextlib.suppress(EOFError, OSError):
        while True:
            call = connection.recv()
            try:
                answer = driver.probe() if call is None else _into_block(driver.embed(*call), view)
            except BaseException as error:
                connection.send(_portable(error))
            else:
                connection.send(answer)


def _into_block(answer: Embeddings, view: Any) -> Embeddings | _InBlock:
    vectors = np.asarray(answer.vectors, dtype=np.float32)
    if vectors.size > view.size:
        return answer
    view[: vectors.size] = vectors.ravel()
    return _InBlock(vectors.shape, answer.tokens, answer.truncated)


def _portable(error: BaseException) -> Exception:
    """The error if the parent knows its class without the model's libraries, else one that says the same."""
    if isinstance(error, EmbedpoolError) or (isinstance(error, Exception) and type(error).__module__ == "builtins"):
        with contextlib.suppress(Exception):
            again = pickle.loads(pickle.dumps(error))  # noqa: S301  (our own bytes)
            assert isinstance(again, Exception)
            return again
    return RuntimeError(f"{type(error).__name__}: {error}")


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
