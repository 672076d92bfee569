"""A request from Flask, with its id and its outcome, for the log and the metrics."""

from __future__ import annotations

import math
import random
import re
import time
from typing import Any

from flask import Request, request

from embedpool import tracing
from embedpool.errors import LoopDetected
from embedpool.pool.request import Result
from embedpool.web.access import NOBODY

MOST_HOPS = 4
BEGAN_AT = "embedpool.began_at"  # see serve/connections.py
OWNER = "embedpool.owner"  # of a line of a batch, which no header can say
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}\Z")


def environ_key(header: str) -> str:
    """What WSGI calls a header: on the hot path it is looked up there, since `headers` is slow."""
    return f"HTTP_{header.upper().replace('-', '_')}"


TRACEPARENT, REQUEST_ID_GIVEN, HOPS, CACHE_CONTROL = map(
    environ_key, ("traceparent", "X-Request-Id", tracing.HOPS_HEADER, "Cache-Control")
)


class HttpRequest(Request):
    """`model`, `task` and `texts` are what it asks for, `result` what it got last, `error_code` why it was refused.

    `tokens`, `truncated`, `cached`, `queue_ms` and `compute_ms` are sums over all it got.
    """

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.began_at = time.perf_counter()
        self.model: str | None = None
        self.task = "embed"
        self.texts = 0
        self.max_answer_bytes: float = math.inf
        self.held_bytes = 0  # of its body, see intake.py
        self.result: Result | None = None
        self.tokens = self.truncated = self.cached = 0
        self.queue_ms = self.compute_ms = 0.0
        self.error_code = ""
        self.shape: Any = None  # of an error, where the path does not tell it
        self.ignored: list[str] = []  # fields of its body
        self.words: dict[str, str] = {}  # its own for paths of POST /embed, such as input for texts
        self.trace = tracing.trace_of(self.headers) if TRACEPARENT in self.environ else {}
        self.span: Any = None
        self.caller = NOBODY
        given = self.environ.get(REQUEST_ID_GIVEN, "")
        self.id = given if REQUEST_ID.match(given) else f"{random.getrandbits(128):032x}"  # no secret

    def add(self, result: Result) -> None:
        """It got this; of lines, this part."""
        if self.result is None:
            self.queue_ms = result.queue_ms
        self.result = result
        self.tokens += result.tokens
        self.truncated += len(result.truncated)
        self.cached += result.cached
        self.compute_ms += result.compute_ms

    @property
    def age_s(self) -> float:
        """Seconds since its first byte came, as far as the server tells."""
        now = time.monotonic()
        return now - float(self.environ.get(BEGAN_AT, now))

    @property
    def says_of_caches(self) -> frozenset[str]:
        """What the caller says of caches, in small letters."""
        told = self.environ.get(CACHE_CONTROL)
        return frozenset(word.strip() for word in told.lower().split(",")) if told else frozenset()

    @property
    def hops(self) -> int:
        """Servers of this kind that the request has come through. Raises LoopDetected beyond a sane number."""
        told = self.environ.get(HOPS, "")
        hops = int(told) if told.isascii() and told.isdigit() and len(told) < 4 else 0
        if hops > MOST_HOPS:
            raise LoopDetected(
                f"the request has come through {hops} servers: is a remote model's base_url this server?"
            )
        return hops

    @property
    def route(self) -> str:
        """Method and rule, of which there are few; "unknown" for paths and methods that are none."""
        return f"{self.method} {self.url_rule.rule}" if self.url_rule else "unknown"

    def client_gone(self) -> bool:
        """Whether nobody waits for the answer any more. From any thread."""
        ask = self.environ.get("waitress.client_disconnected")
        return bool(ask and ask())


def here() -> HttpRequest:
    """The request at hand; itself, not Flask's stand-in, so that it outlives the view."""
    return request._get_current_object()  # type: ignore[attr-defined,no-any-return]
