"""The Flask app: blueprints, the error handler, request ids."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flask import Flask, Response

from embedpool.config.settings import Settings
from embedpool.pool.pool import Pool
from embedpool.web import manage, native, observe
from embedpool.web.dialects import cohere, ollama, openai, tei
from embedpool.web.error_response import error_response
from embedpool.web.http_request import HttpRequest, here
from embedpool.web.metrics import Metrics
from embedpool.web.request_log import log_request

if TYPE_CHECKING:
    from embedpool.reconcile import Reconciler


def create_app(pool: Pool, reconciler: Reconciler, settings: Settings, metrics: Metrics) -> Flask:
    """The WSGI app over a pool that `metrics` observes. Building it loads no model and starts no thread."""
    app = Flask("embedpool", static_folder=None)
    app.request_class = HttpRequest
    app.url_map.strict_slashes = False
    app.register_blueprint(native.blueprint(pool, settings.limits))
    for dialect in (openai, tei, cohere, ollama):
        app.register_blueprint(dialect.blueprint(pool, settings.limits))
    app.register_blueprint(observe.blueprint(pool, reconciler, metrics))
    app.register_blueprint(manage.blueprint(pool, reconciler, settings))
    app.register_error_handler(Exception, error_response)

    @app.after_request
    def finish(response: Response) -> Response:
        request = here()
        response.headers["X-Request-Id"] = request.id

        def note() -> None:
            metrics.http_requests.labels(request.route, response.status_code, request.error_code).inc()
            log_request(request, response)

        if response.is_streamed:
            response.call_on_close(note)
        else:
            note()
        return response

    return app
