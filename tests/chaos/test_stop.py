"""SIGTERM at any moment under load: what was sent before it is answered, and the end comes in time."""

from __future__ import annotations

import contextlib
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from tests.chaos.conftest import Figures, foreground
from tests.chaos.http import Answer, Connection, Cut, address, embed_request
from tests.live.conftest import Server, fake

ALL_TEXTS = [f"text {i}" for i in range(300)]
MOST_CLIENTS = 24
GRACE_S, MARGIN_S = 10, 10
REFUSED, CLOSED = 503, "closed"


@dataclass
class Sent:
    """A request that has left: its texts, when the last byte was handed to the system, and what came back."""

    texts: list[str]
    at: float
    answer: Answer | None = None  # None: the connection was closed without one


class Client(threading.Thread):
    """Asks without pause, on a connection that is kept or on a new one each time, until the server is gone."""

    def __init__(self, to: tuple[str, int], seed: float, *, is_kept: bool) -> None:
        super().__init__()
        self.sent: list[Sent] = []
        self._to = to
        self._rng = random.Random(seed)
        self._is_kept = is_kept

    def run(self) -> None:
        with contextlib.suppress(ConnectionError):  # refused
            while True:
                with Connection(self._to) as connection, contextlib.suppress(Cut):
                    self._ask_on(connection)

    def _ask_on(self, connection: Connection) -> None:
        while True:
            texts = self._rng.sample(ALL_TEXTS, self._rng.randint(1, 4))
            connection.send(embed_request(texts))
            self.sent.append(Sent(texts, time.monotonic()))
            try:
                answer = connection.answer()
            except ConnectionError as error:
                raise Cut from error
            self.sent[-1].answer = answer
            if not self._is_kept or answer.headers.get("connection") == "close":
                return


def test_a_stop_loses_nothing_that_was_sent_before(
    make_server: Callable[..., Server], kind: str, rng: random.Random, length: Callable[..., int], figures: Figures
) -> None:
    """Each request wholly sent before the signal gets its vectors, and the exit code is 0.

    A later one gets them too, or 503, or finds the door closed.
    """
    rounds = length(short=2, long=100)
    server = make_server(EMBEDPOOL_SERVER__GRACEFUL_TIMEOUT_S=str(GRACE_S))
    vectors: dict[str, list[float]] = {}
    counted: Counter[str] = Counter()
    longest_s = 0.0
    for _ in range(rounds):
        # A stop finds queues of any length: 1 to 24 clients, batches of 0 to 60 ms.
        server.write_pool(fake("m", dim=8, delay_ms=rng.uniform(0, 60)))
        with foreground(server, kind) as child:
            server.wait_ready()
            vectors = vectors or dict(zip(ALL_TEXTS, server.vectors("m", ALL_TEXTS), strict=True))
            clients = [
                Client(address(server), rng.random(), is_kept=i % 3 > 0) for i in range(rng.randint(1, MOST_CLIENTS))
            ]
            for client in clients:
                client.start()
            time.sleep(rng.uniform(0, 0.5))
            signalled_at = time.monotonic()
            child.send_signal(signal.SIGTERM)
            assert child.wait(GRACE_S + MARGIN_S) == 0
            longest_s = max(longest_s, time.monotonic() - signalled_at)
            for client in clients:
                client.join()
        for sent in (s for client in clients for s in client.sent):
            when = "before" if sent.at < signalled_at else "after"
            status = sent.answer.status if sent.answer else CLOSED
            counted[f"{when} {status}"] += 1
            assert when == "after" or status == 200
            assert status in (200, REFUSED, CLOSED), sent.answer
            if status == 200:
                assert sent.answer.json()["vectors"] == [vectors[text] for text in sent.texts]
        assert not server.pid_file.exists()
    assert counted["before 200"]
    figures("stops", rounds)
    figures("sent before the signal", f"{counted['before 200']}, all answered")
    after = ", ".join(f"{counted[f'after {end}']} {end}" for end in (200, REFUSED, CLOSED))
    figures("sent after it", after)
    figures("longest end", f"{longest_s:.1f} s")
