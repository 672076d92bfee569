"""Reranking as Cohere, Jina, Voyage, vLLM, Xinference and llama.cpp have it: one answer that all their clients read."""

from __future__ import annotations

import math
import time
from typing import Any

from flask import Blueprint, Response

from embedpool.config.settings import Settings
from embedpool.errors import EmbedpoolError
from embedpool.pool.pool import Pool
from embedpool.pool.request import Result
from embedpool.web.body import read_document
from embedpool.web.dialects.cohere import cohere_shape
from embedpool.web.dialects.openai import openai_shape
from embedpool.web.encoding import json_response
from embedpool.web.http_request import here
from embedpool.web.score import cohere_tokens, failures, ranked, reranked, usage

DOCUMENTS_A_SEARCH_UNIT = 100  # by Cohere's count


def blueprint(pool: Pool, settings: Settings) -> Blueprint:
    """POST /v1/rerank, the same at other paths, and Cohere's /v2/rerank."""
    limits = settings.limits
    routes = Blueprint("rerank", __name__)

    @routes.post("/v1/rerank")
    @routes.post("/v3/rerank")
    @routes.post("/reranking")
    @routes.post("/v1/reranking")
    def rerank_v1() -> Response:
        document = read_document(here(), limits, whatever_type=True)
        body, result, documents = reranked(pool, limits, document)
        found = ranked(body, result, documents)
        answer = {
            "id": here().id,
            "object": "list",
            "model": result.model,
            "created": int(time.time()),
            "usage": usage(result),
            **failures(body, result),
        }
        if "top_k" in document:  # Voyage's client always sends it
            data = [{**one, "document": _plain(one["document"])} if "document" in one else one for one in found]
            return json_response({**answer, "data": data})
        if "truncation" in document and "top_n" not in document:  # Voyage's or Jina's: nobody can tell
            return json_response({**answer, "results": found, "data": found})
        return json_response({**answer, "results": found, "meta": _meta(result, len(documents), "1")})

    @routes.post("/v2/rerank")
    def rerank_v2() -> Response:
        document = read_document(here(), limits, whatever_type=True)
        body, result, documents = reranked(pool, limits, document)
        found = ranked({**body, "return_documents": False}, result, documents)
        meta = _meta(result, len(documents), "2")
        return json_response({"id": here().id, "results": found, **failures(body, result), "meta": meta})

    return routes


def _plain(document: Any) -> Any:
    """Voyage gives documents as texts."""
    return document["text"] if isinstance(document, dict) and set(document) == {"text"} else document


def _meta(result: Result, documents: int, version: str) -> dict[str, Any]:
    """What Cohere tells beside the results."""
    return {
        "api_version": {"version": version},
        "billed_units": {"search_units": math.ceil(documents / DOCUMENTS_A_SEARCH_UNIT)},
        "tokens": cohere_tokens(result),
    }


def rerank_shape(error: EmbedpoolError, request_id: str) -> tuple[dict[str, Any], int]:
    """`error` as OpenAI has it, `message` as Cohere, `detail` as Jina and Voyage."""
    body, status = openai_shape(error, request_id)
    return {**body, "message": error.message, "id": request_id}, status


SHAPES = {
    **dict.fromkeys(("/v1/rerank", "/v3/rerank", "/reranking", "/v1/score", "/v1/classify"), rerank_shape),
    "/v2/rerank": cohere_shape,
}
