"""The loop: nobody is waited for without end, and whoever is closed loses nothing by it."""

from __future__ import annotations

import contextlib
import gc
import math
import resource
import socket
import time
import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest

from embedpool.config.settings import Server, Settings
from embedpool.serve.connections import Channel
from embedpool.serve.last_in_first_out import LastInFirstOut
from embedpool.serve.loop import FILES_BESIDE, MOST_ACCEPTED_AT_ONCE, Loop, connections_that_fit


def test_a_client_that_reads_nothing_is_cut_off() -> None:
    """Its answer holds a thread; one that reads slowly, or waits for an answer, is left alone."""

    class Silent(Channel):
        closed = False

        def __init__(self, unsent: int, silent_s: float) -> None:
            self.total_outbufs_len, self.moved_at = unsent, time.monotonic() - silent_s

        def handle_close(self) -> None:
            self.closed = True

    loop = Loop.__new__(Loop)
    loop._app = SimpleNamespace(settings=Settings(server=Server(idle_connection_s=100)))
    channels = [Silent(5, 200), Silent(5, 50), Silent(0, 200)]
    loop._open = dict(enumerate(channels))
    loop._close_stalled()
    assert [channel.closed for channel in channels] == [True, False, False]


@pytest.fixture
def make_loop() -> Iterator[Callable[..., tuple[Loop, tuple[str, int]]]]:
    """A loop that the test turns by hand, and where it listens. Its beat, which asks everyone, does not come."""
    loops: list[Loop] = []

    def make(*, shared: bool = False, **server: int) -> tuple[Loop, tuple[str, int]]:
        app = SimpleNamespace(
            settings=Settings(server=Server(threads=1, **server)), refusal=None, listens_at=lambda hosts: None
        )
        listening = socket.create_server(("127.0.0.1", 0))
        listening.setblocking(False)
        loop = Loop(app, [listening], shared=shared)
        loop._next_beat = math.inf
        loops.append(loop)
        return loop, listening.getsockname()

    yield make
    for loop in loops:
        loop._listeners[0].end_threads(20)
        loop._open.close()


def test_an_idle_connection_is_closed_before_anything_can_come_on_it(
    make_loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing that has come is lost; what comes later finds the door shut."""
    loop, address = make_loop(idle_connection_s=100)
    with socket.create_connection(address) as idle, socket.create_connection(address) as fresh:
        while len(loop._channels()) < 2:
            loop._turn(1)
        loop._turn(0)
        (closing,) = [c for c in loop._channels() if c.addr == idle.getsockname()]
        closing.moved_at -= 200
        with monkeypatch.context() as later:
            later.setattr("waitress.server.time", SimpleNamespace(time=lambda: time.time() + 1000))
            loop._turn(0)
        assert not closing.will_close  # nobody else tells it to, at some other time
        loop._close_idle()
        idle.sendall(b"GET /health")
        loop._turn(0)
        (left,) = loop._channels()
        assert left.addr == fresh.getsockname()
        assert closing.request is None
        left.moved_at -= 200
        fresh.sendall(b"GET /health")
        loop._close_idle()
        loop._turn(0)
        assert loop._channels() == [left]
        assert left.request is not None


def test_of_the_request_threads_the_last_to_wait_is_the_first_to_serve(make_loop) -> None:
    """Few threads run, since each that has run holds memory of its own."""
    loop, _ = make_loop()
    dispatcher = loop._listeners[0]._server.task_dispatcher
    assert isinstance(dispatcher.queue_cv, LastInFirstOut)
    assert len(dispatcher.threads) == 1


def test_above_the_connection_limit_a_client_waits_until_another_leaves(make_loop) -> None:
    """And no longer: it is let in by the turn after."""
    loop, address = make_loop(connection_limit=4)  # the listening socket and the one that wakes the loop among them
    with socket.create_connection(address) as first, socket.create_connection(address) as second:
        while len(loop._channels()) < 2:
            loop._turn(1)
        with socket.create_connection(address) as third:
            loop._turn(0)
            assert {c.addr for c in loop._channels()} == {first.getsockname(), second.getsockname()}
            first.close()
            for _ in range(2):  # one leaves, one comes
                loop._turn(1)
            assert {c.addr for c in loop._channels()} == {second.getsockname(), third.getsockname()}


@pytest.mark.parametrize(
    ("shared", "expected"),
    [(False, [MOST_ACCEPTED_AT_ONCE, MOST_ACCEPTED_AT_ONCE + 5, MOST_ACCEPTED_AT_ONCE + 5]), (True, [1, 2, 3])],
)
def test_of_many_that_come_at_once_a_turn_lets_in_several(make_loop, shared: bool, expected: list[int]) -> None:
    """As many as there is room for. One of several workers leaves the others theirs."""
    room = MOST_ACCEPTED_AT_ONCE + 5
    loop, address = make_loop(shared=shared, connection_limit=2 + room)  # two sockets are the server's own
    with contextlib.ExitStack() as clients:
        for _ in range(MOST_ACCEPTED_AT_ONCE + 10):
            clients.enter_context(socket.create_connection(address))
        let_in = []
        for _ in range(3):
            loop._turn(0)
            let_in.append(len(loop._channels()))
    assert let_in == expected


class Clients:
    """Connections to a loop, which is turned until they are there."""

    def __init__(self, loop: Loop, address: tuple[str, int], sockets: contextlib.ExitStack) -> None:
        self.loop, self._address, self._sockets = loop, address, sockets

    def connect(self) -> socket.socket:
        client = self._sockets.enter_context(socket.socket())
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(self._address)
        return client

    def channel(self, client: socket.socket) -> Channel | None:
        return next((c for c in self.loop._channels() if c.addr == client.getsockname()), None)

    def turn_until(self, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < deadline
            self.loop._turn(0.01)

    def turn(self) -> None:
        for _ in range(3):
            self.loop._turn(0)

    def admit(self, waited_s: float = 0.0) -> socket.socket:
        """A client that is let in, and has waited for so long."""
        client = self.connect()
        self.turn_until(lambda: self.channel(client))
        self.channel(client).waits_since -= waited_s
        return client

    def fill(self, client: socket.socket) -> None:
        """It is sent all that the system takes for it, and reads nothing."""
        with contextlib.suppress(BlockingIOError):
            while True:
                self.channel(client).socket.send(bytes(100_000))


LONG_S = 1000.0  # longer than any test takes


@pytest.fixture
def crowd(make_loop, monkeypatch: pytest.MonkeyPatch) -> Iterator[Clients]:
    """Of a loop that takes three clients: beside them are the listening socket, the one that wakes it, and room."""
    monkeypatch.setattr("embedpool.serve.loop.LEAST_WAIT_S", LONG_S)
    monkeypatch.setattr("embedpool.serve.loop.LOOK_FOR_ROOM_EVERY_S", 0.0)
    loop, address = make_loop(connection_limit=6)
    with contextlib.ExitStack() as sockets:
        yield Clients(loop, address, sockets)


def test_at_the_connection_limit_whoever_has_waited_longest_for_a_request_gives_way(crowd: Clients) -> None:
    """Whether it says nothing or has begun to; not before it has waited for a while."""
    slow = crowd.admit()
    slow.sendall(b"POST /embed HT")
    crowd.turn_until(lambda: crowd.channel(slow).request)
    crowd.channel(slow).waits_since -= 3 * LONG_S
    silent, fresh = crowd.admit(2 * LONG_S), crowd.admit()
    crowd.turn()
    assert crowd.channel(slow) is None
    assert crowd.channel(silent)
    another = crowd.admit()
    crowd.turn()
    assert crowd.channel(silent) is None
    more = [crowd.admit(), crowd.admit()]
    late = crowd.connect()
    crowd.turn()
    assert crowd.channel(late) is None
    assert all(map(crowd.channel, (fresh, another, *more)))


def test_the_log_tells_now_and_then_how_many_gave_way(crowd: Clients, caplog: pytest.LogCaptureFixture) -> None:
    """A line for all of them, however many, and none when there were none."""
    for _ in range(6):
        crowd.admit(2 * LONG_S)
    crowd.turn()
    for _ in range(2):
        crowd.loop._tell_who_gave_way()
    told = [record.message for record in caplog.records if record.name == "embedpool.serve.loop"]
    assert told == ["4 idle or slow connections gave way: 6 may be open"]


def test_none_gives_way_that_is_served_or_has_a_request_to_be_read(crowd: Clients) -> None:
    """Nor does any while the server stops: nobody new comes then."""
    busy, unread, asks = (crowd.admit() for _ in range(3))
    crowd.channel(busy).requests = ["one"]
    crowd.channel(unread).total_outbufs_len = 5
    for client in (busy, unread, asks):
        crowd.channel(client).waits_since -= 2 * LONG_S
    asks.sendall(b"GET ")
    crowd.turn_until(lambda: crowd.channel(asks).request)
    assert all(map(crowd.channel, (busy, unread)))
    crowd.loop._stopping = True
    crowd.turn()
    assert crowd.channel(asks)
    crowd.loop._stopping = False
    crowd.turn()
    assert crowd.channel(asks) is None
    assert all(map(crowd.channel, (busy, unread)))
    crowd.channel(busy).requests = []


@pytest.mark.parametrize("close", ["_make_room", "_close_idle"])
def test_one_that_cannot_be_written_to_is_closed_all_the_same(crowd: Clients, close: str) -> None:
    """The system holds what it does not read, and would never say that there is room for more."""
    deaf, *others = (crowd.admit() for _ in range(3))
    crowd.fill(deaf)
    crowd.channel(deaf).waits_since -= 2 * LONG_S
    crowd.channel(deaf).moved_at -= 2 * LONG_S
    getattr(crowd.loop, close)()
    assert crowd.channel(deaf) is None
    assert all(map(crowd.channel, others))


def test_a_stop_waits_for_what_has_come_and_for_nobody_who_reads_no_more(crowd: Clients) -> None:
    """What the system holds of its answer goes on its way when its connection is closed."""
    deaf, asks = crowd.admit(), crowd.admit()
    crowd.fill(deaf)
    channel = crowd.channel(asks)
    asks.sendall(b"GET /health")
    crowd.loop._serve_what_is_left(0.0, lambda: True)
    assert crowd.loop._channels() == [channel]
    assert channel.request is not None
    asks.close()
    crowd.loop._serve_what_is_left(60.0, lambda: True)
    assert crowd.loop._channels() == []


@pytest.fixture(params=[b"", b"what comes with the head"])
def lingering(crowd: Clients, request: pytest.FixtureRequest) -> socket.socket:
    """A client that has its answer, which ends the connection, and sends on."""
    client = crowd.admit()
    client.sendall(b"NONSENSE\r\n\r\n" + request.param)
    crowd.turn_until(lambda: crowd.channel(client).lingers)
    client.sendall(bytes(10_000))
    return client


def test_a_client_that_sends_on_can_read_why_nobody_listens(crowd: Clients, lingering: socket.socket) -> None:
    """Closed at once, with something unread, it would be told of a broken connection instead."""
    crowd.turn()
    lingering.sendall(bytes(10_000))
    crowd.turn()
    assert lingering.makefile("rb").read().startswith(b"HTTP/1.0 400 ")
    lingering.close()
    crowd.turn_until(lambda: not crowd.loop._channels())


@pytest.mark.parametrize("how", ["too long", "stop"])
def test_one_that_never_ends_to_send_is_cut_off(crowd: Clients, lingering: socket.socket, how: str) -> None:
    """After a while, or when the server stops."""
    close = {
        "too long": crowd.loop._close_idle,
        "stop": lambda: crowd.loop._serve_what_is_left(0.0, lambda: True),
    }[how]
    close()
    assert crowd.loop._channels()
    crowd.channel(lingering).waits_since -= LONG_S
    close()
    assert crowd.loop._channels() == []


@pytest.mark.parametrize("begun", [b"POST /embed HTTP/1.1\r\nContent-Length: 5000\r\n\r\n" + b"x" * 3000, b""])
def test_a_connection_that_is_closed_leaves_no_memory(crowd: Clients, begun: bytes) -> None:
    """Not even until garbage is collected: half a body may be large."""
    client = crowd.admit()
    channel = weakref.ref(crowd.channel(client))
    client.sendall(begun)
    crowd.turn_until(lambda: bool(channel().request) == bool(begun))
    gc.disable()
    try:
        client.close()
        crowd.turn_until(lambda: not crowd.loop._channels())
        crowd.turn()
        assert channel() is None
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("soft", "hard", "connections", "soft_then"),
    [
        (5000, 9000, 2000, 5000),
        (1024, 9000, 2000, 2 * 2000 + 100 + FILES_BESIDE),
        (1024, 3000, 2000, 3000),
        (1024, resource.RLIM_INFINITY, 2000, 2 * 2000 + 100 + FILES_BESIDE),
        (resource.RLIM_INFINITY, resource.RLIM_INFINITY, 2000, resource.RLIM_INFINITY),
        (1024, 1024, 1024 - 100 - FILES_BESIDE, 1024),
        (256, 1024, 1024 - 100 - FILES_BESIDE, 1024),
        (256, 256, 128, 256),
    ],
)
def test_connections_leave_files_for_what_serves_them(
    soft: int,
    hard: int,
    connections: int,
    soft_then: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The limit on files is raised as far as may be; else there are fewer connections, and the log says so."""
    limits = [soft, hard]
    monkeypatch.setattr(resource, "getrlimit", lambda _: tuple(limits))
    monkeypatch.setattr(resource, "setrlimit", lambda _, both: limits.__setitem__(slice(2), both))
    assert connections_that_fit(2000, threads=100) == connections
    assert limits == [soft_then, hard]
    told = [f"connection_limit is {connections}, not 2000: {soft_then} files may be open (ulimit -n)"]
    assert [record.message for record in caplog.records] == (told if connections < 2000 else [])


def test_a_limit_on_files_that_cannot_be_raised_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """What some systems call the hard limit is more than they give."""

    def refuse(_: int, both: tuple[int, int]) -> None:
        raise ValueError("not that many")

    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, resource.RLIM_INFINITY))
    monkeypatch.setattr(resource, "setrlimit", refuse)
    assert connections_that_fit(2000, threads=100) == 1024 - 100 - FILES_BESIDE
