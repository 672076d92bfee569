"""The Flask app: blueprints, the shape of errors, what happens before and after each request."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from flask import Flask, Response, request

from embedpool import bounds, tracing
from embedpool.config.keys import keys_file
from embedpool.config.settings import Settings
from embedpool.errors import EmbedpoolError
from embedpool.jobs.store import Store
from embedpool.pool.pool import Pool
from embedpool.pool.request import Result
from embedpool.reconcile import Reconciler
from embedpool.web import classify, cors, live, manage, native, observe, openapi, root, score, ui
from embedpool.web.access import Access
from embedpool.web.body import OWN_HOSTS
from embedpool.web.compat import IGNORED_HEADER, named
from embedpool.web.dialects import batches, cohere, contextual, ollama, openai, rerank, tei
from embedpool.web.error_response import Shape, error_response, native_shape
from embedpool.web.history import HISTORY, History
from embedpool.web.http_request import OWNER, HttpRequest, here
from embedpool.web.intake import INTAKE, LARGE_BYTES, Intake
from embedpool.web.metrics import Metrics
from embedpool.web.request_log import Recent, log_request, span_attributes

ACCESS = "embedpool.access"
MOST_TRUNCATED_NAMED = 500
ROUTES = (score, classify, openai, contextual, tei, cohere, ollama, rerank, batches)  # that compute, beside native
BEFORE_A_NAME = re.compile(r"(/+(?:models|ready|v1/+models|tei))/+([^/].*)", re.DOTALL)
SHAPES: dict[str, Shape] = {p: shape for one in ROUTES for p, shape in one.SHAPES.items()}


def shape_at(path: str) -> Shape:
    """The shape of an error at a path: that of the longest prefix a dialect claims, else our own."""
    prefix = max((p for p in SHAPES if path.startswith(p)), key=len, default="")
    return SHAPES.get(prefix, native_shape)


def report_truncation(response: Response, truncated: list[int]) -> None:
    """How many texts were cut and which: other APIs have no place for it in their answers."""
    named = ",".join(map(str, truncated[:MOST_TRUNCATED_NAMED]))
    response.headers["X-Embedpool-Truncated"] = str(len(truncated))
    response.headers["X-Embedpool-Truncated-Texts"] = named + ("" if len(truncated) <= MOST_TRUNCATED_NAMED else ",...")


def refusal(app: Flask, method: str, path: str, headers: Mapping[str, str]) -> tuple[int, bytes] | None:
    """The answer, status and body, to a request whose caller may not send it, by its head alone."""
    access: Access = app.extensions[ACCESS]
    if access.is_open:  # the loop itself asks, and every large body costs the question
        return None
    with app.test_request_context(
        method=method, headers=dict(headers), environ_overrides={"PATH_INFO": plain_path(path)}
    ):
        try:
            access.caller(here())
        except EmbedpoolError as error:
            response = app.finalize_request(app.handle_user_exception(error))
            body = response.get_data()
            response.close()
            return response.status_code, body
    return None


def plain_path(path: str) -> str:
    """Without doubled and trailing slashes, but for those of a model's name, which may have them."""
    found = BEFORE_A_NAME.match(path)
    before, name = found.groups() if found else (path, "")
    return "/".join(("", *filter(None, before.split("/")), *([name] if name else []))) or "/"


class _App(Flask):
    """No view of ours is async, which Flask would ask of each at every request."""

    def wsgi_app(self, environ: dict[str, Any], start_response: Any) -> Any:
        """A path with doubled or trailing slashes, as clients put it together, is the one that is meant."""
        path = environ.get("PATH_INFO", "")
        if "//" in path or path.endswith("/"):
            environ["PATH_INFO"] = plain_path(path)
        return super().wsgi_app(environ, start_response)

    def ensure_sync(self, func: Callable[..., Any]) -> Callable[..., Any]:
        return func


def _add_page(app: Flask, pool: Pool, reconciler: Reconciler, access: Access) -> Recent:
    """The page with its data; what it shows of requests is to be put into what is returned."""
    history, recent = History(pool), Recent()
    app.extensions[HISTORY] = history
    app.register_blueprint(ui.blueprint())
    app.register_blueprint(live.blueprint(pool, reconciler, history, recent, access))
    return recent


def create_app(pool: Pool, reconciler: Reconciler, settings: Settings, metrics: Metrics) -> Flask:
    """The WSGI app over a pool that `metrics` observes. Building it loads no model and starts no thread."""
    app = _App("embedpool", static_folder=None)
    app.request_class = HttpRequest
    app.url_map.strict_slashes = False
    access = app.extensions[ACCESS] = Access(settings.security, keys_file(settings))
    app.extensions[OWN_HOSTS] = manage.own_hosts(settings)
    app.register_blueprint(native.blueprint(pool, settings))
    for one in ROUTES:
        app.register_blueprint(one.blueprint(pool, settings))
    folder = settings.file(settings.paths.state_dir)
    app.extensions[batches.STORE] = Store(
        folder, settings.limits.max_files_bytes, most_requests=settings.limits.max_batch_requests
    )
    app.register_blueprint(observe.blueprint(pool, reconciler, metrics, access))
    app.register_blueprint(manage.blueprint(pool, reconciler, settings, access))
    app.register_blueprint(openapi.blueprint())
    app.register_blueprint(root.blueprint(has_page=settings.ui.enabled))
    recent = _add_page(app, pool, reconciler, access) if settings.ui.enabled else None
    app.register_error_handler(Exception, lambda error: error_response(error, here().shape or shape_at(request.path)))

    @app.before_request
    def begin() -> None:
        http = here()
        http.span, http.trace = tracing.begin_request(http.route, http.trace)
        if http.method != "OPTIONS":  # a browser's question whether it may ask, which has no key
            owner = http.environ.get(OWNER)
            http.caller = access.caller(http) if owner is None else access.owner(owner)
        http.max_answer_bytes = settings.limits.max_answer_bytes

    embedding = {"native", *(one.__name__.rpartition(".")[2] for one in ROUTES)}
    cors.allow(app, settings.server.cors_origins, embedding, lambda: access.is_open)

    intake = app.extensions[INTAKE] = Intake(settings.limits.max_bodies_bytes)

    @app.teardown_request
    def end(error: BaseException | None) -> None:
        held_bytes = here().held_bytes
        intake.give_back(held_bytes)
        if held_bytes > LARGE_BYTES:
            bounds.give_back_memory()

    @app.after_request
    def finish(response: Response) -> Response:
        http = here()
        response.headers["X-Request-Id"] = http.id
        if http.ignored:
            response.headers[IGNORED_HEADER] = named(http.ignored)
        if http.result is not None:
            _tell_of(http.result, http.cached, response)

        status = response.status_code  # a note that held the response, which holds it, would keep both for long

        def note() -> None:
            metrics.http_answer(http.route, status, http.error_code)
            metrics.ignored(http.route, len(http.ignored))
            log_request(http, status, recent)
            if http.span is not None:
                failed = status >= 500 or http.error_code == EmbedpoolError.code
                tracing.end_request(http.span, span_attributes(http, status), failed=failed)

        response.call_on_close(note)  # when the answer has left: nobody waits for the log
        return response

    return app


def _tell_of(result: Result, cached: int, response: Response) -> None:
    """In headers, as far as they are known when these are sent."""
    response.headers["X-Embedpool-Space"] = result.space
    if not response.is_streamed:
        response.headers["X-Embedpool-Cached"] = str(cached)
        if result.truncated:
            report_truncation(response, result.truncated)
