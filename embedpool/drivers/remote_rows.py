"""The numbers of a remote service's answer as arrays."""

from __future__ import annotations

import collections
from typing import Any

import numpy as np

LEAST_SCORE = 1e-6  # that is told from none

Array = np.ndarray[Any, np.dtype[np.float32]]


def as_one(scores: Array) -> Array:
    """The scores of known documents as one vector, which is the model's mark, of shape (1, documents): their logits."""
    inside = np.clip(scores[:, 0].astype(np.float64), LEAST_SCORE, 1 - LEAST_SCORE)
    return np.log(inside / (1 - inside))[None, :]


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
