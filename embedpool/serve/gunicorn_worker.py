"""gunicorn's worker class, which runs loop.py under gunicorn's supervision, and gunicorn's logger."""

from __future__ import annotations

import mmap
import os
import signal
import sys
import time
from typing import Any

from gunicorn.config import Config
from gunicorn.glogging import Logger
from gunicorn.workers.base import Worker
from typing_extensions import override

from embedpool.serve.loop import BEAT_S, Loop

LOOK_S = 0.05  # between looks whether the models are loaded


class GunicornLogger(Logger):  # type: ignore[misc]
    """Sends what gunicorn logs to our log, in its format."""

    @override
    def setup(self, cfg: Config) -> None:
        super().setup(cfg)
        self.error_log.handlers.clear()
        self.error_log.propagate = True


class WaitressWorker(Worker):  # type: ignore[misc]
    """A worker process: SIGTERM and Ctrl-C let it drain, a second Ctrl-C ends it at once."""

    _loop: Loop | None = None
    _next_beat = 0.0
    _interrupted = False
    is_ending = False  # the master has told it to
    waits_for_models = False  # set in the master, before the fork

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)  # in the master, before the fork
        self.born_at = time.monotonic()
        self._shared = mmap.mmap(-1, 2)  # written by the worker, read by the master; and the other way round

    @property
    def is_ready(self) -> bool:
        """Whether its models are loaded, or have failed to load."""
        return self._shared[0] > 0

    def tell_that_the_server_ends(self) -> None:
        """Called in the master: this worker is not replaced by another one."""
        self._shared[1] = 1

    @override
    def run(self) -> None:
        """Serve until gunicorn stops this worker, or until the master is gone.

        Where another worker is ready, this one accepts nothing until it is ready itself.
        """
        while self.waits_for_models and self._heartbeat() and not self.is_ready:
            time.sleep(LOOK_S)
        for listener in self.sockets:
            listener.sock.setblocking(False)
        self._loop = Loop(self.wsgi, [listener.sock for listener in self.sockets], shared=self.cfg.workers > 1)
        self._loop.run(self._heartbeat)

    def _heartbeat(self) -> bool:
        """Tell gunicorn that the loop turns. Called on each turn, it touches gunicorn's file once a second.

        Touching it releases the GIL, and under load another thread then takes it.
        """
        if time.monotonic() >= self._next_beat:
            self._next_beat = time.monotonic() + BEAT_S
            self.notify()
        if not self.is_ready and self.wsgi.is_booted:
            self._shared[0] = 1
        return self.alive and self.ppid == os.getppid()

    @override
    def handle_exit(self, sig: int, frame: Any) -> None:
        """Drain, on SIGTERM: after a delay if the whole server ends."""
        self._interrupted |= sig != signal.SIGQUIT
        self._end(delay=self._shared[1] > 0, replaced=not self._shared[1])

    def _end(self, *, delay: bool = False, replaced: bool = False) -> None:
        # Signal handlers run on the main thread, which is the loop's, between two of its instructions: they set flags
        # and wake the loop, and take no lock.
        self.alive = False
        if self._loop is not None:
            self._loop.stop(delay=delay, replaced=replaced)

    @override
    def handle_quit(self, sig: int, frame: Any) -> None:
        """Drain on Ctrl-C, and end on the second.

        The terminal sends SIGINT to the whole process group, and the master passes it on as SIGQUIT, which may arrive
        first. So a SIGINT after a SIGQUIT alone is still the first Ctrl-C.
        """
        if self._interrupted and sig == signal.SIGINT:
            sys.exit(1)
        self._interrupted |= sig != signal.SIGQUIT
        self._end()
