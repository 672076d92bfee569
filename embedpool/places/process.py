"""A driver in a process of its own: a crash, a hang or a leak in the model ends that process and nothing else.

The child opens the model's driver and runs its batches. Each of the batches that may run at once has a slot: a pipe
for the items and a block of shared memory for the rows. The parent notices at once when the child is gone, and says so
in `lost`; the replica then opens a new one.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import heapq
import math
import multiprocessing
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from typing_extensions import override

from embedpool.config.spec import LocalConfig, ModelSpec
from embedpool.errors import ModelFailed
from embedpool.places.cores import available_cores
from embedpool.places.in_child import InBlock, from_block, serve
from embedpool.tasks.driver import Driver, Facts, Loss, Place, Progress, Report, unheard
from embedpool.tasks.item import Batch
from embedpool.tasks.rows import Answer

BLOCK_BYTES = 1 << 20  # of a slot; what is larger goes through the pipe
LOOK_S = 0.5  # between looks at what a child takes, in time and memory
CLOSE_TIMEOUT_S = 5.0
LONGEST_LOAD_S = 600.0
GROWN = 1.25  # times the memory it held when it had opened the model
MB = 1 << 20


class ProcessPlace(Place):
    """`make` makes the driver that the child opens; `prepare` is called there first.

    One thread watches the child and is the only one to end it: when the place is closed, when a batch has taken more
    than `batch_timeout_s`, by default `longest_batch_s`, and when it has grown beyond `max_rss_mb`.
    """

    def __init__(
        self,
        spec: ModelSpec,
        make: Callable[[], Driver],
        prepare: Callable[[], None] | None,
        longest_batch_s: float,
        report: Report = unheard,
    ) -> None:
        self._longest_batch_s = longest_batch_s
        self._count = self._slot_count(spec)
        self._free = list(range(self._count))  # a heap: a lone batch is always run by the thread that opened the model
        self._began: dict[int, float] = {}  # slots in use, since when
        self._alone: int | None = None  # the thread whose batch is to be the only one
        # Guards the three above. Batches' threads wait on it for a slot, or for all of them; the watching thread takes
        # it for a look. No other lock is taken inside it, and nobody waits for the child while holding it.
        self._slots_changed = threading.Condition()
        self._opening_since: float | None = time.monotonic()  # None once the child has opened the model
        self._closing = threading.Event()
        self._ended = threading.Event()  # the child is gone and `lost` says why
        self._opened_bytes = self._last_bytes = 0  # that it held when it had opened the model, and at the last look
        self._kills = (_kills_for_memory(),) * 2  # at the look before the last, and at the last
        assert isinstance(spec.driver.config, LocalConfig)
        self.configure(spec.driver.config)
        self._start(make, prepare, f"watch-{spec.model}")
        try:
            while isinstance(facts := self._receive(0), Progress):
                report(facts)
            self._opening_since = None
            assert isinstance(facts, Facts)
            if too_large := self._too_large():
                raise ChildProcessError(f"its process {too_large}")
        except BaseException as error:
            self.close()
            if isinstance(error, ChildProcessError):
                raise ModelFailed(f"{spec.model!r} did not load: {error}") from None
            raise
        self._opened_bytes = _rss_bytes(self._process.pid)
        self.facts = dataclasses.replace(facts, description={**facts.description, **self._where()})

    def _where(self) -> dict[str, object]:
        """What is told of it."""
        return {"place": "process", "isolation": "process", "pid": self._process.pid}

    def _slot_count(self, spec: ModelSpec) -> int:
        """Batches that may run at once."""
        return spec.queue.max_inflight_per_replica or available_cores()

    def _is_innocent(self, exit_code: int | None) -> bool:
        """Whether no item can have caused an end of which the child itself has said nothing."""
        return exit_code == -signal.SIGKILL and not self._may_have_grown()

    @override
    def configure(self, config: LocalConfig) -> None:
        self._batch_timeout_s = config.batch_timeout_s or self._longest_batch_s
        self._max_rss_mb = config.max_rss_mb

    def _start(self, make: Callable[[], Driver], prepare: Callable[[], None] | None, watcher_name: str) -> None:
        context = multiprocessing.get_context("spawn")
        pipes = [context.Pipe() for _ in range(self._count)]
        self._connections, theirs = [ours for ours, _ in pipes], [their for _, their in pipes]
        blocks = [context.RawArray("B", BLOCK_BYTES) for _ in pipes]
        self._last_words, their_last_words = context.Pipe(duplex=False)
        self._blocks = [np.frombuffer(block, dtype=np.uint8) for block in blocks]
        self._process = context.Process(target=serve, args=(make, prepare, theirs, blocks, their_last_words))
        watcher = threading.Thread(target=self._watch_child, name=watcher_name, daemon=True)
        self._process.start()
        atexit.register(self._process.kill)
        try:
            watcher.start()
        except RuntimeError:  # the system has no thread to give
            self._watch_child(ending="could not be watched")
            raise
        finally:
            for connection in (*theirs, their_last_words):
                connection.close()

    @override
    def run(self, batch: Batch) -> Answer:
        """Raises what the child's driver raises, and ChildProcessError when the child is `lost`."""
        with self._slot() as slot:
            answer = self._ask(slot, batch)
            if isinstance(answer, InBlock):
                answer = from_block(answer, self._blocks[slot])
        assert isinstance(answer, Answer)
        return answer

    @override
    def probe(self) -> None:
        with self._slot() as slot:
            self._ask(slot, None)

    @override
    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        with self._slots_changed:
            self._slots_changed.wait_for(lambda: self._alone is None)
            self._alone = threading.get_ident()
            self._slots_changed.wait_for(lambda: len(self._free) == self._count)
        try:
            yield
        finally:
            with self._slots_changed:
                self._alone = None
                self._slots_changed.notify_all()

    @override
    def close(self) -> None:
        self._closing.set()
        for connection in self._connections:
            _shut_down(connection)  # which the child takes as the end
        self._ended.wait()
        for connection in (*self._connections, self._last_words):
            connection.close()
        self._process.close()
        self._blocks = []

    @contextlib.contextmanager
    def _slot(self) -> Iterator[int]:
        """The first free one."""
        with self._slots_changed:
            self._slots_changed.wait_for(lambda: self._free and self._alone in (None, threading.get_ident()))
            slot = heapq.heappop(self._free)
            self._began[slot] = time.monotonic()
        try:
            yield slot
        finally:
            with self._slots_changed:
                del self._began[slot]
                heapq.heappush(self._free, slot)
                self._slots_changed.notify_all()

    def _ask(self, slot: int, batch: Batch | None) -> Any:
        with contextlib.suppress(OSError):  # said better when there is no answer
            self._connections[slot].send(batch)
        return self._receive(slot)

    def _receive(self, slot: int) -> Any:
        """Receive the child's answer. Raises it if it is an error, and ChildProcessError if the child ends first."""
        try:
            answer = self._connections[slot].recv()
        except (EOFError, OSError):
            self._ended.wait()
            raise ChildProcessError(self.lost.reason if self.lost else "its process ended") from None
        if isinstance(answer, BaseException):
            raise answer
        return answer

    # --- the thread that watches the child

    def _watch_child(self, ending: str | None = None) -> None:
        """As long as the child lives; with `ending` the child's life ends now."""
        closing_since: float | None = None
        while not wait([self._process.sentinel], 0 if ending else LOOK_S):
            self._last_bytes = _rss_bytes(self._process.pid)
            self._kills = self._kills[-1], _kills_for_memory()
            if self._closing.is_set():
                closing_since = closing_since or time.monotonic()
                ending = "was closed" if time.monotonic() - closing_since > CLOSE_TIMEOUT_S else None
            else:
                ending = ending or self._too_slow() or self._too_large()
            if ending:
                self.lost = self.lost or self._loss(ending)
                self._process.kill()
        self._process.join()
        atexit.unregister(self._process.kill)
        with contextlib.suppress(EOFError, OSError):
            if self.lost is None and self._last_words.poll():
                self.lost = self._last_words.recv()
        if self.lost is None:
            exit_code = self._process.exitcode
            self.lost = Loss(f"its process {_how(exit_code)}", self._is_innocent(exit_code))
        for connection in self._connections:
            _shut_down(connection)  # a process that the child has started may hold the other end
        self._ended.set()
        if not self._closing.is_set():
            self._lose(self.lost)

    def _loss(self, ending: str) -> Loss:
        """What is said of a child that is ended here."""
        return Loss(f"its process {ending}")

    def _may_have_grown(self) -> bool:
        """Whether the kernel may have ended it for its own memory, not an operator, nor for what others held.

        What the kernel counts is compared with the look before the last: that one may have come between its count and
        this child's end.
        """
        kills = _kills_for_memory()
        if kills is None:
            return True
        return kills != self._kills[0] and not 0 < self._last_bytes <= GROWN * self._opened_bytes

    def _too_slow(self) -> str | None:
        since = self._opening_since
        if since is not None and time.monotonic() - since > LONGEST_LOAD_S:
            return f"was ended, because it took more than {LONGEST_LOAD_S:g} s to load"
        with self._slots_changed:
            first = min(self._began.values(), default=math.inf)
        if time.monotonic() - first <= self._batch_timeout_s:
            return None
        return f"was ended, because a batch took more than {self._batch_timeout_s:g} s"

    def _too_large(self) -> str | None:
        rss_mb = _rss_bytes(self._process.pid) // MB
        if self._max_rss_mb is None or rss_mb <= self._max_rss_mb:
            return None
        return f"was ended, because it held {rss_mb} MB, more than max_rss_mb {self._max_rss_mb}"


def _rss_bytes(pid: int | None) -> int:
    with contextlib.suppress(psutil.Error, OSError):
        return int(psutil.Process(pid).memory_info().rss)
    return 0


def _kills_for_memory() -> int | None:
    """Processes that the kernel has ended for want of memory since it started; None where it does not tell."""
    with contextlib.suppress(OSError):
        found = re.search(r"^oom_kill (\d+)", Path("/proc/vmstat").read_text(), flags=re.MULTILINE)
        return int(found[1]) if found else None
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
