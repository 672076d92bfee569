"""The pid file, `pool start --detach` and `pool stop`: the server's process, as another process sees it."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil

from embedpool.config.settings import Settings
from embedpool.errors import ConfigError, StorageError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

START_TIMEOUT_S = 60
STOP_MARGIN_S = 30  # beyond the grace period, before it is killed: more than the server ever takes by itself
KILLED_WITHIN_S = 10
LOOK_EVERY_S = 0.05  # whether it has ended
REAPED_WITHIN_S = 3  # by a parent that does so at all
LOG_TAIL_LINES = 20
LOCK_TRIES, LOCK_PAUSE_S = 40, 0.05


@dataclasses.dataclass(frozen=True)
class Running:
    """A server that runs now."""

    pid: int
    address: str
    process: psutil.Process


class PidFile:
    """Two lines: the pid of the server's parent process, and its address.

    The server holds a lock beside the file for as long as it lives. The lock tells a stale file from a running server,
    since the system uses pids again; it needs no clock, which may be set.
    """

    def __init__(self, settings: Settings) -> None:
        self.path = settings.file(settings.process.pid_file)
        self._lock_path = self.path.with_name(f"{self.path.name}.lock")

    def write(self, address: str) -> None:
        """Claim the file for this process, or change its address. Raises StorageError."""
        pid = os.getpid()
        temporary = self.path.with_name(f"{self.path.name}.{pid}")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path not in _held and (lock := _locked(self._lock_path, exclusive=True)) is not None:
                _held[self.path] = lock
            temporary.write_text(f"{pid}\n{address}\n")
            temporary.replace(self.path)
        except BlockingIOError:
            raise StorageError(f"{self.path} belongs to a server that runs already") from None
        except OSError as error:
            raise StorageError(f"{self.path} cannot be written: {error}; see process.pid_file") from None

    def remove(self) -> None:
        """Remove the file and let go of its lock, if they are this process's own."""
        lock = _held.pop(self.path, None)
        if lock is None and self._claims() != os.getpid():
            return
        with contextlib.suppress(OSError):
            self.path.unlink()
        if lock is not None:
            os.close(lock)

    def leave_to_parent(self) -> None:
        """After a fork, in the child: the lock is the parent's alone."""
        if (lock := _held.pop(self.path, None)) is not None:
            os.close(lock)

    def read(self) -> Running | None:
        """The running server of this file. None if there is none, or if its pid now belongs to another program."""
        try:
            if not self._is_locked():
                return None
            pid, address = self.path.read_text().split("\n")[:2]
            process = psutil.Process(int(pid))
            if process.status() == psutil.STATUS_ZOMBIE:
                return None
        except (OSError, ValueError, psutil.Error):
            return None
        return Running(int(pid), address, process)

    def _claims(self) -> int | None:
        with contextlib.suppress(OSError, ValueError):
            return int(self.path.read_text().split("\n")[0])
        return None

    def _is_locked(self) -> bool:
        """Whether a process lives that has claimed the file. Raises OSError without one that ever did."""
        if self.path in _held or fcntl is None:
            return True
        if not self._lock_path.exists():
            return False
        try:
            lock = _locked(self._lock_path, exclusive=False)
        except BlockingIOError:
            return True
        assert lock is not None
        os.close(lock)
        return False


_held: dict[Path, int] = {}  # file descriptors of this process's locks, by pid file


def _locked(path: Path, *, exclusive: bool) -> int | None:
    """The descriptor of a locked file; None where the system has no such locks. Raises BlockingIOError and OSError.

    One that wants the lock for itself waits a moment, since others take a share of it to see whether it is held.
    """
    if fcntl is None:
        return None
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    kind = (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB
    try:
        for _ in range(LOCK_TRIES if exclusive else 1):
            try:
                fcntl.flock(descriptor, kind)
                return descriptor
            except BlockingIOError:
                time.sleep(LOCK_PAUSE_S if exclusive else 0)
        raise BlockingIOError
    except BaseException:
        os.close(descriptor)
        raise


def start_detached(settings: Settings) -> Running:
    """Start `embedpool pool start` in a session of its own and wait until it answers. It reads the environment.

    Raises ConfigError with the end of the log if the server ends or does not answer in time.
    """
    log = settings.file(settings.paths.logs_dir) / "embedpool.log"
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        stream = log.open("ab")
        before = stream.tell()
    except OSError as error:
        raise StorageError(f"{log} cannot be written: {error}") from None
    with stream:
        child = subprocess.Popen(
            [sys.executable, "-P", "-m", "embedpool", "pool", "start"],
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
            start_new_session=True,
        )
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        running = PidFile(settings).read()
        if running and running.pid == child.pid and _answers(running.address):
            return running
        try:
            code = child.wait(0.1)
        except subprocess.TimeoutExpired:
            continue
        raise ConfigError(f"the server ended with exit code {code}; the end of {log}:\n{_tail(log, before)}")
    child.terminate()
    raise ConfigError(f"the server did not answer within {START_TIMEOUT_S} s; the end of {log}:\n{_tail(log, before)}")


def stop(running: Running, grace_s: float) -> bool:
    """Send SIGTERM, wait up to `grace_s`, then kill. True if the server ended by itself."""
    try:
        children = running.process.children(recursive=True)
        running.process.terminate()
    except psutil.NoSuchProcess:
        return True
    except psutil.AccessDenied:
        raise ConfigError(f"not permitted to stop pid {running.pid}: it is another user's") from None
    if _ends(running.process, grace_s):
        return True
    for process in (running.process, *children):
        with contextlib.suppress(psutil.Error):
            process.kill()
    _ends(running.process, KILLED_WITHIN_S)
    return False


def _ends(process: psutil.Process, within_s: float) -> bool:
    """Whether it ends in time. Where its parent never asks for it, it stays in the table of processes, as a zombie."""
    deadline = time.monotonic() + within_s
    ended_at = math.inf
    while process.is_running() and time.monotonic() < ended_at + REAPED_WITHIN_S:
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.status() == psutil.STATUS_ZOMBIE:
                ended_at = min(ended_at, time.monotonic())
            elif time.monotonic() >= deadline:
                return False
        time.sleep(LOOK_EVERY_S)
    return True


def _answers(address: str) -> bool:
    from embedpool.client import Client
    from embedpool.errors import EmbedpoolError

    try:
        return bool(Client(address, timeout_s=2).health()["ok"])
    except EmbedpoolError:
        return False


def _tail(log: Path, start: int) -> str:
    """The last lines written since `start`, in bytes."""
    return "\n".join(log.read_bytes()[start:].decode(errors="replace").splitlines()[-LOG_TAIL_LINES:])
