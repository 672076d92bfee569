"""Where the parts meet."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from embedpool.config.config_yml import load_settings
from embedpool.errors import ModelNotFound
from embedpool.server import EmbedpoolApp, make_cache
from embedpool.tasks.item import Item
from tests.conftest import fake_pool_yml, settle


def test_what_a_model_may_not_reach_is_not_even_looked_at(tmp_path: Path) -> None:
    """A pool.yml that names a folder outside the roots: neither weights nor tokenizer are opened."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    config = tmp_path / "config.yml"
    config.write_text("paths: {pool_yml: pool.yml}\nsecurity: {model_roots: [models]}\nhot_reload: {enabled: false}\n")
    driver = {"type": "local_st", "config": {"path": str(elsewhere)}}
    (tmp_path / "pool.yml").write_text(json.dumps({"models": [{"model": "m", "driver": driver}]}))
    app = EmbedpoolApp(load_settings(config, {}))
    app.start()
    try:
        settle(app.pool)
        served = app.pool.find("m")
        assert served.state == "failed"
        assert "model_roots" in (served.replicas.last_error or "")
    finally:
        app.begin_to_stop()
        app.stop()


def test_without_hot_reload_nobody_who_asks_for_a_name_changes_the_pool(tmp_path: Path) -> None:
    """A changed pool.yml waits for POST /reload."""
    config = tmp_path / "config.yml"
    config.write_text("paths: {pool_yml: pool.yml, state_dir: state}\nhot_reload: {enabled: false}\n")
    (tmp_path / "pool.yml").write_text("models: []")
    app = EmbedpoolApp(load_settings(config, {}))
    app.start()
    try:
        (tmp_path / "pool.yml").write_text(fake_pool_yml("model: new"))
        with pytest.raises(ModelNotFound):
            app.pool.find("new")
    finally:
        app.begin_to_stop()
        app.stop()


def test_a_worker_that_another_one_replaces_stays_ready_to_the_end(tmp_path: Path) -> None:
    """Whoever asks it by then asks about the server. A server that stops is not ready."""
    config = tmp_path / "config.yml"
    config.write_text("paths: {pool_yml: pool.yml, state_dir: state}\nhot_reload: {enabled: false}\n")
    (tmp_path / "pool.yml").write_text(fake_pool_yml("model: m"))
    app = EmbedpoolApp(load_settings(config, {}))
    app.start()
    try:
        settle(app.pool)
        app.begin_to_stop(replaced=True)
        assert app.flask.test_client().get("/ready").status_code == 200
        app.begin_to_stop()
        assert app.flask.test_client().get("/ready").status_code == 503
    finally:
        app.stop()


def test_a_start_tells_of_a_variable_that_is_nearly_a_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Otherwise it would be ignored without a word."""
    config = tmp_path / "config.yml"
    config.write_text("paths: {pool_yml: pool.yml, state_dir: state}\nhot_reload: {enabled: false}\n")
    monkeypatch.setenv("EMBEDPOOL_SERVER_PORT", "1")
    EmbedpoolApp(load_settings(config, {}))
    assert "EMBEDPOOL_SERVER_PORT is none of embedpool's; did you mean EMBEDPOOL_SERVER__PORT?" in caplog.text


@pytest.mark.parametrize(
    ("says", "is_on", "layers", "is_shared"),
    [
        ("{}", True, (32 << 20, None), False),
        ("{memory_mb: 1, disk_mb: 8, share: all}", True, (1 << 20, 8 << 20), True),
        ("{memory_mb: 0}", False, (0, None), False),
        ("{enabled: false, disk_mb: 8}", False, (0, None), False),
    ],
)
def test_the_cache_is_as_the_settings_say(
    tmp_path: Path, says: str, is_on: bool, layers: tuple[int, int | None], is_shared: bool
) -> None:
    """Its file is below paths.cache_dir, and there is none where the disk is not used."""
    config = tmp_path / "config.yml"
    config.write_text(f"paths: {{cache_dir: kept, state_dir: state}}\ncache: {says}\n")
    cache = make_cache(load_settings(config, {}))
    try:
        state = cache.state()
        assert cache.is_on == is_on
        assert (state["memory"]["max_bytes"], state["disk"] and state["disk"]["max_bytes"]) == layers
        item = Item(("a",), 1, key=b"k")
        assert (cache.key(b"s", "one", item) == cache.key(b"s", "other", item)) == is_shared
        assert (tmp_path / "kept" / "rows").exists() == (layers[1] is not None)
    finally:
        cache.close()
