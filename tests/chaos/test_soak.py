"""Hours of ordinary days in minutes: requests of every size while pool.yml is changed again and again."""

from __future__ import annotations

import itertools
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tests.chaos.conftest import Figures
from tests.chaos.http import Answer, Connection, address, request
from tests.live.conftest import Server, fake, wait_until

CLIENTS = 4  # which keep two cores busy; each further one warms two more request threads, with memory of their own
KINDS_OF_REQUESTS = 200
CHECK_EACH = 25  # the vectors of one answer of so many are compared, the status of all
MOST_GROWTH = 0.05


@dataclass
class Traffic:
    """Threads that send the same requests over and over on connections that they keep."""

    to: tuple[str, int]
    wanted: int
    messages: list[bytes]
    expected: list[Answer]
    answered: Counter[int] = field(default_factory=Counter)
    failures: list[bytes] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._numbers = itertools.count()
        self._threads = [threading.Thread(target=self._run) for _ in range(CLIENTS)]
        for thread in self._threads:
            thread.start()

    def _run(self) -> None:
        ident = threading.get_ident()
        with Connection(self.to) as connection:
            while (number := next(self._numbers)) < self.wanted and not self.failures:
                kind = number * 7 % len(self.messages)
                answer = connection.ask(self.messages[kind])
                if answer.status != 200 or (number % CHECK_EACH == 0 and not same(answer, self.expected[kind])):
                    self.failures.append(answer.body[:500])
                self.answered[ident] += 1

    @property
    def done(self) -> int:
        return sum(self.answered.copy().values())

    @property
    def is_over(self) -> bool:
        return not any(thread.is_alive() for thread in self._threads)

    def join(self) -> None:
        for thread in self._threads:
            thread.join()


def same(one: Answer, other: Answer) -> bool:
    return vectors_of(one) == vectors_of(other)


def vectors_of(answer: Answer) -> Any:
    if answer.headers["content-type"] != "application/json":
        return answer.body
    document = answer.json()
    return document.get("vectors") or document["data"]


def some_request(rng: random.Random) -> bytes:
    """1 to 32 texts of 1 to 40 words, in any of the ways to ask for them."""
    texts = [" ".join(f"w{rng.randrange(5000)}" for _ in range(rng.randint(1, 40))) for _ in range(size(rng))]
    if rng.random() < 0.2:
        return request("POST", "/v1/embeddings", json.dumps({"model": "m", "input": texts}).encode())
    options = rng.choice(
        [{}, {}, {"encoding": "base64"}, {"dtype": "float16"}, {"dimensions": 8}, {"precision": "int8"}]
    )
    return request("POST", "/embed", json.dumps({"model": "m", "texts": texts, "options": options}).encode())


def size(rng: random.Random) -> int:
    """Mostly few."""
    return rng.choice([1, 1, 1, 2, 4, 8, rng.randint(1, 32)])


@dataclass
class Change:
    """The n-th state of pool.yml, each unlike the one before."""

    number: int

    @property
    def models(self) -> list[dict[str, Any]]:
        n = self.number
        return [
            fake("m", dim=16, alias=f"a{n}", queue={"max_size": 1000 + n % 2}, delay_ms=0.1 * (n // 4 % 2)),
            fake("other", dim=8, alias=f"b{n}", enabled=n % 3 > 0),
        ]

    def is_live(self, server: Server) -> bool:
        """The fourth changes load a successor; then it has taken over."""
        m, other = server.get("/status").json()["models"]
        wanted = (f"a{self.number}", f"b{self.number}", self.number % 3 > 0, 1000 + self.number % 2)
        return (m["alias"], other["alias"], other["enabled"], m["queue_max"]) == wanted and "successor" not in m


def test_nothing_grows_and_nothing_fails(
    server: Server, rng: random.Random, length: Callable[..., Any], figures: Figures
) -> None:
    """Every request is served, every change of pool.yml followed; memory in the end is that after a twenty-fifth."""
    wanted, every_s = length(short=3_000, long=500_000), length(short=0.2, long=1.0)
    server.write_pool(*Change(0).models)
    server.start()
    server.wait_ready()
    family = [server.process, *server.process.children(recursive=True)]

    def resident_mb() -> float:
        return sum(process.memory_info().rss for process in family) / 1e6

    messages = [some_request(rng) for _ in range(KINDS_OF_REQUESTS)]
    with Connection(address(server)) as connection:
        expected = [connection.ask(message) for message in messages]
    assert {answer.status for answer in expected} == {200}

    began = time.monotonic()
    traffic = Traffic(address(server), wanted, messages, expected)
    early_mb = None
    reloads = 0
    while not traffic.is_over:
        next_at = time.monotonic() + every_s
        change = Change(reloads + 1)
        server.write_pool(*change.models)
        wait_until(lambda change=change: change.is_live(server))
        reloads += 1
        if early_mb is None and traffic.done >= wanted / 25:
            early_mb = resident_mb()
        time.sleep(max(0.0, next_at - time.monotonic()))
    traffic.join()
    seconds = time.monotonic() - began
    late_mb = resident_mb()
    server.stop()
    assert traffic.failures == []
    assert traffic.done == wanted
    assert early_mb is not None
    figures("requests", f"{wanted}, all served")
    figures("rate", f"{wanted / seconds:.0f}/s")
    figures("reloads", reloads)
    figures("memory early and late", f"{early_mb:.1f} and {late_mb:.1f} MB ({100 * (late_mb / early_mb - 1):+.1f}%)")
    assert late_mb <= early_mb * (1 + length(short=1.0, long=MOST_GROWTH))
