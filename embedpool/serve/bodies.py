"""waitress's parser and buffers, adapted: how requests are read, and where bodies lie until they are answered.

Beside connections.py, which serves what is read here, no file imports waitress.
"""

from __future__ import annotations

import contextlib
import logging
import math
import sys
import time
import uuid
from http import HTTPStatus
from typing import Any

import orjson
from typing_extensions import override
from waitress.buffers import OverflowableBuffer
from waitress.parser import HTTPRequestParser
from waitress.utilities import Error

from embedpool.errors import EmbedpoolError, Overloaded, StorageError, as_document

logger = logging.getLogger(__name__)

FILES_PATH = "/v1/files"
LINES_PATH, LINES_TYPE = "/embed", "application/x-ndjson"
SPOOLED_FROM_BYTES = 1 << 20  # of a body or an answer
LARGEST_READ_UNSEEN_BYTES = 1 << 16  # of a body; a larger one is read only once its head has been judged


def document(error: EmbedpoolError) -> bytes:
    """The body of an answer that the web ring has no part in."""
    return orjson.dumps(as_document(error, uuid.uuid4().hex))


class Spool(OverflowableBuffer):  # type: ignore[misc]
    """Buffers a body or an answer: a large one in a file, or on a full disk up to `most` bytes of it in memory."""

    overflow: int

    def __init__(self, most: int = sys.maxsize) -> None:
        super().__init__(SPOOLED_FROM_BYTES)
        self._most = most

    @override
    def _set_large_buffer(self) -> None:
        in_memory = self.buf.getfile()
        position = in_memory.tell()
        try:
            super()._set_large_buffer()
        except OSError:
            in_memory.seek(position)
            if self.overflow >= self._most:
                raise
            self.overflow = self._most


class Refused(Error):  # type: ignore[misc]
    """The answer to a request whose body is not read to its end."""

    def __init__(self, status: int, body: bytes, retry_after_s: float | None = None) -> None:
        super().__init__(body)
        self.code, self.reason = status, HTTPStatus(status).phrase
        self.headers = [("Retry-After", str(math.ceil(retry_after_s)))] if retry_after_s else []


class Parser(HTTPRequestParser):  # type: ignore[misc]
    """Parses a request, on the I/O thread.

    A body of lines, which is answered line by line, has a limit of its own. A large body is refused by its head if its
    sender has no right to send it, or if the large bodies of others leave no room for it.
    """

    adj: Any
    path = ""  # waitress logs it when a client leaves, and what is not HTTP has none
    _held_bytes = 0  # of what all large bodies may

    def __init__(self, adjustments: Any) -> None:
        super().__init__(adjustments)
        self.began_at = time.monotonic()

    @override
    def parse_header(self, header_plus: bytes) -> None:
        super().parse_header(header_plus)
        if self.body_rcv is not None:
            self.body_rcv.buf = Spool(self.adj.max_request_body_size + self.adj.recv_bytes)
        if (
            self.path.rstrip("/") == LINES_PATH
            and self.headers.get("CONTENT_TYPE", "").partition(";")[0].strip().lower() == LINES_TYPE
        ):
            self.adj = self.adj.for_lines
        elif self.path.rstrip("/") == FILES_PATH:
            self.adj = self.adj.for_files
        if (self.chunked or self.content_length > LARGEST_READ_UNSEEN_BYTES) and (
            refusal := self.adj.refusal(self.command, self.path, self.headers)
        ):
            self._refuse(Refused(*refusal))
        elif self.content_length < self.adj.max_request_body_size:  # else it is refused as too large
            self._hold(self.content_length)

    @override
    def received(self, data: bytes) -> int:
        """Take what belongs to this request. A disk without room for its body ends it with 507."""
        try:
            taken: int = super().received(data)
        except OSError as error:
            reason = StorageError(f"there is no room for the body: {error.strerror or error}")
            logger.warning("a request to %s is refused: %s", self.path, reason.message)
            self._let_go()
            self._refuse(Refused(reason.status, document(reason)))
            return len(data)
        if self.chunked and self.error is None:
            self._hold(self.body_bytes_received)
        return taken

    def _hold(self, size: int) -> None:
        """Count a body of this size, if it is large, or refuse it."""
        more = size - self._held_bytes
        if size <= SPOOLED_FROM_BYTES or more <= 0:
            return
        try:
            self._held_bytes += self.adj.spooled.take(more)
        except Overloaded as error:
            self._let_go()
            self._refuse(Refused(error.status, document(error), error.retry_after_s))

    def _refuse(self, reason: Refused) -> None:
        self.error = reason
        self.completed = self.connection_close = True
        self.expect_continue = False

    def _let_go(self) -> None:
        """Discard what was received of a body that is refused."""
        with contextlib.suppress(OSError):
            self.close()
        self.body_rcv = None

    @override
    def close(self) -> None:
        held, self._held_bytes = self._held_bytes, 0
        if held:
            self.adj.spooled.give_back(held)
        super().close()

    def __del__(self) -> None:
        if self._held_bytes:  # its connection was cut
            self.close()
