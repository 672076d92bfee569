"""Replicas that try again at once."""

from __future__ import annotations

import pytest

from embedpool.pool import backoff


@pytest.fixture(autouse=True)
def _short_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backoff, "FIRST_S", 0.001)
    monkeypatch.setattr(backoff, "LONGEST_S", 0.004)
