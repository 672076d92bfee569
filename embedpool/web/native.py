"""POST /embed: the native endpoint, from body to vectors."""

from __future__ import annotations

import threading

from flask import Blueprint, Response

from embedpool.config.settings import Limits
from embedpool.errors import InvalidRequest
from embedpool.pool.pool import Pool
from embedpool.pool.request import EmbedOptions, EmbedRequest, EmbedResult
from embedpool.web import ndjson
from embedpool.web.encoding import NPY, embed_response, npy_response
from embedpool.web.http_request import here
from embedpool.web.ndjson import NDJSON
from embedpool.web.schemas import EmbedSchema, check_texts, embed_options, read_json, timeout_s


def blueprint(pool: Pool, limits: Limits, max_streams: int) -> Blueprint:
    """The routes that embed."""
    streams = threading.BoundedSemaphore(max_streams)
    routes = Blueprint("native", __name__)

    @routes.post("/embed")
    def embed() -> Response:
        http = here()
        if http.mimetype == NDJSON:
            return ndjson.embed(pool, limits, streams)
        body = read_json(http, EmbedSchema, limits)
        options = body["options"]
        texts = check_texts(body["texts"], limits)
        partial = options.get("on_error") == "partial"
        wants_npy = http.accept_mimetypes.best == NPY
        if partial and wants_npy:
            message = "partial needs an answer in JSON: an array has no place for errors"
            raise InvalidRequest(f"options.on_error: {message}", fields={"options.on_error": message})
        result = submit(pool, body["model"], texts, embed_options(options))
        if wants_npy:
            return npy_response(result)
        return embed_response(result, options.get("encoding", "float"), partial=partial)

    return routes


def submit(pool: Pool, model: str, texts: list[str], options: EmbedOptions) -> EmbedResult:
    """What every dialect asks of the pool: the texts' vectors, within the client's deadline and while it listens."""
    http = here()
    http.model, http.texts = model, len(texts)
    http.caller.require(pool, model)
    asked = EmbedRequest(
        model,
        texts,
        options,
        timeout_s(http),
        weight=http.caller.weight,
        client_gone=http.client_gone,
        hops=http.hops,
        trace=http.trace,
    )
    with http.caller.admitted():
        http.caller.spend(len(texts))
        result = pool.submit(asked)
    http.add(result)
    return result
