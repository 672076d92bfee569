"""A remote embedding service, played by a small server on this machine."""

from __future__ import annotations

import base64
import dataclasses
import gc
import gzip
import ipaddress
import json
import socket
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from embedpool.config import guard
from embedpool.config.spec import DriverSpec, HttpConfig, ModelSpec, PoolSpec
from embedpool.drivers import http, make_driver, open_tokenizer, upstream
from embedpool.drivers.http import HttpDriver
from embedpool.drivers.protocols import RAW
from embedpool.errors import InferenceFailed, ModelFailed, UnsupportedOption, UpstreamError
from embedpool.pool.pool import Pool
from embedpool.pool.settings import PoolSettings
from embedpool.tasks.driver import Folders
from embedpool.tasks.embed import Embed
from tests.conftest import NOWHERE, ask, fake_spec, open_here, run, settle, wait_until
from tests.drivers.remote import DRIP, DROP, HANG, Handler, Remote, Reply, Seen, good, vector

KEY = "s3cr3t-key"


# --- the protocols


def test_an_address_is_looked_at_when_it_is_connected_to(
    remote: Remote, opened: Callable[..., HttpDriver], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name that stands for another address by now gets nothing of a text, nor a key."""
    monkeypatch.setattr(guard, "METADATA", {ipaddress.ip_address("127.0.0.1")})
    with pytest.raises(UpstreamError, match="secrets"):
        opened(retries=0)
    assert remote.seen == []


@pytest.mark.parametrize(
    ("protocol", "path", "url", "body", "tokens", "truncated"),
    [
        ("embedpool", "/some/embed", "/some/embed", {"model": "r", "texts": ["a", "bc"], "options": RAW}, 7, [0]),
        ("openai", "/v1", "/v1/embeddings", {"model": "r", "input": ["a", "bc"], "encoding_format": "float"}, 5, []),
        ("openai", "/v1/", "/v1/embeddings", {"model": "r", "input": ["a", "bc"], "encoding_format": "float"}, 5, []),
        ("tei", "", "/embed", {"inputs": ["a", "bc"], "normalize": False, "truncate": True}, None, []),
        ("cohere", "", "/v2/embed", {"model": "r", "texts": ["a", "bc"], "input_type": "search_document",
                                     "embedding_types": ["float"], "truncate": "END"}, 3, []),
        ("jina", "/v1", "/v1/embeddings", {"model": "r", "input": ["a", "bc"], "embedding_type": "float",
                                           "normalized": False, "truncate": True}, 5, []),
        ("voyage", "/v1", "/v1/embeddings", {"model": "r", "input": ["a", "bc"], "output_dtype": "float",
                                             "truncation": True}, 5, []),
        ("ollama", "", "/api/embed", {"model": "r", "input": ["a", "bc"], "truncate": True}, 9, []),
    ],
)  # fmt: skip
def test_each_protocol_asks_and_reads_its_way(
    remote: Remote,
    opened: Callable[..., HttpDriver],
    protocol: str,
    path: str,
    url: str,
    body: Any,
    tokens: int | None,
    truncated: list[int],
) -> None:
    """A service is asked at the address and with the body of its protocol; counts it tells are taken over."""
    driver = opened(base_url=remote.url + path, protocol=protocol, remote_model="r")
    answer = run(driver, ["a", "bc"])
    assert [(seen.path, seen.body) for seen in remote.seen] == [(url, body)]
    np.testing.assert_array_equal(answer.rows.values, [vector("a"), vector("bc")])
    assert answer.rows.values.dtype == np.float32
    assert (answer.tokens, list(answer.truncated)) == (tokens, truncated)


def test_the_remote_model_is_by_default_the_models_name(remote: Remote, opened: Callable[..., HttpDriver]) -> None:
    """Without `remote_model` the service is asked for the name the model has here."""
    run(opened(), ["a"])
    assert remote.seen[0].body["model"] == "org/m"


@pytest.mark.parametrize(
    ("protocol", "options", "sent"),
    [
        (
            "embedpool",
            {"instruction": "x", "truncate": "left"},
            {"options": {**RAW, "instruction": "x", "truncate": "left"}},
        ),
        ("openai", {"instruction": "x", "user": "u"}, {"instruction": "x", "user": "u"}),
        ("tei", {"prompt_name": "query"}, {"prompt_name": "query"}),
        ("tei", {"truncate": "error"}, {"truncate": False}),
        ("openai", {"input_type": "query"}, {"input_type": "query"}),
        ("tei", {"truncate": "left"}, {"truncate": True, "truncation_direction": "Left"}),
        ("cohere", {"input_type": "query"}, {"input_type": "search_query"}),
        ("cohere", {"input_type": "classification", "priority": 1}, {"input_type": "classification", "priority": 1}),
        ("cohere", {"truncate": "left", "max_seq_length": 9}, {"truncate": "START", "max_tokens": 9}),
        ("cohere", {"truncate": "error"}, {"truncate": "NONE"}),
        ("jina", {"input_type": "search_query"}, {"task": "retrieval.query"}),
        (
            "jina",
            {"input_type": "text-matching", "late_chunking": False},
            {"task": "text-matching", "late_chunking": False},
        ),
        ("jina", {"truncate": "error"}, {"truncate": False}),
        ("voyage", {"input_type": "passage", "truncate": "error"}, {"input_type": "document", "truncation": False}),
        ("ollama", {"truncate": "error", "keep_alive": "5m"}, {"truncate": False, "keep_alive": "5m"}),
    ],
)
def test_options_are_passed_on(
    remote: Remote, opened: Callable[..., HttpDriver], protocol: str, options: Any, sent: Any
) -> None:
    """Options that are not ours reach the service in the form of its protocol."""
    run(opened(protocol=protocol), ["a"], None, options)
    assert {name: remote.seen[0].body[name] for name in sent} == sent


@pytest.mark.parametrize(("protocol", "keys"), [
    ("tei", {"inputs", "normalize", "truncate"}), ("ollama", {"model", "input", "truncate"}),
])  # fmt: skip
def test_a_service_is_not_told_what_it_does_not_know(
    remote: Remote, opened: Callable[..., HttpDriver], protocol: str, keys: set[str]
) -> None:
    """A client that always says what its texts are for works with a service that has no such notion."""
    run(opened(protocol=protocol), ["a"], None, {"input_type": "query"})
    assert set(remote.seen[0].body) == keys


@pytest.mark.parametrize(("protocol", "options"), [
    ("openai", ["truncate", "max_seq_length", "prompt_name"]), ("tei", ["max_seq_length"]), ("cohere", ["prompt_name"]),
    *((name, ["max_seq_length", "prompt_name", "truncate"]) for name in ("jina", "voyage", "ollama")),
])  # fmt: skip
def test_what_a_protocol_cannot_ask_for_is_refused(
    remote: Remote, opened: Callable[..., HttpDriver], protocol: str, options: list[str]
) -> None:
    """An option that the service has no word for is refused by its path, not dropped."""
    driver = opened(protocol=protocol)
    for option in options:
        with pytest.raises(UnsupportedOption) as caught:
            run(driver, ["a"], None, {option: "left"})
        assert list(caught.value.fields) == [f"options.{option}"]
    assert not remote.seen


# --- a service that driver.config describes

PREDICT = {"instances": [{"content": "{text}", "task": "x"}], "model": "{model}", "n": [1, "{model}"]}


@pytest.mark.parametrize(("request_", "vectors", "sent", "answer"), [
    ({"inputs": "{texts}", "fixed": {"a": [1, 2]}}, "[]", {"inputs": ["a", "bc"], "fixed": {"a": [1, 2]}},
     [vector("a"), vector("bc")]),
    (PREDICT, "predictions[].embeddings.values",
     {"instances": [{"content": "a", "task": "x"}, {"content": "bc", "task": "x"}], "model": "r", "n": [1, "r"]},
     {"predictions": [{"embeddings": {"values": vector("a")}}, {"embeddings": {"values": vector("bc")}}]}),
    ({"requests": [{"content": {"parts": [{"text": "{text}"}]}}]}, "embeddings[].values",
     {"requests": [{"content": {"parts": [{"text": t}]}} for t in ("a", "bc")]},
     {"embeddings": [{"values": vector("a")}, {"values": vector("bc")}]}),
    ({"q": "{texts}"}, "result.vectors", {"q": ["a", "bc"]}, {"result": {"vectors": [vector("a"), vector("bc")]}}),
])  # fmt: skip
def test_a_service_is_asked_and_read_by_a_template(
    remote: Remote, opened: Callable[..., HttpDriver], request_: Any, vectors: str, sent: Any, answer: Any
) -> None:
    """The body as it is written, with name and texts in their slots, sent to the very URL."""

    def by_the_template(seen: Seen) -> Reply:
        return Reply(answer) if seen.body == sent else Reply(_like(answer, 3))

    remote.answer = by_the_template
    url = f"{remote.url}/a/path?api-version=1"
    driver = opened(base_url=url, protocol="template", remote_model="r", request=request_, vectors=vectors)
    np.testing.assert_array_equal(run(driver, ["a", "bc"]).rows.values, [vector("a"), vector("bc")])
    assert [(seen.path, seen.body) for seen in remote.seen] == [("/a/path?api-version=1", sent)]


def _like(answer: Any, count: int) -> Any:
    """An answer of the same form for the three texts of the proof."""
    if isinstance(answer, dict):
        return {name: _like(value, count) for name, value in answer.items()}
    return [answer[0]] * count


def test_a_slot_may_stand_inside_a_string(remote: Remote, opened: Callable[..., HttpDriver]) -> None:
    """Some services want an instruction before each text; a text that looks like a slot is a text."""
    remote.answer = lambda seen: Reply([vector(entry["q"]) for entry in seen.body["of"]])
    request = {"of": [{"q": "passage: {text}", "m": "models/{model}"}]}
    driver = opened(protocol="template", request=request, vectors="[]", remote_model="r")
    run(driver, ["a", "{model} {texts}"])
    assert remote.seen[0].body == {
        "of": [{"q": "passage: a", "m": "models/r"}, {"q": "passage: {model} {texts}", "m": "models/r"}]
    }


def test_one_text_a_call_has_a_template_too(remote: Remote, opened: Callable[..., HttpDriver]) -> None:
    """Some services take no list."""
    remote.answer = lambda seen: Reply({"embedding": [vector(seen.body["prompt"])]})
    driver = opened(
        protocol="template", request={"prompt": "{text}"}, vectors="embedding", max_batch_texts=1, remote_model="r"
    )
    assert len(run(driver, ["abc"]).rows) == 1
    assert remote.seen[0].body == {"prompt": "abc"}


def test_a_text_without_its_vector_is_at_fault_alone_by_a_template_too(
    remote: Remote, opened: Callable[..., HttpDriver]
) -> None:
    """A null stands in its place."""
    driver_config = {"protocol": "template", "request": {"q": "{texts}"}, "vectors": "data[].v"}
    remote.answer = lambda seen: Reply({"data": [{"v": vector(t) if t != "bad" else None} for t in seen.body["q"]]})
    rows = run(opened(**driver_config), ["a", "bad", "c"]).rows
    assert rows.finite().tolist() == [True, False, True]


@pytest.mark.parametrize("name", ["truncate", "max_seq_length", "prompt_name", "user"])
def test_a_template_has_no_place_for_options(remote: Remote, opened: Callable[..., HttpDriver], name: str) -> None:
    """All are refused but what texts are for, which `prompts` may serve."""
    remote.answer = lambda seen: Reply([vector(t) for t in seen.body["q"]])
    driver = opened(protocol="template", request={"q": "{texts}"}, vectors="[]")
    with pytest.raises(UnsupportedOption):
        run(driver, ["a"], None, {name: "x"})
    assert len(run(driver, ["a"], None, {"input_type": "query"}).rows) == 1


def test_openai_vectors_are_sorted_by_index(remote: Remote, opened: Callable[..., HttpDriver]) -> None:
    """The order of `data` does not matter, its indices do."""
    driver = opened(protocol="openai")
    remote.script = [Reply({"data": [{"index": i, "embedding": [i, 0, 1]} for i in (2, 0, 1)]})]
    answer = run(driver, ["a", "b", "c"])
    np.testing.assert_array_equal(answer.rows.values[:, 0], [0, 1, 2])
    assert answer.tokens is None


# --- answers that are none

ONE = [[1.0, 2.0, 3.0]]
NO_ANSWERS = {
    "not JSON": Reply(b"<html>hello</html>"),
    "empty": Reply(b""),
    "not an object": Reply([1, 2]),
    "a string": Reply("vectors"),
    "null": Reply(None),
    "no vectors": Reply({"data": ONE}),
    "vectors are null": Reply({"vectors": None}),
    "too many": Reply({"vectors": ONE * 3}),
    "too few": Reply({"vectors": ONE}),
    "none": Reply({"vectors": []}),
    "wrong dimension": Reply({"vectors": [[1.0, 2.0]] * 2}),
    "no dimension": Reply({"vectors": [[], []]}),
    "flat": Reply({"vectors": [1.0, 2.0]}),
    "nested": Reply({"vectors": [ONE, ONE]}),
    "words": Reply({"vectors": [["a", "b", "c"]] * 2}),
    "objects": Reply({"vectors": [{"a": 1}] * 2}),
    "an absurd number": Reply({"vectors": [[10**400, 1, 1]] * 2}),
    "odd truncated": Reply({"vectors": ONE * 2, "meta": {"truncated": ["first"]}}),
    "odd tokens": Reply({"vectors": ONE * 2, "meta": {"tokens": "seven"}}),
    "odd meta": Reply({"vectors": ONE * 2, "meta": "none"}),
}


@pytest.mark.parametrize("kind", NO_ANSWERS)
def test_an_answer_that_is_none_is_the_remotes_fault(
    remote: Remote, opened: Callable[..., HttpDriver], kind: str
) -> None:
    """Whatever a service answers but a vector of the known dimension for each text is an upstream_error, 502."""
    driver = opened()
    remote.script = [NO_ANSWERS[kind]]
    with pytest.raises(UpstreamError) as caught:
        run(driver, ["a", "b"])
    assert (caught.value.status, caught.value.code) == (502, "upstream_error")
    assert caught.value.content_may_cause  # one of the texts may have upset it
    assert len(run(driver, ["a", "b"]).rows.values) == 2  # it goes on


def test_an_error_with_a_good_status_is_one(remote: Remote, opened: Callable[..., HttpDriver]) -> None:
    """And its words reach the caller."""
    driver = opened()
    remote.script = [Reply({"error": {"message": "quota"}})]
    with pytest.raises(UpstreamError, match="200 with an error: quota") as caught:
        run(driver, ["a"])
    assert "quota" not in caught.value.for_the_log  # which is what /status and the log have, too


@pytest.mark.parametrize("odd", [[1.0], [1.0] * 4], ids=repr)
def test_a_vector_of_another_length_is_its_texts_fault_alone(
    remote: Remote, opened: Callable[..., HttpDriver], odd: Any
) -> None:
    """Also where it is as many as the right ones, or more."""
    driver = opened()
    remote.script = [Reply({"vectors": [odd, [1.0, 2.0, 3.0]]}), Reply({"vectors": [odd, [1.0, 2.0, 3.0], odd]})]
    assert run(driver, ["a", "b"]).rows.finite().tolist() == [False, True]
    assert run(driver, ["a", "b", "c"]).rows.finite().tolist() == [False, True, False]


@pytest.mark.parametrize("odd", [None, [], [1.0], "words", {}, ["a", "b", "c"]], ids=repr)
def test_a_text_without_a_sound_vector_is_at_fault_alone(
    remote: Remote, opened: Callable[..., HttpDriver], odd: Any
) -> None:
    """The other rows of the answer are as good as ever."""
    driver = opened()
    remote.script = [Reply({"vectors": [[1.0, 2.0, 3.0], odd, [4.0, 5.0, 6.0]]})]
    rows = run(driver, ["a", "b", "c"]).rows
    assert rows.finite().tolist() == [True, False, True]
    np.testing.assert_array_equal(rows.values[2], [4, 5, 6])


def test_another_embedpool_is_asked_for_base64(remote: Remote, opened: Callable[..., HttpDriver]) -> None:
    """It costs both sides less than JSON; the numbers are the same to the last bit, and one that is none is told."""
    driver = opened()
    numbers = np.array([[0.1, -2.5, 3e-12], [1.0, 2.0, 3.0]], np.float32)
    odd = np.array([np.nan, 1.0, 2.0], np.float32)
    encoded = [base64.b64encode(row.astype("<f4").tobytes()).decode() for row in (*numbers, odd)]
    remote.script = [Reply({"vectors": encoded})]
    rows = run(driver, ["a", "b", "c"]).rows
    assert remote.seen[-1].body["options"]["encoding"] == "base64"
    np.testing.assert_array_equal(rows.values[:2], numbers)
    assert rows.finite().tolist() == [True, True, False]


@pytest.mark.parametrize("protocol", ["openai", "tei"])
def test_the_answer_of_another_protocol_is_named_as_such(
    remote: Remote, opened: Callable[..., HttpDriver], protocol: str
) -> None:
    """A service of another kind than configured is recognised when the driver opens."""
    remote.answer = lambda seen: Reply({"vectors": ONE})
    with pytest.raises(UpstreamError, match=protocol):
        opened(protocol=protocol)


def test_indices_beyond_the_texts_are_dropped(remote: Remote, opened: Callable[..., HttpDriver]) -> None:
    """A service that tells nonsense about truncation does not harm its vectors."""
    driver = opened()
    remote.script = [Reply({"vectors": ONE * 2, "meta": {"truncated": [-1, 1, 7]}})]
    assert list(run(driver, ["a", "b"]).truncated) == [1]


@pytest.mark.parametrize("number", [b"NaN", b"Infinity", b"null", b"1e39"])
def test_a_service_without_finite_vectors_does_not_open(
    remote: Remote, opened: Callable[..., HttpDriver], number: bytes
) -> None:
    """A service that gives no finite vector for a plain sentence cannot serve, and says so when it opens."""
    remote.answer = lambda seen: Reply(b'{"vectors": [[1.0, %s, 2.0]]}' % number)
    with pytest.raises(UpstreamError):
        opened()


def test_one_vector_that_is_not_finite_fails_one_request(
    remote: Remote, pool_settings: PoolSettings, pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A NaN in the remote's answer fails the request of that text, named by its place; others are served."""

    def answer(seen: Seen) -> Reply:
        return Reply({"vectors": [[float("nan"), 1, 1] if "bad" in t else vector(t) for t in seen.body["texts"]]})

    remote.answer = answer
    pool.apply(fake_spec(f"model: m, driver: {{type: http, config: {{base_url: '{remote.url}'}}}}"))
    settle(pool)
    with pytest.raises(Exception, match=r"texts\[1\]"):
        ask(pool, "m", "good", "bad")
    assert ask(pool, "m", "good").vectors.shape == (1, 3)


def test_options_and_counts_through_the_pool(remote: Remote, pool: Pool) -> None:
    """Unknown options go to the remote, output options stay ours, and the remote's token count is reported."""
    pool.apply(fake_spec(f"model: m, driver: {{type: http, config: {{base_url: '{remote.url}', remote_model: r}}}}"))
    settle(pool)
    remote.seen.clear()
    result = ask(pool, "m", "a", "bc", normalize=False, dimensions=2, extra={"instruction": "x"})
    assert [seen.body for seen in remote.seen] == [
        {"model": "r", "texts": ["a", "bc"], "options": {**RAW, "instruction": "x"}}
    ]
    np.testing.assert_array_equal(result.vectors, [vector("a")[:2], vector("bc")[:2]])
    assert (result.tokens, result.truncated) == (7, [0])


# --- errors and retries


@pytest.mark.parametrize(
    ("status", "ours", "content"),
    [
        (400, 400, True),
        (413, 413, True),
        (422, 422, True),
        (429, 429, False),
        (401, 502, False),
        (403, 502, True),
        (404, 502, True),
        (424, 502, True),
        (500, 502, True),
        (503, 502, True),
        (204, 502, False),
    ],
)
def test_the_status_of_a_refusal(
    remote: Remote, opened: Callable[..., HttpDriver], status: int, ours: int, content: bool
) -> None:
    """The remote's 400, 413, 422 and 429 keep their class, all else is 502; the status is told."""
    driver = opened(retries=0)
    remote.script = [Reply({"error": {"message": "no thanks"}} if status != 204 else b"", status)]
    with pytest.raises(UpstreamError, match=str(status)) as caught:
        run(driver, ["a"])
    assert (caught.value.status, caught.value.content_may_cause) == (ours, content)


@pytest.mark.parametrize("retries", [0, 1])
@pytest.mark.parametrize("status", [422, 500, 503])
@pytest.mark.parametrize(
    "document",
    [
        {"error": {"message": "no thanks"}},
        {"error": "no thanks", "error_type": "Validation"},
        {"detail": "no thanks"},
        {"message": "no thanks"},
        b"no\n thanks",
    ],
    ids=["openai", "tei", "detail", "message", "text"],
)
def test_the_message_of_a_refusal_is_passed_on(
    remote: Remote, opened: Callable[..., HttpDriver], document: Any, status: int, retries: int
) -> None:
    """What the remote says is told, in whichever shape it says it and however often it was asked."""
    driver = opened(retries=retries)
    remote.answer = lambda seen: Reply(document, status)
    with pytest.raises(UpstreamError, match="no thanks"):
        run(driver, ["a"])


def test_a_long_message_is_shortened(remote: Remote, opened: Callable[..., HttpDriver]) -> None:
    """A remote that answers a page of HTML does not fill the error."""
    driver = opened(retries=0)
    remote.script = [Reply(b"x" * 100_000, 400)]
    with pytest.raises(UpstreamError) as caught:
        run(driver, ["a"])
    assert len(caught.value.message) < 500


@pytest.mark.parametrize(
    "failure",
    [
        Reply({}, 503, {"Retry-After": "0"}),
        Reply({}, 500),
        Reply({}, 502),
        Reply({}, 504),
        DROP,
    ],
    ids=["503", "500", "502", "504", "dropped connection"],
)
def test_a_passing_failure_is_tried_again(remote: Remote, opened: Callable[..., HttpDriver], failure: Reply) -> None:
    """5xx and connection errors are tried again, as often as `retries` says, and then nobody notices."""
    driver = opened(retries=2)
    remote.script = [failure, failure]
    assert len(run(driver, ["a"]).rows.values) == 1
    assert len(remote.seen) == 3
    assert remote.seen[0].body == remote.seen[2].body


@pytest.mark.parametrize("failure", [Reply({}, 503), Reply(b"garbage"), DROP], ids=lambda r: str(r.status))
def test_a_failure_keeps_nothing_of_its_caller(
    remote: Remote, opened: Callable[..., HttpDriver], failure: Reply
) -> None:
    """Not until garbage is collected: callers hold texts, and a service that is down fails many."""
    driver = opened(retries=1)
    remote.answer = lambda seen: failure

    def call() -> weakref.ref[set[str]]:
        texts = {"a"}
        with suppress(UpstreamError):
            run(driver, list(texts))
        return weakref.ref(texts)

    gc.disable()
    try:
        assert call()() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("failure", [Reply({}, 503), DROP], ids=["503", "dropped connection"])
def test_a_lasting_failure_is_given_up(remote: Remote, opened: Callable[..., HttpDriver], failure: Reply) -> None:
    """After `retries` further attempts the error is told."""
    driver = opened(retries=1)
    remote.answer = lambda seen: failure
    with pytest.raises(UpstreamError) as caught:
        run(driver, ["a"])
    assert caught.value.status == 502
    assert len(remote.seen) == 2


@pytest.mark.parametrize("status", [400, 401, 404, 422])
def test_a_refusal_is_not_tried_again(remote: Remote, opened: Callable[..., HttpDriver], status: int) -> None:
    """What will not change by asking again is asked once."""
    driver = opened(retries=2)
    remote.script = [Reply({}, status)]
    with pytest.raises(UpstreamError):
        run(driver, ["a"])
    assert len(remote.seen) == 1


@pytest.mark.parametrize(
    ("given", "seconds"),
    [("7", 7), ("0", 0), ("soon", None), ("Wed, 21 Oct 2015 07:28:00 GMT", 0), ("nan", None), ("inf", None),
     ("-5", None)],
)  # fmt: skip
def test_retry_after_is_handed_on(
    remote: Remote, opened: Callable[..., HttpDriver], given: str, seconds: float | None
) -> None:
    """A time to come back that the remote tells, in seconds or by date, reaches the client; all else is no time."""
    driver = opened(retries=0)
    remote.script = [Reply({}, 429, {"Retry-After": given})]
    with pytest.raises(UpstreamError) as caught:
        run(driver, ["a"])
    assert caught.value.retry_after_s == seconds


def test_a_redirect_is_not_followed(remote: Remote, opened: Callable[..., HttpDriver]) -> None:
    """A redirect would carry texts and key elsewhere: it is an error."""
    driver = opened()
    remote.script = [Reply({}, 307, {"Location": f"{remote.url}/elsewhere"})]
    with pytest.raises(UpstreamError, match="307"):
        run(driver, ["a"])
    assert [seen.path for seen in remote.seen] == ["/"]


def test_a_service_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A refused connection is told without the address and its credentials."""
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    driver = HttpDriver("m", HttpConfig(base_url=f"http://user:{KEY}@127.0.0.1:{port}/embed", retries=0), tmp_path, {})
    with pytest.raises(UpstreamError, match="connection failed") as caught:
        open_here(driver)
    assert KEY not in str(caught.value)


@pytest.mark.parametrize("retries", [0, 1])
def test_a_service_that_does_not_answer_in_time(
    remote: Remote, opened: Callable[..., HttpDriver], retries: int
) -> None:
    """An answer that takes longer than `timeout_s` is an error that says so."""
    driver = opened(retries=retries)
    driver._config = dataclasses.replace(driver._config, timeout_s=0.05)
    remote.answer = lambda seen: HANG
    with pytest.raises(UpstreamError, match="timed out") as caught:
        run(driver, ["a"])
    assert (caught.value.status, caught.value.content_may_cause) == (502, True)


# --- secrets


@pytest.fixture
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMBEDPOOL_SECRET_KEY", KEY)
    monkeypatch.setenv("EMBEDPOOL_SECRET_OTHER", "0th3r-secret")


SECRET_CONFIG = {"api_key": "EMBEDPOOL_SECRET_KEY", "headers": {"X-Other": "EMBEDPOOL_SECRET_OTHER"}}


@pytest.mark.usefixtures("key")
def test_key_and_headers_come_from_the_environment(remote: Remote, opened: Callable[..., HttpDriver]) -> None:
    """`api_key` names the variable of the bearer key, `headers` those of further headers."""
    run(opened(**SECRET_CONFIG), ["a"])
    assert remote.seen[0].headers["Authorization"] == f"Bearer {KEY}"
    assert remote.seen[0].headers["X-Other"] == "0th3r-secret"


@pytest.mark.usefixtures("key")
def test_the_key_is_sent_whatever_netrc_says(
    remote: Remote, opened: Callable[..., HttpDriver], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A ~/.netrc of whoever started the server does not take the place of the configured key."""
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login somebody password else\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    run(opened(**SECRET_CONFIG), ["a"])
    assert remote.seen[0].headers["Authorization"] == f"Bearer {KEY}"


@pytest.mark.parametrize("value", [None, ""])
@pytest.mark.parametrize("config", [{"api_key": "EMBEDPOOL_SECRET_X"}, {"headers": {"X-Key": "EMBEDPOOL_SECRET_X"}}])
def test_a_missing_variable_is_named(
    remote: Remote, opened: Callable[..., HttpDriver], monkeypatch: pytest.MonkeyPatch, config: Any, value: str | None
) -> None:
    """A variable that is not set, or empty, is named, and the service is not asked without its key."""
    if value is not None:
        monkeypatch.setenv("EMBEDPOOL_SECRET_X", value)
    with pytest.raises(UpstreamError, match="EMBEDPOOL_SECRET_X"):
        opened(**config)
    assert not remote.seen


@pytest.mark.usefixtures("key")
@pytest.mark.parametrize("as_json", [True, False])
def test_a_key_that_the_remote_echoes_is_not_repeated(
    remote: Remote, opened: Callable[..., HttpDriver], as_json: bool
) -> None:
    """Error messages never hold a secret, not even if the remote's own message does."""
    driver = opened(retries=0, **SECRET_CONFIG)
    says = f"bad key Bearer {KEY} or 0th3r-secret"
    remote.script = [Reply({"error": {"message": says}} if as_json else says.encode(), 401)]
    with pytest.raises(UpstreamError, match="bad key") as caught:
        run(driver, ["a"])
    assert KEY not in caught.value.message
    assert "0th3r" not in caught.value.message


@pytest.mark.usefixtures("key")
def test_a_key_at_the_edge_of_a_shortened_message(remote: Remote, opened: Callable[..., HttpDriver]) -> None:
    """Not even a part of a secret is left where a long message is cut."""
    driver = opened(retries=0, **SECRET_CONFIG)
    remote.script = [Reply(b"x" * (upstream.LONGEST_QUOTE - 4) + KEY.encode(), 401)]
    with pytest.raises(UpstreamError) as caught:
        run(driver, ["a"])
    assert KEY[:3] not in caught.value.message


@pytest.mark.parametrize("echo", [Reply({"error": {"message": f"no {KEY} here"}}, 401), Reply(KEY.encode(), 500)])
def test_a_password_in_the_address_is_shown_nowhere(remote: Remote, opened: Callable[..., HttpDriver], echo) -> None:
    """Not in an error, even if the remote repeats it, and not in what /status shows."""
    address = remote.url.replace("://", f"://user:{KEY}@")
    driver = opened(base_url=address, base_urls=(address + "/other",), retries=0)
    remote.answer = lambda seen: echo
    with pytest.raises(UpstreamError) as caught:
        run(driver, ["a"])
    assert KEY not in str(caught.value)
    assert KEY not in str(driver.facts.description)


# --- one text among those of many callers


@pytest.mark.parametrize("kind", ["500", "422", "424", "html", "null", "empty", "short", "nan"])
def test_what_a_service_cannot_bear_costs_its_own_caller_alone(
    remote: Remote, pool_settings: PoolSettings, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    """And nobody else reads its text, in an answer or in the log."""

    def answer(seen: Seen) -> Reply:
        texts = seen.body["texts"]
        bad = [i for i, text in enumerate(texts) if "poison" in text]
        vectors: list[Any] = [vector(text) for text in texts]
        if bad and kind.isdigit():
            return Reply({"error": f"cannot embed {texts}"}, int(kind))
        if bad and kind == "html":
            return Reply(f"<html>{texts}</html>".encode())
        if bad and kind == "short":
            del vectors[bad[0]]
        for i in bad if kind in ("null", "empty", "nan") else ():
            vectors[i] = {"null": None, "empty": [], "nan": [float("nan")] * 3}[kind]
        return Reply({"vectors": vectors})

    remote.answer = answer
    pool = Pool(pool_settings)
    spec = ModelSpec("m", DriverSpec("http", HttpConfig(base_url=remote.url, normalize=False, retries=0)))
    try:
        pool.apply(PoolSpec((spec,)))
        settle(pool)
        texts = [f"text {'x' * i}" for i in range(40)]
        texts[7] = "poison of caller seven"
        with ThreadPoolExecutor(len(texts)) as callers:
            found = [callers.submit(ask, pool, "m", text) for text in texts]
        for text, future in zip(texts, found, strict=True):
            if text == texts[7]:
                assert isinstance(future.exception(), UpstreamError | InferenceFailed)
            else:
                np.testing.assert_array_equal(future.result().vectors, [vector(text)])
    finally:
        pool.stop()
    assert "caller seven" not in caplog.text


@pytest.mark.parametrize("how", ["plain", "gzip", "chunked", "refused"])
def test_a_connection_serves_many_calls(
    remote: Remote, opened: Callable[..., HttpDriver], monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """However an answer comes, it is read to its end."""
    connections = set()

    class KeepsAlive(Handler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            connections.add(self.client_address)
            body = self.rfile.read(int(self.headers["Content-Length"]))
            answer = json.dumps(good(Seen(self.path, self.headers, json.loads(body))).document).encode()
            self.send_response(422 if how == "refused" else 200)
            if how == "gzip":
                answer = gzip.compress(answer)
                self.send_header("Content-Encoding", "gzip")
            if how == "chunked":
                self.send_header("Transfer-Encoding", "chunked")
                answer = b"%x\r\n%b\r\n0\r\n\r\n" % (len(answer), answer)
            else:
                self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

    driver = opened()
    monkeypatch.setattr(remote, "RequestHandlerClass", KeepsAlive)
    for _ in range(3):
        with suppress(UpstreamError) if how == "refused" else nullcontext():
            run(driver, ["a", "b"])
    assert len(connections) == 1
    driver.close()  # the server serves one connection at a time, to its end


def test_an_answer_that_drips_has_the_same_time_as_any(remote: Remote, opened: Callable[..., HttpDriver]) -> None:
    """Each byte comes soon enough, and the answer never ends."""
    driver = opened(retries=0, timeout_s=0.3)
    remote.script = [DRIP]
    with pytest.raises(UpstreamError, match="timed out"):
        run(driver, ["a"])
    remote.closing.set()


@pytest.mark.parametrize("encoding", ["identity", "gzip"])
def test_an_answer_has_its_bound(
    remote: Remote, opened: Callable[..., HttpDriver], monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    """As it is when it is unpacked, whatever was sent for it."""
    driver = opened(retries=0)
    monkeypatch.setattr(http, "LARGEST_VECTOR_BYTES", 1000)
    monkeypatch.setattr(http, "LARGEST_REST_BYTES", 0)
    body = b" " * 1_000_000
    remote.script = [Reply(gzip.compress(body) if encoding == "gzip" else body, headers={"Content-Encoding": encoding})]
    with pytest.raises(UpstreamError, match="larger than 1000 bytes"):
        run(driver, ["a"])
    assert len(run(driver, ["a"]).rows) == 1


# --- proxies


class Proxied(NamedTuple):
    """What a proxy saw: the address it was to call, and the key that was sent with it."""

    target: str
    key: str | None


def through(remote: Remote) -> list[Proxied]:
    """A proxy is given the whole URL as the path."""
    return [Proxied(seen.path, seen.headers["Authorization"]) for seen in remote.seen]


@pytest.fixture
def _named_proxy(remote: Remote, monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment names a proxy, and a key is set."""
    for name in ("HTTP_PROXY", "http_proxy"):
        monkeypatch.setenv(name, remote.url)
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("EMBEDPOOL_SECRET_X", KEY)


AWAY = "http://embeddings.invalid/embed"


@pytest.mark.usefixtures("_named_proxy")
def test_a_proxy_of_the_environment_is_used_where_it_is_asked_for(
    remote: Remote, opened: Callable[..., HttpDriver], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody else gets the key; the log says that a proxy is there and is not used."""
    driver = opened(base_url=AWAY, proxy="env", api_key="EMBEDPOOL_SECRET_X")
    run(driver, ["abc"])
    assert through(remote) == [(AWAY, f"Bearer {KEY}")]
    remote.seen.clear()
    unasked = HttpDriver("m", HttpConfig(base_url=AWAY, api_key="EMBEDPOOL_SECRET_X", retries=0), tmp_path, {})
    with pytest.raises(UpstreamError, match="connection failed"):
        open_here(unasked)
    assert remote.seen == []
    assert "embeddings.invalid is called directly" in caplog.text


@pytest.mark.usefixtures("_named_proxy")
@pytest.mark.parametrize("proxy", [None, "env", "http://127.0.0.1:9"])
def test_loopback_is_reached_without_a_proxy(
    second: Remote, remote: Remote, opened: Callable[..., HttpDriver], proxy: str | None
) -> None:
    """A proxy has no way to it."""
    driver = opened(base_url=second.url, proxy=proxy)
    run(driver, ["abc"])
    assert remote.seen == []


def test_a_proxy_of_its_own(remote: Remote, opened: Callable[..., HttpDriver]) -> None:
    """Its URL stands in driver.config, without a password."""
    driver = opened(base_url=AWAY, proxy=remote.url)
    run(driver, ["abc"])
    assert [seen.target for seen in through(remote)] == [AWAY]


# --- several addresses, and one that fails for long


def several(first: Remote, second: Remote, **config: Any) -> dict[str, Any]:
    return {"base_url": first.url, "base_urls": (second.url,), **config}


def states(driver: HttpDriver) -> list[str]:
    found = driver.facts.description["base_urls"]
    assert isinstance(found, dict)
    return list(found.values())


@pytest.fixture
def _quick_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "RECHECK_S", 0.02)


@pytest.mark.usefixtures("_quick_checks")
def test_calls_go_to_the_least_busy_address(remote: Remote, second: Remote, opened: Callable[..., HttpDriver]) -> None:
    """While one of two holds a call, the other gets the next ones."""
    driver = opened(**several(remote, second))
    wait_until(lambda: states(driver) == ["serves", "serves"])
    second.seen.clear()
    with driver._upstreams[0].call():
        for _ in range(5):
            run(driver, ["a"])
    assert (len(remote.seen), len(second.seen)) == (0, 5)


@pytest.mark.usefixtures("_quick_checks")
@pytest.mark.parametrize(
    "failure", [Reply({}, 503), Reply({}, 401), Reply(b"garbage"), DROP], ids=lambda r: str(r.status)
)
def test_another_address_takes_over(
    remote: Remote, second: Remote, opened: Callable[..., HttpDriver], failure: Reply
) -> None:
    """What one address fails at another one does, and nobody notices; one that fails in a row is left alone until it
    answers again."""
    driver = opened(**several(remote, second))
    wait_until(lambda: states(driver) == ["serves", "serves"])
    remote.answer = lambda seen: failure
    for _ in range(60):
        assert run(driver, ["abc"]).rows.values[0, 0] == 3
        if driver._upstreams[0].fault:
            break
    assert states(driver)[0] != "serves"
    assert not driver.reasons
    remote.answer = good
    wait_until(lambda: states(driver) == ["serves", "serves"])


@pytest.mark.usefixtures("_quick_checks")
def test_an_address_with_other_vectors_is_never_asked(
    remote: Remote, second: Remote, opened: Callable[..., HttpDriver]
) -> None:
    """Its vectors could not be compared with the others': no text of a request reaches it."""

    second.answer = other_space
    driver = opened(**several(remote, second))
    wait_until(lambda: "a cosine of" in states(driver)[1])
    for _ in range(10):
        assert run(driver, ["abc"]).rows.values[0, 0] == 3
    assert not any("abc" in seen.body["texts"] for seen in second.seen)
    second.answer = good
    wait_until(lambda: states(driver) == ["serves", "serves"])


@pytest.mark.usefixtures("_quick_checks")
def test_one_address_is_enough_to_open(remote: Remote, second: Remote, opened: Callable[..., HttpDriver]) -> None:
    """The first may be away; it joins when it comes."""
    remote.answer = lambda seen: Reply({}, 500)
    driver = opened(**several(remote, second))
    assert run(driver, ["abc"]).rows.values[0, 0] == 3
    remote.answer = good
    wait_until(lambda: states(driver) == ["serves", "serves"])


def other_space(seen: Seen) -> Reply:
    """As another model of the same dimension would answer."""
    reply = good(seen)
    return Reply({"vectors": [[v[1], v[0], v[2]] for v in reply.document["vectors"]]})


@pytest.mark.usefixtures("_quick_checks")
def test_a_model_never_changes_its_vectors_unasked(
    remote: Remote, second: Remote, opened: Callable[..., HttpDriver], tmp_path: Path
) -> None:
    """What the first address gave is remembered by the driver that replaces this one: when the first is away and only
    one of another model answers, there is no answer."""
    second.answer = other_space
    driver = opened(**several(remote, second))
    remote.answer = lambda seen: Reply({}, 503)
    following = HttpDriver("org/m", HttpConfig(**several(remote, second)), tmp_path, driver._shared)
    with pytest.raises(UpstreamError):
        open_here(following)
    remote.answer = good
    open_here(following)
    following.close()
    fresh = HttpDriver("org/m", HttpConfig(**several(second, second)), tmp_path, {})  # a model registered anew
    open_here(fresh)
    fresh.close()


def test_a_remote_model_keeps_its_space_until_it_gives_other_vectors(
    remote: Remote, opened: Callable[..., HttpDriver], tmp_path: Path
) -> None:
    """Over a restart, too. One that has changed is not served on: at its next probe, and when it is opened anew."""
    driver = opened()
    again = opened()
    assert again.facts.space == driver.facts.space
    remote.answer = other_space
    with pytest.raises(UpstreamError, match="switch the model off and on"):
        driver.probe()
    with pytest.raises(UpstreamError, match="switch the model off and on"):
        open_here(HttpDriver("org/m", HttpConfig(base_url=remote.url), tmp_path, driver._shared))
    assert opened().facts.space != driver.facts.space


@pytest.mark.usefixtures("_quick_checks")
def test_an_address_that_changes_its_vectors_is_found_out(
    remote: Remote, second: Remote, opened: Callable[..., HttpDriver]
) -> None:
    """Though it never failed: those that serve are proved from time to time."""
    driver = opened(**several(remote, second))
    wait_until(lambda: states(driver) == ["serves", "serves"])
    second.answer = other_space
    wait_until(lambda: "a cosine of" in states(driver)[1])
    assert not driver.reasons


@pytest.mark.parametrize(
    "answer",
    [lambda n: [[0.0, 0.0, 0.0]] * n, lambda n: [[1.0, 2.0]] * n, lambda n: [[None] * 3] * n],
    ids=["zero", "another dimension", "NaN"],
)
@pytest.mark.usefixtures("_quick_checks")
def test_vectors_that_prove_nothing_admit_nobody(
    remote: Remote, second: Remote, opened: Callable[..., HttpDriver], answer: Callable[[int], Any]
) -> None:
    """Neither as the first, which would be the measure of the others, nor beside another."""
    second.answer = lambda seen: Reply({"vectors": answer(len(seen.body["texts"]))})
    for order in (several(remote, second), several(second, remote)):
        if order["base_url"] == second.url and "2.0" in str(answer(1)):
            continue  # as good as any, when it is the first
        driver = opened(**order)
        assert run(driver, ["abc"]).rows.values[0, 0] == 3
        wait_until(lambda driver=driver: "not asked yet" not in states(driver))
        assert sorted(state == "serves" for state in states(driver)) == [False, True]


@pytest.mark.usefixtures("_quick_checks")
def test_a_hung_address_holds_nothing_up(
    remote: Remote, second: Remote, opened: Callable[..., HttpDriver], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another one is found behind it, and closing does not wait for its proof."""
    monkeypatch.setattr(http, "PROOF_TIMEOUT_S", 0.05)
    remote.answer = lambda seen: HANG
    driver = opened(**several(remote, second), timeout_s=600)
    assert run(driver, ["abc"]).rows.values[0, 0] == 3
    driver.close()


@pytest.fixture
def _no_collections() -> Iterator[None]:
    """Finalizers that ran where the stack is full would fail, and be a fault of this test."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("_quick_checks", "_no_collections")
def test_any_garbage_leaves_the_checks_running(
    remote: Remote, second: Remote, opened: Callable[..., HttpDriver]
) -> None:
    """An answer that breaks the reader is a fault of its address, and it is looked at again."""
    second.answer = lambda seen: Reply(b"[" * 200_000)
    driver = opened(**several(remote, second))
    wait_until(lambda: "RecursionError" in states(driver)[1] or "ValueError" in states(driver)[1])
    second.answer = good
    wait_until(lambda: states(driver) == ["serves", "serves"])


def test_a_busy_service_is_not_broken(remote: Remote, opened: Callable[..., HttpDriver]) -> None:
    """429 to a probe says that somebody is there."""
    driver = opened(retries=0)
    remote.answer = lambda seen: Reply({}, 429)
    driver.probe()
    remote.answer = lambda seen: Reply({}, 500)
    assert driver.takes_a_batch(within_s=10)  # the pause is over
    with pytest.raises(UpstreamError):
        driver.probe()


@pytest.mark.usefixtures("_quick_checks")
def test_a_remotes_words_are_for_the_caller_alone(
    remote: Remote, second: Remote, opened: Callable[..., HttpDriver]
) -> None:
    """A service may repeat a text in its error; /status is for everybody."""
    driver = opened(**several(remote, second), retries=0)
    wait_until(lambda: states(driver) == ["serves", "serves"])
    for service in (remote, second):
        service.answer = lambda seen: Reply({"error": {"message": f"cannot bear {seen.body['texts']}"}}, 500)
    while not driver.reasons:
        with pytest.raises(UpstreamError, match="cannot bear"):
            run(driver, ["private"])
    assert "private" not in f"{driver.reasons} {driver.facts.description}"
    assert "answered 500" in driver.reasons[0]


def test_a_service_that_fails_in_a_row_is_left_alone(remote: Remote, opened: Callable[..., HttpDriver]) -> None:
    """It is not asked any more, and whoever watches opens it anew."""
    driver = opened(retries=0)
    remote.answer = lambda seen: Reply({}, 500)
    for _ in range(upstream.FAILURES_TO_OPEN):
        assert not driver.reasons
        with pytest.raises(UpstreamError, match="answered 500"):
            run(driver, ["a"])
    assert driver.reasons
    with pytest.raises(UpstreamError, match="left alone after failures in a row: the remote service answered 500"):
        run(driver, ["a"])
    assert len(remote.seen) == upstream.FAILURES_TO_OPEN


@pytest.mark.parametrize("reply", [Reply({}, 429), Reply({}, 422)], ids=["429", "422"])
def test_what_a_text_or_a_busy_hour_causes_is_no_failure(
    remote: Remote, opened: Callable[..., HttpDriver], reply: Reply
) -> None:
    """However often: the service answers."""
    driver = opened(retries=0)
    remote.answer = lambda seen: reply
    for _ in range(3 * upstream.FAILURES_TO_OPEN):
        with pytest.raises(UpstreamError):
            run(driver, ["a"])
    assert not driver.reasons


def test_retries_are_a_share_of_the_calls(remote: Remote, opened: Callable[..., HttpDriver]) -> None:
    """A service in trouble is not given three times the load."""
    driver = opened(retries=2)
    remote.answer = lambda seen: Reply({}, 401 if len(seen.body["texts"]) == 1 else 503, {"Retry-After": "0"})
    for _ in range(100):
        with pytest.raises(UpstreamError):
            run(driver, ["a"])
    retries = len(remote.seen) - 100
    assert retries <= upstream.RETRY_RESERVE + 100 * upstream.RETRY_SHARE


def test_a_service_that_is_down_says_so_and_serves_when_it_is_back(remote: Remote, pool: Pool) -> None:
    """The model fails, requests are refused with a time to come back, and no request is needed to notice the end."""
    pool.apply(fake_spec(f"model: m, driver: {{type: http, config: {{base_url: '{remote.url}', retries: 0}}}}"))
    settle(pool)
    served = pool.find("m")
    remote.answer = lambda seen: Reply({}, 500)
    while served.state == "ready":
        with pytest.raises((UpstreamError, ModelFailed)):
            ask(pool, "m", "a")
    wait_until(lambda: served.state == "failed")
    with pytest.raises(ModelFailed, match="answered 500") as caught:
        ask(pool, "m", "a")
    assert 0 < (caught.value.retry_after_s or 0) <= 5
    remote.answer = good
    wait_until(lambda: served.state == "ready")
    assert len(ask(pool, "m", "a").vectors) == 1


# --- the rest


def test_what_the_pool_is_told(remote: Remote, opened: Callable[..., HttpDriver]) -> None:
    """/status shows protocol and dimension; eight batches may run at once."""
    driver = opened()
    assert dict(driver.facts.description) == {"kind": "embed", "protocol": "embedpool", "dim": 3}
    assert (driver.facts.tasks["embed"], driver.facts.slots) == (3, 8)


def test_max_batch_texts_bounds_each_call(remote: Remote, pool: Pool) -> None:
    """No call holds more texts than the service takes."""
    config = f"base_url: '{remote.url}', max_batch_texts: 3"
    pool.apply(fake_spec(f"model: m, driver: {{type: http, config: {{{config}}}}}"))
    settle(pool)
    texts = ["x" * i for i in range(10)]
    result = ask(pool, "m", *texts, normalize=False)
    np.testing.assert_array_equal(result.vectors[:, 0], range(10))
    assert max(len(seen.body["texts"]) for seen in remote.seen) <= 3


def test_the_remote_tokenizes() -> None:
    """Texts for a remote are only estimated here; the table gives the driver and its tokenizer."""
    spec = ModelSpec(model="m", driver=DriverSpec("http", HttpConfig(base_url="http://x")))
    tokenizer = open_tokenizer(spec, NOWHERE)
    assert tokenizer.encode(["a"]) is None
    items = Embed(["", "word " * 100]).measure(spec.driver.config, tokenizer).items
    assert 1 <= items[0].tokens < items[1].tokens
    assert isinstance(make_driver(spec, Folders(Path(), Path()), {}), HttpDriver)
