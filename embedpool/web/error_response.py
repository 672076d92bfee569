"""Any exception → the answer it gets. Log line and headers are decided here; a dialect only shapes the body."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

from flask import Response, request
from werkzeug.exceptions import HTTPException

from embedpool.errors import (
    FAILED_INPUTS_HEADER,
    BadRequest,
    EmbedpoolError,
    MethodNotAllowed,
    NotFound,
    as_document,
    forget_frames,
)
from embedpool.web.encoding import json_response
from embedpool.web.http_request import here

logger = logging.getLogger(__name__)

Shape = Callable[[EmbedpoolError, str], tuple[dict[str, Any], int]]  # error, request id → body, status


def native_shape(error: EmbedpoolError, request_id: str) -> tuple[dict[str, Any], int]:
    """The contract's own."""
    return as_document(error, request_id), error.status


def error_response(error: Exception, shape: Shape = native_shape) -> Response:
    """The answer to any exception."""
    http = here()
    known = in_its_words(as_embedpool_error(error), http.words)
    http.error_code = known.code
    if known.status >= 500:
        logger.log(
            logging.ERROR if known.code == "internal_error" else logging.WARNING,
            "request %s: %s: %s",
            http.id,
            known.code,
            known.for_the_log,
            exc_info=error if known.code == "internal_error" else None,
        )
    response = json_response(*shape(known, http.id))
    if known.retry_after_s is not None:
        response.headers["Retry-After"] = str(math.ceil(known.retry_after_s))
    if not known.retry_helps or known.inputs:
        response.headers["x-should-retry"] = "false"  # OpenAI's clients ask for it
    if known.inputs:
        response.headers[FAILED_INPUTS_HEADER] = ",".join(map(str, known.inputs))
    if isinstance(error, HTTPException):
        response.headers.extend({k: v for k, v in error.get_headers() if k == "Allow"})
    forget_frames(error)
    return response


def in_its_words(error: EmbedpoolError, words: Mapping[str, str]) -> EmbedpoolError:
    """The error with the paths that it names in the words of the request: `input[0]` for `texts[0]`."""
    renamed = {path: _renamed(path, words) for path in error.fields}
    if all(path == word for path, word in renamed.items()):
        return error
    found = copy.copy(error)
    for path, word in renamed.items():
        found.message = found.message.replace(path, word)
    found.fields = {renamed[path]: says for path, says in error.fields.items()}
    return found


def _renamed(path: str, words: Mapping[str, str]) -> str:
    for ours, theirs in words.items():
        if path == ours or path.startswith(f"{ours}["):
            return theirs + path.removeprefix(ours)
    return path


def as_embedpool_error(error: Exception) -> EmbedpoolError:
    """The error itself, or what stands for it in the contract; nothing of an unexpected one leaks out."""
    if isinstance(error, EmbedpoolError):
        return error
    if isinstance(error, HTTPException):
        if error.code == 404:
            return NotFound(f"nothing at {request.path}")
        if error.code == 405:
            return MethodNotAllowed(f"{request.method} is not for {request.path}")
        if error.code is not None and error.code < 500:
            return BadRequest(error.description or error.name)
    return EmbedpoolError("an unexpected error; the server's log has it under this request id")
