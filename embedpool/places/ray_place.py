"""A driver on a node of a Ray cluster: one actor a replica.

Ray may end the process that is its driver, so the child that a process place has is the driver, never the server.
Queue, batching, back-off and idle times stay where they are: Ray places the actor, and restarts nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import logging
import math
import os
import pickle
import re
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from typing_extensions import override

from embedpool import __version__
from embedpool.config.settings import Ray
from embedpool.config.spec import ModelSpec
from embedpool.errors import ModelFailed
from embedpool.places.process import MB, ProcessPlace
from embedpool.places.ray_cluster import local_cluster
from embedpool.places.ray_host import Host
from embedpool.tasks.driver import Driver, Facts, Loss, Lost, NoRoom, Progress
from embedpool.tasks.item import Batch
from embedpool.tasks.rows import Answer

logger = logging.getLogger(__name__)

OLDEST_RAY = (2, 54)
UNAVAILABLE_S = 10.0  # how long an actor that cannot be reached is asked again
NODE_IS_KNOWN_GONE_S = 5.0  # after its actor has died
ANSWERS_WITHIN_S = 3.0
LOOK_S = 0.5
LONGEST_REASON = 500  # characters


class RayPlace(ProcessPlace):
    """The child of its own runs a RayDriver. What may end that is the cluster, and no item."""

    @override
    def configure(self, config: Any) -> None:
        super().configure(config)
        self._max_rss_mb = None  # the model's memory is that of its node

    @override
    def _where(self) -> dict[str, object]:
        return {"place": "ray", "pid": self._process.pid}

    @override
    def _slot_count(self, spec: ModelSpec) -> int:
        return slots_of(spec)

    @override
    def _is_innocent(self, exit_code: int | None) -> bool:
        return True

    @override
    def _loss(self, ending: str) -> Loss:
        """A batch whose node has vanished takes too long as well, and Ray may notice that a minute later.

        So the node is asked from here, by a connection to Ray's port on it.
        """
        loss = super()._loss(ending)
        if self._opening_since is not None or self._closing.is_set() or _answers(self.facts.description["raylet"]):
            return loss
        return dataclasses.replace(loss, reason=f"{loss.reason}, and its node cannot be reached", innocent=True)


def slots_of(spec: ModelSpec) -> int:
    """Batches at once in an actor."""
    return spec.queue.max_inflight_per_replica or math.ceil(spec.resources.num_cpus)


class RayDriver(Driver):
    """Runs in the child. An actor that dies with its node is nobody's fault; one that dies alone may be a text's."""

    def __init__(
        self,
        spec: ModelSpec,
        make: Callable[[], Driver],
        settings: Ray,
        state_dir: Path,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._spec = spec
        self._make = make
        self._settings = settings
        self._state_dir = state_dir
        self._clock = clock
        self._sleep = sleep
        self._asking: set[int] = set()  # the threads whose batch is in the actor, or was when it died

    @override
    def open(self, on_lost: Callable[[str], None]) -> Facts:
        self._on_lost = on_lost
        if importlib.util.find_spec("ray") is None:
            raise ModelFailed("place: ray wants the extra: pip install 'embedpool[ray]'")
        address = self._settings.address
        if address is None:
            address = local_cluster(self._state_dir, self._settings.object_store_mb)
        import ray  # which reads the environment that a cluster of its own wants

        self._ray: Any = ray
        self._connect(address)
        wanted = self._spec.resources
        host: Any = ray.remote(Host)
        self._free_before = ray.available_resources()
        self._actor = host.options(
            name=f"{self._spec.model}#{uuid.uuid4().hex[:8]}", num_cpus=wanted.num_cpus, num_gpus=wanted.num_gpus,
            memory=wanted.memory_mb and wanted.memory_mb * MB, resources=dict(wanted.custom), max_restarts=0,
            max_task_retries=0, max_concurrency=slots_of(self._spec) + 3, scheduling_strategy="SPREAD",
        ).remote(math.ceil(wanted.num_cpus))  # fmt: skip
        facts = self._opened()
        self._node = facts.description["node"]
        asked = {name: value for name, value in dataclasses.asdict(wanted).items() if value}
        threading.Thread(target=self.watch, name="watch-actor", daemon=True).start()
        description = {**facts.description, "resources": asked, "raylet": self._raylet()}
        return dataclasses.replace(facts, description=description)

    def _connect(self, address: str) -> None:
        """Raises ModelFailed."""
        ray, settings = self._ray, self._settings
        found = re.match(r"(\d+)\.(\d+)", ray.__version__)
        if found and tuple(map(int, found.groups())) < OLDEST_RAY:
            oldest = ".".join(map(str, OLDEST_RAY))
            raise ModelFailed(f"place: ray wants Ray {oldest} or a newer one, and {ray.__version__} is installed")
        cannot = f"the Ray cluster at {address} cannot be joined"
        if address != "auto" and not _answers(address):  # of which Ray would take a minute or more to be sure
            raise ModelFailed(f"{cannot}: nothing answers at this address")
        try:
            ray.init(
                address=address, namespace=settings.namespace, configure_logging=False, log_to_driver=False,
                logging_level=logging.ERROR,
            )  # fmt: skip
        except Exception as error:
            raise ModelFailed(f"{cannot}: {what_ray_says(error)}") from None
        if os.environ.get("RAY_AUTH_MODE", "").lower() != "token":  # Ray sets it, too, where it finds a token
            says = "the Ray cluster at %s asks for no token: whoever reaches its ports runs code there"
            logger.warning(says, address)
        for number in (signal.SIGINT, signal.SIGTERM):  # Ray has taken them; the parent decides when this one ends
            signal.signal(number, signal.SIG_IGN)

    def _opened(self) -> Facts:
        """Wait until the cluster has room for the actor, and then until the model is loaded. Raises ModelFailed."""
        ray = self._ray
        placed = self._actor.progress.remote()
        until = self._clock() + self._settings.wait_for_room_s
        try:
            while not ray.wait([placed], timeout=LOOK_S)[0]:
                self.report(Progress(f"waits for room: {'; '.join(self._asked_for())}"))
                if self._clock() > until:
                    ray.kill(self._actor)
                    raise NoRoom(self._why_it_waits())
            opened = self._actor.open.remote(__version__, pickle.dumps(self._make))
            while not ray.wait([opened], timeout=LOOK_S)[0]:
                if progress := ray.get(self._actor.progress.remote()):
                    self.report(progress)
            facts = ray.get(opened)
        except ray.exceptions.RayError as error:
            raise ModelFailed(f"its actor could not be started: {what_ray_says(error)}") from None
        if isinstance(facts, Exception):
            raise facts
        assert isinstance(facts, Facts)
        return facts

    def _why_it_waits(self) -> str:
        if lacks := self._asked_for(lacking=True):
            return f"the Ray cluster has no room for it: {'; '.join(lacks)}"
        says = f"the Ray cluster has not started it within {self._settings.wait_for_room_s:g} s, although it had room"
        return f"{says}: {'; '.join(self._asked_for())}"

    def _asked_for(self, *, lacking: bool = False) -> list[str]:
        """What is asked for, beside what there is; or what of it the cluster lacks, and lacked when it was asked."""
        wanted = {"CPU": self._spec.resources.num_cpus, "GPU": self._spec.resources.num_gpus}
        wanted |= {"memory": (self._spec.resources.memory_mb or 0) * MB, **self._spec.resources.custom}
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        free = self._ray.available_resources()
        said = []
        for name, amount in wanted.items():
            most, rest = max((node.get(name, 0) for node in nodes), default=0), free.get(name, 0)
            if amount and not (lacking and min(most, max(rest, self._free_before.get(name, 0))) >= amount):
                of_it = f"{_amount(name, rest)} free in all, {_amount(name, most)} on the largest node"
                said.append(f"it needs {_amount(name, amount)}, and there are {of_it}")
        return said

    @override
    def run(self, batch: Batch) -> Answer:
        answer = self._ask(batch)
        assert isinstance(answer, Answer)
        return answer

    @override
    def probe(self) -> None:
        self._ask(None)

    def watch(self) -> None:
        """Say so when the actor dies and nobody asks anything of it. On a thread of its own."""
        exceptions, reason = self._ray.exceptions, "its actor ended while it was idle"
        try:
            self._call("stay")
        except exceptions.ActorDiedError as error:
            reason = f"{reason}: {what_ray_says(error)}"
        except Exception as error:
            reason = str(error)
        if not self._asking:  # else they say it: one of their items may be why
            self._on_lost(reason)

    def _ask(self, batch: Batch | None) -> Any:
        """Raises what the driver raises there, and Lost when the actor can be asked no more."""
        exceptions = self._ray.exceptions
        self._asking.add(threading.get_ident())
        try:
            answer = self._call("run", batch)
        except (exceptions.ActorDiedError, exceptions.OutOfMemoryError) as error:
            raise Lost(self._death(error)) from None  # its thread stays among those that say it
        self._asking.discard(threading.get_ident())
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _call(self, method: str, *arguments: Any) -> Any:
        """What the actor answers. Raises Ray's error when it has died, and Lost when it or its cluster is out of reach.

        What may have run once may run again, so an actor that cannot be reached is asked again for a while.
        """
        exceptions = self._ray.exceptions
        until = math.inf
        while True:
            try:
                return self._ray.get(getattr(self._actor, method).remote(*arguments))
            except (exceptions.ActorDiedError, exceptions.OutOfMemoryError):
                raise
            except (exceptions.ActorUnavailableError, exceptions.ObjectLostError) as error:
                until = min(until, self._clock() + UNAVAILABLE_S)
                if self._clock() >= until:
                    raise Lost(Loss(f"its actor cannot be reached: {what_ray_says(error)}", innocent=True)) from None
                self._sleep(LOOK_S)
            except exceptions.RayTaskError as error:  # such as of an answer that cannot be pickled
                return RuntimeError(what_ray_says(error))
            except exceptions.RayError as error:
                raise Lost(Loss(f"its cluster fails: {what_ray_says(error)}", innocent=True)) from None

    def _death(self, error: Any) -> Loss:
        says = what_ray_says(error)
        if getattr(error, "preempted", False):
            return Loss(f"its node was taken away: {says}", innocent=True, announced=True)
        if self._node_is_gone():
            return Loss(f"its node is gone: {says}", innocent=True)
        return Loss(f"its actor died: {says}")

    def _node_is_gone(self) -> bool:
        """The cluster may know it a little later than that the actor is; one that cannot say has gone with it."""
        until = self._clock() + NODE_IS_KNOWN_GONE_S
        while self._clock() < until:
            try:
                if not _answers(self._raylet()):
                    return True
            except Exception:
                return True
            self._sleep(LOOK_S)
        return False

    def _raylet(self) -> str:
        """Where Ray's own process on the actor's node listens; empty if the cluster has no such node."""
        for node in self._ray.nodes():
            if node["NodeID"] == self._node and node["Alive"]:
                return f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}"
        return ""


def _answers(address: object) -> bool:
    """Whether connections are taken at this host:port."""
    host, _, port = str(address).rpartition(":")
    if not host:
        return False
    with contextlib.suppress(OSError), socket.create_connection((host.strip("[]"), int(port)), ANSWERS_WITHIN_S):
        return True
    return False


def _amount(name: str, amount: float) -> str:
    return f"{amount / MB:.0f} MB of memory" if name == "memory" else f"{amount:g} {name}"


def what_ray_says(error: Exception) -> str:
    """Why, of one of Ray's errors, which bring whole tracebacks and records along.

    These are indented, so the reason is what stands below the last indented line; or, where nothing does, all of it.
    """
    lines = [line.rstrip() for line in re.sub(r"\x1b\[\d*m", "", str(error)).splitlines() if line.strip()]
    indented = [i for i, line in enumerate(lines) if line[0].isspace()]
    reason = lines[indented[-1] + 1 :] if indented else lines
    return " ".join(line.strip() for line in reason or lines)[:LONGEST_REASON] or type(error).__name__
