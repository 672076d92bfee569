"""Uploaded files and batches on the disk: a folder for each, named by an id of ours, below `paths.state_dir`.

A document (`file.json`, `batch.json`) is replaced as a whole, so any process may read it at any moment. A file exists
once its document does. Who asks sees what is its own.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock

from embedpool.errors import InvalidRequest, NotFound, StorageError
from embedpool.jobs.batch_input import MOST_LINES
from embedpool.jobs.durable import read_json, write_json

FILES, BATCHES = "files", "batches"
FILE, BATCH, CONTENT, CANCEL, PAUSED = "file.json", "batch.json", "content", "cancel", "paused"
OUTPUT, ERRORS = "output.jsonl", "errors.jsonl"
ID = re.compile(r"(file-|batch_)[0-9a-f]{24}\Z")
PRIVATE = 0o700  # they hold texts
MARK_BYTES = 1024  # of why a batch is paused, taken when it is made: on a full disk there is no more
SPARE_BYTES = 1 << 18  # of the disk, which files and results leave to documents, and to whatever lies beside them
UNFINISHED_S = 86400.0  # after which what was begun and not finished is given up
FINISHED = ("completed", "failed", "expired", "cancelled")

Document = dict[str, Any]


class Store:
    """Files and batches of all callers; `most_bytes` bounds what they take together. Thread-safe.

    A file that is to be run may hold `most_requests`.
    """

    def __init__(
        self, folder: Path, most_bytes: int, clock: Callable[[], float] = time.time, *, most_requests: int = MOST_LINES
    ) -> None:
        self.folder = folder
        self.clock = clock
        self.has_new = threading.Event()  # a batch was made by this process
        self.most_bytes = most_bytes
        self.most_requests = most_requests
        self._finished: set[str] = set()  # batches that are, and will stay so

    # --- files

    def new_file_id(self) -> str:
        """An id that nobody has."""
        return f"file-{self._new_name()}"

    def _new_name(self) -> str:
        """Names have the order in which they were made, and cannot be guessed."""
        return f"{int(self.clock() * 1e6):013x}"[-13:] + secrets.token_hex(6)[1:]

    @contextlib.contextmanager
    def receiving(self, file_id: str, most_bytes: int) -> Iterator[Path]:
        """Where the content of a new file goes; it is gone again unless `enter` follows.

        There is such a file, of `most_bytes`, which count as taken until its content is cut to what it is. Raises
        StorageError.
        """
        folder = self._folder_of(file_id)
        try:
            with _storing(), self._one_at_a_time():
                self.require_room(most_bytes)
                folder.mkdir(PRIVATE, parents=True)
                (folder / CONTENT).touch()
                os.truncate(folder / CONTENT, most_bytes)
            yield folder / CONTENT
        finally:
            if not (folder / FILE).exists():
                shutil.rmtree(folder, ignore_errors=True)

    @contextlib.contextmanager
    def _one_at_a_time(self) -> Iterator[None]:
        """Of all threads and processes: else two would find the same room."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder / "room.lock"):
            yield

    def enter(self, file_id: str, owner: str, *, filename: str, purpose: str, expires_at: int) -> Document:
        """The content is there: it is a file from now on. Raises StorageError."""
        folder = self._folder_of(file_id)
        found = {
            "id": file_id, "object": "file", "bytes": (folder / CONTENT).stat().st_size, "created_at": self.now(),
            "filename": filename, "purpose": purpose, "status": "processed", "status_details": None,
            "expires_at": expires_at,
        }  # fmt: skip
        with _storing():
            write_json(folder / FILE, {"owner": owner, "file": found})
        return found

    def adopt(self, path: Path, file_id: str, owner: str, *, filename: str, purpose: str, expires_at: int) -> None:
        """Make a file of one that lies elsewhere here; again, if that was cut off."""
        folder = self._folder_of(file_id)
        folder.mkdir(PRIVATE, parents=True, exist_ok=True)
        if path.exists():
            path.replace(folder / CONTENT)
        if not (folder / FILE).exists():
            self.enter(file_id, owner, filename=filename, purpose=purpose, expires_at=expires_at)

    def file(self, file_id: str, owner: str) -> Document:
        """Raises NotFound."""
        found: Document = self._read(file_id, FILE, owner)["file"]
        return found

    def content(self, file_id: str) -> Path:
        """Of a file that is known."""
        return self._folder_of(file_id) / CONTENT

    def files(self, owner: str) -> list[Document]:
        """Oldest first."""
        return sorted((found["file"] for found in self._all(FILES, FILE) if found["owner"] == owner), key=_age)

    def delete_file(self, file_id: str, owner: str) -> None:
        """Raises NotFound, and InvalidRequest while a batch reads it."""
        self.file(file_id, owner)
        if self.is_in_use(file_id):
            raise InvalidRequest("a batch that is not finished reads this file; cancel it first")
        shutil.rmtree(self._folder_of(file_id), ignore_errors=True)

    # --- batches

    def new_batch(self, owner: str, document: Document, *, lives_s: int) -> Document:
        """Enter a batch; the document gets an id. It and its results are kept so long after its end.

        Raises StorageError.
        """
        batch_id = f"batch_{self._new_name()}"
        folder = self._folder_of(batch_id)
        found = {**document, "id": batch_id}
        known = {
            "owner": owner, "batch": found, "at": {}, "lives_s": lives_s, "output_id": self.new_file_id(),
            "errors_id": self.new_file_id(),
        }  # fmt: skip
        try:
            with _storing():
                folder.mkdir(PRIVATE, parents=True)
                (folder / PAUSED).write_bytes(bytes(MARK_BYTES))
                write_json(folder / BATCH, known)
        except StorageError:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        self.has_new.set()
        return found

    def batch(self, batch_id: str, owner: str) -> Document:
        """As its owner sees it. Raises NotFound."""
        known = self._read(batch_id, BATCH, owner)
        return self._seen(known)

    def batches(self, owner: str) -> list[Document]:
        """Oldest first."""
        return sorted((self._seen(known) for known in self._all(BATCHES, BATCH) if known["owner"] == owner), key=_age)

    def cancel(self, batch_id: str, owner: str) -> Document:
        """Ask for its end; whoever runs it sees that. Raises NotFound, StorageError."""
        found = self.batch(batch_id, owner)
        if found["status"] not in FINISHED:
            with _storing():
                write_json(self._folder_of(batch_id) / CANCEL, {"at": self.now()})
            self.has_new.set()
        return self.batch(batch_id, owner)

    def _seen(self, known: Document) -> Document:
        found: Document = dict(known["batch"])
        if found["status"] not in FINISHED and (paused := self.paused(found["id"])):
            found |= {"paused": paused["says"], "requests_s": None, "seconds_left": None}
        if found["status"] not in FINISHED and (at := self.cancelled_at(found["id"])):
            found |= {"status": "cancelling", "cancelling_at": at}
        return found

    # --- for whoever runs batches

    def to_run(self) -> list[Document]:
        """What is known of batches that are not finished, the oldest first."""
        waiting = []
        for path in (self.folder / BATCHES).glob("*"):
            if path.name in self._finished:
                continue
            with contextlib.suppress(OSError, ValueError):
                known = read_json(path / BATCH)
                if known["batch"]["status"] in FINISHED:
                    self._finished.add(path.name)
                else:
                    waiting.append(known)
        return sorted(waiting, key=lambda known: _age(known["batch"]))

    def keep(self, known: Document) -> None:
        """Write down how far a batch is."""
        write_json(self.place_of(known["batch"]["id"]) / BATCH, known)

    def place_of(self, batch_id: str) -> Path:
        """The folder of a batch."""
        return self._folder_of(batch_id)

    def cancelled_at(self, batch_id: str) -> int | None:
        """Since when somebody wants it to end."""
        with contextlib.suppress(OSError, ValueError):
            at: int = read_json(self._folder_of(batch_id) / CANCEL)["at"]
            return at
        return None

    def pause(self, batch_id: str, says: str, wants_bytes: int = 0) -> None:
        """It goes on when there is room for so much; its owner sees why it does not. This takes no room itself."""
        told = json.dumps({"says": says[: MARK_BYTES // 8], "wants_bytes": wants_bytes}).encode()
        self._mark(batch_id, told)

    def go_on(self, batch_id: str) -> None:
        """It is paused no more."""
        if self.paused(batch_id):
            self._mark(batch_id, b"")

    def _mark(self, batch_id: str, told: bytes) -> None:
        with contextlib.suppress(OSError), (self._folder_of(batch_id) / PAUSED).open("r+b") as file:
            file.write(told.ljust(MARK_BYTES, b"\0"))

    def paused(self, batch_id: str) -> Document | None:
        """What `pause` was told."""
        with contextlib.suppress(OSError, ValueError):
            found: Document = json.loads((self._folder_of(batch_id) / PAUSED).read_bytes().rstrip(b"\0"))
            return found
        return None

    def is_in_use(self, file_id: str) -> bool:
        """Whether a batch that is not finished reads it."""
        return any(known["batch"]["input_file_id"] == file_id for known in self.to_run())

    def require_room(self, more_bytes: int) -> None:
        """Raises StorageError if so much more would be too much."""
        with contextlib.suppress(OSError):  # there is no folder yet
            free = shutil.disk_usage(self.folder).free
            if more_bytes + SPARE_BYTES > free:
                raise StorageError(f"the disk has {free} bytes left: {more_bytes} more do not fit")
        used = self.used_bytes()
        if used + more_bytes > self.most_bytes:
            raise StorageError(
                f"files and batches take {used} bytes, and may take {self.most_bytes} (limits.max_files_bytes): "
                f"{more_bytes} more do not fit; delete some"
            )

    def used_bytes(self) -> int:
        """Of all files and results."""
        total = 0
        for kind in (FILES, BATCHES):
            for path in (self.folder / kind).glob("*/*"):
                with contextlib.suppress(OSError):
                    total += path.stat().st_size
        return total

    def prune(self) -> None:
        """Delete files that have expired, batches whose time is over, and what an upload that was cut off has left."""
        now = self.now()
        for known in self._all(FILES, FILE):
            if known["file"]["expires_at"] <= now and not self.is_in_use(known["file"]["id"]):
                shutil.rmtree(self._folder_of(known["file"]["id"]), ignore_errors=True)
        for known in self._all(BATCHES, BATCH):
            if known["batch"]["status"] in FINISHED and known["ended_at"] + known["lives_s"] <= now:
                shutil.rmtree(self._folder_of(known["batch"]["id"]), ignore_errors=True)
        for kind, name in ((FILES, FILE), (BATCHES, BATCH)):
            for folder in (self.folder / kind).glob("*"):
                with contextlib.suppress(OSError):
                    if not (folder / name).exists() and folder.stat().st_mtime < now - UNFINISHED_S:
                        shutil.rmtree(folder, ignore_errors=True)

    def now(self) -> int:
        """In whole seconds, as the API has times."""
        return int(self.clock())

    # --- on the disk

    def _folder_of(self, some_id: str) -> Path:
        """Raises NotFound for what can be no id of ours."""
        if not ID.match(some_id):
            raise NotFound(f"no such file or batch: {some_id!r:.80}")
        return self.folder / (BATCHES if some_id.startswith("batch_") else FILES) / some_id

    def _read(self, some_id: str, name: str, owner: str) -> Document:
        with contextlib.suppress(OSError, ValueError):
            known = read_json(self._folder_of(some_id) / name)
            if known["owner"] == owner:
                return known
        raise NotFound(f"no such {name.partition('.')[0]}: {some_id!r:.80}")

    def _all(self, kind: str, name: str) -> Iterator[Document]:
        for path in (self.folder / kind).glob(f"*/{name}"):
            with contextlib.suppress(OSError, ValueError):
                yield read_json(path)


@contextlib.contextmanager
def _storing() -> Iterator[None]:
    """Raises StorageError where the disk takes nothing."""
    try:
        yield
    except OSError as error:
        raise StorageError(f"the disk takes no more: {error.strerror or error}") from None


def _age(document: Document) -> tuple[int, str]:
    return document["created_at"], document["id"]
