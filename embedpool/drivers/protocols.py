"""Request and answer formats of remote services. To add a protocol, write two functions and a line in the table."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from embedpool.config.checks import MODEL_SLOT, TEXT_SLOT, TEXTS_SLOT, holds_a_text
from embedpool.config.spec import HttpConfig
from embedpool.errors import STATUS_OF, EmbedpoolError, UnsupportedOption, UpstreamError
from embedpool.tasks.driver import PROBE_TEXT
from embedpool.tasks.embed import DOCUMENT, QUERY
from embedpool.tasks.multivector import MultiVector
from embedpool.tasks.score import Rerank
from embedpool.tasks.sparse import Sparse

RERANK, SPARSE, MULTIVECTOR = Rerank.name, Sparse.name, MultiVector.name


Body = Callable[[str, Sequence[str], Mapping[str, Any]], dict[str, Any]]


class Reading(NamedTuple):
    """What an answer holds: rows, the tokens that the service counted, and the texts it cut or failed on.

    A row is a vector, a list of vectors, or a pair of indices and values.
    """

    vectors: list[Any]
    tokens: int | None = None
    truncated: Sequence[int] = ()
    errors: Mapping[int, EmbedpoolError] = {}


class Protocol(NamedTuple):
    """Request and answer format of one kind of service."""

    path: str
    body: Body
    read: Callable[[Any], Reading]


# --- embedpool

# The final form is made here, and a text that fails there takes no other with it. Numbers as base64 cost both sides a
# fraction of what they do as JSON.
RAW = {"normalize": False, "dtype": "float32", "on_error": "partial", "encoding": "base64"}


def _embedpool_body(model: str, texts: Sequence[str], options: Mapping[str, Any]) -> dict[str, Any]:
    return {"model": model, "texts": list(texts), "options": {**RAW, **options}}


def _embedpool_read(document: Any) -> Reading:
    meta = document.get("meta") or {}
    truncated = list(meta.get("truncated") or [])
    rows = [_from_base64(found) for found in document["vectors"]]
    return Reading(rows, meta.get("tokens"), truncated, _embedpool_errors(document))


def _from_base64(given: Any, dtype: str = "<f4") -> Any:
    """The numbers of a vector, of several, or of a sparse row; what holds none stays as it is, and is no vector."""
    if isinstance(given, list):
        return [_from_base64(one) for one in given]
    if isinstance(given, dict) and given.keys() == {"indices", "values"}:
        return _from_base64(given["indices"], "<i4"), _from_base64(given["values"])
    try:
        return np.frombuffer(base64.b64decode(given, validate=True), dtype) if isinstance(given, str) else given
    except ValueError:
        return given


def _embedpool_body_for(output: str) -> Body:
    """Of another output than dense vectors, which the options of those are not for."""
    told = {"output": output, "on_error": "partial", "encoding": "base64"}
    if output != SPARSE:
        told["dtype"] = "float32"
    return lambda model, texts, options: {"model": model, "texts": list(texts), "options": {**told, **options}}


def _embedpool_errors(document: Any) -> dict[int, EmbedpoolError]:
    """Of the texts that failed there. Raises UpstreamError where one failed that is not at fault."""
    entries = document.get("errors") or ()
    for entry in entries:
        if not entry.get("at_fault", True):  # its own service was down, say: no text is at fault, and others may serve
            raise _error_of(entry, passing=True)
    return {entry["index"]: _error_of(entry) for entry in entries}


def _error_of(entry: Mapping[str, Any], *, passing: bool = False) -> UpstreamError:
    code = entry["code"] if entry["code"] in STATUS_OF else "an error"
    says, status = f"the remote service answered {code}", STATUS_OF.get(code)
    return UpstreamError(says, said=str(entry["message"]), remote_status=status, passing=passing)


# --- OpenAI, Jina and Voyage, which have one form of answer


def _openai_body(model: str, texts: Sequence[str], options: Mapping[str, Any]) -> dict[str, Any]:
    _refuse("openai", options, "truncate", "max_seq_length", "prompt_name")
    return {**options, "model": model, "input": list(texts), "encoding_format": "float"}


def _jina_body(model: str, texts: Sequence[str], options: Mapping[str, Any]) -> dict[str, Any]:
    passed_on, cuts = _cut_or_refused("jina", options)
    if input_type := passed_on.pop("input_type", None):
        passed_on["task"] = _word_for(input_type, "retrieval.query", "retrieval.passage")
    return {
        **passed_on, "model": model, "input": list(texts), "embedding_type": "float", "normalized": False,
        "truncate": cuts,
    }  # fmt: skip


def _voyage_body(model: str, texts: Sequence[str], options: Mapping[str, Any]) -> dict[str, Any]:
    passed_on, cuts = _cut_or_refused("voyage", options)
    if input_type := passed_on.pop("input_type", None):
        passed_on["input_type"] = _word_for(input_type, "query", "document")
    return {**passed_on, "model": model, "input": list(texts), "output_dtype": "float", "truncation": cuts}


def _openai_read(document: Any, name: str = "embedding") -> Reading:
    data = sorted(document["data"], key=lambda entry: entry.get("index", 0))
    usage = document.get("usage") or {}
    return Reading([entry[name] for entry in data], usage.get("prompt_tokens", usage.get("total_tokens")))


def _jina_body_for_tokens(model: str, texts: Sequence[str], options: Mapping[str, Any]) -> dict[str, Any]:
    told = _voyage_body(model, texts, options)  # but for two names
    return {**told, "embedding_type": told.pop("output_dtype"), "truncate": told.pop("truncation")}


def _jina_read_tokens(document: Any) -> Reading:
    return _openai_read(document, "embeddings")


# --- text-embeddings-inference


def _tei_body(model: str, texts: Sequence[str], options: Mapping[str, Any]) -> dict[str, Any]:
    _refuse("tei", options, "max_seq_length")
    passed_on = dict(options)
    policy = passed_on.pop("truncate", "right")
    passed_on.pop("input_type", None)  # it knows no such thing; `driver.config.prompts` does
    body = {**passed_on, "inputs": list(texts), "normalize": False, "truncate": policy != "error"}
    if policy == "left":
        body["truncation_direction"] = "Left"
    return body


def _tei_read(document: Any) -> Reading:
    return Reading(list(document))


def _tei_body_without_length(model: str, texts: Sequence[str], options: Mapping[str, Any]) -> dict[str, Any]:
    """Of tokens and of sparse rows it normalises nothing."""
    return {name: value for name, value in _tei_body(model, texts, options).items() if name != "normalize"}


def _tei_read_sparse(document: Any) -> Reading:
    return Reading([([one["index"] for one in row], [one["value"] for one in row]) for row in document])


# --- Cohere

COHERE_TRUNCATE = {"error": "NONE", "left": "START", "right": "END"}


def _cohere_body(model: str, texts: Sequence[str], options: Mapping[str, Any]) -> dict[str, Any]:
    _refuse("cohere", options, "prompt_name")
    passed_on = dict(options)
    if limit := passed_on.pop("max_seq_length", None):
        passed_on["max_tokens"] = limit
    policy = COHERE_TRUNCATE[passed_on.pop("truncate", "right")]
    # Its models ask for one; most texts that are embedded are documents.
    input_type = _word_for(passed_on.pop("input_type", "document"), "search_query", "search_document")
    return {
        **passed_on, "model": model, "texts": list(texts), "input_type": input_type, "embedding_types": ["float"],
        "truncate": policy,
    }  # fmt: skip


def _cohere_read(document: Any) -> Reading:
    billed = (document.get("meta") or {}).get("billed_units") or {}
    return Reading(document["embeddings"]["float"], billed.get("input_tokens"))


# --- Ollama


def _ollama_body(model: str, texts: Sequence[str], options: Mapping[str, Any]) -> dict[str, Any]:
    passed_on, cuts = _cut_or_refused("ollama", options)
    passed_on.pop("input_type", None)  # it knows no such thing; `driver.config.prompts` does
    return {**passed_on, "model": model, "input": list(texts), "truncate": cuts}


def _ollama_read(document: Any) -> Reading:
    return Reading(document["embeddings"], document.get("prompt_eval_count"))


# --- reranking: the documents are the texts of a call, its query stands in the options


def _cohere_rerank_body(model: str, texts: Sequence[str], options: Mapping[str, Any]) -> dict[str, Any]:
    _refuse("cohere", options, "truncate")
    passed_on = {name: value for name, value in options.items() if name not in ("query", "instruction")}
    return {**passed_on, "model": model, "query": _query(options), "documents": list(texts)}


def _jina_rerank_body(model: str, texts: Sequence[str], options: Mapping[str, Any]) -> dict[str, Any]:
    _, cuts = _cut_or_refused("jina", options)
    body = {"model": model, "query": _query(options), "documents": list(texts), "truncation": cuts}
    if (limit := options.get("max_tokens_per_doc")) is not None:
        body["max_doc_length"] = limit
    return {**body, "return_documents": False}


def _embedpool_rerank_body(model: str, texts: Sequence[str], options: Mapping[str, Any]) -> dict[str, Any]:
    passed_on = {name: value for name, value in options.items() if name != "query"}
    told = {"on_error": "partial", **passed_on}
    return {"model": model, "query": options.get("query", PROBE_TEXT), "documents": list(texts), "options": told}


def _embedpool_rerank_read(document: Any) -> Reading:
    return _rerank_read(document, _embedpool_errors(document))


def _tei_rerank_body(model: str, texts: Sequence[str], options: Mapping[str, Any]) -> dict[str, Any]:
    _refuse("tei", options, "max_tokens_per_doc")
    _, cuts = _cut_or_refused("tei", options)
    return {"query": _query(options), "texts": list(texts), "truncate": cuts}


def _query(options: Mapping[str, Any]) -> str:
    """The query for a service that knows no instructions."""
    return f"{options.get('instruction', '')}{options.get('query', PROBE_TEXT)}"


def _rerank_read(document: Any, errors: Mapping[int, EmbedpoolError] | None = None) -> Reading:
    """A score for each document, in their order, none for one in `errors`. Raises LookupError for any other number."""
    errors = errors or {}
    entries = document if isinstance(document, list) else document["results"]
    by_index = {entry["index"]: entry.get("relevance_score", entry.get("score")) for entry in entries}
    if len(by_index) != len(entries):
        raise LookupError("two scores for one document")
    scores = [None if i in errors else [by_index[i]] for i in range(len(by_index) + len(errors))]
    meta = {} if isinstance(document, list) else document.get("meta") or {}
    usage = {} if isinstance(document, list) else document.get("usage") or {}
    truncated = meta.get("truncated")
    return Reading(scores, usage.get("total_tokens"), truncated if isinstance(truncated, list) else (), errors)


# --- what options mean there


def _refuse(protocol: str, options: Mapping[str, Any], *names: str) -> None:
    for name in names:
        if name in options:
            message = f"a remote service of protocol {protocol!r} cannot be asked for it"
            raise UnsupportedOption(f"options.{name}: {message}", fields={f"options.{name}": message})


def _cut_or_refused(protocol: str, options: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    """The other options, and whether a text that is too long is cut, where a service can be told only that."""
    _refuse(protocol, options, "max_seq_length", "prompt_name")
    passed_on = dict(options)
    policy = passed_on.pop("truncate", "right")
    if policy == "left":
        _refuse(protocol, options, "truncate")
    return passed_on, policy != "error"


def _word_for(input_type: str, query: str, document: str) -> str:
    """A service's word for what the texts are for."""
    return query if input_type in QUERY else document if input_type in DOCUMENT else input_type


# --- a service that is described in driver.config


def _by_template(config: HttpConfig) -> Protocol:
    def body(model: str, texts: Sequence[str], options: Mapping[str, Any]) -> dict[str, Any]:
        _refuse("template", options, *(name for name in options if name != "input_type"))
        filled: dict[str, Any] = _filled(config.request, model, texts)
        return filled

    return Protocol("", body, lambda document: Reading(list(_at(document, config.vectors or ""))))


def _filled(form: Any, model: str, texts: Sequence[str]) -> Any:
    """The form with the model's name and the texts in their slots; a list around a single text is one of all texts."""
    if isinstance(form, dict):
        return {name: _filled(value, model, texts) for name, value in form.items()}
    if isinstance(form, list):
        if len(form) == 1 and holds_a_text(form):
            return [_filled(form[0], model, [text]) for text in texts]
        return [_filled(value, model, texts) for value in form]
    if form == TEXTS_SLOT:
        return list(texts)
    return form.replace(MODEL_SLOT, model).replace(TEXT_SLOT, texts[0]) if isinstance(form, str) else form


def _at(document: Any, path: str) -> Any:
    """What stands at a path like `data[].embedding`, where [] stands for each entry of a list."""
    before, each, after = path.partition("[]")
    for name in filter(None, before.split(".")):
        document = document[name]
    return [_at(entry, after) for entry in document] if each else document


PROTOCOLS = {
    "embedpool": Protocol("", _embedpool_body, _embedpool_read),
    "openai": Protocol("/embeddings", _openai_body, _openai_read),
    "tei": Protocol("/embed", _tei_body, _tei_read),
    "cohere": Protocol("/v2/embed", _cohere_body, _cohere_read),
    "jina": Protocol("/embeddings", _jina_body, _openai_read),
    "voyage": Protocol("/embeddings", _voyage_body, _openai_read),
    "ollama": Protocol("/api/embed", _ollama_body, _ollama_read),
}


RERANK_PROTOCOLS = {
    "embedpool": Protocol("", _embedpool_rerank_body, _embedpool_rerank_read),
    "cohere": Protocol("/v2/rerank", _cohere_rerank_body, _rerank_read),
    "jina": Protocol("/rerank", _jina_rerank_body, _rerank_read),
    "tei": Protocol("/rerank", _tei_rerank_body, _rerank_read),
}


SPARSE_PROTOCOLS = {
    "embedpool": Protocol("", _embedpool_body_for("sparse"), _embedpool_read),
    "tei": Protocol("/embed_sparse", _tei_body_without_length, _tei_read_sparse),
}
MULTIVECTOR_PROTOCOLS = {
    "embedpool": Protocol("", _embedpool_body_for("multivector"), _embedpool_read),
    "tei": Protocol("/embed_all", _tei_body_without_length, _tei_read),
    "jina": Protocol("/multi-vector", _jina_body_for_tokens, _jina_read_tokens),
}
OF_TASK = {RERANK: RERANK_PROTOCOLS, SPARSE: SPARSE_PROTOCOLS, MULTIVECTOR: MULTIVECTOR_PROTOCOLS}


def protocol_of(config: HttpConfig) -> Protocol:
    """The protocol that a driver.config names, or describes."""
    if config.task in OF_TASK:
        return OF_TASK[config.task][config.protocol]
    return PROTOCOLS.get(config.protocol) or _by_template(config)
