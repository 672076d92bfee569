"""The API as an OpenAPI 3.1 document, made from the schemas that check requests, and the page that shows it."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from apispec import APISpec
from apispec.ext.marshmallow import MarshmallowPlugin
from flask import Blueprint, Response, request

from embedpool import __version__
from embedpool.config.fields import json_schema_of
from embedpool.config.spec import DRIVER_CONFIGS
from embedpool.errors import NotFound
from embedpool.web import classify, openapi_schemas, score
from embedpool.web.dialects import batches, cohere, contextual, ollama, openai, tei, tei_scores
from embedpool.web.encoding import NPY, NPZ, json_response
from embedpool.web.ndjson import NDJSON, StreamSchema
from embedpool.web.openapi_schemas import ref
from embedpool.web.schemas import (
    TIMEOUT_HEADER,
    AliasSchema,
    ClearCacheSchema,
    EmbedSchema,
    EnableSchema,
    RegisterSchema,
    ReloadSchema,
)

DOCS = Path(__file__).with_name("docs")
DOCS_FILES = {
    "swagger-ui.css": "text/css",
    "swagger-ui-bundle.js": "text/javascript",
    "start.js": "text/javascript",
}
POLICY = "default-src 'none'; script-src 'self'; connect-src 'self'; img-src data:; style-src 'self' 'unsafe-inline'"
LINES = (
    f"With `Content-Type: {NDJSON}` each line is a JSON object of `text` and, if wanted, `id`; a line answers it. "
    f"Model and options stand in the query string: {', '.join(StreamSchema._declared_fields)}."
)

PLAIN_PATH = re.compile(r"(/[A-Za-z0-9._~-]+)+\Z")  # of a proxy's, which anybody may send

Operation = Mapping[str, Any]


def operation(
    tag: str,
    summary: str,
    answer: str | Mapping[str, Any],
    body: Any = None,
    *,
    error: str = "Error",
    description: str = "",
    parameters: tuple[Mapping[str, Any], ...] = (),
    status: tuple[str, ...] = ("200",),
) -> Operation:
    """An operation; `answer` and `error` name schemas of openapi_schemas.py, or give the content by its type."""
    content = {"application/json": {"schema": answer}} if isinstance(answer, str) else answer
    failed = {"description": "What is wrong.", "content": {"application/json": {"schema": error}}}
    found: dict[str, Any] = {
        "tags": [tag],
        "summary": summary,
        "parameters": list(parameters),
        "responses": {
            **{code: {"description": "The answer.", "content": content} for code in status},
            "4XX": failed,
            "5XX": failed,
        },
    }
    if description:
        found["description"] = description
    if body is not None:
        content = body if isinstance(body, dict) else {"application/json": {"schema": body}}
        found["requestBody"] = {"required": True, "content": content}
    return found


def _path(name: str, description: str) -> dict[str, Any]:
    return {
        "name": name, "in": "path", "required": True, "description": description,
        "schema": {"type": "string", "minLength": 1},
    }  # fmt: skip


def _query(name: str, description: str, schema: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"name": name, "in": "query", "description": description, "schema": schema or {"type": "boolean"}}


def _since(description: str) -> dict[str, Any]:
    return _query("since", description, {"type": "integer", "minimum": 0})


OF_PROCESS = _query("process", "The `process` of that answer: each counts for itself.", {"type": "string"})
MODEL = _path("name", "Name or alias of a model.")
OF_ID: dict[str, Any] = {"error": "OpenAIError", "parameters": (_path("name", "Id of a file or a batch."),)}
TIMEOUT = {
    "name": TIMEOUT_HEADER, "in": "header", "description": "Deadline below the server's own, in milliseconds.",
    "schema": {"type": "integer", "minimum": 1, "maximum": 10**9},
}  # fmt: skip
TEXT = {"text/plain": {"schema": {"type": "string"}}}
EMBEDS: dict[str, Any] = {"parameters": (TIMEOUT,)}
AT_ROOT: dict[str, Any] = {"error": "TeiError", "parameters": (TIMEOUT,)}
TEI: dict[str, Any] = {"error": "TeiError", "parameters": (MODEL, TIMEOUT)}

OPERATIONS: dict[tuple[str, str], Operation] = {
    ("post", "/embed"): operation(
        "embedpool",
        "Vectors of texts",
        {
            "application/json": {"schema": "EmbedAnswer"},
            NPY: {"schema": {"type": "string", "format": "binary"}},
            NPZ: {"schema": {"type": "string", "format": "binary"}},
            NDJSON: {"schema": {"type": "string"}},
        },
        {"application/json": {"schema": EmbedSchema}, NDJSON: {"schema": {"type": "string"}}},
        description=LINES,
        **EMBEDS,
    ),
    ("post", "/rerank"): operation(
        "embedpool",
        "Documents in the order of their relevance to a query",
        {"application/json": {"schema": {"anyOf": [ref("Reranked"), ref("TeiRanks")]}}},
        score.RerankSchema,
        error="ScoreError",
        description="With `texts` in the place of `documents` it is text-embeddings-inference's.",
        **EMBEDS,
    ),
    ("post", "/score"): operation(
        "embedpool", "Scores of pairs", "Scored", score.ScoreSchema, error="ScoreError", **EMBEDS
    ),
    ("post", "/classify"): operation(
        "embedpool", "Labels of texts", "Classified", classify.ClassifySchema, error="ScoreError", **EMBEDS
    ),
    ("post", "/v1/score"): operation(
        "vLLM", "Scores of pairs", "Scored", score.ScoreSchema, error="ScoreError", **EMBEDS
    ),
    ("post", "/v1/classify"): operation(
        "vLLM", "Labels of texts", "ClassifiedV1", classify.ClassifySchema, error="ScoreError",
        description="With `labels` it is Jina's, of an embedder.", **EMBEDS,
    ),
    **{
        ("post", path): operation(
            "Cohere", "Documents in the order of their relevance", answer, score.RerankSchema, error=error, **EMBEDS
        )
        for path, answer, error in (
            ("/v1/rerank", "RerankedV1", "ScoreError"),
            ("/v2/rerank", "RerankedV2", "CohereError"),
            ("/v3/rerank", "RerankedV1", "ScoreError"),
            ("/reranking", "RerankedV1", "ScoreError"),
            ("/v1/reranking", "RerankedV1", "ScoreError"),
        )
    },
    ("post", "/tei/{name}/rerank"): operation(
        "TEI", "Texts in the order of their relevance", "TeiRanks", tei_scores.TeiRerankSchema, **TEI
    ),
    ("post", "/tei/{name}/predict"): operation(
        "TEI", "Labels of texts", "TeiPredictions", tei_scores.TeiPredictSchema, **TEI
    ),
    ("post", "/predict"): operation(
        "TEI", "Labels of texts, of the default model", "TeiPredictions", tei_scores.TeiPredictSchema, **AT_ROOT
    ),
    ("post", "/v1/embeddings"): operation(
        "OpenAI", "Vectors", "OpenAIAnswer", openai.OpenAISchema, error="OpenAIError", **EMBEDS
    ),
    ("post", "/embeddings"): operation(
        "OpenAI", "The same", "OpenAIAnswer", openai.OpenAISchema, error="OpenAIError", **EMBEDS
    ),
    ("post", "/openai/v1/embeddings"): operation(
        "OpenAI", "The same, for Azure's clients", "OpenAIAnswer", openai.OpenAISchema, error="OpenAIError", **EMBEDS
    ),
    ("post", "/openai/deployments/{name}/embeddings"): operation(
        "OpenAI", "Vectors, for Azure's clients", "OpenAIAnswer", openai.OfThisModel, error="OpenAIError",
        parameters=(MODEL, TIMEOUT),
    ),
    ("post", "/v1/multi-vector"): operation(
        "Jina", "A vector for each token", "MultiVectorAnswer", contextual.MultiVectorSchema, error="OpenAIError",
        **EMBEDS,
    ),
    ("post", "/v1/contextualizedembeddings"): operation(
        "Voyage", "A vector for each chunk of documents that are read as a whole", "ContextualAnswer",
        contextual.ContextualSchema, error="OpenAIError", **EMBEDS,
    ),
    ("get", "/openai/v1/models"): operation("OpenAI", "The models, for Azure's clients", "Models", error="OpenAIError"),
    ("get", "/v1/models"): operation("OpenAI", "The models", "Models", error="OpenAIError"),
    ("get", "/v1/models/{name}"): operation(
        "OpenAI", "One model", "Model", error="OpenAIError", parameters=(MODEL,)
    ),
    ("post", "/tei/{name}"): operation("TEI", "Vectors", "TeiAnswer", tei.TeiSchema, **TEI),
    ("post", "/tei/{name}/embed"): operation("TEI", "Vectors", "TeiAnswer", tei.TeiSchema, **TEI),
    ("post", "/tei/{name}/similarity"): operation(
        "TEI", "Cosines of a sentence and others", "Numbers", tei.SimilaritySchema, **TEI
    ),
    ("post", "/tei/{name}/tokenize"): operation("TEI", "Tokens of texts", "Tokens", tei.TokenizeSchema, **TEI),
    ("post", "/tei/{name}/decode"): operation("TEI", "Texts of token ids", "Texts", tei.DecodeSchema, **TEI),
    ("post", "/tei/{name}/v1/embeddings"): operation(
        "TEI", "Vectors as OpenAI gives them", "OpenAIAnswer", openai.OfThisModel,
        **{**TEI, "error": "OpenAIError"},
    ),
    ("post", "/tei/{name}/embeddings"): operation(
        "TEI", "The same", "OpenAIAnswer", openai.OfThisModel, **{**TEI, "error": "OpenAIError"}
    ),
    ("post", "/tei/{name}/embed_all"): operation(
        "TEI", "Vectors of each token", "TeiAllAnswer", tei.TeiSchema, **TEI
    ),
    ("post", "/tei/{name}/embed_sparse"): operation(
        "TEI", "Sparse rows", "TeiSparseAnswer", tei.TeiSchema, **TEI
    ),
    ("post", "/"): operation("TEI", "Vectors of the default model", "TeiAnswer", tei.TeiSchema, **AT_ROOT),
    ("post", "/similarity"): operation(
        "TEI", "Cosines of a sentence and others", "Numbers", tei.SimilaritySchema, **AT_ROOT
    ),
    ("post", "/tokenize"): operation("TEI", "Tokens of texts", "Tokens", tei.TokenizeSchema, **AT_ROOT),
    ("post", "/decode"): operation("TEI", "Texts of token ids", "Texts", tei.DecodeSchema, **AT_ROOT),
    ("post", "/embed_all"): operation("TEI", "Vectors of each token", "TeiAllAnswer", tei.TeiSchema, **AT_ROOT),
    ("post", "/embed_sparse"): operation(
        "TEI", "Sparse rows of the only sparse model", "TeiSparseAnswer", tei.TeiSchema, **AT_ROOT
    ),
    ("get", "/info"): operation("TEI", "The default model", "TeiInfo", **AT_ROOT),
    ("get", "/ping"): operation("TEI", "Whether the default model is served", {"text/html": {}}, **AT_ROOT),
    ("get", "/tei/{name}"): operation("TEI", "The model", "TeiInfo", **TEI),
    ("get", "/tei/{name}/ping"): operation("TEI", "Whether it is served", {"text/html": {}}, **TEI),
    ("get", "/tei/{name}/info"): operation("TEI", "The model", "TeiInfo", **TEI),
    ("get", "/tei/{name}/health"): operation("TEI", "Whether it is served", {"text/html": {}}, **TEI),
    ("post", "/v2/embed"): operation(
        "Cohere", "Vectors of several types", "CohereAnswer", cohere.CohereSchema, error="CohereError", **EMBEDS
    ),
    ("post", "/v1/embed"): operation(
        "Cohere", "The same, older", "CohereAnswerV1", cohere.CohereSchema, error="CohereError", **EMBEDS
    ),
    ("post", "/api/embed"): operation(
        "Ollama", "Vectors", "OllamaAnswer", ollama.OllamaSchema, error="OllamaError", **EMBEDS
    ),
    ("post", "/api/embeddings"): operation(
        "Ollama", "One vector, older", "OllamaLegacyAnswer", ollama.OllamaLegacySchema, error="OllamaError", **EMBEDS
    ),
    ("get", "/api/tags"): operation("Ollama", "The models", "OllamaTags", error="OllamaError"),
    ("get", "/api/ps"): operation("Ollama", "The models that are loaded", "OllamaTags", error="OllamaError"),
    ("get", "/api/version"): operation("Ollama", "Its version", "OllamaVersion", error="OllamaError"),
    ("post", "/api/show"): operation(
        "Ollama", "One model", "OllamaShown", ollama.OllamaModelSchema, error="OllamaError"
    ),
    ("post", "/api/pull"): operation(
        "Ollama", "A model that is there", {NDJSON: {"schema": "Pulled"}}, ollama.OllamaModelSchema,
        error="OllamaError",
    ),
    ("get", "/"): operation(
        "Documentation", "What stands here", {"application/json": {"schema": "Root"}, **TEXT}, status=("200", "302")
    ),
    ("get", "/health"): operation("Watching", "The process is up", "Health"),
    ("get", "/ready"): operation(
        "Watching", "Every model is loaded or has failed; or these would serve now", "Ready", error="NotAllReady",
        parameters=(_query("models", "Names, with commas between them: ask only after those.", {"type": "string"}),),
    ),
    ("get", "/ready/{name}"): operation(
        "Watching", "A request would be served now", "ReadyModel", error="NotReady", parameters=(MODEL,)
    ),
    ("get", "/status"): operation("Watching", "Models, queues, counters, the last reload", "Status"),
    ("get", "/models"): operation("Watching", "The models, in OpenAI's shape", "Models"),
    ("get", "/models/{name}"): operation("Watching", "One model", "Model", parameters=(MODEL,)),
    ("get", "/metrics"): operation("Watching", "Prometheus' text format", TEXT),
    ("post", "/v1/files"): operation(
        "OpenAI", "Receive a file of requests", "OpenAIFile",
        {"multipart/form-data": {"schema": {
            "type": "object", "required": ["file", "purpose"],
            "properties": {"file": {"type": "string", "format": "binary"}, "purpose": {"enum": ["batch"]}},
        }}},
        error="OpenAIError",
    ),
    ("get", "/v1/files"): operation("OpenAI", "Files of the caller", "OpenAIFiles", error="OpenAIError"),
    ("get", "/v1/files/{name}"): operation("OpenAI", "One of them", "OpenAIFile", **OF_ID),
    ("delete", "/v1/files/{name}"): operation("OpenAI", "Delete it", "OpenAIDeleted", **OF_ID),
    ("get", "/v1/files/{name}/content"): operation(
        "OpenAI", "What it holds", {"application/jsonl": {"schema": {"type": "string"}}}, **OF_ID,
    ),
    ("post", "/v1/batches"): operation(
        "OpenAI", "Run the requests in a file", "OpenAIBatch", batches.BatchSchema, error="OpenAIError"
    ),
    ("get", "/v1/batches"): operation("OpenAI", "Batches of the caller", "OpenAIBatches", error="OpenAIError"),
    ("get", "/v1/batches/{name}"): operation("OpenAI", "One of them", "OpenAIBatch", **OF_ID),
    ("post", "/v1/batches/{name}/cancel"): operation("OpenAI", "End it", "OpenAIBatch", **OF_ID),
    ("get", "/live"): operation(
        "Watching", "What the page shows: models, the last minute, and what is new of the last ten", "Live",
        parameters=(_since("The `number` of the document that is known."), OF_PROCESS),
    ),
    ("get", "/log"): operation(
        "Watching", "The last requests; for whoever may manage", "Log",
        parameters=(_since("The `number` of the last answer."), OF_PROCESS),
    ),
    ("post", "/models/register"): operation(
        "Management", "Add or replace a model", "Managed", RegisterSchema, status=("200", "202"),
        parameters=(_query("wait", "Answer when it is ready; the default."), _query("replace", "Also another spec.")),
    ),
    ("post", "/models/alias"): operation("Management", "Give or clear an alias", "Managed", AliasSchema),
    ("post", "/models/enable"): operation("Management", "Switch a model on or off", "Managed", EnableSchema),
    ("delete", "/models/{name}"): operation("Management", "Remove a model", "Removed", parameters=(MODEL,)),
    ("post", "/cache/clear"): operation(
        "Management", "Forget rows that were computed before, of a model or of all", "Cleared", ClearCacheSchema
    ),
    ("post", "/reload"): operation("Management", "Read pool.yml now", "Reloaded", ReloadSchema),
    ("get", "/openapi.json"): operation("Documentation", "This document", {"application/json": {}}),
    ("get", "/ui"): operation("Documentation", "The page for people", {"text/html": {}}),
    ("get", "/ui/{file}"): operation(
        "Documentation", "What that page needs, or the page",
        {"text/html": {}, "text/css": {}, "text/javascript": {}, "image/svg+xml": {}},
        parameters=(_path("file", "Path of a file."),),
    ),
    ("get", "/docs"): operation("Documentation", "This document, to browse", {"text/html": {}}),
    ("get", "/docs/{file}"): operation(
        "Documentation", "What that page needs, or the page", {"text/html": {}, "text/css": {}, "text/javascript": {}},
        parameters=(_path("file", "Name of a file."),),
    ),
}  # fmt: skip


@functools.cache
def document() -> dict[str, Any]:
    """The whole API."""
    spec = APISpec(
        "embedpool", __version__, "3.1.0", plugins=[MarshmallowPlugin()],
        info={"description": "One server, many text-embedding models, one address."},
    )  # fmt: skip
    for name, schema in openapi_schemas.SCHEMAS.items():
        spec.components.schema(name, schema)
    for driver, config in DRIVER_CONFIGS.items():
        spec.components.schema(f"driver_config.{driver}", json_schema_of(config))
    for (method, path), found in OPERATIONS.items():
        spec.path(path, operations={method: dict(found)})
    made: dict[str, Any] = spec.to_dict()
    for schema in made["components"]["schemas"].values():
        _let_null_mean_absent(schema)
    return made


def _let_null_mean_absent(schema: dict[str, Any]) -> None:
    """In requests null is as good as nothing, wherever nothing will do."""
    for name, field in schema.get("properties", {}).items():
        if name in schema.get("required", ()):
            continue
        if "$ref" in field:
            schema["properties"][name] = {"anyOf": [field, {"type": "null"}]}
        elif isinstance(field.get("type"), str):
            field["type"] = [field["type"], "null"]
            if "enum" in field:
                field["enum"] = [*field["enum"], None]
        elif "oneOf" in field:
            field["oneOf"] = [*field["oneOf"], {"type": "null"}]


def blueprint() -> Blueprint:
    """The document and the page."""
    routes = Blueprint("openapi", __name__)

    @routes.get("/openapi.json")
    def openapi() -> Response:
        given = request.headers.get("X-Forwarded-Prefix", "").rstrip("/")
        prefix = given if PLAIN_PATH.match(given) else request.script_root
        return json_response({**document(), "servers": [{"url": prefix or "/"}]})

    @routes.get("/docs")
    def docs() -> Response:
        return Response(
            (DOCS / "index.html").read_bytes(), mimetype="text/html", headers={"Content-Security-Policy": POLICY}
        )

    @routes.get("/docs/<file>")
    def docs_file(file: str) -> Response:
        if file not in DOCS_FILES:
            raise NotFound(f"nothing at {request.path}")
        headers = {"Cache-Control": "max-age=3600"}
        return Response((DOCS / file).read_bytes(), mimetype=DOCS_FILES[file], headers=headers)

    return routes
