"""Overload, slow clients, many clients: what is refused is refused clearly, what is accepted is served."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import time
from collections import Counter
from collections.abc import Callable
from typing import BinaryIO

import orjson
import pytest

from tests.chaos.http import embed_request
from tests.live.conftest import Server, fake, wait_until


async def burst(host: str, port: int, count: int, texts: int, first: int = 0) -> list[tuple[int, bool]]:
    """`count` requests at once, each on its own connection and of so many texts, no two alike: status and whether it
    said Retry-After."""

    async def one(number: int) -> tuple[int, bool]:
        body = json.dumps({"model": "m", "texts": [f"text {number} {i}" for i in range(texts)]}).encode()
        reader, writer = await asyncio.open_connection(host, port)
        head = f"POST /embed HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        head += f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        writer.write(head.encode() + body)
        answer = await reader.read()
        writer.close()
        return int(answer.split(b" ", 2)[1]), b"\r\nRetry-After: " in answer

    return await asyncio.gather(*(one(number) for number in range(first, first + count)))


def address(server: Server) -> tuple[str, int]:
    host, port = server.url.removeprefix("http://").split(":")
    return host, int(port)


def test_a_burst_gives_200_or_429_and_nothing_is_left(make_server: Callable[..., Server], kind: str) -> None:
    """2,000 requests at once on a queue of 64 texts at 50 ms a batch; /health answers throughout; all is gone after."""
    server = make_server(EMBEDPOOL_SERVER__CONNECTION_LIMIT="4000")
    server.write_pool(fake("m", delay_ms=50, queue={"max_size": 64}))
    server.start(kind)
    server.wait_ready()
    family = [server.process, *server.process.children(recursive=True)]

    async def everything() -> tuple[list[tuple[int, bool]], list[int]]:
        sending = asyncio.ensure_future(burst(*address(server), 2000, 1))
        health = []
        while not sending.done():
            health.append((await asyncio.to_thread(server.get, "/health")).status_code)
        return sending.result(), health

    answers, health = asyncio.run(everything())
    codes = Counter(status for status, _ in answers)
    assert set(codes) == {200, 429}
    assert all(said for status, said in answers if status == 429)
    assert set(health) == {200}
    status = server.status("m")
    assert (status["queue_len"], status["replicas_busy"]) == (0, 0)
    assert status["counters"]["texts"] == codes[200]
    url = server.url
    server.stop()
    assert not [p for p in family if p.is_running()]
    host, port = url.removeprefix("http://").split(":")
    with contextlib.closing(socket.socket()) as probe:
        assert probe.connect_ex((host, int(port))) != 0


def test_more_texts_than_the_queue_holds_are_no_overload(make_server: Callable[..., Server], kind: str) -> None:
    """64 clients of 64 texts each, at once and again: none is refused, and a query beside them passes most of them."""
    server = make_server()
    server.write_pool(fake("m", delay_ms=20))
    server.start(kind)
    server.wait_ready()

    async def beside() -> tuple[list[tuple[int, bool]], int]:
        ended: list[int] = []

        async def one(texts: int, number: int) -> list[tuple[int, bool]]:
            answers = await burst(*address(server), 1, texts, number)
            ended.append(texts)
            return answers

        bulk = [asyncio.ensure_future(one(64, number)) for number in range(64)]
        await asyncio.wait(bulk, return_when=asyncio.FIRST_COMPLETED)
        query = await one(1, 64)
        answers = [answer for client in await asyncio.gather(*bulk) for answer in client]
        return answers + query, ended.index(1)

    for _ in range(3):
        answers, before_the_query = asyncio.run(beside())
        assert Counter(status for status, _ in answers) == {200: 65}
        assert before_the_query < 32
    assert server.status("m")["counters"]["errors"] == {}


def test_slow_and_idle_clients_hold_no_thread(make_server: Callable[..., Server], kind: str) -> None:
    """300 clients that send half a request, or nothing, do not delay the others, on 4 request threads."""
    server = make_server(EMBEDPOOL_SERVER__THREADS="4", EMBEDPOOL_SERVER__CONNECTION_LIMIT="1000")
    server.write_pool(fake("m"))
    server.start(kind)
    server.wait_ready()
    slow = []
    for i in range(300):
        connection = socket.create_connection(address(server))
        if i % 3:
            connection.sendall(b"POST /embed HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n" + b"\r\n{" * (i % 2))
        slow.append(connection)
    for _ in range(20):
        assert server.embed("m", ["x"]).status_code == 200
    for connection in slow:
        connection.close()


def test_requests_sent_at_once_on_one_connection_are_all_answered(server: Server, kind: str) -> None:
    """A client need not wait for an answer before it sends its next request; one that says Expect is told to go on."""
    server.write_pool(fake("m"))
    server.start(kind)
    server.wait_ready()
    bodies = [json.dumps({"model": "m", "texts": [f"text {i}"]}).encode() for i in range(20)]
    head = "POST /embed HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    with contextlib.closing(socket.create_connection(address(server))) as connection:
        connection.sendall(b"".join(f"{head}Content-Length: {len(b)}\r\n\r\n".encode() + b for b in bodies))
        answers = connection.makefile("rb")
        assert [status_of(answers) for _ in bodies] == [200] * 20
        connection.sendall(f"{head}Expect: 100-continue\r\nContent-Length: {len(bodies[0])}\r\n\r\n".encode())
        assert status_of(answers) == 100
        connection.sendall(bodies[0])
        assert status_of(answers) == 200
        answers.close()


def status_of(answers: BinaryIO) -> int:
    """Read one answer to its end."""
    status, length = int(answers.readline().split()[1]), 0
    while line := answers.readline().strip():
        if line.lower().startswith(b"content-length:"):
            length = int(line.split(b":")[1])
    answers.read(length)
    return status


def test_a_client_that_goes_away_costs_no_compute(server: Server, kind: str) -> None:
    """Its waiting texts are dropped before they reach the model."""
    server.write_pool(fake("m", delay_ms=300))
    server.start(kind)
    server.wait_ready()

    def ask(connection: socket.socket, number: int) -> None:
        body = json.dumps({"model": "m", "texts": [f"x {number}"]}).encode()
        head = "POST /embed HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)

    first = socket.create_connection(address(server))
    ask(first, 0)
    wait_until(lambda: server.status("m")["replicas_busy"])
    gone = [socket.create_connection(address(server)) for _ in range(5)]
    for number, connection in enumerate(gone, 1):
        ask(connection, number)
    wait_until(lambda: server.status("m")["queue_len"] == 5)
    for connection in gone:
        connection.close()
    wait_until(lambda: server.status("m")["counters"]["errors"].get("client_gone") == 5)
    assert server.status("m")["counters"]["rows"] == 1
    assert first.recv(12) == b"HTTP/1.1 200"
    first.close()


def final_answer(stream: BinaryIO) -> bytes:
    """The status line of what is no interim answer."""
    while (line := stream.readline()).startswith(b"HTTP/1.1 100 "):
        assert stream.readline() == b"\r\n"
    return line


def test_a_client_that_has_shut_its_sending_side_gets_its_answer(server: Server, kind: str) -> None:
    """Whether the answer is small or large, on its own or one of several; then the connection ends."""
    server.write_pool(fake("m", delay_ms=300))
    server.start(kind)
    server.wait_ready()
    for texts, times in ((1, 1), (1, 3), (2000, 1)):
        with socket.create_connection(address(server), timeout=60) as connection:
            connection.sendall(embed_request(["a"] * texts) * times)
            connection.shutdown(socket.SHUT_WR)
            stream = connection.makefile("rb")
            for _ in range(times):
                assert final_answer(stream).startswith(b"HTTP/1.1 200 ")
                length = 0
                while (line := stream.readline()) != b"\r\n":
                    if line.lower().startswith(b"content-length:"):
                        length = int(line.split(b":")[1])
                assert len(json.loads(stream.read(length))["vectors"]) == texts
            assert stream.read() == b""


def test_health_is_answered_whatever_all_threads_wait_for(make_server: Callable[..., Server], kind: str) -> None:
    """Each request thread is in a batch that does not end."""
    server = make_server(EMBEDPOOL_SERVER__THREADS="4", EMBEDPOOL_HOT_RELOAD__POLL_INTERVAL_S="0.2")
    server.write_pool(fake("m", fault="hang", fault_text="hang"))
    server.start(kind)
    server.wait_ready()
    with contextlib.ExitStack() as stack:
        for _ in range(8):
            connection = stack.enter_context(socket.create_connection(address(server), timeout=60))
            connection.sendall(embed_request(["hang"]))
        other = stack.enter_context(socket.create_connection(address(server), timeout=1))
        for _ in range(3):
            assert server.get("/health").status_code == 200
            assert server.get("/ready").status_code == 200
        other.sendall(b"GET /status HTTP/1.1\r\nHost: x\r\n\r\n")
        with pytest.raises(TimeoutError):  # no thread is left for it
            other.recv(1)


def test_large_bodies_share_the_room_that_is_set(make_server: Callable[..., Server], kind: str) -> None:
    """One that does not fit beside another is refused by its head; when that one's connection is cut there is room."""
    server = make_server(EMBEDPOOL_LIMITS__MAX_SPOOLED_BYTES="4000000")
    server.write_pool(fake("m"))
    server.start(kind)
    server.wait_ready()

    def begun(connection: socket.socket, path: str, media_type: str) -> int:
        """The status of the answer to the head alone: 100 if the body may follow."""
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\n"
        connection.sendall(f"{head}Content-Type: {media_type}\r\nContent-Length: 3000000\r\n\r\n".encode())
        return int(connection.recv(12).split()[1])

    kinds = [("/embed", "application/json"), ("/embed?model=m", "application/x-ndjson")]
    for first, second in (kinds, reversed(kinds)):
        with socket.create_connection(address(server), timeout=60) as holds:
            assert begun(holds, *first) == 100
            with socket.create_connection(address(server), timeout=60) as other:
                assert begun(other, *second) == 429

        def has_room(of: tuple[str, str] = second) -> bool:
            with socket.create_connection(address(server), timeout=60) as again:
                return begun(again, *of) == 100

        wait_until(has_room)


def test_the_deadline_is_counted_from_the_first_byte(server: Server, kind: str) -> None:
    """A client that sends for longer than it would wait gets 504, and nothing is computed for it."""
    server.write_pool(fake("m"))
    server.start(kind)
    server.wait_ready()
    host = b"Host: localhost\r\n"
    sent = embed_request(["a"]).replace(host, host + b"X-Request-Timeout-Ms: 300\r\n")
    with socket.create_connection(address(server), timeout=60) as connection:
        connection.sendall(sent[:-5])
        late = time.monotonic() + 0.4
        wait_until(lambda: time.monotonic() > late)
        connection.sendall(sent[-5:])
        assert connection.recv(100).startswith(b"HTTP/1.1 504 ")
    assert server.status("m")["counters"]["batches"] == 0


def test_replicas_grow_under_load_and_go_when_idle(server: Server) -> None:
    """min 0: loaded on first use; up to max while work waits; unloaded after idle_ttl_s."""
    server.write_pool(fake("m", delay_ms=100, scaling={"min": 0, "max": 3, "idle_ttl_s": 0.5}))
    server.start()
    server.wait_ready()
    assert server.status("m")["state"] == "idle"
    answers = asyncio.run(burst(*address(server), 14, 64))
    assert {status for status, _ in answers} == {200}
    assert "m#3" in server.log.read_text()
    wait_until(lambda: server.status("m")["state"] == "idle")
    assert server.embed("m", ["x"]).status_code == 200


LINES = {"gunicorn": 200_000, "waitress": 50_000}  # where they run the same loop


def test_any_number_of_lines_streams_through(server: Server, kind: str) -> None:
    """However many lines, sent whole before anything is read: all are answered, in order; the server hardly grows."""
    server.write_pool(fake("m", dim=64))
    server.start(kind)
    server.wait_ready()
    serving = [server.process, *server.process.children(recursive=True)]

    def resident_bytes() -> int:
        return sum(process.memory_info().rss for process in serving)

    body = server.folder / "lines.ndjson"
    with body.open("w") as file:
        file.writelines(json.dumps({"id": i, "text": f"line {i} {'word ' * 30}"}) + "\n" for i in range(LINES[kind]))
    before = resident_bytes()
    with body.open("rb") as file:
        answer = server.post("/embed?model=m", data=file, headers={"Content-Type": "application/x-ndjson"}, stream=True)
        assert answer.status_code == 200
        ids = []
        largest = before
        for line in answer.iter_lines():
            ids.append(orjson.loads(line)["id"])
            if len(ids) % 5000 == 0:
                largest = max(largest, resident_bytes())
    assert ids == list(range(LINES[kind]))
    assert largest - before < 200_000_000
    server.stop()


def test_a_reader_that_goes_away_stops_the_work(server: Server, kind: str) -> None:
    """Of the lines it will not read no more than those under way are computed."""
    server.write_pool(fake("m", dim=8, delay_ms_per_text=1))
    server.start(kind)
    server.wait_ready()
    body = b"".join(json.dumps({"text": f"line {i}"}).encode() + b"\n" for i in range(20_000))
    answer = server.post("/embed?model=m", data=body, headers={"Content-Type": "application/x-ndjson"}, stream=True)
    next(answer.iter_lines())
    answer.close()
    wait_until(lambda: server.status("m")["queue_len"] == 0 and server.status("m")["replicas_busy"] == 0)
    computed = server.status("m")["counters"]["rows"]
    assert computed < 5_000
    assert server.vectors("m", ["still here"])
    assert server.status("m")["counters"]["rows"] == computed + 1
    server.stop()


def test_a_reader_that_stands_still_is_cut_off(make_server: Callable[..., Server], kind: str) -> None:
    """It holds a thread and room for a stream no longer than an idle connection may; others are served meanwhile."""
    server = make_server(EMBEDPOOL_SERVER__IDLE_CONNECTION_S="2", EMBEDPOOL_DEFAULTS__MAX_STREAMS="1")
    server.write_pool(fake("m"))
    server.start(kind)
    server.wait_ready()
    body = b"".join(json.dumps({"text": f"line {i}"}).encode() + b"\n" for i in range(10_000))
    head = (
        f"POST /embed?model=m HTTP/1.1\r\nHost: x\r\nContent-Type: application/x-ndjson\r\nContent-Length: {len(body)}"
    )
    with contextlib.closing(socket.create_connection(address(server))) as still:
        still.sendall(head.encode() + b"\r\n\r\n" + body)
        assert still.recv(12) == b"HTTP/1.1 200"
        assert small_stream(server) == 429
        assert server.embed("m", ["x"]).status_code == 200
        wait_until(lambda: small_stream(server) == 200)
    server.stop()


def small_stream(server: Server) -> int:
    answer = server.post("/embed?model=m", data=b'{"text": "x"}', headers={"Content-Type": "application/x-ndjson"})
    return answer.status_code
