"""Faults of drivers and of remote services under load: everybody is answered, rightly, and the model comes back."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import orjson
import psutil
import pytest

from embedpool.config.spec import FakeConfig
from embedpool.drivers.fake import FakeDriver
from tests.chaos.conftest import Figures, foreground
from tests.chaos.http import Connection, Cut, address, embed_request
from tests.conftest import run
from tests.live.conftest import Server, fake, wait_until

CLIENTS = 32
DIM = 8
DEADLINE_S, ANSWER_MARGIN_S = 10.0, 2.0
BACK_WITHIN_S = 10.0
CHILDREN = 2 * 3  # two replicas each of the models that hang, crash and are killed
GOOD_TEXTS = [f"text {i}" for i in range(200)]
BAD = "bad"
TEXT_FAULTS = ("raise", "short", "nan", "hang", "crash")  # come with a text
REMOTE_FAULTS = ("drop", "500", "garbage", "slow")
FAULTS = (*TEXT_FAULTS, "kill", *REMOTE_FAULTS)
SPARES_OTHER_REQUESTS = ("raise", "short", "nan", "kill", "slow")
REMOTE_DELAY_S = 0.02
REMOTE_CALLS_AT_ONCE = 8
SEND_BAD = {"hang": 2, "crash": 2}  # clients; of the others all do


class Remote(ThreadingHTTPServer):
    """A remote service of embedpool's own protocol that goes wrong as `fault` says."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.fault = ""
        self.url = f"http://127.0.0.1:{self.server_port}/embed"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Remote

    def do_POST(self) -> None:
        texts = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["texts"]
        fault = self.server.fault
        time.sleep(REMOTE_DELAY_S * (10 if fault == "slow" else 1))
        if fault == "drop":
            self.close_connection = True
            return
        body = b'{"vectors": [[' if fault == "garbage" else orjson.dumps({"vectors": vectors_of(texts, normal=False)})
        self.send_response(500 if fault == "500" else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def remote() -> Iterator[Remote]:
    with Remote() as service:
        thread = threading.Thread(target=service.serve_forever, args=(0.05,))
        thread.start()
        yield service
        service.shutdown()
        thread.join()


def vectors_of(texts: list[str], *, normal: bool = True) -> Any:
    vectors = run(FakeDriver(FakeConfig(dim=DIM)), texts).rows.values
    return (vectors / (vectors**2).sum(axis=1, keepdims=True) ** 0.5 if normal else vectors).tolist()


EXPECTED = dict(zip(GOOD_TEXTS, vectors_of(GOOD_TEXTS), strict=True))


def is_right(texts: list[str], vectors: list[list[float]]) -> bool:
    return len(vectors) == len(texts) and all(
        abs(a - b) < 1e-5
        for text, vector in zip(texts, vectors, strict=True)
        for a, b in zip(EXPECTED[text], vector, strict=True)
    )


@dataclass
class Load:
    """32 clients that ask the faulty model and the other one until they are told to stop."""

    to: tuple[str, int]
    fault: str
    seed: float
    is_on: threading.Event = field(default_factory=threading.Event)  # texts that bring the fault are sent
    over: threading.Event = field(default_factory=threading.Event)
    answers: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    slowest_s: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        clients = [threading.Thread(target=self._client, args=(number,)) for number in range(CLIENTS)]
        for client in clients:
            client.start()
        try:
            yield
        finally:
            self.over.set()
            for client in clients:
                client.join()

    def _client(self, number: int) -> None:
        rng = random.Random(f"{self.seed} {number}")
        sends_bad = number < SEND_BAD.get(self.fault, CLIENTS)
        with Connection(self.to) as connection:
            while not self.over.is_set():
                model = "other" if rng.random() < 0.25 else model_of(self.fault)
                texts = rng.sample(GOOD_TEXTS, rng.randint(1, 3))
                has_bad = model != "other" and self.is_on.is_set() and sends_bad and rng.random() < 0.05
                if has_bad:
                    texts[rng.randrange(len(texts))] = f"{BAD} {rng.random()}"
                self._ask(connection, model, texts, has_bad=has_bad)

    def _ask(self, connection: Connection, model: str, texts: list[str], *, has_bad: bool) -> None:
        began = time.monotonic()
        try:
            answer = connection.ask(embed_request(texts, model))
        except (Cut, OSError) as error:
            with self.lock:
                self.wrong.append(f"{model}: no answer: {error!r}")
            raise
        took_s = time.monotonic() - began
        fault = None
        if took_s > DEADLINE_S + ANSWER_MARGIN_S:
            fault = f"answered after {took_s:.1f} s"
        elif answer.status == 200 and (has_bad or not is_right(texts, answer.json()["vectors"])):
            fault = "wrong vectors"
        elif answer.status != 200 and not has_bad and (model == "other" or self.fault in SPARES_OTHER_REQUESTS):
            fault = f"{answer.status}: {answer.body!r}"
        with self.lock:
            self.answers[f"{'other' if model == 'other' else 'faulty'} {answer.status}"] += 1
            self.slowest_s = max(self.slowest_s, took_s)
            if fault:
                self.wrong.append(f"{model}: {fault}")


def model_of(fault: str) -> str:
    return "remote" if fault in REMOTE_FAULTS else fault


def children_of(server: Server) -> list[psutil.Process]:
    """The processes that hold a model."""
    found = []
    for child in server.process.children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "spawn_main" in " ".join(child.cmdline()):
                found.append(child)
    return found


def working_of(server: Server) -> psutil.Process:
    """The process that serves."""
    family = [server.process, *server.process.children(recursive=True)]
    children = children_of(server)
    return max((p for p in family if p not in children), key=lambda p: p.num_threads())


def open_files(process: psutil.Process) -> list[str]:
    """What they are, to tell one that was left behind."""
    return sorted(os.readlink(file) for file in Path(f"/proc/{process.pid}/fd").iterdir())


def held_by(server: Server, remote: Remote) -> dict[str, int]:
    """What a server that rests holds: threads and files of its working process, children, shared memory."""
    children, working = children_of(server), working_of(server)
    to_remote = sum(bool(c.raddr) and c.raddr.port == remote.server_port for c in working.net_connections())
    return {
        "threads": working.num_threads(),
        "files": working.num_fds() - to_remote,
        "connections beyond those kept for the next call": max(to_remote - REMOTE_CALLS_AT_ONCE, 0),
        "children": len(children),
        "shared memory": sum("/dev/shm" in m.path for m in working.memory_maps(grouped=False)),
    }


def serves(server: Server, model: str) -> bool:
    with Connection(address(server)) as connection:
        answer = connection.ask(embed_request(["text 0"], model))
        return answer.status == 200 and is_right(["text 0"], answer.json()["vectors"])


def test_faults_cost_nobody_else_anything(
    make_server: Callable[..., Server],
    kind: str,
    remote: Remote,
    rng: random.Random,
    length: Callable[..., Any],
    figures: Figures,
) -> None:
    """Every request is answered within its deadline and every success is right; the other model makes no error; the
    faulty one serves again within 10 s of the fault's end; nothing is left behind."""
    server = make_server(EMBEDPOOL_DEFAULTS__REQUEST_TIMEOUT_S=str(int(DEADLINE_S)))
    apart: dict[str, Any] = {"isolation": "process", "batch_timeout_s": 0.5, "scaling": {"min": 2, "max": 2}}
    remote_config = {"base_url": remote.url, "timeout_s": 1, "retries": 1}
    server.write_pool(
        *(
            fake(fault, dim=DIM, fault=fault, fault_text=BAD, **(apart if fault in ("hang", "crash") else {}))
            for fault in TEXT_FAULTS
        ),
        fake("kill", dim=DIM, delay_ms=2, **apart),
        fake("other", dim=DIM),
        {"model": "remote", "driver": {"type": "http", "config": remote_config}},
    )
    rounds = length(short=len(FAULTS), long=50)
    order = itertools.chain(rng.sample(FAULTS, len(FAULTS)), iter(lambda: rng.choice(FAULTS), ""))
    answers: Counter[str] = Counter()
    slowest_s = back_s = 0.0
    with foreground(server, kind):
        server.wait_ready()
        assert all(serves(server, model_of(fault)) for fault in (*FAULTS, "other"))
        at_rest = {}
        for number, fault in zip(range(rounds), order, strict=False):
            load = Load(address(server), fault, rng.random())
            with load.running():
                bring(fault, load, server, remote, rng, seconds=length(short=0.4, long=2.0))
                ended = time.monotonic()
                wait_until(lambda fault=fault: serves(server, model_of(fault)))
                back_s = max(back_s, time.monotonic() - ended)
            assert load.wrong == [], fault
            assert back_s < BACK_WITHIN_S, fault
            answers += load.answers
            slowest_s = max(slowest_s, load.slowest_s)
            wait_until(lambda: server.get("/ready").status_code == 200)
            if number and not at_rest:
                wait_until(lambda: len(children_of(server)) == CHILDREN)  # also those that are being replaced
                at_rest = held_by(server, remote)
        assert server.status("other")["counters"]["errors"] == {}
        with contextlib.suppress(AssertionError):  # said better below
            wait_until(lambda: not more(held_by(server, remote), at_rest), 20)
        assert more(held_by(server, remote), at_rest) == {}, open_files(working_of(server))
    figures("rounds", rounds)
    for name, count in sorted(answers.items()):
        figures(name, count)
    figures("slowest answer", f"{slowest_s:.1f} s")
    figures("longest until it served again", f"{back_s:.1f} s")


def bring(fault: str, load: Load, server: Server, remote: Remote, rng: random.Random, *, seconds: float) -> None:
    """The fault, for a while."""
    if fault in REMOTE_FAULTS:
        remote.fault = fault
        time.sleep(seconds)
        remote.fault = ""
    elif fault == "kill":
        for _ in range(2):
            time.sleep(seconds / 2)
            with contextlib.suppress(psutil.Error):
                psutil.Process(server.status("kill")["runs_on"]["pid"]).kill()
    else:
        load.is_on.set()
        time.sleep(seconds)
        load.is_on.clear()


def more(found: dict[str, int], before: dict[str, int]) -> dict[str, int]:
    """What there is more of, and how much."""
    return {name: found[name] - count for name, count in before.items() if found[name] > count}
