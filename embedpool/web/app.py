"""The Flask app: blueprints, the one error handler, request ids."""

from __future__ import annotations

import logging
import math
import re
import uuid
from typing import TYPE_CHECKING

from flask import Flask, Request, Response, request
from werkzeug.exceptions import HTTPException

from embedpool.config.settings import Settings
from embedpool.errors import BadRequest, EmbedpoolError, MethodNotAllowed, NotFound, as_document
from embedpool.pool.pool import Pool
from embedpool.web import manage, native, observe
from embedpool.web.encoding import json_response

if TYPE_CHECKING:
    from embedpool.reconcile import Reconciler

logger = logging.getLogger(__name__)

REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}\Z")


class EmbedpoolRequest(Request):
    """A request with an id: the client's `X-Request-Id` if it is a sane one, else a new one."""

    @property
    def id(self) -> str:
        """The id in the answer's `X-Request-Id` header and in errors."""
        found: str | None = self.environ.get("embedpool.request_id")
        if found is None:
            given = self.headers.get("X-Request-Id", "")
            found = given if REQUEST_ID.match(given) else uuid.uuid4().hex
            self.environ["embedpool.request_id"] = found
        return found


def create_app(pool: Pool, reconciler: Reconciler, settings: Settings) -> Flask:
    """The WSGI app over a pool. Building it loads no model and starts no thread."""
    app = Flask("embedpool", static_folder=None)
    app.request_class = EmbedpoolRequest
    app.url_map.strict_slashes = False
    app.register_blueprint(native.blueprint(pool, settings.limits))
    app.register_blueprint(observe.blueprint(pool, reconciler))
    app.register_blueprint(manage.blueprint(pool, reconciler, settings))
    app.register_error_handler(Exception, error_response)

    @app.after_request
    def add_request_id(response: Response) -> Response:
        response.headers["X-Request-Id"] = request.id  # type: ignore[attr-defined]
        return response

    return app


def error_response(error: Exception) -> Response:
    """Any exception in the one shape of the contract."""
    known = as_embedpool_error(error)
    if known.status >= 500:
        logger.log(
            logging.ERROR if known.code == "internal_error" else logging.WARNING,
            "request %s: %s: %s",
            request.id,  # type: ignore[attr-defined]
            known.code,
            known.message,
            exc_info=error if known.code == "internal_error" else None,
        )
    response = json_response(as_document(known, request.id), known.status)  # type: ignore[attr-defined]
    if known.retry_after_s is not None:
        response.headers["Retry-After"] = str(math.ceil(known.retry_after_s))
    if isinstance(error, HTTPException):
        response.headers.extend({k: v for k, v in error.get_headers() if k == "Allow"})
    return response


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
