"""A remote embedding service, played by a small server on this machine."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from socketserver import ThreadingMixIn
from types import MappingProxyType
from typing import Any, NamedTuple

from embedpool.config.spec import DriverSpec, HttpConfig, ModelSpec, PoolSpec, QueueSpec
from embedpool.errors import EmbedpoolError
from embedpool.pool.pool import Pool
from embedpool.pool.settings import PoolSettings
from tests.conftest import ask, settle


class Reply(NamedTuple):
    """What the remote answers; bytes are sent as they are."""

    document: Any
    status: int = 200
    headers: Mapping[str, str] = MappingProxyType({})


class Seen(NamedTuple):
    """What the remote was asked."""

    path: str
    headers: Any
    body: Any


DROP = Reply(None, status=0)  # the connection is closed without an answer
DRIP = Reply(None, status=-2)  # a byte now and then, without end
HANG = Reply(None, status=-1)  # no answer while the test runs


def vector(text: str) -> list[float]:
    return [float(len(text)), 1.0, -0.5]


def good(seen: Seen) -> Reply:
    """A sound answer of the protocol that the body is of."""
    body = seen.body
    if seen.path == "/v2/embed":
        billed = {"billed_units": {"input_tokens": 3}}
        return Reply({"embeddings": {"float": [vector(t) for t in body["texts"]]}, "meta": billed})
    if seen.path == "/api/embed":
        return Reply({"embeddings": [vector(t) for t in body["input"]], "prompt_eval_count": 9})
    if "inputs" in body:
        return Reply([vector(t) for t in body["inputs"]])
    if "input" in body:
        data = [{"index": i, "embedding": vector(t)} for i, t in enumerate(body["input"])]
        return Reply({"data": data, "usage": {"prompt_tokens": 5}})
    assert body["options"]["normalize"] is False  # by default an embedpool gives unit vectors
    return Reply({"vectors": [vector(t) for t in body["texts"]], "meta": {"tokens": 7, "truncated": [0]}})


class Remote(HTTPServer):
    """Answers by `script` while that lasts, then by `answer`."""

    def __init__(self, ip: str = "127.0.0.1", port: int = 0) -> None:
        super().__init__((ip, port), Handler)
        self.script: list[Reply] = []
        self.answer: Callable[[Seen], Reply] = good
        self.seen: list[Seen] = []
        self.closing = threading.Event()
        self.url = f"http://{ip}:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Remote

    def do_POST(self) -> None:
        seen = Seen(self.path, self.headers, json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.server.seen.append(seen)
        reply = self.server.script.pop(0) if self.server.script else self.server.answer(seen)
        if reply is HANG:
            self.server.closing.wait(20)
        if reply is DRIP:
            self.send_response(200)
            self.end_headers()
            with suppress(OSError):
                while not self.server.closing.wait(0.01):
                    self.wfile.write(b" ")
        if reply.status <= 0:
            return
        body = reply.document if isinstance(reply.document, bytes) else json.dumps(reply.document).encode()
        self.send_response(reply.status)
        for name, value in {"Content-Length": str(len(body)), **reply.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        with suppress(OSError):
            self.wfile.write(body)

    do_GET = do_POST

    def log_message(self, *arguments: Any) -> None:
        pass


class Crowd(ThreadingMixIn, Remote):
    """Answers many calls at once."""

    request_queue_size = 128


@contextmanager
def remote_pool(
    settings: PoolSettings, url: str, queue: int | None = None, slots: int | None = None, **config: Any
) -> Iterator[Pool]:
    """A pool whose one model `m` is served at this URL."""
    driver = DriverSpec("http", HttpConfig(**{"base_url": url, "normalize": False, **config}))
    pool = Pool(settings)
    try:
        pool.apply(PoolSpec((ModelSpec("m", driver, queue=QueueSpec(queue, slots)),)))
        settle(pool)
        yield pool
    finally:
        pool.stop()


def serving(kind: type[Remote] = Remote, *address: Any) -> Iterator[Remote]:
    server = kind(*address)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), name="remote")
    thread.start()
    yield server
    server.closing.set()
    server.shutdown()
    server.server_close()
    thread.join(20)


def at_once(pool: Pool, requests: list[list[str]], **options: Any) -> list[Any]:
    """What each request came to, as all of them are sent at once."""

    def send(texts: list[str]) -> Any:
        try:
            return ask(pool, "m", *texts, **options)
        except EmbedpoolError as error:
            return error

    with ThreadPoolExecutor(len(requests)) as callers:
        return list(callers.map(send, requests))
