"""What is shown while a model is opened."""

from __future__ import annotations

import threading

import pytest

from embedpool.cli import progress
from embedpool.cli.progress import Display, watched


def test_a_line_for_each_step_where_nobody_watches(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a pipe and in a log; a long step says now and then how far it is."""
    display = Display("m")
    for done in (0, 10, 20):
        display.show("download", done * 1_000_000, 90_000_000)
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.0)
    display.show("download", 30_000_000, 90_000_000)
    display.show("load", None, None)
    display.show("load", None, None)
    display.close()
    said = capsys.readouterr()
    assert said.err.splitlines() == ["m: download", "m: download, 30 of 90 MB", "m: load"]
    assert said.out == ""


def test_a_bar_on_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """With bytes where there are some; at the end it is gone."""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    display = Display("m")
    display.show("download", 45_000_000, 90_000_000)
    assert "m: download  50% |" in capsys.readouterr().err
    display.show("export", None, None)
    assert "m: export 00:00" in capsys.readouterr().err
    display.close()
    assert capsys.readouterr().err.rstrip(" ").endswith("\r")


def test_looking_may_fail(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that does not tell, or is gone, costs nobody the command."""
    monkeypatch.setattr(progress, "LOOK_EVERY_S", 0.001)
    found = iter([OSError("gone"), None, {"step": "load", "done_bytes": None, "total_bytes": None}])
    seen = threading.Event()

    def look() -> dict[str, None] | None:
        what = next(found, None)
        if what is None or isinstance(what, dict):
            if isinstance(what, dict):
                seen.set()
            return what
        raise what

    with watched("m", look):
        assert seen.wait(20)
    assert capsys.readouterr().err == "m: load\n"
