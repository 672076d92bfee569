"""A file that several processes change: one at a time, and always whole. And files that take no disk."""

from __future__ import annotations

import contextlib
import errno
import io
import os
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from embedpool.errors import StorageError

LOCK_TIMEOUT_S = 30


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the file's lock. Raises StorageError if it cannot be had."""
    target = _target(path)
    try:
        lock = FileLock(f"{target}.lock", timeout=LOCK_TIMEOUT_S)
        lock.acquire()
    except Timeout:
        raise StorageError(f"{target} is locked by another process for over {LOCK_TIMEOUT_S} s") from None
    except OSError as error:
        raise StorageError(f"{target} cannot be locked: {error}") from None
    try:
        yield
    finally:
        lock.release()


def stamp(path: Path) -> tuple[int, ...] | None:
    """Another one when the file has changed; None if there is no file."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


def replace(path: Path, text: str, *, new_mode: int | None = None) -> None:
    """Put new text in the place of a file whose lock is held; `new_mode` is for one that may not exist yet.

    Raises StorageError.
    """
    target = _target(path)
    temporary = target.with_name(f".{target.name}.tmp")  # one name: what a killed process left goes with the next write
    try:
        mode = target.stat().st_mode if new_mode is None or target.exists() else new_mode
        temporary.unlink(missing_ok=True)
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, mode & 0o7777)
        try:
            os.replace(temporary, target)
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            _overwrite(target, text.encode())
            temporary.unlink()
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise StorageError(f"{target} cannot be written: {error}; nothing was changed") from None


def _overwrite(target: Path, new: bytes) -> None:
    """Write into a file that none can replace, since it is mounted by itself. If that fails its old text returns."""
    old = target.read_bytes()
    with target.open("r+b", buffering=0) as file:
        try:
            _write(file, new)
        except OSError:
            _write(file, old)
            raise


def _write(file: io.FileIO, content: bytes) -> None:
    file.seek(0)
    if file.write(content) != len(content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    file.truncate()
    os.fsync(file.fileno())


def _target(path: Path) -> Path:
    """The file behind a symlink: replacing the link itself would cut it off from where it points."""
    return Path(os.path.realpath(path))


def folder_in_memory() -> str | None:
    """Where files take memory and no disk, if the system has that. They need names that nobody can guess."""
    folder = "/dev/shm"  # noqa: S108
    return folder if os.access(folder, os.W_OK) else None
