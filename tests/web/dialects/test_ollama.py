"""Ollama's embeddings: its shapes and statuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from werkzeug.test import TestResponse

from tests.web.conftest import NAME, Web, raw, unit

TEXTS = ["Hello, world!", "This is a test sentence."]


def ask(web: Web, given: Any = TEXTS, **fields: Any) -> TestResponse:
    return web.post("/api/embed", {"model": "m", "input": given, **fields})


def refused(answer: TestResponse, status: int) -> str:
    assert answer.status_code == status, answer.text
    assert set(answer.json) == {"error"}
    return str(answer.json["error"])


def test_the_answer_has_ollamas_shape(web: Web) -> None:
    """Normalised vectors in order, the tokens of this request, durations in nanoseconds."""
    answer = ask(web).json
    assert set(answer) == {"model", "embeddings", "total_duration", "load_duration", "prompt_eval_count"}
    np.testing.assert_allclose(answer["embeddings"], unit(raw(*TEXTS)), atol=1e-6)
    assert (answer["model"], answer["prompt_eval_count"]) == ("m", 11)
    assert isinstance(answer["total_duration"], int)


def test_one_string_is_a_list_of_one(web: Web) -> None:
    """`input` is a string or a list of strings; the older endpoint takes one `prompt`."""
    vector = ask(web, TEXTS[0]).json["embeddings"]
    np.testing.assert_allclose(vector, unit(raw(TEXTS[0])), atol=1e-6)
    legacy = web.post("/api/embeddings", {"model": "m", "prompt": TEXTS[0]}).json
    assert legacy == {"embedding": vector[0]}


def test_what_steers_ollamas_own_runtime_does_no_harm(web: Web) -> None:
    """Its clients send `options` and `keep_alive`, which mean nothing here."""
    plain = ask(web).json["embeddings"]
    assert ask(web, options={"num_ctx": 512}, keep_alive="5m", truncate=None).json["embeddings"] == plain


def test_dimensions_and_truncation(web: Web) -> None:
    """`dimensions` cuts and renormalises; a long text is cut unless the client asks for an error."""
    np.testing.assert_allclose(ask(web, dimensions=8).json["embeddings"], unit(raw(*TEXTS)[:, :8]), atol=1e-6)
    long = "word " * 600
    assert ask(web, long).status_code == 200
    assert "limit" in refused(ask(web, long, truncate=False), 400)


@pytest.mark.parametrize("name", ["m:latest", f"{NAME}:latest"])
def test_a_tag_that_a_client_adds_is_no_part_of_the_name(web: Web, name: str) -> None:
    """`:latest` finds the model of the bare name; another tag does not."""
    assert ask(web, model=name).status_code == 200
    refused(ask(web, model="m:v2"), 404)


def test_bad_input_is_a_sentence(web: Web) -> None:
    """400 for a body, 404 with near names for a model."""
    refused(ask(web, [1]), 400)
    refused(ask(web, dimension=8), 400)
    assert NAME in refused(ask(web, model="team/m"), 404)


def test_tags_lists_the_models(web: Web) -> None:
    """GET /api/tags shows each model under its name and its alias, with the tag that Ollama would give it."""
    assert [entry["name"] for entry in web.get("/api/tags").json["models"]] == [f"{NAME}:latest", "m:latest"]
