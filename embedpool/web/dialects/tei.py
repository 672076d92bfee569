"""text-embeddings-inference: the base URL /tei/<model or alias> stands for one such server."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import quote

from flask import Blueprint, Response, request
from marshmallow import fields, validate

from embedpool import __version__
from embedpool.config.settings import Limits, Settings
from embedpool.errors import (
    EmbedpoolError,
    EmptyInput,
    InvalidRequest,
    ModelFailed,
    TooManyTexts,
    UnsupportedTask,
    half_a_character,
    with_half_a_character,
)
from embedpool.pool.pool import Pool
from embedpool.tasks.embed import INPUT_TYPES, EmbedOptions, prompt_of, routed
from embedpool.tasks.multivector import MultiVector
from embedpool.tasks.score import Classify, Rerank
from embedpool.tasks.sparse import Sparse
from embedpool.web import submit
from embedpool.web.body import read_document, read_json
from embedpool.web.compat import CompatSchema, YesOrNo, known, names_able
from embedpool.web.dialects import CommonOptions, Truncate, openai, options_of, part_of, tei_scores, texts_of
from embedpool.web.dialects.tei_scores import timed
from embedpool.web.encoding import forms_of, json_response
from embedpool.web.http_request import here
from embedpool.web.schemas import TEXT_OR_TEXTS, TEXTS, check_texts, embed_options, load

Action = Callable[[Pool, Settings, str], Response]

TOKEN_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": (1 << 32) - 1}}
PROMPT_HEADER = "X-Embedpool-Prompt"  # of an answer with tokens: what stands before each text, percent-encoded
MOST_TOKENIZED = 262_144  # characters, or ids, of a request to /tokenize or /decode


class TeiParameters(CommonOptions):
    """What /embed takes beside its inputs, and /similarity under `parameters`."""

    truncate = Truncate(metadata=part_of("truncate"))
    truncation_direction = fields.String(
        validate=validate.OneOf(("Left", "Right", "left", "right")), metadata=part_of("truncate")
    )


class TeiSchema(TeiParameters):
    """Body of POST /tei/<model> and of its /embed."""

    inputs = fields.Raw(required=True, metadata=TEXT_OR_TEXTS)


class SentencesSchema(CompatSchema):
    """`inputs` of /similarity."""

    source_sentence = fields.String(required=True)
    sentences = fields.Raw(required=True, metadata=TEXTS)


class SimilaritySchema(CompatSchema):
    """Body of /similarity."""

    inputs = fields.Nested(SentencesSchema, required=True)
    parameters = fields.Nested(TeiParameters, load_default=dict)


class TokenizeSchema(CompatSchema):
    """Body of /tokenize."""

    inputs = fields.Raw(required=True, metadata=TEXT_OR_TEXTS)
    add_special_tokens = YesOrNo(load_default=True)
    prompt_name = fields.String()
    input_type = fields.String(validate=validate.OneOf(INPUT_TYPES))


class DecodeSchema(CompatSchema):
    """Body of /decode."""

    ids = fields.Raw(required=True, metadata={"oneOf": [TOKEN_IDS, {"type": "array", "items": TOKEN_IDS}]})
    skip_special_tokens = YesOrNo(load_default=True)


def blueprint(pool: Pool, settings: Settings) -> Blueprint:
    """POST to the base URL and to its POSTS, GET its GETS; at the root of the server they are of the default model."""
    routes = Blueprint("tei", __name__)

    @routes.post("/tei/<path:name>")
    def post(name: str) -> Response:
        name, action = _target(pool, name, POSTS)
        here().caller.require(pool, name)
        return POSTS[action](pool, settings, name)

    @routes.get("/tei/<path:name>")
    def get(name: str) -> Response:
        name, action = _target(pool, name, GETS)
        here().caller.require(pool, name)
        return GETS[action](pool, settings, name)

    def at_the_root(actions: Mapping[str, Action], action: str) -> Response:
        here().shape = tei_shape
        return actions[action](pool, settings, _default(pool, settings, TASKS_AT_THE_ROOT.get(action, "")))

    for method, actions, names in (("POST", POSTS, POSTS_AT_THE_ROOT), ("GET", GETS, GETS_AT_THE_ROOT)):
        for name in names:
            view = functools.partial(at_the_root, actions, name)
            routes.add_url_rule(f"/{name}", f"root {method} {name}", view, methods=[method])
    return routes


def embed_at_the_root(pool: Pool, settings: Settings, document: Mapping[str, Any]) -> Response:
    """The answer to POST /embed with a body of TEI's."""
    here().shape = tei_shape
    return _embedded(pool, settings, _default(pool, settings), load(TeiSchema, document))


def _default(pool: Pool, settings: Settings, task: str = "") -> str:
    """The model that is meant where no path names one: tei.default_model, the only one, or the only one for the task.

    Raises InvalidRequest and Forbidden.
    """
    enabled = [served for served in here().caller.visible(pool) if served.spec.enabled]
    able = names_able(enabled, task) if task else [served.spec.model for served in enabled]
    if settings.tei.default_model and (not task or settings.tei.default_model in able):
        name = known(pool, settings.tei.default_model)
    elif len(able) == 1:
        (name,) = able
    else:
        raise InvalidRequest(
            f"this server has {len(able)} models{f' that can {task}' * bool(task)}: name one in the path, "
            "/tei/<model>, or set tei.default_model"
        )
    here().caller.require(pool, name)
    return name


def _target(pool: Pool, path: str, actions: Mapping[str, Action]) -> tuple[str, str]:
    """Model and action of a path; names hold slashes, and a whole name wins over one with a suffix."""
    name = known(pool, path)
    if not pool.knows(name):
        for action in filter(None, actions):
            if path.rstrip("/").endswith(f"/{action}"):
                return known(pool, path.rstrip("/").removesuffix(f"/{action}")), action
    return name, ""


def _embed(pool: Pool, settings: Settings, name: str) -> Response:
    return _embedded(pool, settings, name, read_json(here(), TeiSchema, settings.limits))


def _whatever_it_is(pool: Pool, settings: Settings, name: str) -> Response:
    """At a model's URL itself: what the body asks for, and of inputs what the model can."""
    document = read_document(here(), settings.limits, whatever_type=True)
    if "query" in document:
        return tei_scores.reranked(pool, settings, name, load(tei_scores.TeiRerankSchema, document))
    kinds = pool.find(name).kinds_at_all()
    if Classify.name in kinds:
        return tei_scores.predicted(pool, settings, name, load(tei_scores.TeiPredictSchema, document))
    body = load(TeiSchema, document)
    return _embedded(pool, settings, name, body) if kinds != [Sparse.name] else _sparse(pool, settings, name, body)


def _embedded(pool: Pool, settings: Settings, name: str, body: Mapping[str, Any]) -> Response:
    texts = texts_of(body["inputs"], settings.limits, "inputs")
    result = submit.embed(here(), pool, name, texts, embed_options(_options(pool, name, body)))
    return timed(json_response(result.vectors), result)


def rerank_at_the_root(pool: Pool, settings: Settings, document: Mapping[str, Any]) -> Response:
    """The answer to POST /rerank with a body of TEI's."""
    here().shape = tei_shape
    return tei_scores.reranked(
        pool, settings, _default(pool, settings, Rerank.name), load(tei_scores.TeiRerankSchema, document)
    )


def _embed_sparse(pool: Pool, settings: Settings, name: str) -> Response:
    return _sparse(pool, settings, name, read_json(here(), TeiSchema, settings.limits))


def _sparse(pool: Pool, settings: Settings, name: str, body: Mapping[str, Any]) -> Response:
    texts = texts_of(body["inputs"], settings.limits, "inputs")
    options = embed_options(_options(pool, name, body, is_dense=False))
    result = submit.embed(here(), pool, name, texts, options, wanted=["sparse"])
    rows = [
        [{"index": i, "value": v} for i, v in zip(row["indices"], row["values"], strict=True)]
        for row in forms_of(result.rows, "float")
    ]
    return timed(json_response(rows), result)


def _embed_all(pool: Pool, settings: Settings, name: str) -> Response:
    """Of a multi-vector model its vectors, else those that tokens have before they are pooled."""
    body = read_json(here(), TeiSchema, settings.limits)
    texts = texts_of(body["inputs"], settings.limits, "inputs")
    options = embed_options(_options(pool, name, body, is_dense=False))
    if MultiVector.name in pool.find(name).kinds_at_all():
        result = submit.embed(here(), pool, name, texts, options, wanted=["multivector"])
    else:
        result = submit.tokens(here(), pool, name, texts, options)
    return timed(json_response(forms_of(result.rows, "float")), result)


def _similarity(pool: Pool, settings: Settings, name: str) -> Response:
    body = read_json(here(), SimilaritySchema, settings.limits)
    check_texts([body["inputs"]["source_sentence"]], settings.limits, "inputs.source_sentence")
    sentences = check_texts(body["inputs"]["sentences"], settings.limits, "inputs.sentences")
    options = {**_options(pool, name, body["parameters"]), "normalize": True, "dtype": "float32"}
    texts = [body["inputs"]["source_sentence"], *sentences]
    result = submit.embed(here(), pool, name, texts, embed_options(options), forms=())  # a number for each
    return timed(json_response(result.vectors[1:] @ result.vectors[0]), result)


def _options(pool: Pool, name: str, body: Mapping[str, Any], *, is_dense: bool = True) -> dict[str, Any]:
    """A long text is cut unless the client wants an error; a remote service is left to its own default."""
    options = options_of(TeiSchema, body)
    if is_dense:
        options.setdefault("normalize", True)
    else:  # TEI's clients send it to all of its paths
        options.pop("normalize", None)
    truncate, truncation = body.get("truncate"), options.get("truncate")
    if truncate and truncation and (truncate == "error") != (truncation == "error"):
        message = "contradicts truncation"
        raise InvalidRequest(f"truncate: {message}", fields={"truncate": message})
    policy = truncate or truncation
    side = body.get("truncation_direction", "").lower()
    if policy == "right" and side:
        policy = side
    if policy is None and (side or not pool.find(name).spec.driver.config.is_remote):
        policy = side or "right"
    if policy is not None:
        options["truncate"] = policy
        here().words["options.truncate"] = "truncate"
    return options


def _tokenize(pool: Pool, settings: Settings, name: str) -> Response:
    body = read_json(here(), TokenizeSchema, settings.limits)
    texts = texts_of(body["inputs"], settings.limits, "inputs")
    _bound(sum(map(len, texts)), "characters")
    if broken := with_half_a_character(texts):
        raise half_a_character(broken, "inputs")
    options = EmbedOptions(prompt_name=body.get("prompt_name"), input_type=body.get("input_type"))
    with pool.permit():
        served = pool.find(name)
        tokenizer = served.tokenizer()
        prompt, _ = prompt_of(options, served.spec.driver.config, tokenizer)
        of_route = routed(options, tokenizer) if options.input_type is not None else tokenizer
        found = of_route.tokens([prompt + text for text in texts], special=body["add_special_tokens"])
        answer = json_response([[token._asdict() for token in tokens] for tokens in found])
    answer.headers[PROMPT_HEADER] = quote(prompt)
    return answer


def _decode(pool: Pool, settings: Settings, name: str) -> Response:
    body = read_json(here(), DecodeSchema, settings.limits)
    ids = _ids_of(body["ids"], settings.limits)
    _bound(sum(map(len, ids)), "ids")
    with pool.permit():
        return json_response(pool.find(name).tokenizer().decode(ids, skip_special=body["skip_special_tokens"]))


def _bound(count: int, what: str) -> None:
    """A token takes a hundred times the room of its text."""
    if count > MOST_TOKENIZED:
        raise TooManyTexts(f"{count} {what}, the limit of a request for tokens is {MOST_TOKENIZED}")


def _ids_of(given: Any, limits: Limits) -> list[list[int]]:
    """A list of token ids, or of such lists."""
    rows = given if isinstance(given, list) and given and isinstance(given[0], list) else [given]
    if len(rows) > limits.max_texts_per_request:
        raise TooManyTexts(f"ids: {len(rows)} lists, the limit of a request is {limits.max_texts_per_request}")
    for row in rows:
        if not isinstance(row, list) or not all(type(i) is int and 0 <= i < 1 << 32 for i in row):
            raise InvalidRequest(
                "ids: must be token ids", fields={"ids": "must be a list of token ids, or of such lists"}
            )
    return rows


def _info(pool: Pool, settings: Settings, name: str) -> Response:
    served = pool.find(name)
    return json_response(
        {
            "model_id": served.spec.model,
            "model_sha": None,
            "model_dtype": served.snapshot()["runs_on"].get("compute_dtype"),
            "model_type": tei_scores.model_type(served),
            "max_concurrent_requests": pool.max_inflight_global,
            "max_input_length": served.max_tokens(),
            "max_client_batch_size": settings.limits.max_texts_per_request,
            "auto_truncate": True,
            "version": __version__,
        }
    )


def _health(pool: Pool, settings: Settings, name: str) -> Response:
    served = pool.find(name)
    if served.is_serving and not pool.draining:
        return Response()
    # Not raised: a probe that asks each second is no event for the log.
    return json_response(*tei_shape(ModelFailed(f"{served.spec.model!r} is {served.state}"), ""))


POSTS: dict[str, Action] = {
    "": _whatever_it_is,
    "embed": _embed,
    "embed_all": _embed_all,
    "embed_sparse": _embed_sparse,
    "rerank": tei_scores.rerank,
    "predict": tei_scores.predict,
    "similarity": _similarity,
    "tokenize": _tokenize,
    "decode": _decode,
    "v1/embeddings": openai.embed,
    "embeddings": openai.embed,
}
GETS: dict[str, Action] = {"": _info, "info": _info, "health": _health, "ping": _health}
POSTS_AT_THE_ROOT = ("", "similarity", "tokenize", "decode", "embed_all", "embed_sparse", "predict")
TASKS_AT_THE_ROOT = {"embed_sparse": Sparse.name}  # whose only model is meant
GETS_AT_THE_ROOT = ("info", "ping")


def tei_shape(error: EmbedpoolError, request_id: str) -> tuple[dict[str, Any], int]:
    """TEI's error and status; an OpenAI client below a model's URL is answered as one."""
    if request.path.endswith("/embeddings"):
        return openai.openai_shape(error, request_id)
    if isinstance(error, EmptyInput):
        kind, status = "Empty", 400
    elif isinstance(error, UnsupportedTask):
        kind, status = "Backend", 424
    elif error.status in (400, 413, 415, 422):
        kind, status = "Validation", 422
    elif error.status in (429, 503):
        kind, status = {429: "Overloaded", 503: "Unhealthy"}[error.status], error.status
    elif error.status >= 500:
        kind, status = "Backend", 424
    else:
        kind, status = "Validation", error.status
    return {"error": error.message, "error_type": kind}, status


SHAPES = {"/tei/": tei_shape}
