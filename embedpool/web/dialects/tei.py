"""text-embeddings-inference: the base URL /tei/<model or alias> stands for one such server."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from flask import Blueprint, Response, request
from marshmallow import fields, validate

from embedpool import __version__
from embedpool.config.fields import StrictBoolean, StrictInteger, StrictSchema
from embedpool.config.settings import Limits
from embedpool.config.spec import HttpConfig
from embedpool.errors import EmbedpoolError, EmptyInput, MethodNotAllowed, ModelFailed
from embedpool.pool.pool import Pool
from embedpool.pool.request import EmbedResult
from embedpool.web.dialects import means, openai, options_of
from embedpool.web.encoding import json_response
from embedpool.web.error_response import error_response
from embedpool.web.native import submit
from embedpool.web.schemas import check_texts, embed_options, read_json


class TeiParameters(StrictSchema):
    """What /embed takes beside its inputs, and /similarity under `parameters`."""

    truncate = StrictBoolean(metadata={"also": ("truncate",)})
    truncation_direction = fields.String(
        load_default="Right",
        validate=validate.OneOf(("Left", "Right", "left", "right")),
        metadata={"also": ("truncate",)},
    )
    prompt_name = fields.String(metadata=means("prompt_name"))
    normalize = StrictBoolean(load_default=True, metadata=means("normalize"))
    dimensions = StrictInteger(validate=validate.Range(min=1), metadata=means("dimensions"))


class TeiSchema(TeiParameters):
    """Body of POST /tei/<model> and of its /embed."""

    inputs = fields.Raw(required=True)


class SentencesSchema(StrictSchema):
    """`inputs` of /similarity."""

    source_sentence = fields.String(required=True)
    sentences = fields.Raw(required=True)


class SimilaritySchema(StrictSchema):
    """Body of /similarity."""

    inputs = fields.Nested(SentencesSchema, required=True)
    parameters = fields.Nested(TeiParameters, load_default=lambda: {"truncation_direction": "Right"})


def blueprint(pool: Pool, limits: Limits) -> Blueprint:
    """POST to the base URL, to its /embed, /similarity and /v1/embeddings; GET its /info and /health."""
    routes = Blueprint("tei", __name__)
    routes.register_error_handler(Exception, lambda error: error_response(error, tei_shape))

    def options(name: str, body: dict[str, Any]) -> dict[str, Any]:
        """A long text is an error unless the client lets it be cut; a remote service is left to its own default."""
        found = options_of(TeiSchema, body)
        if body.get("truncate"):
            found["truncate"] = body["truncation_direction"].lower()
        elif "truncate" in body or not isinstance(pool.find(name).spec.driver.config, HttpConfig):
            found["truncate"] = "error"
        return found

    def embed(name: str) -> Response:
        body = read_json(request, TeiSchema, limits)
        given = body["inputs"]
        texts = check_texts([given] if isinstance(given, str) else given, limits, "inputs")
        result = submit(pool, request, name, texts, embed_options(options(name, body)))
        return _timed(json_response(result.vectors), result)

    def similarity(name: str) -> Response:
        body = read_json(request, SimilaritySchema, limits)
        texts = check_texts(body["inputs"]["sentences"], limits, "inputs.sentences")
        asked = {**options(name, body["parameters"]), "normalize": True, "dtype": "float32"}
        texts = [body["inputs"]["source_sentence"], *texts]
        result = submit(pool, request, name, texts, embed_options(asked))
        return _timed(json_response(np.ascontiguousarray(result.vectors[1:] @ result.vectors[0])), result)

    def info(name: str) -> Response:
        served = pool.find(name)
        meter = served.replicas.meter()
        limit = getattr(served.spec.driver.config, "max_seq_length", None) or meter.default_max_tokens
        runs_on: Any = served.replicas.counts()["runs_on"]
        return json_response(
            {
                "model_id": served.spec.model,
                "model_sha": None,
                "model_dtype": runs_on.get("compute_dtype"),
                "model_type": {"embedding": {}},
                "max_concurrent_requests": pool.max_inflight_global,
                "max_input_length": limit,
                "max_client_batch_size": limits.max_texts_per_request,
                "auto_truncate": False,
                "version": __version__,
            }
        )

    def health(name: str) -> Response:
        served = pool.find(name)
        if not served.is_serving or pool.draining:
            raise ModelFailed(f"{served.spec.model!r} is {served.state}")
        return Response()

    posts: dict[str, Callable[[str], Response]] = {
        "": embed,
        "embed": embed,
        "similarity": similarity,
        "v1/embeddings": lambda name: openai.embed(pool, limits, name),
    }
    gets: dict[str, Callable[[str], Response]] = {"info": info, "health": health}

    @routes.post("/tei/<path:name>")
    def post(name: str) -> Response:
        name, action = _target(pool, name, posts)
        return posts[action](name)

    @routes.get("/tei/<path:name>")
    def get(name: str) -> Response:
        name, action = _target(pool, name, gets)
        if not action:
            raise MethodNotAllowed(f"GET is for {' and '.join(gets)} below /tei/<model>")
        return gets[action](name)

    return routes


def _target(pool: Pool, path: str, actions: dict[str, Any]) -> tuple[str, str]:
    """Model and action of a path; names hold slashes, and a whole name wins over one with a suffix."""
    if not pool.knows(path):
        for action in actions:
            if action and path.endswith(f"/{action}"):
                return path.removesuffix(f"/{action}"), action
    return path, ""


def _timed(response: Response, result: EmbedResult) -> Response:
    """TEI's headers: milliseconds, and the tokens that were computed."""
    times = {"total": result.total_ms, "queue": result.queue_ms, "inference": result.compute_ms}
    for name, spent_ms in times.items():
        response.headers[f"x-{name}-time"] = str(round(spent_ms))
    response.headers["x-compute-tokens"] = str(result.tokens)
    return response


def tei_shape(error: EmbedpoolError, request_id: str) -> tuple[dict[str, Any], int]:
    """TEI's error and status."""
    if isinstance(error, EmptyInput):
        kind, status = "Empty", 400
    elif error.status in (400, 413, 415, 422):
        kind, status = "Validation", 422
    elif error.status in (429, 503):
        kind, status = {429: "Overloaded", 503: "Unhealthy"}[error.status], error.status
    elif error.status >= 500:
        kind, status = "Backend", 424
    else:
        kind, status = "Validation", error.status
    return {"error": error.message, "error_type": kind}, status
