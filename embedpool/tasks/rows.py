"""Rows, the results of a model: one for each item, dense, ragged or sparse."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedpool.errors import EmbedpoolError


@dataclasses.dataclass(frozen=True, slots=True)
class Rows:
    """Rows of one kind; as a driver gives them their values are float32.

    Dense: `values` of shape (rows, width). Ragged: `values` of shape (vectors, width), of which row i has those from
    `splits[i]` up to `splits[i + 1]`. Sparse: `values` of shape (entries,), split in the same way, each with the
    number at which it stands in `indices`. `also` holds further rows of the same items, by the names of their tasks,
    where a model has made several of one pass.
    """

    values: NDArray[Any]
    splits: NDArray[np.int64] | None = None
    indices: NDArray[np.int32] | None = None
    also: Mapping[str, Rows] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.values) if self.splits is None else len(self.splits) - 1

    @property
    def width(self) -> int:
        """Numbers of a vector; 0 for sparse rows, and where there is none."""
        return self.values.shape[1] if self.values.ndim == 2 else 0

    def fault(self, count: int, width: int | None) -> str | None:
        """What is wrong with these as the rows of `count` items, whose vectors should have `width` numbers."""
        dimensions = 2 if self.indices is None else 1
        if self.values.ndim != dimensions or (self.splits is None and self.indices is not None):
            return f"values of shape {self.values.shape} are no rows"
        if len(self) != count:
            return f"{len(self)} rows for {count} items"
        if self.indices is not None and self.indices.shape != self.values.shape:
            return f"{len(self.indices)} indices for {len(self.values)} values"
        if width is not None and dimensions == 2 and self.width != width:
            return f"vectors of {self.width} numbers, not {width}"
        splits = self.splits
        if splits is not None and (splits[0] != 0 or splits[-1] != len(self.values) or (np.diff(splits) < 0).any()):
            return "rows that do not cover their values"
        return next(filter(None, (rows.fault(count, None) for rows in self.also.values())), None)

    def finite(self) -> NDArray[np.bool_]:
        """Which rows have finite values alone."""
        finite = np.asarray(np.isfinite(self.values).all(axis=tuple(range(1, self.values.ndim))))
        if self.splits is not None:
            bad_before = np.concatenate([[0], np.cumsum(~finite)])
            finite = np.asarray(bad_before[self.splits[1:]] == bad_before[self.splits[:-1]])
        for rows in self.also.values():
            finite = finite & rows.finite()
        return finite

    @property
    def numbers(self) -> int:
        """How many there are, of all outputs."""
        own = self.values.size + (0 if self.indices is None else self.indices.size)
        return own + sum(rows.numbers for rows in self.also.values())

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The arrays there are, by name, from which `of_arrays` makes the same, be it from shared memory or a file."""
        own = {"values": self.values, "splits": self.splits, "indices": self.indices}
        found = {name: array for name, array in own.items() if array is not None}
        for task, rows in self.also.items():
            found |= {f"{task}.{name}": array for name, array in rows.arrays().items()}
        return found

    @classmethod
    def of_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> Rows:
        """See `arrays`."""
        of_tasks: dict[str, dict[str, NDArray[Any]]] = {}
        for name, array in arrays.items():
            task, _, inner = name.rpartition(".")
            of_tasks.setdefault(task, {})[inner] = array
        own = of_tasks.pop("")
        also = {task: cls.of_arrays(of_it) for task, of_it in of_tasks.items()}
        return cls(own["values"], own.get("splits"), own.get("indices"), also)

    def row(self, i: int) -> Rows:
        """Row `i` alone, copied, so that it does not keep the rest of a batch in memory."""
        if len(self) == 1:
            return self
        also = {task: rows.row(i) for task, rows in self.also.items()}
        if self.splits is None:
            return Rows(self.values[i : i + 1].copy(), also=also)
        span = slice(int(self.splits[i]), int(self.splits[i + 1]))
        splits = np.array([0, span.stop - span.start], dtype=np.int64)
        return Rows(self.values[span].copy(), splits, None if self.indices is None else self.indices[span].copy(), also)

    @classmethod
    def gather(cls, rows: Sequence[Rows | None]) -> Rows:
        """Single rows of one kind, in order; for None zeros, or an empty row where rows are ragged or sparse.

        Without any the rows have no width.
        """
        first = next((row for row in rows if row is not None), None)
        if first is None:
            return cls(np.zeros((len(rows), 0), dtype=np.float32))
        if len(rows) == 1:
            return first
        also = {task: cls.gather([None if row is None else row.also[task] for row in rows]) for task in first.also}
        if first.splits is None:
            gap = np.zeros_like(first.values)
            return cls(np.concatenate([gap if row is None else row.values for row in rows]), also=also)
        there = [row for row in rows if row is not None]
        lengths = [0 if row is None else len(row.values) for row in rows]
        splits = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        values = np.concatenate([row.values for row in there])
        if first.indices is None:
            return cls(values, splits, also=also)
        return cls(values, splits, np.concatenate([row.indices for row in there if row.indices is not None]), also)


@dataclasses.dataclass(frozen=True, slots=True)
class Answer:
    """A driver's answer to a batch: a row for each item, in order.

    A remote service also tells the `tokens` it counted, the indices of the items it `truncated`, and the `errors` of
    items it has no row for, whose rows mean nothing.
    """

    rows: Rows
    tokens: int | None = None
    truncated: Sequence[int] = ()
    errors: Mapping[int, EmbedpoolError] = dataclasses.field(default_factory=dict)
