"""Helpers for drivers that load a model: time a call, and compare two vectors."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedpool.tasks.driver import PROBE_TEXT
from embedpool.tasks.item import Batch, Ids, Item
from embedpool.tasks.rows import Rows


def probe_batch(texts: Sequence[str] = (PROBE_TEXT,), ids: Sequence[Ids] | None = None, task: str = "embed") -> Batch:
    """A batch of known texts, for a driver to try itself on."""
    return Batch(task, [Item((text,), 0, ids[i] if ids else None) for i, text in enumerate(texts)])


def fastest_s(call: Callable[[], object], tries: int = 3) -> float:
    """The least time a call takes, in seconds, of some tries."""
    spent_s = []
    for _ in range(tries):
        started = time.perf_counter()
        call()
        spent_s.append(time.perf_counter() - started)
    return min(spent_s)


def cosine(a: NDArray[Any], b: NDArray[Any]) -> float:
    """The cosine of the angle between two vectors."""
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def nearness(a: Rows, b: Rows) -> float:
    """The least cosine of two vectors that stand in the same place of two outputs, or of two sparse rows."""
    if a.indices is not None and b.indices is not None:
        both = np.zeros((2, 1 + max(int(rows.indices.max(initial=0)) for rows in (a, b) if rows.indices is not None)))
        both[0, a.indices], both[1, b.indices] = a.values, b.values
        return cosine(*both)
    return min((cosine(x, y) for x, y in zip(a.values, b.values, strict=True)), default=1.0)
