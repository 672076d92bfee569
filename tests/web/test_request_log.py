"""One line a request."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest

from embedpool.web import request_log
from tests.web.conftest import NAME, Web

SECRET = "a secret text"


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Callable[[], list[dict[str, Any]]]:
    """The fields of the lines so far, at level debug and above."""
    caplog.set_level(logging.DEBUG, logger=request_log.__name__)
    return lambda: [r.fields for r in caplog.records if r.name == request_log.__name__]


def test_a_request_leaves_a_line(web: Web, lines: Callable[[], list[dict[str, Any]]]) -> None:
    """What was asked, what it took and what came of it; not what the texts say, nor a key."""
    web.embed(SECRET, "b", headers={"X-Request-Id": "r1", "Authorization": "Bearer s3cr3t"}, max_seq_length=4)
    (line,) = lines()
    assert {key: line[key] for key in line if not key.endswith("_ms")} == {
        "request_id": "r1", "method": "POST", "path": "/embed", "status": 200, "model": NAME, "task": "embed",
        "texts": 2, "tokens": 4 + 3, "truncated": 1, "cached": 0,
    }  # fmt: skip
    assert {"queue_ms", "compute_ms", "total_ms"} < set(line)
    assert "secret" not in str(line)
    assert "s3cr3t" not in str(line)


def test_every_dialect_leaves_one(web: Web, lines: Callable[[], list[dict[str, Any]]]) -> None:
    """The same fields, whatever API was asked."""
    web.post("/v1/embeddings", {"model": "m", "input": "a"})
    web.post("/tei/m/embed", {"inputs": ["a"]})
    web.post("/api/embed", {"model": "m", "input": "a"})
    web.post("/v2/embed", {"model": "m", "texts": ["a"]})
    assert [(line["model"], line["texts"], line["tokens"]) for line in lines()] == [(NAME, 1, 3)] * 4


def test_an_error_says_its_code(web: Web, lines: Callable[[], list[dict[str, Any]]]) -> None:
    """A refused request has the code, and the name it asked for, cut to a sane length."""
    web.embed(SECRET, model="x" * 1000)
    web.embed(SECRET, whatever=SECRET)
    unknown, refused = lines()
    assert (unknown["status"], unknown["code"], unknown["model"]) == (404, "model_not_found", "x" * 200)
    assert (refused["status"], refused["code"]) == (422, "unsupported_option")
    assert "secret" not in str(refused)


def test_probes_that_go_well_are_no_news(
    web: Web, lines: Callable[[], list[dict[str, Any]]], caplog: pytest.LogCaptureFixture
) -> None:
    """Health, readiness and metrics are asked every few seconds: at level debug unless something is wrong."""
    for path in ("/health", "/ready", "/ready/m", "/metrics"):
        web.get(path)
    assert {r.levelno for r in caplog.records} == {logging.DEBUG}
    assert len(lines()) == 4
    web.get("/ready/unknown")
    assert caplog.records[-1].levelno == logging.INFO
