"""pool.yml edited under load: nobody notices who should not."""

from __future__ import annotations

import json
import random
import tempfile
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import requests
from prometheus_client.parser import text_string_to_metric_families

from tests.live.conftest import Server, fake, wait_until


class Clients:
    """Threads that send without pause and count what they get."""

    def __init__(self, server: Server, model: str, count: int) -> None:
        self.codes: Counter[int] = Counter()
        self.wrong: list[str] = []
        self._stop = threading.Event()
        self._url = server.url
        self._model = model
        self._threads = [threading.Thread(target=self._run, args=(i,)) for i in range(count)]

    def __enter__(self) -> Clients:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _run(self, number: int) -> None:
        rng = random.Random(number)
        with requests.Session() as session:
            while not self._stop.is_set():
                texts = [f"text {rng.random()}" for _ in range(rng.randint(1, 8))]
                answer = session.post(f"{self._url}/embed", json={"model": self._model, "texts": texts}, timeout=60)
                self.codes[answer.status_code] += 1
                if answer.status_code != 200:
                    self.wrong.append(answer.text)
                elif len(answer.json()["vectors"]) != len(texts):
                    self.wrong.append("too few vectors")


def test_fifty_edits_under_load_fail_no_request(server: Server) -> None:
    """Alias moves, another model switched on and off, limits changed, broken files: 0 failed requests."""
    rng = random.Random(3)
    server.write_pool(fake("steady", delay_ms=2), fake("other", alias="o0"))
    server.start()
    server.wait_ready()
    broken = ["models: [", "models: 3", "models:\n  - {model: steady, driver: {type: fake}, enbled: true}\n"]
    with Clients(server, "steady", 16) as clients:
        for edit in range(50):
            if edit in (10, 25, 40):
                server.pool_yml.write_text(broken.pop())
                wait_until(lambda: not server.get("/status").json()["last_reload"]["ok"])
                continue
            alias, enabled, length = f"o{edit}", rng.random() < 0.5, rng.randint(4, 512)
            dim = 384 if edit % 10 else 128 + edit  # now and then a change that loads anew
            server.write_pool(
                fake("steady", delay_ms=2, max_seq_length=length, dim=dim, alias=f"s{edit}"),
                fake("other", alias=alias, enabled=enabled),
            )
            wait_until(
                lambda alias=alias, dim=dim: (
                    server.get(f"/ready/{alias}").status_code != 404
                    and "successor" not in server.status("steady")
                    and server.embed("steady", ["x"]).json()["dim"] == dim
                )
            )
    assert clients.wrong == []
    assert set(clients.codes) == {200}
    assert sum(clients.codes.values()) > 100


def test_a_changed_model_serves_until_its_successor_is_loaded(server: Server) -> None:
    """A change that loads for long leaves the old model answering; one that cannot load never takes over."""
    server.write_pool(fake("m", dim=8))
    server.start()
    server.wait_ready()
    server.write_pool(fake("m", dim=16, load_delay_ms=1500))
    wait_until(lambda: "successor" in server.status("m"))
    assert server.embed("m", ["x"]).json()["dim"] == 8
    wait_until(lambda: server.embed("m", ["x"]).json()["dim"] == 16)
    server.write_pool(fake("m", dim=32, fault="load"))
    wait_until(lambda: server.status("m").get("successor", {}).get("state") == "failed")
    assert "fault: load" in server.status("m")["successor"]["last_error"]
    assert server.embed("m", ["x"]).json()["dim"] == 16


def test_a_symlinked_pool_file_is_followed_when_the_link_moves(server: Server) -> None:
    """Kubernetes swaps a link instead of writing the file."""
    for number in (1, 2):
        folder = server.folder / f"data{number}"
        folder.mkdir()
        (folder / "pool.yml").write_text(json.dumps({"models": [fake(f"m{number}")]}))
    current = server.folder / "current"
    current.symlink_to("data1")
    server.pool_yml.unlink()
    server.pool_yml.symlink_to(current / "pool.yml")
    server.start()
    server.wait_ready()
    assert server.embed("m1", ["x"]).status_code == 200
    fresh = server.folder / "fresh"
    fresh.symlink_to("data2")
    fresh.replace(current)
    wait_until(lambda: server.embed("m2", ["x"]).status_code == 200)
    assert server.embed("m1", ["x"]).status_code == 404


def test_polling_finds_changes_too(make_server: Callable[..., Server]) -> None:
    """`hot_reload.observer: polling` is for file systems without events."""
    server = make_server(EMBEDPOOL_HOT_RELOAD__OBSERVER="polling", EMBEDPOOL_HOT_RELOAD__POLL_INTERVAL_S="0.1")
    server.write_pool(fake("a"))
    server.start()
    server.write_pool(fake("a"), fake("b"))
    wait_until(lambda: server.embed("b", ["x"]).status_code == 200)


def test_two_workers_converge(make_server: Callable[..., Server]) -> None:
    """A change through either worker is followed by both, and any of them shows what all have counted."""
    folders = shared_folders()
    server = make_server(EMBEDPOOL_SERVER__WORKERS="2")
    server.write_pool(fake("a"))
    server.start()
    server.wait_ready()
    pids: set[int] = set()
    wait_until(lambda: pids.add(server.get("/status").json()["pid"]) or len(pids) == 2)
    server.cli("register", "--model", "b", "--type", "fake", "--set", "load_delay_ms=300")
    answers = {server.embed("b", ["x"]).status_code for _ in range(20)}  # each on a connection of its own
    assert answers <= {200, 503}
    seen: dict[int, bool] = {}

    def both_know() -> bool:
        status = server.get("/status").json()
        seen[status["pid"]] = any(m["model"] == "b" and m["state"] == "ready" for m in status["models"])
        return len(seen) == 2 and all(seen.values())

    wait_until(both_know)
    assert np.asarray(server.vectors("b", ["x"])).shape == (1, 384)
    before = {series: total(server, series) for series in ("embedpool_requests_total", "embedpool_batch_items_sum")}
    for i in range(20):
        server.vectors("b", [f"text {i}"])
    for _ in range(6):  # whichever worker answers
        assert {series: total(server, series) - value for series, value in before.items()} == dict.fromkeys(before, 20)
    wait_until(lambda: total(server, "embedpool_replicas") == 4)
    server.stop()
    assert shared_folders() <= folders  # what a killed server left may have gone


def shared_folders() -> set[Path]:
    return {f for place in ("/dev/shm", tempfile.gettempdir()) for f in Path(place).glob("embedpool-metrics-*")}


def total(server: Server, series: str) -> float:
    """The sum over all labels, as one worker shows it."""
    families = text_string_to_metric_families(server.get("/metrics").text)
    return sum(sample.value for family in families for sample in family.samples if sample.name == series)
