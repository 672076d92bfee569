"""The hub of models, played by a small server on this machine."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

REPOSITORY = "org/m"


class Hub(ThreadingHTTPServer):
    """One repository, whose `main` is at `commit`; `says` is answered to every call instead, if it is set.

    The first time a file is sent of more than `cut_after` bytes, the connection ends there.
    """

    daemon_threads = False
    block_on_close = True

    def __init__(self, files: Mapping[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.commit = "a" * 40
        self.files = dict(files)
        self.asked: list[str] = []
        self.ranges: list[str] = []
        self.says: tuple[int, dict[str, str], bytes] | None = None
        self.hangs = False
        self.cut_after: int | None = None
        self.closing = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


def sha1_of(body: bytes) -> str:
    return hashlib.sha1(body, usedforsecurity=False).hexdigest()


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/api/agent-harnesses":  # the library's own affair
            return self.answer(404, {}, b"")
        self.server.asked.append(path)
        if self.server.hangs:
            self.server.closing.wait(20)
            return None
        if path == "/api/models":
            (wanted,) = parse_qs(urlsplit(self.path).query)["search"]
            return self.json([{"id": REPOSITORY, "modelId": REPOSITORY}] if wanted in ("m", "n") else [])
        if self.server.says:
            return self.answer(*self.server.says)
        if path.startswith(f"/api/models/{REPOSITORY}/revision/"):
            return self.json({"id": REPOSITORY, "sha": self.server.commit, "siblings": []})
        if path == f"/api/models/{REPOSITORY}/tree/{self.server.commit}":
            files = self.server.files.items()
            return self.json([{"type": "file", "path": n, "size": len(b), "oid": sha1_of(b)} for n, b in files])
        name = path.removeprefix(f"/{REPOSITORY}/resolve/{self.server.commit}/")
        if name not in self.server.files:
            return self.answer(404, {"X-Error-Code": "RepoNotFound" if "/api/" in path else "EntryNotFound"}, b"")
        return self.file(self.server.files[name])

    do_HEAD = do_GET

    def file(self, body: bytes) -> None:
        """All of it, or what a client that has the beginning asks for."""
        headers = {"ETag": f'"{sha1_of(body)}"', "X-Repo-Commit": self.server.commit, "Accept-Ranges": "bytes"}
        asked = self.headers.get("Range")
        if not asked or self.command == "HEAD":
            return self.answer(200, headers, body)
        self.server.ranges.append(asked)
        start = int(asked.removeprefix("bytes=").partition("-")[0])
        headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        return self.answer(206, headers, body[start:])

    def json(self, document: Any) -> None:
        self.answer(200, {"Content-Type": "application/json"}, json.dumps(document).encode())

    def answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "GET":
            return
        cut = self.server.cut_after
        if cut is not None and len(body) > cut:
            self.server.cut_after, body, self.close_connection = None, body[:cut], True
        with suppress(OSError):
            self.wfile.write(body)

    def log_message(self, *arguments: Any) -> None:
        pass


@contextlib.contextmanager
def playing(files: Mapping[str, bytes]) -> Iterator[Hub]:
    """A hub that answers as long as this lasts."""
    server = Hub(files)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), name="hub")
    thread.start()
    try:
        yield server
    finally:
        server.closing.set()
        server.shutdown()
        server.server_close()
        thread.join(20)
