"""What can be seen of the server."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from embedpool.client import Client
from embedpool.config.spec import ModelSpec
from embedpool.tasks.driver import Place, Progress, Report
from tests.conftest import open_fake, settle
from tests.web.conftest import MODEL, NAME, Gate, MakeWeb, Web, refused

SECRET = "s3cr3t-value"


def test_health_says_the_process_is_up(make_web: MakeWeb, gate: Gate) -> None:
    """/health is 200 from the start; `booted` becomes true with the last first load."""
    web = make_web(MODEL, "model: b", wait=False, open_place=gate.load)
    assert web.get("/health").json == {"ok": True, "booted": False, "models": 2}
    gate.opened.set()
    settle(web.pool)
    assert web.get("/health").json == {"ok": True, "booted": True, "models": 2}


def test_ready_waits_for_first_loads(make_web: MakeWeb, gate: Gate) -> None:
    """/ready is 503 while an enabled model loads for the first time and says which; then 200."""
    web = make_web(MODEL, "model: off, enabled: false", wait=False, open_place=gate.load)
    answer = web.get("/ready")
    assert answer.status_code == 503
    assert answer.json["loading"] == [NAME]
    assert web.get(f"/ready/{NAME}").status_code == 503
    gate.opened.set()
    settle(web.pool)
    answer = web.get("/ready")
    assert (answer.status_code, answer.json["loading"], answer.json["failed"]) == (200, [], [])
    assert web.get(f"/ready/{NAME}").status_code == 200


def test_ready_lists_the_failed(make_web: MakeWeb) -> None:
    """A model that failed does not keep the others from being ready: it is listed, and is itself not ready."""
    web = make_web(MODEL, "model: broken, driver: {type: fake, config: {fault: load}}")
    answer = web.get("/ready")
    assert answer.status_code == 200
    assert answer.json["failed"] == ["broken"]
    assert web.get("/ready/broken").status_code == 503
    assert web.get("/ready/m").status_code == 200


def test_ready_ends_when_a_stop_begins(web: Web) -> None:
    """A stopping server is not ready any more, so that balancers turn away while it still serves."""
    web.pool.draining = True
    assert web.get("/ready").status_code == web.get("/ready/m").status_code == 503
    assert web.embed("a").status_code == 200


@pytest.mark.parametrize(("enabled", "scaling", "status"), [("true", 1, 200), ("true", 0, 200), ("false", 1, 503)])
def test_ready_of_a_model_is_whether_it_would_serve(make_web: MakeWeb, enabled: str, scaling: int, status: int) -> None:
    """/ready/<model> is 200 for a model that serves or loads on demand, 503 for a disabled one."""
    web = make_web(f"{MODEL}, enabled: {enabled}, scaling: {{min: {scaling}}}")
    assert web.get(f"/ready/{NAME}").status_code == web.get("/ready/m").status_code == status


def test_ready_of_some_models(make_web: MakeWeb, gate: Gate) -> None:
    """A probe of those alone: whether each of them would serve, by name or alias; others do not count."""

    def open_place(spec: ModelSpec, memory: object, report: object) -> Place:
        return gate.load(spec, memory, report) if spec.model == "slow" else open_fake(spec)

    web = make_web(MODEL, "model: off, enabled: false", "model: slow", wait=False, open_place=open_place)
    assert web.pool.find("m").replicas.settled.wait(20)
    assert web.get("/ready").status_code == 503
    assert web.get(f"/ready?models=m,{NAME}").status_code == 200
    answer = web.get("/ready?models=m,slow")
    assert (answer.status_code, answer.json["loading"]) == (503, ["slow"])
    assert web.get("/ready?models=off").status_code == 503
    gate.opened.set()
    settle(web.pool)
    assert web.get("/ready?models=m,slow").status_code == web.get("/ready?models=").status_code == 200
    refused(web.get("/ready?models=m,nobody"), 404, "model_not_found")


def test_ready_of_an_unknown_model(web: Web) -> None:
    """An unknown model is not found, rather than not ready."""
    refused(web.get("/ready/org/none"), 404, "model_not_found")


def test_status_has_the_fields_of_the_contract(web: Web) -> None:
    """/status shows each model's state, replicas, queue, scaling, counters and last error, and the last reload."""
    web.embed("a b", "c")
    web.embed("a", whatever=1)
    document = web.get("/status").json
    assert document["last_reload"]["ok"] is True
    assert document["last_reload"]["reason"] == "start"
    [entry] = document["models"]
    assert entry["scaling"] == {"min": 1, "max": 1, "idle_ttl_s": 30}
    counters = entry["counters"]
    assert (counters["requests"], counters["texts"], counters["tokens"]) == (2, 2, 7)
    assert counters["errors"] == {"unsupported_option": 1}
    expected = {
        "model": NAME,
        "alias": "m",
        "enabled": True,
        "state": "ready",
        "driver_type": "fake",
        "replicas": 1,
        "queue_len": 0,
        "last_error": None,
    }
    assert {name: entry[name] for name in expected} == expected
    assert entry["replicas_idle"] + entry["replicas_busy"] == 1


@pytest.mark.parametrize(
    ("model", "state"),
    [
        ("model: x, enabled: false", "disabled"),
        ("model: x, scaling: {min: 0}", "idle"),
        ("model: x", "ready"),
        ("model: x, driver: {type: fake, config: {fault: load}}", "failed"),
    ],
)
def test_the_state_of_a_model_is_shown_everywhere(make_web: MakeWeb, model: str, state: str) -> None:
    """/status and /models agree on the state, which is one of the contract's."""
    web = make_web(model)
    assert web.status("x")["state"] == web.get("/models/x").json["state"] == state


def test_a_loading_and_a_failed_model_in_status(make_web: MakeWeb, gate: Gate) -> None:
    """A model in its first load is shown as loading; one that failed with its reason."""
    web = make_web("model: x, driver: {type: fake, config: {fault: load}}", wait=False, open_place=gate.load)
    assert web.status("x")["state"] == "loading"
    gate.opened.set()
    settle(web.pool)
    assert "fault: load" in web.status("x")["last_error"]


def test_how_far_a_model_is_in_status(make_web: MakeWeb) -> None:
    """What its driver reports while it is opened, also of one that is registered and of one that replaces another;
    `Client.progress` finds it there, by name or alias."""
    at_work, go_on, dims = threading.Semaphore(0), threading.Semaphore(0), []

    def open_place(spec: ModelSpec, memory: object, report: Report) -> Place:
        dims.append(spec.driver.config.dim)
        report(Progress("download", 10 * len(dims), 100))
        at_work.release()
        assert go_on.acquire(timeout=20)
        return open_fake(spec)

    web = make_web("model: x, alias: y", wait=False, open_place=open_place)

    def shown(name: str) -> dict[str, Any] | None:
        assert at_work.acquire(timeout=20)
        client = Client("http://nowhere")
        client.status = lambda: web.get("/status").json
        found = client.progress(name)
        go_on.release()
        return found

    assert shown("y") == {"step": "download", "done_bytes": 10, "total_bytes": 100}
    settle(web.pool)
    assert web.status("x")["progress"] is None
    assert web.status("x")["kinds"] == ["embed"]
    for dim, replaces, done in ((4, "true", 20), (5, "true", 30)):
        body = {"model": "x", "driver_type": "fake", "driver_config": {"dim": dim}}
        with ThreadPoolExecutor(1) as thread:
            answer = thread.submit(web.post, f"/models/register?replace={replaces}", body)
            assert shown("x") == {"step": "download", "done_bytes": done, "total_bytes": 100}
            assert answer.result(20).status_code == 200
    assert web.get("/status").json["candidates"] == []


def test_models_lists_names_and_aliases(make_web: MakeWeb) -> None:
    """/models has OpenAI's shape and lists a model under its name and again under its alias, with spec and state."""
    document = make_web(MODEL, "model: b").get("/models").json
    assert document["object"] == "list"
    assert [entry["id"] for entry in document["data"]] == [NAME, "m", "b"]
    for entry in document["data"]:
        assert {"id", "object", "created", "owned_by", "state", "spec"} <= set(entry)
        assert entry["object"] == "model"
    by_name, by_alias, _ = document["data"]
    assert by_name["spec"] == by_alias["spec"]
    assert by_name["spec"]["model"] == NAME


@pytest.mark.parametrize("name", [NAME, "m"])
def test_one_model_by_name_or_alias(web: Web, name: str) -> None:
    """/models/<name> finds a model whose name holds slashes, and its alias."""
    entry = web.get(f"/models/{name}").json
    assert entry["id"] == name
    assert entry["spec"]["driver"]["type"] == "fake"


def test_an_unknown_model_is_not_found(web: Web) -> None:
    """/models/<name> of an unknown model lists near names."""
    assert NAME in refused(web.get("/models/org/team/n"), 404, "model_not_found")["message"]


@pytest.mark.parametrize("name", ["a//b", "a.b:c@d-e_f/g", "trailing/", "register", "a/./b"])
def test_every_permitted_name_can_be_looked_up(make_web: MakeWeb, name: str) -> None:
    """Whatever name the contract's pattern allows, its paths answer."""
    web = make_web(f"model: '{name}'")
    assert web.get(f"/models/{name}").json["id"] == name
    assert web.get(f"/ready/{name}").status_code == 200


@pytest.mark.parametrize("password", ["hunter2", "hunt@hunter2"])
def test_secrets_are_shown_nowhere(make_web: MakeWeb, monkeypatch: pytest.MonkeyPatch, password: str) -> None:
    """Neither keys nor the credentials of a base URL can be read from the server."""
    monkeypatch.setenv("EMBEDPOOL_SECRET_KEY", SECRET)
    config = (
        f"base_url: 'http://user:{password}@127.0.0.1:1/embed', retries: 0, api_key: EMBEDPOOL_SECRET_KEY,"
        " headers: {X-Key: EMBEDPOOL_SECRET_KEY}"
    )
    web = make_web(f"{MODEL}, driver: {{type: http, config: {{{config}}}}}")
    assert web.status("m")["state"] == "failed"
    shown = [web.get(p).text for p in ("/status", "/models", "/models/m", "/metrics", "/ready", "/ready/m")]
    shown.append(web.embed("a").text)
    for text in shown:
        assert SECRET not in text
        assert "hunter2" not in text
    assert "EMBEDPOOL_SECRET_KEY" in web.get("/models/m").text  # the variable's name is no secret


def test_status_says_which_process_and_file(web: Web) -> None:
    """An operator sees which process answers and which pool.yml it follows."""
    document = web.get("/status").json
    assert document["pid"] == os.getpid()
    assert document["pool_file"] == str(web.pool_yml)
