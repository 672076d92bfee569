"""What clients of other servers send beside what their documentation says: taken as the originals take it."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from pathlib import Path
from typing import Any

import brotli
import numpy as np
import pytest
import zstandard
from werkzeug.test import TestResponse

import embedpool
from embedpool.config.settings import Limits, Security, Server, Settings, Tei
from embedpool.tracing import HOPS_HEADER
from embedpool.web import cors
from embedpool.web.intake import INTAKE, Intake
from tests.web.conftest import MODEL, NAME, MakeWeb, Web, raw, unit

TEXTS = ["Hello, world!", "This is a test sentence."]
BODIES: dict[str, dict[str, Any]] = {
    "/v1/embeddings": {"model": "m", "input": TEXTS},
    "/embeddings": {"model": "m", "input": TEXTS},
    "/openai/deployments/m/embeddings": {"input": TEXTS},
    "/tei/m": {"inputs": TEXTS},
    "/tei/m/v1/embeddings": {"input": TEXTS},
    "/v2/embed": {"model": "m", "texts": TEXTS},
    "/v1/embed": {"model": "m", "texts": TEXTS},
    "/api/embed": {"model": "m", "input": TEXTS},
}


def vectors_in(answer: TestResponse) -> np.ndarray:
    assert answer.status_code == 200, answer.text
    found = answer.json
    if isinstance(found, dict):
        found = found.get("data") or found["embeddings"]
    if isinstance(found, dict):
        found = found["float"]
    return np.array([row["embedding"] if isinstance(row, dict) else row for row in found])


def assert_served(answer: TestResponse, *texts: str) -> None:
    np.testing.assert_allclose(vectors_in(answer), unit(raw(*(texts or TEXTS))), atol=1e-6)


# --- fields


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("fields", [
    {"drop_params": True}, {"parameters": {}}, {"priority": 0}, {"metadata": {"a": "b"}}, {"extra_body": {}},
    {"timeout": 600}, {"stream": False}, {"\u00fcnknown": 1},
], ids=str)  # fmt: skip
def test_fields_that_nobody_knows_are_ignored_and_named(web: Web, path: str, fields: dict[str, Any]) -> None:
    """As the originals do; /metrics counts them."""
    answer = web.post(path, {**BODIES[path], **fields})
    assert_served(answer)
    (name,) = fields
    known = path in ("/v2/embed", "/v1/embed") and name == "priority"
    assert answer.headers.get("X-Embedpool-Ignored") == (None if known else name.replace("\u00fc", "\\xfc"))
    if not known:
        assert "embedpool_ignored_fields_total{" in web.get("/metrics").text


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("field", ["dimension", "Dimensions", "input_typ", "normalise", "truncat", "prompt_nam"])
def test_a_slip_that_would_change_numbers_is_refused(web: Web, path: str, field: str) -> None:
    """Nobody would notice that it was ignored."""
    answer = web.post(path, {**BODIES[path], field: 8})
    assert answer.status_code in (400, 422), answer.text
    assert field in answer.text
    assert "did you mean" in answer.text


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("fields", [
    {"add_special_tokens": False}, {"truncate": "MIDDLE"},
    {"normalize": "yes"}, {"dimensions": "8"}, {"input_type": "qeury"}, {"truncate_prompt_tokens": -2},
], ids=str)  # fmt: skip
def test_what_this_server_cannot_do_is_refused(web: Web, path: str, fields: dict[str, Any]) -> None:
    """The field is known, its value is not to be had."""
    answer = web.post(path, {**BODIES[path], **fields})
    assert answer.status_code in (400, 422), answer.text
    assert next(iter(fields)) in answer.text


@pytest.mark.parametrize("path", [path for path in BODIES if not path.endswith("/embeddings") or "/api/" in path])
@pytest.mark.parametrize("field", ["late_chunking", "return_multivector"])
def test_jinas_words_are_for_its_own_path(web: Web, path: str, field: str) -> None:
    """Elsewhere they are not overlooked: the error says where they are understood."""
    answer = web.post(path, {**BODIES[path], field: True})
    assert answer.status_code in (400, 422), answer.text
    assert "/v1/embeddings" in answer.text


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize(("fields", "native"), [
    ({"late_chunking": False, "return_multivector": False, "add_special_tokens": True}, {}),
    ({"dimensions": 8}, {"dimensions": 8}), ({"output_dimension": 8}, {"dimensions": 8}), ({"dimensions": 0}, {}),
    ({"normalize": "false"}, {"normalize": False}), ({"normalized": False}, {"normalize": False}),
    ({"truncate_prompt_tokens": 3}, {"max_seq_length": 3}), ({"truncate_prompt_tokens": -1}, {}),
    ({"input_type": "query"}, {"prompt_name": "query"}), ({"task": "retrieval.query"}, {"prompt_name": "query"}),
    ({"truncate": "END"}, {}), ({"truncate": "true"}, {}), ({"truncate": None, "dimensions": None}, {}),
], ids=str)  # fmt: skip
def test_a_word_means_the_same_in_every_api(
    web: Web, path: str, fields: dict[str, Any], native: dict[str, Any]
) -> None:
    """Whichever server's it is."""
    found = vectors_in(web.post(path, {**BODIES[path], **fields}))
    np.testing.assert_allclose(found, web.vectors(*TEXTS, **native), atol=1e-6)


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize(("said", "policy"), [
    ("START", "left"), ("END", "right"), ("end", "right"), (True, "right"), ("NONE", None), (False, None),
    ("false", None),
], ids=str)  # fmt: skip
def test_truncation_in_everybodys_words(web: Web, path: str, said: Any, policy: str | None) -> None:
    """Cohere's and NVIDIA's, and a yes or no."""
    long = " ".join(f"w{i}" for i in range(600))
    body = {name: [long] if value == TEXTS else value for name, value in BODIES[path].items()}
    answer = web.post(path, {**body, "truncate": said})
    if policy is None:
        assert answer.status_code in (400, 422)
        assert "602 tokens" in answer.text
    else:
        np.testing.assert_allclose(vectors_in(answer), web.vectors(long, truncate=policy), atol=1e-6)
        assert answer.headers["X-Embedpool-Truncated"] == "1"


@pytest.mark.parametrize("path", BODIES)
def test_a_long_text_is_refused_in_everybodys_words(web: Web, path: str) -> None:
    """Voyage's word for it, in every API."""
    body = {name: ["w " * 600] if value == TEXTS else value for name, value in BODIES[path].items()}
    assert "602 tokens" in web.post(path, {**body, "truncation": False}).text


@pytest.mark.parametrize(("path", "named"), [
    ("/v1/embeddings", "input[1]"), ("/tei/m", "inputs[1]"), ("/v2/embed", "texts[1]"), ("/api/embed", "input[1]"),
])  # fmt: skip
def test_errors_speak_of_the_requests_own_fields(web: Web, path: str, named: str) -> None:
    """A client knows no others."""
    body = {name: ["a", "w " * 600] if value == TEXTS else value for name, value in BODIES[path].items()}
    answer = web.post(path, {**body, "truncate": False})
    assert f"{named} has 602 tokens" in answer.text
    answer = web.post(path, {**BODIES[path], "output_dimension": 1000})
    if path != "/api/embed":  # Ollama ignores it
        assert "output_dimension: 1000 is more than the model's 384" in answer.text
        assert "options." not in answer.text


def test_jinas_objects_of_text(web: Web) -> None:
    """Also among strings; what is none is refused."""
    assert_served(web.post("/v1/embeddings", {"model": "m", "input": [{"text": TEXTS[0]}, TEXTS[1]]}))
    assert_served(web.post("/v1/embeddings", {"model": "m", "input": {"text": TEXTS[0]}}), TEXTS[0])
    for odd in ({"image": "x"}, {"text": "a", "image": "x"}, {"text": 1}):
        assert web.post("/v1/embeddings", {"model": "m", "input": [odd]}).status_code == 400


def test_what_jinas_and_infinitys_clients_send(web: Web) -> None:
    """Lists of one word, and an older name of the type."""
    fields = {"encoding_type": "float", "embedding_type": ["float"], "modality": ["text"]}
    assert_served(web.post("/v1/embeddings", {**BODIES["/v1/embeddings"], **fields}))


# --- half a character


@pytest.mark.parametrize("path", BODIES)
def test_half_a_character_names_its_text(web: Web, path: str) -> None:
    """JavaScript's programs cut texts inside an emoji."""
    body = json.dumps(BODIES[path]).replace(TEXTS[1], "cut here \\ud83e")
    answer = web.post(path, data=body, content_type="application/json")
    assert answer.status_code in (400, 422), answer.text
    assert "[1]: it holds half a character" in answer.text
    assert answer.headers["X-Embedpool-Failed"] == "1"


def test_half_a_character_fails_alone_where_the_others_go_on(web: Web) -> None:
    """And stands nowhere else in an answer."""
    body = '{"model": "m", "texts": ["Hello, world!", "cut \\ud83e"], "options": {"on_error": "partial"}}'
    answer = web.post("/embed", data=body, content_type="application/json")
    np.testing.assert_allclose(answer.json["vectors"][0], unit(raw(TEXTS[0]))[0], atol=1e-6)
    assert [(error["index"], error["code"]) for error in answer.json["errors"]] == [(1, "validation_error")]
    for odd in ('{"model": "\\ud83e", "texts": ["a"]}', '{"model": "m", "texts": ["a"], "\\ud83e": 1}'):
        assert web.post("/embed", data=odd, content_type="application/json").status_code in (404, 422)


# --- the form of the body


UNTOLD = ["", "text/plain", "application/x-www-form-urlencoded", "text/plain; charset=utf-8"]


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("content_type", UNTOLD)
def test_a_program_need_not_tell_the_type(web: Web, path: str, content_type: str) -> None:
    """curl -d tells another one, litellm none."""
    assert_served(web.post(path, data=json.dumps(BODIES[path]), content_type=content_type))


@pytest.mark.parametrize("headers", [
    {"Origin": "https://evil.example"}, {"Origin": "null"}, {"Sec-Fetch-Site": "cross-site"},
    {"Sec-Fetch-Site": "same-origin"}, {"Host": "rebound.example"},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("content_type", UNTOLD)
def test_a_page_in_a_browser_must(web: Web, headers: dict[str, str], content_type: str) -> None:
    """It may send these types to anybody, unasked."""
    for path, body in BODIES.items():
        answer = web.post(path, data=json.dumps(body), content_type=content_type, headers=headers)
        assert answer.status_code in (400, 415, 422)
        assert "application/json" in answer.text


def test_our_own_endpoint_wants_the_type(web: Web) -> None:
    """Whoever writes for it reads how."""
    assert web.post("/embed", data=b'{"model": "m", "texts": ["a"]}', content_type="").status_code == 415


PACKED = {
    "gzip": gzip.compress, "x-gzip": gzip.compress, "deflate": zlib.compress, "br": brotli.compress,
    "zstd": zstandard.ZstdCompressor().compress, "identity": bytes,
}  # fmt: skip


@pytest.mark.parametrize("encoding", PACKED)
@pytest.mark.parametrize("path", ["/embed", "/v1/embeddings"])
def test_a_packed_body_is_unpacked(web: Web, encoding: str, path: str) -> None:
    """Under the same limit, before it fills the memory."""
    body = json.dumps({"model": "m", "input" if "v1" in path else "texts": TEXTS}).encode()

    def send(sent: bytes) -> TestResponse:
        return web.post(path, data=sent, content_type="application/json", headers={"Content-Encoding": encoding})

    assert send(PACKED[encoding](body)).status_code == 200
    if encoding != "identity":
        for broken in (body, PACKED[encoding](body)[:-9], b""):
            answer = send(broken)
            assert answer.status_code == 400, answer.text
            assert "the body is not" in answer.text


@pytest.mark.parametrize("encoding", sorted(set(PACKED) - {"identity"}))
def test_a_bomb_is_not_unpacked(make_web: MakeWeb, encoding: str) -> None:
    """No more than the limit of a body."""
    web = make_web(MODEL, settings=Settings(limits=Limits(max_body_bytes=100_000)))
    sent = PACKED[encoding](b" " * 50_000_000)
    assert len(sent) < 100_000
    answer = web.post("/embed", data=sent, content_type="application/json", headers={"Content-Encoding": encoding})
    assert answer.status_code == 413


def test_another_encoding_is_told(web: Web) -> None:
    """415, for lines too."""
    for content_type in ("application/json", "application/x-ndjson"):
        headers = {"Content-Encoding": "compress"}
        answer = web.post("/embed?model=m", data=b"x", content_type=content_type, headers=headers)
        assert (answer.status_code, answer.json["error"]["code"]) == (415, "unsupported_media_type")


# --- paths


@pytest.mark.parametrize(("path", "plain"), [
    ("//v1/embeddings", "/v1/embeddings"), ("/v1//embeddings", "/v1/embeddings"), ("/v1/embeddings/", "/v1/embeddings"),
    ("//api//embed", "/api/embed"), ("/tei//m", "/tei/m"), ("/tei/m/", "/tei/m"),
    ("/tei/m//v1/embeddings", "/tei/m/v1/embeddings"), ("/v2/embed/", "/v2/embed"),
])  # fmt: skip
def test_doubled_and_trailing_slashes_change_nothing(web: Web, path: str, plain: str) -> None:
    """Clients put base URLs and paths together."""
    assert_served(web.post("/", BODIES[plain], environ_overrides={"PATH_INFO": path}))


def test_a_host_that_is_a_tei_server(make_web: MakeWeb) -> None:
    """Milvus puts /embed behind the host; one model is the one that is meant."""
    web = make_web(MODEL)
    assert_served(web.post("/embed", {"inputs": TEXTS, "truncate": True, "truncation_direction": "Right"}))
    assert_served(web.post("/", {"inputs": TEXTS}))
    assert web.get("/info").json["model_id"] == NAME
    assert web.get("/ping").status_code == 200
    assert len(web.post("/tokenize", {"inputs": "a"}).json[0]) == 3
    assert set(web.post("/embed", {"inputs": []}).json) == {"error", "error_type"}
    assert np.array(web.post("/embed_all", {"inputs": "a b"}).json).shape == (1, 4, 384)
    assert web.post("/embed_sparse", {"inputs": "a"}).status_code == 422


@pytest.mark.parametrize("default", [None, "n"])
def test_of_several_models_one_must_be_named(make_web: MakeWeb, default: str | None) -> None:
    """In the settings, or in the path."""
    web = make_web(MODEL, "model: n", settings=Settings(tei=Tei(default_model=default)))
    answer = web.post("/embed", {"inputs": TEXTS})
    assert answer.status_code == (200 if default else 422)
    if not default:
        assert "/tei/<model>" in answer.json["error"]
        assert web.get("/info").status_code == 422


def test_azures_path_and_header(make_web: MakeWeb, monkeypatch: pytest.MonkeyPatch) -> None:
    """The deployment is the model, the key comes as `api-key`."""
    monkeypatch.setenv("EMBEDPOOL_SECRET_K", "sesame")
    web = make_web(MODEL, settings=Settings(security=Security(embed_key_env="EMBEDPOOL_SECRET_K")))
    path = "/openai/deployments/m/embeddings?api-version=2024-10-21"
    assert_served(web.post(path, {"input": TEXTS}, headers={"api-key": "sesame"}))
    refused = web.post(path, {"input": TEXTS}, headers={"api-key": "other"})
    assert (refused.status_code, set(refused.json)) == (401, {"error", "detail"})


# --- what a retry is worth


def test_a_client_is_told_where_a_retry_is_of_no_use(make_web: MakeWeb) -> None:
    """A text that the model fails on fails again; a full server may have room."""
    web = make_web(MODEL + ", driver: {type: fake, config: {fault: raise, fault_text: bad}}")
    for path, sent in BODIES.items():
        body = {name: ["good", "bad"] if value == TEXTS else value for name, value in sent.items()}
        answer = web.post(path, body)
        assert answer.status_code in (500, 424)
        assert (answer.headers["x-should-retry"], answer.headers["X-Embedpool-Failed"]) == ("false", "1")
    assert "x-should-retry" not in web.post("/v1/embeddings", {"model": "x", "input": "a"}).headers


# --- pages


def settings_of(*origins: str, **security: Any) -> Settings:
    return Settings(server=Server(cors_origins=origins), security=Security(**security))


PAGE = "https://app.example"


@pytest.mark.parametrize(("origins", "origin", "told"), [
    ((), PAGE, None), ((PAGE,), PAGE, PAGE), ((PAGE,), "https://app.example:8443", None),
    ((PAGE,), "https://evil.example", None), (("*",), "https://any.example", "*"), ((PAGE,), "null", None),
    ((PAGE,), "https://APP.example", "https://APP.example"),
])  # fmt: skip
def test_only_pages_that_are_named_may_embed(
    make_web: MakeWeb, origins: tuple[str, ...], origin: str, told: str | None
) -> None:
    """The question before it needs no key, and management is closed to all of them."""
    web = make_web(MODEL, settings=settings_of(*origins))
    asks = {"Origin": origin, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
    client = web.app.test_client()
    for path in ("/embed", *BODIES):
        question = client.options(path, headers=asks)
        assert question.status_code == 200
        assert question.headers.get("Access-Control-Allow-Origin") == told
        assert question.headers.get("Access-Control-Allow-Headers") == (told and "content-type")
    answer = web.embed("a", headers={"Origin": origin})
    assert answer.headers.get("Access-Control-Allow-Origin") == told
    assert "Access-Control-Allow-Credentials" not in answer.headers
    if told:
        assert "X-Embedpool-Space" in answer.headers["Access-Control-Expose-Headers"]
        assert "Origin" in answer.headers["Vary"]
    for path in ("/models/register", "/models/alias", "/reload", "/status"):
        assert "Access-Control-Allow-Origin" not in client.options(path, headers=asks).headers
    assert web.post("/reload", {}, headers={"Origin": origin}).status_code == 403


def test_a_page_may_read_each_header_of_ours() -> None:
    files = [file for file in Path(embedpool.__file__).parent.rglob("*.py") if file != Path(cors.__file__)]
    ours = set(re.findall(r'"(X-Embedpool-[A-Za-z-]+)"', "".join(file.read_text() for file in files)))
    told = {name for name in cors.EXPOSED if name.startswith("X-Embedpool-")}
    assert told == ours - {HOPS_HEADER}  # which requests alone have


def test_the_question_comes_before_the_key(make_web: MakeWeb, monkeypatch: pytest.MonkeyPatch) -> None:
    """And `*` lets nobody in where there are keys."""
    monkeypatch.setenv("EMBEDPOOL_SECRET_K", "sesame")
    web = make_web(MODEL, settings=settings_of(PAGE, "*", embed_key_env="EMBEDPOOL_SECRET_K"))
    for origin, told in ((PAGE, PAGE), ("https://any.example", None)):
        question = web.app.test_client().options("/v1/embeddings", headers={"Origin": origin})
        assert question.status_code == 200
        assert question.headers.get("Access-Control-Allow-Origin") == told
    refused = web.post("/v1/embeddings", BODIES["/v1/embeddings"], headers={"Origin": PAGE})
    assert (refused.status_code, refused.headers["Access-Control-Allow-Origin"]) == (401, PAGE)


# --- the root


@pytest.mark.parametrize(("accept", "status"), [
    (None, 200), ("*/*", 200), ("text/plain", 200), ("application/json", 200),
    ("text/html,application/xhtml+xml,*/*;q=0.8", 302),
])  # fmt: skip
def test_the_root_is_what_each_expects(web: Web, accept: str | None, status: int) -> None:
    """A person in a browser, a program that wants JSON, and Ollama's clients."""
    for ask in (web.app.test_client().get, web.app.test_client().head):
        answer = ask("/", headers={"Accept": accept} if accept else {})
        assert answer.status_code == status
        assert answer.headers["Vary"] == "Accept"
    answer = web.get("/", headers={"Accept": accept} if accept else {})
    if status == 302:
        assert answer.headers["Location"] == "ui"
    elif accept == "application/json":
        assert answer.json["name"] == "embedpool"
    else:
        assert answer.text == "Ollama is running"


# --- Ollama's small print


def test_names_with_and_without_the_tag_are_one(make_web: MakeWeb) -> None:
    """In every API that Ollama's users have."""
    web = make_web("model: bge-m3:latest", "model: org/n, alias: n")
    for name in ("bge-m3", "bge-m3:latest", "n", "n:latest", "org/n:latest"):
        assert web.post("/api/embed", {"model": name, "input": "a"}).json["model"] == name
        assert web.post("/v1/embeddings", {"model": name, "input": "a"}).status_code == 200
        assert web.post("/v2/embed", {"model": name, "texts": ["a"]}).status_code == 200
        assert web.get(f"/v1/models/{name}").status_code == 200
        assert web.post("/api/show", {"model": name}).status_code == 200
    assert web.post("/api/embed", {"model": "n:v2", "input": "a"}).status_code == 404


def test_nothing_to_embed_loads_the_model(make_web: MakeWeb) -> None:
    """Ollama's way to preload one."""
    web = make_web("model: m, scaling: {min: 0}")
    for body in ({"model": "m"}, {"model": "m", "input": []}, {"model": "m", "keep_alive": "5m"}):
        assert web.post("/api/embed", body).json["embeddings"] == []
    assert web.post("/api/embeddings", {"model": "m"}).json == {"embedding": []}
    assert web.status("m")["replicas"] == 1
    assert web.post("/api/embed", {"model": "x"}).status_code == 404


def test_more_dimensions_than_there_are_are_none(web: Web) -> None:
    """As Ollama has it; the header says so."""
    answer = web.post("/api/embed", {"model": "m", "input": TEXTS, "dimensions": 4096})
    assert_served(answer)
    assert answer.headers["X-Embedpool-Ignored"] == "dimensions"


def test_what_ollamas_clients_look_up(web: Web) -> None:
    """Capabilities, distinct digests, what is loaded, the version, and a model that is there already."""
    shown = web.post("/api/show", {"name": "m"}).json
    assert shown["capabilities"] == ["embedding"]
    assert shown["model_info"]["bert.embedding_length"] == 384
    tags = web.get("/api/tags").json["models"]
    assert all(len(tag["digest"]) == 64 for tag in tags)
    assert [tag["name"] for tag in web.get("/api/ps").json["models"]] == [f"{NAME}:latest"]
    assert web.get("/api/version").json["version"].count(".") == 2
    for body in ({"model": "m"}, {"name": "m:latest", "stream": False}):
        assert json.loads(web.post("/api/pull", body).text.splitlines()[-1]) == {"status": "success"}
    assert web.post("/api/pull", {"model": "x"}).status_code == 404
    assert web.post("/api/show", {}).status_code == 400


def test_digests_tell_models_apart(make_web: MakeWeb) -> None:
    """llm-ollama groups the names of one model by them."""
    web = make_web("model: a, alias: b", "model: c")
    digests = {tag["name"]: tag["digest"] for tag in web.get("/api/tags").json["models"]}
    assert digests["a:latest"] == digests["b:latest"] != digests["c:latest"]


def test_lists_have_what_each_client_reads(web: Web) -> None:
    """Cohere's names, Mistral's type, vLLM's length, infinity's load."""
    listed = web.get("/v1/models").json
    assert [model["name"] for model in listed["models"]] == [NAME, "m"]
    assert {"id", "type", "max_model_len", "stats", "backend"} <= set(listed["data"][0])
    assert set(listed["data"][0]["stats"]) == {"queue_fraction", "queue_absolute", "results_pending", "batch_size"}
    assert web.post("/v1/embeddings", BODIES["/v1/embeddings"]).json["id"]
    infinitys = web.get("/models").json["data"][0]  # its client takes no other owner
    assert (infinitys["owned_by"], infinitys["capabilities"]) == ("infinity", ["embed"])


# --- applications, by the requests that they send


def test_anythingllm_looks_for_ollama_first(web: Web) -> None:
    """It embeds only if the root answers 2xx, as Ollama's own command line asks by HEAD."""
    assert web.get("/").status_code == 200
    assert web.app.test_client().head("/").status_code == 200
    body = {"model": "m:latest", "input": TEXTS, "options": {"num_ctx": 8192, "use_mlock": True, "num_gpu": 999}}
    assert_served(web.post("/api/embed", body))


@pytest.mark.parametrize("path", ["/v1/embeddings", "/embeddings"])
def test_ragflow_sends_what_litellm_would(web: Web, path: str) -> None:
    """For OpenAI, vLLM and OpenAI-compatible services."""
    body = {"input": TEXTS, "model": "m", "encoding_format": "float", "drop_params": True}
    assert_served(web.post(path, body, headers={"Authorization": "Bearer x"}))


def test_ragflow_relies_on_tei_to_cut(web: Web) -> None:
    """Its chunks may be longer than the model's limit."""
    assert web.post("/tei/m/embed", {"inputs": ["word " * 600], "truncate": True}).status_code == 200
    assert web.post("/tei/m/embed", {"inputs": ["word " * 600]}).status_code == 200


@pytest.mark.parametrize(("path", "body"), [
    ("/tei/m", {"inputs": TEXTS, "options": {}}),  # text2vec-huggingface with endpointURL
    ("/tei/m", {"inputs": TEXTS, "options": {"wait_for_model": True, "use_gpu": False, "use_cache": True}}),
    ("/v1/embeddings", {"input": TEXTS, "model": "m"}),  # -openai
    ("/v1/embed", {"texts": TEXTS, "model": "m", "truncate": "END", "input_type": "search_document"}),  # -cohere
    ("/v1/embeddings", {"input": TEXTS, "model": "m", "task": "retrieval.passage", "normalized": True,
                        "embedding_type": "float"}),  # -jinaai
    ("/v1/embeddings", {"input": TEXTS, "model": "m", "input_type": "document", "truncation": True}),  # -voyageai
    ("/api/embed", {"model": "m", "input": TEXTS}),  # -ollama
])  # fmt: skip
def test_weaviates_modules(web: Web, path: str, body: dict[str, Any]) -> None:
    """Each vectoriser's body."""
    assert_served(web.post(path, body))


def test_milvus_puts_embed_behind_the_host(make_web: MakeWeb) -> None:
    """Its function for TEI replaces the path of the endpoint."""
    web = make_web(MODEL)
    assert_served(web.post("/embed", {"inputs": TEXTS, "truncate": True, "truncation_direction": "Right"}))


def test_open_webui_verifies_a_connection(web: Web) -> None:
    """Of Ollama by version, tags and what is loaded, of OpenAI by the list of models."""
    assert web.get("/api/version").json["version"]
    assert web.get("/api/tags").json["models"]
    assert web.get("/api/ps").json["models"]
    assert web.get("/v1/models", headers={"Authorization": "Bearer x"}).json["data"]
    assert_served(web.post("/api/embed", {"input": TEXTS, "model": "m"}))


def test_elasticsearch_and_librechat(web: Web) -> None:
    """Jina's inference service, and LibreChat's retrieval through LangChain, which sends token ids."""
    body = {"input": [{"text": TEXTS[0]}, {"text": TEXTS[1]}], "model": "m", "late_chunking": False}
    assert_served(web.post("/v1/embeddings", body))
    ids = [[9906, 11, 1917, 0], [2028, 374, 264, 1296, 11914, 13]]  # of TEXTS
    assert_served(web.post("/v1/embeddings", {"input": ids, "model": "m", "encoding_format": "float"}))


# --- odd bodies


@pytest.mark.parametrize("path", ["/embed", *BODIES])
@pytest.mark.parametrize("odd", [
    '{"normalize": NESTED}', '{"truncate": NESTED}', '{"dimensions": NESTED}', '{"input_type": NESTED}',
    '{"user": "\\ud800", "dimensions": 1' + "0" * 400 + "}", '{"user": "\\ud800", "dimensions": NaN}',
    '{"prompt": "\\ud800"}', '{"options": {"prompt": "\\ud800"}}', '{"x\\ud800": [{"y\\ud800": "z\\ud800"}]}',
    '{"model": {"a": 1}}', '{"encoding_format": ["float"]}', '{"embedding_types": [NESTED]}', '{"keep_alive": NESTED}',
], ids=lambda odd: ascii(odd)[:40])  # fmt: skip
def test_no_body_is_an_unexpected_error(web: Web, path: str, odd: str) -> None:
    """Whatever stands in it."""
    deep = "[" * 900 + "]" * 900
    sent = json.dumps(BODIES.get(path) or {"model": "m", "texts": TEXTS})[:-1] + ", " + odd.replace("NESTED", deep)[1:]
    answer = web.post(path, data=sent, content_type="application/json")
    assert answer.status_code in (200, 400, 404, 422), answer.text


def test_half_a_character_elsewhere_is_no_unexpected_error(web: Web) -> None:
    """In what is tokenised, in parts of an input, in a source sentence."""
    for path, sent in (
        ("/tei/m/tokenize", '{"inputs": "a\\ud800"}'),
        ("/v2/embed", '{"model": "m", "inputs": [{"content": [{"text": "a", "type\\ud800": "text"}]}]}'),
        ("/v2/embed", '{"model": "m", "inputs": [{"content": [{"text": "\\ud800", "type": "text"}]}]}'),
        ("/tei/m/similarity", '{"inputs": {"source_sentence": "\\ud800", "sentences": ["a"]}}'),
    ):
        answer = web.post(path, data=sent, content_type="application/json")
        assert answer.status_code in (400, 422), (path, answer.text)


def test_unknown_fields_have_a_bound(web: Web) -> None:
    """Each is compared with what is known, and named in a header."""
    body = BODIES["/v1/embeddings"]
    answer = web.post("/v1/embeddings", {**body, **{f"normal{i}": 0 for i in range(101)}})
    assert answer.status_code == 400
    assert "unknown keys" in answer.text
    answer = web.post("/v1/embeddings", {**body, **{"\U0001f642" * 150 + str(i): 0 for i in range(50)}})
    assert len(answer.headers["X-Embedpool-Ignored"]) < 2000


def test_packed_bodies_are_counted_when_they_are_unpacked(make_web: MakeWeb) -> None:
    """One at a time, before the next."""
    web = make_web(MODEL, settings=Settings(limits=Limits(max_bodies_bytes=20_000_000)))
    sent = gzip.compress(b'{"model": "m", "texts": ["a"]}' + b" " * 15_000_000)
    headers = {"Content-Encoding": "gzip"}
    intake: Intake = web.app.extensions[INTAKE]
    held = intake.take(10_000_000)
    assert web.post("/embed", data=sent, content_type="application/json", headers=headers).status_code == 429
    intake.give_back(held)
    assert web.post("/embed", data=sent, content_type="application/json", headers=headers).status_code == 200


def test_gzip_may_have_several_members(web: Web) -> None:
    """As `cat` makes of two files."""
    sent = gzip.compress(b'{"model": "m", ') + gzip.compress(b'"texts": ["a"]}')
    headers = {"Content-Encoding": "gzip"}
    assert web.post("/embed", data=sent, content_type="application/json", headers=headers).status_code == 200


@pytest.mark.parametrize(("fields", "means"), [
    ({"truncate": True, "truncation": False}, None), ({"truncate": "NONE", "truncation": True}, None),
    ({"truncation": True, "truncation_direction": "Left"}, "left"), ({"truncate": "START", "truncation": True}, "left"),
    ({"truncation_direction": "Left"}, "left"), ({"truncation": True}, "right"),
], ids=str)  # fmt: skip
def test_teis_truncation_in_two_words(web: Web, fields: dict[str, Any], means: str | None) -> None:
    """They must agree, and the direction counts whichever says yes."""
    long = " ".join(f"w{i}" for i in range(600))
    answer = web.post("/tei/m", {"inputs": long, **fields})
    if means is None:
        assert answer.status_code == 422
        assert "contradicts" in answer.text
    else:
        np.testing.assert_allclose(vectors_in(answer), web.vectors(long, truncate=means), atol=1e-6)


def test_more_dimensions_are_none_before_the_model_was_loaded_too(make_web: MakeWeb) -> None:
    """Ollama ignores them at the first request as at any other."""
    web = make_web("model: m, scaling: {min: 0}")
    for _ in range(2):
        answer = web.post("/api/embed", {"model": "m", "input": "a", "dimensions": 100_000})
        assert answer.status_code == 200
        assert answer.headers["X-Embedpool-Ignored"] == "dimensions"


def test_names_with_a_tag_at_teis_and_infinitys_paths(make_web: MakeWeb) -> None:
    """And a name that has its tag already is not given another model's."""
    web = make_web("model: y", "model: 'y:latest'", "model: z")
    assert web.post("/tei/z:latest", {"inputs": "a"}).status_code == 200
    assert web.post("/tei/z:latest/v1/embeddings", {"input": "a"}).status_code == 200
    assert web.get("/models/z:latest").status_code == 200
    assert [tag["name"] for tag in web.get("/api/tags").json["models"]] == ["y", "y:latest", "z:latest"]


@pytest.mark.parametrize("path", ["/openai/deployments/m/embeddings/", "/openai/deployments/m//embeddings"])
def test_azures_path_may_have_more_slashes(web: Web, path: str) -> None:
    """As the others."""
    assert_served(web.post("/", {"input": TEXTS}, environ_overrides={"PATH_INFO": path}))


@pytest.mark.parametrize("path", ["/v1/models//", "/models//", "/models/m/", "/ready/m/", "/v1/models/m//", "/ready//"])
def test_lookups_may_have_more_slashes(web: Web, path: str) -> None:
    """Nobody is sent elsewhere."""
    assert web.get("/", environ_overrides={"PATH_INFO": path}).status_code == 200
