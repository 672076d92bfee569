"""A Ray cluster on this machine alone, for a server whose config.yml names none.

It belongs to one server process and ends with it. It listens on loopback addresses, asks for a token, has no dashboard
and a bounded object store. A program of its own watches it.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from filelock import FileLock

from embedpool.errors import ModelFailed
from embedpool.places.cores import available_cores

STARTS_WITHIN_S = 90.0
LOOK_S = 0.2
# The first is Ray's own switch for systems on which it makes no cluster of several machines: all its sockets are on
# loopback addresses then.
ONLY_HERE = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "token",
}  # fmt: skip


def local_cluster(state_dir: Path, object_store_mb: int) -> str:
    """The address of the cluster of the server whose child this is, started if need be. Raises ModelFailed.

    This process's environment holds its token from then on.
    """
    folder = state_dir / "ray"
    folder.mkdir(0o700, parents=True, exist_ok=True)
    server = os.getppid()
    told = folder / f"{server}.json"
    with FileLock(folder / "lock"):
        _forget_those_that_ended(folder)
        if not told.exists():
            _start(server, told, object_store_mb)
        known = json.loads(told.read_text())
    os.environ.update(ONLY_HERE, RAY_AUTH_TOKEN=known["token"])
    return str(known["address"])


def _start(server: int, told: Path, object_store_mb: int) -> None:
    environment = {**os.environ, **ONLY_HERE, "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    program = f"from {__name__} import main; main({server}, {str(told)!r}, {object_store_mb}, {available_cores()})"
    watcher = subprocess.Popen(  # noqa: S603  (our own program)
        [sys.executable, "-c", program], env=environment, start_new_session=True, stdin=subprocess.DEVNULL
    )
    until = time.monotonic() + STARTS_WITHIN_S
    while not told.exists():
        if watcher.poll() is not None or time.monotonic() > until:
            watcher.kill()
            raise ModelFailed("a Ray cluster could not be started on this machine; the server's log says more")
        time.sleep(LOOK_S)


def _forget_those_that_ended(folder: Path) -> None:
    for told in folder.glob("*.json"):
        with contextlib.suppress(OSError, ValueError):
            if not psutil.pid_exists(json.loads(told.read_text())["pid"]):
                told.unlink()


def main(server: int, told_in: str, object_store_mb: int, cores: int) -> None:
    """The watching program: run the cluster until the server is gone."""
    owner, told = psutil.Process(server), Path(told_in)
    port = _free_port()
    session = tempfile.mkdtemp(prefix="embedpool-ray-")  # its sockets' paths must be short
    command = [
        sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", f"--port={port}",
        "--node-ip-address=127.0.0.1", "--include-dashboard=false", f"--num-cpus={cores}",
        f"--object-store-memory={object_store_mb << 20}", f"--temp-dir={session}",
    ]  # fmt: skip
    cluster = psutil.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        while owner.is_running() and cluster.poll() is None:
            if not told.exists() and _answers(port):
                address = f"127.0.0.1:{port}"
                fresh = told.with_suffix(".new")
                with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
                    json.dump({"address": address, "token": os.environ["RAY_AUTH_TOKEN"], "pid": os.getpid()}, file)
                fresh.replace(told)
            time.sleep(LOOK_S)
    finally:
        told.unlink(missing_ok=True)
        family = [cluster, *cluster.children(recursive=True)] if cluster.is_running() else []
        for process in family:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(family, timeout=10)
        shutil.rmtree(session, ignore_errors=True)


def _answers(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
