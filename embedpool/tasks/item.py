"""Items and batches: an item is one input of a request, a batch holds the items of one driver call."""

from __future__ import annotations

import dataclasses
import hashlib
from array import array
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

Ids = Sequence[int]  # token ids of one input, special tokens included

KEY_BYTES = 16


class Group(NamedTuple):
    """Items of equal groups may share a batch: the task's name and, for a remote service, its options as JSON."""

    task: str
    options: str = ""


class Item:
    """One input of a request. Its task makes it, drivers read it, and the pool keeps book on it.

    `parts` holds a text, or two (a query and a document); `ids` are their token ids, None where a remote service makes
    them, and `second` is the index in `ids` at which the second part begins, or what was added to the first.
    `tokens` counts them, or estimates it. Items of one model with equal `key` have equal rows. `index` is the input's
    place in its request, `piece` the item's among those of its input.

    The pool's own: `request`, to which the row goes; `duplicates`, the items with the same key that share it; `losses`,
    0 at first, 1 after a place was lost while this item's batch ran, and 1 more for each later loss while it ran alone;
    `spared`, the losses that were not counted, since no item can have caused them; `postponed`, how often it has been
    in a call that a busy service refused while it answered others, and `answered`, how many calls these were by then.
    """

    __slots__ = (
        "answered", "duplicates", "group", "ids", "index", "key", "losses", "parts", "piece", "postponed", "request",
        "second", "spared", "tokens",
    )  # fmt: skip

    def __init__(
        self,
        parts: tuple[str, ...],
        tokens: int,
        ids: Ids | None = None,
        second: int | None = None,
        *,
        group: Group = Group("embed"),  # noqa: B008  (it cannot be changed)
        key: bytes = b"",
        index: int = 0,
        piece: int = 0,
    ) -> None:
        self.parts = parts
        self.tokens = tokens
        self.ids = ids
        self.second = second
        self.group = group
        self.key = key
        self.index = index
        self.piece = piece
        self.request: Any = None
        self.duplicates: list[Item] = []
        self.losses = self.spared = self.postponed = self.answered = 0

    @property
    def equals(self) -> list[Item]:
        """Itself and its duplicates."""
        return [self, *self.duplicates]

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle only the fields that a driver in another process needs."""
        return Item, (self.parts, self.tokens, self.ids, self.second)


class Keys:
    """Makes the `key` of each item of a group: a hash of all that decides its row inside one model."""

    def __init__(self, group: Group) -> None:
        self.group = group
        self._of_group = hashlib.blake2b(repr(group).encode(), digest_size=KEY_BYTES)

    def of(self, ids: Ids | None, *texts: str) -> bytes:
        """The key of an item with these ids; texts count where ids are not known, or do not stand for all of it."""
        found = self._of_group.copy()
        if ids is not None:
            found.update(ids if isinstance(ids, array) else array("I", ids))
        for text in texts:
            encoded = text.encode("utf-8", "surrogatepass")
            found.update(b"\0%d:%b" % (len(encoded), encoded))
        return found.digest()


@dataclasses.dataclass(frozen=True, slots=True)
class Batch:
    """Items of one task that one driver call serves. `options` are those that a remote service is to be given.

    `is_search`: one of its items may be what a call failed for, and this call is to tell; so it is not made again.
    """

    task: str
    items: Sequence[Item]
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    is_search: bool = False

    @property
    def texts(self) -> list[str]:
        """The first part of each item."""
        return [item.parts[0] for item in self.items]

    @property
    def ids(self) -> list[Ids] | None:
        """The token ids of each item; None where a remote service makes them."""
        ids = [item.ids for item in self.items if item.ids is not None]
        return ids if len(ids) == len(self.items) else None
