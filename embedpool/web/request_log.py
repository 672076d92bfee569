"""The request log: one line a request with its cost and outcome, never a text or a key."""

from __future__ import annotations

import collections
import logging
import threading
import time
from typing import Any

from embedpool.errors import LONGEST_NAME
from embedpool.web.http_request import HttpRequest

logger = logging.getLogger(__name__)

OF_THE_PAGE = ("GET /live", "GET /log", "GET /ui", "GET /ui/<path:file>")
PROBES = ("GET /health", "GET /ready", "GET /ready/<path:name>", "GET /metrics", "GET /tei/<path:name>", *OF_THE_PAGE)
KEPT = 500


class Recent:
    """The last requests, for whoever may manage; `number` counts all. Its lock is held for a few instructions."""

    def __init__(self) -> None:
        self.number = 0
        self._lock = threading.Lock()
        self._kept: collections.deque[dict[str, Any]] = collections.deque(maxlen=KEPT)

    def add(self, fields: dict[str, Any]) -> None:
        """On any thread."""
        with self._lock:  # a reader that has seen a number has seen those before it
            self.number += 1
            self._kept.append({"number": self.number, "at": round(time.time(), 3), **fields})

    def after(self, number: int) -> list[dict[str, Any]]:
        """Those that are kept of the ones after this."""
        with self._lock:
            kept = list(self._kept)
        return [fields for fields in kept if fields["number"] > number]


def log_request(request: HttpRequest, status: int, recent: Recent | None = None) -> None:
    """At level info; probes that went well at level debug, since they come every few seconds."""
    is_probe = request.route in PROBES and status < 400
    level = logging.DEBUG if is_probe else logging.INFO
    is_shown, is_logged = recent is not None and not is_probe, logger.isEnabledFor(level)
    found = _fields(request, status) if is_shown or is_logged else {}
    if recent is not None and is_shown:
        recent.add(found)
    if is_logged:
        fields = {"fields": found}
        # As logger.log does, but without looking up the caller, which is always this line.
        logger.handle(logger.makeRecord(logger.name, level, __file__, 0, "request", (), None, extra=fields))


def span_attributes(request: HttpRequest, status: int) -> dict[str, Any]:
    """The same for a span, in OpenTelemetry's names where it has some."""
    named = {"method": "http.request.method", "path": "url.path", "status": "http.response.status_code"}
    return {named.get(name, f"embedpool.{name}"): value for name, value in _fields(request, status).items()}


def _fields(request: HttpRequest, status: int) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "request_id": request.id,
        "method": request.method,
        "path": request.path[:LONGEST_NAME],
        "status": status,
    }
    if request.caller.key is not None:
        fields["key"] = request.caller.key.id
    if request.error_code:
        fields["code"] = request.error_code
    if request.model is not None:
        fields.update(model=request.model[:LONGEST_NAME], task=request.task, texts=request.texts)
    if request.result is not None:
        fields.update(
            model=request.result.model,
            tokens=request.tokens,
            truncated=request.truncated,
            cached=request.cached,
            queue_ms=round(request.queue_ms, 1),
            compute_ms=round(request.compute_ms, 1),
        )
    fields["total_ms"] = round(1000 * (time.perf_counter() - request.began_at), 1)
    return fields
