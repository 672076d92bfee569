"""The hub, played by a small server on this machine, and its own library."""

from __future__ import annotations

import hashlib
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants

from embedpool.drivers import hub
from embedpool.drivers.hub import NotToBeHad, snapshot

FILES = {
    "config.json": b"{}",
    "model.safetensors": b"weights",
    "1_Pooling/config.json": b"{}",
    "pytorch_model.bin": b"a pickle",
    "onnx/model.onnx": b"a graph",
}
LOADED = {"config.json", "model.safetensors", "1_Pooling/config.json"}


class Hub(ThreadingHTTPServer):
    """One repository, org/m, whose `main` is at `commit`; `says` is answered to every call instead, if it is set."""

    daemon_threads = False
    block_on_close = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.commit = "a" * 40
        self.files = dict(FILES)
        self.asked: list[str] = []
        self.says: tuple[int, dict[str, str], bytes] | None = None
        self.hangs = False
        self.closing = threading.Event()


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
        if self.server.says:
            return self.answer(*self.server.says)
        if path.startswith("/api/models/org/m/revision/"):
            return self.json({"id": "org/m", "sha": self.server.commit, "siblings": []})
        if path == f"/api/models/org/m/tree/{self.server.commit}":
            files = self.server.files.items()
            return self.json([{"type": "file", "path": n, "size": len(b), "oid": sha1_of(b)} for n, b in files])
        name = path.removeprefix(f"/org/m/resolve/{self.server.commit}/")
        if name not in self.server.files:
            return self.answer(404, {"X-Error-Code": "EntryNotFound"}, b"")
        body = self.server.files[name]
        return self.answer(200, {"ETag": f'"{sha1_of(body)}"', "X-Repo-Commit": self.server.commit}, body)

    do_HEAD = do_GET

    def json(self, document: Any) -> None:
        self.answer(200, {"Content-Type": "application/json"}, json.dumps(document).encode())

    def answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            with suppress(OSError):
                self.wfile.write(body)

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def remote(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """The hub that the library speaks to, with an empty cache."""
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), name="hub")
    thread.start()
    for name in ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    files_at = f"{constants.ENDPOINT}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", files_at)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    huggingface_hub.close_session()  # it may know a proxy
    yield server
    huggingface_hub.close_session()
    server.closing.set()
    server.shutdown()
    server.server_close()
    thread.join(20)


def names_in(folder: Path) -> set[str]:
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}


def test_what_is_fetched_is_what_is_loaded(remote: Hub) -> None:
    """No weights that could carry code."""
    assert names_in(snapshot("org/m", None)) == LOADED


def test_a_whole_cache_asks_nobody(remote: Hub) -> None:
    """Although the repository holds more than was fetched, and has moved on by now."""
    found = snapshot("org/m", None)
    remote.asked.clear()
    remote.commit = "b" * 40
    assert snapshot("org/m", None) == found
    assert snapshot("org/m", "a" * 40) == found
    assert remote.asked == []


def test_an_interrupted_download_is_taken_up_again(remote: Hub) -> None:
    """A cached folder without weights is not taken for the model."""
    found = snapshot("org/m", None)
    (found / "model.safetensors").unlink()
    assert names_in(snapshot("org/m", None)) == LOADED


@pytest.mark.parametrize("says", [(403, {}), (503, {}), (429, {}), (401, {})], ids=str)
def test_a_hub_that_fails_is_not_asked_for_what_is_there(remote: Hub, says: tuple[int, dict[str, str]]) -> None:
    """The cache comes first."""
    found = snapshot("org/m", None)
    remote.says = (*says, b"")
    assert snapshot("org/m", None) == found


@pytest.mark.parametrize(("status", "headers", "words"), [
    (401, {}, "check the name"),
    (403, {}, "what the token in HF_TOKEN may read"),
    (403, {"X-Error-Code": "GatedRepo"}, "accept the terms at .*/org/m, and set HF_TOKEN"),
    (404, {}, "check the name"),
    (404, {"X-Error-Code": "RepoNotFound"}, "check the name"),
    (404, {"X-Error-Code": "RevisionNotFound"}, "no revision 'v9' of it"),
    (429, {"Retry-After": "5"}, "asks for a pause"),
    (500, {}, "the hub fails .500."),
    (503, {}, "the hub fails .503."),
    (200, {"Content-Type": "text/html"}, "check HF_ENDPOINT, and whether a proxy asks for a login"),
], ids=str)  # fmt: skip
def test_what_cannot_be_had_is_told_with_what_to_do(
    remote: Hub, status: int, headers: dict[str, str], words: str
) -> None:
    """In one sentence."""
    remote.says = (status, headers, b"<html>")
    with pytest.raises(NotToBeHad, match=words) as caught:
        snapshot("org/m", "v9")
    assert "\n" not in str(caught.value)


def test_a_hub_that_never_answers_is_waited_for_so_long(remote: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its library would wait for good."""
    monkeypatch.setattr(hub, "WAIT_S", 0.2)
    remote.hangs = True
    with pytest.raises(NotToBeHad, match="does not answer within"):
        snapshot("org/m", None)
    assert remote.asked


def test_a_hub_that_is_not_there(remote: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody listens."""
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{nobody.getsockname()[1]}")
        with pytest.raises(NotToBeHad, match="cannot be reached"):
            snapshot("org/m", None)


def test_a_proxy_that_refuses(remote: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is named as such, and not the hub."""
    monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{remote.server_port}")
    monkeypatch.setattr(constants, "ENDPOINT", "https://hub.invalid")
    huggingface_hub.close_session()
    with pytest.raises(NotToBeHad, match=r"the proxy refuses .*: check HTTPS_PROXY and NO_PROXY"):
        snapshot("org/m", None)


def test_offline(remote: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a network a model that is not there is refused at once."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(NotToBeHad, match="HF_HUB_OFFLINE forbids"):
        snapshot("org/m", None)
    assert remote.asked == []


def test_a_name_that_is_none(remote: Hub) -> None:
    """The library's own words."""
    with pytest.raises(NotToBeHad, match="Repo id must"):
        snapshot("org/m/x", None)
