"""The base class of tasks: a task turns a request into items, and the rows that come back into an answer."""

from __future__ import annotations

import abc
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import ClassVar, NamedTuple

from embedpool.config.spec import DriverConfig
from embedpool.errors import (
    HALF_A_CHARACTER,
    MOST_NAMED,
    EmbedpoolError,
    InvalidRequest,
    TextTooLong,
    UnsupportedTask,
    half_a_character,
    with_half_a_character,
)
from embedpool.tasks.item import Item
from embedpool.tasks.rows import Rows
from embedpool.tasks.tokenizer import Tokenizer

# Tasks that are no kind of a model of their own: its embeddings are made on the way to these.
OF_EMBEDDERS = ("tokens", "hybrid")


def kinds_of(tasks: Iterable[str]) -> list[str]:
    """Of what a model can do, what is told as its kinds."""
    return [task for task in tasks if task not in OF_EMBEDDERS]


class Measured(NamedTuple):
    """The items of a request, the indices of truncated inputs, and the errors of inputs refused while others go on."""

    items: list[Item]
    truncated: list[int]
    refused: dict[int, EmbedpoolError]


class Task(abc.ABC):
    """A kind of request to a model. An instance is one request; its length is the number of inputs."""

    name: ClassVar[str]

    @property
    def partial(self) -> bool:
        """Whether an input that fails takes no other with it."""
        return False

    @property
    def of_tokens(self) -> str | None:
        """The task in whose rows each token of an input has a vector; None if no row is as long as its input."""
        return None

    def broken(self, texts: Iterable[str], path: str) -> dict[int, EmbedpoolError]:
        """The inputs that hold half a character, where the others go on without them. Else raises InvalidRequest.

        `texts` hold all of each input, `path` is what the caller calls them.
        """
        found = with_half_a_character(texts)
        if found and not self.partial:
            raise half_a_character(found, path)
        return {i: InvalidRequest(HALF_A_CHARACTER) for i in found}

    def too_long(self, says: Mapping[int, str]) -> dict[int, EmbedpoolError]:
        """The inputs that may not be cut, where the others go on without them. Else raises TextTooLong.

        `says` tells of each how long it is, and the limit.
        """
        if self.partial or not says:
            return {i: TextTooLong(sentence) for i, sentence in says.items()}
        first = next(iter(says))
        named = list(itertools.islice(says, MOST_NAMED))
        raise TextTooLong(
            f"{self.where(first)} has {says[first]}", fields={self.where(i): says[i] for i in named}, inputs=named
        )

    def refusal(self, model: str, tokenizer: Tokenizer) -> EmbedpoolError | None:
        """Why the model of this name cannot do it; None if it can."""
        if self.name in tokenizer.tasks:
            return None
        return UnsupportedTask(f"{model!r} cannot {self.name}; it can {' and '.join(kinds_of(tokenizer.tasks))}")

    @abc.abstractmethod
    def __len__(self) -> int:
        """How many inputs there are."""

    @abc.abstractmethod
    def where(self, index: int) -> str:
        """The caller's name of the input at this index, such as texts[3]."""

    @abc.abstractmethod
    def measure(
        self, config: DriverConfig, tokenizer: Tokenizer, still_wanted: Callable[[], None] = lambda: None
    ) -> Measured:
        """Before the queue, in the request's thread. Raises InvalidRequest, TextTooLong and UnsupportedOption.

        `still_wanted`, which raises where nobody waits any more, is called now and then.
        """

    def merged(self, index: int, rows: Sequence[Rows]) -> Rows:
        """The row of an input that has several items, of those of its items, in their order."""
        raise NotImplementedError

    @abc.abstractmethod
    def finish(self, rows: Rows, config: DriverConfig, tokenizer: Tokenizer, errors: dict[int, EmbedpoolError]) -> Rows:
        """After the last row: the rows of all inputs, in order, in the form that was asked for.

        Ignore the rows of inputs that are in `errors`, by index. A partial request may add errors.
        """
