"""Vectors of tokens and of chunks in context: Jina's /v1/multi-vector and Voyage's /v1/contextualizedembeddings."""

from __future__ import annotations

import itertools
from typing import Any

from flask import Blueprint, Response
from marshmallow import fields, validate

from embedpool.config.fields import StrictInteger
from embedpool.config.settings import Limits, Settings
from embedpool.errors import InvalidRequest, TooManyTexts
from embedpool.pool.pool import Pool
from embedpool.tasks.embed import QUERY
from embedpool.tasks.late_chunking import Chunking, LateChunking
from embedpool.web import submit
from embedpool.web.body import read_json
from embedpool.web.compat import YesOrNo, known
from embedpool.web.dialects import CommonOptions, only, options_of, texts_of
from embedpool.web.dialects.openai import Precision, list_of, openai_shape
from embedpool.web.encoding import forms_of, json_response
from embedpool.web.http_request import here
from embedpool.web.schemas import TEXT_OR_TEXTS, TEXTS, check_texts, embed_options


class MultiVectorSchema(CommonOptions, Precision):
    """Body of POST /v1/multi-vector."""

    model = fields.String(required=True)
    input = fields.Raw(required=True, metadata=TEXT_OR_TEXTS)
    return_tokenized_input = YesOrNo(validate=only(False, "this server does not tell which tokens the vectors are of"))


class ContextualSchema(CommonOptions, Precision):
    """Body of POST /v1/contextualizedembeddings."""

    model = fields.String(required=True)
    inputs = fields.Raw(required=True, metadata={"type": "array", "items": TEXTS, "minItems": 1})
    enable_auto_chunking = YesOrNo(load_default=False)
    chunk_size = StrictInteger(validate=validate.Range(min=1), load_default=512)
    chunk_overlap = StrictInteger(validate=validate.Range(min=0), load_default=0)


def blueprint(pool: Pool, settings: Settings) -> Blueprint:
    """Both."""
    limits = settings.limits
    routes = Blueprint("contextual", __name__)

    @routes.post("/v1/multi-vector")
    def multi_vector() -> Response:
        body = read_json(here(), MultiVectorSchema, limits)
        options = options_of(MultiVectorSchema, body)
        encoding = options.pop("encoding", "float")
        texts = texts_of(body["input"], limits, "input")
        name, asked = known(pool, body["model"]), embed_options(options)
        result = submit.embed(here(), pool, name, texts, asked, forms=[encoding], wanted=["multivector"])
        return json_response(list_of(result, encoding))

    @routes.post("/v1/contextualizedembeddings")
    def contextualized() -> Response:
        body = read_json(here(), ContextualSchema, limits)
        options = options_of(ContextualSchema, body)
        encoding = options.pop("encoding", "float")
        inputs = body["inputs"]
        if isinstance(inputs, list) and (body["enable_auto_chunking"] or body.get("input_type") in QUERY):
            inputs = [[one] if isinstance(one, str) else one for one in inputs]
        documents = _documents_of(inputs, limits)
        chunking = _chunking(body, documents) if body["enable_auto_chunking"] else None
        most = limits.max_texts_per_request
        task = LateChunking(documents, embed_options(options), chunking, most_chunks=most)
        result = submit.late_chunks(here(), pool, known(pool, body["model"]), task, forms=[encoding])
        rows = iter(forms_of(result.rows, encoding))
        data: list[dict[str, Any]] = []
        for index, plan in enumerate(task.plans):
            chunks = [
                {"object": "embedding", "index": i, "embedding": row, **({"text": plan.texts[i]} if chunking else {})}
                for i, row in enumerate(itertools.islice(rows, len(plan.chunks)))
            ]
            data.append({"object": "list", "index": index, "data": chunks})
        usage = {"total_tokens": result.tokens}
        return json_response({"object": "list", "data": data, "model": result.model, "usage": usage})

    return routes


def _documents_of(given: Any, limits: Limits) -> list[list[str]]:
    """Lists of chunks. Raises InvalidRequest, EmptyInput and TooManyTexts."""
    if not isinstance(given, list) or not given:
        message = "must be a list of lists of strings"
        raise InvalidRequest(f"inputs: {message}", fields={"inputs": message})
    documents = [check_texts(chunks, limits, f"inputs[{i}]") for i, chunks in enumerate(given)]
    if (chunks := sum(map(len, documents))) > limits.max_texts_per_request:
        raise TooManyTexts(f"inputs: {chunks} chunks, the limit of a request is {limits.max_texts_per_request}")
    return documents


def _chunking(body: dict[str, Any], documents: list[list[str]]) -> Chunking:
    """Raises InvalidRequest where a document is given in several parts, or chunks would not advance."""
    for i, parts in enumerate(documents):
        if len(parts) > 1:
            where, says = f"inputs[{i}]", "must be one text where enable_auto_chunking is true"
            raise InvalidRequest(f"{where}: {says}", fields={where: says})
    if 2 * body["chunk_overlap"] > body["chunk_size"]:
        says = "must be at most half of chunk_size"
        raise InvalidRequest(f"chunk_overlap: {says}", fields={"chunk_overlap": says})
    return Chunking(body["chunk_size"], body["chunk_overlap"])


SHAPES = {"/v1/multi-vector": openai_shape, "/v1/contextualizedembeddings": openai_shape}
