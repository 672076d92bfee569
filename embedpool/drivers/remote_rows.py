"""The numbers of a remote service's answer as arrays."""

from __future__ import annotations

import collections
from typing import Any

import numpy as np

from embedpool.tasks.rows import Rows

LEAST_SCORE = 1e-6  # that is told from none
MARK_WIDTH = 4093

Array = np.ndarray[Any, np.dtype[np.float32]]


def as_one(scores: Array) -> Array:
    """The scores of known documents as one vector, which is the model's mark, of shape (1, documents): their logits."""
    inside = np.clip(scores[:, 0].astype(np.float64), LEAST_SCORE, 1 - LEAST_SCORE)
    return np.log(inside / (1 - inside))[None, :]


def mark_of(rows: Rows) -> Array:
    """Vectors by which the rows of known texts are told from another model's, of shape (texts, width).

    Of sparse rows their values, those at places equal modulo MARK_WIDTH summed up; of several vectors the mean.
    """
    if rows.splits is None:
        return rows.values
    owners = np.repeat(np.arange(len(rows)), np.diff(rows.splits))
    if rows.indices is not None:
        found = np.zeros((len(rows), MARK_WIDTH), np.float32)
        np.add.at(found, (owners, rows.indices % MARK_WIDTH), rows.values)
        return found
    found = np.zeros((len(rows), rows.width), np.float32)
    np.add.at(found, owners, rows.values)
    return np.asarray(found / np.maximum(np.diff(rows.splits), 1)[:, None], np.float32)


def sparse_of(rows: list[Any]) -> Rows:
    """Of pairs of indices and values; None has no row. Raises ValueError, TypeError and OverflowError."""
    found = [((), ()) if row is None else row for row in rows]
    parts = [(np.asarray(indices, np.int64), np.asarray(values, np.float32)) for indices, values in found]
    if any(i.shape != v.shape or i.ndim != 1 or (np.diff(i) <= 0).any() or (i < 0).any() for i, v in parts):
        raise ValueError("indices are to ascend, each with a value")
    splits = np.cumsum([0, *(len(indices) for indices, _ in parts)]).astype(np.int64)
    indices = np.concatenate([indices for indices, _ in parts]).astype(np.int32)
    return Rows(np.concatenate([values for _, values in parts]), splits, indices)


def several_of(rows: list[Any], width: int | None) -> Rows:
    """Of lists of vectors; None has no row. Raises ValueError and TypeError."""
    parts = [np.asarray(row, np.float32) for row in rows if row is not None and len(row)]
    widths = {part.shape[-1] for part in parts} | ({width} if width else set())
    if any(part.ndim != 2 for part in parts) or len(widths) != 1:
        raise ValueError("vectors are to have the same length")
    splits = np.cumsum([0, *(0 if row is None else len(row) for row in rows)]).astype(np.int64)
    return Rows(np.concatenate([*parts, np.zeros((0, widths.pop()), np.float32)]), splits)


def rows_of(vectors: list[Any], width: int | None, *, may_be_none: bool) -> Array:
    """As an array. A vector that is none, or of another length than most, is not finite: its text alone is at fault.

    If `width` is known, that is the right length, and `may_be_none` says that no text need have a vector.
    """
    with np.errstate(over="ignore"):  # becomes infinite, which the worker refuses
        if may_be_none and width is not None and all(vector is None for vector in vectors):
            return np.full((len(vectors), width), np.nan, np.float32)
        try:
            return np.asarray(vectors, dtype=np.float32)
        except (ValueError, TypeError):
            rows = [_row(vector) for vector in vectors]
            lengths = collections.Counter(len(row) for row in rows if row is not None)
            if not lengths:
                raise
            right: int = width if width in lengths else lengths.most_common(1)[0][0]  # type: ignore[assignment]
            gap = np.full(right, np.nan, np.float32)
            return np.stack([gap if row is None or len(row) != right else row for row in rows])


def _row(vector: Any) -> Array | None:
    try:
        row = np.asarray(vector, dtype=np.float32)
    except (ValueError, TypeError):
        return None
    return row if row.ndim == 1 and len(row) else None
