"""A file that several processes change."""

from __future__ import annotations

import errno
import io
import os
from pathlib import Path
from typing import Any

import pytest

from embedpool.config import files
from embedpool.errors import StorageError


@pytest.fixture
def mounted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that is mounted by itself: none can be put in its place."""
    path = tmp_path / "pool.yml"
    path.write_text("old and rather long\n")

    def busy(*_: Any) -> None:
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))

    monkeypatch.setattr(os, "replace", busy)
    return path


@pytest.mark.parametrize("text", ["new\n", "new and much longer than the one before it\n", ""])
def test_a_file_that_is_mounted_by_itself_is_written_in_its_place(mounted: Path, text: str) -> None:
    """It stays the same file, and nothing is left beside it."""
    inode = mounted.stat().st_ino
    files.replace(mounted, text)
    assert (mounted.read_text(), mounted.stat().st_ino) == (text, inode)
    assert [path.name for path in mounted.parent.iterdir()] == ["pool.yml"]


def test_its_old_text_returns_if_that_fails(mounted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk leaves it as it was."""
    write = files._write

    def failing(file: io.FileIO, content: bytes) -> None:
        write(file, content)
        if content == b"new\n":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files, "_write", failing)
    with pytest.raises(StorageError, match="nothing was changed"):
        files.replace(mounted, "new\n")
    assert mounted.read_text() == "old and rather long\n"
    assert [path.name for path in mounted.parent.iterdir()] == ["pool.yml"]
