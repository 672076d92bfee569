"""The server's log: to standard error, as text or as one JSON object a line."""

from __future__ import annotations

import json
import logging
import re
import sys
import time
from typing import Any, TextIO

import orjson
from typing_extensions import override

from embedpool.config.settings import Settings

HANDLER = "embedpool"
PLAIN = re.compile(r"[\w./:@#<>+-]+\Z")  # written as it is; anything else in quotes


class TextFormatter(logging.Formatter):
    """A line a person reads; a record's `fields` follow as key=value."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    @override
    def formatMessage(self, record: logging.LogRecord) -> str:
        fields = getattr(record, "fields", {})
        return " ".join([super().formatMessage(record), *[f"{k}={_shown(v)}" for k, v in fields.items()]])


class JsonFormatter(logging.Formatter):
    """An object a line: time, level, logger, message, the record's `fields`, and the traceback of an exception."""

    @override
    def format(self, record: logging.LogRecord) -> str:
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
    return text if isinstance(value, int | float) or PLAIN.match(text) else _json(text)


def to_stream(stream: TextIO | None) -> logging.Handler:
    """A handler that writes records to the stream; a handler that drops them if the stream is missing or closed."""
    if stream is None or getattr(stream, "closed", False):
        return logging.NullHandler()
    return logging.StreamHandler(stream)


def configure_logging(settings: Settings) -> None:
    """To standard error; a second call changes level and format."""
    handler = to_stream(sys.stderr)
    handler.setFormatter(JsonFormatter() if settings.logging.format == "json" else TextFormatter())
    handler.set_name(HANDLER)
    root = logging.getLogger()
    ours = [each for each in root.handlers if each.name == HANDLER]
    if ours or not root.handlers:  # else somebody who embeds this server logs in a way of his own
        for each in ours:
            root.removeHandler(each)
        root.addHandler(handler)
    for logger in (root, logging.getLogger("embedpool")):  # libraries change that of the root
        logger.setLevel(settings.logging.level.upper())
    logging.getLogger("embedpool.web.request_log").disabled = not settings.logging.requests
    logging.getLogger("waitress.queue").setLevel(logging.ERROR)  # admission is ours; its queue is only a hand-over
    logging.getLogger("sentence_transformers").setLevel(logging.ERROR)  # its deprecations are not the operator's
    logging.getLogger("httpx").setLevel(logging.WARNING)
    logging.getLogger("urllib3").setLevel(logging.ERROR)  # a remote's retries; what comes of them is answered
