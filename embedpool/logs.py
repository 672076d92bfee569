"""The server's log: to standard error, as text or as one JSON object a line."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import re
import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

import orjson

from embedpool.config.settings import Settings

GATHERED_S = 0.1
PLAIN = re.compile(r"[\w./:@#<>+-]+\Z")  # written as it is; anything else in quotes


class TextFormatter(logging.Formatter):
    """A line a person reads; a record's `fields` follow as key=value."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  (its name there)
        """See logging.Formatter."""
        fields = getattr(record, "fields", {})
        return " ".join([super().formatMessage(record), *(f"{k}={_shown(v)}" for k, v in fields.items())])


class JsonFormatter(logging.Formatter):
    """An object a line: time, level, logger, message, the record's `fields`, and the traceback of an exception."""

    def format(self, record: logging.LogRecord) -> str:
        """See logging.Formatter."""
        at = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {
            "time": f"{at}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return _json(line)


def _json(value: Any) -> str:
    try:
        return orjson.dumps(value, default=str).decode()
    except TypeError:  # a lone surrogate, as of a file name that is no UTF-8
        return json.dumps(value, default=str)


def _shown(value: Any) -> str:
    text = str(value)
    return text if PLAIN.match(text) else _json(text)


class LogHandler(logging.StreamHandler[TextIO]):
    """Writes a line at once; but those of records that `may_wait`, as of requests, together, ten times a second.

    A write lets go of the GIL, which under load another thread then has. What has been gathered leaves before any other
    line, with the first one GATHERED_S after the last write, and at `flush`.
    """

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(stream)
        self._clock = clock
        self._lines: list[str] = []
        self._written_at = -math.inf

    def emit(self, record: logging.LogRecord) -> None:
        """See logging.Handler."""
        try:
            self._lines.append(self.format(record))
        except Exception:
            self.handleError(record)
        if not getattr(record, "may_wait", False) or self._clock() >= self._written_at + GATHERED_S:
            self.flush()

    def flush(self) -> None:
        """Write what has been gathered; a stream that takes nothing, as on a full disk, loses it."""
        self.acquire()
        try:
            lines, self._lines = self._lines, []
            with contextlib.suppress(OSError, ValueError):
                if lines:
                    self._written_at = self._clock()
                    self.stream.write("".join(f"{line}\n" for line in lines))
                super().flush()
        finally:
            self.release()


def flush_log() -> None:
    """Write what the root logger's handlers hold back."""
    for handler in logging.getLogger().handlers:
        handler.flush()


def configure_logging(settings: Settings) -> None:
    """To standard error, once."""
    handler = LogHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if settings.logging.format == "json" else TextFormatter())
    logging.basicConfig(level=settings.logging.level.upper(), handlers=[handler])
    logging.getLogger("embedpool.web.request_log").disabled = not settings.logging.requests
    logging.getLogger("waitress.queue").setLevel(logging.ERROR)  # admission is ours; its queue is only a hand-over
    logging.getLogger("sentence_transformers").setLevel(logging.ERROR)  # its deprecations are not the operator's
    logging.getLogger("httpx").setLevel(logging.WARNING)
    logging.getLogger("urllib3").setLevel(logging.ERROR)  # a remote's retries; what comes of them is answered
