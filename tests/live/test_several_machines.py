"""Three embedpools behind one name, one of which dies and one joins under load."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import psutil

from tests.live.conftest import Server, fake, wait_until

NAME = "embedpools.test"
CALLERS = 8
RESOLVER = f"""
import pathlib, socket

real = socket.getaddrinfo

def getaddrinfo(host, *arguments, **named):
    if host != {NAME!r}:
        return real(host, *arguments, **named)
    ips = pathlib.Path(__file__).with_name("ips").read_text().split()
    return [found for ip in ips for found in real(ip, *arguments, **named)]

socket.getaddrinfo = getaddrinfo
"""


def test_one_dies_and_one_joins_under_load(make_server: Callable[..., Server]) -> None:
    """No request fails, each vector is right, and the one that joins takes its part."""
    far = [make_server(f"far-{i}") for i in range(3)]
    for server in far:
        server.write_pool(fake("m", delay_ms=5))
    start(far[0], 0, 0)
    port = urlsplit(far[0].url).port or 0
    start(far[1], 1, port)
    front = make_server("front")
    (front.folder / "sitecustomize.py").write_text(RESOLVER)
    ips = front.folder / "ips"
    ips.write_text("127.0.0.1 127.0.0.2")
    config = {"base_url": f"dns+http://{NAME}:{port}/embed", "remote_model": "m"}
    front.write_pool({"model": "far", "driver": {"type": "http", "config": config}})
    front.start(PYTHONPATH=str(front.folder))
    front.wait_ready()
    wait_until(lambda: states(front) == {"127.0.0.1": "serves", "127.0.0.2": "serves"})
    expected = {f"text {i}": vector for i, vector in enumerate(far[0].vectors("m", [f"text {i}" for i in range(64)]))}
    over, failures, answered = threading.Event(), [], [0] * CALLERS

    def ask(caller: int) -> None:
        number = caller
        while not over.is_set():
            texts = [f"text {(number + i) % 64}" for i in range(4)]
            answer = front.embed("far", texts)
            if answer.status_code != 200:
                failures.append(answer.text)
                return
            found = answer.json()["vectors"]
            np.testing.assert_allclose(found, [expected[text] for text in texts], atol=1e-5)
            number += 4
            answered[caller] += 1

    with ThreadPoolExecutor(CALLERS) as callers:
        asked = [callers.submit(ask, caller) for caller in range(CALLERS)]
        try:
            wait_until(lambda: sum(answered) > 50)
            family = [far[1].process, *far[1].process.children(recursive=True)]
            for process in family:
                process.kill()
            psutil.wait_procs(family, timeout=20)
            soon = sum(answered) + 50
            wait_until(lambda: sum(answered) > soon or failures)
            start(far[2], 2, port)
            ips.write_text("127.0.0.1 127.0.0.3")
            wait_until(lambda: states(front) == {"127.0.0.1": "serves", "127.0.0.3": "serves"} or failures)
            before = far[2].status("m")["counters"]["requests"]
            wait_until(lambda: far[2].status("m")["counters"]["requests"] > before + 20 or failures)
        finally:
            over.set()
        for one in asked:
            one.result()
    assert failures == []
    for server in (front, far[0], far[2]):
        server.stop()


def start(server: Server, number: int, port: int) -> None:
    """At an address of its own of this machine."""
    server.cli("pool", "start", "--detach", "--host", f"127.0.0.{number + 1}", "--port", str(port))
    server.wait_ready()


def states(server: Server) -> dict[str, Any]:
    found = server.status("far")["runs_on"].get("base_urls", {})
    return {name.partition(":")[0]: state for name, state in found.items()}
