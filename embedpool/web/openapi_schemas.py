"""JSON schemas of the answers, for the OpenAPI document alone."""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

STRING: Schema = {"type": "string"}
NUMBER: Schema = {"type": "number"}
COUNT: Schema = {"type": "integer", "minimum": 0}
BOOLEAN: Schema = {"type": "boolean"}
ANY: Schema = {}


def ref(name: str) -> Schema:
    """Another of these."""
    return {"$ref": f"#/components/schemas/{name}"}


def listed(items: Schema) -> Schema:
    """A list."""
    return {"type": "array", "items": items}


def or_null(schema: Schema) -> Schema:
    """What may be null."""
    return {"anyOf": [schema, {"type": "null"}]}


def closed(**properties: Schema) -> Schema:
    """An object of just these properties."""
    return {**open_(**properties), "additionalProperties": False}


def open_(**properties: Schema) -> Schema:
    """An object of these properties and others."""
    return {"type": "object", "properties": properties, "required": list(properties)}


def maybe(name: str, schema: Schema) -> Schema:
    """An object that may lack a property."""
    return {**schema, "required": [other for other in schema["required"] if other != name]}


NUMBERS = listed(NUMBER)
VECTOR: Schema = {"anyOf": [NUMBERS, STRING]}  # of numbers, or base64
VECTORS = listed(VECTOR)
SPARSE = maybe("tokens", closed(indices=VECTOR, values=VECTOR, tokens=listed(STRING)))
ROWS = listed(or_null({"anyOf": [VECTOR, VECTORS, SPARSE]}))
ERROR = maybe("fields", closed(code=STRING, message=STRING, request_id=STRING, fields={"type": "object"}))
OPENAI_ERROR = closed(message=STRING, type=STRING, param=or_null(STRING), code=STRING, request_id=STRING)
COHERE_TYPES: Schema = {
    "type": "object",
    "properties": {
        **{name: listed(NUMBERS) for name in ("float", "int8", "uint8", "binary", "ubinary")},
        "base64": listed(STRING),
    },
    "additionalProperties": False,
}
COHERE = {"id": STRING, "texts": listed(STRING), "meta": open_(billed_units=closed(input_tokens=COUNT))}
USAGE = closed(prompt_tokens=COUNT, total_tokens=COUNT)
RESULTS = listed(open_(index=COUNT, relevance_score=NUMBER))
LABELLED = closed(label=STRING, score=NUMBER)
LAST_RELOAD = or_null(closed(at=STRING, reason=STRING, ok=BOOLEAN, error=or_null(STRING)))
PROGRESS = or_null(closed(step=STRING, done_bytes=or_null(COUNT), total_bytes=or_null(COUNT)))
OUTLOOK = {"state": STRING, "last_error": or_null(STRING), "progress": PROGRESS}
MODEL_STATUS = {
    "model": STRING, "alias": or_null(STRING), "enabled": BOOLEAN, "state": STRING, "driver_type": STRING,
    "kinds": listed(STRING), "progress": PROGRESS, "replicas": COUNT, "replicas_idle": COUNT, "replicas_busy": COUNT,
    "replicas_stuck": COUNT, "rest_s": NUMBER, "space": STRING, "runs_on": {"type": "object"},
    "replicas_on": listed(open_(replica=STRING, state=STRING)),
    "queue_len": COUNT, "queue_max": COUNT, "scaling": {"type": "object"}, "counters": {"type": "object"},
    "last_error": or_null(STRING), "cached": BOOLEAN,
}  # fmt: skip
LAYER = open_(entries=COUNT, bytes=COUNT, max_bytes=COUNT, evicted=COUNT, oldest_seconds=NUMBER)
CACHE = closed(memory=LAYER, disk=or_null(LAYER))

FILE = open_(id=STRING, object=STRING, bytes=COUNT, created_at=COUNT, filename=STRING, purpose=STRING)
BATCH = open_(
    id=STRING,
    object=STRING,
    endpoint=STRING,
    input_file_id=STRING,
    status=STRING,
    request_counts={"type": "object"},
    output_file_id=or_null(STRING),
    error_file_id=or_null(STRING),
    created_at=COUNT,
    usage=or_null({"type": "object"}),
    paused=or_null(STRING),
    requests_s=or_null(NUMBER),
    seconds_left=or_null(COUNT),
)

SCHEMAS: dict[str, Schema] = {
    "Error": closed(error=ERROR),
    "EmbedAnswer": maybe("errors", maybe("vectors", maybe("outputs", closed(
        model=STRING,
        dim=or_null(COUNT),
        vectors=ROWS,
        outputs={
            "type": "object",
            "properties": {"dense": ROWS, "sparse": ROWS, "multivector": ROWS},
            "additionalProperties": False,
        },
        errors=listed(closed(index=COUNT, code=STRING, message=STRING, at_fault=BOOLEAN)),
        meta=closed(
            count=COUNT, tokens=COUNT, truncated=listed(COUNT), queue_ms=NUMBER, compute_ms=NUMBER, total_ms=NUMBER,
            replicas=listed(STRING),
        ),
    )))),
    "OpenAIError": closed(error=OPENAI_ERROR, detail=STRING),
    "OpenAIAnswer": closed(
        id=STRING,
        object=STRING,
        data=listed({"anyOf": [
            closed(object=STRING, index=COUNT, embedding=VECTOR),
            closed(object=STRING, index=COUNT, embeddings=VECTORS),
        ]}),
        model=STRING,
        usage=USAGE,
    ),
    "MultiVectorAnswer": closed(
        id=STRING,
        object=STRING,
        data=listed(closed(object=STRING, index=COUNT, embeddings=VECTORS)),
        model=STRING,
        usage=USAGE,
    ),
    "ContextualAnswer": closed(
        object=STRING,
        data=listed(closed(
            object=STRING,
            index=COUNT,
            data=listed(maybe("text", closed(object=STRING, index=COUNT, embedding=VECTOR, text=STRING))),
        )),
        model=STRING,
        usage=closed(total_tokens=COUNT),
    ),
    "Model": closed(
        id=STRING, object=STRING, created=COUNT, owned_by=STRING, type=STRING, max_model_len=or_null(COUNT),
        backend=STRING, kinds=listed(STRING), capabilities=listed(STRING),
        stats={"type": "object"}, state=STRING, spec={"type": "object"},
    ),
    "Models": closed(object=STRING, data=listed(ref("Model")), models=listed(open_(name=STRING))),
    "TeiError": closed(error=STRING, error_type=STRING),
    "TeiAnswer": {"anyOf": [listed(NUMBERS), ref("TeiSparseAnswer")]},
    "TeiAllAnswer": listed(listed(NUMBERS)),
    "TeiSparseAnswer": listed(listed(closed(index=COUNT, value=NUMBER))),
    "TeiInfo": open_(
        model_id=STRING, max_input_length=or_null(COUNT), max_client_batch_size=COUNT, max_concurrent_requests=COUNT,
        version=STRING,
    ),
    "Reranked": open_(
        id=STRING, object=STRING, model=STRING, created=COUNT, usage=USAGE,
        results=listed(open_(index=COUNT, relevance_score=NUMBER, score=NUMBER)), meta={"type": "object"},
    ),
    "RerankedV1": {"anyOf": [
        open_(id=STRING, model=STRING, usage=USAGE, results=RESULTS),
        open_(id=STRING, model=STRING, usage=USAGE, data=RESULTS),
    ]},
    "RerankedV2": open_(id=STRING, results=RESULTS, meta={"type": "object"}),
    "OpenAIFile": FILE,
    "OpenAIFiles": open_(object=STRING, data=listed(FILE), has_more=BOOLEAN),
    "OpenAIDeleted": closed(id=STRING, object=STRING, deleted=BOOLEAN),
    "OpenAIBatch": BATCH,
    "OpenAIBatches": open_(object=STRING, data=listed(BATCH), has_more=BOOLEAN),
    "Live": open_(
        number=COUNT, since=COUNT, step_s=NUMBER, kept=COUNT, longest_ms=NUMBER, version=STRING, process=STRING,
        uptime_s=COUNT, admin=BOOLEAN, stopping=BOOLEAN, reload_ok=or_null(BOOLEAN),
        models=listed(open_(model=STRING, state=STRING, last_minute={"type": "object"}, series={"type": "object"})),
    ),
    "Log": closed(
        number=COUNT, process=STRING, requests=listed(open_(number=COUNT, at=NUMBER, method=STRING, path=STRING)),
    ),
    "Scored": open_(
        id=STRING, model=STRING, usage=USAGE, data=listed(open_(index=COUNT, object=STRING, score=or_null(NUMBER))),
    ),
    "Classified": open_(id=STRING, model=STRING, usage=USAGE, data=listed(or_null(listed(LABELLED)))),
    "ClassifiedV1": open_(id=STRING, model=STRING, usage=USAGE, data=listed(open_(index=COUNT))),
    "ScoreError": open_(error={"type": "object"}, message=STRING, detail=STRING),
    "TeiRanks": listed(open_(index=COUNT, score=NUMBER)),
    "TeiPredictions": {"anyOf": [listed(LABELLED), listed(listed(LABELLED))]},
    "Numbers": NUMBERS,
    "Texts": listed(STRING),
    "Tokens": listed(
        listed(closed(id=COUNT, text=STRING, special=BOOLEAN, start=or_null(COUNT), stop=or_null(COUNT)))
    ),
    "CohereError": closed(id=STRING, message=STRING),
    "CohereAnswer": closed(**COHERE, embeddings=COHERE_TYPES),
    "CohereAnswerV1": closed(
        **COHERE, response_type=STRING, embeddings={"anyOf": [listed(NUMBERS), COHERE_TYPES]}
    ),
    "OllamaError": closed(error=STRING),
    "OllamaAnswer": open_(model=STRING, embeddings=listed(NUMBERS)),
    "OllamaVersion": closed(version=STRING, embedpool=STRING),
    "OllamaShown": open_(details={"type": "object"}, capabilities=listed(STRING)),
    "Pulled": closed(status=STRING),
    "Root": closed(name=STRING, version=STRING, links={"type": "object"}),
    "OllamaLegacyAnswer": closed(embedding=NUMBERS),
    "OllamaTags": closed(models=listed(open_(name=STRING, model=STRING))),
    "Health": closed(ok=BOOLEAN, booted=BOOLEAN, models=COUNT),
    "Ready": closed(ready=BOOLEAN, stopping=BOOLEAN, loading=listed(STRING), failed=listed(STRING)),
    "ReadyModel": closed(ready=BOOLEAN, model=STRING, state=STRING),
    "NotAllReady": {"anyOf": [ref("Ready"), ref("Error")]},
    "NotReady": {"anyOf": [ref("ReadyModel"), ref("Error")]},
    "Status": closed(
        version=STRING, pid=COUNT, stopping=BOOLEAN, pool_file=STRING, last_reload=LAST_RELOAD,
        keys=closed(asked_for=BOOLEAN, fault={"type": ["string", "null"]}), models=listed(open_(**MODEL_STATUS)),
        cache=or_null(CACHE),
        candidates=listed(closed(model=STRING, alias=or_null(STRING), **OUTLOOK)),
    ),
    "Managed": {"anyOf": [open_(ok=BOOLEAN, **MODEL_STATUS), ref("Removed")]},  # by another, at once
    "Removed": closed(ok=BOOLEAN, model=STRING, removed=BOOLEAN),
    "Cleared": closed(ok=BOOLEAN, cache=CACHE),
    "Reloaded": closed(ok=BOOLEAN, last_reload=LAST_RELOAD),
}  # fmt: skip
