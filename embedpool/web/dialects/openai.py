"""OpenAI's embeddings, with the further parameters of Jina, Voyage and infinity."""

from __future__ import annotations

from typing import Any

from flask import Blueprint, Response
from marshmallow import fields, validate

from embedpool.config.settings import Settings
from embedpool.errors import EmbedpoolError, InvalidRequest
from embedpool.pool.pool import Pool
from embedpool.pool.request import Result
from embedpool.tasks.late_chunking import LateChunking
from embedpool.web import submit
from embedpool.web.body import read_json
from embedpool.web.compat import CompatSchema, YesOrNo, known
from embedpool.web.dialects import (
    CommonOptions,
    chooses,
    means,
    options_of,
    status_with_400,
    texts_of,
    token_ids,
)
from embedpool.web.encoding import forms_of, json_response
from embedpool.web.http_request import here
from embedpool.web.observe import all_models, one_model
from embedpool.web.schemas import TEXT_OR_TEXTS, check_texts, embed_options

PRECISIONS = {"float": "float32", "int8": "int8", "uint8": "uint8", "binary": "binary", "ubinary": "ubinary"}
EMBEDDING_TYPES = {said: {"precision": meant} for said, meant in PRECISIONS.items()} | {
    "base64": {"encoding": "base64"}
}
MOST_BYTES_OF_A_CHARACTER = 4
DECODED_HEADER = "X-Embedpool-Token-Ids"


class _OneOrAlone(fields.String):
    """A word, or a list of that word alone."""

    def _deserialize(self, value: Any, attr: str | None, data: Any, **kwargs: Any) -> Any:
        alone = value[0] if isinstance(value, list) and len(value) == 1 else value
        return super()._deserialize(alone, attr, data, **kwargs)


class Precision(CompatSchema):
    """What a number is, in the words of Voyage, Jina and infinity."""

    encoding_format = fields.String(validate=validate.OneOf(("float", "base64")), metadata=means("encoding"))
    output_dtype = fields.String(validate=validate.OneOf(tuple(PRECISIONS)), metadata=means("precision", PRECISIONS))
    embedding_type = _OneOrAlone(validate=validate.OneOf(tuple(EMBEDDING_TYPES)), metadata=chooses(EMBEDDING_TYPES))
    encoding_type = _OneOrAlone(validate=validate.OneOf(tuple(EMBEDDING_TYPES)), metadata=chooses(EMBEDDING_TYPES))


class OpenAISchema(CommonOptions, Precision):
    """Body of POST /v1/embeddings."""

    model = fields.String(required=True)
    input = fields.Raw(required=True, metadata=TEXT_OR_TEXTS)
    user = fields.Raw()
    late_chunking = YesOrNo()  # Jina
    return_multivector = YesOrNo()  # Jina
    modality = _OneOrAlone(validate=validate.Equal("text"))  # infinity


class OfThisModel(OpenAISchema):
    """The same where the path names the model."""

    model = fields.Raw()  # type: ignore[assignment]  # whatever it is


def blueprint(pool: Pool, settings: Settings) -> Blueprint:
    """POST /v1/embeddings, also at /embeddings and at Azure's path, and the list of models."""
    routes = Blueprint("openai", __name__)

    @routes.post("/v1/embeddings")
    @routes.post("/embeddings")
    @routes.post("/openai/v1/embeddings")
    def embeddings() -> Response:
        return embed(pool, settings)

    @routes.post("/openai/deployments/<path:name>/embeddings")
    def of_deployment(name: str) -> Response:
        return embed(pool, settings, name)

    @routes.get("/v1/models")
    @routes.get("/openai/v1/models")
    def models() -> Response:
        return all_models(pool)

    @routes.get("/v1/models/<path:name>")
    def model(name: str) -> Response:
        return one_model(pool, name)

    return routes


def embed(pool: Pool, settings: Settings, model: str | None = None) -> Response:
    """The answer to the request at hand, of the model it names or of a given one."""
    schema = OpenAISchema if model is None else OfThisModel
    body = read_json(here(), schema, settings.limits)
    options = options_of(schema, body)
    encoding = options.pop("encoding", "float")
    if encoding == "base64":
        options["dtype"] = "float32"  # whatever the model's: it is what clients decode
    name = known(pool, model or body["model"])
    given = body["input"]
    has_ids = token_ids.are_token_ids(given)
    if has_ids:
        given = _text_of_ids(given, pool, settings, name)
    texts = texts_of(given, settings.limits, "input")
    if body.get("late_chunking"):
        task = LateChunking([texts], embed_options(options), path="input")
        result = submit.late_chunks(here(), pool, name, task, forms=[encoding])
    else:
        wanted = ["multivector" if body.get("return_multivector") else "dense"]
        result = submit.embed(here(), pool, name, texts, embed_options(options), forms=[encoding], wanted=wanted)
    answer = json_response(list_of(result, encoding))
    if has_ids:
        answer.headers[DECODED_HEADER] = f"decoded as {token_ids.ENCODING}"
    return answer


def _text_of_ids(given: list[Any], pool: Pool, settings: Settings, name: str) -> list[str]:
    """Raises InvalidRequest for ids of another tokenizer, or for any if the operator wants it so."""
    if settings.openai.token_ids == "refuse":  # noqa: S105  (no secret)
        raise InvalidRequest(f"input: {token_ids.REFUSED}", fields={"input": token_ids.REFUSED})
    rows = token_ids.rows_of(given)
    if len(rows) > settings.limits.max_texts_per_request:
        check_texts(rows, settings.limits, "input")  # raises
    here().caller.require(pool, name)
    served = pool.find(name)
    own = None if served.spec.driver.config.is_remote else served.tokenizer().encode([""])
    limits = settings.limits
    with pool.permit():
        return token_ids.decoded(
            rows, own[0] if own else (), MOST_BYTES_OF_A_CHARACTER * limits.max_chars_per_text, limits.max_body_bytes
        )


def list_of(result: Result, encoding: str) -> dict[str, Any]:
    """An entry for each text; of a multi-vector model its vectors, as Jina has them."""
    kind = "embedding" if result.rows.splits is None else "embeddings"
    data = [{"object": kind, "index": i, kind: row} for i, row in enumerate(forms_of(result.rows, encoding))]
    usage = {"prompt_tokens": result.tokens, "total_tokens": result.tokens}
    return {"id": here().id, "object": "list", "data": data, "model": result.model, "usage": usage}


def openai_shape(error: EmbedpoolError, request_id: str) -> tuple[dict[str, Any], int]:
    """OpenAI's error and status: any invalid body is 400 there. Voyage's and Jina's clients read `detail`."""
    status = status_with_400(error)
    kind = {429: "rate_limit_error"}.get(status, "invalid_request_error" if status < 500 else "server_error")
    param = next(iter(error.fields), None)
    body = {"message": error.message, "type": kind, "param": param, "code": error.code, "request_id": request_id}
    return {"error": body, "detail": error.message}, status


SHAPES = {"/v1/": openai_shape, "/v1/embeddings": openai_shape, "/embeddings": openai_shape, "/openai/": openai_shape}
