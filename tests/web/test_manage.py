"""The management endpoints, and who is kept out of them."""

from __future__ import annotations

from typing import Any

import pytest

from embedpool.config import edit, pool_yml
from embedpool.config.settings import Security, Server, Settings
from embedpool.config.spec import PoolSpec
from tests.conftest import settle
from tests.web.conftest import MODEL, NAME, Gate, MakeWeb, Web, refused

NEW = {"model": "org/new", "driver_type": "fake", "driver_config": {"dim": 8}}
BROKEN = {**NEW, "driver_config": {"fault": "load"}}
POSTS: dict[str, Any] = {
    "/models/register": NEW,
    "/models/alias": {"model": "m", "alias": "n"},
    "/models/enable": {"model": "m", "enabled": False},
    "/reload": {"reason": "test"},
}


def names_in_file(web: Web) -> list[str]:
    return pool_yml.parse(web.pool_yml.read_text()).names


# --- register


def test_register_serves_the_model_and_writes_it(web: Web) -> None:
    """A registration answers 200 when the model is ready: it is served at once and stands in pool.yml."""
    answer = web.post("/models/register", {**NEW, "alias": "new"})
    assert answer.status_code == 200, answer.text
    assert (answer.json["ok"], answer.json["model"], answer.json["state"]) == (True, "org/new", "ready")
    assert web.vectors("a", model="new").shape == (1, 8)
    assert names_in_file(web) == [NAME, "m", "org/new", "new"]


@pytest.mark.parametrize(
    ("path", "body", "model"),
    [
        ("/models/register", NEW, "org/new"),
        ("/models/alias", {"model": "m", "alias": "n"}, NAME),
        ("/models/enable", {"model": "m", "enabled": False}, NAME),
        ("/models/enable", {"model": "m", "enabled": True}, NAME),
    ],
)
def test_what_was_done_is_a_success_also_if_another_removes_the_model_at_once(
    web: Web, monkeypatch: pytest.MonkeyPatch, path: str, body: dict[str, Any], model: str
) -> None:
    """The answer says what was asked of the server, not that there is no such model: that would deny the change."""
    follow = web.reconciler.reload

    def remove_and_follow(reason: str) -> PoolSpec:
        web.reconciler.pool_file.edit(lambda pool: edit.unregister(pool, model))
        return follow(reason)

    monkeypatch.setattr(web.reconciler, "reload", remove_and_follow)
    answer = web.post(path, body)
    assert (answer.status_code, answer.json) == (200, {"ok": True, "model": model, "removed": True})


def test_every_field_of_a_registration_reaches_the_model(web: Web) -> None:
    """All fields of the contract can be given, and are shown afterwards."""
    given = {
        **NEW,
        "alias": "new",
        "enabled": True,
        "min": 2,
        "max": 3,
        "idle_ttl_s": 7,
        "queue_max_size": 11,
        "max_inflight_per_replica": 2,
    }
    assert web.post("/models/register", given).status_code == 200
    spec = web.get("/models/new").json["spec"]
    assert (spec["model"], spec["alias"], spec["enabled"]) == ("org/new", "new", True)
    assert spec["driver"]["type"] == "fake"
    assert spec["driver"]["config"]["dim"] == 8
    assert spec["scaling"] == {"min": 2, "max": 3, "idle_ttl_s": 7}
    assert spec["queue"] == {"max_size": 11, "max_inflight_per_replica": 2}


def test_null_fields_of_a_registration_are_absent(web: Web) -> None:
    """null means absent, here too."""
    nulls = dict.fromkeys(("alias", "enabled", "min", "max", "idle_ttl_s", "queue_max_size"))
    assert web.post("/models/register", {**NEW, **nulls}).status_code == 200
    assert web.get("/models/org/new").json["spec"]["enabled"] is True


def test_register_without_waiting(make_web: MakeWeb, gate: Gate) -> None:
    """With wait=false a registration answers 202 at once, while the model loads."""
    web = make_web(open_place=gate.load)
    answer = web.post("/models/register?wait=false", NEW)
    assert (answer.status_code, answer.json["state"]) == (202, "loading")
    assert names_in_file(web) == ["org/new"]
    gate.opened.set()
    settle(web.pool)
    assert web.get("/ready/org/new").status_code == 200


def test_registering_the_same_again_is_a_success(web: Web) -> None:
    """Registering the same thing twice changes nothing and succeeds."""
    web.post("/models/register", NEW)
    before = web.pool_yml.read_text()
    assert web.post("/models/register", NEW).status_code == 200
    assert web.pool_yml.read_text() == before


def test_a_different_spec_needs_replace(web: Web) -> None:
    """A known name with another spec is refused and goes on as it was, unless replacing is asked for."""
    web.post("/models/register", NEW)
    other = {**NEW, "driver_config": {"dim": 4}}
    refused(web.post("/models/register", other), 409, "model_exists_differently")
    assert web.vectors("a", model="org/new").shape == (1, 8)
    assert web.post("/models/register?replace=true", other).status_code == 200
    assert web.vectors("a", model="org/new").shape == (1, 4)


def test_a_model_that_does_not_load_is_not_registered(web: Web) -> None:
    """A registration that fails says why and leaves the pool and pool.yml as they were."""
    before = web.pool_yml.read_text()
    assert "fault: load" in refused(web.post("/models/register", BROKEN), 503, "model_failed")["message"]
    assert web.pool_yml.read_text() == before
    refused(web.get("/models/org/new"), 404, "model_not_found")


def test_a_replacement_that_does_not_load_leaves_the_old_model(web: Web) -> None:
    """A failed replacement disturbs nobody."""
    web.post("/models/register", NEW)
    refused(web.post("/models/register?replace=true", BROKEN), 503, "model_failed")
    assert web.vectors("a", model="org/new").shape == (1, 8)


def test_a_model_of_min_0_proves_itself_when_registered(web: Web) -> None:
    """Even a model that is loaded on demand is loaded once when it is registered."""
    refused(web.post("/models/register", {**BROKEN, "min": 0}), 503, "model_failed")
    assert web.post("/models/register", {**NEW, "min": 0}).status_code == 200


def test_registering_a_failed_model_again_does_not_claim_success(web: Web) -> None:
    """200 means ready: the same registration of a model that failed to load answers with the failure."""
    web.post("/models/register?wait=false", BROKEN)
    settle(web.pool)
    refused(web.post("/models/register", BROKEN), 503, "model_failed")


def test_registering_a_loading_model_again_waits_for_it(web: Web) -> None:
    """200 means ready, also when an earlier registration that did not wait is still loading the model."""
    slow = {**NEW, "driver_config": {"load_delay_ms": 300}}
    web.post("/models/register?wait=false", slow)
    answer = web.post("/models/register", slow)
    assert (answer.status_code, answer.json["state"]) == (200, "ready")


@pytest.mark.parametrize(
    ("changes", "paths"),
    [
        ({"model": None}, ["model"]),
        ({"model": "no spaces"}, ["model"]),
        ({"model": 5}, ["model"]),
        ({"alias": "-x"}, ["alias"]),
        ({"driver_type": None}, ["driver_type"]),
        ({"driver_type": "nope"}, ["driver_type"]),
        ({"driver_type": "http", "driver_config": {}}, ["driver_config.base_url"]),
        ({"driver_config": []}, ["driver_config"]),
        ({"driver_config": {"dim": "8", "dimm": 1}}, ["driver_config.dimm"]),
        ({"driver_config": {"dim": "8"}}, ["driver_config.dim"]),
        ({"enabled": "yes"}, ["enabled"]),
        ({"min": -1, "max": "2"}, ["max", "min"]),
        ({"idle_ttl_s": -1}, ["idle_ttl_s"]),
        ({"queue_max_size": 0}, ["queue_max_size"]),
        ({"max_inflight_per_replica": 0}, ["max_inflight_per_replica"]),
        ({"replicas": 1}, ["replicas"]),
    ],
)
def test_a_bad_registration_names_each_field(web: Web, changes: dict[str, Any], paths: list[str]) -> None:
    """Each bad field is named as the caller wrote it, in the flat form of a registration."""
    error = refused(web.post("/models/register", {**NEW, **changes}), 422, "validation_error")
    assert sorted(error["fields"]) == paths
    assert names_in_file(web) == [NAME, "m"]


@pytest.mark.parametrize("query", ["wait=1", "wait=", "replace=yes"])
def test_flags_of_a_registration_are_true_or_false(web: Web, query: str) -> None:
    """A misspelt flag is refused rather than guessed."""
    error = refused(web.post(f"/models/register?{query}", NEW), 422, "validation_error")
    assert list(error["fields"]) == [query.partition("=")[0]]


@pytest.mark.parametrize("value", [True, "yes", 1])
def test_trust_remote_code_cannot_be_set_over_http(web: Web, value: Any) -> None:
    """Only a file on the server's disk may allow a model to bring code."""
    body = {"model": "org/new", "driver_type": "local_st", "driver_config": {"trust_remote_code": value}}
    error = refused(web.post("/models/register", body), 422, "validation_error")
    assert list(error["fields"]) == ["driver_config.trust_remote_code"]
    assert names_in_file(web) == [NAME, "m"]


@pytest.mark.parametrize("config", [{"api_key": "sk-hunter2"}, {"headers": {"X-Key": "sk-hunter2"}}])
def test_a_key_given_in_place_of_its_variable_is_refused_and_not_repeated(web: Web, config: dict[str, Any]) -> None:
    """Keys are named by environment variable; one given literally is neither accepted, nor shown, nor written."""
    body = {"model": "r", "driver_type": "http", "driver_config": {"base_url": "http://127.0.0.1:1", **config}}
    answer = web.post("/models/register", body)
    refused(answer, 422, "validation_error")
    assert "hunter2" not in answer.text + web.get("/status").text + web.pool_yml.read_text()


@pytest.mark.parametrize("changes", [{"alias": "m"}, {"alias": NAME}, {"model": "m"}])
def test_names_and_aliases_are_unique_together(web: Web, changes: dict[str, Any]) -> None:
    """A name or alias that another model has is a conflict."""
    refused(web.post("/models/register", {**NEW, **changes}), 409, "alias_conflict")


# --- alias, enable, unregister


@pytest.mark.parametrize("by", [NAME, "m"])
@pytest.mark.parametrize("cleared", [None, ""])
def test_an_alias_is_set_moved_and_cleared(web: Web, by: str, cleared: str | None) -> None:
    """An alias serves as soon as it is set, no longer when another takes its place; null or "" clears it."""
    answer = web.post("/models/alias", {"model": by, "alias": "n"})
    assert (answer.status_code, answer.json["alias"]) == (200, "n")
    assert web.embed("a", model="n").status_code == 200
    refused(web.embed("a", model="m"), 404, "model_not_found")
    answer = web.post("/models/alias", {"model": "n", "alias": cleared})
    assert (answer.status_code, answer.json["alias"]) == (200, None)
    refused(web.embed("a", model="n"), 404, "model_not_found")
    assert names_in_file(web) == [NAME]


def test_a_bad_alias_is_refused(web: Web) -> None:
    """An alias that is no name, or that another model has, is refused; nothing changes."""
    web.post("/models/register", NEW)
    error = refused(web.post("/models/alias", {"model": "m", "alias": "no spaces"}), 422, "validation_error")
    assert list(error["fields"]) == ["alias"]
    refused(web.post("/models/alias", {"model": "org/new", "alias": "m"}), 409, "alias_conflict")
    refused(web.post("/models/alias", {"model": "nope", "alias": "x"}), 404, "model_not_found")
    assert names_in_file(web) == [NAME, "m", "org/new"]


@pytest.mark.parametrize("by", [NAME, "m"])
def test_a_model_is_switched_off_and_on(web: Web, by: str) -> None:
    """A disabled model refuses with its own code; when it is enabled again the answer comes when it is ready."""
    answer = web.post("/models/enable", {"model": by, "enabled": False})
    assert (answer.status_code, answer.json["state"]) == (200, "disabled")
    refused(web.embed("a"), 403, "model_disabled")
    answer = web.post("/models/enable", {"model": by, "enabled": True})
    assert (answer.status_code, answer.json["state"]) == (200, "ready")
    assert web.embed("a").status_code == 200


def test_a_model_that_cannot_be_enabled_stays_disabled(make_web: MakeWeb) -> None:
    """Enabling a model that does not load says why and leaves it disabled."""
    web = make_web(f"{MODEL}, enabled: false, driver: {{type: fake, config: {{fault: load}}}}")
    before = web.pool_yml.read_text()
    refused(web.post("/models/enable", {"model": "m", "enabled": True}), 503, "model_failed")
    assert web.pool_yml.read_text() == before
    assert web.status("m")["state"] == "disabled"


def test_enabling_a_failed_model_does_not_claim_success(make_web: MakeWeb) -> None:
    """200 means ready: enabling a model that is enabled and failed answers with the failure."""
    web = make_web(f"{MODEL}, driver: {{type: fake, config: {{fault: load}}}}")
    refused(web.post("/models/enable", {"model": "m", "enabled": True}), 503, "model_failed")


@pytest.mark.parametrize(
    ("path", "body", "paths"),
    [
        ("/models/enable", {"model": "m"}, ["enabled"]),
        ("/models/enable", {"model": "m", "enabled": "yes"}, ["enabled"]),
        ("/models/enable", {"enabled": True}, ["model"]),
        ("/models/alias", {"alias": "x"}, ["model"]),
        ("/models/alias", {"model": "m", "alias": 5}, ["alias"]),
        ("/reload", {"reason": 5}, ["reason"]),
        ("/reload", {"why": "x"}, ["why"]),
    ],
)
def test_bad_bodies_name_each_field(web: Web, path: str, body: Any, paths: list[str]) -> None:
    """Management bodies are checked like all others."""
    assert sorted(refused(web.post(path, body), 422, "validation_error")["fields"]) == paths


@pytest.mark.parametrize("by", [NAME, "m"])
def test_a_model_is_removed_by_name_or_alias(web: Web, by: str) -> None:
    """DELETE /models/<name or alias> removes the model, slashes in its name or not."""
    answer = web.delete(f"/models/{by}")
    assert (answer.status_code, answer.json) == (200, {"ok": True, "model": NAME, "removed": True})
    refused(web.embed("a"), 404, "model_not_found")
    assert names_in_file(web) == []
    refused(web.delete(f"/models/{by}"), 404, "model_not_found")


# --- reload


def test_reload_follows_a_hand_edit(web: Web) -> None:
    """/reload makes the pool what pool.yml says and tells its outcome."""
    web.pool_yml.write_text(web.pool_yml.read_text().replace("alias: m", "alias: by-hand"))
    answer = web.post("/reload", {"reason": "edited"})
    assert (answer.status_code, answer.json["ok"]) == (200, True)
    assert answer.json["last_reload"]["reason"] == "edited"
    assert web.get("/status").json["last_reload"] == answer.json["last_reload"]
    assert web.embed("a", model="by-hand").status_code == 200


def test_reload_needs_no_reason(web: Web) -> None:
    """`reason` may be left out."""
    assert web.post("/reload", {}).status_code == 200


@pytest.mark.parametrize("text", ["", "version: 1\n", "models: [", "models: [{model: m}]\n", "models: []\nmodel: x\n"])
def test_a_broken_pool_file_disturbs_nobody(web: Web, text: str) -> None:
    """While pool.yml is broken every change is refused, the pool serves on, and /status shows the fault."""
    web.pool_yml.write_text(text)
    for path, body in POSTS.items():
        refused(web.post(path, body), 409, "pool_file_invalid")
    error = refused(web.delete("/models/m"), 409, "pool_file_invalid")
    assert str(web.pool_yml) in error["message"]
    assert web.embed("a").status_code == 200
    reload = web.get("/status").json["last_reload"]
    assert reload["ok"] is False
    assert str(web.pool_yml) in reload["error"]
    assert web.pool_yml.read_text() == text


# --- the guard

STRANGERS = {
    "foreign host": {"headers": {"Host": "evil.example"}},
    "foreign host with our port": {"headers": {"Host": "evil.example:8876"}},
    "host that looks like ours": {"headers": {"Host": "localhost.evil.example"}},
    "broken host": {"headers": {"Host": "[::1"}},
    "foreign origin": {"headers": {"Origin": "https://evil.example"}},
    "opaque origin": {"headers": {"Origin": "null"}},
    "broken origin": {"headers": {"Origin": "http://["}},
    "forwarded": {"headers": {"Forwarded": "for=10.0.0.1"}},
    "x-forwarded-for": {"headers": {"X-Forwarded-For": "127.0.0.1"}},
    "x-forwarded-host": {"headers": {"X-Forwarded-Host": "localhost"}},
    "x-forwarded-proto": {"headers": {"X-Forwarded-Proto": "https"}},
    "x-real-ip": {"headers": {"X-Real-Ip": "127.0.0.1"}},
    "via": {"headers": {"Via": "1.1 proxy"}},
    "other machine": {"environ_overrides": {"REMOTE_ADDR": "192.168.1.7"}},
    "other machine over IPv6": {"environ_overrides": {"REMOTE_ADDR": "fe80::1%eth0"}},
    "unknown address": {"environ_overrides": {"REMOTE_ADDR": ""}},
}


@pytest.mark.parametrize("stranger", STRANGERS)
def test_strangers_cannot_manage(web: Web, stranger: str) -> None:
    """No web page, proxy or other machine can change the pool."""
    before = web.pool_yml.read_text()
    refused(web.post("/models/register", NEW, **STRANGERS[stranger]), 403, "forbidden")
    refused(web.delete("/models/m", **STRANGERS[stranger]), 403, "forbidden")
    assert web.pool_yml.read_text() == before


@pytest.mark.parametrize("path", POSTS)
def test_every_management_path_is_guarded(web: Web, path: str) -> None:
    """The guard stands before all of them, and so does the content type that no web form can send."""
    refused(web.post(path, POSTS[path], headers={"Origin": "https://evil.example"}), 403, "forbidden")
    refused(web.post(path, data=b"{}", content_type="text/plain"), 415, "unsupported_media_type")
    refused(web.post(path), 415, "unsupported_media_type")


def test_embedding_and_looking_are_open(web: Web) -> None:
    """The guard is for changes only."""
    headers = {"Host": "pool.example", "Origin": "https://page.example", "X-Forwarded-For": "10.0.0.1"}
    assert web.embed("a", headers=headers).status_code == 200
    for path in ("/status", "/models/m", "/metrics"):
        assert web.get(path, headers=headers).status_code == 200


@pytest.mark.parametrize(
    "friend",
    [
        {"headers": {"Host": "127.0.0.1:8876"}},
        {"headers": {"Host": "[::1]:8876"}},
        {"headers": {"Host": "LOCALHOST"}},
        {"headers": {"Origin": "http://localhost:8876", "Host": "localhost:8876"}},
        {"environ_overrides": {"REMOTE_ADDR": "127.0.0.2"}},
        {"environ_overrides": {"REMOTE_ADDR": "::1"}},
        {"environ_overrides": {"REMOTE_ADDR": "::ffff:127.0.0.1"}},
    ],
)
def test_programs_on_this_machine_can_manage(web: Web, friend: dict[str, Any]) -> None:
    """Loopback is let in however it is written."""
    assert web.post("/reload", {}, **friend).status_code == 200


@pytest.mark.parametrize("host", ["pool.internal", "POOL.internal:8876", "10.1.2.3"])
def test_our_own_names_are_known(make_web: MakeWeb, host: str) -> None:
    """`server.host` and `security.allowed_hosts` are names of ours."""
    settings = Settings(server=Server(host="10.1.2.3"), security=Security(allowed_hosts=("Pool.Internal",)))
    web = make_web(MODEL, settings=settings)
    assert web.post("/reload", {}, headers={"Host": host}).status_code == 200
    refused(web.post("/reload", {}, headers={"Host": "other.internal"}), 403, "forbidden")


@pytest.mark.parametrize(
    ("authorization", "status", "code"),
    [(None, 401, "unauthorized"), ("Bearer wrong", 401, "unauthorized"), ("Basic s3cret", 401, "unauthorized"),
     ("Bearer s3cret", 200, None)],
)  # fmt: skip
def test_an_admin_key_opens_management_to_other_machines(
    make_web, monkeypatch: pytest.MonkeyPatch, authorization: str | None, status: int, code: str | None
) -> None:
    """With a key set, who has it may manage from anywhere, and nobody may without it, not even from this machine."""
    monkeypatch.setenv("EMBEDPOOL_SECRET_ADMIN", "s3cret")
    web = make_web("model: m", settings=Settings(security=Security(admin_key_env="EMBEDPOOL_SECRET_ADMIN")))
    headers = {"Authorization": authorization} if authorization else {}
    for address in ("127.0.0.1", "10.0.0.7"):
        answer = web.post("/reload", {}, headers=headers, environ_overrides={"REMOTE_ADDR": address})
        assert answer.status_code == status
        assert code is None or answer.json["error"]["code"] == code
    assert "s3cret" not in answer.text


def test_an_admin_key_that_is_not_set_closes_management(make_web) -> None:
    """A forgotten variable opens nothing."""
    web = make_web("model: m", settings=Settings(security=Security(admin_key_env="EMBEDPOOL_SECRET_NOT_SET")))
    answer = web.post("/reload", {}, headers={"Authorization": "Bearer "})
    assert (answer.status_code, answer.json["error"]["code"]) == (403, "forbidden")


def test_a_model_may_not_reach_everything(web: Web) -> None:
    """What a remote model may be asked for is not what this machine is told as a secret."""
    body = {"model": "r", "driver_type": "http", "driver_config": {"base_url": "http://169.254.169.254/embed"}}
    refused(web.post("/models/register", body), 403, "forbidden")
