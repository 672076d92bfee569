"""The cache of real servers: what it holds outlives them, however they end."""

from __future__ import annotations

import random
import signal
import threading
from collections.abc import Callable

import numpy as np
import psutil
import pytest
import requests

from tests.live.conftest import MINILM, WAIT_S, Server, fake, wait_until

MakeServer = Callable[..., Server]
DISK = {"EMBEDPOOL_CACHE__DISK_MB": "64", "EMBEDPOOL_CACHE__PATH": ".config/rows"}
TEXTS = [f"text {i} of those that come again" for i in range(400)]


def kill(server: Server) -> None:
    """All of its processes, at once."""
    family = [server.process, *server.process.children(recursive=True)]
    for process in family:
        process.send_signal(signal.SIGKILL)
    psutil.wait_procs(family, timeout=10)
    server.pid_file.unlink()


def test_vectors_of_a_real_model_outlive_a_kill(make_server: MakeServer) -> None:
    """The same to the last bit; the model is not even asked. Another limit finds none of them."""
    server = make_server(**DISK)
    server.cli("register", "--model", MINILM, "--type", "local_st", "--alias", "m")
    server.start()
    server.wait_ready()
    first = server.embed("m", TEXTS[:50])
    wait_until(lambda: server.get("/status").json()["cache"]["disk"]["entries"] == 50)
    kill(server)
    server.start()
    server.wait_ready()
    second, shorter = server.embed("m", TEXTS[:50]), server.embed("m", TEXTS[:50], max_seq_length=5)
    assert [answer.headers["X-Embedpool-Cached"] for answer in (first, second, shorter)] == ["0", "50", "0"]
    assert second.json()["vectors"] == first.json()["vectors"]
    assert server.status("m")["counters"]["rows"] == 50
    assert "100 rows" in server.cli("cache", "show")
    server.stop()


def test_workers_share_what_is_on_the_disk_and_hear_that_it_is_cleared(make_server: MakeServer) -> None:
    server = make_server(**DISK, EMBEDPOOL_SERVER__WORKERS="2")
    server.write_pool({**fake("m", dim=8), "cache": "on"})
    server.start()
    server.wait_ready()

    def entries() -> dict[int, int]:
        """Rows in the memory of each worker, as far as they answer."""
        answers = [server.get("/status").json() for _ in range(10)]
        return {answer["pid"]: answer["cache"]["memory"]["entries"] for answer in answers}

    def asked() -> list[int]:
        server.embed("m", ["a"])
        return sorted(entries().values())

    wait_until(lambda: asked() == [1, 1])
    wait_until(lambda: server.get("/status").json()["cache"]["disk"]["entries"] == 1)
    assert server.cli("cache", "clear", "--model", "m").strip() == "cleared"
    wait_until(lambda: sorted(entries().values()) == [0, 0])
    wait_until(lambda: server.get("/status").json()["cache"]["disk"]["entries"] == 0)
    server.stop()


def test_a_kill_under_load_leaves_no_wrong_row(make_server: MakeServer, request: pytest.FixtureRequest) -> None:
    """At a hundred moments with --long."""
    chance = random.Random(11)
    server = make_server(**DISK, EMBEDPOOL_CACHE__MEMORY_MB="0", EMBEDPOOL_SERVER__WORKERS="2")
    server.write_pool({**fake("m", dim=384), "cache": "on"})
    right = None
    for _ in range(100 if request.config.getoption("--long") else 3):
        server.start()
        server.wait_ready()
        if right is None:
            answer = server.post("/embed", {"model": "m", "texts": TEXTS}, headers={"Cache-Control": "no-store"})
            right = np.array(answer.json()["vectors"])
        over = threading.Event()
        threads = [threading.Thread(target=ask, args=(server.url, i, over)) for i in range(4)]
        for thread in threads:
            thread.start()
        over.wait(0.5 + chance.random())
        kill(server)
        over.set()
        for thread in threads:
            thread.join()
        assert "damaged" not in server.log.read_text()
    server.start()
    server.wait_ready()
    answer = server.embed("m", TEXTS)
    assert int(answer.headers["X-Embedpool-Cached"]) > 0
    assert np.array_equal(np.array(answer.json()["vectors"]), right)
    server.stop()


def ask(url: str, seed: int, over: threading.Event) -> None:
    """Until the server is gone."""
    chance = random.Random(seed)
    with requests.Session() as session:
        while not over.is_set():
            try:
                session.post(f"{url}/embed", json={"model": "m", "texts": chance.sample(TEXTS, 20)}, timeout=WAIT_S)
            except requests.RequestException:
                return
