"""Rows on the disk: several processes use one file, and whatever happens to it, no wrong row ever comes back."""

from __future__ import annotations

import errno
import itertools
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pytest

from embedpool.cache import disk as disk_module
from embedpool.cache.disk import FILE, LmdbDisk
from embedpool.cache.row_bytes import decoded, encoded
from embedpool.pool.cache import Cache
from embedpool.pool.request import Known
from embedpool.tasks.item import KEY_BYTES
from embedpool.tasks.rows import Rows
from tests.conftest import wait_until

MB = 1 << 20
PATIENCE_S = 10.0


def key_of(number: int, scope: int = 1) -> bytes:
    return scope.to_bytes(KEY_BYTES, "big") + bytes(KEY_BYTES) + number.to_bytes(KEY_BYTES, "big")


def row_of(number: int, width: int = 8) -> Known:
    return Known(Rows(np.full((1, width), number, np.float32)))


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_module, "WRITES_EVERY_S", 0.0)


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Callable[..., LmdbDisk]]:
    """Opens the disk, which is closed at the end, and before it is opened again."""
    disks: list[LmdbDisk] = []

    def open_(max_mb: int = 16, **given: Any) -> LmdbDisk:
        for disk in disks:
            disk.close()
        disks[:] = [LmdbDisk(tmp_path / "rows", max_mb * MB, **given)]
        return disks[0]

    yield open_
    for disk in disks:
        disk.close()


def written(disk: LmdbDisk) -> None:
    """Wait until everything is that was to be: when the second begins, the first is on the disk."""
    for _ in range(2):
        begun = threading.Event()
        disk._later(lambda transaction, begun=begun: begun.set())
        assert begun.wait(PATIENCE_S)


RAGGED = Rows(np.arange(12, dtype=np.float32).reshape(3, 4), np.array([0, 3], np.int64))
SPARSE = Rows(np.array([0.5, 2], np.float32), np.array([0, 2], np.int64), np.array([3, 70_000], np.int32))
NOTHING = Rows(np.zeros((0, 0), np.float32), np.array([0, 0], np.int64))


@pytest.mark.parametrize("row", [row_of(1).row, RAGGED, SPARSE, NOTHING], ids=["dense", "ragged", "sparse", "empty"])
def test_a_row_of_any_kind_comes_back_as_it_was(row: Rows) -> None:
    """With what was told of its input. A byte that has changed, or another key, makes it none."""
    key = key_of(1)
    value = encoded(key, Known(row, 2.5, True))
    found = decoded(key, memoryview(value))
    assert found is not None
    assert (found.tokens, found.is_truncated) == (2.5, True)
    for name, array in row.arrays().items():
        assert np.array_equal(found.row.arrays()[name], array)
    assert decoded(key_of(2), value) is None
    for i in range(len(value)):
        assert decoded(key, value[:i]) is None
        assert decoded(key, value[:i] + bytes([value[i] ^ 1]) + value[i + 1 :]) is None


def test_rows_outlive_the_process(opened: Callable[..., LmdbDisk], tmp_path: Path) -> None:
    """Nobody else may read the file."""
    disk = opened()
    disk.put([(key_of(i), row_of(i)) for i in range(50)])
    again = opened()
    found = again.get([key_of(i) for i in range(60)])
    assert {key: known.row.values[0, 0] for key, known in found.items()} == {key_of(i): i for i in range(50)}
    assert again.state()["entries"] == 50
    assert (tmp_path / "rows" / FILE).stat().st_mode & 0o077 == 0


def test_those_longest_not_asked_for_leave(opened: Callable[..., LmdbDisk]) -> None:
    """The file keeps to its bound; what is asked for stays."""
    now = itertools.count(1000.0, 0.001)
    disk = opened(4, clock=lambda: next(now))
    hot = key_of(0)
    for at in range(0, 6000, 200):
        disk.put([(key_of(i), row_of(i, 384)) for i in range(at, at + 200)])
        written(disk)
        disk.touch([hot])
    written(disk)
    state = disk.state()
    assert state["evicted"] > 2000
    assert state["bytes"] <= 4 * MB
    assert disk._file.stat().st_size <= 4 * MB
    assert set(disk.get([hot, key_of(1), key_of(5999)])) == {hot, key_of(5999)}


def test_what_no_model_is_any_more_is_forgotten(opened: Callable[..., LmdbDisk]) -> None:
    """A model that has not been opened yet keeps what it had; one that has changed does not."""
    disk = opened()
    scopes = [key_of(0, scope)[:KEY_BYTES] for scope in range(5)]

    def kept() -> list[int]:
        written(disk)
        return [scope for scope in range(5) if disk.get([key_of(7, scope)])]

    disk.put([(key_of(7, scope), row_of(scope)) for scope in range(4)])
    disk.keep_only({"a": scopes[0], "b": scopes[1], "c": scopes[2], "same as a": scopes[0]})
    assert kept() == [0, 1, 2]
    disk.keep_only({"a": None, "b": None, "c": scopes[2], "same as a": None})
    assert kept() == [0, 1, 2]
    disk.put([(key_of(7, 4), row_of(4))])
    disk.keep_only({"a": None, "b": scopes[4], "c": scopes[2], "same as a": None})
    assert kept() == [0, 2, 4]
    disk.keep_only({"same as a": None})
    assert kept() == [0]
    disk.clear("another")
    assert kept() == [0]
    disk.clear("same as a")  # which has not been opened yet
    assert kept() == []
    disk.put([(key_of(7, 1), row_of(1))])
    disk.clear(None)
    assert kept() == []
    assert disk.state()["entries"] == 0


@pytest.mark.parametrize("damage", ["garbage", "cut off", "empty", "other version"])
def test_a_damaged_file_is_set_aside(
    opened: Callable[..., LmdbDisk], damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    """With a word in the log; a new one takes its place."""
    disk = opened()
    disk.put([(key_of(i), row_of(i, 384)) for i in range(1000)])
    disk.close()
    file = disk._file
    whole = file.read_bytes()
    broken = {
        "garbage": b"x" * len(whole),
        "cut off": whole[: len(whole) // 2],
        "empty": b"",
        "other version": whole[:20] + bytes(4) + whole[24:4096] + whole[:20] + bytes(4) + whole[24:],
    }[damage]
    file.write_bytes(broken)
    again = LmdbDisk(file.parent, 16 * MB)
    try:
        assert not again.get([key_of(1)])
        again.put([(key_of(1), row_of(1))])
        written(again)
        assert again.get([key_of(1)])
        aside = [path for path in file.parent.glob(f"{FILE}.damaged-*") if not path.name.endswith("-lock")]
        if damage != "empty":  # which LMDB takes for a new one
            assert aside
            assert aside[0].name in caplog.text
    finally:
        again.close()


def test_a_smaller_bound_begins_a_new_file(opened: Callable[..., LmdbDisk]) -> None:
    """A larger one does not."""
    disk = opened(16)
    disk.put([(key_of(i), row_of(i, 384)) for i in range(1500)])
    written(disk)
    assert opened(32).state()["entries"] == 1500
    smaller = opened(2)
    assert smaller.state()["entries"] == 0
    smaller.put([(key_of(1), row_of(1))])
    written(smaller)
    assert smaller.get([key_of(1)])


def test_rows_that_were_changed_on_the_disk_are_no_rows(opened: Callable[..., LmdbDisk]) -> None:
    """Whichever byte of a page of rows was."""
    disk = opened()
    disk.put([(key_of(i), row_of(i, 384)) for i in range(200)])
    disk.close()
    content = bytearray(disk._file.read_bytes())
    chance = random.Random(3)
    wanted = np.full(100, 7, np.float32).tobytes()
    at = content.find(wanted)
    assert at > 0
    while at > 0:  # older copies of its page, too
        content[at + chance.randrange(400)] ^= 1 << chance.randrange(8)
        at = content.find(wanted)
    disk._file.write_bytes(content)
    found = opened().get([key_of(i) for i in range(200)])
    assert set(found) == {key_of(i) for i in range(200) if i != 7}
    assert all(known.row.values[0, 0] == int.from_bytes(key[-4:], "big") for key, known in found.items())


def test_a_full_disk_turns_it_off_and_on_again(
    opened: Callable[..., LmdbDisk], caplog: pytest.LogCaptureFixture
) -> None:
    """Requests go on meanwhile; the log says so once."""
    now = [1000.0]
    disk = opened(clock=lambda: now[0])
    disk.put([(key_of(1), row_of(1))])
    written(disk)

    def full(transaction: Any) -> None:
        raise lmdb.Error("mdb_txn_commit: No space left on device")

    disk._later(full)
    wait_until(lambda: disk.state()["off"] == "the disk is full")
    for _ in range(2):
        assert not disk.get([key_of(1)])
        disk.put([(key_of(2), row_of(2))])
    assert caplog.text.count("off for a while: the disk is full") == 1
    now[0] += disk_module.OFF_S + 1
    disk.touch([key_of(1)])  # anything
    wait_until(lambda: disk.state()["off"] is None)
    assert disk.get([key_of(1)])


def test_a_disk_that_takes_nothing_at_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server starts without it."""
    opens = [OSError(errno.ENOSPC, "No space left on device")]
    original = LmdbDisk._open

    def open_(disk: LmdbDisk) -> None:
        if opens:
            raise opens.pop()
        original(disk)

    monkeypatch.setattr(LmdbDisk, "_open", open_)
    now = [0.0]
    disk = LmdbDisk(tmp_path, 16 * MB, clock=lambda: now[0])
    assert disk.state()["off"] == "the disk is full"
    now[0] += disk_module.OFF_S + 1
    disk.touch([])
    wait_until(lambda: disk.state()["off"] is None)
    disk.close()


def test_a_slow_disk_makes_nobody_wait(opened: Callable[..., LmdbDisk], monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be written in time is dropped."""
    monkeypatch.setattr(disk_module, "MOST_WAITING_BYTES", 10_000)
    disk = opened()
    entered, on = threading.Event(), threading.Event()

    def slow(transaction: Any) -> None:
        entered.set()
        assert on.wait(PATIENCE_S)

    disk._later(slow)
    assert entered.wait(PATIENCE_S)
    for i in range(20):
        disk.put([(key_of(i), row_of(i, 384))])
    on.set()
    written(disk)
    state = disk.state()
    assert 0 < state["entries"] < 10
    assert state["entries"] + state["dropped"] == 20


def test_memory_in_front_of_it(opened: Callable[..., LmdbDisk]) -> None:
    """What the memory has lost comes from the disk, and into the memory again."""
    disk = opened()
    cache = Cache(2000, disk)
    cache.put([(key_of(i), row_of(i)) for i in range(10)])
    written(disk)
    assert cache.state()["memory"]["entries"] < 10
    assert len(cache.get([key_of(i) for i in range(10)])) == 10
    assert cache.get([key_of(0)])
    assert key_of(0) in cache._kept
    cache.clear()
    written(disk)
    assert not cache.get([key_of(i) for i in range(10)])


WRITER = """
import sys, itertools, numpy as np
from pathlib import Path
from embedpool.cache import disk as disk_module
from embedpool.cache.disk import LmdbDisk
from tests.test_cache_on_disk import key_of, row_of
disk_module.WRITES_EVERY_S = 0.0
disk = LmdbDisk(Path(sys.argv[1]), 4 << 20)
disk.put([(key_of(0), row_of(0, 384))])
while not disk.get([key_of(0)]):
    pass
print("on", flush=True)
for at in itertools.cycle(range(0, 20_000, 50)):
    disk.put([(key_of(i), row_of(i, 384)) for i in range(at, at + 50)])
    for key, known in disk.get([key_of(i) for i in range(at, at + 50, 7)]).items():
        assert (known.row.values == int.from_bytes(key[-4:], "big")).all()
"""


def test_it_is_whole_after_a_kill_at_any_moment(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Two processes write and read at once; one is killed. A hundred times with --long."""
    chance = random.Random(5)
    pause = threading.Event()
    for _ in range(100 if request.config.getoption("--long") else 4):
        command = [sys.executable, "-c", WRITER, str(tmp_path)]
        both = [subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[1]) for _ in range(2)]
        try:
            for process in both:
                assert process.stdout is not None
                assert process.stdout.readline() == b"on\n"
            pause.wait(chance.random())
            os.kill(both[0].pid, signal.SIGKILL)
            both[0].wait(PATIENCE_S)
            pause.wait(0.2)
            assert both[1].poll() is None
        finally:
            for process in both:
                process.kill()
                process.communicate()
        disk = LmdbDisk(tmp_path, 4 * MB)
        found = disk.get([key_of(i) for i in range(20_000)])
        assert disk.state()["off"] is None
        disk.put([(key_of(20_001), row_of(20_001))])
        written(disk)
        assert disk.get([key_of(20_001)])
        disk.close()
        assert found
        assert all((known.row.values == int.from_bytes(key[-4:], "big")).all() for key, known in found.items())
    assert not list(tmp_path.glob("*.damaged-*"))
