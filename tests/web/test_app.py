"""What holds for every path: request ids, the one error shape, unknown paths and methods, unexpected errors."""

from __future__ import annotations

import gc
import json
import logging
import threading
from typing import Any

import pytest
from werkzeug.test import EnvironBuilder, run_wsgi_app

from embedpool.config.settings import Settings
from embedpool.config.spec import ModelSpec
from embedpool.errors import Overloaded, ShuttingDown, UpstreamError
from embedpool.pool.request import Request, Result
from embedpool.tasks.driver import Place
from embedpool.tasks.embed import Embed
from embedpool.tasks.item import Batch, Item
from embedpool.tasks.rows import Answer, Rows
from embedpool.web.app import create_app
from embedpool.web.http_request import HttpRequest
from embedpool.web.lines import CHUNK_TEXTS
from embedpool.web.metrics import Metrics
from tests.conftest import open_fake
from tests.web.conftest import MODEL, NAME, MakeWeb, Web, refused

PATHS = ("/health", "/ready", "/status", "/models", "/metrics", f"/models/{NAME}", f"/ready/{NAME}")


@pytest.mark.parametrize("path", PATHS)
def test_a_sane_request_id_is_echoed(web: Web, path: str) -> None:
    """Every answer carries the client's X-Request-Id."""
    assert web.get(path, headers={"X-Request-Id": "Trace-1.2_3"}).headers["X-Request-Id"] == "Trace-1.2_3"


@pytest.mark.parametrize("given", [None, "", "a b", "a/b", "ä", "<script>", "x" * 129, '"'])
def test_any_other_request_id_is_replaced(web: Web, given: str | None) -> None:
    """A missing or insane id is replaced by a new one, another for each request."""
    headers = {} if given is None else {"X-Request-Id": given.encode().decode("latin-1")}
    ids = {web.get("/health", headers=headers).headers["X-Request-Id"] for _ in range(2)}
    assert len(ids) == 2
    assert all(i.isalnum() and len(i) == 32 for i in ids)


def test_an_error_carries_the_clients_id(web: Web) -> None:
    """The id in an error is the one in the header."""
    answer = web.embed(headers={"X-Request-Id": "trace-7"})
    assert refused(answer, 400, "empty_input")["request_id"] == "trace-7"


@pytest.mark.parametrize("path", ["/nothing", "/embed/x", "/v3/embed", "/static/x"])
def test_an_unknown_path_is_not_found(web: Web, path: str) -> None:
    """A path that is nothing here answers 404 in the one shape."""
    refused(web.get(path), 404, "not_found")


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/embed", "POST"),
        ("DELETE", "/health", "GET"),
        ("POST", "/status", "GET"),
        ("PUT", "/reload", "POST"),
        ("PATCH", f"/models/{NAME}", "DELETE"),
    ],
)
def test_a_wrong_method_names_the_allowed_ones(web: Web, method: str, path: str, allowed: str) -> None:
    """A path asked with the wrong method answers 405 and an Allow header."""
    answer = web.app.test_client().open(path, method=method)
    refused(answer, 405, "method_not_allowed")
    assert allowed in answer.headers["Allow"].split(", ")


@pytest.mark.parametrize(
    ("path", "keys"),
    [
        ("/v1/completions", {"error", "detail"}),
        ("/embeddings", {"error", "detail"}),
        ("/v2/rerank", {"id", "message"}),
        ("/v1/embed", {"id", "message"}),
        ("/tei/m/rerank/\n", {"error", "error_type"}),
        ("/api/generate", {"error"}),
    ],
)
def test_a_path_that_is_none_has_the_error_of_its_dialect(web: Web, path: str, keys: set[str]) -> None:
    """A client of another API is told in its own words, whatever it asks for, and by whatever method."""
    for answer in (web.get(path), web.app.test_client().patch(path)):
        assert answer.status_code in (404, 405)
        assert set(answer.json) == keys
        assert "fields" not in answer.json
    if path.startswith(("/v1/completions", "/embeddings")):
        assert "param" in answer.json["error"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/embed", {"texts": ["a", "b c d e", "f g h i"], "options": {"max_seq_length": 4}}),
        ("/v2/embed", {"texts": ["a", "b c d e", "f g h i"], "max_tokens": 4}),
        ("/v1/embeddings", {"input": ["a", "w " * 600, "w " * 700]}),
        ("/api/embed", {"input": ["a", "w " * 600, "w " * 700]}),
    ],
)
def test_truncation_is_told_in_every_dialect(web: Web, path: str, body: dict[str, object]) -> None:
    """Which texts were cut stands in a header, also where the API's own answer has no place for it."""
    answer = web.post(path, {"model": "m", **body})
    assert (answer.status_code, answer.headers["X-Embedpool-Truncated"]) == (200, "2")
    assert answer.headers["X-Embedpool-Truncated-Texts"] == "1,2"
    assert "X-Embedpool-Truncated" not in web.embed("a").headers


def test_a_long_list_of_truncated_texts_is_cut(web: Web) -> None:
    """A header has its limits; the count has not."""
    answer = web.embed(*["a b c"] * 600, max_seq_length=4)
    assert answer.headers["X-Embedpool-Truncated"] == "600"
    assert answer.headers["X-Embedpool-Truncated-Texts"].startswith("0,1,2,")
    assert answer.headers["X-Embedpool-Truncated-Texts"].endswith(",499,...")


def test_a_trailing_slash_is_no_other_path(web: Web) -> None:
    """Clients that end a path with a slash are served."""
    assert web.post("/embed/", {"model": "m", "texts": ["a"]}).status_code == 200
    assert web.get("/health/").status_code == 200


@pytest.mark.parametrize(
    ("error", "status", "code", "retry_after"),
    [
        (Overloaded("full", retry_after_s=1.2), 429, "overloaded", "2"),
        (ShuttingDown("bye"), 503, "shutting_down", "5"),
        (UpstreamError("slow down", remote_status=429, retry_after_s=3), 429, "upstream_error", "3"),
        (UpstreamError("teapot", remote_status=418), 502, "upstream_error", None),
    ],
)
def test_errors_of_the_pool_keep_status_code_and_retry_after(
    web: Web, monkeypatch: pytest.MonkeyPatch, error: Exception, status: int, code: str, retry_after: str | None
) -> None:
    """What the pool refuses reaches the client with its status, code and time to come back, in whole seconds."""

    def submit(*arguments: object) -> None:
        raise error

    monkeypatch.setattr(web.pool, "submit", submit)
    answer = web.embed("a")
    assert refused(answer, status, code)["message"] == str(error)
    assert answer.headers.get("Retry-After") == retry_after


def test_an_unexpected_error_leaks_nothing(
    web: Web, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A bug answers internal_error without its text; the log has it under the request's id."""

    def submit(*arguments: object) -> None:
        raise RuntimeError("hunter2 in /etc/passwd")

    monkeypatch.setattr(web.pool, "submit", submit)
    with caplog.at_level(logging.ERROR):
        answer = web.embed("a", headers={"X-Request-Id": "trace-9"})
    refused(answer, 500, "internal_error")
    for leaked in ("hunter2", "passwd", "RuntimeError", "Traceback"):
        assert leaked not in answer.text
    assert "trace-9" in caplog.text
    assert "hunter2" in caplog.text


def test_building_the_app_starts_nothing(web: Web) -> None:
    """An app is built before a fork: it starts no thread and leaves the pool alone."""
    before = threading.active_count()
    app = create_app(web.pool, web.reconciler, Settings(), Metrics())
    assert threading.active_count() == before
    assert app.test_client().get("/health").json == {"ok": True, "booted": True, "models": 1}


def test_two_apps_in_one_process_do_not_meet(web: Web) -> None:
    """Several apps can live in one process, each with its own metrics."""
    other = create_app(web.pool, web.reconciler, Settings(), Metrics())
    assert other.test_client().get("/metrics").status_code == web.get("/metrics").status_code == 200


LARGE = {HttpRequest, Embed, Item, Request, Rows, Result}  # what holds texts, token ids and vectors


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/embed", {"model": "m", "texts": ["a"] * 300}, 200),
        ("/embed", {"model": "m", "texts": ["a", "bad"], "options": {"on_error": "partial"}}, 200),
        ("/embed", {"model": "m", "texts": ["bad"]}, 500),
        ("/embed", {"model": "m", "texts": ["a b c"], "options": {"truncate": "error", "max_seq_length": 4}}, 422),
        ("/embed", {"model": "m", "texts": []}, 400),
        ("/v1/embeddings", {"model": "m", "input": ["a", "b"], "encoding_format": "base64"}, 200),
        ("/tei/m/embed", {"inputs": ["a", "b"]}, 200),
        (
            "/v2/embed",
            {"model": "m", "texts": ["a", "b"], "input_type": "search_query", "embedding_types": ["int8"]},
            200,
        ),
        ("/api/embed", {"model": "m", "input": ["a", "b"]}, 200),
    ],
)
def test_an_answered_request_goes_at_once(
    make_web: MakeWeb, caplog: pytest.LogCaptureFixture, path: str, body: dict[str, Any], status: int
) -> None:
    """All that it took, not when garbage is collected: that is seldom, and a request may be large."""
    caplog.set_level(logging.CRITICAL)  # what is captured is kept
    web = make_web(MODEL + ", driver: {type: fake, config: {fault: raise, fault_text: bad}}")
    assert _kept(web, path, status, json=body) <= 0


def _lines(*texts: str) -> bytes:
    return b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)


@pytest.mark.parametrize(
    ("path", "sent", "status"),
    [
        ("/embed", {"json": {"model": "m", "texts": ["a", "bad"]}}, 502),
        ("/embed", {"json": {"model": "m", "texts": ["a", "bad"], "options": {"on_error": "partial"}}}, 200),
        ("/embed?model=m", {"data": _lines(*["a"] * CHUNK_TEXTS, "bad"), "content_type": "application/x-ndjson"}, 200),
        ("/embed?model=m", {"data": _lines("bad"), "content_type": "application/x-ndjson"}, 502),
        ("/nothing", {}, 404),
        ("/status", {}, 405),
    ],
)
def test_so_does_one_that_a_remote_service_fails_or_nobody_answers(
    make_web: MakeWeb, caplog: pytest.LogCaptureFixture, path: str, sent: dict[str, Any], status: int
) -> None:
    """An error does not hold what it came through: when a remote is down, there are many."""
    caplog.set_level(logging.CRITICAL)

    def open_place(spec: ModelSpec, memory: object, report: object) -> Place:
        place = open_fake(spec)
        run = place.run

        def failing(batch: Batch) -> Answer:
            if "bad" in batch.texts:
                raise UpstreamError("it is down")
            return run(batch)

        place.run = failing  # type: ignore[method-assign]
        return place

    assert _kept(make_web(MODEL, open_place=open_place), path, status, **sent) <= 0


def _kept(web: Web, path: str, status: int, **sent: Any) -> int:
    """How many large things three such requests leave; below 0 if a worker had yet to let go of the one before."""

    def ask() -> None:
        environ = EnvironBuilder(path, method="POST", **sent).get_environ()
        chunks, answered, _ = run_wsgi_app(web.app, environ, buffered=True)
        assert answered.startswith(str(status)), b"".join(chunks)

    ask()  # what is made once and kept
    gc.collect()
    before = _count(LARGE)
    gc.disable()
    try:
        for _ in range(3):
            ask()
        web.pool.stop()  # so that no worker holds the last batch
        return _count(LARGE) - before
    finally:
        gc.enable()


def _count(kinds: set[type]) -> int:
    return sum(type(thing) in kinds for thing in gc.get_objects())
