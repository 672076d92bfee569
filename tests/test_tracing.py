"""Trace context is passed on; with OpenTelemetry there are spans."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind

from embedpool import tracing
from embedpool.errors import UpstreamError
from embedpool.pool.settings import PoolSettings
from embedpool.tracing import HOPS_HEADER, outgoing, trace_of
from tests.conftest import settle
from tests.test_client import Served
from tests.web.conftest import MODEL, Web, serving

ID = "0af7651916cd43dd8448eb211c80319c"
PARENT = f"00-{ID}-b7ad6b7169203331-01"
OTHER = f"00-{'1' * 32}-{'2' * 16}-01"


@pytest.mark.parametrize(
    ("headers", "trace"),
    [
        ({}, {}),
        ({"traceparent": PARENT}, {"traceparent": PARENT}),
        ({"traceparent": PARENT, "tracestate": "a=1"}, {"traceparent": PARENT, "tracestate": "a=1"}),
        ({"traceparent": PARENT, "tracestate": "x" * 513}, {"traceparent": PARENT}),
        ({"traceparent": PARENT, "tracestate": "a=ä"}, {"traceparent": PARENT}),
        ({"tracestate": "a=1"}, {}),
        ({"traceparent": PARENT.upper()}, {}),
        ({"traceparent": f"00-{'0' * 32}-b7ad6b7169203331-01"}, {}),
        ({"traceparent": f"00-{ID}-{'0' * 16}-01"}, {}),
        ({"traceparent": f"ff-{ID}-b7ad6b7169203331-01"}, {}),
        ({"traceparent": PARENT + "\r\nX: y"}, {}),
    ],
)
def test_only_a_sane_trace_is_taken(headers: dict[str, str], trace: dict[str, str]) -> None:
    """As W3C writes it; anything else is as good as none."""
    assert trace_of(headers) == trace


def test_a_batch_belongs_to_the_first_trace() -> None:
    """While it runs, and no longer."""
    with tracing.batch("batch", [{}, {"traceparent": PARENT}, {"traceparent": OTHER}], {}):
        assert outgoing() == {"traceparent": PARENT, HOPS_HEADER: "1"}
    assert outgoing() == {}
    with tracing.batch("batch", [{}, {}], {}, hops=2):
        assert outgoing() == {HOPS_HEADER: "3"}
    with tracing.batch("batch", [{}], {}, no_store=True):
        assert outgoing()["Cache-Control"] == "no-store"


@pytest.fixture
def web(tmp_path: Path, pool_settings: PoolSettings) -> Iterator[Web]:
    """One ready model, m."""
    with serving(tmp_path, pool_settings, MODEL) as web:
        settle(web.pool)
        yield web


@pytest.fixture
def remote(web: Web, tmp_path: Path, pool_settings: PoolSettings) -> Iterator[tuple[Web, list[dict[str, str]]]]:
    """A pool whose model is another pool's, and the headers that the other one is sent."""
    seen: list[dict[str, str]] = []

    def watched(environ: dict[str, Any], start_response: Any) -> Any:
        names = ("traceparent", "tracestate")
        seen.append({n: environ[f"HTTP_{n.upper()}"] for n in names if f"HTTP_{n.upper()}" in environ})
        return web.app(environ, start_response)

    server = Served(watched)
    config = f"{{base_url: '{server.url}/embed', remote_model: m}}"
    folder = tmp_path / "near"
    folder.mkdir()
    with serving(folder, pool_settings, f"model: r, driver: {{type: http, config: {config}}}") as near:
        settle(near.pool)
        yield near, seen
    server.close()


def test_a_remote_service_is_given_the_trace(remote: tuple[Web, list[dict[str, str]]]) -> None:
    """The headers a request brings reach the service that computes it; a request without any brings none."""
    web, seen = remote
    web.embed("a", model="r", headers={"traceparent": PARENT, "tracestate": "a=1"})
    assert seen[-1] == {"traceparent": PARENT, "tracestate": "a=1"}
    web.embed("b", model="r")
    assert seen[-1] == {}


@pytest.fixture
def spans() -> Iterator[InMemorySpanExporter]:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    yield_to = tracing.start(provider)
    yield exporter
    tracing.stop(yield_to)


def test_a_request_and_its_batch_are_spans(
    remote: tuple[Web, list[dict[str, str]]], spans: InMemorySpanExporter
) -> None:
    """One trace from the client's span over the request's and the batch's to the remote service."""
    web, seen = remote
    web.embed("a b", model="r", headers={"traceparent": PARENT})
    named: dict[str, list[ReadableSpan]] = {}
    for span in spans.get_finished_spans():
        if f"{span.context.trace_id:032x}" == ID:
            named.setdefault(span.name, []).append(span)
    request = next(s for s in named["POST /embed"] if f"{s.parent.span_id:016x}" == PARENT.split("-")[2])
    batch = next(s for s in named["batch"] if s.parent.span_id == request.context.span_id)
    assert request.kind is SpanKind.SERVER
    assert request.attributes["http.response.status_code"] == 200
    assert request.attributes["embedpool.model"] == "r"
    assert batch.attributes == {"embedpool.replica": "r#1", "embedpool.texts": 1}
    assert seen[-1]["traceparent"].split("-")[1:3] == [ID, f"{batch.context.span_id:016x}"]
    assert "a b" not in "".join(span.to_json() for span in spans.get_finished_spans())


def test_a_batch_of_several_requests_is_linked_to_all(spans: InMemorySpanExporter) -> None:
    """It has one parent and knows the others."""
    with tracing.batch("batch", [{"traceparent": PARENT}, {"traceparent": OTHER}], {}):
        pass
    (span,) = spans.get_finished_spans()
    assert f"{span.parent.trace_id:032x}" == ID
    assert [f"{link.context.trace_id:032x}" for link in span.links] == ["1" * 32]


def test_a_server_error_is_an_error_of_the_span(web: Web, spans: InMemorySpanExporter) -> None:
    """A client's fault is none."""
    web.embed("a", model="unknown")
    web.app.view_functions["observe.health"] = lambda: 1 / 0
    web.get("/health")
    status = {span.name: span.status.is_ok for span in spans.get_finished_spans()}
    assert status == {"POST /embed": True, "GET /health": False}


def test_a_server_that_is_its_own_remote_is_found_out(web: Web) -> None:
    """Each counts itself; a request that has come through too many is refused."""
    for hops, status in (("4", 200), ("5", 508), ("many", 200)):
        assert web.embed("a", headers={"X-Embedpool-Hops": hops}).status_code == status


def test_a_remote_service_is_told_how_far_a_request_has_come(
    remote: tuple[Web, list[dict[str, str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One more than it had come before."""
    near, _ = remote
    seen = []
    session = requests.Session.post

    def watched(self: Any, *arguments: Any, **named: Any) -> Any:
        seen.append(named["headers"]["X-Embedpool-Hops"])
        return session(self, *arguments, **named)

    monkeypatch.setattr(requests.Session, "post", watched)
    near.embed("a", model="r")
    near.embed("b", model="r", headers={"X-Embedpool-Hops": "3"})
    assert seen == ["1", "4"]


def test_a_spans_error_has_no_word_of_a_remote_service(spans: InMemorySpanExporter) -> None:
    """They may quote a caller's text."""
    with pytest.raises(UpstreamError), tracing.batch("batch", [{"traceparent": PARENT}], {}):
        raise UpstreamError("the remote service answered 422", said="cannot bear: my private text")
    (span,) = spans.get_finished_spans()
    assert not span.status.is_ok
    assert "answered 422" in span.to_json()
    assert "private" not in span.to_json()
