"""Labels of texts at the root: POST /classify, ours and infinity's, and vLLM's /v1/classify, also with labels given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flask import Blueprint, Response
from marshmallow import fields, validate

from embedpool.config.settings import Limits, Settings
from embedpool.pool.pool import Pool
from embedpool.pool.request import Result
from embedpool.tasks.embed import EmbedOptions
from embedpool.tasks.score import SOFTMAX, Classify, ScoreOptions, activated, best_first, require_none_but
from embedpool.web import submit
from embedpool.web.body import read_document
from embedpool.web.encoding import json_response
from embedpool.web.http_request import here
from embedpool.web.schemas import TEXT_OR_TEXTS, check_texts, load
from embedpool.web.score import CommonScoreOptions, beside, chosen, failures, score_options, shape, text_of, the_model


class ClassifySchema(CommonScoreOptions):
    """Body of /classify and /v1/classify; with `labels` an embedder chooses among them."""

    input = fields.Raw(required=True, metadata=TEXT_OR_TEXTS)
    labels = fields.List(fields.String(), validate=validate.Length(min=1))


def blueprint(pool: Pool, settings: Settings) -> Blueprint:
    """The routes that classify."""
    limits = settings.limits
    routes = Blueprint("classify", __name__)

    @routes.post("/classify")
    def classify() -> Response:
        body, result, labels = _classified(pool, limits)
        data = [row if row is None else _by_score(row, labels) for row in chosen(body, result)]
        return json_response(
            {"object": "classify", "data": data, **failures(body, result), **beside(result, len(data))}
        )

    @routes.post("/v1/classify")
    def classify_v1() -> Response:
        document = read_document(here(), limits, whatever_type=True)
        if document.get("labels"):
            return _among_labels(pool, limits, load(ClassifySchema, document))
        body, result, labels = _classified(pool, limits, document)
        data = [
            {
                "index": i,
                "label": row if row is None else labels[int(row.argmax())],
                "probs": row,
                "num_classes": len(labels),
            }
            for i, row in enumerate(chosen(body, result))
        ]
        return json_response({"object": "list", "data": data, **failures(body, result), **beside(result, len(data))})

    return routes


def _classified(
    pool: Pool, limits: Limits, document: Mapping[str, Any] | None = None
) -> tuple[dict[str, Any], Result, list[str]]:
    """The body, its result, and the labels."""
    body = load(ClassifySchema, document or read_document(here(), limits, whatever_type=True))
    texts = _inputs(body["input"], limits)
    name = the_model(pool, body.get("model"), Classify.name)
    task = Classify([(text,) for text in texts], score_options(body, limits), "input")
    result = submit.score(here(), pool, name, task)
    return body, result, list(pool.find(name).tokenizer().labels)


def _inputs(given: Any, limits: Limits) -> list[str]:
    rows = given if isinstance(given, list) else [given]
    return check_texts([text_of(one, f"input[{i}]") for i, one in enumerate(rows)], limits, "input")


def _by_score(row: Any, labels: Sequence[str]) -> list[dict[str, Any]]:
    """All labels, the best first."""
    return [{"label": labels[i], "score": row[i]} for i in best_first(row)]


def _among_labels(pool: Pool, limits: Limits, body: Mapping[str, Any]) -> Response:
    """Jina's classification without training: the softmax of an embedder's cosines to the labels."""
    texts, labels = _inputs(body["input"], limits), check_texts(body["labels"], limits, "labels")
    name = the_model(pool, body.get("model"), "embed")
    result = submit.embed(here(), pool, name, [*texts, *labels], _of_vectors(score_options(body, limits)), forms=())
    cosines = result.vectors[: len(texts)] @ result.vectors[len(texts) :].T
    data = []
    for i, row in enumerate(activated(cosines, SOFTMAX)):
        best = int(row.argmax())
        data.append(
            {
                "object": "classification",
                "index": i,
                "prediction": labels[best],
                "score": row[best],
                "predictions": [{"label": one, "score": score} for one, score in zip(labels, row, strict=True)],
            }
        )
    return json_response({"data": data, **beside(result, len(texts))})


def _of_vectors(options: ScoreOptions) -> EmbedOptions:
    """Of texts and labels. Raises UnsupportedOption for what pairs alone can have."""
    require_none_but(("truncate", "max_seq_length"), options, "is not for a choice among labels")
    return EmbedOptions(
        normalize=True, dtype="float32", truncate=options.truncate, max_seq_length=options.max_seq_length
    )


SHAPES = {"/classify": shape}
