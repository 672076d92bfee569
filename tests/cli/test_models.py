"""`embedpool register` where no server runs: it writes pool.yml."""

from __future__ import annotations

from pathlib import Path

import pytest

from embedpool.cli import main
from embedpool.config.pool_yml import PoolFile
from embedpool.config.spec import Resources

REGISTER = ["register", "--model", "m", "--type", "fake", "--place", "ray", "--resources"]


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    assert main(["init"]) == 0
    return tmp_path / ".config"


def test_resources_are_json(config: Path) -> None:
    """What a replica asks a cluster for."""
    assert main([*REGISTER, '{"num_cpus": 2, "custom": {"fast": 1}}']) == 0
    (spec,) = PoolFile(config / "pool.yml").read().models
    assert (spec.place, spec.resources) == ("ray", Resources(2, custom={"fast": 1}))


@pytest.mark.parametrize(
    ("given", "says", "code"),
    [
        ("{num", "--resources must be JSON, not '{num'", 2),
        ('{"cpus": 2}', "resources.cpus: unknown key 'cpus'", 1),
        ('{"num_cpus": 0}', "resources.num_cpus", 1),
    ],
)
def test_odd_ones_are_refused(
    config: Path, capsys: pytest.CaptureFixture[str], given: str, says: str, code: int
) -> None:
    """In a sentence, and nothing is written."""
    assert main([*REGISTER, given]) == code
    assert says in capsys.readouterr().err
    assert PoolFile(config / "pool.yml").read().models == ()
