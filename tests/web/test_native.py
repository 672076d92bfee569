"""POST /embed, from body to vectors."""

from __future__ import annotations

import base64
import io
import threading
from typing import Any

import numpy as np
import pytest

from embedpool.client import Client
from embedpool.config.settings import Defaults, Limits, Settings
from embedpool.drivers.fake import FakeDriver
from embedpool.errors import EmbedpoolError
from tests.web.conftest import MODEL, NAME, Gate, MakeWeb, Web, raw, refused, unit

TEXTS = ("Hello, world!", "This is a test sentence.")


def npy(web: Web, *texts: str, **options: Any) -> np.ndarray:
    answer = web.embed(*texts, headers={"Accept": "application/x-npy"}, **options)
    assert answer.status_code == 200, answer.text
    assert answer.mimetype == "application/x-npy"
    return np.load(io.BytesIO(answer.data), allow_pickle=False)


def test_embed_answers_vectors_and_what_it_did(web: Web) -> None:
    """The answer holds the model's full name, a vector per text in order, and the counts and times of the contract."""
    answer = web.embed(*TEXTS)
    assert answer.status_code == 200
    assert set(answer.json) == {"model", "dim", "vectors", "meta"}
    assert answer.json["model"] == NAME
    assert answer.json["dim"] == 384
    np.testing.assert_allclose(answer.json["vectors"], unit(raw(*TEXTS)), atol=1e-6)
    meta = answer.json["meta"]
    assert set(meta) == {"count", "tokens", "truncated", "queue_ms", "compute_ms", "total_ms", "replicas"}
    assert (meta["count"], meta["tokens"], meta["truncated"]) == (2, 2 + 2 + 5 + 2, [])
    assert meta["replicas"] == [f"{NAME}#1"]
    assert all(meta[name] >= 0 for name in ("queue_ms", "compute_ms"))
    assert meta["total_ms"] >= meta["compute_ms"]


def test_alias_and_name_are_the_same_model(web: Web) -> None:
    """A model answers under its name and under its alias alike."""
    by_name = web.embed("a", model=NAME)
    assert by_name.json["model"] == web.embed("a").json["model"] == NAME
    assert by_name.json["vectors"] == web.embed("a").json["vectors"]


@pytest.mark.parametrize("path", ["/embed", "/v1/embeddings"])
def test_every_answer_says_whose_numbers_it_holds(make_web: MakeWeb, path: str) -> None:
    """In a header: the same for equal models, another for others."""
    web = make_web("model: a", "model: b", "model: c, driver: {type: fake, config: {dim: 8}}")

    def space(model: str) -> str:
        body = {"model": model, "texts" if path == "/embed" else "input": ["x"]}
        return str(web.post(path, body).headers["X-Embedpool-Space"])

    assert space("a") == space("b") == web.status("a")["space"] != space("c")


def test_a_request_larger_than_a_batch_keeps_its_order(web: Web) -> None:
    """Vectors come in the order of the texts, however many batches they took."""
    texts = [f"text number {i}" for i in range(300)]
    np.testing.assert_allclose(web.vectors(*texts), unit(raw(*texts)), atol=1e-6)


@pytest.mark.parametrize(
    "text", ["", " ", "日本語の文", "naïve café — “quoted”", "👩‍👩‍👧‍👦 🏳️‍🌈", "\u0000 and \u200b", "line\nbreak"]
)
def test_any_string_is_a_text(web: Web, text: str) -> None:
    """The empty string is a text and is embedded, and so is any Unicode."""
    np.testing.assert_allclose(web.vectors(text, "other"), unit(raw(text, "other")), atol=1e-6)


# --- options


def test_normalize_false_gives_the_models_own_vectors(web: Web) -> None:
    """`normalize` false leaves the lengths as the model made them, true makes them 1."""
    np.testing.assert_allclose(web.vectors(*TEXTS, normalize=False), raw(*TEXTS), atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(web.vectors(*TEXTS, normalize=True), axis=1), 1, atol=1e-5)


def test_normalize_of_the_model_holds_unless_the_request_says_otherwise(make_web: MakeWeb) -> None:
    """The model's own `normalize` is the default of its requests."""
    web = make_web(f"{MODEL}, driver: {{type: fake, config: {{normalize: false}}}}")
    np.testing.assert_allclose(web.vectors(*TEXTS), raw(*TEXTS), atol=1e-6)
    np.testing.assert_allclose(web.vectors(*TEXTS, normalize=True), unit(raw(*TEXTS)), atol=1e-6)


def test_dimensions_cut_and_renormalise(web: Web) -> None:
    """`dimensions` cuts, then renormalises unless `normalize` is false; `dim` says the size."""
    answer = web.embed(*TEXTS, dimensions=8)
    assert answer.json["dim"] == 8
    np.testing.assert_allclose(answer.json["vectors"], unit(raw(*TEXTS)[:, :8]), atol=1e-6)
    np.testing.assert_allclose(web.vectors(*TEXTS, dimensions=8, normalize=False), raw(*TEXTS)[:, :8], atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_dtype_is_that_of_the_vectors(web: Web, dtype: str) -> None:
    """`dtype` is the type of the vectors given out, in npy and in base64; JSON shows the same numbers."""
    array = npy(web, *TEXTS, dtype=dtype)
    assert array.dtype == dtype
    np.testing.assert_array_equal(np.array(web.vectors(*TEXTS, dtype=dtype), dtype), array)
    strings = web.embed(*TEXTS, dtype=dtype, encoding="base64").json["vectors"]
    decoded = np.stack([np.frombuffer(base64.b64decode(s), np.dtype(dtype).newbyteorder("<")) for s in strings])
    np.testing.assert_array_equal(decoded, array)


@pytest.mark.parametrize("options", [{"prompt": "find: "}, {"prompt_name": "query"}])
def test_prompts_go_before_each_text(web: Web, options: dict[str, str]) -> None:
    """`prompt` itself, or the model's prompt of the name `prompt_name`, is put before every text."""
    np.testing.assert_array_equal(web.vectors(*TEXTS, **options), web.vectors(*("find: " + t for t in TEXTS)))


def test_an_unknown_prompt_name_is_refused_with_the_known_ones(web: Web) -> None:
    """A `prompt_name` that the model has not is an error that lists those it has."""
    error = refused(web.embed("a", prompt_name="querry"), 422, "validation_error")
    assert "query" in error["fields"]["options.prompt_name"]


@pytest.mark.parametrize(("side", "kept"), [("right", "a b c"), ("left", "c d e"), (None, "a b c")])
def test_truncation_keeps_the_asked_end(web: Web, side: str | None, kept: str) -> None:
    """Texts over `max_seq_length` tokens, special ones included, are cut on the asked side, by default the right."""
    answer = web.embed("x", "a b c d e", "a b c", max_seq_length=5, truncate=side)
    assert answer.json["meta"]["truncated"] == [1]
    assert answer.json["meta"]["tokens"] == 3 + 5 + 5
    np.testing.assert_array_equal(answer.json["vectors"][1], web.vectors(kept)[0])


def test_truncate_error_refuses_and_says_which_text(web: Web) -> None:
    """With `truncate: error` a text that is too long is refused, named by its place."""
    error = refused(web.embed("x", "a b c d", max_seq_length=5, truncate="error"), 422, "text_too_long")
    assert list(error["fields"]) == ["texts[1]"]
    assert web.embed("x", "a b c", max_seq_length=5, truncate="error").status_code == 200


def test_the_models_own_max_seq_length_truncates(make_web: MakeWeb) -> None:
    """A model's `max_seq_length` holds where the request says nothing, and the request may raise it."""
    web = make_web(f"{MODEL}, driver: {{type: fake, config: {{max_seq_length: 4}}}}")
    assert web.embed("a b c").json["meta"]["truncated"] == [0]
    assert web.embed("a b c", max_seq_length=5).json["meta"]["truncated"] == []


def test_precision_int8_is_of_the_normalised_vector_alone(web: Web) -> None:
    """int8 is clip(round(127·v)) of the normalised vector, whatever its batch and `normalize`; uint8 lies 128 above."""
    expected = np.clip(np.round(127 * unit(raw(*TEXTS))), -127, 127)
    for options in ({}, {"normalize": False}):
        np.testing.assert_array_equal(web.vectors(*TEXTS, precision="int8", **options), expected)
    np.testing.assert_array_equal(web.vectors(TEXTS[1], precision="int8")[0], expected[1])
    np.testing.assert_array_equal(web.vectors(*TEXTS, precision="uint8"), expected + 128)
    assert npy(web, *TEXTS, precision="int8").dtype == np.int8
    assert npy(web, *TEXTS, precision="uint8").dtype == np.uint8


def test_precision_binary_packs_signs(web: Web) -> None:
    """ubinary packs the signs of eight values into a byte, binary the same minus 128."""
    bits = np.packbits(raw(*TEXTS) > 0, axis=1)
    np.testing.assert_array_equal(npy(web, *TEXTS, precision="ubinary"), bits)
    binary = npy(web, *TEXTS, precision="binary")
    assert binary.dtype == np.int8
    np.testing.assert_array_equal(binary, bits.astype(int) - 128)


def test_base64_of_quantised_vectors_is_their_bytes(web: Web) -> None:
    """`encoding: base64` gives the bytes of whatever type the vectors have."""
    strings = web.embed(*TEXTS, precision="int8", encoding="base64").json["vectors"]
    decoded = np.stack([np.frombuffer(base64.b64decode(s), np.int8) for s in strings])
    np.testing.assert_array_equal(decoded, web.vectors(*TEXTS, precision="int8"))


@pytest.mark.parametrize("options", [{}, {"normalize": False}, {"dimensions": 7}, {"precision": "int8"}])
def test_npy_holds_the_numbers_of_the_json_answer(web: Web, options: dict[str, Any]) -> None:
    """`Accept: application/x-npy` answers with one array equal to the JSON vectors."""
    array = npy(web, *TEXTS, **options)
    np.testing.assert_array_equal(array, web.vectors(*TEXTS, **options).astype(array.dtype))


@pytest.mark.parametrize("accept", ["*/*", "application/json", "application/json, application/x-npy;q=0.5", ""])
def test_json_is_the_default_answer(web: Web, accept: str) -> None:
    """A client gets npy only if it prefers it."""
    assert web.embed("a", headers={"Accept": accept}).mimetype == "application/json"


OPTIONS = (
    "normalize", "max_seq_length", "dtype", "dimensions", "prompt", "prompt_name", "truncate", "precision", "encoding",
    "whatever",
)  # fmt: skip


@pytest.mark.parametrize("option", OPTIONS)
def test_null_means_absent(web: Web, option: str) -> None:
    """Clients send null for options they do not use: it is as if they were not there."""
    assert web.embed("a", **{option: None}).json["vectors"] == web.embed("a").json["vectors"]


def test_options_may_be_missing_or_null(web: Web) -> None:
    """`options` as a whole is optional."""
    for body in ({"model": "m", "texts": ["a"]}, {"model": "m", "texts": ["a"], "options": None}):
        assert web.post("/embed", body).json["vectors"] == web.embed("a").json["vectors"]


def test_an_unknown_option_is_refused_by_a_local_model(web: Web) -> None:
    """An option that a local model does not know is refused by name, not ignored."""
    error = refused(web.embed("a", instruction="x"), 422, "unsupported_option")
    assert list(error["fields"]) == ["options.instruction"]


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("normalize", "true"),
        ("normalize", 1),
        ("max_seq_length", 0),
        ("max_seq_length", "12"),
        ("max_seq_length", 12.0),
        ("max_seq_length", 513),
        ("dtype", "float64"),
        ("dimensions", 0),
        ("dimensions", True),
        ("dimensions", 385),
        ("prompt", 5),
        ("prompt_name", ["query"]),
        ("truncate", "middle"),
        ("truncate", True),
        ("precision", "int4"),
        ("encoding", "hex"),
    ],
)
def test_a_bad_option_is_named_by_its_path(web: Web, option: str, value: Any) -> None:
    """An option of the wrong type or value is refused under its path; nothing is converted silently."""
    error = refused(web.embed("a", **{option: value}), 422, "validation_error")
    assert list(error["fields"]) == [f"options.{option}"]


# --- what is refused


@pytest.mark.parametrize(
    ("body", "paths"),
    [
        ({}, ["model", "texts"]),
        ({"model": None, "texts": None}, ["model", "texts"]),
        ({"model": 5, "texts": ["a"]}, ["model"]),
        ({"model": "m", "texts": "a"}, ["texts"]),
        ({"model": "m", "texts": {"a": 1}}, ["texts"]),
        ({"model": "m", "texts": ["a", 5]}, ["texts[1]"]),
        ({"model": "m", "texts": ["a", "b", None]}, ["texts[2]"]),
        ({"model": "m", "texts": [["a"]]}, ["texts[0]"]),
        ({"model": "m", "texts": ["a"], "options": []}, ["options"]),
        ({"model": "m", "text": ["a"]}, ["text"]),
        ({"model": "m", "texts": ["a"], "options": {"dtype": "x", "dimensions": "y"}},
         ["options.dimensions", "options.dtype"]),
    ],
)  # fmt: skip
def test_each_bad_field_is_named_by_its_path(web: Web, body: Any, paths: list[str]) -> None:
    """A validation error names the path of every bad field."""
    assert sorted(refused(web.post("/embed", body), 422, "validation_error")["fields"]) == paths


def test_an_unknown_field_comes_with_the_nearest_known_one(web: Web) -> None:
    """A misspelt field is refused with what was probably meant."""
    error = refused(web.post("/embed", {"model": "m", "textes": ["a"]}), 422, "validation_error")
    assert "texts" in error["fields"]["textes"]


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'"text"', b"null", b'{"a": NaN}', b"\xff\xfe", b"[" * 5000])
def test_what_is_no_json_object_is_refused(web: Web, body: bytes) -> None:
    """A body that is not JSON, or not an object, is bad_json."""
    refused(web.post("/embed", data=body, content_type="application/json"), 400, "bad_json")


@pytest.mark.parametrize("content_type", [None, "text/plain", "application/x-www-form-urlencoded", "application/jsonp"])
def test_only_json_is_read(web: Web, content_type: str | None) -> None:
    """A body of another type, or of none, is refused."""
    answer = web.post("/embed", data=b'{"model": "m", "texts": ["a"]}', content_type=content_type)
    refused(answer, 415, "unsupported_media_type")


def test_a_charset_beside_the_content_type_is_fine(web: Web) -> None:
    """Clients that add a charset to application/json are served."""
    data = b'{"model": "m", "texts": ["a"]}'
    assert web.post("/embed", data=data, content_type="application/json; charset=utf-8").status_code == 200


def test_an_empty_list_is_refused(web: Web) -> None:
    """No texts at all is a mistake of the caller's."""
    refused(web.embed(), 400, "empty_input")


def test_limits_of_a_request(make_web: MakeWeb) -> None:
    """Too many texts, too long a text and too large a body are refused; what is just within the limits is served."""
    limits = Limits(max_texts_per_request=2, max_chars_per_text=20, max_body_bytes=200)
    web = make_web(MODEL, settings=Settings(limits=limits))
    assert web.embed("a" * 20, "b").status_code == 200
    refused(web.embed("a", "b", "c"), 413, "too_many_texts")
    assert list(refused(web.embed("a", "b" * 21), 422, "validation_error")["fields"]) == ["texts[1]"]
    refused(web.embed("a" * 300), 413, "body_too_large")


def test_a_body_of_unknown_length_is_limited_too(make_web: MakeWeb) -> None:
    """The limit of a body holds for chunked ones, which do not tell their length."""
    web = make_web(MODEL, settings=Settings(limits=Limits(max_body_bytes=100)))
    answer = web.post(
        "/embed",
        input_stream=io.BytesIO(b"x" * 101),
        content_type="application/json",
        environ_overrides={"wsgi.input_terminated": True},
    )
    refused(answer, 413, "body_too_large")


def test_an_unknown_model_is_refused_with_near_names(web: Web) -> None:
    """A misspelt model name is answered with the names that resemble it."""
    assert NAME in refused(web.embed("a", model="org/team/n"), 404, "model_not_found")["message"]
    refused(web.embed("a", model=""), 404, "model_not_found")


def test_a_disabled_model_says_so(make_web: MakeWeb) -> None:
    """A model that is switched off is forbidden, not unknown."""
    refused(make_web(f"{MODEL}, enabled: false").embed("a"), 403, "model_disabled")


def test_a_first_load_is_not_waited_for(make_web: MakeWeb, gate: Gate) -> None:
    """While a model loads for the first time its requests get 503 with a time to come back."""
    web = make_web(MODEL, wait=False, open_place=gate.load)
    answer = web.embed("a")
    refused(answer, 503, "model_loading")
    assert int(answer.headers["Retry-After"]) >= 1


def test_a_failed_model_tells_why(make_web: MakeWeb) -> None:
    """A model that did not load answers 503 with the reason and a time to come back."""
    answer = make_web(f"{MODEL}, driver: {{type: fake, config: {{fault: load}}}}").embed("a")
    assert "fault: load" in refused(answer, 503, "model_failed")["message"]
    assert int(answer.headers["Retry-After"]) >= 1


@pytest.mark.parametrize("fault", ["raise", "nan", "short"])
def test_a_text_that_breaks_the_model_is_named(make_web: MakeWeb, fault: str) -> None:
    """A failing text is named by its place in the request, and other requests are served."""
    web = make_web(f"{MODEL}, driver: {{type: fake, config: {{fault: {fault}, fault_text: poison}}}}")
    error = refused(web.embed("a", "b", "poison", "c"), 500, "inference_failed")
    assert list(error["fields"]) == ["texts[2]"]
    assert web.embed("a").status_code == 200


# --- deadlines


def test_at_its_deadline_a_request_gets_504_while_its_batch_runs(make_web: MakeWeb, gate: Gate) -> None:
    """`X-Request-Timeout-Ms` is kept even though the running batch cannot be interrupted."""
    web = make_web(MODEL, open_place=gate.run)
    refused(web.embed("a", headers={"X-Request-Timeout-Ms": "1"}), 504, "deadline_exceeded")


def test_a_deadline_is_never_above_the_servers(make_web: MakeWeb, gate: Gate) -> None:
    """A client cannot wait longer than the server allows."""
    web = make_web(MODEL, open_place=gate.run, request_timeout_s=0.001)
    refused(web.embed("a", headers={"X-Request-Timeout-Ms": "3600000"}), 504, "deadline_exceeded")


@pytest.mark.parametrize("given", ["0", "-1", "1.5", "soon", "", "²"])
def test_a_bad_deadline_is_refused(web: Web, given: str) -> None:
    """A deadline that is not a positive whole number of milliseconds is refused under the header's name."""
    error = refused(web.embed("a", headers={"X-Request-Timeout-Ms": given}), 422, "validation_error")
    assert list(error["fields"]) == ["X-Request-Timeout-Ms"]


@pytest.mark.parametrize("digits", [20, 400, 5000])
def test_an_absurd_deadline_is_no_fault_of_the_server(web: Web, digits: int) -> None:
    """However large the number, the server's own deadline holds or the header is refused."""
    assert web.embed("a", headers={"X-Request-Timeout-Ms": "9" * digits}).status_code in (200, 422)


def test_more_requests_than_may_run_at_once_are_refused(make_web: MakeWeb, gate: Gate) -> None:
    """A request above `max_inflight_global` gets 429 and a time to come back, at once."""
    web = make_web(MODEL, open_place=gate.run, settings=Settings(defaults=Defaults(max_inflight_global=1)))
    answers: list[int] = []
    running = threading.Thread(target=lambda: answers.append(web.embed("first").status_code))
    running.start()
    assert gate.reached.wait(20)
    answer = web.embed("second")
    gate.opened.set()
    running.join(20)
    assert answers == [200]
    refused(answer, 429, "overloaded")
    assert int(answer.headers["Retry-After"]) >= 1
    assert web.embed("third").status_code == 200


def test_a_text_that_fails_may_leave_the_others(make_web: MakeWeb) -> None:
    """With `on_error: partial` it is null and has an entry in `errors`; the others are as ever."""
    web = make_web(MODEL + ", driver: {type: fake, config: {fault: raise, fault_text: bad}}")
    texts = ["good", "w w w", "bad", "last", "bad"]
    options = {"on_error": "partial", "max_seq_length": 4, "truncate": "error"}
    answer = web.embed(*texts, **options).json
    np.testing.assert_allclose([answer["vectors"][i] for i in (0, 3)], unit(raw("good", "last")), atol=1e-6)
    assert [i for i, vector in enumerate(answer["vectors"]) if vector is None] == [1, 2, 4]
    assert [(e["index"], e["code"]) for e in answer["errors"]] == [
        (1, "text_too_long"), (2, "inference_failed"), (4, "inference_failed"),
    ]  # fmt: skip
    assert (answer["meta"]["count"], answer["meta"]["tokens"]) == (5, 6)
    assert web.embed("good", on_error="partial").json["errors"] == []
    assert "errors" not in web.embed("good", on_error="fail").json
    counters = web.status("m")["counters"]
    assert (counters["requests"], counters["texts"]) == (3, 4)


@pytest.mark.parametrize("encoding", ["float", "base64"])
def test_all_texts_may_fail(make_web: MakeWeb, encoding: str) -> None:
    """Then the answer has no vector, whatever was asked of them."""
    web = make_web(MODEL + ", driver: {type: fake, config: {fault: raise, fault_text: bad}}")
    for texts, options in ((["bad"], {}), (["w w w"], {"max_seq_length": 4, "truncate": "error"})):
        answer = web.embed(*texts, on_error="partial", dimensions=8, encoding=encoding, **options)
        assert (answer.status_code, answer.json["vectors"]) == (200, [None])
        assert len(answer.json["errors"]) == 1


def test_an_array_has_no_place_for_errors(web: Web) -> None:
    """`on_error: partial` is refused where the answer is to be .npy."""
    error = refused(
        web.embed("a", on_error="partial", headers={"Accept": "application/x-npy"}), 422, "validation_error"
    )
    assert "options.on_error" in error["fields"]


def test_a_vector_that_does_not_fit_fails_alone(make_web: MakeWeb, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the request goes on without failed texts, float16 may be too small for one of them."""
    web = make_web(MODEL)
    run = FakeDriver.run

    def huge(self: Any, batch: Any) -> Any:
        answer = run(self, batch)
        answer.rows.values[[i for i, text in enumerate(batch.texts) if text == "huge"]] = 1e6
        return answer

    monkeypatch.setattr(FakeDriver, "run", huge)
    options = {"normalize": False, "dtype": "float16"}
    refused(web.embed("a", "huge", **options), 500, "inference_failed")
    answer = web.embed("a", "huge", on_error="partial", **options).json
    assert answer["vectors"][1] is None
    assert [error["index"] for error in answer["errors"]] == [1]
    np.testing.assert_allclose(answer["vectors"][0], raw("a")[0], rtol=1e-2)
    assert web.embed("a", "huge", on_error="partial", dtype="float16").json["errors"] == []


# --- the size of an answer

THREE = {"texts": ["a"] * 3, "input": ["a"] * 3, "inputs": ["a"] * 3, "model": "m"}


@pytest.mark.parametrize(
    ("path", "body", "headers", "size"),
    [
        ("/embed", {}, {}, 3 * 384 * 12),
        ("/embed", {"options": {"dimensions": 100}}, {}, 3 * 100 * 12),
        ("/embed", {"options": {"encoding": "base64"}}, {}, 3 * 384 * 16 / 3),
        ("/embed", {"options": {"precision": "int8"}}, {}, 3 * 384 * 4),
        ("/embed", {}, {"Accept": "application/x-npy"}, 3 * 384 * 4),
        ("/v1/embeddings", {}, {}, 3 * 384 * 12),
        ("/v1/embeddings", {"encoding_format": "base64"}, {}, 3 * 384 * 16 / 3),
        ("/v2/embed", {"embedding_types": ["float", "binary"]}, {}, 3 * 384 * (12 + 5 / 8)),
        ("/api/embed", {}, {}, 3 * 384 * 12),
        ("/tei/m/embed", {}, {}, 3 * 384 * 12),
    ],
)
def test_an_answer_that_would_be_too_large_is_not_made(
    make_web: MakeWeb, path: str, body: dict[str, Any], headers: dict[str, str], size: float
) -> None:
    """Its size is known beforehand, in whatever form, and is about the size of what is sent; nothing is computed."""
    names = {"/embed": ("model", "texts"), "/v2/embed": ("model", "texts"), "/tei/m/embed": ("inputs",)}
    sent = {**{name: THREE[name] for name in names.get(path, ("model", "input"))}, **body}
    fits = make_web(MODEL, settings=Settings(limits=Limits(max_answer_bytes=int(size))))
    answer = fits.post(path, sent, headers=headers)
    assert answer.status_code == 200, answer.text
    assert 0.6 * size < len(answer.data) < 1.25 * size + 1000
    refuses = make_web(MODEL, settings=Settings(limits=Limits(max_answer_bytes=int(size) - 1)))
    answer = refuses.post(path, sent, headers=headers)
    assert answer.status_code == {"/embed": 413, "/tei/m/embed": 422}.get(path, 400)  # as each API says it
    assert "about 0 MB" in answer.text
    assert "application/x-npy" in answer.text
    assert refuses.status("m")["counters"]["batches"] == 0


def test_the_first_answer_of_an_idle_model_is_bounded_too(make_web: MakeWeb) -> None:
    """Its width is known once it is loaded; a body of lines has no such bound."""
    web = make_web(MODEL + ", scaling: {min: 0}", settings=Settings(limits=Limits(max_answer_bytes=10_000)))
    refused(web.embed("a", "b", "c"), 413, "answer_too_large")
    lines = b"".join(b'{"text": "%d"}\n' % i for i in range(100))
    answer = web.post("/embed?model=m", data=lines, content_type="application/x-ndjson")
    assert answer.text.count('"vector"') == 100


# --- what the client does with many texts, each for itself


def client_of(web: Web) -> Client:
    """A client that asks an app without a socket."""
    client = Client("http://nowhere")

    def call(method: str, path: str, body: Any = None, **_: Any) -> Any:
        answer = web.post(path, body)
        if answer.status_code < 300:
            client._told_space = answer.headers["X-Embedpool-Space"]
            return answer.json
        error = EmbedpoolError(answer.json["error"]["message"], fields=answer.json["error"].get("fields"))
        error.status, error.code = answer.status_code, answer.json["error"]["code"]
        raise error

    client._call = call  # type: ignore[method-assign]
    return client


def test_each_text_for_itself(make_web: MakeWeb) -> None:
    """One that fails, that is too long for the server, or holds half a character, takes no other with it."""
    limits = Limits(max_chars_per_text=50)
    web = make_web(
        MODEL + ", driver: {type: fake, config: {fault: raise, fault_text: bad}}", settings=Settings(limits=limits)
    )
    texts = ["good", "x" * 51, "bad", "half \ud83d", "last", "y" * 60]
    found = client_of(web).embed_each(texts, model="m", max_seq_length=9)
    assert {i: code for i, (code, _) in found.errors.items()} == {
        1: "validation_error", 2: "inference_failed", 3: "validation_error", 5: "validation_error",
    }  # fmt: skip
    np.testing.assert_allclose(found.values[[0, 4]], web.vectors("good", "last"), atol=1e-6)
    assert found.space == web.status("m")["space"]
    alone = client_of(web).embed_each(["bad"], model="m")
    assert (list(alone.errors), alone.values.shape[0]) == ([0], 1)
    with pytest.raises(EmbedpoolError, match="dimensions"):
        client_of(web).embed_each(texts, model="m", dimensions=10**6)


def test_too_much_for_one_call_goes_in_halves(make_web: MakeWeb) -> None:
    """With the places of the whole."""
    web = make_web(MODEL, settings=Settings(limits=Limits(max_texts_per_request=3)))
    texts = ["a", "b", "w " * 600, "c", "d", "e", "w " * 600]
    found = client_of(web).embed_each(texts, model="m", dtype="float16")
    assert found.values.dtype == np.float16
    np.testing.assert_allclose(found.values[:2], web.vectors("a", "b"), atol=1e-3)
    np.testing.assert_allclose(found.values[5], web.vectors("e")[0], atol=1e-3)
    assert found.truncated == [2, 6]
    for precision in ("int8", "ubinary"):
        found = client_of(web).embed_each(["a"], model="m", precision=precision)
        assert found.values.tolist() == web.vectors("a", precision=precision).tolist()
