"""A driver in a process of its own: a crash, a hang or a leak in the model ends that process and nothing else.

The child opens the model's own driver and runs its batches. Each of the batches that may run at once has a lane: a pipe
for the texts and a block of shared memory for the vectors. The parent notices at once when the child is gone, and says
so in `lost`; the replica then opens a new one.
"""

from __future__ import annotations

import atexit
import contextlib
import heapq
import math
import multiprocessing
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil

from embedpool.config.spec import Isolation
from embedpool.drivers.base import Driver, Embeddings, Ids, available_cores
from embedpool.drivers.in_child import Call, InBlock, Opened, serve
from embedpool.errors import ModelFailed

if TYPE_CHECKING:
    from embedpool.config.spec import ModelSpec

BLOCK_FLOATS = 1 << 18  # of a lane; what is larger goes through the pipe
LOOK_S = 0.5  # between looks at what a child takes, in time and memory
CLOSE_TIMEOUT_S = 5.0
MB = 1 << 20


class ChildDriver(Driver):
    """`make` makes the driver that the child opens; `prepare` is called there first. Both must be picklable.

    One thread watches the child and is the only one to end it: when it is closed, when a batch has taken more than
    `batch_timeout_s`, by default `longest_batch_s`, and when it has grown beyond `max_rss_mb`.
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
        self._began: dict[int, float] = {}  # lanes in use, since when
        self._alone: int | None = None  # the thread whose batch is to be the only one
        self._lanes_changed = threading.Condition()
        self._closing = threading.Event()
        self._ended = threading.Event()
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
        self._process = context.Process(target=serve, args=(self._make, self._prepare, theirs, blocks))
        watcher = threading.Thread(target=self._watch_child, name=f"watch-{self._name}", daemon=True)
        self._process.start()
        atexit.register(self._process.kill)
        try:
            watcher.start()
        except RuntimeError:  # the system has no thread to give
            self._watch_child(ending="could not be watched")
            raise
        finally:
            for connection in theirs:
                connection.close()
        try:
            opened: Opened = self._receive(0)
            if too_large := self._too_large():
                self.lost = self.lost or f"its process {too_large}"
                raise ChildProcessError(self.lost)
        except BaseException as error:
            self.close()
            if isinstance(error, ChildProcessError):
                raise ModelFailed(f"{self._name!r} did not load: {error}") from None
            raise
        self.parallel, self.max_batch_texts = opened.parallel, opened.max_batch_texts
        self.cost, self.dim = opened.cost, opened.dim
        self.description = {**opened.description, "isolation": "process", "pid": self._process.pid}

    def embed(self, texts: Sequence[str], ids: Sequence[Ids] | None, options: Mapping[str, Any]) -> Embeddings:
        """See Driver. Raises what the child's driver raises, and ChildProcessError when the child is `lost`."""
        with self._lane() as lane:
            answer = self._ask(lane, Call(texts, ids, options))
            if isinstance(answer, InBlock):
                vectors = self._blocks[lane][: int(np.prod(answer.shape))].reshape(answer.shape).copy()
                answer = Embeddings(vectors, answer.tokens, answer.truncated)
        assert isinstance(answer, Embeddings)
        return answer

    def probe(self) -> None:
        """See Driver."""
        with self._lane() as lane:
            self._ask(lane, None)

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """See Driver."""
        with self._lanes_changed:
            self._lanes_changed.wait_for(lambda: self._alone is None)
            self._alone = threading.get_ident()
            self._lanes_changed.wait_for(lambda: len(self._free) == self._lanes)
        try:
            yield
        finally:
            with self._lanes_changed:
                self._alone = None
                self._lanes_changed.notify_all()

    def close(self) -> None:
        """End the child; what it held is the system's again."""
        self._closing.set()
        for connection in self._connections:
            _shut_down(connection)  # which the child takes as the end
        self._ended.wait()
        for connection in self._connections:
            connection.close()
        self._process.close()
        self._blocks = []

    @contextlib.contextmanager
    def _lane(self) -> Iterator[int]:
        """The first free one."""
        with self._lanes_changed:
            self._lanes_changed.wait_for(lambda: self._free and self._alone in (None, threading.get_ident()))
            lane = heapq.heappop(self._free)
            self._began[lane] = time.monotonic()
        try:
            yield lane
        finally:
            with self._lanes_changed:
                del self._began[lane]
                heapq.heappush(self._free, lane)
                self._lanes_changed.notify_all()

    def _ask(self, lane: int, call: Call | None) -> Any:
        with contextlib.suppress(OSError):  # said better when there is no answer
            self._connections[lane].send(call)
        return self._receive(lane)

    def _receive(self, lane: int) -> Any:
        """What the child answers. Raises it if it is an error, and ChildProcessError if the child ends first."""
        try:
            answer = self._connections[lane].recv()
        except (EOFError, OSError):
            self._ended.wait()
            raise ChildProcessError(self.lost) from None
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def _watch_child(self, ending: str | None = None) -> None:
        """The life of the watching thread, as long as the child's; with `ending` the child's ends now."""
        closing_since: float | None = None
        while not wait([self._process.sentinel], 0 if ending else LOOK_S):
            if self._closing.is_set():
                closing_since = closing_since or time.monotonic()
                ending = "was closed" if time.monotonic() - closing_since > CLOSE_TIMEOUT_S else None
            else:
                ending = ending or self._too_slow() or self._too_large()
            if ending:
                self.lost = self.lost or f"its process {ending}"
                self._process.kill()
        self._process.join()
        atexit.unregister(self._process.kill)
        self.lost = self.lost or f"its process {_how(self._process.exitcode)}"
        for connection in self._connections:
            _shut_down(connection)  # a process that the child has started may hold the other end
        self._ended.set()
        if not self._closing.is_set():
            self._tell_lost()

    def _too_slow(self) -> str | None:
        with self._lanes_changed:
            first = min(self._began.values(), default=math.inf)
        if time.monotonic() - first <= self._batch_timeout_s:
            return None
        return f"was ended, because a batch took more than {self._batch_timeout_s:g} s"

    def _too_large(self) -> str | None:
        if self._max_rss_mb is None:
            return None
        with contextlib.suppress(psutil.Error, OSError):
            rss_mb = psutil.Process(self._process.pid).memory_info().rss // MB
            if rss_mb > self._max_rss_mb:
                return f"was ended, because it held {rss_mb} MB, more than max_rss_mb {self._max_rss_mb}"
        return None


def _shut_down(connection: Connection) -> None:
    """Let every reader and writer of it, on both sides, find its end."""
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(connection.fileno())) as pipe:
        pipe.shutdown(socket.SHUT_RDWR)


def _how(exit_code: int | None) -> str:
    """What an exit code says of an end."""
    if exit_code is None or exit_code >= 0:
        return f"ended with exit code {exit_code}"
    try:
        return f"was ended by {signal.Signals(-exit_code).name}"
    except ValueError:  # a real-time signal
        return f"was ended by signal {-exit_code}"
