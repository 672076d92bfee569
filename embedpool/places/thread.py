"""A driver in threads of the server's own process."""

from __future__ import annotations

from typing import Any

from typing_extensions import override

from embedpool.tasks.driver import Driver
from embedpool.tasks.item import Batch
from embedpool.tasks.place import Loss, Place
from embedpool.tasks.rows import Answer


class ThreadPlace(Place):
    """Opens the driver on the thread that makes it."""

    def __init__(self, driver: Driver) -> None:
        super().__init__()
        self._driver = driver
        self.facts = driver.open(lambda reason: self._lose(Loss(reason, innocent=True)))

    @override
    def run(self, batch: Batch) -> Answer:
        return self._driver.run(batch)

    @override
    def probe(self) -> None:
        self._driver.probe()

    @override
    def configure(self, config: Any) -> None:
        self._driver.configure(config)

    @override
    def close(self) -> None:
        self._driver.close()
