"""Cohere's embeddings: its shapes, types and statuses."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import pytest
from werkzeug.test import TestResponse

from tests.web.conftest import NAME, Web, raw, unit

TEXTS = ["Hello, world!", "This is a test sentence."]


def ask(web: Web, texts: Any = TEXTS, at: str = "/v2/embed", **fields: Any) -> TestResponse:
    return web.post(at, {"model": "m", "texts": texts, **fields})


def refused(answer: TestResponse, status: int) -> str:
    assert answer.status_code == status, answer.text
    assert set(answer.json) == {"id", "message"}
    return str(answer.json["message"])


def test_the_answer_has_coheres_shape(web: Web) -> None:
    """Floats unless asked otherwise, the texts again, and the tokens of this request."""
    answer = ask(web, input_type="search_document")
    assert set(answer.json) == {"id", "embeddings", "texts", "meta"}
    assert answer.json["id"] == answer.headers["X-Request-Id"]
    assert answer.json["texts"] == TEXTS
    assert answer.json["meta"]["billed_units"] == {"input_tokens": 11}
    assert set(answer.json["embeddings"]) == {"float"}
    np.testing.assert_allclose(answer.json["embeddings"]["float"], unit(raw(*TEXTS)), atol=1e-6)


def test_every_type_comes_from_one_computation(web: Web) -> None:
    """Each is what POST /embed gives for that precision; the texts are computed once."""
    types = ["float", "int8", "uint8", "binary", "ubinary", "base64"]
    computed = web.status("m")["counters"]["rows"]
    found = ask(web, embedding_types=types, output_dimension=64).json["embeddings"]
    assert web.status("m")["counters"]["rows"] == computed + len(TEXTS)
    assert list(found) == types
    for name in ("int8", "uint8", "binary", "ubinary"):
        np.testing.assert_array_equal(found[name], web.vectors(*TEXTS, precision=name, dimensions=64))
    decoded = [np.frombuffer(base64.b64decode(one), dtype="<f4") for one in found["base64"]]
    np.testing.assert_allclose(decoded, found["float"], atol=1e-7)


def test_inputs_may_be_parts(web: Web) -> None:
    """`inputs` holds lists of text parts, which are joined; pictures are refused."""
    inputs = [{"content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    answer = web.post("/v2/embed", {"model": "m", "inputs": inputs})
    np.testing.assert_allclose(answer.json["embeddings"]["float"], unit(raw("a\nb")), atol=1e-6)
    picture = [{"content": [{"type": "image_url", "image_url": {"url": "data:"}}]}]
    assert "inputs[0].content[0]" in refused(web.post("/v2/embed", {"model": "m", "inputs": picture}), 400)
    assert "either" in refused(web.post("/v2/embed", {"model": "m", "inputs": inputs, "texts": ["a"]}), 400)
    assert "either" in refused(web.post("/v2/embed", {"model": "m"}), 400)


def test_truncation_and_input_type(web: Web) -> None:
    """START and END say which end goes, NONE that a long text is an error; input_type chooses the model's prompt."""
    words = " ".join(f"w{i}" for i in range(600))
    for said, means in (("START", "left"), ("END", "right")):
        found = ask(web, [words], truncate=said).json["embeddings"]["float"]
        np.testing.assert_allclose(found, web.vectors(words, truncate=means), atol=1e-6)
    assert "limit" in refused(ask(web, [words], truncate="NONE"), 400)
    found = ask(web, ["a b c"], max_tokens=4).json["embeddings"]["float"]
    np.testing.assert_allclose(found, web.vectors("a b c", max_seq_length=4), atol=1e-6)
    found = ask(web, ["a"], input_type="search_query").json["embeddings"]["float"]
    np.testing.assert_allclose(found, unit(raw("find: a")), atol=1e-6)


def test_the_older_endpoint(web: Web) -> None:
    """/v1/embed gives a plain list, or vectors by type where types are asked for."""
    plain = ask(web, at="/v1/embed").json
    assert plain["response_type"] == "embeddings_floats"
    np.testing.assert_allclose(plain["embeddings"], unit(raw(*TEXTS)), atol=1e-6)
    typed = ask(web, at="/v1/embed", embedding_types=["int8"]).json
    assert typed["response_type"] == "embeddings_by_type"
    assert set(typed["embeddings"]) == {"int8"}


@pytest.mark.parametrize(
    "fields",
    [{"embedding_types": []}, {"embedding_types": ["int4"]}, {"truncate": "MIDDLE"}, {"dimension": 8}, {"texts": [1]}],
)
def test_bad_input_is_a_sentence(web: Web, fields: dict[str, Any]) -> None:
    """400 for a body, which names the field."""
    assert next(iter(fields)) in refused(web.post("/v2/embed", {"model": "m", "texts": TEXTS, **fields}), 400)


def test_an_unknown_model_is_not_found(web: Web) -> None:
    """404 with near names."""
    assert NAME in refused(ask(web, model="team/m"), 404)
