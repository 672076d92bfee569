"""conf/ shows what the package does."""

from __future__ import annotations

import configparser
import runpy
from pathlib import Path

import pytest

from embedpool.config import pool_yml
from embedpool.config.config_yml import parse_settings
from embedpool.config.sample import sample_config_yml
from embedpool.config.settings import Settings
from embedpool.serve.gunicorn_settings import gunicorn_settings

CONF = Path(__file__).parents[1] / "conf"


def test_the_sample_config_is_what_init_writes() -> None:
    """conf/config.yml and `embedpool init` cannot drift apart, and both give the defaults."""
    text = (CONF / "config.yml").read_text()
    assert text == sample_config_yml()
    assert parse_settings(text, "config.yml", {}) == Settings()


def test_the_sample_pool_is_valid() -> None:
    """conf/pool.yml shows each kind of model."""
    spec = pool_yml.parse((CONF / "pool.yml").read_text())
    assert {m.driver.type for m in spec.models} == {"local_st", "http", "fake"}


def test_the_gunicorn_file_is_the_package_s_own_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`gunicorn -c conf/gunicorn.conf.py` and `pool start` run the same thing."""
    config = tmp_path / "config.yml"
    config.write_text("server: {port: 1234}\n")
    monkeypatch.setenv("EMBEDPOOL_CONFIG", str(config))
    from_file = runpy.run_path(str(CONF / "gunicorn.conf.py"))
    own = gunicorn_settings()
    assert own["bind"] == "127.0.0.1:1234"
    for name, value in own.items():
        if not callable(value):
            assert from_file[name] == value


def test_an_older_copy_of_the_gunicorn_file_still_works() -> None:
    """Copies ask embedpool.server for the settings."""
    from embedpool.server import gunicorn_settings as from_its_old_place

    assert from_its_old_place is gunicorn_settings


def test_the_service_unit_runs_the_documented_command() -> None:
    """The systemd unit starts gunicorn with our config file and waits longer than the drain."""
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read(CONF / "embedpool.service")
    assert unit["Service"]["ExecStart"].endswith("-c conf/gunicorn.conf.py embedpool.server:wsgi()")
    assert int(unit["Service"]["TimeoutStopSec"]) > Settings().server.longest_stop_s


@pytest.mark.parametrize(("name", "text"), [("config.yml", "server: {prt: 1}\n"), ("keys.yml", "keys: [\n")])
def test_a_broken_file_on_reload_keeps_the_last_good_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str
) -> None:
    """gunicorn's master would end on an error while it reads its settings again."""
    config = tmp_path / "config.yml"
    config.write_text("server: {port: 1234}\nsecurity: {keys_file: keys.yml}\n")
    monkeypatch.setenv("EMBEDPOOL_CONFIG", str(config))
    gunicorn_settings()
    (tmp_path / name).write_text(text)
    assert gunicorn_settings()["bind"] == "127.0.0.1:1234"
