"""`embedpool.Embedder`: columns of data in the process that asks. tests/live/test_ray.py has it with Ray Data."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import embedpool
from embedpool.config.spec import DriverSpec, FakeConfig, ModelSpec
from embedpool.errors import EmbedpoolError, ModelNotFound
from embedpool.places.process import ProcessPlace
from tests.conftest import fake_pool_yml, open_fake, run

MODEL = "model: m, alias: a, driver: {type: fake, config: {dim: 8, fault: raise, fault_text: bad}}"


@pytest.fixture
def config(tmp_path: Path) -> str:
    """Of a pool with one model."""
    (tmp_path / "config.yml").write_text("paths: {pool_yml: pool.yml, state_dir: state, cache_dir: cache}\n")
    (tmp_path / "pool.yml").write_text(fake_pool_yml(MODEL))
    return str(tmp_path / "config.yml")


def test_a_column_gets_its_vectors(config: str) -> None:
    """Those of a server, with its options; the other columns stay."""
    here = open_fake(ModelSpec("m", DriverSpec("fake", FakeConfig(dim=8))))
    embedder = embedpool.Embedder("a", column="body", into="v", config=config, normalize=False)
    try:
        found = embedder({"id": np.array([7, 8]), "body": np.array(["one", "two words"], dtype=object)})
        np.testing.assert_allclose(found["v"], run(here, ["one", "two words"]).rows.values, atol=1e-6)
        assert found["id"].tolist() == [7, 8]
        with pytest.raises(EmbedpoolError, match="body 'bad': inference_failed"):
            embedder({"body": ["good", "bad"]})
    finally:
        embedder.close()


@pytest.mark.parametrize("place", ["place: process", "place: ray, resources: {num_cpus: 2}"])
def test_it_runs_where_it_is_made(config: str, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a worker of Ray Data an actor of its own would wait for CPUs that the worker has, and a child would use more
    cores than the worker was given."""
    pool = Path(config).with_name("pool.yml")
    pool.write_text(fake_pool_yml(f"{MODEL}, {place}"))
    monkeypatch.setattr(ProcessPlace, "__init__", lambda *given: pytest.fail("it is no place of its own"))
    embedder = embedpool.Embedder("a", column="body", config=config)
    try:
        assert embedder({"body": ["one"]})["vector"].shape == (1, 8)
    finally:
        embedder.close()


def test_a_model_that_is_none(config: str) -> None:
    """It is told when it is made, not at the first batch."""
    with pytest.raises(ModelNotFound):
        embedpool.Embedder("nobody", config=config)
