"""What every task is: how a request becomes items, and how the rows that come back become its answer."""

from __future__ import annotations

import abc
from typing import ClassVar, NamedTuple

from embedpool.config.spec import DriverConfig
from embedpool.errors import EmbedpoolError
from embedpool.tasks.item import Item
from embedpool.tasks.rows import Rows
from embedpool.tasks.tokenizer import Tokenizer


class Measured(NamedTuple):
    """The items of a request, the indices of truncated inputs, and the errors of inputs refused while others go on."""

    items: list[Item]
    truncated: list[int]
    refused: dict[int, EmbedpoolError]


class Task(abc.ABC):
    """What a model is asked in one request: its instances are requests, their length the number of inputs."""

    name: ClassVar[str]

    @property
    def partial(self) -> bool:
        """Whether an input that fails takes no other with it."""
        return False

    @abc.abstractmethod
    def __len__(self) -> int:
        """How many inputs there are."""

    @abc.abstractmethod
    def where(self, index: int) -> str:
        """What the caller calls the input at this place."""

    @abc.abstractmethod
    def measure(self, config: DriverConfig, tokenizer: Tokenizer) -> Measured:
        """Before the queue, in the request's thread. Raises InvalidRequest, TextTooLong and UnsupportedOption."""

    @abc.abstractmethod
    def finish(self, rows: Rows, config: DriverConfig, errors: dict[int, EmbedpoolError]) -> Rows:
        """After the last row: the rows of all inputs, in order, in the form that was asked for.

        Ignore the rows of inputs that are in `errors`, by index. A partial request may add errors.
        """
