"""Models on a Ray cluster of several nodes, all on this machine: what each failure does, and who is blamed."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from embedpool.config.settings import Ray
from embedpool.config.spec import DriverSpec, FakeConfig, ModelSpec, PoolSpec, Resources, Scaling
from embedpool.drivers import make_driver
from embedpool.errors import ModelFailed
from embedpool.places import open_place
from embedpool.places.ray_place import Host
from embedpool.pool.pool import Pool
from embedpool.pool.settings import PoolSettings
from embedpool.tasks.driver import Folders, Place, Progress
from tests.conftest import ask, open_fake, open_fake_tokenizer, run, settle, wait_until
from tests.places import ray_nodes
from tests.places.ray_nodes import Nodes

pytestmark = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs ray")

TEXTS = [f"text {i}" for i in range(8)]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Nodes]:
    """Of a head without CPUs and one node with two; tests add nodes of their own, named after them."""
    with ray_nodes.running() as found:
        found.add("first", num_cpus=2)
        yield found


@pytest.fixture
def opened(cluster: Nodes, tmp_path: Path) -> Iterator[Callable[..., Place]]:
    places: list[Place] = []

    def open_one(report: Any = None, resources: Resources | None = None, **config: Any) -> Place:
        spec = spec_of(resources or Resources(), **config)
        places.append(open_on(cluster.address, tmp_path, spec, report=report or (lambda progress: None)))
        return places[-1]

    yield open_one
    for place in places:
        place.close()


def spec_of(resources: Resources, *, scaling: Scaling | None = None, **config: Any) -> ModelSpec:
    driver = DriverSpec("fake", FakeConfig(**{"dim": 8, "normalize": False, **config}))
    return ModelSpec("org/m", driver, place="ray", resources=resources, scaling=scaling or Scaling())


def open_on(address: str, folder: Path, spec: ModelSpec, memory: Any = None, report: Any = None, **more: Any) -> Place:
    make = functools.partial(make_driver, spec, Folders(folder / "cache", folder / "state"), {})
    return open_place(spec, make, report=report, ray=Ray(address=address, wait_for_room_s=5), state_dir=folder, **more)


def test_its_vectors_are_those_of_a_thread(opened: Callable[..., Place]) -> None:
    """Small answers and those that go through Ray's object store; /status tells where it runs."""
    for dim in (8, 4096):
        place = opened(dim=dim)
        here = open_fake(ModelSpec("org/m", DriverSpec("fake", FakeConfig(dim=dim))))
        np.testing.assert_array_equal(run(place, TEXTS).rows.values, run(here, TEXTS).rows.values)
        assert place.facts.space == here.facts.space
        place.probe()
        assert (place.facts.description["place"], place.facts.description["resources"]) == ("ray", {"num_cpus": 1})
        assert place.facts.description["node"]
        place.close()


def test_a_load_that_fails_says_why(opened: Callable[..., Place]) -> None:
    """Whatever the reason is: the model's own, other versions, or that the cluster is not there."""
    with pytest.raises(Exception, match="fault: load"):
        opened(fault="load")
    found = Host(lambda: pytest.fail("it is not opened"), 1).open("0.0.1")
    assert isinstance(found, ModelFailed)
    assert "and the server 0.0.1" in found.message


def test_no_room_is_told_and_a_node_that_joins_brings_some(cluster: Nodes, opened: Callable[..., Place]) -> None:
    """The sentence says what is missing; the next try succeeds by itself."""
    wanted = Resources(num_cpus=1, custom={"fast": 1})
    told: list[Progress] = []
    with pytest.raises(ModelFailed, match="no room for it: it needs 1 fast, and there are 0 fast free"):
        opened(told.append, wanted)
    assert any("waits for room" in progress.step for progress in told)
    cluster.add("fast", num_cpus=1, resources={"fast": 1})
    assert len(run(opened(resources=wanted), TEXTS).rows) == len(TEXTS)


def test_an_actor_that_dies_alone_may_be_a_texts_fault(opened: Callable[..., Place]) -> None:
    """As a child that crashes is: the pool looks for the text."""
    place = opened(fault="crash", fault_text="bad")
    with pytest.raises(ChildProcessError):
        run(place, ["good", "bad"])
    assert place.lost is not None
    assert not place.lost.innocent
    assert "its actor died" in place.lost.reason


def test_a_batch_that_hangs_ends_the_actor(opened: Callable[..., Place]) -> None:
    """After batch_timeout_s; that is not innocent either."""
    place = opened(fault="hang", fault_text="bad", batch_timeout_s=0.5)
    with pytest.raises(ChildProcessError, match="a batch took more than"):
        run(place, ["bad"])
    assert place.lost is not None
    assert not place.lost.innocent


def test_a_node_that_goes_is_nobodys_fault(cluster: Nodes, opened: Callable[..., Place]) -> None:
    """The batch that ran there is run again elsewhere, and counts against no text."""
    cluster.add("gone", num_cpus=1, resources={"here": 1})
    place = opened(resources=Resources(num_cpus=0.5, custom={"here": 1}), delay_ms=60_000)
    with ThreadPoolExecutor(1) as thread:
        asked = thread.submit(run, place, TEXTS)
        cluster.remove("gone")
        assert isinstance(asked.exception(), ChildProcessError)
    assert place.lost is not None
    assert place.lost.innocent, place.lost


@pytest.mark.long
def test_a_child_whose_cluster_is_gone_ends_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process that serves goes on; the loss is nobody's fault."""
    for name, value in ray_nodes.QUICK.items():
        monkeypatch.setenv(name, value)
    with ray_nodes.running(head_cpus=1) as alone:
        place = open_on(alone.address, tmp_path, spec_of(Resources()), report=lambda progress: None)
        lost = threading.Event()
        place.watch(lost.set)
        alone.end_the_head()
        with contextlib.suppress(ChildProcessError):
            run(place, TEXTS)
        assert lost.wait(60)
        assert place.lost is not None
        assert place.lost.innocent
        place.close()


def test_a_node_is_killed_and_another_added_under_load(cluster: Nodes, tmp_path: Path) -> None:
    """A thousand requests of sixteen callers: a thousand answers, no text condemned, and it serves on."""
    cluster.add("dies", num_cpus=1, resources={"work": 2})
    settings = PoolSettings(
        functools.partial(open_on, cluster.address, tmp_path), open_fake_tokenizer, request_timeout_s=60
    )
    pool = Pool(settings)
    spec = spec_of(Resources(num_cpus=0.5, custom={"work": 1}), scaling=Scaling(min=2, max=2), delay_ms=3)
    here = open_fake(ModelSpec("org/m", DriverSpec("fake", FakeConfig(dim=8))))
    try:
        pool.apply(PoolSpec((spec,)))
        settle(pool)
        done = iter(range(10_000))

        def one(number: int) -> None:
            texts = [f"request {number} text {i}" for i in range(3)]
            np.testing.assert_allclose(ask(pool, "org/m", *texts).vectors, run(here, texts).rows.values, atol=1e-6)
            next(done)

        with ThreadPoolExecutor(16) as callers:
            asked = [callers.submit(one, number) for number in range(1000)]
            wait_until(lambda: sum(one.done() for one in asked) > 200)
            cluster.remove("dies")
            cluster.add("joins", num_cpus=1, resources={"work": 2})
            for request in asked:
                request.result()
        assert pool.find("org/m").state == "ready"
    finally:
        pool.stop()


def test_an_actor_goes_with_its_place(opened: Callable[..., Place]) -> None:
    """It is nobody's any more, and its node's memory is free."""
    place = opened()
    before = {process.pid for process in actors()}
    assert before
    place.close()
    wait_until(lambda: not any(psutil.pid_exists(pid) for pid in before))


def actors() -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.name().startswith("ray::Host"):
                found.append(process)
    return found
