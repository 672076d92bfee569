"""gunicorn's master, which at a reload ends a worker only when another one has loaded its models."""

from __future__ import annotations

import signal
import time
from typing import Any

from gunicorn.arbiter import Arbiter
from typing_extensions import override

LONGEST_LOAD_S = 600.0  # a worker that has not loaded by then replaces its predecessor all the same


class Master(Arbiter):  # type: ignore[misc]
    """gunicorn makes its own and calls hooks with it; `adopt` turns that one into this.

    Workers tell it through shared memory that they are ready (see WaitressWorker). Until a new one is, the old one
    serves, and the new one accepts nothing: so a reload refuses no request, and takes the memory of two while it lasts.
    """

    @classmethod
    def adopt(cls, arbiter: Any) -> None:
        """Take over what gunicorn has made."""
        arbiter.__class__ = cls

    _graceful_timeout_s: int | None = None  # while a reload must not wait

    @override
    def reload(self) -> None:
        # gunicorn waits here for the old workers' end, deaf to signals. Ours end later, so it must not wait for them;
        # it reads the time after it has read the settings anew, in which `on_reload` has set it to 0.
        try:
            super().reload()
        finally:
            if self._graceful_timeout_s is not None:
                self.cfg.set("graceful_timeout", self._graceful_timeout_s)

    def wait_for_nobody(self) -> None:
        """In the hook `on_reload`."""
        self._graceful_timeout_s = self.cfg.graceful_timeout
        self.cfg.set("graceful_timeout", 0)

    @property
    def has_ready_worker(self) -> bool:
        """Whether a worker serves, so that a new one may take its time."""
        return any(worker.is_ready for worker in self._serving())

    @override
    def manage_workers(self) -> None:
        """Keep the number of workers; the oldest goes once the others that are ready are enough."""
        if len(self._serving()) < self.num_workers:
            self.spawn_workers()
        serving = self._serving()
        for worker in serving[: max(len(serving) - self.num_workers, 0)]:
            others = [other for other in self._serving() if other is not worker]
            is_overdue = time.monotonic() - others[-1].born_at > LONGEST_LOAD_S
            if is_overdue or sum(other.is_ready for other in others) >= self.num_workers:
                worker.is_ending = True
                self.kill_worker(worker.pid, signal.SIGTERM)

    @override
    def spawn_workers(self) -> None:
        for _ in range(self.num_workers - len(self._serving())):
            self.spawn_worker()

    @override
    def stop(self, graceful: bool = True) -> None:
        for worker in self.WORKERS.values():
            worker.tell_that_the_server_ends()
        super().stop(graceful)

    @override
    def handle_usr2(self) -> None:
        """A second master could not take over the pid file, nor would the first one end."""
        self.log.warning("SIGUSR2 is not supported: SIGHUP takes over settings, a restart takes over new code")

    def _serving(self) -> list[Any]:
        """The workers that are not told to end, the oldest first."""
        return sorted((w for w in self.WORKERS.values() if not w.is_ending), key=lambda worker: worker.age)
