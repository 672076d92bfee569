"""POST /embed: the native endpoint, from body to vectors."""

from __future__ import annotations

from flask import Blueprint, Request, Response, request

from embedpool.config.settings import Limits
from embedpool.errors import InvalidRequest
from embedpool.pool.pool import Pool
from embedpool.pool.request import EmbedOptions, EmbedRequest, EmbedResult
from embedpool.web.encoding import NPY, embed_response, npy_response
from embedpool.web.http_request import here
from embedpool.web.schemas import EmbedSchema, check_texts, embed_options, read_json

TIMEOUT_HEADER = "X-Request-Timeout-Ms"
LONGEST_TIMEOUT_DIGITS = 12


def blueprint(pool: Pool, limits: Limits) -> Blueprint:
    """The routes that embed."""
    routes = Blueprint("native", __name__)

    @routes.post("/embed")
    def embed() -> Response:
        body = read_json(request, EmbedSchema, limits)
        options = body["options"]
        texts = check_texts(body["texts"], limits)
        result = submit(pool, body["model"], texts, embed_options(options))
        if request.accept_mimetypes.best == NPY:
            return npy_response(result)
        return embed_response(result, options.get("encoding", "float"))

    return routes


def submit(pool: Pool, model: str, texts: list[str], options: EmbedOptions) -> EmbedResult:
    """What every dialect asks of the pool: the texts' vectors, within the client's deadline and while it listens."""
    http = here()
    http.model, http.texts = model, len(texts)
    client_gone = http.environ.get("waitress.client_disconnected", _never)
    http.result = pool.submit(EmbedRequest(model, texts, options, timeout_s(http), client_gone=client_gone))
    return http.result


def timeout_s(of: Request) -> float | None:
    """The deadline the client asks for, in seconds. Raises InvalidRequest."""
    given = of.headers.get(TIMEOUT_HEADER)
    if given is None:
        return None
    if not given.isascii() or not given.isdigit() or len(given) > LONGEST_TIMEOUT_DIGITS or int(given) == 0:
        says = f"must be a positive whole number of milliseconds, of at most {LONGEST_TIMEOUT_DIGITS} digits"
        raise InvalidRequest(f"{TIMEOUT_HEADER}: {says}", fields={TIMEOUT_HEADER: says})
    return int(given) / 1000


def _never() -> bool:
    return False
