"""The contract that drivers/ and places/ fulfil: a driver runs batches, and a place is where it runs."""

from __future__ import annotations

import abc
import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

from embedpool.errors import ModelFailed
from embedpool.tasks.item import Batch
from embedpool.tasks.rows import Answer

PROBE_TEXT = "The quick brown fox jumps over the lazy dog."


@dataclasses.dataclass(frozen=True, slots=True)
class Cost:
    """Run time of a call, in seconds: `fixed_s` + `token_s` · padded tokens."""

    fixed_s: float
    token_s: float

    def call_s(self, padded_tokens: float) -> float:
        """Seconds of a call with so many padded tokens."""
        return self.fixed_s + self.token_s * padded_tokens


@dataclasses.dataclass(frozen=True, slots=True)
class Facts:
    """What is true of an open driver.

    `tasks` are those that it can do, with the number of values of a vector of each; None where that varies or there are
    no vectors. `space`
    identifies whose numbers these are: vectors of two spaces are never comparable. `slots` is how many batches at once
    serve it well, `cost` what a call takes, as far as it is known. Where nothing `pads`, texts of any lengths share a
    batch for nothing. One that `paces` itself is asked whether it takes a batch. `runtime` is what computes, with its
    version, and in which type: it decides the last digits of a row. Rows of a `cacheable` one are worth keeping, and
    equal whenever they are computed. `description` is what runs where, for /status: the driver may replace entries.
    """

    tasks: Mapping[str, int | None] = dataclasses.field(default_factory=lambda: {"embed": None})
    space: str = ""
    slots: int = 1
    cost: Cost | None = None
    pads: bool = True
    paces: bool = False
    runtime: str = ""
    cacheable: bool = False
    description: Mapping[str, object] = dataclasses.field(default_factory=dict)


def call_tokens(lengths: Sequence[int], *, pads: bool) -> int:
    """Tokens that a call with items of these lengths runs, padding included."""
    return max(lengths) * len(lengths) if pads else sum(lengths)


class Progress(NamedTuple):
    """How far a driver is with being opened: its step (download, load, export or warm up), and bytes if known."""

    step: str
    done_bytes: int | None = None
    total_bytes: int | None = None


Report = Callable[[Progress], None]  # called on any thread


def unheard(progress: Progress) -> None:
    """A report that nobody reads."""


class Folders(NamedTuple):
    """Where drivers keep files: in `cache` what can be made anew, in `state` what must outlive them."""

    cache: Path
    state: Path


class Driver(abc.ABC):
    """Runs batches. `open` and `close` are called on one thread, `run` by up to `Facts.slots` threads at once.

    Whoever opens it may set `report`, to be told how far it is.
    """

    report: Report = staticmethod(unheard)

    @abc.abstractmethod
    def open(self, on_lost: Callable[[str], None]) -> Facts:
        """Load what is needed and prove it by `probe`. Raises with the reason if it cannot serve.

        From then on the driver may call `on_lost`, on any thread, with the reason why it can serve no more although
        no item is at fault.
        """

    @abc.abstractmethod
    def run(self, batch: Batch) -> Answer:
        """A row for each item, in order. Raises UpstreamError for a remote's fault, UnsupportedOption, or anything."""

    @abc.abstractmethod
    def probe(self) -> None:
        """Run a fixed text. Raises if the driver itself is at fault."""

    def rest_s(self) -> float:
        """Seconds for which it is to be given no batch, since a remote service has asked for a pause."""
        return 0.0

    def takes_a_batch(self, within_s: float = 0.0) -> bool:
        """Whether it is to be given a batch; waits up to `within_s` until it is. Where it `paces` itself."""
        return True

    def configure(self, config: Any) -> None:  # noqa: B027  (most drivers read nothing that may change)
        """Apply a changed driver.config, on any thread. Keys that load the model anew are the same as before."""

    def close(self) -> None:  # noqa: B027  (most drivers hold nothing)
        """Give everything back."""


def describe(**facts: Any) -> dict[str, object]:
    """The facts that are known."""
    return {key: value for key, value in facts.items() if value is not None}


@dataclasses.dataclass(frozen=True, slots=True)
class Loss:
    """Why a place can serve no more. An `innocent` one is of a kind that no item is likely to have caused.

    An `announced` one was decided elsewhere, such as that a cluster's provider takes a node back: no item can have
    caused it.
    """

    reason: str
    innocent: bool = False
    announced: bool = False


class Lost(Exception):
    """Raised by the `run` of a driver that can serve no more; an item of the batch may be why."""

    def __init__(self, loss: Loss) -> None:
        super().__init__(loss.reason)
        self.loss = loss


class NoRoom(ModelFailed):
    """Nothing has room for the driver at present. It is tried again soon: whoever makes room looks at what is asked."""


class Place:
    """Runs an open driver in the threads of this process. Its subclasses in places/ run it elsewhere."""

    lost: Loss | None = None  # set, once, when it can serve no more
    _on_lost: Callable[[], None] | None = None

    def __init__(self, driver: Driver, report: Report = unheard) -> None:
        self._driver = driver
        driver.report = report
        self.facts: Facts = driver.open(lambda reason: self._lose(Loss(reason, innocent=True)))

    def run(self, batch: Batch) -> Answer:
        """A row for each item. Raises what the driver raises, and anything when the place is lost meanwhile."""
        return self._driver.run(batch)

    def probe(self) -> None:
        """Raises if the driver itself is at fault, or the place is lost."""
        self._driver.probe()

    def rest_s(self) -> float:
        """See Driver.rest_s."""
        return self._driver.rest_s()

    def takes_a_batch(self, within_s: float = 0.0) -> bool:
        """See Driver.takes_a_batch."""
        return self._driver.takes_a_batch(within_s)

    def configure(self, config: Any) -> None:
        """Take over a driver.config, and what in it concerns the place itself."""
        self._driver.configure(config)

    def close(self) -> None:
        """End it; what it held is the system's again."""
        self._driver.close()

    def alone(self) -> AbstractContextManager[None]:
        """While it lasts the caller's batch is the only one: if the place is lost then, it is by that batch."""
        return contextlib.nullcontext()

    def watch(self, on_lost: Callable[[], None]) -> None:
        """Have `on_lost` called, on any thread, when the place is lost; at once if it is."""
        self._on_lost = on_lost
        if self.lost:
            on_lost()

    def _lose(self, loss: Loss) -> None:
        """`lost` is set before `_on_lost` is read, and `watch` does it the other way round: one of them sees both."""
        self.lost = self.lost or loss
        if self._on_lost:
            self._on_lost()
