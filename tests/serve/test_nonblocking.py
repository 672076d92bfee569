"""Calls that keep the GIL do what Python's own do, and never wait."""

from __future__ import annotations

import contextlib
import socket
import sys
from collections.abc import Iterator

import pytest

from embedpool.serve import nonblocking
from embedpool.serve.nonblocking import Socket

NEXT_TO_NOTHING = b"a\0b\xff"


@pytest.fixture(params=["C library", "no C library"])
def pair(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Socket, socket.socket]]:
    """Connected ones. Python's own calls stand in for a C library that is not there."""
    if request.param == "no C library":
        for name in ("_send", "_recv"):
            monkeypatch.setattr(nonblocking, name, nonblocking._c_function("no such function"))
    ours, theirs = socket.socketpair()
    with Socket(ours) as mine, theirs:
        yield mine, theirs


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere some are missing")
@pytest.mark.parametrize("name", ["_send", "_recv"])
def test_the_gil_is_kept(name: str) -> None:
    """Which is what these are for."""
    keeps_the_gil = 4  # FUNCFLAG_PYTHONAPI
    assert type(getattr(nonblocking, name))._flags_ & keeps_the_gil


@pytest.mark.parametrize(
    "data",
    [NEXT_TO_NOTHING, bytes(nonblocking.MOST_BYTES + 1), memoryview(NEXT_TO_NOTHING)],
    ids=["few", "many", "view"],
)
def test_what_is_sent_arrives(pair: tuple[Socket, socket.socket], data: bytes | memoryview) -> None:
    """As it is, in both directions, be it small enough to be sent in one go or not."""
    ours, theirs = pair
    theirs.setblocking(False)
    for sender, receiver in (pair, (theirs, ours)):
        sent = sender.send(data)
        received = b""
        while len(received) < sent:
            received += receiver.recv(2 * len(data))
        assert received == data[:sent] != b""


def test_one_that_has_no_room_or_nothing_to_read_says_so(pair: tuple[Socket, socket.socket]) -> None:
    """At once, as a socket that does not block; the end of what comes is empty."""
    ours, theirs = pair
    with pytest.raises(BlockingIOError):
        ours.recv(10)
    for data in (bytes(nonblocking.MOST_BYTES), b"x"):
        with contextlib.suppress(BlockingIOError):
            while ours.send(data):
                pass
        with pytest.raises(BlockingIOError):
            ours.send(data)
    theirs.send(NEXT_TO_NOTHING)
    assert ours.recv(10, socket.MSG_PEEK) == ours.recv(10) == NEXT_TO_NOTHING
    while len(theirs.recv(1 << 20)) == 1 << 20:  # else what nobody has read would be an error
        pass
    theirs.close()
    assert ours.recv(10) == b""
    with pytest.raises(BrokenPipeError):
        ours.send(b"x")
    ours.close()
    with pytest.raises(OSError, match="Bad file"):
        ours.send(b"x")
    with pytest.raises(OSError, match="Bad file"):
        ours.recv(1)
