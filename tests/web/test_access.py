"""Who may do what: every endpoint, for every kind of caller."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from embedpool.config.keys import KeysFile, keys_file, make_key
from embedpool.config.settings import Security, Settings, Tei
from embedpool.pool.settings import PoolSettings
from embedpool.web.app import ACCESS, create_app, refusal
from embedpool.web.lines import CHUNK_TEXTS
from embedpool.web.metrics import Metrics
from embedpool.web.openapi import document
from tests.conftest import fake_pool_yml, settle
from tests.web.conftest import MODEL, NAME, Gate, Web, serving

EMBED_PATHS = {
    "/embed": {"model": "m", "texts": ["a"]},
    "/v1/embeddings": {"model": "m", "input": "a"},
    "/embeddings": {"model": "m", "input": "a"},
    "/v2/embed": {"model": "m", "texts": ["a"]},
    "/v1/embed": {"model": "m", "texts": ["a"]},
    "/api/embed": {"model": "m", "input": "a"},
    "/api/embeddings": {"model": "m", "prompt": "a"},
    "/tei/{name}": {"inputs": "a"},
    "/tei/{name}/embed": {"inputs": "a"},
    "/tei/{name}/similarity": {"inputs": {"source_sentence": "a", "sentences": ["b"]}},
    "/tei/{name}/tokenize": {"inputs": "a"},
    "/tei/{name}/decode": {"ids": [3]},
    "/tei/{name}/v1/embeddings": {"model": "m", "input": "a"},
    "/tei/{name}/embeddings": {"input": "a"},
    "/openai/v1/embeddings": {"model": "m", "input": "a"},
    "/openai/deployments/{name}/embeddings": {"input": "a"},
    "/": {"inputs": "a"},
    "/similarity": {"inputs": {"source_sentence": "a", "sentences": ["b"]}},
    "/tokenize": {"inputs": "a"},
    "/decode": {"ids": [3]},
    "/tei/{name}/embed_all": {"inputs": "a"},
    "/embed_all": {"inputs": "a"},
    "/v1/contextualizedembeddings": {"model": "m", "inputs": [["a"]]},
    "/api/show": {"model": "m"},
    "/api/pull": {"model": "m"},
}
RERANK = {"model": "r", "query": "a", "documents": ["a"]}
SCORE = {"model": "r", "queries": "a", "documents": ["a"]}
CLASSIFY = {"model": "classifier", "input": "a"}
OTHER_PATHS = {  # by models that the others leave alone
    "/v1/multi-vector": {"model": "colbert", "input": "a"},
    "/tei/{name}/embed_sparse": {"inputs": "a"},
    "/embed_sparse": {"inputs": "a"},
    **dict.fromkeys(("/rerank", "/v1/rerank", "/v2/rerank", "/v3/rerank", "/reranking", "/v1/reranking"), RERANK),
    **dict.fromkeys(("/score", "/v1/score"), SCORE),
    **dict.fromkeys(("/classify", "/v1/classify"), CLASSIFY),
    "/tei/{name}/rerank": {"query": "a", "texts": ["a"]},
    "/tei/{name}/predict": {"inputs": "a"},
    "/predict": {"inputs": "a"},
}
RERANKER = "model: org/team/r, alias: r, driver: {type: fake, config: {task: rerank}}"
CLASSIFIER = "model: classifier, driver: {type: fake, config: {task: classify}}"
SPARSE = "model: sparse, driver: {type: fake, config: {task: sparse}}"
COLBERT = "model: colbert, driver: {type: fake, config: {task: multivector}}"
MANAGE_PATHS = {
    "/models/register": {"model": "new", "driver_type": "fake"},
    "/models/alias": {"model": "new", "alias": "n"},
    "/models/enable": {"model": "new", "enabled": True},
    "/reload": {},
    "/cache/clear": {},
    "/models/{name}": None,
}
ODD = {("get", "/models/{name}"): "embed", ("get", "/log"): "manage", ("get", "/"): "open"}
OPEN_PATHS = {"/health", "/ready", "/ready/{name}", "/openapi.json", "/docs", "/docs/{file}", "/ui", "/ui/{file}"}


@dataclasses.dataclass
class Guarded:
    """An app whose keys are in a file."""

    web: Web
    file: KeysFile
    settings: Settings

    def key(self, **values: Any) -> str:
        entry, key = make_key("", **values)
        self.file.edit(lambda keys: (*keys, entry))
        return key

    def ask(self, method: str, path: str, key: str | None = None, name: str = "m", **arguments: Any) -> Any:
        body = {**EMBED_PATHS, **OTHER_PATHS, **MANAGE_PATHS}.get(path) if method.lower() != "get" else None
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        at = path.replace("{name}", name).replace("{file}", "app.js" if path.startswith("/ui") else "start.js")
        sent = {"json": body} if body is not None else {}
        client = self.web.app.test_client()
        return client.open(at, method=method.upper(), headers=headers, buffered=True, **sent, **arguments)


@pytest.fixture
def guarded(tmp_path: Path, pool_settings: PoolSettings, monkeypatch: pytest.MonkeyPatch) -> Iterator[Guarded]:
    """No key yet; a new one counts at once."""
    monkeypatch.setattr("embedpool.config.keys.LOOK_EVERY_S", 0.0)
    settings = Settings(security=Security(keys_file=str(tmp_path / "keys.yml")), tei=Tei(default_model="m"))
    object.__setattr__(settings, "base_dir", tmp_path)
    models = (MODEL, "model: new", RERANKER, CLASSIFIER, SPARSE, COLBERT)
    with serving(tmp_path, pool_settings, *models, settings=settings) as web:
        settle(web.pool)
        yield Guarded(web, keys_file(settings), settings)


def served_by(path: str) -> str:
    """The model that a path is asked for here."""
    of_ends = {"classify": "classifier", "predict": "classifier", "embed_sparse": "sparse", "multi-vector": "colbert"}
    return of_ends.get(path.rpartition("/")[2], "r" if path in OTHER_PATHS else "m")


def kind_of(path: str) -> str:
    if path in OPEN_PATHS:
        return "open"
    return "manage" if path in MANAGE_PATHS else "embed"


# Where who is let in has nothing to read here, or sends no file.
OF_NOTHING = {
    **{("post", path): 400 for path in ("/v1/files", "/v1/batches")},
    **{(method, f"/v1/files/{{name}}{end}"): 404 for method, end in (("get", ""), ("delete", ""), ("get", "/content"))},
    ("get", "/v1/batches/{name}"): 404, ("post", "/v1/batches/{name}/cancel"): 404, ("post", "/predict"): 424,
}  # fmt: skip
OPERATIONS = [
    (
        method,
        path,
        ODD.get((method, path), kind_of(path)),
    )
    for path, item in document()["paths"].items()
    for method in item
]


@pytest.mark.parametrize(("method", "path", "kind"), OPERATIONS)
@pytest.mark.parametrize(
    ("caller", "open_", "embed", "manage"),
    [
        ("nobody", 200, 401, 401),
        ("a wrong key", 200, 401, 401),
        ("a revoked key", 200, 401, 401),
        ("an embed key", 200, 200, 403),
        ("an admin key", 200, 200, 200),
    ],
)
def test_the_table_of_access(
    guarded: Guarded, method: str, path: str, kind: str, caller: str, open_: int, embed: int, manage: int
) -> None:
    """Each caller at each endpoint, once there are keys of both scopes."""
    revoked = guarded.key(scopes=["admin"])
    guarded.file.edit(lambda keys: ())
    keys = {
        "nobody": None,
        "a wrong key": make_key("")[1],
        "a revoked key": revoked,
        "an embed key": guarded.key(),
        "an admin key": guarded.key(scopes=["admin"]),
    }
    name = "new" if kind == "manage" else served_by(path)
    embed = OF_NOTHING.get((method, path), 200) if embed == 200 else embed
    answer = guarded.ask(method, path, keys[caller], name=name)
    assert answer.status_code == {"open": open_, "embed": embed, "manage": manage}[kind], answer.text
    assert not any(key in answer.text for key in keys.values() if key)


@pytest.mark.parametrize("path", EMBED_PATHS)
def test_a_key_may_be_for_some_models(guarded: Guarded, path: str) -> None:
    """By name or alias; another model is forbidden, and an unknown one is unknown."""
    for named in ("m", NAME):
        assert guarded.ask("post", path, guarded.key(models=[named])).status_code == 200
    elsewhere = guarded.key(models=["new"])
    assert guarded.ask("post", path, elsewhere).status_code == 403


@pytest.mark.parametrize("path", [path for path in OTHER_PATHS if path not in ("/predict", "/embed_sparse")])
def test_a_key_for_some_models_scores_with_those(guarded: Guarded, path: str) -> None:
    """Another model is forbidden; where none is named, none that the key may not use is meant or told of."""
    named = served_by(path)
    assert guarded.ask("post", path, guarded.key(models=[named]), name=named).status_code == 200
    elsewhere = guarded.key(models=["new"])
    answer = guarded.ask("post", path, elsewhere, name=named)
    assert answer.status_code == 403
    if "{name}" not in path:
        for more in ({}, {"model": "new"}):
            body = {**{name: value for name, value in OTHER_PATHS[path].items() if name != "model"}, **more}
            client = guarded.web.app.test_client()
            answer = client.post(path, json=body, headers={"Authorization": f"Bearer {elsewhere}"})
            assert answer.status_code in (200, 400, 422)  # an embedder has cosines
            assert "org/team" not in answer.text
            assert "classifier" not in answer.text


def test_lines_ask_for_a_key_too(guarded: Guarded) -> None:
    """A body of lines is no way round."""
    key, elsewhere = guarded.key(), guarded.key(models=["new"])
    for given, status in ((None, 401), (key, 200), (elsewhere, 403)):
        headers = {"Authorization": f"Bearer {given}"} if given else {}
        answer = guarded.web.post(
            "/embed?model=m", data=b'{"text": "a"}\n', content_type="application/x-ndjson", headers=headers
        )
        assert answer.status_code == status
        answer.close()


def test_without_keys_all_is_as_ever(guarded: Guarded) -> None:
    """Embedding is open, management is open to this machine; a key that nobody asks for means nothing."""
    for key in (None, "sk-whatever"):
        assert guarded.ask("post", "/embed", key).status_code == 200
        assert guarded.ask("post", "/reload", key).status_code == 200
    assert guarded.ask("post", "/reload", environ_overrides={"REMOTE_ADDR": "10.0.0.7"}).status_code == 403


def test_the_first_key_closes_both_doors(guarded: Guarded) -> None:
    """Whatever its scope: a key for one of them never leaves the other open to everybody."""
    assert guarded.ask("post", "/embed").status_code == 200
    key = guarded.key(scopes=["admin"])
    assert guarded.ask("post", "/embed").status_code == 401
    assert guarded.ask("post", "/reload").status_code == 401
    assert guarded.ask("post", "/embed", key).status_code == 200


def test_an_embed_key_alone_closes_management(guarded: Guarded) -> None:
    """The answer says what is missing."""
    key = guarded.key()
    assert guarded.ask("post", "/reload", key).status_code == 403
    answer = guarded.ask("post", "/reload")
    assert answer.status_code == 403
    assert "no key of scope admin exists" in answer.json["error"]["message"]


@pytest.mark.parametrize("text", [None, "", "keys: [", "version: 1\nkeys: []\n"])
def test_a_process_born_beside_a_lost_file_lets_nobody_in(guarded: Guarded, text: str | None) -> None:
    """Gone, cut off, broken or emptied by hand: keys that were made are asked for, and no answer shows the path."""
    key = guarded.key()
    whole = guarded.file.path.read_text()
    if text is None:
        guarded.file.path.unlink()
    else:
        guarded.file.path.write_text(text)
    born = create_app(guarded.web.pool, guarded.web.reconciler, guarded.settings, Metrics()).test_client()
    for headers in ({}, {"Authorization": f"Bearer {key}"}):
        answer = born.post("/embed", json={"model": "m", "texts": ["a"]}, headers=headers)
        assert (answer.status_code, answer.json["error"]["code"]) == (503, "keys_unknown")
        assert str(guarded.file.path) not in answer.text
        assert born.post("/reload", json={}, headers=headers).status_code == 503
    assert born.get("/health").status_code == 200
    guarded.file.path.write_text(whole)
    assert born.post("/embed", json={"model": "m", "texts": ["a"]}, headers={"X-API-Key": key}).status_code == 200


def test_the_last_key_revoked_opens(guarded: Guarded) -> None:
    """Only a revocation does."""
    guarded.key()
    guarded.file.edit(lambda keys: ())
    assert guarded.ask("post", "/embed").status_code in (401, 503)
    guarded.file.revoke_last()
    assert guarded.ask("post", "/embed").status_code == 200


@pytest.mark.parametrize(("policy", "status"), [("off", 200), ("auto", 401), ("required", 401)])
def test_the_policy_decides(guarded: Guarded, policy: str, status: int) -> None:
    """Off asks nobody, whatever exists."""
    guarded.key()
    settings = dataclasses.replace(
        guarded.settings, security=dataclasses.replace(guarded.settings.security, keys=policy)
    )
    object.__setattr__(settings, "base_dir", guarded.settings.base_dir)
    app = create_app(guarded.web.pool, guarded.web.reconciler, settings, Metrics()).test_client()
    assert app.post("/embed", json={"model": "m", "texts": ["a"]}).status_code == status


def test_other_machines_need_a_key_even_where_none_exists(guarded: Guarded) -> None:
    """The last one revoked under a listener that they reach, or a file that never was."""
    guarded.web.app.extensions[ACCESS].serves_other_machines()
    assert guarded.ask("post", "/embed").status_code == 403


def test_a_key_for_some_models_sees_no_other(guarded: Guarded) -> None:
    """Nor reaches one that the pool has not heard of yet."""
    key = guarded.key(models=["m"])
    guarded.web.pool.catch_up = guarded.web.reconciler.catch_up
    guarded.web.pool_yml.write_text(fake_pool_yml(MODEL, "model: new", "model: newest"))
    body = {"model": "newest", "texts": ["a"]}
    client = guarded.web.app.test_client()
    assert client.post("/embed", json=body, headers={"X-API-Key": key}).status_code == 403
    unknown = client.post("/embed", json={**body, "model": "none"}, headers={"X-API-Key": key})
    assert unknown.status_code == 404
    for text in (unknown.text, *(guarded.ask("get", path, key).text for path in ("/status", "/metrics", "/models"))):
        assert "new" not in text.replace("renew", "")
    assert NAME in guarded.ask("get", "/metrics", key).text


def test_a_secret_from_a_mounted_file_counts_without_its_line_end(
    guarded: Guarded, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And the log says so, without the secret."""
    monkeypatch.setenv("EMBEDPOOL_SECRET_E", "abc\n")
    security = dataclasses.replace(guarded.settings.security, embed_key_env="EMBEDPOOL_SECRET_E")
    settings = dataclasses.replace(guarded.settings, security=security)
    object.__setattr__(settings, "base_dir", guarded.settings.base_dir)
    app = create_app(guarded.web.pool, guarded.web.reconciler, settings, Metrics()).test_client()
    body = {"model": "m", "texts": ["a"]}
    assert app.post("/embed", json=body, headers={"X-API-Key": "abc"}).status_code == 200
    assert "EMBEDPOOL_SECRET_E" in caplog.text
    assert "abc" not in caplog.text


@pytest.mark.parametrize("header", [{"X-API-Key": "{}"}, {"Authorization": "bearer  {}"}])
def test_a_key_may_come_in_another_header(guarded: Guarded, header: dict[str, str]) -> None:
    """As other services take it."""
    key = guarded.key()
    headers = {name: value.format(key) for name, value in header.items()}
    assert guarded.web.embed("a", headers=headers).status_code == 200


def test_keys_from_the_environment(
    tmp_path: Path, pool_settings: PoolSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One for embedding, one for management, by the names of their variables; one that is not set opens nothing."""
    monkeypatch.setenv("EMBEDPOOL_SECRET_E", "for embedding")
    monkeypatch.setenv("EMBEDPOOL_SECRET_A", "for management")
    security = Security(
        embed_key_env="EMBEDPOOL_SECRET_E", admin_key_env="EMBEDPOOL_SECRET_A", keys_file=str(tmp_path / "none.yml")
    )
    expected = {None: (401, 401), "for embedding": (200, 403), "for management": (200, 200)}
    with serving(tmp_path, pool_settings, MODEL, settings=Settings(security=security)) as web:
        settle(web.pool)
        for key, (embed, manage) in expected.items():
            headers = {"Authorization": f"Bearer {key}"} if key else {}
            assert web.embed("a", headers=headers).status_code == embed
            assert web.post("/reload", {}, headers=headers).status_code == manage
    monkeypatch.delenv("EMBEDPOOL_SECRET_E")
    with serving(
        tmp_path, pool_settings, MODEL, settings=Settings(security=dataclasses.replace(security, admin_key_env=None))
    ) as web:
        assert web.embed("a").status_code == 403


def test_a_keys_rates_are_its_own(guarded: Guarded) -> None:
    """429 with the time to wait, before anything is computed; other keys are not concerned."""
    slow, other = guarded.key(requests_per_s=0.001), guarded.key(texts_per_s=0.001)
    assert guarded.ask("post", "/embed", slow).status_code == 200
    answer = guarded.ask("post", "/embed", slow)
    assert (answer.status_code, answer.json["error"]["code"]) == (429, "rate_limited")
    assert 900 <= int(answer.headers["Retry-After"]) <= 1001
    assert guarded.ask("post", "/embed", other).status_code == 200
    computed = guarded.web.pool.find("m").stats.snapshot()["rows"]
    assert guarded.ask("post", "/v1/embeddings", other).status_code == 429
    assert guarded.web.pool.find("m").stats.snapshot()["rows"] == computed


def test_a_key_may_have_so_many_requests_at_once(
    tmp_path: Path, pool_settings: PoolSettings, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next gets 429; when one is answered there is room again."""
    entry, key = make_key("", concurrent=1)
    file = KeysFile(tmp_path / "keys.yml")
    file.edit(lambda keys: (entry,))
    settings = Settings(security=Security(keys_file=str(file.path)))
    headers = {"Authorization": f"Bearer {key}"}
    with serving(tmp_path, dataclasses.replace(pool_settings, open_place=gate.run), MODEL, settings=settings) as web:
        settle(web.pool)
        with ThreadPoolExecutor(1) as threads:
            first = threads.submit(web.embed, "a", headers=headers)
            assert gate.reached.wait(20)
            assert web.embed("b", headers=headers).json["error"]["code"] == "rate_limited"
            gate.opened.set()
            assert first.result().status_code == 200
        assert web.embed("b", headers=headers).status_code == 200


def test_lines_are_one_request_and_many_texts(guarded: Guarded) -> None:
    """Their key may have them at once and send them as one; their texts count as they are computed."""
    key, poor = guarded.key(concurrent=1, requests_per_s=0.001), guarded.key(texts_per_s=1)
    body = b'{"text": "a"}\n' * (3 * CHUNK_TEXTS)
    client = guarded.web.app.test_client()

    def send(key: str, body: bytes) -> Any:
        headers = {"Authorization": f"Bearer {key}"}
        return client.post(
            "/embed?model=m", data=body, content_type="application/x-ndjson", headers=headers, buffered=False
        )

    answer = send(key, body)
    assert guarded.ask("post", "/embed", key).json["error"]["code"] == "rate_limited"
    assert answer.text.count("vector") == 3 * CHUNK_TEXTS
    answer.close()
    assert guarded.ask("post", "/embed", key).json["error"]["code"] == "rate_limited"  # its one in a thousand seconds
    first = send(poor, b'{"text": "a"}\n' * 50)
    first.close()
    assert send(poor, b'{"text": "a"}').status_code == 429


def test_a_key_has_its_weight_in_the_queue(guarded: Guarded) -> None:
    """It belongs to the key, never to the request."""
    seen = []
    submit = guarded.web.pool.submit

    def watched(model: str, task: Any, call: Any) -> Any:
        seen.append(call.weight)
        return submit(model, task, call)

    guarded.web.pool.submit = watched  # type: ignore[method-assign]
    guarded.ask("post", "/embed", guarded.key(weight=4))
    assert seen == [4]


def test_the_log_names_the_key_and_does_not_tell_it(guarded: Guarded, caplog: pytest.LogCaptureFixture) -> None:
    """By its id."""
    caplog.set_level("INFO")
    key = guarded.key()
    guarded.ask("post", "/embed", key)
    fields = [record.fields for record in caplog.records if hasattr(record, "fields")]
    assert fields[-1]["key"] == key.split("_")[1]
    assert key not in str([record.__dict__ for record in caplog.records])


def test_a_changed_limit_counts_and_an_unchanged_one_goes_on(guarded: Guarded) -> None:
    """A caller's account is kept as long as its entry is what it was."""
    key = guarded.key(requests_per_s=0.001)
    assert guarded.ask("post", "/embed", key).status_code == 200
    guarded.key()
    assert guarded.ask("post", "/embed", key).status_code == 429
    guarded.file.edit(lambda keys: tuple(dataclasses.replace(k, requests_per_s=0) for k in keys))
    assert guarded.ask("post", "/embed", key).status_code == 200


def test_a_key_sees_the_models_it_is_for(guarded: Guarded) -> None:
    """Lists name no other; asking for one of those is refused as a request to it would be."""
    for_m, for_all = guarded.key(models=("m",)), guarded.key()
    lists = (("/models", "data", "id"), ("/v1/models", "data", "id"), ("/v1/models", "models", "name"))
    for path, list_name, id_name in lists:
        names = [{entry[id_name] for entry in guarded.ask("get", path, k).json[list_name]} for k in (for_m, for_all)]
        assert "new" in names[1] - names[0]
        assert "m" in names[0]
    for path in ("/models/new", "/v1/models/new"):
        assert [guarded.ask("get", path, key).status_code for key in (for_m, for_all)] == [403, 200]


def test_no_answer_is_for_pages_of_other_origins(guarded: Guarded) -> None:
    """No CORS header, whatever is asked: a browser keeps the answer from the page."""
    client = guarded.web.app.test_client()
    for method, path in (
        ("GET", "/models"),
        ("POST", "/embed"),
        ("OPTIONS", "/embed"),
        ("OPTIONS", "/models/register"),
    ):
        headers = {"Origin": "http://elsewhere", "Access-Control-Request-Method": "POST"}
        answer = client.open(path, method=method, headers=headers, buffered=True)
        assert not [name for name, _ in answer.headers if name.lower().startswith("access-control")]


def test_the_head_of_a_request_is_judged_as_the_whole(guarded: Guarded, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same keys; where none is asked for, it is not even looked at."""
    app = guarded.web.app
    with monkeypatch.context() as patch:
        patch.setattr(app, "test_request_context", lambda *_, **__: pytest.fail("looked at"))
        assert refusal(app, "POST", "/embed", {}) is None
    embed, admin = guarded.key(), guarded.key(scopes=("admin",))
    for path, key, status in (
        ("/embed", None, 401), ("/embed", "wrong", 401), ("/embed", embed, None), ("/embed", admin, None),
        ("/models/register", embed, 403), ("/models/register", admin, None), ("/health", None, None),
        ("/nothing", None, None), ("//nothing", "wrong", None),
    ):  # fmt: skip
        refused = refusal(app, "POST", path, {"Authorization": f"Bearer {key}"} if key else {})
        assert (refused[0] if refused else None) == status, path


def test_an_admin_key_for_some_models_is_shown_these_on_the_page(guarded: Guarded) -> None:
    """Neither others that are being registered, nor what the cache of all holds."""
    whole, part = guarded.key(scopes=("admin",)), guarded.key(scopes=("admin",), models=("m",))
    seen = {}
    with guarded.web.pool.prepared(dataclasses.replace(guarded.web.pool.find("new").spec, model="newer"), 20):
        for key in (whole, part):
            seen[key] = guarded.ask("get", "/live", key).json
    assert [one["model"] for one in seen[whole]["candidates"]] == ["newer"]
    assert seen[whole]["cache"]["memory"]
    assert seen[part]["admin"] is True
    assert [one["alias"] for one in seen[part]["models"]] == ["m"]
    assert (seen[part]["candidates"], seen[part]["cache"]) == ([], None)
