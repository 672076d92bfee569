"""The actor of `place: ray`: it runs a model's driver on a node of the cluster."""

from __future__ import annotations

import dataclasses
import os
import pickle
import threading

from embedpool import __version__
from embedpool.errors import EmbedpoolError, ModelFailed
from embedpool.places.cores import limit_cores
from embedpool.places.in_child import portable
from embedpool.tasks.driver import Driver, Facts, Progress
from embedpool.tasks.item import Batch
from embedpool.tasks.rows import Answer


class Host:
    """It opens a driver and runs its batches. Errors are given back, since Ray would wrap them."""

    _driver: Driver

    def __init__(self, cores: int) -> None:
        self._cores = cores
        self._progress: Progress | None = None

    def open(self, version: str, make: bytes) -> Facts | Exception:
        """The facts of the driver, with the node that it is on.

        `make` is the pickled callable that makes the driver. It is read after the versions were compared: another
        version may not have what it names.
        """
        import ray

        ip: str = ray.util.get_node_ip_address()
        try:
            if version != __version__:
                raise ModelFailed(f"embedpool {__version__} is installed, and the server has {version}")
            limit_cores(self._cores)
            self._driver = pickle.loads(make)()  # noqa: S301  (our own bytes)
            self._driver.report = self._heard
            facts: Facts = self._driver.open(lambda reason: os._exit(1))
        except BaseException as error:
            says = error.message if isinstance(error, EmbedpoolError) else f"{type(error).__name__}: {error}"
            return ModelFailed(f"on the node {ip}: {says}")
        node = {"node_ip": ip, "node": ray.get_runtime_context().get_node_id()}
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
        except BaseException as error:
            return portable(error)

    def stay(self) -> None:
        """Never answers: whoever waits for it learns that the actor has died."""
        threading.Event().wait()
