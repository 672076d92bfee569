"""POST /embed with a body of lines."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
from typing import Any
from urllib.parse import urlencode

import numpy as np
import pytest
from werkzeug.test import TestResponse

from embedpool.config.settings import Defaults, Limits, Settings
from embedpool.errors import Overloaded, UpstreamError
from embedpool.jobs.windows import AT_ONCE
from embedpool.web import ndjson, request_log
from embedpool.web.lines import CHUNK_TEXTS
from tests.web.conftest import MODEL, NAME, Gate, MakeWeb, Web, raw, refused, unit

FAULTY = MODEL + ", driver: {type: fake, config: {fault: raise, fault_text: bad}}"


def send(web: Web, body: bytes, *, headers: Any = None, model: str = "m", **query: Any) -> TestResponse:
    asked = urlencode({"model": model, **query})
    return web.post(f"/embed?{asked}", data=body, content_type="application/x-ndjson", headers=headers)


def lines_of(*texts: str) -> bytes:
    return b"".join(json.dumps({"id": f"id {i}", "text": text}).encode() + b"\n" for i, text in enumerate(texts))


def answers(web: Web, body: bytes, **query: Any) -> list[dict[str, Any]]:
    answer = send(web, body, **query)
    assert answer.status_code == 200, answer.text
    assert answer.mimetype == "application/x-ndjson"
    found = [json.loads(line) for line in answer.text.splitlines()]
    answer.close()  # as a server does
    return found


@pytest.mark.parametrize("count", [1, CHUNK_TEXTS, 3 * CHUNK_TEXTS + 1])
def test_a_line_for_each_line(web: Web, count: int) -> None:
    """However many, in the order of the request: the id as it was given, the index, the vector."""
    texts = [f"text {i}" for i in range(count)]
    found = answers(web, lines_of(*texts))
    assert [(line["index"], line["id"], line["truncated"]) for line in found] == [
        (i, f"id {i}", False) for i in range(count)
    ]
    np.testing.assert_allclose([line["vector"] for line in found], unit(raw(*texts)), atol=1e-6)


def test_the_query_string_has_the_options(web: Web) -> None:
    """Those of POST /embed, written as in JSON."""
    (found,) = answers(web, lines_of("a b c"), normalize="false", dimensions=8, max_seq_length=4, truncate="left")
    np.testing.assert_allclose(found["vector"], raw("b c")[0, :8], atol=1e-6)
    assert found["truncated"] is True
    (found,) = answers(web, lines_of("a"), encoding="base64", prompt_name="query", dtype="float16")
    vector = np.frombuffer(base64.b64decode(found["vector"]), dtype="<f2")
    np.testing.assert_allclose(vector, unit(raw("find: a"))[0], atol=1e-3)


def test_blank_lines_are_none_and_an_id_is_given_back(web: Web) -> None:
    """A last line needs no end, blank lines are skipped, ids are given back as they came."""
    found = answers(web, b'\n{"text": "a", "id": 7}\r\n  \n{"text": "b"}\n{"text": "c", "id": 1.5}')
    assert [(line["index"], line.get("id")) for line in found] == [(0, 7), (1, None), (2, 1.5)]


def test_a_line_that_fails_takes_no_other_with_it(make_web: MakeWeb) -> None:
    """Each is answered with its own error: what is no JSON, no object, no text, too long, or fails in the model."""
    web = make_web(FAULTY, settings=Settings(limits=Limits(max_chars_per_text=100)))
    body = b"".join(
        line + b"\n"
        for line in [
            b'{"text": "good"}', b"{", b"[1]", b'{"id": 1}', b'{"text": 1, "id": 5}', b'{"text": "x", "more": 1}',
            json.dumps({"text": "x" * 101}).encode(), json.dumps({"text": "x" * 200_000}).encode(),
            b'{"text": "a", "id": [1]}', json.dumps({"text": "a", "id": "x" * 1001}).encode(),
            b'{"text": "bad"}', b'{"text": "w w w"}', b'{"text": "\xff"}', b'{"text": "last"}',
        ]
    )  # fmt: skip
    found = answers(web, body, max_seq_length=4, truncate="error")
    codes = [line["error"]["code"] if "error" in line else "" for line in found]
    assert codes == [
        "", "bad_json", *["validation_error"] * 8, "inference_failed", "text_too_long", "bad_json", "",
    ]  # fmt: skip
    assert found[4]["id"] == 5
    np.testing.assert_allclose([found[0]["vector"], found[-1]["vector"]], unit(raw("good", "last")), atol=1e-6)


@pytest.mark.parametrize(
    ("query", "status", "code"),
    [
        ({"model": "nope"}, 404, "model_not_found"),
        ({"dimensions": "many"}, 422, "validation_error"),
        ({"dimensions": 1000}, 422, "validation_error"),
        ({"order": "random"}, 422, "validation_error"),
        ({"on_error": "fail"}, 422, "validation_error"),
        ({"whatever": 1}, 422, "unsupported_option"),
    ],
)
def test_what_is_wrong_as_a_whole_has_a_status(web: Web, query: dict[str, Any], status: int, code: str) -> None:
    """Nothing has been answered yet, so the request is refused as any other."""
    refused(send(web, lines_of("a"), **query), status, code)


def test_a_body_without_lines_and_one_too_large(make_web: MakeWeb) -> None:
    """An empty body is refused; so is one over the limit, which is another than that of a JSON body."""
    web = make_web(MODEL, settings=Settings(limits=Limits(max_body_bytes=10, max_stream_body_bytes=1000)))
    for body in (b"", b"\n \n"):
        refused(send(web, body), 400, "empty_input")
    assert len(answers(web, lines_of("a" * 100))) == 1
    refused(send(web, lines_of("a" * 1000)), 413, "body_too_large")


def test_done_first_is_answered_first(make_web: MakeWeb, gate: Gate) -> None:
    """With `order=done` a chunk that is slow holds nobody up; in the order of the request it does."""
    web = make_web(MODEL)
    submit = web.pool.submit
    second_answered = gate.opened

    def slow_second(model: str, task: Any, call: Any) -> Any:
        if task.texts[0] == f"text {CHUNK_TEXTS}":
            assert second_answered.wait(20)
        elif task.texts[0] == f"text {2 * CHUNK_TEXTS}":
            second_answered.set()
        return submit(model, task, call)

    web.pool.submit = slow_second  # type: ignore[method-assign]
    texts = [f"text {i}" for i in range(4 * CHUNK_TEXTS)]
    indices = [line["index"] for line in answers(web, lines_of(*texts), order="done")]
    assert sorted(indices) == list(range(len(texts)))
    second_answered.clear()
    assert [line["index"] for line in answers(web, lines_of(*texts))] == list(range(len(texts)))


def test_a_pool_that_becomes_busy_is_waited_for(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once the answer has begun, a full queue is no error until the lines' deadline; before, it is 429."""
    monkeypatch.setattr(ndjson, "BUSY_WAIT_S", 0.001)
    submit = web.pool.submit
    refusals = [None, Overloaded("full", retry_after_s=0.001), Overloaded("full", retry_after_s=0.001)]

    def busy(model: str, task: Any, call: Any) -> Any:
        if refusals and (error := refusals.pop(0)):
            raise error
        return submit(model, task, call)

    web.pool.submit = busy  # type: ignore[method-assign]
    texts = [f"text {i}" for i in range(2 * CHUNK_TEXTS)]
    assert not [line for line in answers(web, lines_of(*texts)) if "error" in line]
    assert not refusals
    refusals.append(Overloaded("full", retry_after_s=3))
    answer = send(web, lines_of("a"))
    assert refused(answer, 429, "overloaded")
    assert answer.headers["Retry-After"] == "3"


def test_the_deadline_is_each_lines_own(web: Web) -> None:
    """Where the pool stays busy past it, those lines have the error; the others have their vectors."""
    submit = web.pool.submit

    def busy(model: str, task: Any, call: Any) -> Any:
        if task.texts[0] == f"text {CHUNK_TEXTS}":
            raise Overloaded("full", retry_after_s=60)
        return submit(model, task, call)

    web.pool.submit = busy  # type: ignore[method-assign]
    texts = [f"text {i}" for i in range(3 * CHUNK_TEXTS)]
    found = answers(web, lines_of(*texts), headers={"X-Request-Timeout-Ms": "20000"})
    failed = [line["index"] for line in found if "error" in line]
    assert failed == list(range(CHUNK_TEXTS, 2 * CHUNK_TEXTS))
    assert found[failed[0]]["error"]["code"] == "overloaded"


def test_the_lines_are_read_as_they_are_needed(web: Web) -> None:
    """No more than the chunks under way is in memory: the body is read behind the answer."""

    class Counted(io.BytesIO):
        furthest = 0

        def readinto(self, buffer: Any) -> int:
            count = super().readinto(buffer)
            Counted.furthest = self.tell()
            return count

    body = lines_of(*(f"text {i} {'x' * 1000}" for i in range(20 * CHUNK_TEXTS)))
    path = f"/embed?{urlencode({'model': 'm'})}"
    response = web.app.test_client().post(
        path, input_stream=Counted(body), content_length=len(body), content_type="application/x-ndjson", buffered=False
    )
    stream = iter(response.response)
    next(stream)
    assert Counted.furthest < len(body) / 4
    response.close()


def test_a_client_that_goes_away_costs_no_more(make_web: MakeWeb) -> None:
    """When the answer is given up, the lines that wait are dropped and no further one is read."""
    web = make_web(MODEL)
    seen = []
    submit = web.pool.submit

    def watched(model: str, task: Any, call: Any) -> Any:
        seen.append(call)
        return submit(model, task, call)

    web.pool.submit = watched  # type: ignore[method-assign]
    body = lines_of(*(f"text {i}" for i in range(20 * CHUNK_TEXTS)))
    response = web.app.test_client().post(
        "/embed?model=m", data=body, content_type="application/x-ndjson", buffered=False
    )
    stream = iter(response.response)
    next(stream)
    response.close()
    assert all(call.client_gone() for call in seen)
    assert len(seen) <= 1 + AT_ONCE


def test_the_log_has_the_sums(web: Web, caplog: pytest.LogCaptureFixture) -> None:
    """One line at the end, with all texts and tokens."""
    caplog.set_level("INFO", logger=request_log.__name__)
    answers(web, lines_of(*["a b"] * (CHUNK_TEXTS + 1)), max_seq_length=3)
    (line,) = [record.fields for record in caplog.records if record.name == request_log.__name__]
    assert (line["model"], line["texts"], line["tokens"]) == (NAME, CHUNK_TEXTS + 1, 3 * (CHUNK_TEXTS + 1))
    assert line["truncated"] == CHUNK_TEXTS + 1


def test_it_weighs_as_much_as_one_request(web: Web) -> None:
    """Its chunks share one request's weight in the fair queue."""
    weights = []
    submit = web.pool.submit

    def watched(model: str, task: Any, call: Any) -> Any:
        weights.append(call.share)
        return submit(model, task, call)

    web.pool.submit = watched  # type: ignore[method-assign]
    answers(web, lines_of("a"))
    assert weights == [1 / AT_ONCE]


def test_there_is_room_for_so_many(make_web: MakeWeb) -> None:
    """Each holds a thread for as long as its client likes; above the bound it is 429, and room comes back."""
    web = make_web(MODEL, settings=Settings(defaults=Defaults(max_streams=1)))
    client = web.app.test_client()
    arguments = {"data": lines_of("a"), "content_type": "application/x-ndjson"}
    held = client.post("/embed?model=m", buffered=False, **arguments)
    refused(send(web, lines_of("a")), 429, "overloaded")
    held.close()
    refused(send(web, lines_of("a"), model="nope"), 404, "model_not_found")
    assert len(answers(web, lines_of("a"))) == 1


@pytest.mark.parametrize("leaves", [False, True], ids=["it stays", "it leaves, too"])
def test_vectors_of_two_models_are_not_mixed(make_web: MakeWeb, leaves: bool) -> None:
    """When another model takes the name, the lines that remain say so; the answer names the model it began with."""
    web = make_web(MODEL, "model: other, driver: {type: fake, config: {dim: 8}}")
    submit = web.pool.submit
    asked = []

    def switching(model: str, task: Any, call: Any) -> Any:
        asked.append(model)
        if len(asked) == 2:
            web.post("/models/alias", {"model": NAME, "alias": None})
            web.post("/models/alias", {"model": "other", "alias": "m"})
        result = submit(model, task, call)
        if leaves and result.model == "other":
            web.delete("/models/other")
        return result

    web.pool.submit = switching  # type: ignore[method-assign]
    answer = send(web, lines_of(*(f"text {i}" for i in range(3 * CHUNK_TEXTS))))
    found = [json.loads(line) for line in answer.text.splitlines()]
    answer.close()
    assert answer.headers["X-Embedpool-Model"] == NAME
    assert answer.headers["X-Embedpool-Space"] == web.status(NAME)["space"]
    assert {len(line["vector"]) for line in found if "vector" in line} == {384}
    assert "model_changed" in {line["error"]["code"] for line in found if "error" in line}
    assert [line["index"] for line in found] == list(range(3 * CHUNK_TEXTS))


def test_a_remote_service_that_is_down_is_no_matter_of_lines(make_web: MakeWeb) -> None:
    """It is refused as a whole, while nothing has been answered."""
    web = make_web(MODEL)
    submit = web.pool.submit

    def down(model: str, task: Any, call: Any) -> Any:
        result = submit(model, task, call)
        return dataclasses.replace(result, errors=dict.fromkeys(range(len(task.texts)), UpstreamError("no")))

    web.pool.submit = down  # type: ignore[method-assign]
    refused(send(web, lines_of("a", "b")), 502, "upstream_error")


def test_what_broke_off_is_seen(web: Web, caplog: pytest.LogCaptureFixture) -> None:
    """The status has been sent by then; log and metrics say that the client went."""
    caplog.set_level("INFO", logger=request_log.__name__)
    client = web.app.test_client()
    body = lines_of(*(f"text {i}" for i in range(3 * CHUNK_TEXTS)))
    response = client.post("/embed?model=m", data=body, content_type="application/x-ndjson", buffered=False)
    next(iter(response.response))
    response.close()
    (line,) = [record.fields for record in caplog.records if record.name == request_log.__name__]
    assert (line["status"], line["code"]) == (200, "client_gone")


def test_waiting_for_room_is_no_refusal(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody was sent a 429, so none is counted."""
    asked = []
    submit = web.pool.submit

    def watched(model: str, task: Any, call: Any) -> Any:
        asked.append(call.is_patient)
        return submit(model, task, call)

    web.pool.submit = watched  # type: ignore[method-assign]
    answers(web, lines_of(*(f"text {i}" for i in range(2 * CHUNK_TEXTS))))
    assert asked == [False, True]
