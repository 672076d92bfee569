"""Every row of the error table, produced through real HTTP under both servers."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import requests

from tests.live.conftest import WAIT_S, Server, fake, wait_until


class Remote(ThreadingHTTPServer):
    """A remote service that answers each path with the status it names, except to the probe."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        status = 200 if b"quick brown fox" in body else int(self.path.strip("/"))
        vectors = [[1, 0, 0]] * len(json.loads(body)["texts"])
        answer = json.dumps({"vectors": vectors} if status == 200 else {"error": {"message": "as asked"}}).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *args: Any) -> None:
        pass


def remote_entry(remote: Remote, status: int) -> dict[str, Any]:
    config = {"base_url": f"{remote.url}/{status}", "retries": 0}
    return {"model": f"remote-{status}", "driver": {"type": "http", "config": config}}


def error_of(answer: requests.Response, status: int) -> dict[str, Any]:
    """The error, checked for the one shape and for the server's request id."""
    assert answer.status_code == status, answer.text
    document = answer.json()
    assert set(document) == {"error"}
    error: dict[str, Any] = document["error"]
    assert set(error) - {"fields"} == {"code", "message", "request_id"}
    assert error["message"]
    return error


def test_every_row_of_the_table(make_server: Callable[..., Server], kind: str) -> None:
    """Status and code of each error, in one shape."""
    remote = Remote()
    threading.Thread(target=remote.serve_forever, daemon=True).start()
    server = make_server(
        EMBEDPOOL_LIMITS__MAX_BODY_BYTES="100000",
        EMBEDPOOL_LIMITS__MAX_TEXTS_PER_REQUEST="100",
        EMBEDPOOL_LIMITS__MAX_CHARS_PER_TEXT="5000",
        EMBEDPOOL_DEFAULTS__REQUEST_TIMEOUT_S="10",  # so long the pool asks a busy service again
    )
    models = [
        fake("m", alias="a"),
        fake("off", enabled=False),
        fake("slow", delay_ms=1500, queue={"max_size": 1}),
        fake("culprit", fault="raise", fault_text="poison"),
        fake("nan", fault="nan", fault_text="poison"),
        fake("broken", fault="load"),
        fake("loading", load_delay_ms=600_000),
        *(remote_entry(remote, status) for status in (400, 413, 422, 429, 500)),
    ]
    server.write_pool(*models)
    server.start(kind)
    wait_until(lambda: server.get("/ready").json()["loading"] == ["loading"])

    def code(answer: requests.Response, status: int) -> str:
        return str(error_of(answer, status)["code"])

    def raw(data: bytes | str, content_type: str | None = "application/json") -> requests.Response:
        return server.post("/embed", data=data, headers={"Content-Type": content_type} if content_type else {})

    assert code(raw("{"), 400) == "bad_json"
    assert code(raw("[1]"), 400) == "bad_json"
    assert code(server.embed("m", []), 400) == "empty_input"
    assert code(server.post("/reload", {}, headers={"Origin": "https://evil.example"}), 403) == "forbidden"
    assert code(server.post("/reload", {}, headers={"Host": "evil.example"}), 403) == "forbidden"
    assert code(server.post("/reload", {}, headers={"X-Forwarded-For": "10.0.0.1"}), 403) == "forbidden"
    assert code(server.embed("off", ["x"]), 403) == "model_disabled"
    unknown = error_of(server.embed("mm", ["x"]), 404)
    assert unknown["code"] == "model_not_found"
    assert code(server.get("/nothing"), 404) == "not_found"
    assert code(server.get("/embed"), 405) == "method_not_allowed"
    assert code(server.post("/models/alias", {"model": "off", "alias": "a"}), 409) == "alias_conflict"
    different = {"model": "m", "driver_type": "fake", "driver_config": {"dim": 3}}
    assert code(server.post("/models/register", different), 409) == "model_exists_differently"
    assert code(raw(b"x" * 100_001), 413) == "body_too_large"
    assert code(server.embed("m", ["x"] * 101), 413) == "too_many_texts"
    assert code(raw('{"model": "m", "texts": ["x"]}', "text/plain"), 415) == "unsupported_media_type"
    invalid = error_of(server.post("/embed", {"model": "m", "texts": ["x", 3], "options": {}}), 422)
    assert (invalid["code"], list(invalid["fields"])) == ("validation_error", ["texts[1]"])
    invalid = error_of(server.embed("m", ["x"], dimensions="12", normalize="yes"), 422)
    assert set(invalid["fields"]) == {"options.dimensions", "options.normalize"}
    assert code(server.embed("m", ["x" * 5001]), 422) == "validation_error"
    assert code(server.embed("m", ["a b c"], max_seq_length=3, truncate="error"), 422) == "text_too_long"
    assert code(server.embed("m", ["x"], wonder=1), 422) == "unsupported_option"
    culprit = error_of(server.embed("culprit", ["fine", "poison", "fine"]), 500)
    assert (culprit["code"], list(culprit["fields"])) == ("inference_failed", ["texts[1]"])
    assert error_of(server.embed("nan", ["fine", "poison"]), 500)["fields"].keys() == {"texts[1]"}
    assert code(server.embed("remote-500", ["x"]), 502) == "upstream_error"
    for status in (400, 413, 422, 429):
        assert "as asked" in error_of(server.embed(f"remote-{status}", ["x"]), status)["message"]
    loading = server.embed("loading", ["x"])
    assert code(loading, 503) == "model_loading"
    assert int(loading.headers["Retry-After"]) >= 1
    failed = server.embed("broken", ["x"])
    assert code(failed, 503) == "model_failed"
    assert "fault: load" in failed.json()["error"]["message"]
    late = server.post("/embed", {"model": "slow", "texts": ["x"]}, headers={"X-Request-Timeout-Ms": "50"})
    assert code(late, 504) == "deadline_exceeded"
    with ThreadPoolExecutor(8) as clients:
        burst = list(clients.map(lambda i: server.embed("slow", [str(i)]), range(8)))
    refused = [answer for answer in burst if answer.status_code != 200]
    assert refused
    assert {code(answer, 429) for answer in refused} == {"overloaded"}
    assert all(int(answer.headers["Retry-After"]) >= 1 for answer in refused)

    server.pool_yml.write_text("models: [")
    assert code(server.post("/models/enable", {"model": "m", "enabled": False}), 409) == "pool_file_invalid"
    assert server.embed("m", ["x"]).status_code == 200
    server.write_pool(*models)
    wait_until(lambda: server.get("/status").json()["last_reload"]["ok"])
    remote.shutdown()
    remote.server_close()


def test_management_with_a_key(make_server: Callable[..., Server], kind: str) -> None:
    """401 unauthorized without the admin key; the command line sends the one that client.api_key_env names."""
    server = make_server(
        EMBEDPOOL_SECURITY__ADMIN_KEY_ENV="EMBEDPOOL_SECRET_ADMIN",
        EMBEDPOOL_SECRET_ADMIN="k3y",
        EMBEDPOOL_CLIENT__API_KEY_ENV="EMBEDPOOL_SECRET_ADMIN",
    )
    server.start(kind)
    assert error_of(server.post("/reload", {}), 401)["code"] == "unauthorized"
    server.cli("register", "--model", "m", "--type", "fake")
    assert "admin key" in server.cli("unregister", "--model", "m", code=1, EMBEDPOOL_SECRET_ADMIN="wrong")
    assert "k3y" not in server.log.read_text()


def test_the_life_of_a_key(make_server: Callable[..., Server]) -> None:
    """Made, used by the command line, listed without what is secret, revoked while the server runs."""
    server = make_server(EMBEDPOOL_CLIENT__API_KEY_ENV="MY_KEY")
    server.write_pool(fake("m"))
    server.start()
    server.wait_ready()
    assert server.embed("m", ["x"]).status_code == 200
    made = json.loads(server.cli("key", "create", "--name", "team a", "--scopes", "embed,admin", "--json"))
    wait_until(lambda: server.embed("m", ["x"]).status_code == 401)
    assert server.cli("embed", "hello", MY_KEY=made["key"]).startswith("[")
    server.cli("set-alias", "--model", "m", "--alias", "n", MY_KEY=made["key"])
    assert "key" in server.cli("set-alias", "--model", "m", "--alias", "o", code=1, MY_KEY="wrong")
    listed = server.cli("key", "list")
    assert made["id"] in listed
    assert "team a" in listed
    assert made["key"] not in listed + server.log.read_text()
    last = json.loads(server.cli("key", "create", "--scopes", "admin", "--json"))
    server.cli("key", "revoke", "--id", made["id"])
    assert "no key" in server.cli("key", "revoke", "--id", made["id"], code=2)
    wait_until(
        lambda: server.post("/reload", {}, headers={"Authorization": f"Bearer {made['key']}"}).status_code == 401
    )
    assert server.embed("m", ["x"]).status_code == 401
    assert "last key" in server.cli("key", "revoke", "--id", last["id"], code=2)
    server.cli("key", "revoke", "--id", last["id"], "--yes")
    wait_until(lambda: server.embed("m", ["x"]).status_code == 200)
    server.stop()


LARGE = {
    "POST /embed HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: 60000000": "code",
    "POST /embed HTTP/1.1\r\nContent-Type: application/x-ndjson\r\nContent-Length: 900000000": "code",
    "POST /embed HTTP/1.1\r\nTransfer-Encoding: chunked": "code",
    "POST /v1/embeddings HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 60000000": "type",
    "POST /tei/m/embed HTTP/1.1\r\nContent-Length: 60000000": "error_type",
}


def test_no_large_body_is_read_from_a_stranger(server: Server, kind: str) -> None:
    """Who may not send it is told by the head of the request alone, in the shape of its API; who may is asked to go
    on."""
    server.write_pool(fake("m"))
    key = json.loads(server.cli("key", "create", "--name", "a", "--json"))["key"]
    server.start(kind)
    server.wait_ready()
    to = server.url.removeprefix("http://").split(":")
    for head, name in LARGE.items():
        with socket.create_connection((to[0], int(to[1])), timeout=WAIT_S) as stranger:
            stranger.sendall(f"{head}\r\nHost: x\r\n\r\n".encode())
            answer = b"".join(iter(lambda: stranger.recv(65536), b""))
            assert answer.startswith(b"HTTP/1.1 401 ")
            document = json.loads(answer.partition(b"\r\n\r\n")[2])
            assert name in document.get("error", document) or name in document
        if "100-continue" in head:
            with socket.create_connection((to[0], int(to[1])), timeout=WAIT_S) as friend:
                friend.sendall(f"{head}\r\nHost: x\r\nAuthorization: Bearer {key}\r\n\r\n".encode())
                assert friend.recv(12) == b"HTTP/1.1 100"
    sends_all_first = http.client.HTTPConnection(*to, timeout=WAIT_S)
    with contextlib.closing(sends_all_first):
        sends_all_first.request("POST", "/embed", bytes(60_000_000), {"Content-Type": "application/json"})
        assert sends_all_first.getresponse().status == 401
    large = {"model": "m", "texts": ["word " * 20_000]}
    assert server.post("/embed", large, headers={"Authorization": f"Bearer {key}"}).status_code == 200
    assert server.embed("m", ["x"]).status_code == 401
    server.stop()


def test_no_server_without_a_key_is_open_to_other_machines(server: Server, kind: str) -> None:
    """It does not start, unless there is a key or the operator insists."""
    begin = ("pool", "start", "--detach", "--server", kind, "--port", "0", "--host", "0.0.0.0")
    assert "key create" in server.cli(*begin, code=1)
    server.cli(*begin, "--insecure")
    server.stop()
    server.cli("key", "create")
    server.cli(*begin)
    assert error_of(server.embed("m", ["x"]), 401)["code"] == "unauthorized"
    server.stop()


@pytest.mark.parametrize("request_line", [b"NONSENSE\r\n\r\n", b"GET / HTTP/1.1\r\nContent-Length: x\r\n\r\n"])
def test_what_is_not_http_gets_our_shape(server: Server, kind: str, request_line: bytes) -> None:
    """Even garbage is answered with JSON and a code, and the connection is closed."""
    import json
    import socket

    server.start(kind)
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=WAIT_S) as connection:
        connection.sendall(request_line)
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.")
    assert b" 400 " in head.split(b"\r\n")[0]
    assert json.loads(body)["error"]["code"] == "bad_request"


def test_a_disk_that_refuses_writes_is_a_clear_error(server: Server, kind: str) -> None:
    """507 storage_error, and nothing is changed."""
    server.write_pool(fake("m"))
    server.start(kind)
    server.wait_ready()
    before = server.pool_yml.read_bytes()
    lock = server.pool_yml.with_name("pool.yml.lock")
    lock.unlink(missing_ok=True)
    lock.mkdir()  # a lock that cannot be taken; root ignores file modes
    answer = server.post("/models/enable", {"model": "m", "enabled": False})
    assert error_of(answer, 507)["code"] == "storage_error"
    assert server.pool_yml.read_bytes() == before
    assert server.embed("m", ["x"]).status_code == 200


def test_stopping_says_so(server: Server, kind: str) -> None:
    """A request that cannot be finished within the grace period gets 503 shutting_down, and the log counts it."""
    server.environment["EMBEDPOOL_SERVER__GRACEFUL_TIMEOUT_S"] = "1"
    server.write_pool(fake("slow", delay_ms=3000))
    server.start(kind)
    server.wait_ready()
    with ThreadPoolExecutor(1) as client:
        answer = client.submit(server.embed, "slow", ["x"])
        wait_until(lambda: server.status("slow")["replicas_busy"])
        server.stop()
        error = error_of(answer.result(), 503)
    assert error["code"] == "shutting_down"
    assert "1 requests got 503" in server.log.read_text()
