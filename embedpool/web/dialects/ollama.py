"""Ollama's embeddings, and what its clients ask before they embed."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Any

from flask import Blueprint, Response
from marshmallow import fields

from embedpool import __version__
from embedpool.config.settings import Settings
from embedpool.errors import EmbedpoolError, InvalidRequest
from embedpool.pool.pool import Pool
from embedpool.pool.request import Result
from embedpool.pool.served_model import ServedModel
from embedpool.tasks.embed import EmbedOptions
from embedpool.web import submit
from embedpool.web.body import read_json
from embedpool.web.compat import LATEST, CompatSchema, known
from embedpool.web.dialects import CommonOptions, options_of, status_with_400, texts_of
from embedpool.web.encoding import json_response
from embedpool.web.http_request import here
from embedpool.web.ndjson import NDJSON
from embedpool.web.schemas import TEXT_OR_TEXTS, embed_options

API_VERSION = "0.12.0"  # of Ollama, whose API this is; clients ask for it
LONG_AGO, FOR_GOOD = "1970-01-01T00:00:00Z", "2999-12-31T00:00:00Z"


class OllamaSchema(CommonOptions):
    """Body of POST /api/embed. `options` and `keep_alive` steer Ollama's own runtime and mean nothing here."""

    model = fields.String(required=True)
    input = fields.Raw(metadata=TEXT_OR_TEXTS)
    options = fields.Dict()
    keep_alive = fields.Raw()


class OllamaLegacySchema(CompatSchema):
    """Body of POST /api/embeddings: one text."""

    model = fields.String(required=True)
    prompt = fields.String()
    options = fields.Dict()
    keep_alive = fields.Raw()


class OllamaModelSchema(CompatSchema):
    """Body of POST /api/show and /api/pull; `name` is the older word."""

    model = fields.String()
    name = fields.String()


def blueprint(pool: Pool, settings: Settings) -> Blueprint:
    """POST /api/embed, the older POST /api/embeddings, and what tells of models."""
    routes = Blueprint("ollama", __name__)
    limits = settings.limits

    @routes.post("/api/embed")
    def embed() -> Response:
        body = read_json(here(), OllamaSchema, limits)
        name = known(pool, body["model"])
        if body.get("input") in (None, []):
            return json_response({"model": body["model"], "embeddings": _preloaded(pool, name)})
        texts = texts_of(body["input"], limits, "input")
        result = _embedded(pool, name, texts, embed_options(options_of(OllamaSchema, body)))
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
        name = known(pool, body["model"])
        if not body.get("prompt"):
            return json_response({"embedding": _preloaded(pool, name)})
        texts = texts_of(body["prompt"], limits, "prompt")
        return json_response({"embedding": _embedded(pool, name, texts, EmbedOptions()).vectors[0]})

    @routes.get("/api/tags")
    def tags() -> Response:
        visible = here().caller.visible(pool)
        return json_response({"models": [_tag(pool, served, name) for served in visible for name in served.spec.names]})

    @routes.get("/api/ps")
    def ps() -> Response:
        ready = [served for served in here().caller.visible(pool) if served.state == "ready"]
        beside = {"expires_at": FOR_GOOD, "size_vram": 0}
        return json_response({"models": [{**_tag(pool, served, served.spec.model), **beside} for served in ready]})

    @routes.get("/api/version")
    def version() -> Response:
        return json_response({"version": API_VERSION, "embedpool": __version__})

    @routes.post("/api/show")
    def show() -> Response:
        served, name = _asked_for(pool, settings)
        tag, kind = _tag(pool, served, name), "bert"
        info = {
            "general.architecture": kind,
            f"{kind}.context_length": served.known_max_tokens(),
            f"{kind}.embedding_length": served.width,
        }
        return json_response(
            {
                "modelfile": "",
                "parameters": "",
                "template": "{{ .Prompt }}",
                "details": tag["details"],
                "model_info": {key: value for key, value in info.items() if value is not None},
                "capabilities": ["embedding"],
                "modified_at": tag["modified_at"],
            }
        )

    @routes.post("/api/pull")
    def pull() -> Response:
        """Of a model that is there: nothing is fetched. Lines of progress end with this one."""
        _asked_for(pool, settings)
        answer = json_response({"status": "success"})
        answer.mimetype = NDJSON
        return answer

    return routes


def _asked_for(pool: Pool, settings: Settings) -> tuple[ServedModel, str]:
    """The model of /api/show or /api/pull, and its name as the pool knows it."""
    body = read_json(here(), OllamaModelSchema, settings.limits)
    given = body.get("model") or body.get("name")
    if not given:
        raise InvalidRequest("model: is required", fields={"model": "is required"})
    name = known(pool, given)
    here().caller.require(pool, name)
    return pool.find(name), name


def _preloaded(pool: Pool, name: str) -> list[float]:
    """No vector: the request is to load the model."""
    here().caller.require(pool, name)
    pool.find(name).preload()
    return []


def _embedded(pool: Pool, name: str, texts: Sequence[str], options: EmbedOptions) -> Result:
    """More `dimensions` than the model has are none, as Ollama has it."""
    here().caller.require(pool, name)
    try:
        return submit.embed(here(), pool, name, texts, options)
    except InvalidRequest as error:
        if "options.dimensions" not in error.fields:
            raise
    here().ignored.append("dimensions")
    return submit.embed(here(), pool, name, texts, dataclasses.replace(options, dimensions=None))


def _tag(pool: Pool, served: ServedModel, name: str) -> dict[str, Any]:
    details = {
        "parent_model": "", "format": served.spec.driver.type, "family": "bert", "families": ["bert"],
        "parameter_size": "", "quantization_level": "",
    }  # fmt: skip
    tagged = name if ":" in name or pool.knows(name + LATEST) else name + LATEST
    digest = hashlib.sha256(served.spec.model.encode()).hexdigest()
    return {
        "name": tagged, "model": tagged, "modified_at": LONG_AGO, "size": 0, "digest": digest, "details": details,
    }  # fmt: skip


def ollama_shape(error: EmbedpoolError, request_id: str) -> tuple[dict[str, Any], int]:
    """Ollama's error, a sentence: any invalid body is 400 there."""
    return {"error": error.message}, status_with_400(error)


SHAPES = {"/api/": ollama_shape}
