"""Where the parts meet."""

from __future__ import annotations

import json
from pathlib import Path

from embedpool.config.settings import load_settings
from embedpool.server import EmbedpoolApp
from tests.conftest import settle


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
