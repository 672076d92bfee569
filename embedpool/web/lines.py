"""A body of lines (NDJSON) becomes texts to embed, in chunks; each line is read when its turn comes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import IO, Any

import orjson

from embedpool.config.settings import Limits
from embedpool.errors import BadJson, EmbedpoolError, InvalidRequest
from embedpool.jobs.windows import in_windows
from embedpool.web.schemas import check_texts

CHUNK_TEXTS = 256
CHUNK_CHARS = 1 << 22
CHUNK_CHARS_OF_TOKENS = 1 << 16  # where each token has a vector in the answer
LONGEST_ID_CHARS = 1000
BYTES_PER_CHAR = 6  # at most, of a JSON string: \u0000


@dataclasses.dataclass(slots=True)
class Line:
    """A line and its answer: `error`, which it may have from the start, or `answer`: its vector, or outputs."""

    index: int
    id: str | int | float | None = None
    text: str = ""
    error: EmbedpoolError | None = None
    answer: dict[str, Any] = dataclasses.field(default_factory=dict)
    truncated: bool = False

    def encoded(self) -> bytes:
        """The line that answers it."""
        found: dict[str, Any] = {"index": self.index}
        if self.id is not None:
            found["id"] = self.id
        if self.error is not None:
            found["error"] = {"code": self.error.code, "message": self.error.message}
        else:
            found.update(self.answer, truncated=self.truncated)
        return orjson.dumps(found, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE)


def chunks(body: IO[bytes], limits: Limits, most_chars: int = CHUNK_CHARS) -> Iterator[list[Line]]:
    """The lines, some at a time: bounded in number and in characters."""
    return in_windows(_lines(body, limits), lambda line: len(line.text), most=CHUNK_TEXTS, most_size=most_chars)


def _lines(body: IO[bytes], limits: Limits) -> Iterator[Line]:
    """Those that are not blank, counted from 0."""
    longest = BYTES_PER_CHAR * limits.max_chars_per_text + (1 << 16)
    index = 0
    while raw := body.readline(longest):
        is_cut = len(raw) == longest and not raw.endswith(b"\n")
        while is_cut and (more := body.readline(longest)) and not more.endswith(b"\n"):
            pass
        if raw.strip():
            line = Line(index)
            try:
                _read(line, raw, limits, is_cut=is_cut)
            except EmbedpoolError as error:
                line.error = error
            yield line
            index += 1


def _read(line: Line, raw: bytes, limits: Limits, *, is_cut: bool) -> None:
    """Its id, then its text. Raises BadJson and InvalidRequest."""
    if is_cut:
        raise InvalidRequest("the line is too long")
    try:
        document = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise BadJson(f"the line is not JSON: {error}") from None
    if not isinstance(document, dict) or not {"text"} <= set(document) <= {"id", "text"}:
        raise InvalidRequest('a line must be an object of "text" and, if wanted, "id"')
    given = document.get("id")
    if not isinstance(given, str | int | float | None) or len(str(given)) > LONGEST_ID_CHARS:
        raise InvalidRequest(f"id must be a string or a number of at most {LONGEST_ID_CHARS} characters")
    line.id = given
    (line.text,) = check_texts([document["text"]], limits, "text")
