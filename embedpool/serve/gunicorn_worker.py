"""gunicorn's worker class that runs embedpool's loop: gunicorn supervises, waitress reads and answers. And its log."""

from __future__ import annotations

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


class GunicornLogger(Logger):  # type: ignore[misc]
    """What gunicorn has to say goes to our log, in its format."""

    @override
    def setup(self, cfg: Config) -> None:
        super().setup(cfg)
        self.error_log.handlers.clear()
        self.error_log.propagate = True


class WaitressWorker(Worker):  # type: ignore[misc]
    """SIGTERM and Ctrl-C drain; a second Ctrl-C ends at once."""

    _loop: Loop | None = None
    _next_beat = 0.0
    _interrupted = False

    @override
    def run(self) -> None:
        """Serve until told to stop, or until the master is gone."""
        for listener in self.sockets:
            listener.sock.setblocking(False)
        self._loop = Loop(self.wsgi, [listener.sock for listener in self.sockets], shared=self.cfg.workers > 1)
        self._loop.run(self._heartbeat)

    def _heartbeat(self) -> bool:
        """Called on each turn of the loop; the file that tells gunicorn of it is touched once a second.

        Touching it lets go of the GIL, which under load another thread then has.
        """
        if time.monotonic() >= self._next_beat:
            self._next_beat = time.monotonic() + BEAT_S
            self.notify()
        return self.alive and self.ppid == os.getppid()

    @override
    def handle_exit(self, sig: int, frame: Any) -> None:
        """SIGTERM, and what `handle_quit` makes of it."""
        self._interrupted |= sig != signal.SIGQUIT
        self.alive = False
        if self._loop is not None:
            self._loop.stop()

    @override
    def handle_quit(self, sig: int, frame: Any) -> None:
        """Ctrl-C reaches the whole process group, and the master passes it on as SIGQUIT, which may come first.

        Both mean the same, so it alone does not make a SIGINT the second Ctrl-C.
        """
        if self._interrupted and sig == signal.SIGINT:
            sys.exit(1)
        self.handle_exit(sig, frame)
