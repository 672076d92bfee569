"""POST /embed: the native endpoint, from body to vectors."""

from __future__ import annotations

import threading

from flask import Blueprint, Response

from embedpool.config.settings import Settings
from embedpool.errors import InvalidRequest
from embedpool.pool.pool import Pool
from embedpool.web import ndjson, submit
from embedpool.web.body import read_document
from embedpool.web.dialects import tei
from embedpool.web.encoding import NPY, NPZ, embed_response, npy_response
from embedpool.web.http_request import here
from embedpool.web.ndjson import NDJSON
from embedpool.web.schemas import EmbedSchema, check_texts, embed_options, load


def blueprint(pool: Pool, settings: Settings) -> Blueprint:
    """The routes that embed."""
    limits = settings.limits
    streams = threading.BoundedSemaphore(settings.defaults.max_streams)
    routes = Blueprint("native", __name__)

    @routes.post("/embed")
    def embed() -> Response:
        http = here()
        if http.mimetype == NDJSON:
            return ndjson.embed(pool, limits, streams)
        document = read_document(http, limits)
        if "inputs" in document and "texts" not in document:  # TEI's, at the root of its host
            return tei.embed_at_the_root(pool, settings, document)
        body = load(EmbedSchema, document)
        options = body["options"]
        texts = check_texts(body["texts"], limits)
        partial = options.get("on_error") == "partial"
        wants_npy = http.accept_mimetypes.best in (NPY, NPZ)
        if partial and wants_npy:
            message = "partial needs an answer in JSON: an array has no place for errors"
            raise InvalidRequest(f"options.on_error: {message}", fields={"options.on_error": message})
        precision, encoding = options.get("precision", "float32"), options.get("encoding", "float")
        form = precision if precision != "float32" else "npy" if wants_npy else encoding
        wanted = options.get("output") or submit.outputs_of(http, pool, body["model"])
        names = submit.names_of(http, pool, body["model"], wanted) if options.get("tokens") else None
        result = submit.embed(http, pool, body["model"], texts, embed_options(options), forms=[form], wanted=wanted)
        if wants_npy:
            return npy_response(result)
        return embed_response(result, encoding, options.get("dimensions"), names=names, partial=partial)

    return routes
