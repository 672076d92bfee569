"""Our parts of waitress: what a connection sends, it sends once."""

from __future__ import annotations

import contextlib
import copy
import io
import math
import socket
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import NoReturn

import orjson
import pytest
from waitress.adjustments import Adjustments
from waitress.buffers import OverflowableBuffer
from waitress.channel import ClientDisconnected

from embedpool.bounds import Budget
from embedpool.serve.bodies import Parser
from embedpool.serve.connections import Channel
from embedpool.serve.readiness import OpenSockets


class Listener:
    """A server as its channels see it; counts how often its I/O thread is woken."""

    adj = Adjustments(channel_request_lookahead=1)
    is_stopping = False
    application = effective_port = server_name = None

    def __init__(self) -> None:
        self.active_channels: dict[int, Channel] = {}
        self.woken = 0

    def add_task(self, task: Channel) -> None: ...

    def pull_trigger(self) -> None:
        self.woken += 1


@contextlib.contextmanager
def connected(server: Listener, sockets: OpenSockets | None = None) -> Iterator[tuple[Channel, socket.socket]]:
    """A connection as the server has it, and its client's end."""
    ours, theirs = socket.socketpair()
    channel = Channel(server, ours, ("client", 0), server.adj, map=OpenSockets() if sockets is None else sockets)
    with theirs, channel.socket:
        yield channel, theirs


def test_two_threads_cannot_send_the_same_bytes() -> None:
    """The I/O thread sends what is left; a request's thread that has just ended may be sending, too."""
    channel = Channel.__new__(Channel)
    channel.outbuf_lock = threading.Condition()
    channel.outbufs = [OverflowableBuffer(1000)]
    channel.requests, channel.total_outbufs_len, channel.sendbuf_len = [], 0, 1000
    channel.will_close = channel.close_when_flushed = False
    channel.connected = True
    channel.outbufs[0].append(b"HTTP/1.1 100 Continue\r\n\r\n")
    channel.total_outbufs_len = len(channel.outbufs[0])
    others_may_send: list[bool] = []

    def send(data: bytes, do_close: bool = True) -> int:
        other = threading.Thread(target=lambda: others_may_send.append(channel.outbuf_lock.acquire(blocking=False)))
        other.start()
        other.join()
        return len(data)

    channel.send = send
    channel.handle_write()
    assert others_may_send == [False]
    assert channel.total_outbufs_len == 0


def test_nothing_is_sent_on_a_connection_that_is_closed() -> None:
    """Its file descriptor may be another's by then. A client that has left may still be told to go on."""
    with connected(Listener()) as (channel, _):
        sent: list[bytes] = []
        channel.send = lambda data, do_close=True: sent.append(data) or len(data)
        channel.received(b"POST / HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 1\r\n\r\n")
        assert len(sent) == 1
        channel.handle_close()
        channel.send_continue()
        assert len(sent) == 1


def test_a_client_may_leave_before_it_is_told_that_this_is_not_http() -> None:
    """Its connection is done with as any other; nothing is raised in the request's thread."""

    def gone(data: bytes) -> NoReturn:
        raise ClientDisconnected

    with connected(Listener()) as (channel, _):
        channel.received(b"\0 is no request\r\n\r\n")
        assert channel.requests[0].error
        channel.write_soon = gone
        channel.service()
    assert channel.requests == []
    assert channel.close_when_flushed


def test_an_answer_that_leaves_whole_wakes_nobody() -> None:
    """While a request's thread sends, the I/O thread has nothing to do with that connection, and after it neither."""
    sockets, server = OpenSockets(), Listener()
    with connected(server, sockets) as (channel, theirs):
        written: list[int] = []
        send, channel.handle_write = channel.send, lambda: written.append(1)

        def sending(data: bytes, do_close: bool = True) -> int:
            sockets.turn(0)  # as the I/O thread might just now
            return send(data, do_close)

        channel.send = sending
        sockets.turn(0)
        channel.received(b"GET / HTTP/1.1\r\n\r\n")
        channel.task_class = lambda channel, request: SimpleNamespace(
            service=lambda: channel.write_soon(b"HTTP/1.1 200 OK\r\n\r\n"), close_on_finish=False, request=request
        )
        channel.service()
        assert theirs.recv(100) == b"HTTP/1.1 200 OK\r\n\r\n"
        assert (written, server.woken) == ([], 0)


@pytest.mark.parametrize("requests", [1, 2])
def test_the_io_thread_is_woken_for_what_is_left(requests: int) -> None:
    """A connection to be closed, and one that was not read from while it had two requests and has none now."""
    ends = requests == 1
    sockets, server = OpenSockets(), Listener()
    with connected(server, sockets) as (channel, _):
        ours = channel.socket
        channel.received(b"GET / HTTP/1.1\r\n\r\n" * requests)
        channel.task_class = lambda channel, request: SimpleNamespace(service=lambda: None, close_on_finish=ends)
        sockets.turn(0)
        assert sockets.awaits_input_alone(channel.socket.fileno()) == ends
        for _ in range(requests):
            channel.service()
        assert server.woken == requests
        sockets.turn(0)
        assert ends == (ours.fileno() == -1)
        if not ends:
            assert sockets.awaits_input_alone(channel.socket.fileno())


class Full(io.BytesIO):
    """A file on a disk that is full when it has `room` bytes; it cannot even be closed in peace."""

    room = 0

    def write(self, data: bytes) -> int:
        if self.tell() + len(data) > self.room:
            raise OSError(28, "No space left on device")
        return super().write(data)

    def close(self) -> None:
        super().close()
        raise OSError(28, "No space left on device")

    def __del__(self) -> None:
        """Nobody hears what a close says then."""


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> type[Full]:
    """Where large bodies and answers go, from 10 KB on; full."""
    monkeypatch.setattr("embedpool.serve.bodies.SPOOLED_FROM_BYTES", 10_000)
    monkeypatch.setattr("waitress.buffers.TempfileBasedBuffer.newfile", lambda self: Full())
    monkeypatch.setattr(Full, "room", 0)
    return Full


def parser_of(content_type: str) -> Parser:
    """It has read the head of a request of 90 KB; bodies may have 50 KB, those of lines 100 KB."""
    adjustments = Adjustments(max_request_body_size=50_000)
    adjustments.refusal = lambda *_: None
    adjustments.spooled = Budget(10**9, "")
    adjustments.for_lines = copy.copy(adjustments)
    adjustments.for_lines.max_request_body_size = 100_000
    parser = Parser(adjustments)
    head = f"POST /embed HTTP/1.1\r\nContent-Type: {content_type}\r\nContent-Length: 90000\r\n\r\n".encode()
    assert parser.received(head) == len(head)
    return parser


def test_a_body_that_finds_no_room_in_a_file_stays_in_memory(disk: type[Full]) -> None:
    """As far as a body may that is no lines'; beyond, it is refused in so many words."""
    parser = parser_of("application/x-ndjson")
    for part in range(6):
        assert parser.received(b"%d" % part * 9_000) == 9_000
        assert not parser.completed
    assert parser.get_body_stream().read() == b"".join(b"%d" % part * 9_000 for part in range(6))
    while not parser.completed:
        assert parser.received(b"x" * 9_000) == 9_000
    assert parser.error.code == 507
    assert orjson.loads(parser.error.body)["error"]["code"] == "storage_error"
    parser.close()


def test_a_disk_that_fills_up_meanwhile_ends_the_request_that_finds_it_full(disk: type[Full]) -> None:
    """What was written is let go."""
    disk.room = 20_000
    parser = parser_of("application/x-ndjson")
    for _ in range(2):
        assert parser.received(b"x" * 9_000) == 9_000
        assert not parser.completed
    file = parser.get_body_stream()
    assert isinstance(file, Full)
    assert parser.received(b"x" * 9_000) == 9_000
    assert parser.completed
    assert parser.error.code == 507
    assert file.closed
    parser.close()


@pytest.mark.parametrize("room", [0, 1_000_000])
def test_a_large_answer_needs_no_room_and_leaves_nothing(
    disk: type[Full], room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It leaves whole wherever it waited, and the connection keeps none of it; nor does its next answer wait behind."""
    monkeypatch.setattr(Full, "close", io.BytesIO.close)
    disk.room = room
    with connected(Listener()) as (channel, theirs):
        for answer in (bytes(range(256)) * 1000, b"small", bytes(range(256)) * 2000):
            sending = threading.Thread(target=channel.write_soon, args=(answer,))
            sending.start()
            received = b""
            while len(received) < len(answer):
                channel.handle_write()
                with contextlib.suppress(BlockingIOError):
                    received += theirs.recv(1 << 20, socket.MSG_DONTWAIT)
            sending.join()
            assert received == answer
            channel.handle_write()
            assert [len(buffer) for buffer in channel.outbufs] == [0]
            assert channel.outbufs[0].buf is None


def test_a_connection_that_was_sent_an_answer_waits_anew() -> None:
    """So clients that ask often do not give way to those that ask nothing."""
    with connected(Listener()) as (channel, _):
        channel.waits_since = before = -math.inf
        channel.write_soon(b"HTTP/1.1 200 OK")
        assert channel.waits_since > before


@pytest.mark.parametrize("requests", [1, 3])
def test_a_client_that_shuts_its_side_is_sought_whichever_request_waits(requests: int) -> None:
    """By an interim answer, on a kept connection too, where earlier requests have been answered; but in no answer."""
    server = Listener()
    with connected(server) as (channel, theirs):
        for _ in range(requests - 1):
            theirs.sendall(b"GET /x HTTP/1.1\r\nHost: x\r\n\r\n")
            channel.handle_read()
            channel.begins_to_answer()
            channel.requests.clear()  # it is answered
        theirs.sendall(b"GET /x HTTP/1.1\r\nHost: x\r\n\r\n")
        channel.handle_read()
        theirs.shutdown(socket.SHUT_WR)
        channel.handle_read()
        assert theirs.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        assert channel.connected
        assert not channel.check_client_disconnected()
    with connected(server) as (channel, theirs):
        theirs.sendall(b"GET /x HTTP/1.1\r\nHost: x\r\n\r\n")
        channel.handle_read()
        channel.begins_to_answer()
        theirs.shutdown(socket.SHUT_WR)
        channel.handle_read()
        channel.write_soon(b"answer")
        channel.handle_write()
        assert theirs.recv(100) == b"answer"


# --- the room for large bodies


def head_of(size: int | None) -> bytes:
    length = "Transfer-Encoding: chunked" if size is None else f"Content-Length: {size}"
    return f"POST /embed HTTP/1.1\r\nContent-Type: application/x-ndjson\r\n{length}\r\n\r\n".encode()


@pytest.fixture
def begin(monkeypatch: pytest.MonkeyPatch) -> Callable[[int | None], Parser]:
    """Parsers that have read a head, and share room for 100 KB of bodies of more than 10 KB."""
    monkeypatch.setattr("embedpool.serve.bodies.SPOOLED_FROM_BYTES", 10_000)
    adjustments = Adjustments(max_request_body_size=1_000_000)
    adjustments.refusal = lambda *_: None
    adjustments.spooled = Budget(100_000, "no room")
    adjustments.for_lines = adjustments

    def make(size: int | None) -> Parser:
        parser = Parser(adjustments)
        parser.received(head_of(size))
        return parser

    return make


def refused_for_room(parser: Parser) -> bool:
    if not parser.completed:
        return False
    assert parser.error.code == 429
    assert orjson.loads(parser.error.body)["error"]["code"] == "overloaded"
    assert parser.error.headers == [("Retry-After", "2")]
    return True


@pytest.mark.parametrize("leave", ["answered", "cut"])
def test_a_large_body_is_refused_by_its_head_where_others_fill_the_room(
    begin: Callable[[int | None], Parser], leave: str
) -> None:
    """Before a byte of it is read, until one of them is answered or its connection is cut. Small ones are not counted,
    and one alone is never too large."""
    first: Parser | None = begin(900_000)
    assert first is not None
    assert not first.completed
    assert refused_for_room(begin(20_000))
    assert not begin(9_000).completed
    if leave == "answered":
        first.close()
    first = None
    second, third = begin(60_000), begin(40_000)
    assert not second.completed
    assert not third.completed
    assert refused_for_room(begin(20_000))


def test_a_body_of_unknown_length_is_counted_as_it_comes(begin: Callable[[int | None], Parser]) -> None:
    """And refused when it no longer fits; what it held is free again."""
    other, parser = begin(50_000), begin(None)
    part = b"2710\r\n" + b"x" * 10_000 + b"\r\n"
    parts = 0
    while not refused_for_room(parser):
        parser.received(part)
        parts += 1
    assert parts == 5  # about 50 KB
    parser.received(part)
    assert not begin(40_000).completed
    other.close()
