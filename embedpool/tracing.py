"""W3C trace context: embedpool passes a request's headers on to remote services. Spans, with the extra `otel`.

A request's trace is the pair of headers it came with or, where spans are made, those of its span. A batch belongs to
the trace of its first request and is linked to those of the others: a call has room for one `traceparent`.
"""

from __future__ import annotations

import contextlib
import contextvars
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from embedpool.errors import ConfigError, for_the_log

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span, Tracer

Trace = Mapping[str, str]  # traceparent and tracestate, or nothing

TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(?:-.*)?\Z")
LONGEST_TRACESTATE = 512
HOPS_HEADER = "X-Embedpool-Hops"
NO_STORE = {"Cache-Control": "no-store"}

_tracer: Tracer | None = None
_outgoing: contextvars.ContextVar[Trace] = contextvars.ContextVar("outgoing", default={})  # noqa: B039  (never changed)


class SupportsGet(Protocol):
    """Headers, however kept."""

    def get(self, name: str, default: str) -> str:
        """The value of a header."""


def trace_of(headers: SupportsGet) -> Trace:
    """The trace that HTTP headers bring; nothing if they bring none that is sane."""
    parent = headers.get("traceparent", "")
    if not TRACEPARENT.match(parent):
        return {}
    state = headers.get("tracestate", "")
    fits = 0 < len(state) <= LONGEST_TRACESTATE and state.isascii() and state.isprintable()
    return {"traceparent": parent, "tracestate": state} if fits else {"traceparent": parent}


def outgoing() -> Trace:
    """The headers for a remote call of the batch at hand."""
    return _outgoing.get()


@contextlib.contextmanager
def batch(
    name: str, traces: Sequence[Trace], attributes: Mapping[str, Any], *, hops: int = 0, no_store: bool = False
) -> Iterator[None]:
    """While a batch of these requests runs, the farthest of which has come over `hops` servers like this one.

    With `no_store` no other server is to keep what one of them asks for.
    """
    known = [trace for trace in traces if trace]
    first = known[0] if known else {}
    with _batch_span(name, known, attributes) if _tracer else contextlib.nullcontext(first) as trace:
        token = _outgoing.set({**trace, HOPS_HEADER: str(hops + 1), **(NO_STORE if no_store else {})})
        try:
            yield
        finally:
            _outgoing.reset(token)


# --- spans


def start(provider: TracerProvider | None = None) -> TracerProvider:
    """Make spans, exported as OpenTelemetry's own OTEL_… variables say. Raises ConfigError without the extra."""
    global _tracer  # noqa: PLW0603  (a process has one)
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        raise ConfigError("tracing.enabled needs the extra otel: pip install 'embedpool[otel]'") from None
    if provider is None:
        service = Resource({"service.name": "embedpool"}).merge(Resource.create())
        provider = TracerProvider(resource=service)
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    _tracer = provider.get_tracer("embedpool")
    return provider


def stop(provider: TracerProvider | None) -> None:
    """Make no more spans, and send those that wait."""
    global _tracer  # noqa: PLW0603
    _tracer = None
    if provider is not None:
        provider.shutdown()


def begin_request(name: str, trace: Trace) -> tuple[Span | None, Trace]:
    """The span of a request, if spans are made, and the trace that goes on from here."""
    if _tracer is None:
        return None, trace
    from opentelemetry.trace import SpanKind

    span = _tracer.start_span(name, _context(trace), SpanKind.SERVER)
    return span, _headers(span)


def end_request(span: Span, attributes: Mapping[str, Any], *, failed: bool) -> None:
    """It has been answered."""
    from opentelemetry.trace import Status, StatusCode

    span.set_attributes(attributes)
    if failed:
        span.set_status(Status(StatusCode.ERROR))
    span.end()


@contextlib.contextmanager
def _batch_span(name: str, traces: Sequence[Trace], attributes: Mapping[str, Any]) -> Iterator[Trace]:
    from opentelemetry.trace import Link, Status, StatusCode, get_current_span

    assert _tracer is not None
    parent = _context(traces[0] if traces else {})
    links = [Link(get_current_span(_context(trace)).get_span_context()) for trace in traces[1:]]
    with _tracer.start_as_current_span(
        name, parent, links=links, attributes=dict(attributes), record_exception=False, set_status_on_exception=False
    ) as span:
        try:
            yield _headers(span)
        except BaseException as error:  # whose words may quote a caller's text
            span.set_status(Status(StatusCode.ERROR, f"{type(error).__name__}: {for_the_log(error)}"))
            raise


def _context(trace: Trace) -> Any:
    from opentelemetry.context import Context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    return TraceContextTextMapPropagator().extract(dict(trace), Context())


def _headers(span: Span) -> Trace:
    from opentelemetry.trace import set_span_in_context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    found: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(found, set_span_in_context(span))
    return found
