"""The log's two formats."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import sys
import threading

import pytest

from embedpool.logs import JsonFormatter, TextFormatter, to_stream


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


def test_every_line_arrives_whole_and_in_order() -> None:
    """However long it is, and however slowly they are read."""
    lines = [f"{i} {'é' * (i * 7 % 9000)}" for i in range(300)]
    reader, end = os.pipe()
    with open(reader, encoding="utf-8") as read, open(end, "w", encoding="utf-8") as stream:
        handler = to_stream(stream)
        assert isinstance(handler, logging.StreamHandler)
        assert handler.stream is not stream  # but what writes to it quickly

        def write() -> None:
            for line in lines:
                handler.handle(logging.LogRecord("x", logging.INFO, "x.py", 1, line, (), None))
            stream.close()

        writing = threading.Thread(target=write)
        writing.start()
        assert read.read().splitlines() == lines
        writing.join()


def test_lines_stay_whole_and_in_order_when_a_stream_is_full_for_a_while() -> None:
    """What it has no room for is owed, and comes before what is written later."""
    lines = [letter * 1000 for letter in "abcdefgh"]
    reader, end = os.pipe()
    os.set_blocking(end, False)
    os.set_blocking(reader, False)
    with open(reader, "rb", buffering=0) as read, open(end, "w", encoding="utf-8") as stream:
        handler = to_stream(stream)
        full = 0
        with contextlib.suppress(BlockingIOError):
            while True:
                full += os.write(end, b"x")
        read.read(4096)  # a page: room for four lines and a bit
        for line in lines:
            with contextlib.suppress(BlockingIOError):
                handler.stream.write(line + "\n")
                handler.stream.flush()
            if line == lines[5]:
                read.read(full - 4096)
        stream.flush()
        assert (read.read(full) or b"").lstrip(b"x").decode().splitlines() == lines


class Tee:
    """As something puts it in the place of standard error: it resembles the file, but has its own idea of writing."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def __getattr__(self, name: str) -> object:
        return getattr(sys.__stderr__, name)

    def write(self, line: str) -> None:
        self.lines.append(line)


def test_a_stream_that_is_no_file_has_lines_too() -> None:
    """Nor is it an error if there is none, or none any more."""
    stream, tee = io.StringIO(), Tee()
    for target in (stream, tee):
        to_stream(target).handle(record())
    assert stream.getvalue() == "hello world\n"
    assert tee.lines == ["hello world\n"]
    with open(os.devnull, "w", encoding="utf-8") as closed:
        pass
    for nothing in (None, closed):
        to_stream(nothing).handle(record())
