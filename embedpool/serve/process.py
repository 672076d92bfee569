"""The pid file, `pool start --detach` and `pool stop`: the server's process, as another process sees it."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil

from embedpool.config.settings import Settings
from embedpool.errors import ConfigError, StorageError

START_TIMEOUT_S = 60
STOP_MARGIN_S = 30  # beyond the grace period, before it is killed: more than the server ever takes by itself
LOG_TAIL_LINES = 20


@dataclasses.dataclass(frozen=True)
class Running:
    """A server that runs now."""

    pid: int
    address: str
    process: psutil.Process


class PidFile:
    """Three lines: the pid of the server's parent process, its address, the process's start time.

    The start time tells a stale file from a running server, since the system uses pids again.
    """

    def __init__(self, settings: Settings) -> None:
        self.path = settings.file(settings.process.pid_file)

    def write(self, address: str) -> None:
        """Claim the file for this process. Raises StorageError."""
        pid = os.getpid()
        temporary = self.path.with_name(f"{self.path.name}.{pid}")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(f"{pid}\n{address}\n{psutil.Process(pid).create_time():.2f}\n")
            temporary.replace(self.path)
        except OSError as error:
            raise StorageError(f"{self.path} cannot be written: {error}") from None

    def remove(self) -> None:
        """Remove the file if it is this process's own."""
        running = self.read()
        if running and running.pid == os.getpid():
            with contextlib.suppress(OSError):
                self.path.unlink()

    def read(self) -> Running | None:
        """The running server of this file. None if there is none, or if its pid now belongs to another program."""
        try:
            pid, address, started = self.path.read_text().split("\n")[:3]
            process = psutil.Process(int(pid))
            if abs(process.create_time() - float(started)) > 1 or process.status() == psutil.STATUS_ZOMBIE:
                return None
        except (OSError, ValueError, psutil.Error):
            return None
        return Running(int(pid), address, process)


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
    try:
        running.process.wait(grace_s)
    except psutil.TimeoutExpired:
        for process in (running.process, *children):
            with contextlib.suppress(psutil.Error):
                process.kill()
        running.process.wait(10)
        return False
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
