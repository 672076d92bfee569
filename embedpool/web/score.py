"""Scores at the root: POST /rerank and /score, which are ours and those of infinity and vLLM at once.

What other paths share of it: options, documents in all forms, the choice of a model, the order of results.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from flask import Blueprint, Response
from marshmallow import fields, validate

from embedpool.config.fields import StrictBoolean, StrictInteger, StrictSchema
from embedpool.config.settings import Limits, Settings
from embedpool.errors import EmbedpoolError, InvalidRequest, as_document
from embedpool.pool.pool import Pool
from embedpool.pool.request import Result
from embedpool.tasks.by_vectors import Cosine, MaxSim
from embedpool.tasks.multivector import MultiVector
from embedpool.tasks.score import Parts, Rerank, ScoreOptions, best_first, scores_of
from embedpool.web import submit
from embedpool.web.body import read_document
from embedpool.web.compat import CompatSchema, YesOrNo, known, names_able
from embedpool.web.dialects import tei
from embedpool.web.encoding import errors_of, json_response, timing
from embedpool.web.http_request import here
from embedpool.web.schemas import TEXT_OR_TEXTS, check_texts, load

WAYS = (MaxSim, Cosine)  # of POST /score
NO_MODEL = ("default/not-specified",)  # as infinity's client says it


class ScoreOptionsSchema(StrictSchema):
    """`options` of /rerank, /score and /classify."""

    raw_scores = StrictBoolean()
    truncate = fields.String(validate=validate.OneOf(("error", "left", "right")))
    long_documents = fields.String(validate=validate.OneOf(("truncate", "chunk", "error")))
    max_tokens_per_doc = StrictInteger(validate=validate.Range(min=1))
    max_seq_length = StrictInteger(validate=validate.Range(min=1))
    instruction = fields.String()
    prompt_name = fields.String()
    on_error = fields.String(validate=validate.OneOf(("fail", "partial")))


class CommonScoreOptions(CompatSchema):
    """Options in the words of all these APIs."""

    model = fields.String()
    options = fields.Nested(ScoreOptionsSchema, load_default=dict)
    raw_scores = YesOrNo()
    use_activation = YesOrNo()  # vLLM: the other way round
    truncation = YesOrNo()  # Voyage, Jina
    truncate_prompt_tokens = StrictInteger(validate=validate.Range(min=-1))  # vLLM; -1 is the model's own
    max_tokens_per_doc = StrictInteger(validate=validate.Range(min=0))  # Cohere, vLLM; 0 is off
    instruction = fields.String()
    instruct = fields.String()  # SGLang
    prompt = fields.String()
    prompt_name = fields.String()


class RerankSchema(CommonScoreOptions):
    """Body of /rerank, and of the same at other paths."""

    query = fields.Raw(required=True, metadata={"type": "string"})
    documents = fields.Raw(required=True, metadata={"type": "array", "items": {}})
    top_n = StrictInteger(validate=validate.Range(min=0, error="must be 0 or more"))
    top_k = StrictInteger(validate=validate.Range(min=0, error="must be 0 or more"))  # Voyage
    return_documents = YesOrNo(load_default=False)
    rank_fields = fields.List(fields.String())  # Cohere


class ScoreSchema(CommonScoreOptions):
    """Body of /score: two sides, in one of vLLM's words for them."""

    queries = fields.Raw(metadata=TEXT_OR_TEXTS)
    documents = fields.Raw(metadata=TEXT_OR_TEXTS)
    items = fields.Raw(metadata=TEXT_OR_TEXTS)
    text_1 = fields.Raw(metadata=TEXT_OR_TEXTS)
    text_2 = fields.Raw(metadata=TEXT_OR_TEXTS)
    data_1 = fields.Raw(metadata=TEXT_OR_TEXTS)
    data_2 = fields.Raw(metadata=TEXT_OR_TEXTS)


def blueprint(pool: Pool, settings: Settings) -> Blueprint:
    """The routes that score."""
    limits = settings.limits
    routes = Blueprint("score", __name__)

    @routes.post("/rerank")
    def rerank() -> Response:
        document = read_document(here(), limits, whatever_type=True)
        if "texts" in document and "documents" not in document:  # TEI's, at the root of its host
            return tei.rerank_at_the_root(pool, settings, document)
        body, result, documents = reranked(pool, limits, document)
        answer = {
            "id": here().id,
            "object": "rerank",
            "model": result.model,
            "created": int(time.time()),
            "results": ranked(body, result, documents, with_score=True),
            **failures(body, result),
            "usage": usage(result),
            # A plain number of tokens breaks LiteLLM's hosted_vllm, which reads meta as Cohere's.
            "meta": {"count": len(documents), **timing(result), "tokens": cohere_tokens(result)},
        }
        return json_response(answer)

    @routes.post("/score")
    @routes.post("/v1/score")
    def score() -> Response:
        return _scored(pool, limits)

    return routes


def score_options(body: Mapping[str, Any], limits: Limits) -> ScoreOptions:
    """The task's options of a loaded body; `options` count before its other fields. Raises InvalidRequest."""
    found: dict[str, Any] = {}
    if "truncation" in body:
        found["truncate"] = "right" if body["truncation"] else "error"
    for name, meant in (("max_tokens_per_doc",) * 2, ("truncate_prompt_tokens", "max_seq_length")):
        if body.get(name, 0) > 0:
            found[meant] = body[name]
    for name in ("instruction", "instruct", "prompt"):
        if name in body:
            found["instruction"] = body[name]
    if "prompt_name" in body:
        found["prompt_name"] = body["prompt_name"]
    found |= {name: value for name, value in body["options"].items() if name != "raw_scores"}
    check_texts([found.get("instruction", "")], limits, "instruction")
    return ScoreOptions(**found)


# --- reranking


def reranked(pool: Pool, limits: Limits, document: Mapping[str, Any]) -> tuple[dict[str, Any], Result, list[Any]]:
    """The body of a rerank, its result, and the documents as they were given."""
    body = load(RerankSchema, document)
    query = text_of(body["query"], "query")
    given = body["documents"] if isinstance(body["documents"], list) else [body["documents"]]
    texts = [text_of(one, f"documents[{i}]", body.get("rank_fields", ())) for i, one in enumerate(given)]
    check_texts(texts, limits, "documents")
    check_texts([query], limits, "query")
    name = the_model(pool, body.get("model"), Rerank.name)
    result = submit.score(here(), pool, name, Rerank([(query, text) for text in texts], score_options(body, limits)))
    return body, result, given


def ranked(
    body: Mapping[str, Any], result: Result, documents: Sequence[Any], *, with_score: bool = False
) -> list[dict[str, Any]]:
    """The best first, by logit, those alike in the order of the request; as many as were asked for.

    A document that failed is not among them.
    """
    scores = chosen(body, result)
    there = [i for i, row in enumerate(scores) if row is not None]
    order = best_first(scores_of(result.vectors, raw=True)[there, :1].ravel())
    found = []
    for i in [there[place] for place in order[: body.get("top_n") or body.get("top_k") or None]]:
        entry: dict[str, Any] = {"index": i, "relevance_score": scores[i][0]}
        if with_score:
            entry["score"] = scores[i][0]
        if body.get("return_documents"):
            entry["document"] = documents[i] if isinstance(documents[i], dict) else {"text": documents[i]}
        found.append(entry)
    return found


def chosen(body: Mapping[str, Any], result: Result) -> list[Any]:
    """Of each input the scores, or the logits if the body asks for these; None of one that failed."""
    raw = body["options"].get("raw_scores", body.get("raw_scores", not body.get("use_activation", True)))
    return [None if i in result.errors else row for i, row in enumerate(scores_of(result.vectors, raw=raw))]


def failures(body: Mapping[str, Any], result: Result) -> dict[str, Any]:
    """`errors` of an answer to a body that goes on without the inputs that fail."""
    return errors_of(result) if body["options"].get("on_error") == "partial" else {}


def text_of(given: Any, path: str, rank_fields: Sequence[str] = ()) -> str:
    """A text, or what an object has: `rank_fields`, `text` or `content`, else all its texts. Raises InvalidRequest."""
    if isinstance(given, str):
        return given
    if isinstance(given, dict):
        if rank_fields:
            return "\n".join(str(given[name]) for name in rank_fields if name in given)
        for name in ("text", "content"):
            if isinstance(given.get(name), str):
                return str(given[name])
        if isinstance(given.get("content"), list):
            return "\n".join(
                str(part["text"]) for part in given["content"] if isinstance(part, dict) and "text" in part
            )
        if texts := [value for value in given.values() if isinstance(value, str)]:
            return "\n".join(texts)
    message = "must be a text, or an object with a text"
    raise InvalidRequest(f"{path}: {message}", fields={path: message})


def the_model(pool: Pool, name: str | None, task: str) -> str:
    """The model of this name; where none is named the only one that can do the task. Raises InvalidRequest."""
    if name and name not in NO_MODEL:
        return known(pool, name)
    visible = here().caller.visible(pool)
    able = names_able(visible, task)
    if not able and task == Rerank.name:
        able = names_able(visible, MultiVector.name)
    if len(able) == 1:
        return able[0]
    says = f"name one of {', '.join(able)}" if able else f"no registered model can {task}"
    raise InvalidRequest(f"model: {says}", fields={"model": says})


def usage(result: Result) -> dict[str, int]:
    """Tokens of all pairs as they were run, the query counted with each document."""
    return {"prompt_tokens": result.tokens, "total_tokens": result.tokens}


def cohere_tokens(result: Result) -> dict[str, int]:
    """The same in the words of Cohere's `meta`."""
    return {"input_tokens": result.tokens, "output_tokens": 0}


def beside(result: Result, count: int, **meta: Any) -> dict[str, Any]:
    """What an answer says beside its scores."""
    return {
        "id": here().id,
        "model": result.model,
        "created": int(time.time()),
        "usage": usage(result),
        "meta": {"count": count, **timing(result), **meta},
    }


# --- scoring pairs


def _scored(pool: Pool, limits: Limits) -> Response:
    """In the order of the request; of an embedder the cosine, of a multi-vector model the sum of the best products."""
    body = load(ScoreSchema, read_document(here(), limits, whatever_type=True))
    first, second, names = _sides(body)
    pairs = _pairs(first, second)
    for side, name in enumerate(names):
        check_texts([pair[side] for pair in pairs], limits, name)
    name = the_model(pool, body.get("model"), Rerank.name)
    result = submit.score(here(), pool, name, Rerank(pairs, score_options(body, limits), names[1]), also=WAYS)
    way = submit.way_of(pool, name, WAYS)
    scoring = {"scoring": way.scoring} if way else {}
    scores = [row if row is None else row[0] for row in chosen(body, result)]
    data = [{"index": i, "object": "score", "score": score, "relevance_score": score} for i, score in enumerate(scores)]
    answer = {"object": "list", "data": data, **failures(body, result), **beside(result, len(pairs), **scoring)}
    return json_response(answer)


SIDES = (("queries", "documents"), ("queries", "items"), ("text_1", "text_2"), ("data_1", "data_2"))


def _sides(body: Mapping[str, Any]) -> tuple[list[str], list[str], tuple[str, str]]:
    """Both sides, and what they are called. Raises InvalidRequest."""
    for names in SIDES:
        if all(name in body for name in names):
            first, second = ([body[name]] if not isinstance(body[name], list) else body[name] for name in names)
            return [text_of(one, names[0]) for one in first], [text_of(one, names[1]) for one in second], names
    message = f"give {', or '.join(' and '.join(names) for names in SIDES)}"
    raise InvalidRequest(f"documents: {message}", fields={"documents": message})


def _pairs(first: list[str], second: list[str]) -> list[Parts]:
    """One to one, or one query to many documents. Raises InvalidRequest."""
    if len(first) == 1:
        first = first * len(second)
    if len(first) != len(second):
        message = f"{len(first)} and {len(second)}: must be 1:1, 1:N or N:N"
        raise InvalidRequest(f"documents: {message}", fields={"documents": message})
    return list(zip(first, second, strict=True))


def shape(error: EmbedpoolError, request_id: str) -> tuple[dict[str, Any], int]:
    """Ours, and beside it what clients of others read: `message` and `detail`."""
    return {**as_document(error, request_id), "message": error.message, "detail": error.message}, error.status


SHAPES = dict.fromkeys(("/rerank", "/score"), shape)
