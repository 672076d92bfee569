"""500 clients that send slowly, send nothing or do not read: the others do not notice, nor where 200 may connect."""

from __future__ import annotations

import contextlib
import random
import socket
import threading
import time
from collections.abc import Callable

from tests.chaos.conftest import Figures, quantile
from tests.chaos.http import Connection, address, embed_request, request
from tests.live.conftest import Server, fake

SLOW = 500
PARTS = 4  # of those that say nothing, trickle a head, trickle a body, do not read
TRICKLE_EVERY_S = 0.2
LARGE_TEXTS = [f"text {i}" for i in range(100)]  # an answer of most of a megabyte
LINES = b'{"text": "x"}\n' * 10_000
FEW_FILES = ("sh", "-c", 'ulimit -n 400 && exec "$@"', "sh")  # half of them for connections
STREAMS = 4  # of those that do not read; each holds a thread until it is cut off


class SlowClients:
    """Connections that are held, and fed a few bytes at a time by a thread."""

    def __init__(self, to: tuple[str, int], rng: random.Random) -> None:
        self._to = to
        self._rng = rng
        self._held: list[socket.socket] = []
        self._unsent: dict[socket.socket, bytes] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._trickle)

    def __enter__(self) -> SlowClients:
        for number in range(SLOW // PARTS):
            self._connect()
            self._begin(b"POST /embed HTTP/1.1\r\nHost: x\r\nX-Slow: " + b"a" * 10_000)
            self._begin(embed_request(["word " * 10_000]))
            self._connect().sendall(
                request("POST", "/embed?model=m", LINES, "application/x-ndjson")
                if number < STREAMS
                else embed_request(LARGE_TEXTS)
            )
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()
        for connection in self._held:
            connection.close()

    def _connect(self) -> socket.socket:
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)  # the answer waits at the server
        connection.connect(self._to)
        self._held.append(connection)
        return connection

    def _begin(self, data: bytes) -> None:
        """Some bytes at once, the rest in trickles that do not reach the end."""
        first = self._rng.randrange(1, 200)
        connection = self._connect()
        connection.sendall(data[:first])
        self._unsent[connection] = data[first:]

    def _trickle(self) -> None:
        while not self._stop.wait(TRICKLE_EVERY_S):
            for connection, data in self._unsent.items():
                self._unsent[connection] = data[connection.send(data[:2]) :]

    def still_open(self) -> int:
        """How many the server holds, too; an answer that is not read may be there in part."""
        return sum(not is_closed(connection) for connection in self._held)


def is_closed(connection: socket.socket) -> bool:
    connection.setblocking(False)
    try:
        return connection.recv(1, socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False
    except ConnectionError:
        return True


def test_slow_clients_do_not_stop_others(
    make_server: Callable[..., Server], kind: str, rng: random.Random, length: Callable[..., int], figures: Figures
) -> None:
    """While all of them hold on, every request is served, /health answers, and management works."""
    requests = length(short=60, long=10_000)
    server = make_server(EMBEDPOOL_SERVER__IDLE_CONNECTION_S="600")  # nobody is to be cut off meanwhile
    server.write_pool(fake("m"), fake("n", dim=8))
    server.start(kind)
    server.wait_ready()
    expected = server.vectors("n", ["x"])
    latencies_s = []
    with SlowClients(address(server), rng) as slow, Connection(address(server)) as kept:
        for number in range(requests):
            began = time.monotonic()
            answer = kept.ask(embed_request(["x"], "n"))
            latencies_s.append(time.monotonic() - began)
            assert answer.status == 200, answer.body
            assert answer.json()["vectors"] == expected
            if number % 20 == 0:
                assert server.get("/health").status_code == 200
                assert server.embed("m", [f"text {number}"]).status_code == 200
        server.cli("set-alias", "--model", "n", "--alias", "x")
        held = slow.still_open()
    assert held == SLOW
    assert server.vectors("x", ["x"]) == expected
    server.stop()
    figures("slow clients held to the end", held)
    figures("requests beside them", f"{requests}, all served")
    figures("their p50 and p99", "{:.1f} and {:.1f} ms".format(*(1000 * quantile(latencies_s, p) for p in (0.5, 0.99))))


def test_more_slow_clients_than_may_connect_do_not_stop_others(
    make_server: Callable[..., Server], kind: str, length: Callable[..., int], figures: Figures
) -> None:
    """The slow ones give way, and there are files left to serve and to manage with."""
    requests = length(short=40, long=2000)
    server = make_server()
    server.write_pool(fake("m"))
    started = server.run("pool", "start", "--detach", "--server", kind, "--port", "0", before=FEW_FILES)
    assert started.returncode == 0, started.stderr
    server.wait_ready()
    with contextlib.ExitStack() as open_ones:
        slow = [open_ones.enter_context(socket.create_connection(address(server))) for _ in range(SLOW)]
        for connection in slow[::2]:
            connection.sendall(b"POST /embed HT")
        for number in range(requests):
            assert server.get("/health").status_code == 200
            assert server.embed("m", [f"text {number}"]).status_code == 200
        server.cli("set-alias", "--model", "m", "--alias", "x")
        gave_way = sum(map(is_closed, slow))
    assert gave_way >= SLOW - 200
    assert "Too many open files" not in server.log.read_text()
    server.stop()
    figures("slow clients", f"{SLOW}, of which 200 may connect, and {gave_way} gave way")
    figures("requests beside them, each on a connection of its own", f"{2 * requests}, all served")
