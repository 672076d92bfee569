"""The log's two formats."""

from __future__ import annotations

import io
import json
import logging

import pytest

from embedpool.logs import GATHERED_S, JsonFormatter, LogHandler, TextFormatter


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


@pytest.fixture
def handler() -> LogHandler:
    """Writes to a string; its clock, `handler.now`, stands."""
    made = LogHandler(io.StringIO(), clock=lambda: made.now)
    made.now = 100.0
    made.setFormatter(logging.Formatter("%(message)s"))
    return made


def said(handler: LogHandler, message: str, **more: object) -> list[str]:
    """What stands in the log after `message`."""
    handler.handle(logging.makeLogRecord({"msg": message, **more}))
    return handler.stream.getvalue().split()


def test_lines_of_requests_are_written_together(handler: LogHandler) -> None:
    """The first at once, the next when a tenth of a second has passed, in their order."""
    assert said(handler, "a", may_wait=True) == ["a"]
    assert said(handler, "b", may_wait=True) == ["a"]
    handler.now += GATHERED_S
    assert said(handler, "c", may_wait=True) == ["a", "b", "c"]


def test_any_other_line_is_written_at_once_and_in_its_place(handler: LogHandler) -> None:
    """After those that waited; `flush`, as when the program ends, writes these too."""
    said(handler, "a", may_wait=True)
    said(handler, "b", may_wait=True)
    assert said(handler, "c") == ["a", "b", "c"]
    said(handler, "d", may_wait=True)
    handler.flush()
    assert handler.stream.getvalue().split() == ["a", "b", "c", "d"]


def test_a_stream_that_takes_nothing_stops_nobody(handler: LogHandler) -> None:
    """A full disk, a closed pipe: the line is lost, the one who said it goes on, and the next is written again."""
    stream, handler.stream = handler.stream, open("/dev/full", "w")  # noqa: SIM115
    handler.handle(logging.makeLogRecord({"msg": "a"}))
    handler.flush()
    full, handler.stream = handler.stream, stream
    assert said(handler, "b") == ["b"]
    with pytest.raises(OSError, match="No space"):
        full.close()


def test_a_record_that_cannot_be_told_holds_nothing_up(handler: LogHandler, capsys) -> None:
    """Its fault is shown as logging shows it, what waited is written."""
    said(handler, "a", may_wait=True)
    said(handler, "b", may_wait=True)
    assert said(handler, "%d", args=("x",)) == ["a", "b"]
    assert "Logging error" in capsys.readouterr().err
