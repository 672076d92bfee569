"""The Flask app: blueprints, the error handler, request ids."""

from __future__ import annotations

import re
import uuid
from typing import TYPE_CHECKING

from flask import Flask, Request, Response, request

from embedpool.config.settings import Settings
from embedpool.pool.pool import Pool
from embedpool.web import manage, native, observe
from embedpool.web.dialects import cohere, ollama, openai, tei
from embedpool.web.error_response import error_response

if TYPE_CHECKING:
    from embedpool.reconcile import Reconciler

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
    for dialect in (openai, tei, cohere, ollama):
        app.register_blueprint(dialect.blueprint(pool, settings.limits))
    app.register_blueprint(observe.blueprint(pool, reconciler))
    app.register_blueprint(manage.blueprint(pool, reconciler, settings))
    app.register_error_handler(Exception, error_response)

    @app.after_request
    def add_request_id(response: Response) -> Response:
        response.headers["X-Request-Id"] = request.id  # type: ignore[attr-defined]
        return response

    return app
