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
from embedpool.config.spec import DriverSpec, FakeConfig, LocalStConfig, ModelSpec, PoolSpec, Resources, Scaling
from embedpool.drivers import make_driver
from embedpool.errors import ModelFailed
from embedpool.places import open_place
from embedpool.pool.pool import Pool
from embedpool.pool.settings import PoolSettings
from embedpool.tasks.driver import Folders, Place, Report, unheard
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

    def open_one(resources: Resources | None = None, **config: Any) -> Place:
        places.append(open_on(cluster.address, tmp_path, spec_of(resources or Resources(), **config)))
        return places[-1]

    yield open_one
    for place in places:
        place.close()


@pytest.fixture
def pools(cluster: Nodes, tmp_path: Path) -> Iterator[Callable[..., Pool]]:
    """A pool of one model on the cluster, or on another one."""
    made: list[Pool] = []

    def start(spec: ModelSpec, address: str = cluster.address, wait_for_room_s: float = 5) -> Pool:
        opens = functools.partial(open_on, address, tmp_path, wait_for_room_s=wait_for_room_s)
        made.append(Pool(PoolSettings(opens, open_fake_tokenizer, request_timeout_s=60)))
        made[-1].apply(PoolSpec((spec,)))
        return made[-1]

    yield start
    for pool in made:
        pool.stop()


def spec_of(resources: Resources, *, scaling: Scaling | None = None, **config: Any) -> ModelSpec:
    driver = DriverSpec("fake", FakeConfig(**{"dim": 8, "normalize": False, **config}))
    return ModelSpec("org/m", driver, place="ray", resources=resources, scaling=scaling or Scaling())


def open_on(
    address: str,
    folder: Path,
    spec: ModelSpec,
    memory: Any = None,
    report: Report = unheard,
    *,
    wait_for_room_s: float = 5,
) -> Place:
    make = functools.partial(make_driver, spec, Folders(folder / "cache", folder / "state"), {})
    ray = Ray(address=address, wait_for_room_s=wait_for_room_s)
    return open_place(spec, make, report=report, ray=ray, state_dir=folder)


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


def test_a_load_that_fails_says_why(cluster: Nodes, opened: Callable[..., Place], tmp_path: Path) -> None:
    """The node on which, and the model's own reason."""
    with pytest.raises(ModelFailed, match=r"on the node [\d.]+: RuntimeError: fault: load"):
        opened(fault="load")
    missing = ModelSpec("org/m", DriverSpec("local_st", LocalStConfig(path="/nowhere/m")), place="ray")
    with pytest.raises(ModelFailed, match=r"on the node [\d.]+: .*/nowhere/m"):
        open_on(cluster.address, tmp_path, missing)


def test_a_node_that_joins_brings_room_by_itself(cluster: Nodes, pools: Callable[..., Pool]) -> None:
    """Until then the model's error is a sentence with what is missing; nobody has to ask for it again."""
    pool = pools(spec_of(Resources(num_cpus=1, custom={"fast": 1})), wait_for_room_s=1)
    told: list[str] = []

    def is_failed() -> bool:
        told.append(str(pool.find("org/m").snapshot()["progress"]))
        return pool.find("org/m").state == "failed"

    wait_until(is_failed)
    assert any("waits for room: it needs" in progress for progress in told)
    says = pool.find("org/m").replicas.last_error
    assert "no room for it: it needs 1 fast, and there are 0 fast free" in (says or "")
    cluster.add("fast", num_cpus=1, resources={"fast": 1})
    wait_until(lambda: pool.find("org/m").state == "ready")
    assert len(ask(pool, "org/m", *TEXTS).vectors) == len(TEXTS)


def test_an_actor_that_dies_alone_may_be_a_texts_fault(opened: Callable[..., Place]) -> None:
    """As a child that crashes is: the pool looks for the text."""
    place = opened(fault="crash", fault_text="bad")
    with pytest.raises(ChildProcessError):
        run(place, ["good", "bad"])
    assert place.lost is not None
    assert not place.lost.innocent
    assert "its actor died" in place.lost.reason


def test_a_batch_that_hangs_ends_the_actor(opened: Callable[..., Place]) -> None:
    """After batch_timeout_s; that is not innocent either, since its node answers."""
    place = opened(fault="hang", fault_text="bad", batch_timeout_s=0.5)
    hanging = {process.pid for process in actors()}
    assert hanging
    with pytest.raises(ChildProcessError, match="a batch took more than"):
        run(place, ["bad"])
    assert place.lost is not None
    assert not place.lost.innocent
    wait_until(lambda: not any(psutil.pid_exists(pid) for pid in hanging))


def test_an_idle_actor_that_dies_is_missed_at_once(opened: Callable[..., Place]) -> None:
    """No batch and no probe has to find out; no text can be why."""
    place = opened()
    lost = threading.Event()
    place.watch(lost.set)
    for process in actors():
        process.kill()
    assert lost.wait(60)
    assert place.lost is not None
    assert place.lost.innocent
    assert "its actor ended while it was idle: " in place.lost.reason


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
@pytest.mark.parametrize("what", ["gcs", "raylet"])
def test_a_child_whose_cluster_is_gone_ends_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """The process that serves goes on; the loss is nobody's fault. Either of the head's processes is enough."""
    for name, value in ray_nodes.QUICK.items():
        monkeypatch.setenv(name, value)
    with ray_nodes.running(head_cpus=1) as alone:
        place = open_on(alone.address, tmp_path, spec_of(Resources()))
        lost = threading.Event()
        place.watch(lost.set)
        alone.end(what)
        with contextlib.suppress(ChildProcessError):
            run(place, TEXTS)
        assert lost.wait(60)
        assert place.lost is not None
        assert place.lost.innocent
        place.close()


@pytest.mark.long
def test_a_cluster_that_comes_back_is_joined_again(pools: Callable[..., Pool], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it the model fails with a sentence; with it the model is ready by itself."""
    for name, value in ray_nodes.QUICK.items():
        monkeypatch.setenv(name, value)
    with ray_nodes.running(head_cpus=1) as first:
        pool = pools(spec_of(Resources()), first.address)
        settle(pool)
        before = ask(pool, "org/m", *TEXTS).vectors
        first.end("gcs")
        first.end("raylet")
        wait_until(lambda: pool.find("org/m").state == "failed", 6000)
        assert "cannot be joined: nothing answers" in (pool.find("org/m").replicas.last_error or "")
    with ray_nodes.running(head_cpus=1, port=first.address.rpartition(":")[2]):
        wait_until(lambda: pool.find("org/m").state == "ready", 6000)
        np.testing.assert_array_equal(ask(pool, "org/m", *TEXTS).vectors, before)


def test_a_node_is_killed_and_another_added_under_load(cluster: Nodes, pools: Callable[..., Pool]) -> None:
    """A thousand requests of sixteen callers: a thousand answers, no text condemned, and it serves all the time."""
    for name in ("survives", "dies"):
        cluster.add(name, num_cpus=1, resources={"work": 1})
    wanted = Resources(num_cpus=0.5, custom={"work": 1})
    pool = pools(spec_of(wanted, scaling=Scaling(min=2, max=2), delay_ms=3))
    here = open_fake(ModelSpec("org/m", DriverSpec("fake", FakeConfig(dim=8))))
    settle(pool)
    wait_until(lambda: pool.find("org/m").snapshot()["replicas_idle"] == 2)
    nodes = {one["node"] for one in pool.find("org/m").snapshot()["replicas_on"]}
    assert len(nodes) == 2

    def one(number: int) -> None:
        texts = [f"request {number} text {i}" for i in range(3)]
        np.testing.assert_allclose(ask(pool, "org/m", *texts).vectors, run(here, texts).rows.values, atol=1e-6)

    with ThreadPoolExecutor(16) as callers:
        asked = [callers.submit(one, number) for number in range(1000)]

        def more_are_done(than: int) -> None:
            wait_until(lambda: sum(one.done() for one in asked) > than)

        more_are_done(200)
        cluster.remove("dies")
        more_are_done(sum(one.done() for one in asked) + 200)  # by the one that is left
        cluster.add("joins", num_cpus=1, resources={"work": 1})
        for request in asked:
            request.result()
    wait_until(lambda: pool.find("org/m").snapshot()["replicas_idle"] == 2)
    assert len({one["node"] for one in pool.find("org/m").snapshot()["replicas_on"]} & nodes) == 1


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
