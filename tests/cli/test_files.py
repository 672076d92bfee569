"""What `embedpool embed --in` shows while it works."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from embedpool.cli import main
from embedpool.cli.files import _shown
from embedpool.jobs import speed
from embedpool.jobs.file_job import Progress

JOB: Any = SimpleNamespace(total_bytes=1000)


def test_several_files_as_a_shell_makes_them_of_a_glob(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each is read; one that is not there is named."""
    (tmp_path / "a.txt").write_text("a\n")
    missing = str(tmp_path / "b.txt")
    for command in ("embed", "rerank"):
        assert main([command, "--in", str(tmp_path / "a.txt"), missing, "--out", str(tmp_path / "out.npy")]) == 1
        assert f"no file is {missing}" in capsys.readouterr().err


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Inputs, their rate, the time left and failures; what an earlier run has done is not of the rate."""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setattr(speed.Speed.__init__, "__defaults__", (iter([0.0, 10.0]).__next__,))
    with _shown(JOB) as tell:
        tell(Progress(rows=1000, bytes=500))
        tell(Progress(rows=1200, bytes=600, failed=3))
    shown = capsys.readouterr().err
    assert "1,000 inputs" in shown
    assert "1,200 inputs, 20/s, 00:40 left, 3 failed" in shown
    assert "60%" in shown


def test_it_is_silent_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    """A log holds no bars."""
    with _shown(JOB) as tell:
        tell(Progress(rows=1000, bytes=500))
    assert capsys.readouterr().err == ""
