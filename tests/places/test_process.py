"""A driver in a process of its own: real children, with the stand-in for a model in them."""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from embedpool.config.spec import DriverSpec, FakeConfig, ModelSpec, QueueSpec
from embedpool.drivers import make_driver
from embedpool.drivers.fake import FakeDriver
from embedpool.errors import ModelFailed
from embedpool.places import open_place, process
from embedpool.places.process import ProcessPlace
from embedpool.tasks.driver import Driver, Folders, Loss, Place, Progress
from embedpool.tasks.item import Batch, Item
from embedpool.tasks.rows import Answer
from tests.conftest import run
from tests.pool.scripted import PATIENCE_S


def spec_of(*, inflight: int | None = None, **config: Any) -> ModelSpec:
    driver = DriverSpec("fake", FakeConfig(**{"dim": 8, **config}))
    return ModelSpec("m", driver, place="process", queue=QueueSpec(None, inflight))


def opened_place(spec: ModelSpec, prepare: Callable[[], None] | None = None, **given: Any) -> Place:
    make = functools.partial(make_driver, spec, Folders(Path(), Path()), {})
    return open_place(spec, make, prepare_child=prepare, **given)


@pytest.fixture
def opened() -> Iterator[Callable[..., Place]]:
    """Open a driver in a child; at the end no child and no open file is left of it."""
    process = psutil.Process()
    drivers: list[Place] = []

    def open_one(**config: Any) -> Place:
        drivers.append(opened_place(spec_of(**config)))
        return drivers[-1]

    open_one(inflight=4).close()  # multiprocessing keeps a helper and its shared memory for the next
    drivers.clear()
    files = process.num_fds()
    children = {c.pid for c in process.children()}
    yield open_one
    for driver in drivers:
        driver.close()
    assert {c.pid for c in process.children()} == children
    assert process.num_fds() == files


def pid_of(driver: Place) -> int:
    pid = driver.facts.description["pid"]
    assert isinstance(pid, int)
    return pid


def test_it_tells_how_far_it_is(opened) -> None:
    """What a driver reports while it is opened is heard on this side, before its facts."""
    told: list[Progress] = []
    opened_place(spec_of(), report=told.append).close()
    assert told == [Progress("load")]


def test_its_vectors_are_the_drivers_own(opened) -> None:
    """A child gives what the driver gives in this process, and says where it runs."""
    texts = ["a", "b c", "", "ü"]
    driver = opened()
    np.testing.assert_array_equal(run(driver, texts).rows.values, run(FakeDriver(FakeConfig(dim=8)), texts).rows.values)
    driver.probe()
    assert driver.facts.description["place"] == driver.facts.description["isolation"] == "process"
    assert driver.facts.description["dim"] == driver.facts.tasks["embed"] == 8
    assert pid_of(driver) != os.getpid()
    assert driver.facts.slots == 1


def test_vectors_larger_than_the_shared_memory_come_all_the_same(opened) -> None:
    """They go through the pipe."""
    driver = opened(dim=65_536)
    texts = [f"text {i}" for i in range(process.BLOCK_BYTES // (4 * 65_536) + 1)]
    vectors = run(driver, texts).rows.values
    assert vectors.nbytes > process.BLOCK_BYTES
    np.testing.assert_array_equal(vectors, run(FakeDriver(FakeConfig(dim=65_536)), texts).rows.values)


def test_batches_at_once_do_not_mix(opened) -> None:
    """More threads than slots: each gets the vectors of its own texts."""
    driver = opened(inflight=3)
    expected = FakeDriver(FakeConfig(dim=8))

    def ask(number: int) -> bool:
        texts = [f"{number} {i}" for i in range(number % 5 + 1)]
        return np.array_equal(run(driver, texts).rows.values, run(expected, texts).rows.values)

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(ask, range(200)))


def test_a_fault_of_a_batch_is_told_and_nothing_ends(opened) -> None:
    """What the driver raises there is raised here."""
    driver = opened(fault="raise", fault_text="bad")
    with pytest.raises(RuntimeError, match=r"^fault: raise$"):
        run(driver, ["bad"])
    assert run(driver, ["good"]).rows.values.shape == (1, 8)
    assert driver.lost is None


def test_a_load_that_fails_says_why() -> None:
    """The child's error is the parent's; a child that ends says how; nothing is left of either."""
    with pytest.raises(RuntimeError, match=r"^fault: load$"):
        opened_place(spec_of(fault="load"))
    with pytest.raises(
        ModelFailed, match=r"did not load: its process was ended, because it held \d+ MB, more than max_rss_mb 1$"
    ):
        opened_place(spec_of(max_rss_mb=1))
    with pytest.raises(ModelFailed, match="did not load: its process ended with exit code 7"):
        opened_place(spec_of(), functools.partial(os._exit, 7))


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"fault": "crash"}, "was ended by SIGSEGV"),
        ({"fault": "hang", "batch_timeout_s": 0.2}, r"was ended, because a batch took more than 0\.2 s"),
        ({"fault": "grow", "max_rss_mb": 300}, r"held \d+ MB, more than max_rss_mb 300$"),
    ],
    ids=lambda value: value["fault"] if isinstance(value, dict) else "",
)
def test_a_batch_that_ends_its_process_ends_nothing_else(opened, config: dict[str, Any], reason: str) -> None:
    """A crash, a hang, a growth without end: the parent knows why, and is told at once."""
    told = threading.Event()
    driver = opened(fault_text="bad", **config)
    driver.watch(told.set)
    assert run(driver, ["good"]).rows.values.shape == (1, 8)
    while driver.lost is None:  # growth takes a few
        with contextlib.suppress(ChildProcessError):
            run(driver, ["bad"])
    assert told.wait(PATIENCE_S)
    with pytest.raises(ChildProcessError, match=reason):
        run(driver, ["good"])


def test_a_kill_between_batches_is_told_at_once(opened) -> None:
    """Whoever watches need not send a batch to find out."""
    told = threading.Event()
    driver = opened()
    driver.watch(told.set)
    os.kill(pid_of(driver), signal.SIGKILL)
    assert told.wait(PATIENCE_S)
    assert driver.lost == Loss("its process was ended by SIGKILL", innocent=True)
    told.clear()
    driver.watch(told.set)  # too late to see it happen
    assert told.is_set()


def test_signals_meant_for_the_server_do_not_end_a_child(opened) -> None:
    """Ctrl-C and a service manager's SIGTERM reach every process of the group; the batches under way are finished."""
    driver = opened()
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(pid_of(driver), number)
    driver.probe()
    assert driver.lost is None


def test_limits_apply_at_once(opened) -> None:
    """Without a new child."""
    driver = opened(fault="hang", fault_text="bad", batch_timeout_s=600)
    driver.configure(FakeConfig(batch_timeout_s=0.1))
    with pytest.raises(ChildProcessError, match=r"more than 0\.1 s"):
        run(driver, ["bad"])


def test_a_batch_that_is_to_be_alone_is(opened) -> None:
    """It waits for those that run, and those that come wait for it."""
    driver = opened(inflight=2, delay_ms=1)
    running, most = [0], [0]
    lock = threading.Lock()

    def ask(number: int) -> None:
        alone = number % 3 == 0
        with driver.alone() if alone else contextlib.nullcontext():
            with driver._slot() as slot:
                with lock:
                    running[0] += 1
                    most[0] = max(most[0], running[0])
                    assert not alone or running[0] == 1
                driver._ask(slot, Batch("embed", [Item(("a",), 1)]))
                with lock:
                    running[0] -= 1

    with ThreadPoolExecutor(6) as threads:
        list(threads.map(ask, range(60)))
    assert most[0] == 2


def test_a_child_that_stops_reading_is_ended_too(opened) -> None:
    """A text larger than the pipe holds: the time-out counts from when it is sent, not from when it has left."""
    driver = opened(batch_timeout_s=0.2)
    os.kill(pid_of(driver), signal.SIGSTOP)
    with pytest.raises(ChildProcessError, match=r"more than 0\.2 s"):
        run(driver, ["x" * 2_000_000])


def test_a_process_that_outlives_the_child_keeps_nobody_waiting(opened) -> None:
    """One that a model has started holds the child's pipes open."""
    driver = opened(fault="hang", fault_text="bad")
    pid = pid_of(driver)
    with ThreadPoolExecutor(1) as threads:
        hung = threads.submit(run, driver, ["bad"])
        with contextlib.ExitStack() as stack:
            for connection in driver._connections:  # as if held elsewhere: the pipe stays open in this process
                stack.enter_context(socket.socket(fileno=os.dup(connection.fileno())))
            os.kill(pid, signal.SIGKILL)
            with pytest.raises(ChildProcessError, match="SIGKILL"):
                hung.result(PATIENCE_S)


def test_no_thread_to_watch_it_no_child(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the system has no thread to give the load fails, and leaves no process behind."""
    children = set(multiprocessing.active_children())  # not multiprocessing's own helper, which the first one starts

    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(process.threading.Thread, "start", refuse)
    with pytest.raises(RuntimeError, match="new thread"):
        opened_place(spec_of())
    assert set(multiprocessing.active_children()) <= children


def test_an_end_by_any_signal_is_told(opened) -> None:
    """Also by one that has no name."""
    driver = opened()
    os.kill(pid_of(driver), signal.SIGRTMIN + 1)
    with contextlib.suppress(ChildProcessError):
        while driver.lost is None:
            driver.probe()
    assert driver.lost == Loss(f"its process was ended by signal {signal.SIGRTMIN + 1}")


class _Odd(FakeDriver):
    """Fails with an error whose class the parent does not know."""

    def run(self, batch: Batch) -> Answer:
        error = type("Strange", (Exception,), {"__module__": "somewhere"})
        raise error("out of order")


def _make_odd() -> Driver:
    return _Odd(FakeConfig(dim=8))


def test_an_error_of_a_class_unknown_here_keeps_its_words() -> None:
    """The parent needs none of the model's libraries to say what went wrong."""
    driver = ProcessPlace(spec_of(), _make_odd, None, 60)
    try:
        with pytest.raises(RuntimeError, match=r"^Strange: out of order$"):
            run(driver, ["a"])
    finally:
        driver.close()


def test_a_crash_in_the_servers_own_process_is_refused() -> None:
    """The stand-in's `fault: crash` would end the server."""
    spec = ModelSpec("m", DriverSpec("fake", FakeConfig(fault="crash")))
    with pytest.raises(ModelFailed, match="place: process"):
        opened_place(spec)


@pytest.mark.parametrize(
    ("number", "kills", "grown", "innocent"),
    [
        (signal.SIGKILL, 0, False, True),  # by a person
        (signal.SIGKILL, 0, True, True),
        (signal.SIGKILL, 1, False, True),  # by the kernel, for what another process took
        (signal.SIGKILL, 1, True, False),  # by the kernel, perhaps for what a text took
        (signal.SIGKILL, None, True, False),  # where the kernel does not tell
        (signal.SIGKILL, None, False, False),
        (signal.SIGSEGV, 0, False, False),
        (signal.SIGABRT, 1, False, False),
    ],
)
def test_a_loss_is_innocent_if_no_text_can_have_caused_it(
    opened, monkeypatch: pytest.MonkeyPatch, number: int, kills: int | None, grown: bool, innocent: bool
) -> None:
    """The kernel's count of processes ended for want of memory, and this one's own growth, tell."""
    found: dict[str, Any] = {"kills": 5, "bytes": 100}
    monkeypatch.setattr(process, "LOOK_S", 60)  # no look comes between
    monkeypatch.setattr(process, "_kills_for_memory", lambda: found["kills"])
    monkeypatch.setattr(process, "_rss_bytes", lambda pid: found["bytes"])
    told = threading.Event()
    driver = opened()
    driver.watch(told.set)
    found["bytes"] = 200 if grown else 101
    driver._last_bytes = found["bytes"]
    found["kills"] = None if kills is None else found["kills"] + kills
    os.kill(pid_of(driver), number)
    assert told.wait(PATIENCE_S)
    assert driver.lost is not None
    assert driver.lost.innocent is innocent


def test_an_end_that_we_bring_about_is_not_innocent(opened) -> None:
    """A batch that takes too long, or too much, may do so because of a text."""
    driver = opened(fault="hang", fault_text="bad", batch_timeout_s=0.2)
    with pytest.raises(ChildProcessError):
        run(driver, ["bad"])
    assert driver.lost is not None
    assert not driver.lost.innocent


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere there is none")
def test_the_kernels_count_is_read() -> None:
    """It is a number."""
    assert isinstance(process._kills_for_memory(), int)


def test_a_child_that_hangs_while_loading_is_ended(opened, monkeypatch: pytest.MonkeyPatch) -> None:
    """It holds memory and a thread, and nobody waits for it any more."""
    monkeypatch.setattr("embedpool.places.process.LONGEST_LOAD_S", 0.3)
    with pytest.raises(ModelFailed, match="to load"):
        opened(load_delay_ms=600_000)
