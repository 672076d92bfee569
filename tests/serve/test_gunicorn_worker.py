"""gunicorn is told that the loop turns, and no more often than it needs to be; what ends a worker at once."""

from __future__ import annotations

import os
import signal
from types import SimpleNamespace

import pytest

from embedpool.serve import gunicorn_worker
from embedpool.serve.gunicorn_worker import BEAT_S, WaitressWorker


def test_gunicorn_is_told_once_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    """The heartbeat is written at once, then once a second, however often the loop turns, until the master is gone."""
    times = [100.0, 100.0, 100.0 + BEAT_S / 2, 100.0 + BEAT_S, 100.0 + BEAT_S]
    now = times[0]
    beats: list[float] = []
    worker = WaitressWorker.__new__(WaitressWorker)
    worker.alive, worker.ppid = True, os.getppid()
    worker.wsgi, worker._shared = SimpleNamespace(is_booted=False), bytearray(2)
    monkeypatch.setattr(worker, "notify", lambda: beats.append(now), raising=False)
    monkeypatch.setattr(gunicorn_worker.time, "monotonic", lambda: now)
    for time in times:
        now = time
        assert worker._heartbeat()
    assert beats == [100.0, 100.0 + BEAT_S]
    assert not worker.is_ready
    worker.wsgi.is_booted = True
    assert worker._heartbeat()
    assert worker.is_ready
    worker.ppid += 1
    assert not worker._heartbeat()


@pytest.mark.parametrize(("workers", "shared"), [(1, False), (2, True)])
def test_several_workers_share_what_connects(monkeypatch: pytest.MonkeyPatch, workers: int, shared: bool) -> None:
    """The loop of each is told that it is not the only one; that of one worker takes all that come at once."""
    told: list[bool] = []

    def loop(app: object, sockets: object, *, shared: bool) -> SimpleNamespace:
        told.append(shared)
        return SimpleNamespace(run=lambda heartbeat: None)

    monkeypatch.setattr(gunicorn_worker, "Loop", loop)
    worker = WaitressWorker.__new__(WaitressWorker)
    worker.sockets, worker.wsgi, worker.cfg = [], None, SimpleNamespace(workers=workers)
    worker.run()
    assert told == [shared]


@pytest.mark.parametrize("first", [(signal.SIGINT, signal.SIGQUIT), (signal.SIGQUIT, signal.SIGINT)])
def test_one_ctrl_c_drains_and_a_second_ends(first: tuple[int, int]) -> None:
    """The terminal's SIGINT and the master's SIGQUIT are one Ctrl-C, whichever the worker hears first."""
    worker = WaitressWorker.__new__(WaitressWorker)
    worker.alive = True
    for number in first:
        worker.handle_quit(number, None)
    assert not worker.alive
    with pytest.raises(SystemExit):
        worker.handle_quit(signal.SIGINT, None)


def test_ctrl_c_ends_a_worker_that_drains_after_sigterm() -> None:
    """Somebody waits, and has waited long enough."""
    worker = WaitressWorker.__new__(WaitressWorker)
    worker._shared = bytearray(2)
    worker.handle_exit(signal.SIGTERM, None)
    with pytest.raises(SystemExit):
        worker.handle_quit(signal.SIGINT, None)


@pytest.mark.parametrize("server_ends", [True, False])
def test_a_worker_that_is_replaced_does_not_delay(server_ends: bool) -> None:
    """Balancers are told of the end of a server, not of a reload, during which every worker is ready to its end.

    Nor is anybody who presses Ctrl-C kept waiting.
    """
    stops: list[tuple[bool, bool]] = []
    worker = WaitressWorker.__new__(WaitressWorker)
    worker._shared = bytearray(2)
    worker._loop = SimpleNamespace(stop=lambda *, delay, replaced: stops.append((delay, replaced)))
    if server_ends:
        worker.tell_that_the_server_ends()
    worker.handle_exit(signal.SIGTERM, None)
    worker._interrupted = False
    worker.handle_quit(signal.SIGINT, None)
    assert stops == [(server_ends, not server_ends), (False, False)]
