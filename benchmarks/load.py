"""Closed-loop load, in which each client sends its next request when the last one is answered, and open arrivals.

`wrk` drives one-text workloads where it is installed; it stops at the clock, which for small requests costs nothing.
All else is the Python client below, in a process of its own: prebuilt bytes over keep-alive sockets, one thread.
"""

from __future__ import annotations

import collections
import contextlib
import gc
import heapq
import json
import selectors
import shutil
import socket
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

RECEIVE_BYTES = 1 << 18
ANSWER_WITHIN_S = 300.0

WRK_SCRIPT = """
local requests, at = {}, 0
function init(args)
  for line in io.lines("%(bodies)s") do
    requests[#requests + 1] = wrk.format("POST", "%(path)s", {["Content-Type"] = "application/json"}, line)
  end
end
function request()
  at = at %% #requests + 1
  return requests[at]
end
function done(summary, latency, sockets)
  local e = summary.errors
  io.write(string.format('\\nRESULT {"answers": %%d, "seconds": %%f, "p50_ms": %%f, "p95_ms": %%f, "p99_ms": %%f, ' ..
    '"errors": %%d}\\n', summary.requests, summary.duration / 1e6, latency:percentile(50) / 1e3,
    latency:percentile(95) / 1e3, latency:percentile(99) / 1e3, e.connect + e.read + e.write + e.status + e.timeout))
end
"""


class LoadError(Exception):
    """The server did not answer, or not with 200."""


@dataclass
class Group:
    """Clients of one kind. They share `bodies` (cycled) and, where given, `requests`: how many are sent in all.

    With a `path` they ask that one, else the one of the load.
    """

    name: str
    clients: int
    bodies: list[bytes]
    requests: int | None = None
    think_s: float = 0.0
    least_answers: int = 0  # the clock does not stop the load before
    path: str = ""
    sent: int = 0
    latencies_s: list[float] = field(default_factory=list)
    last_answer_s: float = 0.0

    def result(self) -> dict[str, Any]:
        """Answers, seconds until the last of them, the mean and percentiles of latency in milliseconds."""
        return {"answers": len(self.latencies_s), "seconds": self.last_answer_s, **percentiles(self.latencies_s)}


def percentiles(latencies_s: Sequence[float]) -> dict[str, float]:
    """mean_ms, p50_ms, p95_ms and p99_ms of latencies in seconds."""
    ordered = sorted(latencies_s)
    found = {f"p{p}_ms": 1000 * ordered[min(len(ordered) * p // 100, len(ordered) - 1)] for p in (50, 95, 99)}
    return {"mean_ms": 1000 * sum(ordered) / len(ordered), **found}


@dataclass(frozen=True)
class Arrival:
    """A request that is sent at its time, in seconds from the start, whatever has been answered by then."""

    at_s: float
    kind: str
    body: bytes


def arrive(port: int, path: str, rounds: list[list[Arrival]]) -> dict[str, dict[str, Any]]:
    """Send the arrivals of each round, which are in order; the next begins when all are answered.

    Gives the result of each kind: latencies count from the time that was set, `seconds` is the time until the last
    answer of a round, as a mean. Raises LoadError.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(_arrive, port, path, rounds).result()


def closed_loop(port: int, path: str, bodies: list[bytes], clients: int, seconds: float) -> dict[str, Any]:
    """Small requests for `seconds` seconds, by wrk where it is on PATH. See Group.result for what is given."""
    if shutil.which("wrk"):
        return _wrk(port, path, bodies, clients, seconds)
    return drive(port, path, [Group("all", clients, bodies)], seconds)["all"]


def drive(port: int, path: str, groups: list[Group], seconds: float | None = None) -> dict[str, dict[str, Any]]:
    """Groups of clients at once, from a process of its own, until `seconds` have passed or all requests are answered.

    Gives each group's result. Raises LoadError.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(_drive, port, path, groups, seconds).result()


def _wrk(port: int, path: str, bodies: list[bytes], clients: int, seconds: float) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        lines, script = Path(folder) / "bodies.txt", Path(folder) / "load.lua"
        lines.write_bytes(b"\n".join(bodies))
        script.write_text(WRK_SCRIPT % {"bodies": lines, "path": path})
        run = ["wrk", "-t1", f"-c{clients}", f"-d{max(round(seconds), 1)}s", "--timeout", "60s", "-s", str(script)]
        done = subprocess.run([*run, f"http://127.0.0.1:{port}"], capture_output=True, text=True, check=False)
    lines_out = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not lines_out:
        raise LoadError(f"wrk failed: {done.stderr.strip() or done.stdout.strip()}")
    result = json.loads(lines_out[0].removeprefix("RESULT "))
    if result.pop("errors") or not result["answers"]:
        raise LoadError(f"not every answer was 200: {done.stdout}")
    return result


class _Client:
    """One keep-alive connection and the request under way on it."""

    def __init__(self, port: int, group: Group) -> None:
        self.group = group
        self._port = port
        self.connect()
        self.unsent = memoryview(b"")
        self.got = bytearray()
        self.expected: int | None = None  # bytes of the whole answer, once its head is here
        self.began_s = 0.0

    def connect(self) -> None:
        self.socket = socket.create_connection(("127.0.0.1", self._port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.setblocking(False)
        self.closes = False  # the server closes the connection after the answer

    def begin(self, request: bytes) -> None:
        self.unsent, self.expected, self.began_s = memoryview(request), None, time.perf_counter()
        self.got.clear()
        self.send()

    def send(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self.unsent = self.unsent[self.socket.send(self.unsent) :]

    def note(self, start_s: float) -> None:
        """Its answer is whole, of a load that began at `start_s`."""
        now_s = time.perf_counter()
        self.group.latencies_s.append(now_s - self.began_s)
        self.group.last_answer_s = now_s - start_s

    def answered(self) -> bool:
        """Read what is there; whether the answer is whole."""
        received = self.socket.recv(RECEIVE_BYTES)
        if not received:
            raise LoadError(f"the connection was closed after {len(self.got)} bytes of an answer")
        self.got += received
        if self.expected is None and (end := self.got.find(b"\r\n\r\n")) >= 0:
            head = bytes(self.got[:end]).lower()
            if not head.startswith((b"http/1.1 200", b"http/1.0 200")):
                raise LoadError(bytes(self.got[:500]).decode(errors="replace"))
            self.closes = b"\r\nconnection: close" in head
            self.expected = end + 4 + int(head.split(b"content-length:")[1].split(b"\r\n")[0])
        return self.expected is not None and len(self.got) >= self.expected


def _answered(poll: selectors.BaseSelector, wait_s: float) -> Iterator[_Client]:
    """Send and receive what can be; the clients whose answers are whole now. Raises LoadError."""
    events = poll.select(wait_s)
    if not events and wait_s == ANSWER_WITHIN_S:
        raise LoadError(f"no answer within {ANSWER_WITHIN_S:.0f} s")
    for key, mask in events:
        client = key.data
        if mask & selectors.EVENT_WRITE:
            client.send()
            if not client.unsent:
                poll.modify(client.socket, selectors.EVENT_READ, client)
        if mask & selectors.EVENT_READ and client.answered():
            yield client


def _head(port: int, path: str, body: bytes) -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\nContent-Length: "
    return f"{head}{len(body)}\r\n\r\n".encode() + body


def _arrive(port: int, path: str, rounds: list[list[Arrival]]) -> dict[str, dict[str, Any]]:
    """Each request has a connection of its own, kept for a later one."""
    gc.disable()
    groups = {a.kind: Group(a.kind, 0, []) for arrivals in rounds for a in arrivals}
    ends_s: dict[str, list[float]] = {kind: [] for kind in groups}
    poll, idle = selectors.DefaultSelector(), list[_Client]()
    for arrivals in rounds:
        start_s, coming, under_way = time.perf_counter(), collections.deque(arrivals), 0
        while coming or under_way:
            now_s = time.perf_counter() - start_s
            while coming and coming[0].at_s <= now_s:
                arrival = coming.popleft()
                client = idle.pop() if idle and not idle[-1].closes else _Client(port, groups[arrival.kind])
                client.group = groups[arrival.kind]
                client.begin(_head(port, path, arrival.body))
                client.began_s = start_s + arrival.at_s
                poll.register(client.socket, selectors.EVENT_READ | selectors.EVENT_WRITE * bool(client.unsent), client)
                under_way += 1
            for client in _answered(poll, max(coming[0].at_s - now_s, 0) if coming else ANSWER_WITHIN_S):
                client.note(start_s)
                poll.unregister(client.socket)
                idle.append(client)
                under_way -= 1
        for kind in {arrival.kind for arrival in arrivals}:
            ends_s[kind].append(groups[kind].last_answer_s)
    for client in idle:
        client.socket.close()
    return {kind: {**group.result(), "seconds": statistics.mean(ends_s[kind])} for kind, group in groups.items()}


def _drive(port: int, path: str, groups: list[Group], seconds: float | None) -> dict[str, dict[str, Any]]:
    """The loop of `drive`. Clients that think begin spread over their time of thought."""
    gc.disable()
    requests = {group.name: [_head(port, group.path or path, body) for body in group.bodies] for group in groups}
    poll = selectors.DefaultSelector()
    start_s = time.perf_counter()
    waiting: list[tuple[float, int, _Client]] = []  # when to send, a tie-breaker, who
    under_way = 0
    for group in groups:
        for i in range(group.clients):
            client = _Client(port, group)
            poll.register(client.socket, selectors.EVENT_READ, client)
            heapq.heappush(waiting, (start_s + group.think_s * i / group.clients, id(client), client))

    while True:
        now_s = time.perf_counter()
        over = seconds is not None and now_s - start_s >= seconds
        over = over and all(len(g.latencies_s) >= g.least_answers for g in groups)
        while waiting and not over and waiting[0][0] <= now_s:
            client = heapq.heappop(waiting)[2]
            group = client.group
            if group.requests is None or group.sent < group.requests:
                client.begin(requests[group.name][group.sent % len(group.bodies)])
                group.sent += 1
                under_way += 1
                poll.modify(client.socket, selectors.EVENT_READ | selectors.EVENT_WRITE * bool(client.unsent), client)
            else:  # its work is done; the server may close an idle connection
                poll.unregister(client.socket)
                client.socket.close()
        if not under_way and (over or not waiting):
            break
        until_s = max(waiting[0][0] - now_s, 0) if waiting and not over else ANSWER_WITHIN_S
        for client in _answered(poll, until_s):
            client.note(start_s)
            under_way -= 1
            if client.closes:
                poll.unregister(client.socket)
                client.socket.close()
                client.connect()
                poll.register(client.socket, selectors.EVENT_READ, client)
            heapq.heappush(waiting, (time.perf_counter() + client.group.think_s, id(client), client))
    for key in list(poll.get_map().values()):
        key.data.socket.close()
    return {group.name: group.result() for group in groups}
