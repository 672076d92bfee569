from __future__ import annotations

import itertools
import os
import shutil
import tempfile
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from watchdog.events import (
    FileClosedNoWriteEvent,
    FileModifiedEvent,
    FileMovedEvent,
    FileOpenedEvent,
    FileSystemEvent,
)

from embedpool.config import watch as watch_module
from embedpool.config.watch import Watch

WAIT_S = 20  # how long a broken watch may keep a test from failing
NEVER_S = 3600


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "pool.yml"
    path.write_text("one")
    return path


class Calls:
    """A callback that counts, and can be waited for."""

    def __init__(self, fail: bool = False) -> None:
        self.count = 0
        self.called = threading.Event()
        self._fail = fail

    def __call__(self) -> None:
        self.count += 1
        self.called.set()
        if self._fail:
            raise RuntimeError("callback broke")


def put(path: Path, content: bytes | None) -> None:
    if content is None:
        path.unlink(missing_ok=True)
    else:
        path.write_bytes(content)


# --- one look, on the test's own thread


@settings(deadline=None)
@given(st.lists(st.none() | st.sampled_from([b"", b"one", b"two", b"\xff"]), min_size=1, max_size=12))
def test_the_callback_comes_exactly_when_the_content_differs(contents: list[bytes | None]) -> None:
    """Written anew with the same bytes is no change; gone, back and emptied are changes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pool.yml"
        put(path, contents[0])
        calls = Calls()
        watch = Watch(path, calls)
        for before, after in itertools.pairwise(contents):
            put(path, after)
            seen = calls.count
            assert watch.check_once() == (before != after)
            assert calls.count - seen == (before != after)
            assert not watch.check_once()


def test_what_was_followed_since_the_last_look_counts(file: Path) -> None:
    """A file that is put back right after a change that somebody else saw is followed, although it looks unchanged."""
    calls = Calls()
    behind = [True, False]
    watch = Watch(file, calls, is_behind=lambda content: content == b"one" and behind.pop(0))
    assert watch.check_once()
    assert calls.count == 1
    assert not watch.check_once()


def test_a_failing_callback_does_not_end_the_watch(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It is logged, and the next change is noticed again."""
    calls = Calls(fail=True)
    watch = Watch(file, calls)
    for number in (1, 2):
        file.write_text(str(number))
        assert watch.check_once()
        assert calls.count == number
    assert [r.levelname for r in caplog.records if "pool.yml" in r.getMessage()] == ["ERROR"] * 2


def test_a_swapped_link_is_a_change(tmp_path: Path) -> None:
    """Kubernetes mounts a config by swapping a link to a folder."""
    for name in ("v1", "v2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "pool.yml").write_text(name)
    (tmp_path / "..data").symlink_to("v1")
    (tmp_path / "pool.yml").symlink_to("..data/pool.yml")
    calls = Calls()
    watch = Watch(tmp_path / "pool.yml", calls)
    (tmp_path / "new").symlink_to("v2")
    os.replace(tmp_path / "new", tmp_path / "..data")
    assert watch.check_once()
    assert calls.count == 1


@pytest.mark.parametrize(
    ("event", "noticed"),
    [
        (FileModifiedEvent("/x/pool.yml"), True),
        (FileMovedEvent("/x/.pool.yml.swp", "/x/pool.yml"), True),
        (FileMovedEvent("/x/..data_tmp", "/x/..data"), True),
        (FileModifiedEvent("/x/other.yml"), False),
        (FileOpenedEvent("/x/pool.yml"), False),
        (FileClosedNoWriteEvent("/x/pool.yml"), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_only_changes_of_the_file_wake_the_watch(event: FileSystemEvent, noticed: bool) -> None:
    """A save by rename counts; another file, or our own reading, does not."""
    woken = threading.Event()
    watch_module._SetEvent(Path("/x/pool.yml"), woken).on_any_event(event)
    assert woken.is_set() == noticed


# --- with its threads


@pytest.mark.parametrize("save", ["in place", "by rename"])
@pytest.mark.parametrize(("observer", "poll_interval_s"), [("native", NEVER_S), ("polling", 0.05)])
def test_a_saved_file_is_noticed(file: Path, observer: str, poll_interval_s: float, save: str) -> None:
    """By the system's file events alone, or by polling; whichever way an editor saves."""
    calls = Calls()
    watch = Watch(file, calls, observer=observer, poll_interval_s=poll_interval_s, debounce_ms=0)
    watch.start()
    try:
        if save == "in place":
            file.write_text("two")
        else:
            other = file.with_name(".pool.yml.tmp")
            other.write_text("two")
            os.replace(other, file)
        assert calls.called.wait(WAIT_S)
    finally:
        watch.stop()


def test_the_target_of_a_link_is_watched_too(tmp_path: Path) -> None:
    """A pool.yml that is a link is followed to the folder where it is edited."""
    (tmp_path / "real").mkdir()
    real = tmp_path / "real" / "models.yml"
    real.write_text("one")
    link = tmp_path / "pool.yml"
    link.symlink_to(real)
    calls = Calls()
    watch = Watch(link, calls, poll_interval_s=NEVER_S, debounce_ms=0)
    watch.start()
    try:
        real.write_text("two")
        assert calls.called.wait(WAIT_S)
    finally:
        watch.stop()


def test_without_file_events_the_file_is_still_looked_at(
    file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Exhausted inotify limits are logged, and a look every interval takes over."""

    class Exhausted(watch_module.PollingObserver):
        def start(self) -> None:
            raise OSError(28, "inotify watch limit reached")

    monkeypatch.setattr(watch_module, "Observer", Exhausted)
    calls = Calls()
    watch = Watch(file, calls, poll_interval_s=0.02)
    watch.start()
    try:
        assert "inotify watch limit reached" in caplog.text
        file.write_text("two")
        assert calls.called.wait(WAIT_S)
    finally:
        watch.stop()


def test_a_recreated_folder_does_not_end_the_watch(tmp_path: Path) -> None:
    """The folder may be deleted and made anew: the regular look finds the new file."""
    folder = tmp_path / "conf"
    folder.mkdir()
    file = folder / "pool.yml"
    file.write_text("one")
    calls = Calls()
    watch = Watch(file, calls, poll_interval_s=0.02, debounce_ms=0)
    watch.start()
    try:
        shutil.rmtree(folder)
        assert calls.called.wait(WAIT_S)
        calls.called.clear()
        folder.mkdir()
        file.write_text("two")
        assert calls.called.wait(WAIT_S)
    finally:
        watch.stop()


def test_a_link_into_a_missing_folder_leaves_no_thread_behind(tmp_path: Path) -> None:
    """Where only one of the two folders can be watched, `stop` still ends every thread."""
    link = tmp_path / "pool.yml"
    link.symlink_to(tmp_path / "missing" / "pool.yml")
    for _ in range(4):  # which folder comes first is up to chance
        before = set(threading.enumerate())
        watch = Watch(link, Calls(), poll_interval_s=NEVER_S)
        watch.start()
        watch.stop()
        left = set(threading.enumerate()) - before
        for thread in left:
            if hasattr(thread, "stop"):
                thread.stop()
        assert not left


def test_a_watch_can_be_stopped_before_it_was_started(file: Path) -> None:
    """Stopping is safe at any moment, also twice."""
    Watch(file, Calls()).stop()
    watch = Watch(file, Calls(), poll_interval_s=NEVER_S)
    watch.start()
    watch.stop()
    watch.stop()
