"""Replicas that try again at once."""

from __future__ import annotations

import pytest

from embedpool.pool import replica


@pytest.fixture(autouse=True)
def _short_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replica, "BACKOFF_FIRST_S", 0.001)
    monkeypatch.setattr(replica, "BACKOFF_LONGEST_S", 0.004)
