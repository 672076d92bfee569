"""text-embeddings-inference: its paths below a model's name, its shapes, statuses and headers."""

from __future__ import annotations

from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest
from werkzeug.test import TestResponse

from embedpool.config.settings import Defaults, Settings
from embedpool.errors import Overloaded
from embedpool.tasks.embed import Embed
from tests.web.conftest import MODEL, NAME, MakeWeb, Web, raw, unit

TEXTS = ["Hello, world!", "This is a test sentence."]
LONG = "word " * 600


def ask(web: Web, inputs: Any = TEXTS, at: str = "/tei/m/embed", **fields: Any) -> TestResponse:
    return web.post(at, {"inputs": inputs, **fields})


def vectors(web: Web, inputs: Any = TEXTS, **fields: Any) -> np.ndarray:
    answer = ask(web, inputs, **fields)
    assert answer.status_code == 200, answer.text
    return np.array(answer.json)


def refused(answer: TestResponse, status: int, kind: str) -> str:
    assert answer.status_code == status, answer.text
    assert set(answer.json) == {"error", "error_type"}
    assert answer.json["error_type"] == kind
    return str(answer.json["error"])


@pytest.mark.parametrize("at", ["/tei/m", "/tei/m/embed", f"/tei/{NAME}", f"/tei/{NAME}/embed"])
def test_a_base_url_stands_for_a_server_of_one_model(web: Web, at: str) -> None:
    """By name or alias, at the URL itself or its /embed: always a list of vectors, normalised, with TEI's headers."""
    answer = ask(web, at=at)
    np.testing.assert_allclose(answer.json, unit(raw(*TEXTS)), atol=1e-6)
    assert answer.headers["x-compute-tokens"] == "11"
    assert all(answer.headers[f"x-{name}-time"].isdigit() for name in ("total", "tokenization", "queue", "inference"))
    assert vectors(web, TEXTS[0], at=at).shape == (1, 384)


def test_a_whole_name_wins_over_a_suffix(make_web: MakeWeb) -> None:
    """A model may be called like a path of TEI."""
    web = make_web("model: org/embed, alias: a")
    assert ask(web, at="/tei/org/embed").status_code == 200
    assert ask(web, at="/tei/org/embed/embed").status_code == 200
    assert "org/embed" in refused(ask(web, at="/tei/org"), 404, "Validation")


def test_a_long_text_is_cut_unless_the_client_wants_an_error(web: Web) -> None:
    """`truncate` is true by default, and told in a header; `truncation_direction` says which end goes."""
    assert ask(web, ["a", LONG]).headers["X-Embedpool-Truncated-Texts"] == "1"
    assert "inputs[0] has 602 tokens" in refused(ask(web, LONG, truncate=False), 422, "Validation")
    words = " ".join(f"w{i}" for i in range(600))
    for direction in ("Left", "Right"):
        cut = vectors(web, words, truncate=True, truncation_direction=direction)
        np.testing.assert_array_equal(cut, web.vectors(words, truncate=direction.lower()))


def test_a_remote_service_is_left_to_its_own_default(make_web: MakeWeb, monkeypatch: pytest.MonkeyPatch) -> None:
    """Truncation is asked of a remote model only where the client says something about it; not all can be asked."""
    web = make_web("model: r, driver: {type: http, config: {base_url: 'http://127.0.0.1:9'}}", wait=False)
    asked: list[str | None] = []

    def submit(model: str, task: Embed, call: object) -> None:
        asked.append(task.options.truncate)
        raise Overloaded("enough")

    monkeypatch.setattr(web.pool, "submit", submit)
    for fields in ({}, {"truncate": None}, {"truncate": False}, {"truncate": True, "truncation_direction": "Left"}):
        ask(web, at="/tei/r", **fields)
    assert asked == [None, None, "error", "left"]


def test_options(make_web: MakeWeb) -> None:
    """`normalize` is true unless the client says otherwise, whatever the model's setting."""
    web = make_web(MODEL + ", driver: {type: fake, config: {normalize: false, prompts: {query: 'find: '}}}")
    np.testing.assert_allclose(vectors(web), unit(raw(*TEXTS)), atol=1e-6)
    np.testing.assert_allclose(vectors(web, normalize=False), raw(*TEXTS), atol=1e-6)
    np.testing.assert_allclose(vectors(web, dimensions=8), unit(raw(*TEXTS)[:, :8]), atol=1e-6)
    np.testing.assert_allclose(vectors(web, prompt_name="query"), vectors(web, [f"find: {t}" for t in TEXTS]))


def test_similarity(web: Web) -> None:
    """The cosine of the source sentence to each of the others."""
    inputs = {"source_sentence": TEXTS[0], "sentences": [*TEXTS, "more"]}
    found = vectors(web, inputs, at="/tei/m/similarity")
    one = unit(raw(*TEXTS, "more"))
    np.testing.assert_allclose(found, one @ one[0], atol=1e-5)
    found = vectors(web, {**inputs, "sentences": [LONG]}, at="/tei/m/similarity", parameters={"truncate": True})
    assert found.shape == (1,)


def test_its_own_openai_route_names_no_model(web: Web) -> None:
    """Below a base URL the model is that of the URL, whatever the body says."""
    answer = web.post("/tei/m/v1/embeddings", {"model": "text-embedding-3-small", "input": TEXTS})
    np.testing.assert_allclose([entry["embedding"] for entry in answer.json["data"]], unit(raw(*TEXTS)), atol=1e-6)


def test_info_and_health(web: Web) -> None:
    """What a client wants to know of such a server before it asks."""
    info = web.get(f"/tei/{NAME}/info").json
    assert (info["model_id"], info["max_input_length"], info["auto_truncate"]) == (NAME, 512, True)
    assert web.get("/tei/m/health").status_code == 200
    assert web.post("/models/enable", {"model": "m", "enabled": False}).status_code == 200
    assert "disabled" in refused(web.get("/tei/m/health"), 503, "Unhealthy")
    assert web.get("/tei/m").json["model_id"] == NAME
    refused(web.get("/tei/m/ping"), 503, "Unhealthy")


def test_errors_have_teis_shape(make_web: MakeWeb) -> None:
    """Empty, Validation, Overloaded and Backend, each with the status its clients know."""
    web = make_web(MODEL + ", driver: {type: fake, config: {fault: raise, fault_text: bad}}", settings=LITTLE)
    refused(ask(web, []), 400, "Empty")
    refused(ask(web, [1]), 422, "Validation")
    refused(web.post("/tei/m", {"input": "a"}), 422, "Validation")
    refused(ask(web, "bad"), 424, "Backend")
    with web.pool.permit():
        answer = ask(web)
    refused(answer, 429, "Overloaded")
    assert answer.headers["Retry-After"]


LITTLE = Settings(defaults=Defaults(max_inflight_global=1))


def test_tokenize(web: Web) -> None:
    """The tokens of each text with their place in it, behind the prompt that is named; special ones have no place."""
    answer = web.post("/tei/m/tokenize", {"inputs": ["Hello, world!", "a"]}).json
    assert [[token["text"] for token in tokens] for tokens in answer] == [
        ["<s>", "Hello,", "world!", "</s>"],
        ["<s>", "a", "</s>"],
    ]
    assert set(answer[0][0]) == {"id", "text", "special", "start", "stop"}
    assert [(t["special"], t["start"], t["stop"]) for t in answer[0][:2]] == [(True, None, None), (False, 0, 6)]
    bare = web.post("/tei/m/tokenize", {"inputs": "a", "add_special_tokens": False, "prompt_name": "query"}).json
    assert [token["text"] for token in bare[0]] == ["find:", "a"]
    assert "limit" not in refused(web.post("/tei/m/tokenize", {"inputs": "a", "prompt_name": "x"}), 422, "Validation")


def test_tokens_are_told_with_the_prompt_that_vectors_have(make_web: MakeWeb) -> None:
    """By name, by what the texts are for, in the words of any API, or none; the header says it as it is."""
    web = make_web("model: m, driver: {type: fake, config: {prompts: {query: 'Über: ', document: 'text: '}}}")
    for given, prompt in (
        ({}, ""), ({"input_type": "query"}, "Über: "), ({"input_type": "search_document"}, "text: "),
        ({"prompt_name": "query"}, "Über: "), ({"prompt_name": "query", "input_type": "document"}, "Über: "),
        ({"input_type": "clustering"}, ""),
    ):  # fmt: skip
        answer = web.post("/tei/m/tokenize", {"inputs": "a b", **given})
        assert unquote(answer.headers["X-Embedpool-Prompt"]) == prompt
        assert [token["text"] for token in answer.json[0]] == ["<s>", *prompt.split(), "a", "b", "</s>"]
        np.testing.assert_allclose(vectors(web, [prompt + "a b"]), vectors(web, ["a b"], **given))
    assert "input_type" in refused(web.post("/tei/m/tokenize", {"inputs": "a", "input_type": "x"}), 422, "Validation")


def test_decode(web: Web) -> None:
    """Token ids, one list or several, become texts."""
    tokens = web.post("/tei/m/tokenize", {"inputs": "a b"}).json[0]
    ids = [token["id"] for token in tokens]
    assert web.post("/tei/m/decode", {"ids": ids}).json == [f"{ids[1]} {ids[2]}"]
    both = web.post("/tei/m/decode", {"ids": [ids, ids], "skip_special_tokens": False}).json
    assert both == [" ".join(map(str, ids))] * 2
    for bad in ("a", [["a"]], [True], [-1], [[1], 2], [1 << 40]):
        refused(web.post("/tei/m/decode", {"ids": bad}), 422, "Validation")


def test_the_tokens_of_a_remote_model_are_known_only_there(make_web: MakeWeb) -> None:
    """They are refused with a sentence."""
    web = make_web("model: r, driver: {type: http, config: {base_url: 'http://127.0.0.1:9'}}", wait=False)
    assert "remote" in refused(web.post("/tei/r/tokenize", {"inputs": "a"}), 422, "Validation")
    assert "remote" in refused(web.post("/tei/r/decode", {"ids": [1]}), 422, "Validation")


def test_an_openai_client_below_a_models_url_is_answered_as_one(web: Web) -> None:
    """Its errors have OpenAI's shape and status."""
    answer = web.post("/tei/m/v1/embeddings", {"model": "x", "input": []})
    assert answer.status_code == 400
    assert answer.json["error"]["code"] == "empty_input"


def test_tokens_are_bounded_and_admitted(make_web: MakeWeb) -> None:
    """They take far more room than their text, and are served as vectors are."""
    web = make_web(
        "model: m", "model: off, enabled: false", settings=Settings(defaults=Defaults(max_inflight_global=1))
    )
    for path, body in (("tokenize", {"inputs": "a" * 262_145}), ("decode", {"ids": [3] * 262_145})):
        assert "limit" in refused(web.post(f"/tei/m/{path}", body), 422, "Validation")
    for path, body in (("tokenize", {"inputs": "a"}), ("decode", {"ids": [3]})):
        refused(web.post(f"/tei/off/{path}", body), 403, "Validation")
        with web.pool.permit():
            refused(web.post(f"/tei/m/{path}", body), 429, "Overloaded")
