"""POST /embed with a body of lines (NDJSON): any number of texts, answered line by line, in bounded memory.

The WSGI server has spooled the body to a file by now. Its lines go to the pool in chunks (jobs/windows.py), which
together weigh as much as one request. A line that fails is answered with its error. What is wrong with the request as a
whole shows with the first chunk, before anything is answered, and gets the status of its own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import threading
import time
from collections.abc import Generator, Iterator, Mapping
from typing import Any

import orjson
from flask import Response
from marshmallow import fields, validate

from embedpool.config.settings import Limits
from embedpool.errors import (
    BodyTooLarge,
    ClientGone,
    EmbedpoolError,
    EmptyInput,
    ModelChanged,
    Overloaded,
    ShuttingDown,
    UnsupportedMediaType,
    UpstreamError,
    forget_frames,
)
from embedpool.jobs.windows import AT_ONCE, answered
from embedpool.pool.pool import Pool
from embedpool.pool.request import Result
from embedpool.tasks.embed import EmbedOptions
from embedpool.tasks.hybrid import task_for
from embedpool.web.encoding import answers_of
from embedpool.web.http_request import HttpRequest, here
from embedpool.web.lines import CHUNK_CHARS, CHUNK_CHARS_OF_TOKENS, Line, chunks
from embedpool.web.schemas import OptionsSchema, embed_options, load, timeout_s
from embedpool.web.submit import call_of, names_of, outputs_of

NDJSON = "application/x-ndjson"
ROOM_WAIT_S = 10.0
LOOK_EVERY_S = 1.0  # while waiting
BUSY_WAIT_S = 1.0  # where a busy pool names no time


class StreamSchema(OptionsSchema):
    """The query string of POST /embed with lines."""

    model = fields.String(required=True)
    order = fields.String(validate=validate.OneOf(("input", "done")), load_default="input")
    on_error = fields.String(validate=validate.Equal("partial"))


def embed(pool: Pool, limits: Limits, room: threading.BoundedSemaphore) -> Response:
    """The answer to the request at hand, whose first lines are computed. `room` bounds how many there are at once."""
    http = here()
    if http.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise UnsupportedMediaType("lines are read as they are: send them without a Content-Encoding")
    if (http.content_length or 0) > limits.max_stream_body_bytes:
        raise BodyTooLarge(f"the body has {http.content_length} bytes, the limit is {limits.max_stream_body_bytes}")
    query = load(StreamSchema, _typed(http.args))
    http.caller.require(pool, query["model"])
    stream = _Stream(pool, limits, http, query)
    if not room.acquire(blocking=False):
        raise Overloaded("as many requests of lines as may be are being answered", retry_after_s=ROOM_WAIT_S)
    with contextlib.ExitStack() as until_it_begins:
        until_it_begins.callback(room.release)
        until_it_begins.enter_context(http.caller.admitted())
        answers = until_it_begins.enter_context(contextlib.closing(stream.answers()))
        first = next(answers, b"")
        if not first:
            raise EmptyInput("the body has no line")
        until_it_ends = until_it_begins.pop_all()

    def rest() -> Iterator[bytes]:
        yield first
        yield from answers

    response = Response(rest(), mimetype=NDJSON)
    if http.result is not None:
        response.headers["X-Embedpool-Model"] = http.result.model
    response.call_on_close(until_it_ends.close)
    return response


def _typed(arguments: Mapping[str, str]) -> dict[str, Any]:
    """A query string's options, with true, false and numbers converted for options that are not strings."""
    found: dict[str, Any] = {}
    for name, text in arguments.items():
        found[name] = text
        field = StreamSchema._declared_fields.get(name)
        if field is not None and not isinstance(field, fields.String):
            try:
                found[name] = orjson.loads(text)
            except orjson.JSONDecodeError:
                continue  # the schema says what is wrong
    return found


@dataclasses.dataclass(frozen=True, slots=True)
class _Answer:
    """The lines that answer a chunk of so many texts; what the pool gave, if it was asked."""

    body: bytes
    texts: int
    result: Result | None


class _Stream:
    """One such request. `answers` runs in its thread; the chunks wait for the pool in threads of their own."""

    def __init__(self, pool: Pool, limits: Limits, http: HttpRequest, query: dict[str, Any]) -> None:
        self._pool = pool
        self._limits = limits
        self._http = http
        self._keeps_order = query.pop("order") == "input"
        self._encoding = query.pop("encoding")
        http.model = self._model = query.pop("model")
        self._options: EmbedOptions = embed_options({**query, "on_error": "partial"})
        self._wanted = query.get("output") or outputs_of(http, pool, self._model)
        self._names = names_of(http, pool, self._model, self._wanted) if query.get("tokens") else None
        task = task_for(self._wanted, (), self._options)
        http.task = task.name
        self._chunk_chars = CHUNK_CHARS_OF_TOKENS if task.of_tokens else CHUNK_CHARS
        self._timeout_s = min(timeout_s(http) or pool.request_timeout_s, pool.request_timeout_s)
        self._body = io.BufferedReader(http.stream)  # type: ignore[type-var]
        self._client_gone = http.client_gone
        self._over = threading.Event()  # nobody reads on
        self._has_begun = False
        self._space: str | None = None  # of the first answer

    def answers(self) -> Generator[bytes, None, None]:
        """The answers of a chunk at a time."""
        is_whole = False
        found = answered(
            chunks(self._body, self._limits, self._chunk_chars),
            self._answer,
            self._over,
            in_order=self._keeps_order,
            name="ndjson",
        )
        try:
            with contextlib.closing(found):
                for answer in found:
                    self._has_begun = True
                    self._http.texts += answer.texts
                    if answer.result is not None:
                        self._http.add(answer.result)
                    yield answer.body
            is_whole = True
        except ClientGone:
            if not self._has_begun:
                raise
        except Exception:
            self._http.error_code = EmbedpoolError.code
            raise
        finally:
            if self._has_begun and not is_whole:
                self._http.error_code = self._http.error_code or ClientGone.code

    def _answer(self, chunk: list[Line]) -> _Answer:
        asked = [line for line in chunk if line.error is None]
        result: Result | None = None
        try:
            result = self._ask(asked) if asked else None
        except EmbedpoolError as error:
            if not self._has_begun or self._over.is_set() or isinstance(error, ClientGone):
                raise
            forget_frames(error)
            for line in asked:
                line.error = error
        return _Answer(b"".join(line.encoded() for line in chunk), len(chunk), result)

    def _ask(self, lines: list[Line]) -> Result:
        """Give the lines their vectors, or the errors of their own. Raises what concerns them all."""
        result = self._result([line.text for line in lines])
        self._require_the_same_space(result.space)
        first = next(iter(result.errors.values()), None)
        is_down = isinstance(first, UpstreamError) and not first.inputs
        if first and is_down and not self._has_begun and len(result.errors) == len(lines):
            raise first  # a remote service that is down is no matter of single lines
        for i, (line, answer) in enumerate(
            zip(lines, answers_of(result.rows, self._encoding, self._names), strict=True)
        ):
            line.answer, line.error = answer, result.errors.get(i)
        for i in result.truncated:
            lines[i].truncated = True
        return result

    def _result(self, texts: list[str]) -> Result:
        """Once the answer has begun, retry while the pool is busy or loading, until the lines' deadline."""
        deadline = time.monotonic() + self._timeout_s
        while True:
            call = call_of(
                self._http,
                self._pool,
                within_s=max(deadline - time.monotonic(), 0.001),
                share=1 / AT_ONCE,
                client_gone=self._is_over,
                is_patient=self._has_begun,
            )
            try:
                self._http.caller.spend(len(texts))
                return self._pool.submit(self._model, task_for(self._wanted, texts, self._options), call)
            except EmbedpoolError as error:
                wait_s = error.retry_after_s or BUSY_WAIT_S
                is_busy = error.status in (429, 503) and not isinstance(error, ShuttingDown)
                if not (self._has_begun and is_busy) or time.monotonic() + wait_s >= deadline:
                    raise
                if not self._wait(wait_s):
                    raise

    def _wait(self, seconds: float) -> bool:
        """Whether it is worth asking again after that time."""
        until = time.monotonic() + seconds
        while (left_s := until - time.monotonic()) > 0:
            if self._over.wait(min(left_s, LOOK_EVERY_S)) or self._client_gone() or self._pool.stopping:
                return False
        return True

    def _require_the_same_space(self, space: str) -> None:
        """Vectors of two models in one answer could not be told apart. Raises ModelChanged."""
        if self._space is None:
            self._space = space
        if space != self._space:
            raise ModelChanged(f"{self._model!r} has become another model; ask again for the lines from here on")

    def _is_over(self) -> bool:
        return self._over.is_set() or self._client_gone()
