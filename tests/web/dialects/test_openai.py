"""OpenAI's embeddings API: its shapes, its statuses, and the semantics that others get wrong."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import pytest
from werkzeug.test import TestResponse

from embedpool.config.settings import Defaults, OpenAI, Settings
from tests.web.conftest import MODEL, NAME, MakeWeb, Web, raw, unit

TEXTS = ["Hello, world!", "This is a test sentence."]


def ask(web: Web, given: Any = TEXTS, path: str = "/v1/embeddings", **fields: Any) -> TestResponse:
    return web.post(path, {"model": "m", "input": given, **fields})


def vectors(web: Web, given: Any = TEXTS, **fields: Any) -> np.ndarray:
    answer = ask(web, given, **fields)
    assert answer.status_code == 200, answer.text
    return np.array([entry["embedding"] for entry in answer.json["data"]])


def decoded(web: Web, dtype: str, **fields: Any) -> np.ndarray:
    """The base64 vectors of TEXTS."""
    answer = ask(web, **fields)
    assert answer.status_code == 200, answer.text
    return np.stack([np.frombuffer(base64.b64decode(entry["embedding"]), dtype) for entry in answer.json["data"]])


def refused(answer: TestResponse, status: int, kind: str) -> dict[str, Any]:
    """The error, once it is known to have OpenAI's shape."""
    assert answer.status_code == status, answer.text
    assert set(answer.json) == {"error", "detail"}
    error: dict[str, Any] = answer.json["error"]
    assert set(error) == {"message", "type", "param", "code", "request_id"}
    assert error["type"] == kind
    assert error["message"]
    return error


@pytest.mark.parametrize("path", ["/v1/embeddings", "/embeddings"])
def test_the_answer_has_openais_shape(web: Web, path: str) -> None:
    """A list of embeddings in the order of the input, and usage in real tokens of this request."""
    answer = ask(web, path=path).json
    assert set(answer) == {"id", "object", "data", "model", "usage"}
    assert (answer["object"], answer["model"]) == ("list", NAME)
    assert [(entry["object"], entry["index"]) for entry in answer["data"]] == [("embedding", 0), ("embedding", 1)]
    np.testing.assert_allclose([entry["embedding"] for entry in answer["data"]], unit(raw(*TEXTS)), atol=1e-6)
    assert answer["usage"] == {"prompt_tokens": 2 + 2 + 5 + 2, "total_tokens": 11}


def test_one_string_is_a_list_of_one(web: Web) -> None:
    """`input` is a string or a list of strings, also an empty string."""
    np.testing.assert_array_equal(vectors(web, TEXTS[0]), vectors(web, TEXTS[:1]))
    assert vectors(web, "").shape == (1, 384)


def test_base64_is_little_endian_float32(make_web: MakeWeb) -> None:
    """What the SDKs ask for unless told otherwise, whatever the model's own dtype."""
    web = make_web(MODEL + ", driver: {type: fake, config: {dtype: float16}}")
    np.testing.assert_allclose(decoded(web, "<f4", encoding_format="base64"), unit(raw(*TEXTS)), atol=1e-6)


def test_null_means_absent(web: Web) -> None:
    """LiteLLM and others send null for what they do not set."""
    nothing = dict.fromkeys(["encoding_format", "dimensions", "user", "input_type", "truncate"])
    np.testing.assert_array_equal(vectors(web, **nothing), vectors(web))


@pytest.mark.parametrize("field", ["dimensions", "output_dimension"])
def test_dimensions_cut_and_renormalise(web: Web, field: str) -> None:
    """The first numbers, of length 1 again; more than the model has is refused."""
    np.testing.assert_allclose(vectors(web, **{field: 8}), unit(raw(*TEXTS)[:, :8]), atol=1e-6)
    assert "384" in refused(ask(web, **{field: 385}), 400, "invalid_request_error")["message"]


@pytest.mark.parametrize("given", [[1, 2, 3], [[1, 2], [3]]])
def test_token_ids_may_be_refused_with_a_hint(make_web: MakeWeb, given: list[Any]) -> None:
    """A LangChain user is told what to do."""
    web = make_web(MODEL, settings=Settings(openai=OpenAI(token_ids="refuse")))
    assert "check_embedding_ctx_length=False" in refused(ask(web, given), 400, "invalid_request_error")["message"]


@pytest.mark.parametrize("field", ["input_type", "task"])
@pytest.mark.parametrize("word", ["query", "search_query", "retrieval.query"])
def test_what_a_text_is_for_chooses_the_models_prompt(web: Web, field: str, word: str) -> None:
    """Every service's word for a query finds the model's prompt for queries."""
    expected = vectors(web, [f"find: {text}" for text in TEXTS])
    np.testing.assert_array_equal(vectors(web, **{field: word}), expected)
    np.testing.assert_array_equal(vectors(web, prompt_name="query"), expected)


def test_a_model_without_such_prompts_treats_all_texts_alike(web: Web) -> None:
    """A client that always says what its texts are for works with any model; a word nobody knows is refused."""
    np.testing.assert_array_equal(vectors(web, input_type="document"), vectors(web))
    refused(ask(web, input_type="qeury"), 400, "invalid_request_error")


@pytest.mark.parametrize("field", ["output_dtype", "embedding_type"])
def test_small_vectors_are_those_of_the_native_endpoint(web: Web, field: str) -> None:
    """Voyage's and Jina's names for the same precisions."""
    for precision in ("int8", "uint8", "binary", "ubinary"):
        np.testing.assert_array_equal(vectors(web, **{field: precision}), web.vectors(*TEXTS, precision=precision))
    assert decoded(web, "i1", output_dtype="int8", encoding_format="base64").shape == (2, 384)
    assert decoded(web, "<f4", embedding_type="base64").shape == (2, 384)


@pytest.mark.parametrize("field", ["truncate", "truncation"])
def test_truncation_is_per_request(web: Web, field: str) -> None:
    """A text that is too long is cut unless the client asks for an error."""
    long = ["word " * 600]
    assert vectors(web, long, **{field: True}).shape == (1, 384)
    assert refused(ask(web, long, **{field: False}), 400, "invalid_request_error")["code"] == "text_too_long"


def test_vectors_need_not_be_normalised(web: Web) -> None:
    """Jina's `normalized: false` gives them as the model does."""
    np.testing.assert_allclose(vectors(web, normalized=False), raw(*TEXTS), atol=1e-6)


def test_two_fields_for_one_thing_must_agree(web: Web) -> None:
    """Synonyms are welcome together unless they contradict each other."""
    assert vectors(web, dimensions=8, output_dimension=8).shape == (2, 8)
    assert vectors(web, output_dtype="int8", embedding_type="int8").shape == (2, 384)
    for contradiction in ({"output_dtype": "uint8"}, {"encoding_format": "float", "embedding_type": "base64"}):
        refused(ask(web, **{"embedding_type": "int8", **contradiction}), 400, "invalid_request_error")
    answer = ask(web, dimensions=8, output_dimension=9)
    assert refused(answer, 400, "invalid_request_error")["param"] == "output_dimension"


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"model": "m"}, 400),
        ({"input": "a"}, 400),
        ({"model": "m", "input": []}, 400),
        ({"model": "m", "input": [1.5]}, 400),
        ({"model": "m", "input": ["a", None]}, 400),
        ({"model": "m", "input": "a", "encoding_format": "hex"}, 400),
        ({"model": "m", "input": "a", "dimension": 8}, 400),
        ({"model": "m", "inputs": "a"}, 400),
        ({"model": "m", "input": ["a", " "], "late_chunking": True}, 400),
        ({"model": "m", "input": "a", "return_multivector": True}, 400),
        ({"model": "m", "input": "a", "add_special_tokens": False}, 400),
        ({"model": "m", "input": "a", "truncate": "MIDDLE"}, 400),
        ({"model": "m", "input": "a", "modality": ["image"]}, 400),
        ({"model": "mm", "input": "a"}, 404),
    ],
)
def test_bad_input_gets_openais_error(web: Web, body: dict[str, Any], status: int) -> None:
    """Each with the status that makes the SDK raise its own exception."""
    refused(web.post("/v1/embeddings", body), status, "invalid_request_error")


def test_an_unknown_model_is_named_with_its_neighbours(web: Web) -> None:
    """The 404 helps to find the right name."""
    assert (
        NAME
        in refused(web.post("/v1/embeddings", {"model": "team/m", "input": "a"}), 404, "invalid_request_error")[
            "message"
        ]
    )


def test_overload_is_a_rate_limit_with_retry_after(make_web: MakeWeb) -> None:
    """The SDKs wait as long as they are told."""
    settings = Settings(defaults=Defaults(max_inflight_global=1))
    web = make_web(MODEL, settings=settings)
    with web.pool.permit():
        answer = ask(web)
    refused(answer, 429, "rate_limit_error")
    assert int(answer.headers["Retry-After"]) >= 1


def test_models_are_listed_under_name_and_alias(web: Web) -> None:
    """GET /v1/models is OpenAI's list; an unknown model is its 404."""
    listed = web.get("/v1/models").json
    assert listed["object"] == "list"
    assert [entry["id"] for entry in listed["data"]] == [NAME, "m"]
    assert web.get(f"/v1/models/{NAME}").json["id"] == NAME
    refused(web.get("/v1/models/other"), 404, "invalid_request_error")


def test_dimensions_0_is_all_of_them(web: Web) -> None:
    """infinity's own client says so where it means nothing."""
    np.testing.assert_array_equal(vectors(web, "a", dimensions=0), vectors(web, "a"))
