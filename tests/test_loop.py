"""The loop: nobody is waited for without end, and whoever is closed loses nothing by it."""

from __future__ import annotations

import math
import socket
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest

from embedpool.config.settings import Server, Settings
from embedpool.connections import Channel
from embedpool.loop import Loop


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
