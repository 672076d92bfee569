"""text-embeddings-inference: /rerank and /predict of a model that scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flask import Response
from marshmallow import fields, validate

from embedpool.config.settings import Settings
from embedpool.errors import InvalidRequest
from embedpool.pool.pool import Pool
from embedpool.pool.request import Result
from embedpool.pool.served_model import ServedModel
from embedpool.tasks.score import Classify, Rerank, ScoreOptions, best_first, scores_of
from embedpool.tasks.sparse import Sparse
from embedpool.web import submit
from embedpool.web.body import read_json
from embedpool.web.compat import CompatSchema, YesOrNo
from embedpool.web.dialects import Truncate, texts_of
from embedpool.web.encoding import json_response
from embedpool.web.http_request import here
from embedpool.web.schemas import TEXT_OR_TEXTS, TEXTS, check_texts

KIND_OF = {Rerank.name: "reranker", Classify.name: "classifier"}  # TEI's words


class TeiScoreSchema(CompatSchema):
    """What /rerank and /predict take beside their texts."""

    truncate = Truncate()
    truncation_direction = fields.String(validate=validate.OneOf(("Left", "Right", "left", "right")))
    raw_scores = YesOrNo(load_default=False)


class TeiRerankSchema(TeiScoreSchema):
    """Body of /rerank."""

    query = fields.String(required=True)
    texts = fields.Raw(required=True, metadata=TEXTS)
    return_text = YesOrNo(load_default=False)


class TeiPredictSchema(TeiScoreSchema):
    """Body of /predict."""

    inputs = fields.Raw(required=True, metadata=TEXT_OR_TEXTS)


def rerank(pool: Pool, settings: Settings, name: str) -> Response:
    """The answer to POST /rerank below a model's URL."""
    return reranked(pool, settings, name, read_json(here(), TeiRerankSchema, settings.limits))


def reranked(pool: Pool, settings: Settings, name: str, body: Mapping[str, Any]) -> Response:
    """The best first, as a bare list."""
    texts = texts_of(body["texts"], settings.limits, "texts")
    check_texts([body["query"]], settings.limits, "query")
    pairs = [(body["query"], text) for text in texts]
    result = submit.score(here(), pool, name, Rerank(pairs, _score_options(body), "texts"))
    shown = scores_of(result.vectors, raw=body["raw_scores"])[:, 0]
    found = [
        {"index": i, "score": shown[i], **({"text": texts[i]} if body["return_text"] else {})}
        for i in best_first(scores_of(result.vectors, raw=True)[:, 0])
    ]
    return timed(json_response(found), result)


def predict(pool: Pool, settings: Settings, name: str) -> Response:
    """The answer to POST /predict."""
    return predicted(pool, settings, name, read_json(here(), TeiPredictSchema, settings.limits))


def predicted(pool: Pool, settings: Settings, name: str, body: Mapping[str, Any]) -> Response:
    """A list of labels with scores, the best first; of a list of inputs a list of such lists."""
    parts, is_alone = _parts_of(body["inputs"])
    check_texts([part for pair in parts for part in pair], settings.limits, "inputs")
    served = pool.find(name)
    task = Rerank if served.can(Rerank.name) else Classify
    result = submit.score(here(), pool, name, task(parts, _score_options(body), "inputs"))
    labels = _labels_of(served)
    rows = scores_of(result.vectors, raw=body["raw_scores"])
    found = [[{"score": row[i], "label": labels[i]} for i in best_first(row)] for row in rows]
    return timed(json_response(found[0] if is_alone else found), result)


def _parts_of(given: Any) -> tuple[list[tuple[str, ...]], bool]:
    """A text, a pair, or a list of lists of one or two texts; whether it is one alone. Raises InvalidRequest."""
    if isinstance(given, str):
        return [(given,)], True
    if isinstance(given, list) and given and all(isinstance(one, str) for one in given) and len(given) <= 2:
        return [tuple(given)], True
    if (
        isinstance(given, list)
        and given
        and all(
            isinstance(one, list) and 1 <= len(one) <= 2 and all(isinstance(part, str) for part in one) for one in given
        )
    ):
        return [tuple(one) for one in given], False
    message = "must be a text, a pair of texts, or a list of lists of one or two texts"
    raise InvalidRequest(f"inputs: {message}", fields={"inputs": message})


def _score_options(body: Mapping[str, Any]) -> ScoreOptions:
    """A long document is cut unless the client says false."""
    side = body.get("truncation_direction", "right").lower()
    return ScoreOptions(truncate=side if body.get("truncate") in (None, "right", side) else str(body["truncate"]))


def model_type(served: ServedModel) -> dict[str, Any]:
    """TEI's word for the kind of a model, with its labels."""
    kind = next((kind for name, kind in KIND_OF.items() if served.can(name)), None)
    if kind is None:
        return {"embedding": {"pooling": "splade"} if served.kinds == [Sparse.name] else {}}
    labels = _labels_of(served)
    id2label = {str(i): label for i, label in enumerate(labels)}
    return {kind: {"id2label": id2label, "label2id": {label: i for i, label in enumerate(labels)}}}


def _labels_of(served: ServedModel) -> Sequence[str]:
    """Of a remote reranker what TEI calls the label of a model that names none."""
    return (
        ("LABEL_0",) if served.spec.driver.config.is_remote else (served.opened_tokenizer or served.tokenizer()).labels
    )


def timed(response: Response, result: Result) -> Response:
    """TEI's headers: milliseconds, and the tokens that were computed."""
    times = {
        "total": result.total_ms,
        "tokenization": result.measure_ms,
        "queue": result.queue_ms,
        "inference": result.compute_ms,
    }
    for name, spent_ms in times.items():
        response.headers[f"x-{name}-time"] = str(round(spent_ms))
    response.headers["x-compute-tokens"] = str(result.tokens)
    return response
