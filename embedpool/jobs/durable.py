"""Documents and files on the disk that can be gone on with after a kill or a loss of power."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from embedpool.errors import InvalidRequest


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Put a document in the place of the one before; where that cannot be done nothing of it is left."""
    new = path.with_name(path.name + ".new")
    try:
        with new.open("w", encoding="utf-8") as file:
            file.write(json.dumps(document))
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            new.unlink(missing_ok=True)
        raise


def read_json(path: Path) -> dict[str, Any]:
    """A document. Raises OSError if there is none, and ValueError if it is none of ours."""
    found = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise ValueError(f"{path} is no object")
    return found


class GrowingFile:
    """A file that grows, and may be cut back."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.bytes = 0
        self._synced = 0
        self._file: IO[bytes] | None = None

    def open_at(self, size: int) -> None:
        """With so many bytes. Raises InvalidRequest if it is shorter than it was."""
        try:
            self._file = self.path.open("r+b" if size else "w+b")
        except FileNotFoundError:
            raise InvalidRequest(f"{self.path} is gone") from None
        self._file.seek(0, os.SEEK_END)
        if self._file.tell() < size:
            raise InvalidRequest(f"{self.path} is shorter than it was")
        self._file.truncate(size)
        self._file.seek(size)
        self.bytes = self._synced = size

    def append(self, content: bytes) -> None:
        """At the end."""
        assert self._file is not None
        self._file.write(content)
        self.bytes += len(content)

    def put(self, at: int, content: bytes) -> None:
        """Overwrite what is there."""
        assert self._file is not None
        self._file.seek(at)
        self._file.write(content)
        self._file.seek(self.bytes)

    def sync(self) -> int:
        """To the disk; how many bytes there are."""
        assert self._file is not None
        self._file.flush()
        os.fsync(self._file.fileno())
        self._synced = self.bytes
        return self.bytes

    def close(self, size: int | None = None) -> None:
        """Cut back to a size, or to what was synced: the rest takes no room. It may be closed already."""
        if self._file is not None:
            file, self._file = self._file, None
            with contextlib.suppress(OSError):  # the disk may be too full for what it holds still
                file.close()
            with contextlib.suppress(OSError):
                os.truncate(self.path, self._synced if size is None else size)
