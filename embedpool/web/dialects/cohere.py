"""Cohere's embeddings: several types of vector from one computation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from flask import Blueprint, Response
from marshmallow import fields, validate

from embedpool.config.fields import StrictInteger
from embedpool.config.settings import Limits, Settings
from embedpool.errors import EmbedpoolError, InvalidRequest
from embedpool.pool.pool import Pool
from embedpool.pool.request import Result
from embedpool.tasks.embed import EmbedOptions, Vectors, final_form
from embedpool.web import submit
from embedpool.web.body import read_json
from embedpool.web.compat import CompatSchema, known
from embedpool.web.dialects import CommonOptions, means, options_of, part_of, status_with_400
from embedpool.web.encoding import as_base64, json_response
from embedpool.web.http_request import here
from embedpool.web.schemas import TEXTS, check_texts, embed_options


def _as(precision: str) -> Callable[[Vectors], Vectors]:
    """Float vectors in another precision, packed as POST /embed does."""
    return lambda vectors: final_form(vectors, EmbedOptions(precision=precision), normalize=False, dtype="float32")


TYPES: dict[str, Callable[[Vectors], Any]] = {
    "float": lambda vectors: vectors,
    **{name: _as(name) for name in ("int8", "uint8", "binary", "ubinary")},
    "base64": as_base64,
}


class ContentSchema(CompatSchema):
    """A part of an input; only texts are embedded here."""

    type = fields.String(required=True, validate=validate.Equal("text"))
    text = fields.String(required=True)


class InputSchema(CompatSchema):
    """An entry of `inputs`."""

    content = fields.List(fields.Nested(ContentSchema), required=True, validate=validate.Length(min=1))


class CohereSchema(CommonOptions):
    """Body of POST /v2/embed and /v1/embed."""

    model = fields.String(required=True)
    texts = fields.Raw(metadata=TEXTS)
    inputs = fields.List(fields.Nested(InputSchema))
    embedding_types = fields.List(
        fields.String(validate=validate.OneOf(tuple(TYPES))),
        validate=validate.Length(min=1),
        metadata=part_of("precision", "encoding"),
    )
    max_tokens = StrictInteger(validate=validate.Range(min=1), metadata=means("max_seq_length"))
    priority = fields.Raw()  # of Cohere's own queue


def blueprint(pool: Pool, settings: Settings) -> Blueprint:
    """POST /v2/embed and the older POST /v1/embed."""
    limits = settings.limits
    routes = Blueprint("cohere", __name__)

    @routes.post("/v2/embed")
    def embed_v2() -> Response:
        body, texts, result = _embed(pool, limits)
        vectors = _by_type(result, body.get("embedding_types", ["float"]))
        return json_response({**_beside(texts, result, "2"), "embeddings": vectors})

    @routes.post("/v1/embed")
    def embed_v1() -> Response:
        body, texts, result = _embed(pool, limits)
        answer = _beside(texts, result, "1")
        if "embedding_types" not in body:
            return json_response({**answer, "response_type": "embeddings_floats", "embeddings": result.vectors})
        vectors = _by_type(result, body["embedding_types"])
        return json_response({**answer, "response_type": "embeddings_by_type", "embeddings": vectors})

    return routes


def _embed(pool: Pool, limits: Limits) -> tuple[dict[str, Any], list[str], Result]:
    """Body, texts and their float vectors."""
    body = read_json(here(), CohereSchema, limits)
    texts = _texts(body, limits)
    options = embed_options({**options_of(CohereSchema, body), "dtype": "float32"})
    forms = body.get("embedding_types", ["float"])
    return body, texts, submit.embed(here(), pool, known(pool, body["model"]), texts, options, forms=forms)


def _texts(body: dict[str, Any], limits: Limits) -> list[str]:
    """`texts`, or the text parts of each of `inputs`, joined."""
    if ("texts" in body) == ("inputs" in body):
        message = "give either texts or inputs"
        raise InvalidRequest(f"texts: {message}", fields={"texts": message})
    here().words["texts"] = "texts" if "texts" in body else "inputs"
    if "texts" in body:
        return check_texts(body["texts"], limits)
    joined = ["\n".join(part["text"] for part in entry["content"]) for entry in body["inputs"]]
    return check_texts(joined, limits, "inputs")


def _by_type(result: Result, types: Sequence[str]) -> dict[str, Any]:
    return {name: TYPES[name](result.vectors) for name in types}


def _beside(texts: list[str], result: Result, version: str) -> dict[str, Any]:
    """What stands beside the vectors."""
    meta = {"api_version": {"version": version}, "billed_units": {"input_tokens": result.tokens}}
    return {"id": here().id, "texts": texts, "meta": meta}


def cohere_shape(error: EmbedpoolError, request_id: str) -> tuple[dict[str, Any], int]:
    """Cohere's error, a sentence: any invalid body is 400 there."""
    return {"id": request_id, "message": error.message}, status_with_400(error)


SHAPES = {"/v2/": cohere_shape, "/v1/embed": cohere_shape}
