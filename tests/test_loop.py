"""The loop: nobody is waited for without end, and whoever is closed loses nothing by it."""

from __future__ import annotations

import contextlib
import math
import resource
import socket
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest

from embedpool.config.settings import Server, Settings
from embedpool.connections import Channel
from embedpool.loop import FILES_BESIDE, LEAST_WAIT_S, Loop, connections_that_fit


def test_a_client_that_reads_nothing_is_cut_off() -> None:
    """Its answer holds a thread; one that reads slowly, or waits for an answer, is left alone."""

    class Silent(Channel):
        closed = False

        def __init__(self, unsent: int, silent_s: float) -> None:
            self.total_outbufs_len, self.last_activity = unsent, time.time() - silent_s

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

    def make(**server: int) -> tuple[Loop, tuple[str, int]]:
        app = SimpleNamespace(settings=Settings(server=Server(threads=1, **server)), refusal=None)
        listening = socket.create_server(("127.0.0.1", 0))
        listening.setblocking(False)
        loop = Loop(app, [listening])
        loop._next_beat = math.inf
        loops.append(loop)
        return loop, listening.getsockname()

    yield make
    for loop in loops:
        loop._listeners[0].task_dispatcher.shutdown(timeout=20)
        for dispatcher in list(loop._open.values()):
            dispatcher.close()
        loop._open.close()


def test_an_idle_connection_is_closed_before_anything_can_come_on_it(
    make_loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not read from after it was told to close: what came would be lost."""
    loop, address = make_loop(idle_connection_s=100)
    with socket.create_connection(address) as idle, socket.create_connection(address) as fresh:
        while len(loop._channels()) < 2:
            loop._turn(1)
        loop._turn(0)
        (closing,) = [c for c in loop._channels() if c.addr == idle.getsockname()]
        closing.last_activity -= 200
        with monkeypatch.context() as later:
            later.setattr("waitress.server.time", SimpleNamespace(time=lambda: time.time() + 1000))
            loop._turn(0)
        assert not closing.will_close  # nobody else tells it to, at some other time
        loop._close_idle()
        idle.sendall(b"GET /health")
        loop._turn(0)
        assert [c.addr for c in loop._channels()] == [fresh.getsockname()]
        assert closing.request is None


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


def test_at_the_connection_limit_whoever_has_waited_longest_for_a_request_gives_way(make_loop) -> None:
    """Whether it says nothing or sends slowly; not before it has waited for a while, nor while it is served."""
    loop, address = make_loop(connection_limit=6)  # of four clients at the most

    def turn_until(condition: Callable[[], bool]) -> None:
        while not condition():
            loop._turn(0.01)

    def served() -> list[object]:
        return [channel.addr for channel in loop._channels()]

    with contextlib.ExitStack() as open_ones:
        busy, slow, silent, fresh = (open_ones.enter_context(socket.create_connection(address)) for _ in range(4))
        turn_until(lambda: len(loop._channels()) == 4)
        by_address = {channel.addr: channel for channel in loop._channels()}
        slow.sendall(b"POST /embed HT")
        turn_until(lambda: by_address[slow.getsockname()].request is not None)
        for client, waited_s in ((busy, 9 * LEAST_WAIT_S), (slow, 3 * LEAST_WAIT_S), (silent, 2 * LEAST_WAIT_S)):
            by_address[client.getsockname()].waits_since -= waited_s
        by_address[busy.getsockname()].requests = ["one"]
        newcomer = open_ones.enter_context(socket.create_connection(address))
        turn_until(lambda: newcomer.getsockname() in served())
        assert slow.getsockname() not in served()
        another = open_ones.enter_context(socket.create_connection(address))
        turn_until(lambda: another.getsockname() in served())
        left = {client.getsockname() for client in (busy, fresh, newcomer, another)}
        assert set(served()) == left
        waits = open_ones.enter_context(socket.create_connection(address))
        for _ in range(3):
            loop._turn(0)
        assert waits.getsockname() not in served()
        assert set(served()) == left
        by_address[busy.getsockname()].requests = []


def test_a_connection_that_was_served_waits_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """So clients that ask often do not give way to those that ask nothing."""
    monkeypatch.setattr("waitress.channel.HTTPChannel.service", lambda self: None)
    channel = Channel.__new__(Channel)
    channel.waits_since = before = -math.inf
    channel.service()
    assert channel.waits_since > before


@pytest.mark.parametrize(
    ("soft", "hard", "connections", "soft_then"),
    [
        (5000, 9000, 2000, 5000),
        (1024, 9000, 2000, 2000 + 100 + FILES_BESIDE),
        (1024, resource.RLIM_INFINITY, 2000, 2000 + 100 + FILES_BESIDE),
        (resource.RLIM_INFINITY, resource.RLIM_INFINITY, 2000, resource.RLIM_INFINITY),
        (1024, 1024, 1024 - 100 - FILES_BESIDE, 1024),
        (256, 1024, 1024 - 100 - FILES_BESIDE, 1024),
        (256, 256, 128, 256),
    ],
)
def test_connections_leave_files_for_what_serves_them(
    soft: int, hard: int, connections: int, soft_then: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As far as the system lets it, the limit on files is raised; else there are fewer connections."""
    limits = [soft, hard]
    monkeypatch.setattr(resource, "getrlimit", lambda _: tuple(limits))
    monkeypatch.setattr(resource, "setrlimit", lambda _, both: limits.__setitem__(slice(2), both))
    assert connections_that_fit(2000, threads=100) == connections
    assert limits == [soft_then, hard]


def test_a_limit_on_files_that_cannot_be_raised_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """What some systems call the hard limit is more than they give."""

    def refuse(_: int, both: tuple[int, int]) -> None:
        raise ValueError("not that many")

    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, resource.RLIM_INFINITY))
    monkeypatch.setattr(resource, "setrlimit", refuse)
    assert connections_that_fit(2000, threads=100) == 1024 - 100 - FILES_BESIDE
