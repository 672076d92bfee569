"""Workers that are born beside broken files: never more open, emptier or less ready than the ones before them."""

from __future__ import annotations

import os
import random
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import requests

from tests.chaos.conftest import Figures
from tests.live.conftest import WAIT_S, Server, fake, wait_until

SPOILT = {"gone": None, "empty": "", "cut off": "models: [{model", "unknown key": "nonsense: 1\n", "binary": "\0\1"}


def workers_of(server: Server) -> set[int]:
    return {child.pid for child in server.process.children() if child.is_running()}


def spoil(file: Path, text: str | None) -> None:
    if text is None:
        file.unlink()
    else:
        file.write_text(text)


def bear(server: Server, rng: random.Random, count: int) -> None:
    """Have a worker born, or all of them anew, and wait for it."""
    before = workers_of(server)
    if rng.random() < 0.5:
        gone = {rng.choice(sorted(before))}
        os.kill(*gone, signal.SIGKILL)
    else:
        gone = before
        os.kill(server.pid, signal.SIGHUP)
    wait_until(lambda: not gone & workers_of(server) and len(workers_of(server)) == count)


class Asking(threading.Thread):
    """Asks without a key, and whether the server is ready, as fast as it is answered."""

    def __init__(self, server: Server, key: str) -> None:
        super().__init__(daemon=True)
        self._url, self._key = server.url, key
        self.over = threading.Event()
        self.opened: list[int] = []
        self.emptied: list[tuple[int, int]] = []
        self.asked = 0

    def run(self) -> None:
        while not self.over.is_set():
            for key in (None, self._key):
                try:
                    status = self.status(key)
                    ready = requests.get(f"{self._url}/ready", timeout=WAIT_S).status_code
                except requests.ConnectionError:
                    continue  # the worker that was killed had it
                self.asked += 1
                if key is None and status not in (401, 503):
                    self.opened.append(status)
                if status not in (200, 401, 503) or ready not in (200, 503):
                    self.emptied.append((status, ready))

    def status(self, key: str | None = None) -> int:
        """Of the answer to a request."""
        headers = {"X-API-Key": key} if key else {}
        body = {"model": "m", "texts": ["a"]}
        return requests.post(f"{self._url}/embed", json=body, headers=headers, timeout=WAIT_S).status_code


@pytest.mark.parametrize("count", [1, 2])
def test_births_beside_broken_files(
    make_server: Callable[..., Server],
    rng: random.Random,
    length: Callable[..., int],
    figures: Figures,
    count: int,
) -> None:
    """kill -9 and SIGHUP, beside config.yml, keys.yml and pool.yml that are gone or broken in some way."""
    births = length(short=6, long=50)
    server = make_server(EMBEDPOOL_SERVER__WORKERS=str(count))
    server.write_pool(fake("m"))
    key = server.run("key", "create", "--scopes", "admin").stdout.strip()
    server.start()
    server.wait_ready()
    root = server.pool_yml.parent
    files = [root / "config.yml", root / "keys.yml", server.pool_yml]
    whole = {file: file.read_text() for file in files}
    master = server.pid
    asking = Asking(server, key)
    asking.start()
    for _ in range(births):
        spoilt = rng.sample(files, rng.randint(1, 3))
        for file in spoilt:
            spoil(file, rng.choice(list(SPOILT.values())))
        bear(server, rng, count)
        server.wait_ready()
        assert psutil.pid_exists(master)
        assert asking.status() in (401, 503)
        for file in spoilt:
            file.write_text(whole[file])
        wait_until(lambda: {asking.status(key) for _ in range(2 * count)} == {200})
    asking.over.set()
    asking.join(WAIT_S)
    assert not asking.opened
    assert not asking.emptied
    assert server.pid == master
    server.stop()
    figures("births", births)
    figures("asked meanwhile", asking.asked)


def test_a_hangup_refuses_no_request(make_server: Callable[..., Server], figures: Figures) -> None:
    """While the new worker loads its models the old one serves; then new settings hold, among them those of the log."""
    server = make_server()
    server.write_pool(fake("m", load_delay_ms=1500))
    server.start()
    server.wait_ready()
    before = workers_of(server)
    config = server.pool_yml.with_name("config.yml")
    config.write_text(config.read_text().replace("format: text", "format: json").replace("level: info", "level: debug"))
    answers: list[int] = []
    os.kill(server.pid, signal.SIGHUP)
    while before & workers_of(server):
        try:
            answers.append(server.embed("m", ["a"]).status_code)
        except requests.ConnectionError:
            answers.append(0)
    for _ in range(20):
        answers.append(server.embed("m", ["a"]).status_code)
    assert set(answers) == {200}
    assert len(answers) > 20  # some of them while it loaded
    assert server.log.read_text().rstrip().splitlines()[-1].startswith("{")
    figures("requests meanwhile", len(answers))


def test_a_hangup_beside_a_broken_config_is_survived(server: Server) -> None:
    """The settings stay, the log says why, and the next good file is taken."""
    server.write_pool(fake("m"))
    server.start()
    server.wait_ready()
    config = server.pool_yml.with_name("config.yml")
    whole = config.read_text()
    config.write_text(whole + "\nnonsense: 1\n")
    before = workers_of(server)
    os.kill(server.pid, signal.SIGHUP)
    wait_until(lambda: not before & workers_of(server))
    assert "nonsense" in server.log.read_text()
    assert server.embed("m", ["a"]).status_code == 200
    config.write_text(whole.replace("requests: true", "requests: false"))
    before = workers_of(server)
    os.kill(server.pid, signal.SIGHUP)
    wait_until(lambda: not before & workers_of(server))
    size = server.log.stat().st_size
    assert server.embed("m", ["a"]).status_code == 200
    assert "POST" not in server.log.read_text()[size:]


@pytest.mark.parametrize("name", ["SIGUSR1", "SIGUSR2", "SIGWINCH"])
def test_signals_that_change_nothing(server: Server, name: str) -> None:
    """The same workers serve on."""
    server.write_pool(fake("m"))
    server.start()
    server.wait_ready()
    before = workers_of(server)
    os.kill(server.pid, getattr(signal, name))
    os.kill(server.pid, signal.SIGTTIN)  # signals are handled in order: it has seen the other one
    wait_until(lambda: len(workers_of(server)) == 2)
    assert before < workers_of(server)
    assert server.embed("m", ["a"]).status_code == 200
    os.kill(server.pid, signal.SIGTTOU)
    wait_until(lambda: len(workers_of(server)) == 1)
    assert server.embed("m", ["a"]).status_code == 200
