"""Counters of one model, and the rate at which it works."""

from __future__ import annotations

import bisect
import math
import threading
from collections import Counter
from typing import Any

from embedpool.pool.request import Result

RATE_MEMORY_S = 30.0  # compute time after which an observation counts for 1/e
COUNTS = (
    "requests", "texts", "tokens", "truncated", "batches", "rows", "batch_tokens", "padded_tokens",
    "cache_hits", "cache_misses",
)  # fmt: skip
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)  # bounds of buckets
TIMES = ("request", "queue", "batch")  # of each a count for every bucket, and one for what is longer


class Observer:
    """Told what happens in a pool, on the threads on which it happens. This one takes no notice."""

    def answered(self, model: str, task: str, result: Result) -> None:
        """A request got its rows."""

    def refused(self, model: str, task: str, code: str) -> None:
        """A request got an error."""

    def batch(self, model: str, items: int, tokens: int, padded_tokens: int, compute_s: float) -> None:
        """A driver call succeeded."""

    def looked_up(self, model: str, hits: int, misses: int) -> None:
        """So many rows of a request were known from before, and so many were not."""


class ModelStats:
    """Thread-safe; tells an observer, too.

    `texts`, `tokens` and `truncated` count answered requests; `batches` and `rows` driver calls.
    """

    def __init__(self, model: str = "", observer: Observer = Observer()) -> None:  # noqa: B008  (it keeps nothing)
        self._model = model
        self._observer = observer
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._errors: Counter[str] = Counter()
        self._times = {name: [0] * (len(SECONDS) + 1) for name in TIMES}
        self._compute_s = 0.0
        self._recent_texts = 0.0
        self._recent_s = 0.0

    def answered(self, task: str, result: Result) -> None:
        """A request got its rows."""
        texts, truncated = len(result.rows) - len(result.errors), len(result.truncated)
        with self._lock:
            self._counts.update(requests=1, texts=texts, tokens=result.tokens, truncated=truncated)
            self._times["request"][_bucket(result.total_ms / 1000)] += 1
            self._times["queue"][_bucket(result.queue_ms / 1000)] += 1
            if result.errors:
                self._errors.update(error.code for error in result.errors.values())
        self._observer.answered(self._model, task, result)

    def refused(self, task: str, code: str) -> None:
        """A request got an error."""
        with self._lock:
            self._counts["requests"] += 1
            self._errors[code] += 1
        self._observer.refused(self._model, task, code)

    def batch(self, items: int, tokens: int, padded_tokens: int, compute_s: float) -> None:
        """A driver call succeeded."""
        with self._lock:
            self._counts.update(batches=1, rows=items, batch_tokens=tokens, padded_tokens=padded_tokens)
            self._times["batch"][_bucket(compute_s)] += 1
            self._compute_s += compute_s
            keep = math.exp(-compute_s / RATE_MEMORY_S)
            self._recent_texts = self._recent_texts * keep + items
            self._recent_s = self._recent_s * keep + compute_s
        self._observer.batch(self._model, items, tokens, padded_tokens, compute_s)

    def looked_up(self, hits: int, misses: int) -> None:
        """So many rows of a request were known from before, and so many were not."""
        with self._lock:
            self._counts["cache_hits"] += hits
            self._counts["cache_misses"] += misses
        self._observer.looked_up(self._model, hits, misses)

    def texts_per_busy_s(self) -> float:
        """Recent texts per second of one busy worker; 0 before the first batch."""
        with self._lock:
            return self._recent_texts / self._recent_s if self._recent_s else 0.0

    def snapshot(self) -> dict[str, Any]:
        """All counters as plain numbers; `errors` by code."""
        with self._lock:
            return {
                **{name: self._counts[name] for name in COUNTS},
                "compute_s": round(self._compute_s, 6),
                "errors": dict(self._errors),
            }

    def counted(self) -> tuple[list[int], dict[str, int]]:
        """Those of COUNTS, then the buckets of each of TIMES; and errors by code."""
        with self._lock:
            times = [count for name in TIMES for count in self._times[name]]
            return [*(self._counts[name] for name in COUNTS), *times], dict(self._errors)


def _bucket(seconds: float) -> int:
    """Its index; a bucket holds its bound."""
    return bisect.bisect_left(SECONDS, seconds)
