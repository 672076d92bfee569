"""A driver on a node of a Ray cluster: one actor a replica.

Ray may end the process that is its driver, so the child that a process place has is the driver, never the server.
Queue, batching, back-off and idle times stay where they are: Ray places the actor, and restarts nothing.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
import math
import os
import signal
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
from embedpool.places.cores import limit_cores
from embedpool.places.in_child import portable
from embedpool.places.process import MB, ProcessPlace
from embedpool.places.ray_cluster import local_cluster
from embedpool.tasks.driver import Driver, Facts, Lost, Progress
from embedpool.tasks.item import Batch
from embedpool.tasks.rows import Answer

logger = logging.getLogger(__name__)

UNAVAILABLE_S = 10.0  # how long an actor that cannot be reached is asked again
NODE_IS_KNOWN_GONE_S = 5.0  # after its actor has died
LOOK_S = 0.5


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


def slots_of(spec: ModelSpec) -> int:
    """Batches at once in an actor."""
    return spec.queue.max_inflight_per_replica or math.ceil(spec.resources.num_cpus)


class Host:
    """The actor: it opens a driver and runs its batches. Errors are given back, since Ray would wrap them."""

    def __init__(self, make: Callable[[], Driver], cores: int) -> None:
        self._make = make
        self._cores = cores
        self._progress: Progress | None = None

    def open(self, version: str) -> Facts | Exception:
        """The facts of the driver, with the node that it is on."""
        import ray

        if version != __version__:
            return ModelFailed(f"the node has embedpool {__version__}, and the server {version}")
        limit_cores(self._cores)
        try:
            self._driver = self._make()
            self._driver.report = self._heard
            facts = self._driver.open(lambda reason: os._exit(1))
        except Exception as error:
            return portable(error)
        context = ray.get_runtime_context()
        ip: str = ray.util.get_node_ip_address()
        node = {"node_ip": ip, "node": context.get_node_id()}
        return dataclasses.replace(facts, description={**facts.description, **node})

    def _heard(self, progress: Progress) -> None:
        self._progress = progress

    def progress(self) -> Progress | None:
        """How far it is with opening."""
        return self._progress

    def run(self, batch: Batch | None) -> Answer | Exception | None:
        """A batch; without one a probe."""
        try:
            return self._driver.probe() if batch is None else self._driver.run(batch)
        except Exception as error:
            return portable(error)


class RayDriver(Driver):
    """Runs in the child. An actor that dies with its node is nobody's fault; one that dies alone may be a text's."""

    def __init__(self, spec: ModelSpec, make: Callable[[], Driver], settings: Ray, state_dir: Path) -> None:
        self._spec = spec
        self._make = make
        self._settings = settings
        self._state_dir = state_dir

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
        self._actor = host.options(
            name=f"{self._spec.model}#{uuid.uuid4().hex[:8]}", num_cpus=wanted.num_cpus, num_gpus=wanted.num_gpus,
            memory=wanted.memory_mb and wanted.memory_mb * MB, resources=dict(wanted.custom), max_restarts=0,
            max_task_retries=0, max_concurrency=slots_of(self._spec) + 2, scheduling_strategy="SPREAD",
        ).remote(self._make, math.ceil(wanted.num_cpus))  # fmt: skip
        facts = self._opened()
        self._node = facts.description["node"]
        asked = {name: value for name, value in dataclasses.asdict(wanted).items() if value}
        return dataclasses.replace(facts, description={**facts.description, "resources": asked})

    def _connect(self, address: str) -> None:
        """Raises ModelFailed."""
        ray, settings = self._ray, self._settings
        if os.environ.get("RAY_AUTH_MODE") != "token":
            says = "the Ray cluster at %s asks for no token: whoever reaches its ports runs code there"
            logger.warning(says, address)
        try:
            ray.init(
                address=address, namespace=settings.namespace, configure_logging=False, log_to_driver=False,
                logging_level=logging.ERROR,
            )  # fmt: skip
        except Exception as error:
            raise ModelFailed(f"the Ray cluster at {address} cannot be joined: {_first_line(error)}") from None
        for number in (signal.SIGINT, signal.SIGTERM):  # Ray has taken them; the parent decides when this one ends
            signal.signal(number, signal.SIG_IGN)

    def _opened(self) -> Facts:
        """Wait until the cluster has room for the actor, and then until the model is loaded. Raises ModelFailed."""
        ray = self._ray
        placed = self._actor.progress.remote()
        until = time.monotonic() + self._settings.wait_for_room_s
        try:
            while not ray.wait([placed], timeout=LOOK_S)[0]:
                self.report(Progress(f"waits for room: {self._missing()}"))
                if time.monotonic() > until:
                    ray.kill(self._actor)
                    raise ModelFailed(f"the Ray cluster has no room for it: {self._missing()}")
            opened = self._actor.open.remote(__version__)
            while not ray.wait([opened], timeout=LOOK_S)[0]:
                if progress := ray.get(self._actor.progress.remote()):
                    self.report(progress)
            facts = ray.get(opened)
        except ray.exceptions.RayError as error:
            raise ModelFailed(f"its actor could not be started: {_first_line(error)}") from None
        if isinstance(facts, Exception):
            raise facts
        assert isinstance(facts, Facts)
        return facts

    def _missing(self) -> str:
        """What is asked for, beside what there is."""
        wanted = {"CPU": self._spec.resources.num_cpus, "GPU": self._spec.resources.num_gpus}
        wanted |= {"memory": (self._spec.resources.memory_mb or 0) * MB, **self._spec.resources.custom}
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        free = self._ray.available_resources()
        said, lacks = [], []
        for name, amount in wanted.items():
            if amount:
                most, rest = max((node.get(name, 0) for node in nodes), default=0), free.get(name, 0)
                of_it = f"{_amount(name, rest)} free in all, {_amount(name, most)} on the largest node"
                said.append(f"it needs {_amount(name, amount)}, and there are {of_it}")
                if min(most, rest) < amount:
                    lacks.append(said[-1])
        return "; ".join(lacks or said)

    @override
    def run(self, batch: Batch) -> Answer:
        answer = self._ask(batch)
        assert isinstance(answer, Answer)
        return answer

    @override
    def probe(self) -> None:
        self._ask(None)

    def _ask(self, batch: Batch | None) -> Any:
        """Raises what the driver raises there, and Lost when its actor has died although its node lives."""
        exceptions = self._ray.exceptions
        until = time.monotonic() + UNAVAILABLE_S
        while True:
            try:
                answer = self._ray.get(self._actor.run.remote(batch))
            except exceptions.ActorDiedError as error:
                if error.preempted or self._node_is_gone():
                    self._on_lost("its node is gone")
                raise Lost(f"its actor died: {_first_line(error)}") from None
            except (exceptions.ActorUnavailableError, exceptions.ObjectLostError) as error:
                if time.monotonic() > until:
                    self._on_lost(f"its actor cannot be reached: {_first_line(error)}")
                time.sleep(LOOK_S)  # what may have run once may run again
            except exceptions.RayError as error:
                self._on_lost(f"its cluster fails: {_first_line(error)}")
            else:
                if isinstance(answer, Exception):
                    raise answer
                return answer

    def _node_is_gone(self) -> bool:
        """The cluster may know it a little later than that the actor is."""
        until = time.monotonic() + NODE_IS_KNOWN_GONE_S
        while time.monotonic() < until:
            if not any(node["NodeID"] == self._node and node["Alive"] for node in self._ray.nodes()):
                return True
            time.sleep(LOOK_S)
        return False


def _amount(name: str, amount: float) -> str:
    return f"{amount / MB:.0f} MB of memory" if name == "memory" else f"{amount:g} {name}"


def _first_line(error: Exception) -> str:
    """Of several, the first that says something: Ray's errors bring whole logs along."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:500]
