"""Counters of one model."""

from __future__ import annotations

import numpy as np
import pytest

from embedpool.pool.request import Result
from embedpool.pool.stats import ModelStats
from embedpool.tasks.rows import Rows


def answer(texts: int, tokens: int, truncated: list[int]) -> Result:
    return Result("m", "a space", Rows(np.zeros((texts, 2))), 2, tokens, truncated, 0.0, 0.0, 0.0, 0.0, [])


def test_counters_tell_requests_batches_and_errors_apart() -> None:
    """What was answered, what was refused and why, and what the driver did are counted separately."""
    stats = ModelStats()
    stats.answered("embed", answer(3, 30, [1]))
    stats.answered("embed", answer(1, 5, []))
    stats.refused("embed", "overloaded")
    stats.refused("embed", "overloaded")
    stats.refused("embed", "deadline_exceeded")
    stats.batch(4, 35, 60, 0.5)
    stats.looked_up(2, 1)
    assert stats.snapshot() == {
        "requests": 5, "texts": 4, "tokens": 35, "truncated": 1, "batches": 1, "rows": 4, "batch_tokens": 35,
        "padded_tokens": 60, "cache_hits": 2, "cache_misses": 1, "compute_s": 0.5,
        "errors": {"overloaded": 2, "deadline_exceeded": 1},
    }  # fmt: skip


def test_a_fresh_model_shows_zeros() -> None:
    """Every counter is there from the start."""
    snapshot = ModelStats().snapshot()
    assert snapshot.pop("errors") == {}
    assert set(snapshot.values()) == {0}


def test_the_rate_follows_the_recent_past() -> None:
    """The rate is texts per second of compute, and old batches fade."""
    stats = ModelStats()
    assert stats.texts_per_busy_s() == 0
    stats.batch(10, 10, 10, 1.0)
    assert stats.texts_per_busy_s() == pytest.approx(10)
    for _ in range(300):
        stats.batch(100, 10, 10, 1.0)
    assert stats.texts_per_busy_s() == pytest.approx(100, rel=0.01)
