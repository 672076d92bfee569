"""What is made of Ray's errors: which sentence, and whose fault. The errors are Ray's own; no cluster runs."""

from __future__ import annotations

import itertools
import logging
import os
import pickle
import re
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from embedpool import __version__
from embedpool.config.settings import Ray
from embedpool.config.spec import DriverSpec, FakeConfig, ModelSpec, Resources
from embedpool.errors import ModelFailed
from embedpool.places import ray_place
from embedpool.places.ray_host import Host
from embedpool.places.ray_place import UNAVAILABLE_S, RayDriver, RayPlace, what_ray_says
from embedpool.tasks.driver import Driver, Loss, Lost, NoRoom
from embedpool.tasks.item import Batch

ray = pytest.importorskip("ray")

from ray._private.utils import check_version_info  # noqa: E402
from ray.core.generated.common_pb2 import ActorDiedErrorContext, NodeDeathInfo  # noqa: E402
from ray.exceptions import (  # noqa: E402
    ActorDiedError,
    ActorUnavailableError,
    LocalRayletDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayTaskError,
)

BATCH = Batch("embed", [])
TRACEBACK = """Traceback (most recent call last):
  File "/node/site-packages/embedpool/places/ray_host.py", line 7, in __init__
    import embedpool
    ^^^^^^^^^^^^^^^^
ModuleNotFoundError: No module named 'embedpool'
"""
NODE = {"NodeID": "n1", "Alive": True, "NodeManagerAddress": "10.0.0.5", "NodeManagerPort": 7, "Resources": {"CPU": 2}}


def died(says: str = "Worker exit type: SYSTEM_ERROR", *, preempted: bool = False) -> ActorDiedError:
    """Of an actor that had been started."""
    found = ActorDiedErrorContext(
        error_message=says, class_name="Host", pid=7, node_ip_address="10.0.0.5", actor_id=b"\0" * 16
    )
    if preempted:
        found.node_death_info.reason = NodeDeathInfo.AUTOSCALER_DRAIN_PREEMPTED
    return ActorDiedError(found)


def unavailable() -> ActorUnavailableError:
    return ActorUnavailableError("RpcError: Socket closed", b"\0" * 16)


def lost_object() -> ObjectLostError:
    return ObjectLostError("00ff", b"", "")


def not_created() -> ActorDiedError:
    """Of an actor whose creation raised on the node."""
    task = RayTaskError("Host.__init__", TRACEBACK, None, "ray::Host.__init__", 7, "10.0.0.5", "repr", "00ff")
    return ActorDiedError(task)


def of_another_version() -> RuntimeError:
    with pytest.raises(RuntimeError) as found:
        check_version_info({"ray_version": "2.54.0", "python_version": "3.11.1"}, "10.0.0.9")
    return found.value


# --- the sentence


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (not_created, "^ModuleNotFoundError: No module named 'embedpool'$"),
        (died, "^Worker exit type: SYSTEM_ERROR$"),
        (of_another_version, r"^Version mismatch: .*with: Ray: 2\.54\.0 Python: 3\.11\.1 This process on 10\.0\.0\.9 "),
        (unavailable, "is unavailable: RpcError: Socket closed"),
        (lambda: RuntimeError(""), "^RuntimeError$"),
    ],
    ids=["creation", "death", "versions", "unavailable", "nothing"],
)
def test_the_reason_is_said(error: Callable[[], Exception], says: str) -> None:
    """Not the lines around it, with which Ray's errors begin and end."""
    assert re.search(says, what_ray_says(error()))


class Cluster:
    """Ray's module and the actor, in one: each call gives, or raises, the next of the answers."""

    exceptions = ray.exceptions
    __version__ = ray.__version__

    def __init__(self, *answers: Any, alive: bool = True) -> None:
        self.answers = iter(answers)
        self.calls: list[str] = []
        self.now = 0.0
        self.alive = alive
        self.free = {"CPU": 2.0}
        self.util = SimpleNamespace(get_node_ip_address=lambda: "10.0.0.5")

    def __getattr__(self, method: str) -> Any:
        return SimpleNamespace(remote=lambda *arguments: self.calls.append(method))

    def get(self, reference: object) -> Any:
        answer = next(self.answers)
        if callable(answer):
            answer = answer()
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def nodes(self) -> list[dict[str, Any]]:
        return [{**NODE, "Alive": self.alive}]

    def available_resources(self) -> dict[str, float]:
        return self.free

    def wait(self, references: list[Any], timeout: float) -> tuple[list[Any], list[Any]]:
        self.now += timeout
        return [], references

    def kill(self, actor: object) -> None:
        self.calls.append("killed")

    def pass_by(self, seconds: float) -> None:
        self.now += seconds

    def driver(self, settings: Ray | None = None, resources: Resources | None = None) -> RayDriver:
        spec = ModelSpec("org/m", DriverSpec("fake", FakeConfig()), place="ray", resources=resources or Resources())
        made = RayDriver(
            spec, lambda: pytest.fail("it is made elsewhere"), settings or Ray(), Path(), clock=lambda: self.now,
            sleep=self.pass_by,
        )  # fmt: skip
        made._ray = made._actor = self
        made._node, made._free_before = NODE["NodeID"], dict(self.free)
        return made

    def loss(self) -> Loss:
        with pytest.raises(Lost) as found:
            self.driver()._ask(BATCH)
        return found.value.loss


@pytest.fixture(autouse=True)
def reachable(monkeypatch: pytest.MonkeyPatch) -> dict[str, bool]:
    """Whether the node's port and the head's take connections; they do."""
    found = {"10.0.0.5": True, "10.0.0.9": True}

    def connect(address: tuple[str, int], timeout: float) -> socket.socket:
        if not found[address[0]]:
            raise TimeoutError
        return socket.socket()

    monkeypatch.setattr(ray_place.socket, "create_connection", connect)
    return found


# --- whose fault


def test_an_actor_that_dies_while_its_node_lives_may_be_a_texts_fault() -> None:
    """A crash, and memory that the node has not."""
    for error in (died("killed by SIGSEGV"), OutOfMemoryError("killed by SIGSEGV")):
        assert Cluster(error).loss() == Loss("its actor died: killed by SIGSEGV")


def test_an_actor_that_dies_with_its_node_is_nobodys_fault(reachable: dict[str, bool]) -> None:
    """Whether the cluster knows that already, or the node just answers no more."""
    assert Cluster(died(), alive=False).loss().innocent
    reachable["10.0.0.5"] = False
    found = Cluster(died()).loss()
    assert (found.innocent, found.announced) == (True, False)
    assert found.reason.startswith("its node is gone: ")


def test_a_node_that_is_taken_back_was_announced() -> None:
    """No text can be why, however often it happens."""
    found = Cluster(died(preempted=True)).loss()
    assert found.announced
    assert found.innocent


def test_what_could_not_be_reached_is_asked_again() -> None:
    """The same call, after a hiccup of the network and after an answer was lost."""
    cluster = Cluster(unavailable(), lost_object(), "the answer")
    assert cluster.driver()._ask(BATCH) == "the answer"
    assert cluster.calls == ["run"] * 3


def test_the_time_that_a_batch_has_run_does_not_count() -> None:
    """One that has run for minutes when its actor cannot be reached is asked for again for as long as any other."""
    cluster = Cluster(lambda: (cluster.pass_by(10 * UNAVAILABLE_S), unavailable())[1], "the answer")
    assert cluster.driver()._ask(BATCH) == "the answer"


def test_an_actor_that_stays_out_of_reach_is_nobodys_fault() -> None:
    """After ten seconds of asking."""
    cluster = Cluster(*itertools.repeat(unavailable(), 1000))
    loss = cluster.loss()
    assert loss.innocent
    assert "cannot be reached: " in loss.reason
    assert cluster.now == UNAVAILABLE_S


def test_a_cluster_that_fails_is_nobodys_fault() -> None:
    """Its own process here has ended, say."""
    assert Cluster(LocalRayletDiedError()).loss().innocent


def test_an_error_of_the_actor_itself_is_the_batchs() -> None:
    """It lives on, and the batch is bisected."""
    cluster = Cluster(RayTaskError("Host.run", "  x\nTypeError: no", None, "ray::Host.run", 7, "10.0.0.5"), died())
    driver = cluster.driver()
    with pytest.raises(RuntimeError, match="TypeError: no"):
        driver._ask(BATCH)
    assert not driver._asking


def test_an_idle_actor_that_dies_is_told_at_once() -> None:
    """Nobody need ask for that; and no text can be why."""
    told: list[str] = []
    cluster = Cluster(died("the actor has crashed"))
    driver = cluster.driver()
    driver._on_lost = told.append
    driver.watch()
    assert told == ["its actor ended while it was idle: the actor has crashed"]
    assert (cluster.calls, cluster.now) == (["stay"], 0)


def test_an_actor_that_dies_in_a_batch_is_told_by_the_batch() -> None:
    """Else the watching thread might say first that nobody is at fault."""
    told: list[str] = []
    cluster = Cluster(died(), died())
    driver = cluster.driver()
    driver._on_lost = told.append
    with pytest.raises(Lost):
        driver._ask(BATCH)
    driver.watch()
    assert told == []


# --- a batch that takes too long


@pytest.fixture
def place() -> RayPlace:
    """As far as it is asked here."""
    made = object.__new__(RayPlace)
    made._opening_since = None
    made._closing = SimpleNamespace(is_set=lambda: False)  # type: ignore[assignment]
    made.facts = SimpleNamespace(description={"raylet": "10.0.0.5:7"})  # type: ignore[assignment]
    return made


def test_a_batch_that_hangs_may_be_a_texts_fault(place: RayPlace) -> None:
    """Its node answers, so it is the batch that does not."""
    assert not place._loss("was ended").innocent


def test_a_batch_on_a_node_that_has_vanished_is_nobodys_fault(place: RayPlace, reachable: dict[str, bool]) -> None:
    """Ray may notice it a minute later; the texts are not suspected meanwhile."""
    reachable["10.0.0.5"] = False
    loss = place._loss("was ended")
    assert loss.innocent
    assert loss.reason == "its process was ended, and its node cannot be reached"


# --- what cannot be opened


def test_versions_are_compared_before_anything_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another version on the node may not have what the server's pickle names; the message says which node it is."""
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "10.0.0.5")
    found = Host(1).open("0.0.1", b"of another version")
    assert isinstance(found, ModelFailed)
    assert found.message == f"on the node 10.0.0.5: embedpool {__version__} is installed, and the server has 0.0.1"
    unread = Host(1).open(__version__, b"of another version")
    assert isinstance(unread, ModelFailed)
    assert unread.message.startswith("on the node 10.0.0.5: UnpicklingError: ")


def test_a_model_that_is_not_on_the_node(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reason is the driver's own."""
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "10.0.0.5")
    found = Host(1).open(__version__, pickle.dumps(NoFolder))
    assert isinstance(found, ModelFailed)
    assert found.message == "on the node 10.0.0.5: /models/m is no folder"


class NoFolder(Driver):
    def open(self, on_lost: Any) -> Any:
        raise ModelFailed("/models/m is no folder")

    def run(self, batch: Any) -> Any:
        raise AssertionError

    probe = run


def test_no_room_says_what_is_missing() -> None:
    """And is tried again soon; the actor that waited is given up."""
    cluster = Cluster()
    driver = cluster.driver(Ray(wait_for_room_s=5), Resources(num_cpus=4, custom={"fast": 1}))
    with pytest.raises(NoRoom) as found:
        driver._opened()
    assert found.value.message == (
        "the Ray cluster has no room for it: it needs 4 CPU, and there are 2 CPU free in all, 2 CPU on the largest "
        "node; it needs 1 fast, and there are 0 fast free in all, 0 fast on the largest node"
    )
    assert cluster.calls[-1] == "killed"


def test_an_actor_that_is_slow_to_start_is_not_without_room() -> None:
    """The cluster gives it its CPUs first and starts it then, so it has fewer than it is asked for by then."""
    cluster = Cluster()
    driver = cluster.driver(Ray(wait_for_room_s=5), Resources(num_cpus=2))
    cluster.free = {"CPU": 0.0}
    with pytest.raises(NoRoom, match="has not started it within 5 s, although it had room: it needs 2 CPU"):
        driver._opened()


# --- joining


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Join a cluster; Ray itself then sets what is given in this process's environment."""

    def join(version: str = "2.54.0", error: Exception | None = None, **environment: str) -> None:
        def init(**arguments: Any) -> None:
            if error:
                raise error
            for name, value in environment.items():
                monkeypatch.setitem(os.environ, name, value)

        driver = Cluster().driver()
        driver._ray = SimpleNamespace(init=init, __version__=version)
        driver._connect("10.0.0.9:6379")

    monkeypatch.setattr(signal, "signal", lambda number, handler: None)
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    return join


def test_a_cluster_without_a_token_is_joined_with_a_warning(
    joined: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    """One with a token without: also where Ray finds the token by itself, in a file."""
    with caplog.at_level(logging.WARNING):
        joined(RAY_AUTH_MODE="token")
        assert not caplog.records
        joined(RAY_AUTH_MODE="disabled")
    assert "10.0.0.9:6379 asks for no token" in caplog.text


def test_why_a_cluster_cannot_be_joined(joined: Callable[..., None], reachable: dict[str, bool]) -> None:
    """Other versions there, with both; a Ray here that is too old; and nobody there, for which Ray itself is not asked:
    it would take a minute, and then end the process that asks."""
    with pytest.raises(ModelFailed, match=r"10\.0\.0\.9:6379 cannot be joined: .*Ray: 2\.54\.0 Python: 3\.11\.1"):
        joined(error=of_another_version())
    for version in ("2.53.1", "1.99.0"):
        with pytest.raises(ModelFailed, match=f"wants Ray 2.54 or a newer one, and {version} is installed"):
            joined(version)
    reachable["10.0.0.9"] = False
    with pytest.raises(ModelFailed, match="cannot be joined: nothing answers at this address"):
        joined(error=AssertionError("Ray was asked"))
