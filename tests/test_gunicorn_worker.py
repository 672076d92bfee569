"""gunicorn is told that the loop turns, and no more often than it needs to be."""

from __future__ import annotations

import os

import pytest

from embedpool import gunicorn_worker
from embedpool.gunicorn_worker import BEAT_S, WaitressWorker


def test_gunicorn_is_told_once_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    """The heartbeat is written at once, then once a second, however often the loop turns, until the master is gone."""
    times = [100.0, 100.0, 100.0 + BEAT_S / 2, 100.0 + BEAT_S, 100.0 + BEAT_S]
    now = times[0]
    beats: list[float] = []
    worker = WaitressWorker.__new__(WaitressWorker)
    worker.alive, worker.ppid = True, os.getppid()
    monkeypatch.setattr(worker, "notify", lambda: beats.append(now), raising=False)
    monkeypatch.setattr(gunicorn_worker.time, "monotonic", lambda: now)
    for time in times:
        now = time
        assert worker._heartbeat()
    assert beats == [100.0, 100.0 + BEAT_S]
    worker.ppid += 1
    assert not worker._heartbeat()
