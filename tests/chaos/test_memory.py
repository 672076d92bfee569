"""Bodies of many megabytes at once, to a real model: what they hold is bounded, and goes back to the system."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests

from tests.chaos.conftest import Figures
from tests.live.conftest import MINILM, WAIT_S, Server, wait_until

MB = 1_000_000
CHARS = 1_000_000
WIDE_CHARS = 3  # bytes of a character in the text of ideographs
EVERY_S = 0.05
TEXTS = {"ASCII": "! " * (CHARS // 2), "CJK": "日本語の文字列" * (CHARS // 7)}


class Watch(threading.Thread):
    """Looks at the server's memory and asks for /health all the while."""

    def __init__(self, server: Server) -> None:
        super().__init__(daemon=True)
        self._server, self._url, self._over = server, server.url, threading.Event()
        self.most_bytes = 0
        self.health_s: list[float] = []

    def run(self) -> None:
        with requests.Session() as session:
            while not self._over.wait(EVERY_S):
                self.most_bytes = max(self.most_bytes, bytes_of(self._server))
                began = time.monotonic()
                assert session.get(f"{self._url}/health", timeout=WAIT_S).status_code == 200
                self.health_s.append(time.monotonic() - began)

    def stop(self) -> None:
        self._over.set()
        self.join()


def bytes_of(server: Server) -> int:
    return sum(p.memory_info().rss for p in (server.process, *server.process.children(recursive=True)))


@pytest.mark.parametrize("script", TEXTS)
def test_large_bodies_at_once_hold_little_memory(
    make_server: Callable[..., Server], length: Callable[..., int], figures: Figures, script: str
) -> None:
    """Some go in at a time, the others are told when to come again before they are parsed, and all are answered."""
    count = length(short=6, long=16)
    texts = length(short=20, long=60) // (WIDE_CHARS if script == "CJK" else 1)
    server = make_server(EMBEDPOOL_LIMITS__MAX_BODIES_BYTES=str(length(short=64 * MB, long=256 * 2**20)))
    driver = {"type": "local_st", "config": {"max_seq_length": 256}}
    server.write_pool({"model": MINILM, "alias": "m", "driver": driver})
    server.start()
    server.wait_ready()
    body = json.dumps({"model": "m", "texts": [TEXTS[script]] * texts}, ensure_ascii=False).encode()
    codes: Counter[int] = Counter()

    def ask(number: int) -> None:
        while True:
            answer = requests.post(
                f"{server.url}/embed", body, headers={"Content-Type": "application/json"}, timeout=WAIT_S
            )
            codes[answer.status_code] += 1
            if answer.status_code != 429:
                return
            time.sleep(int(answer.headers["Retry-After"]))

    server.vectors("m", ["a"])
    before = bytes_of(server)
    watch = Watch(server)
    watch.start()
    with ThreadPoolExecutor(count) as clients:
        list(clients.map(ask, range(count)))
    watch.stop()
    wait_until(lambda: bytes_of(server) - before < 150 * MB)
    figures("requests", f"{count} of {len(body) / MB:.0f} MB, all answered, {codes[429]} times told to come again")
    most_mb, left_mb = ((size - before) / MB for size in (watch.most_bytes, bytes_of(server)))
    figures("memory grew by", f"{most_mb:.0f} MB, and in the end {left_mb:.0f} MB")
    figures("longest /health", f"{1000 * max(watch.health_s):.0f} ms")
    assert codes.keys() <= {200, 429}
    assert most_mb < length(short=400, long=1000)
    assert max(watch.health_s) < length(short=2.0, long=0.5)
