"""Files and batches as OpenAI's clients use them: every state and error, one owner, no more than there is room for."""

from __future__ import annotations

import io
import json
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies as st

from embedpool.config.keys import keys_file, make_key
from embedpool.config.settings import Limits, Paths, Security, Settings
from embedpool.jobs import batch_input, batch_run
from embedpool.jobs import batches as engine
from embedpool.jobs import store as storage
from embedpool.jobs.batch_input import Checked
from embedpool.jobs.batch_run import BatchRun, Executed
from embedpool.jobs.batches import Runner
from embedpool.jobs.store import FINISHED, Store
from embedpool.pool.request import Call
from embedpool.pool.settings import PoolSettings
from embedpool.web.dialects.batches import STORE, executed
from tests.conftest import settle, wait_until
from tests.disks import fill, small_disk
from tests.web.conftest import MakeWeb, Web, serving

MODEL = "model: m, driver: {type: fake, config: {fault: raise, fault_text: bad}}"
RERANKER = "model: r, driver: {type: fake, config: {task: rerank}}"


@pytest.fixture
def web(make_web: MakeWeb) -> Web:
    return make_web(MODEL, RERANKER)


def store_of(web: Web) -> Store:
    store: Store = web.app.extensions[STORE]
    return store


def runner_of(web: Web) -> Runner:
    return Runner(store_of(web), lambda url, body, owner: executed(web.app, url, body, owner), web.metrics)


def line(custom_id: str, text: Any = "a", url: str = "/v1/embeddings", **more: Any) -> str:
    body = {"model": "m", "input": text, **more}
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": url, "body": body})


def upload(web: Web, content: str | bytes, name: str = "in.jsonl", **form: Any) -> Any:
    raw = content.encode() if isinstance(content, str) else content
    headers = form.pop("headers", None)
    data = {"purpose": "batch", **form, "file": (io.BytesIO(raw), name)}
    return web.app.test_client().post("/v1/files", data=data, headers=headers, buffered=True)


def begun(web: Web, *lines: str, endpoint: str = "/v1/embeddings", **more: Any) -> str:
    file_id = upload(web, "\n".join(lines) + "\n").json["id"]
    body = {"input_file_id": file_id, "endpoint": endpoint, "completion_window": "24h", **more}
    answer = web.post("/v1/batches", body)
    assert answer.status_code == 200, answer.text
    assert (answer.json["status"], answer.json["object"]) == ("validating", "batch")
    batch_id: str = answer.json["id"]
    return batch_id


def batch(web: Web, batch_id: str) -> dict[str, Any]:
    found: dict[str, Any] = web.get(f"/v1/batches/{batch_id}").json
    return found


def lines_in(web: Web, file_id: str | None) -> list[dict[str, Any]]:
    if file_id is None:
        return []
    answer = web.get(f"/v1/files/{file_id}/content")
    assert (answer.status_code, answer.mimetype) == (200, "application/jsonl")
    return [json.loads(one) for one in answer.text.splitlines()]


# --- files


def test_a_file_is_received_listed_read_and_deleted(web: Web) -> None:
    """As it is; its name is data, and never one of ours."""
    answer = upload(web, "anything\n\xff", name="../../etc/passwd.jsonl").json
    assert (answer["object"], answer["bytes"], answer["purpose"], answer["status"]) == (
        "file",
        11,
        "batch",
        "processed",
    )
    assert answer["filename"] == "../../etc/passwd.jsonl"
    assert answer["expires_at"] - answer["created_at"] == 30 * 86400
    assert web.get(f"/v1/files/{answer['id']}").json == answer
    assert web.get(f"/v1/files/{answer['id']}/content").data == "anything\n\xff".encode()
    assert [one["id"] for one in web.get("/v1/files").json["data"]] == [answer["id"]]
    assert web.delete(f"/v1/files/{answer['id']}").json == {"id": answer["id"], "object": "file", "deleted": True}
    assert web.get(f"/v1/files/{answer['id']}").status_code == 404
    assert web.get("/v1/files").json == {
        "object": "list", "data": [], "first_id": None, "last_id": None, "has_more": False,
    }  # fmt: skip


def test_texts_are_private(web: Web) -> None:
    """Other users of the machine cannot read what was uploaded, nor what came of it."""
    batch_id = begun(web, line("a"))
    runner_of(web).step()
    folders = [*(store_of(web).folder / "files").iterdir(), store_of(web).place_of(batch_id)]
    assert len(folders) == 3
    assert {folder.stat().st_mode & 0o077 for folder in folders} == {0}


def test_lists_are_paged(web: Web) -> None:
    """Newest first, from behind the last that is known."""
    clock = iter(range(10**9, 10**9 + 10))
    store_of(web).clock = lambda: float(next(clock))
    ids = [upload(web, "x").json["id"] for i in range(3)]
    store_of(web).clock = lambda: 10.0**9
    first = web.get("/v1/files?limit=2").json
    assert ([one["id"] for one in first["data"]], first["has_more"]) == (ids[:0:-1], True)
    second = web.get(f"/v1/files?limit=2&after={first['last_id']}").json
    assert ([one["id"] for one in second["data"]], second["has_more"]) == (ids[:1], False)
    assert [one["id"] for one in web.get("/v1/files?order=asc").json["data"]] == ids
    assert web.get("/v1/files?limit=0").status_code == 400


@pytest.mark.parametrize(
    ("form", "name", "says"),
    [
        ({"purpose": "fine-tune"}, "a.jsonl", "purpose"),
        ({}, "a.txt", "Must be .jsonl"),
        ({"expires_after[seconds]": "5"}, "a.jsonl", "expires_after"),
        ({"expires_after[seconds]": "3600", "expires_after[anchor]": "now"}, "a.jsonl", "anchor"),
    ],
)
def test_what_is_no_batch_file_is_refused(web: Web, form: dict[str, str], name: str, says: str) -> None:
    """And nothing of it is left."""
    answer = upload(web, "x", name=name, **form)
    assert (answer.status_code, says in answer.json["error"]["message"]) == (400, True)
    assert list((store_of(web).folder / "files").glob("*")) == []
    assert web.post("/v1/files", {"purpose": "batch"}).status_code == 400
    assert web.app.test_client().post("/v1/files", data={"purpose": "batch"}).status_code in (400, 415)


def test_there_is_room_for_so_much(make_web: MakeWeb) -> None:
    """A file that is too large, and one more than all may take, are refused; a deleted one makes room."""
    web = make_web(MODEL, settings=Settings(limits=Limits(max_file_bytes=2000, max_files_bytes=4000)))
    answer = upload(web, "x" * 2001)
    assert (answer.status_code, answer.json["error"]["code"]) == (400, "body_too_large")
    first = upload(web, "x" * 1500).json["id"]
    answer = upload(web, "x" * 1900)
    assert answer.status_code in (200, 507)
    while answer.status_code == 200:
        answer = upload(web, "x" * 1900)
    assert (answer.status_code, answer.json["error"]["code"]) == (507, "storage_error")
    web.delete(f"/v1/files/{first}")
    assert upload(web, "x" * 900).status_code == 200


def test_uploads_at_the_same_time_have_the_room_of_one(make_web: MakeWeb) -> None:
    """What is announced counts from the beginning, and what is not there is given back."""
    web = make_web(MODEL, settings=Settings(limits=Limits(max_files_bytes=4000)))
    store = store_of(web)
    with store.receiving(store.new_file_id(), 3000) as path:
        assert upload(web, "x" * 1500).status_code == 507
        path.write_bytes(b"x")
    assert upload(web, "x" * 1500).status_code == 200


def test_a_web_page_cannot_upload(web: Web) -> None:
    """A form is what any may send."""
    for headers in ({"Origin": "https://evil.example"}, {"Host": "evil.example"}):
        assert upload(web, "x", headers=headers).status_code == 403
        assert web.post("/v1/batches", {}, headers=headers).status_code == 403


def test_a_web_page_cannot_read(web: Web) -> None:
    """After DNS rebinding it asks under a name of its own."""
    batch_id = begun(web, line("a"))
    file_id = batch(web, batch_id)["input_file_id"]
    files = ("/v1/files", f"/v1/files/{file_id}", f"/v1/files/{file_id}/content")
    for path in (*files, "/v1/batches", f"/v1/batches/{batch_id}"):
        assert web.get(path).status_code == 200
        assert web.get(path, headers={"Host": "evil.example"}).status_code == 403


# --- batches


@pytest.mark.parametrize(
    ("endpoint", "given"),
    [
        ("/embed", {"model": "m", "texts": ["one", "two"]}),
        ("/v1/contextualizedembeddings", {"model": "m", "inputs": [["one", "two"]]}),
    ],
)
def test_a_batch_of_another_endpoint(web: Web, endpoint: str, given: dict[str, Any]) -> None:
    """Its tokens count wherever the answer tells them."""
    request = {"custom_id": "a", "method": "POST", "url": endpoint, "body": given}
    batch_id = begun(web, json.dumps(request), endpoint=endpoint)
    assert runner_of(web).step() is True
    found = batch(web, batch_id)
    assert (found["status"], found["request_counts"]["completed"]) == ("completed", 1)
    answer = web.post(endpoint, given).json
    assert found["usage"]["total_tokens"] == (
        answer["usage"]["total_tokens"] if "usage" in answer else answer["meta"]["tokens"]
    )


def test_lines_of_another_dialect_are_answered_in_it(make_web: MakeWeb) -> None:
    """TEI's /embed is at the same path; its tokens stand in a header."""
    web = make_web(MODEL)
    bodies = ({"model": "m", "texts": ["one"]}, {"model": "m", "inputs": ["one"]})
    lines = (
        json.dumps({"custom_id": str(i), "method": "POST", "url": "/embed", "body": b}) for i, b in enumerate(bodies)
    )
    batch_id = begun(web, *lines, endpoint="/embed")
    assert runner_of(web).step() is True
    found = batch(web, batch_id)
    assert (found["status"], found["request_counts"]["completed"]) == ("completed", 2)
    assert found["usage"]["total_tokens"] == 2 * web.embed("one").json["meta"]["tokens"]


def test_a_batch(web: Web) -> None:
    """Its answers are those of the route; what failed stands in a file of its own, with its status."""
    texts = ["one", "bad", "two"]
    batch_id = begun(web, *(line(f"id-{i}", text) for i, text in enumerate(texts)), "", metadata={"a": "b"})
    assert runner_of(web).step() is True
    found = batch(web, batch_id)
    assert found["status"] == "completed"
    assert found["request_counts"] == {"total": 3, "completed": 2, "failed": 1}
    assert (found["metadata"], found["model"]) == ({"a": "b"}, "m")
    used = (web.post("/v1/embeddings", {"model": "m", "input": text}).json["usage"] for text in ("one", "two"))
    tokens = sum(one["total_tokens"] for one in used)
    assert (found["usage"]["input_tokens"], found["usage"]["total_tokens"]) == (tokens, tokens)
    assert found["created_at"] <= found["in_progress_at"] <= found["finalizing_at"] <= found["completed_at"]
    good = lines_in(web, found["output_file_id"])
    assert [one["custom_id"] for one in good] == ["id-0", "id-2"]
    for one in good:
        text = texts[int(one["custom_id"][-1])]
        expected = web.post("/v1/embeddings", {"model": "m", "input": text}).json
        assert (one["error"], one["response"]["status_code"]) == (None, 200)
        assert one["response"]["body"]["data"] == expected["data"]
        assert one["response"]["request_id"]
    (failed,) = lines_in(web, found["error_file_id"])
    assert (failed["custom_id"], failed["error"], failed["response"]["status_code"]) == ("id-1", None, 500)
    assert failed["response"]["body"]["error"]["code"] == "inference_failed"
    info = web.get(f"/v1/files/{found['output_file_id']}").json
    assert (info["purpose"], info["filename"]) == ("batch_output", f"{batch_id}_output.jsonl")
    assert [one["id"] for one in web.get("/v1/batches").json["data"]] == [batch_id]
    assert runner_of(web).step() is False


def test_it_is_seen_how_far_it_is(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the document while it runs, and in the metrics; a batch of several models names none."""
    monkeypatch.setattr(batch_input, "WINDOW_LINES", 2)
    batch_id = begun(web, *(line(f"id-{i}", "bad" if i == 5 else "a") for i in range(5)), line("other", model="r"))
    seen = []

    def execute(url: str, body: bytes, owner: str) -> Executed:
        seen.append(batch(web, batch_id))
        return executed(web.app, url, body, owner)

    Runner(store_of(web), execute, web.metrics).step()
    under_way = [one for one in seen if one["request_counts"]["completed"]]
    assert under_way
    assert all(one["requests_s"] > 0 and one["seconds_left"] >= 0 for one in under_way)
    found = batch(web, batch_id)
    assert (found["model"], found["requests_s"], found["seconds_left"]) == (None, None, None)
    metrics = web.get("/metrics").text
    assert 'embedpool_batch_job_requests_total{outcome="completed"} 5.0' in metrics
    assert 'embedpool_batch_job_requests_total{outcome="failed"} 1.0' in metrics
    assert 'embedpool_batch_jobs_ended_total{status="completed"} 1.0' in metrics
    assert 'embedpool_batch_jobs{status="validating"} 1.0' in metrics  # when it was last looked, before it ran


def test_batches_run_in_the_order_in_which_they_were_made(web: Web) -> None:
    """Also those of the same second."""
    made = [begun(web, line("a")) for _ in range(12)]
    assert [known["batch"]["id"] for known in store_of(web).to_run()] == made
    assert [one["id"] for one in web.get("/v1/batches").json["data"]] == made[::-1]


def test_a_runner_is_woken(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch does not wait until somebody looks."""
    monkeypatch.setattr(engine, "LOOK_EVERY_S", 3600.0)
    runner = runner_of(web)
    runner.start()
    try:
        batch_id = begun(web, line("a"))
        wait_until(lambda: batch(web, batch_id)["status"] == "completed")
        second = begun(web, line("a"))
        wait_until(lambda: batch(web, second)["status"] == "completed")
    finally:
        runner.stop()


def test_lines_are_bulk_work(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a quarter of their key's weight; nothing that a request says makes it so."""
    calls: list[Call] = []
    real = web.pool.submit
    monkeypatch.setattr(web.pool, "submit", lambda model, task, call: (calls.append(call), real(model, task, call))[1])
    begun(web, line("a"))
    runner_of(web).step()
    web.post("/v1/embeddings", {"model": "m", "input": "a"}, headers={"embedpool.owner": "", "Embedpool-Owner": ""})
    assert [(call.is_bulk, call.weight, call.share) for call in calls] == [(True, 0.25, 1.0), (False, 1.0, 1.0)]


def test_no_turn_is_needed_to_fail_or_to_end(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind a long batch one that is malformed, cancelled or expired ends, and a valid one says that it is."""
    monkeypatch.setattr(engine, "LOOK_EVERY_S", 0.01)
    opened, reached = threading.Event(), threading.Event()

    def execute(url: str, body: bytes, owner: str) -> Executed:
        reached.set()
        assert opened.wait(20)
        return executed(web.app, url, body, owner)

    long = begun(web, line("long"))
    runner = Runner(store_of(web), execute, web.metrics)
    runner.start()
    try:
        assert reached.wait(20)
        broken, cancelled, valid = begun(web, "{no json"), begun(web, line("a"), line("b")), begun(web, line("a"))
        late = begun(web, line("a"), completion_window="1h")
        wait_until(lambda: batch(web, broken)["status"] == "failed")
        wait_until(lambda: batch(web, valid)["status"] == "in_progress")
        web.post(f"/v1/batches/{cancelled}/cancel")
        wait_until(lambda: batch(web, cancelled)["status"] == "cancelled")
        now = store_of(web).clock()
        store_of(web).clock = lambda: now + 3601
        wait_until(lambda: batch(web, late)["status"] == "expired")
        assert batch(web, long)["status"] == "in_progress"
        opened.set()
        wait_until(lambda: batch(web, valid)["status"] == "completed")
    finally:
        opened.set()
        runner.stop()
    assert batch(web, cancelled)["request_counts"] in ({"total": n, "completed": 0, "failed": n} for n in (0, 2))


def test_without_failures_there_is_no_error_file(web: Web) -> None:
    """Nor an output file without successes."""
    first, second = begun(web, line("a")), begun(web, line("b", model="nobody"))
    runner = runner_of(web)
    while runner.step():
        pass
    assert batch(web, first)["error_file_id"] is None
    assert batch(web, second)["output_file_id"] is None
    (failed,) = lines_in(web, batch(web, second)["error_file_id"])
    assert failed["response"]["status_code"] == 404


def test_rerank_batches(web: Web) -> None:
    """The other endpoints, too."""
    body = {"model": "r", "query": "red fox", "documents": ["a red fox", "blue"]}
    one = json.dumps({"custom_id": "a", "method": "POST", "url": "/v1/rerank", "body": body})
    batch_id = begun(web, one, endpoint="/v1/rerank")
    runner_of(web).step()
    (found,) = lines_in(web, batch(web, batch_id)["output_file_id"])
    assert found["response"]["body"]["results"] == web.post("/v1/rerank", body).json["results"]


@pytest.mark.parametrize(
    ("lines", "code", "number"),
    [
        ([line("a"), "{not json"], "invalid_json_line", 2),
        ([line("a"), "", line("b", url="/v1/rerank")], "mismatched_url", 3),
        ([line("a"), line("a")], "duplicate_custom_id", 2),
        (['{"custom_id": "a", "method": "POST", "url": "/v1/embeddings"}'], "missing_required_parameter", 1),
        (['{"custom_id": 1, "method": "POST", "url": "/v1/embeddings", "body": {"a": 1}}'], "invalid_type", 1),
        ([line("a").replace("POST", "GET")], "invalid_method", 1),
        (["[1]"], "invalid_json_line", 1),
        ([""], "empty_file", None),
    ],
)
def test_an_input_that_is_none_fails_the_batch(web: Web, lines: list[str], code: str, number: int | None) -> None:
    """Afterwards, by the line; nothing is computed."""
    batch_id = begun(web, *lines)
    runner_of(web).step()
    found = batch(web, batch_id)
    assert (found["status"], found["request_counts"]["completed"]) == ("failed", 0)
    assert (found["errors"]["data"][0]["code"], found["errors"]["data"][0]["line"]) == (code, number)
    assert found["failed_at"]
    assert web.post(f"/v1/batches/{batch_id}/cancel").status_code == 400


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"input_file_id": "file-" + "0" * 24}, 404), ({"input_file_id": "../../x"}, 404),
        ({"endpoint": "/v1/models"}, 400),
        ({"completion_window": "soon"}, 400), ({"metadata": {"a": "x" * 600}}, 400),
        ({"metadata": {str(i): "x" for i in range(17)}}, 400), ({"input_file_id": None}, 400),
        ({"output_expires_after": {"anchor": "completed_at", "seconds": 3600}}, 400),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 1e400}}, 400),
    ],
)  # fmt: skip
def test_what_is_wrong_at_once(web: Web, change: dict[str, Any], status: int) -> None:
    """Said at once."""
    file_id = upload(web, line("a")).json["id"]
    body = {"input_file_id": file_id, "endpoint": "/v1/embeddings", "completion_window": "24h", **change}
    assert web.post("/v1/batches", body).status_code == status
    assert web.get("/v1/batches").json["data"] == []
    for path in (
        "/v1/batches/batch_" + "0" * 24,
        "/v1/batches/..%2f..%2fx",
        "/v1/files/batch_x",
        "/v1/files/x/content",
    ):
        assert web.get(path).status_code == 404


def test_a_file_holds_so_many_requests(make_web: MakeWeb) -> None:
    """By the settings."""
    web = make_web(MODEL, settings=Settings(limits=Limits(max_batch_requests=2)))
    first, second = begun(web, line("a"), line("b")), begun(web, line("a"), line("b"), line("c"))
    runner = runner_of(web)
    assert (runner.step(), runner.step()) == (True, True)
    assert batch(web, first)["status"] == "completed"
    (fault,) = batch(web, second)["errors"]["data"]
    assert (fault["code"], "limits.max_batch_requests" in fault["message"]) == ("too_many_tasks", True)


def test_results_are_no_requests(web: Web) -> None:
    """OpenAI refuses them at once, too."""
    batch_id = begun(web, line("a"))
    runner_of(web).step()
    body = {"input_file_id": batch(web, batch_id)["output_file_id"], "endpoint": "/v1/embeddings"}
    assert web.post("/v1/batches", body).status_code == 400


def test_ids_that_are_used_again_are_told_with_their_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order of the lines, and never for a hash alone."""
    lines = [line(f"id-{i % 40}", url="/v1/rerank" if i == 50 else "/v1/embeddings") for i in range(60)]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    checked = Checked(tmp_path / "in.jsonl", "/v1/embeddings")
    assert [fault.line for fault in checked.faults] == list(range(41, 61))
    codes = {fault.line: fault.code for fault in checked.faults}
    assert {codes.pop(51), *codes.values()} == {"mismatched_url", "duplicate_custom_id"}
    monkeypatch.setattr(batch_input, "hash", lambda custom_id: 7, raising=False)
    (tmp_path / "in.jsonl").write_text("\n".join(lines[:40]))
    assert Checked(tmp_path / "in.jsonl", "/v1/embeddings").faults == []


@pytest.mark.parametrize("lines", [20_000])
def test_checking_many_lines_takes_little_memory(tmp_path: Path, lines: int) -> None:
    """A few bytes a line: a million take less than 40 MB."""
    (tmp_path / "in.jsonl").write_text("\n".join(line(f"id-{i}") for i in range(lines)))
    tracemalloc.start()
    try:
        assert Checked(tmp_path / "in.jsonl", "/v1/embeddings").requests == lines
        assert tracemalloc.get_traced_memory()[1] < 40 * lines + 100_000
    finally:
        tracemalloc.stop()


def test_a_batch_that_is_cancelled(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps what is finished; the rest is told that it did not run."""
    monkeypatch.setattr(batch_input, "WINDOW_LINES", 2)
    batch_id = begun(web, *(line(f"id-{i}", f"text {i}") for i in range(20)))
    served: list[str] = []

    def execute(url: str, body: bytes, owner: str) -> Executed:
        served.append(json.loads(body)["input"])
        if len(served) == 3:
            assert web.post(f"/v1/batches/{batch_id}/cancel").json["status"] == "cancelling"
        return executed(web.app, url, body, owner)

    Runner(store_of(web), execute).step()
    found = batch(web, batch_id)
    assert (found["status"], found["request_counts"]["total"]) == ("cancelled", 20)
    assert found["cancelled_at"] >= found["cancelling_at"]
    good, bad = lines_in(web, found["output_file_id"]), lines_in(web, found["error_file_id"])
    assert sorted(one["custom_id"] for one in good + bad) == sorted(f"id-{i}" for i in range(20))
    assert {one["error"]["code"] for one in bad} == {"batch_cancelled"}
    assert {one["response"] for one in bad} == {None}
    assert 1 <= len(good) == found["request_counts"]["completed"] <= len(served)


def test_a_batch_that_expires(web: Web) -> None:
    """Likewise."""
    store = store_of(web)
    batch_id = begun(web, line("a"), line("b"), completion_window="1h")
    now = store.clock()
    store.clock = lambda: now + 3601
    runner_of(web).step()
    found = batch(web, batch_id)
    assert (found["status"], found["expired_at"] > found["expires_at"]) == ("expired", True)
    assert {one["error"]["code"] for one in lines_in(web, found["error_file_id"])} == {"batch_expired"}
    store.clock = lambda: now + 31 * 86400
    runner_of(web).step()
    assert web.get("/v1/files").json["data"] == []  # nor is anything kept for ever
    assert web.get("/v1/batches").json["data"] == []


def test_results_are_kept_from_the_end_on(web: Web) -> None:
    """However long it took until then."""
    batch_id = begun(web, line("a"), output_expires_after={"anchor": "created_at", "seconds": 3600})
    store, now = store_of(web), store_of(web).clock()
    store.clock = lambda: now + 7200
    runner_of(web).step()
    store.prune()
    found = batch(web, batch_id)
    file = web.get(f"/v1/files/{found['output_file_id']}").json
    assert file["expires_at"] - found["completed_at"] == 3600
    store.clock = lambda: now + 7200 + 3600 + 1
    store.prune()
    assert web.get("/v1/batches").json["data"] == []
    assert [one["purpose"] for one in web.get("/v1/files").json["data"]] == ["batch"]


def test_a_batch_whose_input_is_gone_fails(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also after it was checked: it says so, and the next one runs."""
    first, second = begun(web, line("a")), begun(web, line("b"))
    runner = runner_of(web)
    runner._run_one(store_of(web).to_run()[0], BatchRun.check)
    assert batch(web, first)["status"] == "in_progress"
    store_of(web).content(batch(web, first)["input_file_id"]).unlink()
    assert (runner.step(), runner.step()) == (True, True)
    assert batch(web, first)["status"] == "failed"
    assert "input file is gone" in batch(web, first)["errors"]["data"][0]["message"]
    assert batch(web, second)["status"] == "completed"


def test_what_fails_for_long_fails_the_line(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line that always takes too long, and those of a model that cannot be loaded: none holds up the others."""
    monkeypatch.setattr(batch_run, "LONGEST_WAIT_S", 0.0)
    monkeypatch.setattr(batch_input, "WINDOW_LINES", 2)
    texts = ["slow", "a", "broken", "b", "broken", "c", "broken"]
    batch_id = begun(web, *(line(f"{i}", text, model=text) for i, text in enumerate(texts)))
    asked: list[str] = []

    def execute(url: str, body: bytes, owner: str) -> Executed:
        text = json.loads(body)["input"]
        asked.append(text)
        codes = {"slow": (504, "deadline_exceeded"), "broken": (503, "model_failed")}
        return Executed(codes[text][0], b"{}", "", code=codes[text][1]) if text in codes else Executed(200, b"{}", "")

    Runner(store_of(web), execute).step()
    assert batch(web, batch_id)["request_counts"] == {"total": 7, "completed": 3, "failed": 4}
    failed = lines_in(web, batch(web, batch_id)["error_file_id"])
    assert [one["response"]["status_code"] for one in failed] == [504, 503, 503, 503]
    most = batch_run.MOST_TRIES
    assert asked.count("slow") == most["deadline_exceeded"]
    assert asked.count("broken") <= 2 * most["model_failed"] + 1  # two windows are under way at a time


def test_an_answer_tells_its_error(web: Web) -> None:
    """In the words of the contract, whatever the dialect."""
    for url, body, code in (
        ("/v1/embeddings", {"input": "a"}, "model_not_found"), ("/embed", {"texts": ["a"]}, "model_not_found"),
        ("/v1/rerank", {"query": "a", "documents": ["a"]}, "model_not_found"),
        ("/embed", {"inputs": 7}, "validation_error"),
    ):  # fmt: skip
        assert executed(web.app, url, json.dumps({"model": "nobody", **body}).encode(), "").code == code
    assert executed(web.app, "/v1/embeddings", b'{"model": "m", "input": "a"}', "").code == ""


def test_a_busy_pool_is_asked_again(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until it has room: no line fails for that."""
    monkeypatch.setattr(batch_run, "LONGEST_WAIT_S", 0.001)
    batch_id = begun(web, line("a"), line("b"))
    busy = iter([429, 503, 504, 429, 503])

    def execute(url: str, body: bytes, owner: str) -> Executed:
        status = next(busy, None)
        return Executed(status, b"{}", "") if status else executed(web.app, url, body, owner)

    Runner(store_of(web), execute).step()
    assert batch(web, batch_id)["request_counts"] == {"total": 2, "completed": 2, "failed": 0}


def test_a_full_disk_pauses_it(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    """And it says so; when there is room it goes on, and nothing is there twice."""
    monkeypatch.setattr(batch_input, "WINDOW_LINES", 2)
    monkeypatch.setattr(engine, "PAUSE_S", 0.0)
    batch_id = begun(web, *(line(f"id-{i}", f"text {i}") for i in range(9)))
    real, writes = batch_run.GrowingFile.append, iter(range(100))

    def append(self: Any, content: bytes) -> None:
        if next(writes) in (5, 9):
            real(self, content[:7])
            raise OSError(28, "No space left on device")
        real(self, content)

    monkeypatch.setattr(batch_run.GrowingFile, "append", append)
    runner = runner_of(web)
    runner.step()
    assert batch(web, batch_id)["status"] == "in_progress"
    assert "No space left" in batch(web, batch_id)["paused"]
    while batch(web, batch_id)["status"] not in FINISHED:
        runner.step()
    found = batch(web, batch_id)
    assert (found["paused"], found["request_counts"]["completed"]) == (None, 9)
    assert [one["custom_id"] for one in lines_in(web, found["output_file_id"])] == [f"id-{i}" for i in range(9)]


def test_a_window_that_cannot_be_kept_takes_no_room(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though its answers were written: they are cut off, and computed again when there is room."""
    monkeypatch.setattr(batch_input, "WINDOW_LINES", 2)
    monkeypatch.setattr(engine, "PAUSE_S", 0.0)
    batch_id = begun(web, *(line(f"id-{i}") for i in range(9)))
    real, left = Store.keep, [3]  # in progress, and two windows

    def keep(self: Store, known: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        real(self, known)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "keep", keep)
        runner_of(web).step()
    place = store_of(web).place_of(batch_id)
    at = json.loads((place / "batch.json").read_text())["at"]
    assert (place / "output.jsonl").stat().st_size == at["output"] > 0
    assert "No space left" in batch(web, batch_id)["paused"]
    runner_of(web).step()
    good = lines_in(web, batch(web, batch_id)["output_file_id"])
    assert [one["custom_id"] for one in good] == [f"id-{i}" for i in range(9)]


@pytest.mark.parametrize("is_foreseen", [True, False])
def test_a_disk_that_is_full(
    make_web: MakeWeb, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_foreseen: bool
) -> None:
    """Not a byte is free: what is asked is refused, what runs pauses and says so, and goes on when there is room."""
    monkeypatch.setattr(engine, "PAUSE_S", 0.0)
    monkeypatch.setattr(batch_input, "WINDOW_LINES", 4)
    if not is_foreseen:
        monkeypatch.setattr(storage, "SPARE_BYTES", -(1 << 40))
    with small_disk(tmp_path / "disk") as disk:
        web = make_web(MODEL, settings=Settings(paths=Paths(state_dir=str(disk / "state"))))
        batch_id = begun(web, *(line(f"id-{i}", f"text {i}") for i in range(40)))
        file_id = batch(web, batch_id)["input_file_id"]
        served: list[str] = []

        def execute(url: str, body: bytes, owner: str) -> Executed:
            served.append(json.loads(body)["input"])
            if served[-1] == "text 20" and served.count("text 20") == 1:
                fill(disk / "waste")
            return executed(web.app, url, body, owner)

        runner = Runner(store_of(web), execute)
        runner.step()
        found, place = batch(web, batch_id), store_of(web).place_of(batch_id)
        assert (found["status"], found["requests_s"], found["seconds_left"]) == ("in_progress", None, None)
        assert found["paused"].startswith("paused: ")
        at = json.loads((place / "batch.json").read_text())["at"]
        assert (place / "output.jsonl").stat().st_size == at["output"] > 0
        computed = len(served)
        fill(disk / "waste2")
        before = sorted(store_of(web).folder.glob("*/*/*"))
        again = {"input_file_id": file_id, "endpoint": "/v1/embeddings"}
        for answer in (
            upload(web, "x" * 10_000), web.post("/v1/batches", again), web.post(f"/v1/batches/{batch_id}/cancel")
        ):  # fmt: skip
            assert (answer.status_code, answer.json["error"]["code"]) == (507, "storage_error"), answer.text
        assert sorted(store_of(web).folder.glob("*/*/*")) == before
        runner.step()
        assert "paused" in batch(web, batch_id)["paused"]
        assert (len(served) == computed) == is_foreseen  # nothing is computed for which there is no room
        for waste in disk.glob("waste*"):
            waste.unlink()
        runner.step()
        found = batch(web, batch_id)
        assert (found["status"], found["paused"]) == ("completed", None)
        good = [one["custom_id"] for one in lines_in(web, found["output_file_id"])]
        assert good == [f"id-{i}" for i in range(40)]
        assert upload(web, "x").status_code == 200


def test_results_have_as_much_room_as_files(make_web: MakeWeb, monkeypatch: pytest.MonkeyPatch) -> None:
    """Together: a batch pauses where its results would take more, and goes on when some of it is free."""
    monkeypatch.setattr(engine, "PAUSE_S", 0.0)
    web = make_web(MODEL, settings=Settings(limits=Limits(max_files_bytes=30_000)))
    other = upload(web, "x" * 20_000).json["id"]
    batch_id = begun(web, line("a"), line("b"))
    runner = runner_of(web)
    runner.step()
    found = batch(web, batch_id)
    assert (found["status"], "limits.max_files_bytes" in found["paused"]) == ("in_progress", True)
    web.delete(f"/v1/files/{other}")
    runner.step()
    assert (batch(web, batch_id)["status"], batch(web, batch_id)["paused"]) == ("completed", None)


class Killed(BaseException):
    """As if the process had ended."""


FIXTURES = [hypothesis.HealthCheck.function_scoped_fixture]


@hypothesis.given(kills=st.lists(st.integers(0, 12), max_size=5), torn=st.binary(max_size=30))
@hypothesis.settings(max_examples=25, deadline=None, suppress_health_check=FIXTURES)
def test_after_any_end_it_goes_on(web: Web, kills: list[int], torn: bytes) -> None:
    """Every line once, in order, however often the process is killed, between any two writes of a document."""
    real_lines, real_keep = batch_input.WINDOW_LINES, Store.keep
    batch_input.WINDOW_LINES = 2
    try:
        batch_id = begun(web, *(line(f"id-{i}", "bad" if i == 3 else f"text {i}") for i in range(9)))
        for kill in kills:
            left = [kill]

            def keep(self: Store, known: Any, left: list[int] = left) -> None:
                if left[0] == 0:
                    raise Killed
                left[0] -= 1
                real_keep(self, known)

            Store.keep = keep  # type: ignore[method-assign]
            try:
                runner_of(web).step()
            except Killed:
                for path in store_of(web).place_of(batch_id).glob("*.jsonl"):
                    with path.open("ab") as file:
                        file.write(torn)
            finally:
                Store.keep = real_keep  # type: ignore[method-assign]
        while batch(web, batch_id)["status"] not in FINISHED:
            runner_of(web).step()
        found = batch(web, batch_id)
        assert (found["status"], found["request_counts"]) == ("completed", {"total": 9, "completed": 8, "failed": 1})
        good = [one["custom_id"] for one in lines_in(web, found["output_file_id"])]
        assert good == [f"id-{i}" for i in range(9) if i != 3]
        assert [one["custom_id"] for one in lines_in(web, found["error_file_id"])] == ["id-3"]
    finally:
        batch_input.WINDOW_LINES = real_lines


def test_a_batch_that_cannot_go_on_keeps_nobody_waiting(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody has deleted its results: it fails and says why, and the next one runs."""
    monkeypatch.setattr(batch_input, "WINDOW_LINES", 2)
    first = begun(web, *(line(f"id-{i}") for i in range(9)))
    store, now = store_of(web), store_of(web).clock()
    store.clock = lambda: now + 1
    second = begun(web, line("a"))
    with monkeypatch.context() as patch:
        left = iter([True, True])  # it begins, and writes a window

        def keep(self: Store, known: Any, real: Any = Store.keep) -> None:
            if not next(left, False):
                raise Killed
            real(self, known)

        patch.setattr(Store, "keep", keep)
        with pytest.raises(Killed):
            runner_of(web).step()
    (store.place_of(first) / "output.jsonl").unlink()
    runner = runner_of(web)
    assert (runner.step(), runner.step()) == (True, True)
    found = batch(web, first)
    assert found["status"] == "failed"
    assert "output.jsonl is gone" in found["errors"]["data"][0]["message"]
    assert batch(web, second)["status"] == "completed"


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["custom_id", "method", "url", "body", "x"]), inner, max_size=4)
    ),
)
LINES = st.one_of(
    st.text(max_size=30), st.just(line("a")), st.just(line("b")), st.just(line("c", 7)), st.just("{}"),
    ANYTHING.map(json.dumps),
    ANYTHING.map(lambda url: json.dumps({"custom_id": "x", "method": "POST", "url": url, "body": {}})),
)  # fmt: skip


@pytest.mark.parametrize("count", [60, pytest.param(1000, marks=pytest.mark.long)])
def test_whatever_is_uploaded(web: Web, count: int, caplog: pytest.LogCaptureFixture) -> None:
    """The batch ends failed, with the lines that are at fault, or completed; no trace and no file of it is left."""

    @hypothesis.given(lines=st.lists(LINES, max_size=5), tail=st.binary(max_size=20))
    @hypothesis.settings(max_examples=count, deadline=None)
    def uploaded(lines: list[str], tail: bytes) -> None:
        content = "\n".join(lines).encode(errors="replace") + b"\n" + tail
        file_id = upload(web, content).json["id"]
        answer = web.post(
            "/v1/batches", {"input_file_id": file_id, "endpoint": "/v1/embeddings", "completion_window": "24h"}
        )
        runner_of(web).step()
        found = batch(web, answer.json["id"])
        assert found["status"] in ("failed", "completed")
        if found["status"] == "failed":
            faults = found["errors"]["data"]
            assert faults
            assert all(fault["message"] and (fault["line"] or fault["code"] == "empty_file") for fault in faults)
        failed = lines_in(web, found["error_file_id"])
        assert len(failed) == found["request_counts"]["failed"]
        for one in failed:  # the id names the line
            assert sum(f'"custom_id": "{one["custom_id"]}"' in given for given in content.decode().split("\n")) == 1
        left = {path.name for path in store_of(web).place_of(answer.json["id"]).iterdir()}
        assert left <= {"batch.json", "paused", "output.jsonl", "errors.jsonl"} - {
            name for name in ("output.jsonl", "errors.jsonl") if found["status"] == "completed"
        }
        for name in filter(None, (file_id, found["output_file_id"], found["error_file_id"])):
            assert web.delete(f"/v1/files/{name}").status_code == 200

    uploaded()
    assert not [record for record in caplog.records if record.exc_info]
    assert list((store_of(web).folder / "files").iterdir()) == []


# --- whose


Keyed = tuple[Web, Callable[..., str], Any]


@pytest.fixture
def keyed(tmp_path: Path, pool_settings: PoolSettings, monkeypatch: pytest.MonkeyPatch) -> Iterator[Keyed]:
    monkeypatch.setattr("embedpool.config.keys.LOOK_EVERY_S", 0.0)
    settings = Settings(security=Security(keys_file=str(tmp_path / "keys.yml")))
    object.__setattr__(settings, "base_dir", tmp_path)
    with serving(tmp_path, pool_settings, MODEL, "model: other", settings=settings) as web:
        settle(web.pool)
        file = keys_file(settings)

        def key(**values: Any) -> str:
            entry, secret = make_key("", **values)
            file.edit(lambda keys: (*keys, entry))
            return secret

        yield web, key, file


def test_everybody_sees_their_own(keyed: Keyed) -> None:
    """Others get 404; lines go with the key as it is when they run; those of a revoked one fail."""
    web, key, file = keyed
    mine, theirs = ({"Authorization": f"Bearer {key(**values)}"} for values in ({"models": ("m",)}, {}))
    file_id = upload(web, "\n".join([line("a"), line("b", model="other")]), headers=mine).json["id"]
    body = {"input_file_id": file_id, "endpoint": "/v1/embeddings", "completion_window": "24h"}
    batch_id = web.post("/v1/batches", body, headers=mine).json["id"]
    for path in (f"/v1/files/{file_id}", f"/v1/files/{file_id}/content", f"/v1/batches/{batch_id}"):
        assert (web.get(path, headers=theirs).status_code, web.get(path, headers=mine).status_code) == (404, 200)
    assert web.get("/v1/files", headers=theirs).json["data"] == []
    assert web.post("/v1/batches", body, headers=theirs).status_code == 404
    assert web.post(f"/v1/batches/{batch_id}/cancel", headers=theirs).status_code == 404
    assert web.delete(f"/v1/files/{file_id}", headers=mine).status_code == 400  # it is in use
    assert web.delete(f"/v1/files/{file_id}", headers=theirs).status_code == 404  # which is nobody else's business
    runner_of(web).step()
    found = web.get(f"/v1/batches/{batch_id}", headers=mine).json
    assert found["request_counts"] == {"total": 2, "completed": 1, "failed": 1}
    second = web.post("/v1/batches", body, headers=mine).json["id"]
    file.edit(lambda keys: keys[1:])
    assert web.get("/v1/files", headers=mine).status_code == 401  # the server has seen it
    runner_of(web).step()
    (known,) = [one for one in store_of(web)._all("batches", "batch.json") if one["batch"]["id"] == second]
    assert known["batch"]["request_counts"] == {"total": 2, "completed": 0, "failed": 2}


def test_nobody_waits_for_the_batches_of_others(keyed: Keyed, monkeypatch: pytest.MonkeyPatch) -> None:
    """A key's own run one after the other; those of several keys side by side, also where a look has failed between."""
    monkeypatch.setattr(engine, "PAUSE_S", 0.0)
    web, key, _ = keyed
    first, second = ({"Authorization": f"Bearer {key()}"} for _ in range(2))
    opened, reached, failing, seen = threading.Event(), threading.Event(), [1, 2], []
    real = Store.to_run

    def to_run(store: Store) -> Any:
        if reached.is_set() and failing:
            raise RuntimeError(f"cannot look, {failing.pop()}")
        return real(store)

    monkeypatch.setattr(Store, "to_run", to_run)

    def made(headers: dict[str, str], *texts: str) -> str:
        content = "\n".join(line(f"id-{i}", text) for i, text in enumerate(texts))
        body = {"input_file_id": upload(web, content, headers=headers).json["id"], "endpoint": "/v1/embeddings"}
        return str(web.post("/v1/batches", body, headers=headers).json["id"])

    def execute(url: str, body: bytes, owner: str) -> Executed:
        text = json.loads(body)["input"]
        if text == "long":
            reached.set()
            assert opened.wait(20)
        seen.append(text)
        return executed(web.app, url, body, owner)

    long, after_it = made(first, "long"), made(first, "next")
    runner = Runner(store_of(web), execute, web.metrics)
    runner.start()
    try:
        wait_until(lambda: reached.is_set() and not failing)
        other = made(second, "other")
        wait_until(lambda: web.get(f"/v1/batches/{other}", headers=second).json["status"] == "completed")
        assert web.get(f"/v1/batches/{after_it}", headers=first).json["status"] == "in_progress"  # it is valid
        opened.set()
        for batch_id in (long, after_it):
            wait_until(
                lambda name=batch_id: web.get(f"/v1/batches/{name}", headers=first).json["status"] == "completed"
            )
    finally:
        opened.set()
        runner.stop()
    assert seen == ["other", "long", "next"]
