"""HTTP as bytes: clients here send what no library would, or must cost nearly nothing."""

from __future__ import annotations

import json
import socket
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import orjson

from tests.live.conftest import WAIT_S, Server


@dataclass
class Answer:
    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""

    def json(self) -> Any:
        return orjson.loads(self.body)


class Cut(Exception):
    """The connection ended before the answer did."""


def address(server: Server) -> tuple[str, int]:
    host, port = server.url.removeprefix("http://").split(":")
    return host, int(port)


def embed_request(texts: list[str], model: str = "m") -> bytes:
    return request("POST", "/embed", json.dumps({"model": model, "texts": texts}).encode())


def request(method: str, path: str, body: bytes = b"", content_type: str = "application/json") -> bytes:
    """A whole request. Its Host is one that management answers to."""
    head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\n"
    if body:
        head += f"Content-Type: {content_type}\r\nContent-Length: {len(body)}\r\n"
    return f"{head}\r\n".encode() + body


class Connection:
    """One that is kept alive."""

    def __init__(self, to: tuple[str, int], timeout_s: float = WAIT_S) -> None:
        self.socket = socket.create_connection(to, timeout=timeout_s)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._answers = self.socket.makefile("rb")

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *exception: object) -> None:
        self._answers.close()
        self.socket.close()

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def answer(self) -> Answer:
        """The next answer. Raises Cut."""
        return read_answer(self._answers)

    def ask(self, data: bytes) -> Answer:
        """Send a request and read its answer. Raises Cut."""
        self.send(data)
        return self.answer()


def read_answer(stream: BinaryIO) -> Answer:
    """One answer of a known length. Raises Cut."""
    first = stream.readline()
    if not first.endswith(b"\n"):
        raise Cut(first)
    found = Answer(int(first.split(b" ", 2)[1]))
    while (line := stream.readline()) != b"\r\n":
        if not line:
            raise Cut(first)
        name, _, value = line.decode("latin-1").partition(":")
        found.headers[name.lower()] = value.strip()
    length = int(found.headers.get("content-length", "0"))
    found.body = stream.read(length)
    if len(found.body) < length:
        raise Cut(first)
    return found
