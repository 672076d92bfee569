"""The log's two formats."""

from __future__ import annotations

import io
import json
import logging

import pytest

from embedpool.config.settings import Settings
from embedpool.logs import JsonFormatter, TextFormatter, configure_logging, to_stream


def record(**fields: object) -> logging.LogRecord:
    made = logging.LogRecord("embedpool.x", logging.WARNING, "x.py", 1, "hello %s", ("world",), None)
    made.created, made.msecs = 1.5, 500.0
    made.fields = fields
    return made


def test_text() -> None:
    """Fields follow the message; what has spaces or control characters is quoted, so that a line stays a line."""
    line = TextFormatter().format(record(status=200, path="/a b\nc", ms=0.5))
    assert line.endswith('WARNING embedpool.x: hello world status=200 path="/a b\\nc" ms=0.5')
    assert "\n" not in line


def test_json() -> None:
    """An object a line, with time, level and the fields."""
    assert json.loads(JsonFormatter().format(record(status=200, path="a\nb"))) == {
        "time": "1970-01-01T00:00:01.500Z", "level": "warning", "logger": "embedpool.x", "message": "hello world",
        "status": 200, "path": "a\nb",
    }  # fmt: skip


def test_an_exception_is_told_in_both() -> None:
    """With its traceback; in JSON still in one line."""
    told = record()
    with pytest.raises(ValueError, match="no") as caught:
        raise ValueError("no")
    told.exc_info = (caught.type, caught.value, caught.tb)
    assert "ValueError: no" in TextFormatter().format(told)
    line = JsonFormatter().format(told)
    assert "ValueError: no" in json.loads(line)["exception"]
    assert "\n" not in line


def test_a_name_that_is_no_unicode_is_no_reason_to_lose_a_line() -> None:
    """As a file's may be."""
    for formatter in (TextFormatter(), JsonFormatter()):
        assert "udcff" in formatter.format(record(path="\udcff x"))


def test_a_stream_that_is_missing_or_closed_is_no_error() -> None:
    """A server without standard error serves all the same; elsewhere records are written."""
    stream = io.StringIO()
    to_stream(stream).handle(record())
    assert stream.getvalue() == "hello world\n"
    stream.close()
    for nothing in (None, stream):
        to_stream(nothing).handle(record())


def test_no_library_silences_the_server() -> None:
    """Its loggers have the level of the settings, whatever a library does to that of all."""
    configure_logging(Settings())
    logging.getLogger().setLevel(logging.ERROR)
    assert logging.getLogger("embedpool.pool").isEnabledFor(logging.INFO)
