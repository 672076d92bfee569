"""Waiting for sockets: whoever waits for something gets it, and nobody else is asked."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedpool.serve.readiness import OpenSockets


class Side:
    """One end of a pair of sockets, as a dispatcher; `other` is the far end."""

    accepting = False

    def __init__(self, sockets: OpenSockets) -> None:
        self.sockets = sockets
        self.socket, self.other = socket.socketpair()
        self.socket.setblocking(False)
        self.fd = self.socket.fileno()
        self.wants_input, self.wants_output = True, False
        self.asked = 0
        self.handled: list[str] = []
        sockets[self.fd] = self

    def readable(self) -> bool:
        self.asked += 1
        return self.wants_input

    def writable(self) -> bool:
        return self.wants_output

    def handle_read_event(self) -> None:
        self.handled.append("read")
        self.socket.recv(100)

    def handle_write_event(self) -> None:
        self.handled.append("write")

    def close(self) -> None:
        del self.sockets[self.fd]
        self.socket.close()


@pytest.fixture
def sockets() -> Iterator[OpenSockets]:
    with closing() as sockets:
        yield sockets


@contextlib.contextmanager
def closing() -> Iterator[OpenSockets]:
    sockets = OpenSockets()
    yield sockets
    sides = list(sockets.values())
    sockets.close()
    for side in sides:
        side.other.close()


def test_only_the_one_that_something_happens_to_is_asked(sockets: OpenSockets) -> None:
    """So idle connections cost nothing."""
    idle = [Side(sockets) for _ in range(20)]
    busy = Side(sockets)
    sockets.turn(0)
    asked = [side.asked for side in idle]
    for _ in range(5):
        busy.other.sendall(b"x")
        sockets.turn(1)
    assert busy.handled == ["read"] * 5
    assert [side.asked for side in idle] == asked
    sockets.ask_all()
    sockets.turn(0)
    assert all(side.asked > before for side, before in zip(idle, asked, strict=True))


@settings(max_examples=60, deadline=None, database=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from(["input", "output", "data", "close"])), max_size=20))
def test_whoever_waits_for_something_gets_it_and_nothing_else(changes: list[tuple[int, str]]) -> None:
    """After any changes of mind, each made known."""
    with closing() as sockets:
        sides = [Side(sockets) for _ in range(4)]
        has_data, is_closed = [False] * 4, [False] * 4
        for number, change in changes:
            side = sides[number]
            if is_closed[number]:
                continue
            if change == "input":
                side.wants_input = not side.wants_input
            elif change == "output":
                side.wants_output = not side.wants_output
            elif change == "data":
                side.other.sendall(b"x")
                has_data[number] = True
            else:
                side.close()
                side.other.close()
                is_closed[number] = True
            sockets.ask(side.fd)
            before = [len(s.handled) for s in sides]
            sockets.turn(0)
            for at, s in enumerate(sides):
                expected = []
                if not is_closed[at]:
                    expected += ["read"] * (s.wants_input and has_data[at]) + ["write"] * s.wants_output
                    has_data[at] = has_data[at] and not s.wants_input
                assert s.handled[before[at] :] == expected


@pytest.mark.parametrize("to", [True, False])
def test_a_change_of_mind_while_it_is_asked_is_not_missed(sockets: OpenSockets, to: bool) -> None:
    """As on another thread, which sees what is awaited before or after the change, but is not heard in between."""
    side = Side(sockets)
    side.wants_input = not to
    sockets.turn(0)
    side.wants_input, readable = to, side.readable

    def changing() -> bool:
        was, side.wants_input = readable(), not to
        return was

    side.readable = changing
    sockets.ask(side.fd)
    sockets.turn(0)
    assert sockets.awaits_input_alone(side.fd) == (not to)


def test_one_that_an_earlier_one_of_the_same_turn_closes_is_left_alone(sockets: OpenSockets) -> None:
    """Also where its file descriptor is used again at once: what had come was for another."""
    first, second = Side(sockets), Side(sockets)
    new: list[Side] = []

    def replacing(side: Side, other: Side) -> Callable[[], None]:
        def handle() -> None:
            side.handled.append("read")
            if not new:
                other.close()
                new.append(Side(sockets))

        return handle

    first.handle_read_event, second.handle_read_event = replacing(first, second), replacing(second, first)
    sockets.turn(0)
    first.other.sendall(b"x")
    second.other.sendall(b"x")
    sockets.turn(1)
    assert len(first.handled + second.handled) == 1
    assert new[0].fd in (first.fd, second.fd)
    assert new[0].handled == []
    new[0].other.sendall(b"x")
    sockets.turn(1)
    assert new[0].handled == ["read"]
    first.other.close()
    second.other.close()
