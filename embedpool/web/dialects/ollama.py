"""Ollama's embeddings."""

from __future__ import annotations

from typing import Any

from flask import Blueprint, Response
from marshmallow import fields, validate

from embedpool.config.fields import StrictBoolean, StrictInteger, StrictSchema
from embedpool.config.settings import Limits
from embedpool.errors import EmbedpoolError
from embedpool.pool.pool import Pool
from embedpool.pool.served_model import ServedModel
from embedpool.web import submit
from embedpool.web.dialects import POLICIES, means, options_of, status_with_400, texts_of
from embedpool.web.encoding import json_response
from embedpool.web.http_request import here
from embedpool.web.schemas import TEXT_OR_TEXTS, embed_options, read_json

LATEST = ":latest"  # the tag that Ollama's clients may add to a name
LONG_AGO = "1970-01-01T00:00:00Z"


class OllamaSchema(StrictSchema):
    """Body of POST /api/embed. `options` and `keep_alive` steer Ollama's own runtime and mean nothing here."""

    model = fields.String(required=True)
    input = fields.Raw(required=True, metadata=TEXT_OR_TEXTS)
    truncate = StrictBoolean(metadata=means("truncate", POLICIES))
    dimensions = StrictInteger(validate=validate.Range(min=1), metadata=means("dimensions"))
    options = fields.Dict()
    keep_alive = fields.Raw()


class OllamaLegacySchema(StrictSchema):
    """Body of POST /api/embeddings: one text."""

    model = fields.String(required=True)
    prompt = fields.String(required=True)
    options = fields.Dict()
    keep_alive = fields.Raw()


def blueprint(pool: Pool, limits: Limits) -> Blueprint:
    """POST /api/embed, the older POST /api/embeddings, and the list of models."""
    routes = Blueprint("ollama", __name__)

    @routes.post("/api/embed")
    def embed() -> Response:
        body = read_json(here(), OllamaSchema, limits)
        texts = texts_of(body["input"], limits, "input")
        options = embed_options(options_of(OllamaSchema, body))
        result = submit.embed(here(), pool, _known(pool, body["model"]), texts, options)
        return json_response(
            {
                "model": body["model"],
                "embeddings": result.vectors,
                "total_duration": round(result.total_ms * 1e6),  # nanoseconds
                "load_duration": 0,
                "prompt_eval_count": result.tokens,
            }
        )

    @routes.post("/api/embeddings")
    def embeddings() -> Response:
        body = read_json(here(), OllamaLegacySchema, limits)
        texts = texts_of(body["prompt"], limits, "prompt")
        result = submit.embed(here(), pool, _known(pool, body["model"]), texts, embed_options({}))
        return json_response({"embedding": result.vectors[0]})

    @routes.get("/api/tags")
    def tags() -> Response:
        visible = here().caller.visible(pool)
        return json_response({"models": [_tag(served, name) for served in visible for name in served.spec.names]})

    return routes


def _known(pool: Pool, name: str) -> str:
    """The name as the pool knows it, without the tag that a client has added."""
    return name if pool.knows(name) else name.removesuffix(LATEST)


def _tag(served: ServedModel, name: str) -> dict[str, Any]:
    details = {"format": served.spec.driver.type, "family": "embedding", "parameter_size": "", "quantization_level": ""}
    return {"name": name, "model": name, "modified_at": LONG_AGO, "size": 0, "digest": "", "details": details}


def ollama_shape(error: EmbedpoolError, request_id: str) -> tuple[dict[str, Any], int]:
    """Ollama's error, a sentence: any invalid body is 400 there."""
    return {"error": error.message}, status_with_400(error)


SHAPES = {"/api/": ollama_shape}
