"""The client of a running server."""

from __future__ import annotations

import dataclasses
import io
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
from flask import Flask, request
from werkzeug.serving import make_server

import embedpool
from embedpool import cli
from embedpool.cli import common
from embedpool.cli import embed as cli_embed
from embedpool.client import DEADLINE_MARGIN_S, LEAST_WAIT_S, TEXTS_PER_CALL, Client
from embedpool.config import settings as config
from embedpool.config.settings import Settings
from embedpool.errors import ConfigError, EmbedpoolError, InvalidRequest, ModelChanged, ServerUnreachable
from embedpool.pool.settings import PoolSettings
from tests.conftest import settle
from tests.web.conftest import MODEL, NAME, Web, raw, serving, unit


class Served:
    """An app on a port."""

    def __init__(self, app: Any) -> None:
        self._server = make_server("127.0.0.1", 0, app, threaded=True)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), name="server")
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(20)


@pytest.fixture
def web(tmp_path: Path, pool_settings: PoolSettings) -> Iterator[Web]:
    with serving(tmp_path, pool_settings, MODEL) as web:
        settle(web.pool)
        yield web


@pytest.fixture
def client(web: Web) -> Iterator[Client]:
    served = Served(web.app)
    with Client(served.url + "/", timeout_s=20) as client:
        yield client
    served.close()


NEW = {"model": "org/new", "driver_type": "fake", "driver_config": {"dim": 8}}


def test_the_life_of_a_model(client: Client, web: Web) -> None:
    """Everything the command line does to a running server works: register, alias, disable, enable, remove."""
    assert client.health()["models"] == 1
    assert client.register(NEW)["state"] == "ready"
    assert client.set_alias(NEW["model"], "n")["alias"] == "n"
    assert client.set_enabled("n", False)["state"] == "disabled"
    assert client.set_enabled("n", True)["state"] == "ready"
    assert client.set_alias("n", None)["alias"] is None
    assert client.register({**NEW, "driver_config": {"dim": 4}}, replace=True)["state"] == "ready"
    assert {m["model"] for m in client.status()["models"]} == {NAME, NEW["model"]}
    assert client.unregister(NEW["model"])["removed"] is True
    assert client.unregister("m")["model"] == NAME
    assert client.status()["models"] == []


@pytest.mark.parametrize("name", ["a/b@c:d", "a//b", "tail/"])
def test_names_survive_the_way(client: Client, name: str) -> None:
    """Whatever characters a name may hold, it can be removed again."""
    client.register({**NEW, "model": name})
    assert client.unregister(name)["model"] == name


def test_removing_a_name_with_dots_removes_no_other(client: Client) -> None:
    """A name that looks like a relative path is sent as it is, not resolved to another model's."""
    with pytest.raises(EmbedpoolError) as caught:
        client.unregister("x/../m")
    assert caught.value.code == "model_not_found"
    assert len(client.status()["models"]) == 1


@pytest.mark.parametrize(
    ("call", "status", "code"),
    [
        (lambda c: c.unregister("nope"), 404, "model_not_found"),
        (lambda c: c.set_alias("m", "no spaces"), 422, "validation_error"),
        (lambda c: c.register({**NEW, "min": -1}), 422, "validation_error"),
        (lambda c: c.register({**NEW, "model": NAME}), 409, "model_exists_differently"),
        (lambda c: c.register({**NEW, "driver_config": {"fault": "load"}}), 503, "model_failed"),
    ],
)
def test_errors_carry_the_servers_status_and_code(client: Client, call: Any, status: int, code: str) -> None:
    """An error of the server is raised with its own status, code and message."""
    with pytest.raises(EmbedpoolError) as caught:
        call(client)
    assert (caught.value.status, caught.value.code) == (status, code)
    assert caught.value.message
    assert (EmbedpoolError.status, EmbedpoolError.code) == (500, "internal_error")  # the class is left as it was


def test_errors_carry_the_bad_fields(client: Client) -> None:
    """What was wrong where can be read from the error."""
    with pytest.raises(EmbedpoolError) as caught:
        client.register({**NEW, "min": -1})
    assert list(caught.value.fields) == ["min"]


def stub(**answers: Any) -> Served:
    """A server that is not embedpool."""
    app = Flask("stub")

    @app.route("/health")
    def health() -> Any:
        return answers["body"], answers.get("status", 200), answers.get("headers", {})

    return Served(app)


@pytest.mark.parametrize(
    "answer",
    [
        {"body": "<html>"},
        {"body": ""},
        {"body": "[1]"},
        {"body": "5", "status": 500},
        {"body": '{"detail": "no"}', "status": 404},
        {"body": '{"error": "no"}', "status": 400},
        {"body": "", "status": 302, "headers": {"Location": "/elsewhere"}},
    ],
)
def test_another_server_at_the_address_is_recognised(answer: dict[str, Any]) -> None:
    """Whatever else answers there, the error says that it is not embedpool."""
    served = stub(**answer)
    try:
        with pytest.raises(ServerUnreachable, match="embedpool"):
            with Client(served.url) as client:
                client.health()
    finally:
        served.close()


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "nonsense", "http://no.such.host.invalid"])
def test_no_server_at_the_address(url: str) -> None:
    """Where nothing answers, the error names the address."""
    with pytest.raises(ServerUnreachable) as caught:
        Client(url, timeout_s=5).health()
    assert url in caught.value.message


def test_a_server_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A time-out is told as such, and a call's own time-out comes before the client's."""
    asked: list[float] = []

    def hang(*arguments: Any, timeout: float, **more: Any) -> None:
        asked.append(timeout)
        raise requests.ReadTimeout

    monkeypatch.setattr(requests.Session, "request", hang)
    client = Client("http://x", timeout_s=7)
    for call in (client.health, lambda: client.register(NEW, timeout_s=900)):
        with pytest.raises(ServerUnreachable, match="Timeout"):
            call()
    assert asked == [7, 900]


def test_the_server_is_told_by_when_its_answer_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its answer that the deadline has passed comes before the client stops to listen."""
    asked: list[tuple[str, float]] = []

    def hang(*arguments: Any, timeout: float, headers: Any, **more: Any) -> None:
        asked.append((headers["X-Request-Timeout-Ms"], timeout))
        raise requests.ReadTimeout

    monkeypatch.setattr(requests.Session, "request", hang)
    with pytest.raises(ServerUnreachable):
        Client("http://x", timeout_s=7).embed(["a"], model="m")
    assert asked == [("7000", 7 + DEADLINE_MARGIN_S)]


@pytest.mark.parametrize(("key", "sent"), [("s3cr3t", "Bearer s3cr3t"), (None, None)])
def test_the_admin_key_is_sent(key: str | None, sent: str | None) -> None:
    """An admin key travels as a bearer token; without one nothing is sent."""
    seen: list[str | None] = []
    app = Flask("stub")

    @app.route("/health")
    def health() -> Any:
        seen.append(request.headers.get("Authorization"))
        return {"ok": True, "booted": True, "models": 0}

    served = Served(app)
    try:
        with Client(served.url, api_key=key) as client:
            client.health()
    finally:
        served.close()
    assert seen == [sent]


def test_embed(client: Client) -> None:
    """Vectors in order, as numpy, with the options of POST /embed; no text gives none."""
    assert embedpool.Client is Client
    np.testing.assert_allclose(client.embed(["a b", "c"], model="m"), unit(raw("a b", "c")), atol=1e-6)
    packed = client.embed(["a b"], model="m", precision="ubinary", dimensions=16)
    assert (packed.shape, packed.dtype) == ((1, 2), np.uint8)
    with pytest.raises(EmbedpoolError) as caught:
        client.embed([], model="m")
    assert caught.value.code == "empty_input"
    with pytest.raises(TypeError, match="list"):
        client.embed("a", model="m")


def test_any_number_of_texts(client: Client, web: Web) -> None:
    """More texts than go in a call are split and gathered."""
    texts = [f"text {i}" for i in range(TEXTS_PER_CALL + 3)]
    before = web.status("m")["counters"]["requests"]
    np.testing.assert_allclose(client.embed(texts, model="m"), unit(raw(*texts)), atol=1e-6)
    assert web.status("m")["counters"]["requests"] == before + 2


def test_truncation_is_told(client: Client, caplog: pytest.LogCaptureFixture) -> None:
    """How many texts lost something is a warning."""
    client.embed(["a", "b c d"], model="m", max_seq_length=3)
    assert "1 of 2 texts were truncated" in caplog.text


class Busy:
    """A server that refuses some times before it serves."""

    def __init__(self, web: Web, *refusals: tuple[int, str | None]) -> None:
        self.left = list(refusals)
        self._web = web

    def __call__(self, environ: Any, start_response: Any) -> Any:
        if not self.left:
            return self._web.app(environ, start_response)
        status, wait = self.left.pop(0)
        headers = [("Content-Type", "application/json"), *([("Retry-After", wait)] if wait else [])]
        start_response(f"{status} Busy", headers)
        return [b'{"error": {"code": "overloaded", "message": "busy", "request_id": "1"}}']


@pytest.mark.parametrize(
    ("refusals", "waited", "served"),
    [
        ([(429, "2"), (503, "3")], [2.0, 3.0], True),
        ([(429, "0"), (503, "0")], [LEAST_WAIT_S, LEAST_WAIT_S], True),  # and not as fast as it can
        ([(429, "40"), (429, "30")], [40.0], False),  # longer in all
        ([(429, "61")], [], False),  # longer than the client is to wait
        ([(503, None)], [], False),  # the server does not say that it gets better
        ([(403, "1")], [], False),
    ],
)
def test_a_busy_server_is_asked_again_when_it_says(
    web: Web, monkeypatch: pytest.MonkeyPatch, refusals: list[Any], waited: list[float], served: bool
) -> None:
    """429 and 503 are waited out as Retry-After tells, within the client's patience; nothing else is."""
    slept: list[float] = []
    monkeypatch.setattr("embedpool.client.time.sleep", slept.append)
    server = Served(Busy(web, *refusals))
    try:
        with Client(server.url) as client:
            if served:
                np.testing.assert_allclose(client.embed(["a"], model="m"), unit(raw("a")), atol=1e-6)
            else:
                with pytest.raises(EmbedpoolError, match="busy"):
                    client.embed(["a"], model="m")
    finally:
        server.close()
    assert [wait_s for wait_s in slept if wait_s] == waited  # the fake driver sleeps for 0 s


def test_an_error_says_which_texts(client: Client) -> None:
    """Where texts go in several calls, an error names the first of its call."""
    texts = ["a"] * TEXTS_PER_CALL + ["b c d"]
    with pytest.raises(EmbedpoolError, match=f"from number {TEXTS_PER_CALL}"):
        client.embed(texts, model="m", max_seq_length=3, truncate="error")


def test_each_call_has_its_own_patience(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bulk job that has gone on for an hour is not given up at its first 429."""
    slept: list[float] = []
    monkeypatch.setattr("embedpool.client.time.sleep", slept.append)
    monkeypatch.setattr("embedpool.client.TEXTS_PER_CALL", 1)
    busy = Busy(web, (429, "50"))
    server = Served(busy)
    try:
        with Client(server.url) as client:
            assert client.embed(["a", "b"], model="m").shape == (2, 384)
            busy.left.append((429, "50"))
            assert client.embed(["a", "b"], model="m").shape == (2, 384)
    finally:
        server.close()
    assert [wait_s for wait_s in slept if wait_s] == [50.0, 50.0]


@pytest.mark.parametrize("status", [413, 504])
def test_what_is_too_much_for_one_call_goes_in_two(web: Web, status: int) -> None:
    """As often as it takes; the order is kept. A single text that is too much is an error."""
    texts = [f"text {i}" for i in range(5)]
    busy = Busy(web, (status, None), (status, None))
    server = Served(busy)
    try:
        with Client(server.url) as client:
            np.testing.assert_allclose(client.embed(texts, model="m"), unit(raw(*texts)), atol=1e-6)
            busy.left.append((status, None))
            with pytest.raises(EmbedpoolError):
                client.embed(["a"], model="m")
    finally:
        server.close()


def test_a_call_is_bounded_in_characters(client: Client, web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long texts go in smaller calls, a text that is longer than the bound alone."""
    monkeypatch.setattr("embedpool.client.CHARS_PER_CALL", 10)
    texts = ["aaaa", "bbbb", "cccc", "d" * 20, "e"]
    before = web.status("m")["counters"]["requests"]
    np.testing.assert_allclose(client.embed(texts, model="m"), unit(raw(*texts)), atol=1e-6)
    assert web.status("m")["counters"]["requests"] == before + 4


def test_vectors_of_two_models_are_not_joined(client: Client, web: Web) -> None:
    """Where the name becomes another model between two calls, of the same width or not."""
    submit, asked = web.pool.submit, []

    def changing(model: str, task: Any, call: Any) -> Any:
        asked.append(model)
        return dataclasses.replace(submit(model, task, call), space=f"space {len(asked)}")

    assert client.embed(["a"], model="m").shape == (1, 384)
    space = client.space
    assert space
    web.pool.submit = changing  # type: ignore[method-assign]
    assert len(client.embed(["a"], model="m")) == 1  # each call of embed may be answered by what there is then
    with pytest.raises(ModelChanged, match="from number 1000"):
        client.embed(["a"] * (TEXTS_PER_CALL + 1), model="m")


def test_the_command_line_does_not_join_them_either(
    client: Client, web: Web, monkeypatch: pytest.MonkeyPatch, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    """`embedpool embed -` prints the vectors of one model, then stops."""
    monkeypatch.setattr(cli_embed, "client_of", lambda settings: client)
    monkeypatch.setattr(cli_embed, "read_settings", lambda arguments: None)
    monkeypatch.setattr(cli_embed, "LINES_AT_ONCE", 1)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a\nb\n")))
    submit, spaces = web.pool.submit, iter("ab")
    web.pool.submit = lambda *call: dataclasses.replace(submit(*call), space=next(spaces))  # type: ignore[method-assign]
    assert cli.main(["embed", "--model", "m", "-"]) != 0
    printed = capsysbinary.readouterr()
    assert printed.out.count(b"\n") == 1
    assert b"another model" in printed.err


def test_another_server_gets_no_key_and_is_not_managed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What answers at the address may be anything: it is asked without the key who it is."""
    app, keys = Flask("another"), []

    @app.route("/", defaults={"path": ""})
    @app.route("/<path:path>", methods=["GET", "POST", "DELETE"])
    def any_path(path: str) -> dict[str, Any]:
        keys.append(request.headers.get("Authorization"))
        return {"ok": True, "path": path}

    served = Served(app)
    monkeypatch.setenv("EMBEDPOOL_SECRET_K", "key")
    settings = Settings(client=config.Client(base_url=served.url, api_key_env="EMBEDPOOL_SECRET_K"))
    object.__setattr__(settings, "base_dir", tmp_path)
    try:
        assert common.client_of(settings) is None
    finally:
        served.close()
    assert keys == [None]


def test_the_server_of_another_folder_is_not_managed_by_mistake(web: Web, tmp_path: Path) -> None:
    """Two folders have the same port by default; whoever means the other one's server says so."""
    served = Served(web.app)
    port = int(served.url.rpartition(":")[2])
    try:
        for folder, base_url, ours in ((web.pool_yml.parent, None, True), (tmp_path / "b", None, False),
                                       (tmp_path / "b", served.url, True)):  # fmt: skip
            settings = Settings(
                client=config.Client(base_url=base_url),
                server=config.Server(port=port),
                paths=config.Paths(pool_yml=web.pool_yml.name),
            )
            object.__setattr__(settings, "base_dir", folder)
            if ours:
                found = common.client_of(settings)
                assert found is not None
                found.close()
            else:
                with pytest.raises(ConfigError, match="serves"):
                    common.client_of(settings)
    finally:
        served.close()


def test_half_a_character_is_not_sent() -> None:
    """The text is named, and nobody is asked."""
    with Client("http://127.0.0.1:9") as client, pytest.raises(InvalidRequest, match=r"texts\[1\]: it holds half"):
        client.embed(["a", "cut \ud83e"], model="m")


def test_files_that_reach_nobody(tmp_path: Path) -> None:
    """Neither an upload nor a download raises what the library under it does."""
    (tmp_path / "in.jsonl").write_text("{}\n")
    with Client("http://127.0.0.1:9") as client:
        with pytest.raises(ServerUnreachable):
            client.create_batch(tmp_path / "in.jsonl", endpoint="/v1/embeddings")
        with pytest.raises(ServerUnreachable):
            client.fetch_file("file-x", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]
