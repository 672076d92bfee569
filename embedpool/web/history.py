"""The last ten minutes of the pool, from counters that are kept anyway: what the page draws.

A sample is taken every two seconds on the I/O loop's thread, or by whoever asks where no loop does.
"""

from __future__ import annotations

import collections
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from embedpool.pool.pool import Pool
from embedpool.pool.served_model import ServedModel
from embedpool.pool.stats import COUNTS, SECONDS, TIMES, ModelStats

HISTORY = "embedpool.history"  # of an app's extensions
STEP_S = 2.0
KEPT = 300  # samples: ten minutes
MINUTE = 30  # samples
SMOOTH = 5  # samples whose requests are taken together for a percentile of the series
PERCENTILES = {"p50_ms": 0.50, "p95_ms": 0.95, "p99_ms": 0.99}
SERIES = ("texts_s", *PERCENTILES, "queue")

Array = NDArray[np.int64]


class Sample(NamedTuple):
    """What was counted until then, and how many items waited."""

    numbers: Array
    errors: Mapping[str, int]
    waiting: int


class History:
    """Samples of all models; `number` counts them."""

    def __init__(self, pool: Pool, clock: Callable[[], float] = time.monotonic) -> None:
        self.number = 0
        self._pool = pool
        self._clock = clock
        self._samples: dict[ModelStats, collections.deque[Sample]] = {}  # of models as they are registered now
        self._next_at = clock()
        self._lock = threading.Lock()  # one sample at a time; nobody waits for it

    def sample_if_due(self) -> None:
        """Take a sample if the last is two seconds old. On any thread; it never waits."""
        now = self._clock()
        if now >= self._next_at and self._lock.acquire(blocking=False):
            try:
                self._next_at = (self._next_at if now < self._next_at + STEP_S else now) + STEP_S
                self._samples = {served.stats: self._longer(served) for served in self._pool.models}
                self.number += 1
            finally:
                self._lock.release()

    def _longer(self, served: ServedModel) -> collections.deque[Sample]:
        """The samples of a model with one of now."""
        sample = _sample(served)
        known = self._samples.get(served.stats)
        if known is None:
            known = collections.deque([Sample(np.zeros_like(sample.numbers), {}, 0)], KEPT + 1)
        known.append(sample)
        return known

    def last_minute(self, served: ServedModel) -> dict[str, Any]:
        """Rates, percentiles, each the upper bound of its bucket, and what batches were like; None of nothing."""
        samples = self._of(served)
        count = min(len(samples) - 1, MINUTE)
        first, last, seconds = samples[-1 - count], samples[-1], STEP_S * count
        change = last.numbers - first.numbers
        counts = dict(zip(COUNTS, change.tolist(), strict=False))
        padded, batches = counts["padded_tokens"], counts["batches"]
        errors = {code: number - first.errors.get(code, 0) for code, number in last.errors.items()}
        return {
            "seconds": seconds,
            **{f"{name}_s": round(counts[name] / seconds, 2) for name in ("requests", "texts", "tokens")},
            **percentiles(change, "request"),
            **{f"{name}_p95_ms": percentiles(change, name)["p95_ms"] for name in ("queue", "batch")},
            "texts_a_batch": round(counts["rows"] / batches, 1) if batches else None,
            "padding": round(1 - counts["batch_tokens"] / padded, 4) if padded else None,
            "errors": {code: number for code, number in errors.items() if number},
        }

    def series(self, served: ServedModel, since: int) -> dict[str, list[Any]]:
        """A point for each sample after number `since` that is kept; a percentile is None without an answer."""
        samples = list(self._of(served))
        count = min(len(samples) - 1, self.number - since)
        found: dict[str, list[Any]] = {name: [] for name in SERIES}
        for i in range(len(samples) - count, len(samples)):
            sample, recent = samples[i], samples[max(i - SMOOTH, 0)]
            texts = int(sample.numbers[COUNTS.index("texts")] - samples[i - 1].numbers[COUNTS.index("texts")])
            point = {"texts_s": texts / STEP_S, "queue": sample.waiting}
            for name, value in {**point, **percentiles(sample.numbers - recent.numbers, "request")}.items():
                found[name].append(value)
        return found

    def _of(self, served: ServedModel) -> collections.deque[Sample]:
        """Of a model that has been registered just now there is a sample of nothing, and one of now."""
        found = self._samples.get(served.stats)
        return found.copy() if found else self._longer(served)


def _sample(served: ServedModel) -> Sample:
    numbers, errors = served.stats.counted()
    return Sample(np.array(numbers, np.int64), errors, served.queue.qsize())


def percentiles(change: Array, time_of: str) -> dict[str, float | None]:
    """Those of a change of the counters, in milliseconds; None of none, and of what is longer than the last bound."""
    size = len(SECONDS) + 1
    start = len(COUNTS) + TIMES.index(time_of) * size
    below = np.cumsum(change[start : start + size])
    if not below[-1]:
        return dict.fromkeys(PERCENTILES)
    found = {name: int(np.searchsorted(below, share * below[-1])) for name, share in PERCENTILES.items()}
    return {name: 1000 * SECONDS[i] if i < len(SECONDS) else None for name, i in found.items()}
