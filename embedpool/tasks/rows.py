"""What comes back from a model: one row an item, whatever a row is."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclasses.dataclass(frozen=True, slots=True)
class Rows:
    """Rows of one kind; as a driver gives them their values are float32.

    Dense: `values` of shape (rows, width). Ragged: `values` of shape (vectors, width), of which row i has those from
    `splits[i]` up to `splits[i + 1]`. Sparse: `values` of shape (entries,), split in the same way, each with the
    number at which it stands in `indices`.
    """

    values: NDArray[Any]
    splits: NDArray[np.int64] | None = None
    indices: NDArray[np.int32] | None = None

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
        return None

    def finite(self) -> NDArray[np.bool_]:
        """Which rows have finite values alone."""
        finite = np.asarray(np.isfinite(self.values).all(axis=tuple(range(1, self.values.ndim))))
        if self.splits is None:
            return finite
        bad_before = np.concatenate([[0], np.cumsum(~finite)])
        return np.asarray(bad_before[self.splits[1:]] == bad_before[self.splits[:-1]])

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The arrays there are, by name: `Rows(**rows.arrays())` is the same, be it from shared memory or a file."""
        found = {"values": self.values, "splits": self.splits, "indices": self.indices}
        return {name: array for name, array in found.items() if array is not None}

    @classmethod
    def gather(cls, picks: Sequence[tuple[Rows, int] | None]) -> Rows:
        """One row for each pick, of any batch; for None zeros, or an empty row where rows are ragged or sparse.

        All picks are of one kind. Without any the rows have no width.
        """
        first = next((rows for pick in picks if pick for rows in pick[:1]), None)
        if first is None:
            return cls(np.zeros((len(picks), 0), dtype=np.float32))
        if first.splits is None:
            if len(picks) == 1 and picks[0]:
                return cls(first.values[picks[0][1]][np.newaxis])
            dense = np.zeros((len(picks), first.width), dtype=first.values.dtype)
            for at, pick in enumerate(picks):
                if pick is not None:
                    dense[at] = pick[0].values[pick[1]]
            return cls(dense)
        spans = [pick[0]._span(pick[1]) if pick else slice(0, 0) for pick in picks]
        lengths = [span.stop - span.start for span in spans]
        splits = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        sources = [(pick[0] if pick else first, span) for pick, span in zip(picks, spans, strict=True)]
        values = np.concatenate([rows.values[span] for rows, span in sources])
        if first.indices is None:
            return cls(values, splits)
        return cls(values, splits, np.concatenate([rows.indices[s] for rows, s in sources if rows.indices is not None]))

    def _span(self, row: int) -> slice:
        assert self.splits is not None
        return slice(int(self.splits[row]), int(self.splits[row + 1]))


@dataclasses.dataclass(frozen=True, slots=True)
class Answer:
    """What a driver gives for a batch: a row for each item, in order.

    A remote service also tells the `tokens` it counted and the indices of the items it `truncated`.
    """

    rows: Rows
    tokens: int | None = None
    truncated: Sequence[int] = ()
