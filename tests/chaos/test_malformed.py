"""Requests with anything wrong in them: each is answered or its connection closed, and none disturbs the server."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
from collections import Counter
from collections.abc import Callable

import psutil

from tests.chaos.conftest import Figures
from tests.chaos.http import address
from tests.chaos.malformed import requests_of
from tests.live.conftest import Server, fake, wait_until

AT_ONCE = 24
PATIENCE_S = 0.5  # then the client says that it has no more to send
HUNG_S = 30
CLOSED = 0


class Hung(AssertionError):
    """Neither an answer nor a close."""


def test_nothing_malformed_disturbs_the_server(
    make_server: Callable[..., Server], kind: str, rng: random.Random, length: Callable[..., int], figures: Figures
) -> None:
    """No error of the server's own, no connection that hangs; afterwards nothing is in flight and all is served."""
    count = length(short=250, long=10_000)
    server = make_server(EMBEDPOOL_DEFAULTS__MAX_INFLIGHT_GLOBAL=str(AT_ONCE))
    server.write_pool(fake("m", dim=8), fake("other", dim=8))
    server.start(kind)
    server.wait_ready()
    expected = server.vectors("m", ["x"])
    messages = itertools.islice(requests_of(server.get("/openapi.json").json(), rng), count)
    statuses = asyncio.run(outcomes(address(server), list(messages)))
    assert not {status for status in statuses if status >= 500 and status != 501}, statuses
    log = server.log.read_text()
    for trouble in ("Traceback", "internal_error"):
        before, found, after = log.partition(trouble)
        assert not found, before[-500:] + found + after[:5000]
    family = [server.process, *server.process.children(recursive=True)]
    wait_until(lambda: not any(connections(process) for process in family))
    wait_until(
        lambda: {(m["queue_len"], m["replicas_busy"]) for m in server.get("/status").json()["models"]} == {(0, 0)}
    )
    assert server.vectors("m", ["x"]) == expected
    server.stop()
    figures("requests", count)
    closed = statuses.pop(CLOSED, 0)
    figures("answered", ", ".join(f"{status}: {n}" for status, n in sorted(statuses.items())))
    figures("closed without an answer", closed)


def connections(process: psutil.Process) -> list[object]:
    return [c for c in process.net_connections("tcp") if c.status == psutil.CONN_ESTABLISHED]


async def outcomes(to: tuple[str, int], messages: list[bytes]) -> Counter[int]:
    """The statuses of the answers; CLOSED for none. Raises Hung with the request."""
    found: Counter[int] = Counter()
    left = iter(messages)

    async def client() -> None:
        for message in left:
            found[await outcome(to, message)] += 1

    await asyncio.gather(*(client() for _ in range(AT_ONCE)))
    return found


async def outcome(to: tuple[str, int], message: bytes) -> int:
    """Send it on a connection of its own, and end what has got no answer as a client that has given up would."""
    reader, writer = await asyncio.open_connection(*to)
    try:
        writer.write(message)
        with contextlib.suppress(TimeoutError):
            return await asyncio.wait_for(status_of(reader), PATIENCE_S)
        with contextlib.suppress(OSError):
            writer.write_eof()
        try:
            return await asyncio.wait_for(status_of(reader), HUNG_S)
        except TimeoutError:
            raise Hung(message[:500]) from None
    finally:
        writer.transport.abort()


async def status_of(reader: asyncio.StreamReader) -> int:
    """Of the first answer that is not `100 Continue`."""
    try:
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            if not head.startswith(b"HTTP/1.1 100"):
                return int(head.split(b" ", 2)[1])
    except (asyncio.IncompleteReadError, ConnectionError):
        return CLOSED
