"""OpenAI's embeddings, with the further parameters of Jina, Voyage and infinity."""

from __future__ import annotations

from typing import Any

from flask import Blueprint, Response
from marshmallow import fields, validate

from embedpool.config.fields import StrictBoolean, StrictInteger, StrictSchema
from embedpool.config.settings import Limits
from embedpool.errors import EmbedpoolError, InvalidRequest
from embedpool.pool.pool import Pool
from embedpool.pool.request import Result
from embedpool.tasks.embed import INPUT_TYPES
from embedpool.web import submit
from embedpool.web.dialects import POLICIES, chooses, means, options_of, status_with_400, texts_of
from embedpool.web.encoding import as_base64, json_response
from embedpool.web.http_request import here
from embedpool.web.observe import all_models, one_model
from embedpool.web.schemas import TEXT_OR_TEXTS, embed_options, read_json

PRECISIONS = {"float": "float32", "int8": "int8", "uint8": "uint8", "binary": "binary", "ubinary": "ubinary"}
EMBEDDING_TYPES = {said: {"precision": meant} for said, meant in PRECISIONS.items()} | {
    "base64": {"encoding": "base64"}
}
NO_IDS = (
    "token ids are refused: they are another tokenizer's. Send strings; with LangChain's OpenAIEmbeddings set "
    "check_embedding_ctx_length=False"
)


# infinity's own client sends 0 for "all of them".
UNLESS_0 = {"options": ("dimensions",), "read": lambda said: {"dimensions": said} if said else {}}


class OpenAISchema(StrictSchema):
    """Body of POST /v1/embeddings."""

    model = fields.String(required=True)
    input = fields.Raw(required=True, metadata=TEXT_OR_TEXTS)
    encoding_format = fields.String(validate=validate.OneOf(("float", "base64")), metadata=means("encoding"))
    dimensions = StrictInteger(validate=validate.Range(min=0), metadata=UNLESS_0)
    user = fields.String()
    # Voyage
    input_type = fields.String(validate=validate.OneOf(INPUT_TYPES), metadata=means("input_type"))
    output_dimension = StrictInteger(validate=validate.Range(min=1), metadata=means("dimensions"))
    output_dtype = fields.String(validate=validate.OneOf(tuple(PRECISIONS)), metadata=means("precision", PRECISIONS))
    truncation = StrictBoolean(metadata=means("truncate", POLICIES))
    # Jina
    task = fields.String(validate=validate.OneOf(INPUT_TYPES), metadata=means("input_type"))
    normalized = StrictBoolean(metadata=means("normalize"))
    embedding_type = fields.String(validate=validate.OneOf(tuple(EMBEDDING_TYPES)), metadata=chooses(EMBEDDING_TYPES))
    truncate = StrictBoolean(metadata=means("truncate", POLICIES))
    # ours, and what infinity's client sends
    prompt_name = fields.String(metadata=means("prompt_name"))
    modality = fields.String(validate=validate.Equal("text"))


def blueprint(pool: Pool, limits: Limits) -> Blueprint:
    """POST /v1/embeddings, also at /embeddings, and the list of models."""
    routes = Blueprint("openai", __name__)

    @routes.post("/v1/embeddings")
    @routes.post("/embeddings")
    def embeddings() -> Response:
        return embed(pool, limits)

    @routes.get("/v1/models")
    def models() -> Response:
        return all_models(pool)

    @routes.get("/v1/models/<path:name>")
    def model(name: str) -> Response:
        return one_model(pool, name)

    return routes


def embed(pool: Pool, limits: Limits, model: str | None = None) -> Response:
    """The answer to the request at hand, of the model it names or of a given one."""
    body = read_json(here(), OpenAISchema, limits)
    options = options_of(OpenAISchema, body)
    encoding = options.pop("encoding", "float")
    if encoding == "base64":
        options["dtype"] = "float32"  # whatever the model's: it is what clients decode
    _refuse_token_ids(body["input"])
    texts = texts_of(body["input"], limits, "input")
    result = submit.embed(here(), pool, model or body["model"], texts, embed_options(options), forms=[encoding])
    return _answer(result, encoding)


def _refuse_token_ids(given: Any) -> None:
    if isinstance(given, list) and given:
        first = given[0][0] if isinstance(given[0], list) and given[0] else given[0]
        if isinstance(first, int) and not isinstance(first, bool):
            raise InvalidRequest(f"input: {NO_IDS}", fields={"input": NO_IDS})


def _answer(result: Result, encoding: str) -> Response:
    vectors = as_base64(result.vectors) if encoding == "base64" else result.vectors
    data = [{"object": "embedding", "index": i, "embedding": vector} for i, vector in enumerate(vectors)]
    usage = {"prompt_tokens": result.tokens, "total_tokens": result.tokens}
    return json_response({"object": "list", "data": data, "model": result.model, "usage": usage})


def openai_shape(error: EmbedpoolError, request_id: str) -> tuple[dict[str, Any], int]:
    """OpenAI's error and status: any invalid body is 400 there."""
    status = status_with_400(error)
    kind = {429: "rate_limit_error"}.get(status, "invalid_request_error" if status < 500 else "server_error")
    param = next(iter(error.fields), None)
    body = {"message": error.message, "type": kind, "param": param, "code": error.code, "request_id": request_id}
    return {"error": body}, status


SHAPES = {"/v1/": openai_shape, "/v1/embeddings": openai_shape, "/embeddings": openai_shape}
