"""The cache's entries on a disk, in LMDB: several processes share one file, which is whole after any of them is killed.

Tables: `rows` (key → row), `stamps` (key → when it was last asked for), `ages` (stamp and key → nothing: the order in
which entries leave), `scopes` (scope → the models that have it, as JSON). One thread of the process writes, a few times
a second; readers wait for nobody.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import logging
import queue
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from typing_extensions import override

from embedpool.cache.row_bytes import decoded, encoded
from embedpool.errors import ConfigError
from embedpool.pool.cache import Disk, Entry
from embedpool.pool.request import Known
from embedpool.tasks.item import KEY_BYTES

logger = logging.getLogger(__name__)

FILE = "rows.lmdb"
STAMP = struct.Struct(">Q")  # ms; its bytes sort as it does
MOST_FULL = 0.75  # of the file: a transaction needs free pages for what it changes
LARGEST_WRITE = 1 / 32  # of the file, in one transaction
WRITES_EVERY_S = 0.25
MOST_WAITING_BYTES = 32 << 20  # rows that wait to be written; further ones are dropped
AT_ONCE = 512  # entries that leave in one transaction at most
EVICTED_AT_ONCE = 1 / 64  # of all, for want of room
OFF_S = 30.0  # after a fault of the disk
MOST_READERS = 1024

Task = Callable[[Any], None]  # given the write transaction


class LmdbDisk(Disk):
    """Entries in at most `max_bytes`; those least recently asked for leave first, about."""

    def __init__(self, folder: Path, max_bytes: int, clock: Callable[[], float] = time.time) -> None:
        """Raises ConfigError without the package lmdb."""
        try:
            import lmdb
        except ImportError:
            raise ConfigError("cache.disk_mb needs the package lmdb: pip install 'embedpool[cache]'") from None
        self._lmdb = lmdb
        self._file = folder / FILE
        self._max_bytes = max_bytes
        self._clock = clock
        self._env: Any = None
        self._tables: dict[str, Any] = {}
        self._trouble: str | None = None  # why it is off
        self._off_until = 0.0
        self._evicted = self._dropped = 0
        self._waiting: queue.SimpleQueue[tuple[Task, int] | None] = queue.SimpleQueue()
        self._waiting_bytes = 0
        self._lock = threading.Lock()  # guards `_waiting_bytes` and that the environment stays open for a reader
        self._readers = 0
        self._is_damaged = False
        self._inode = 0  # of the file that is or was open
        self._open_again()
        self._writer = threading.Thread(target=self._write, name="cache-disk", daemon=True)
        self._writer.start()

    # --- reading, on requests' threads

    @override
    def get(self, keys: Sequence[bytes]) -> dict[bytes, Known]:
        found: dict[bytes, Known] = {}
        with self._reading() as env:
            if env is None:
                return found
            try:
                with env.begin(db=self._tables["rows"], buffers=True) as transaction:
                    for key in keys:
                        value = transaction.get(key)
                        if value is not None and (known := decoded(key, value)):
                            found[key] = known
            except self._lmdb.Error as error:
                self._later(_raising(error))
        return found

    @contextlib.contextmanager
    def _reading(self) -> Iterator[Any]:
        """The environment, which stays open meanwhile; None if it is off."""
        with self._lock:
            env = self._env
            self._readers += env is not None
        try:
            yield env
        finally:
            if env is not None:
                with self._lock:
                    self._readers -= 1

    # --- writing, in the one thread

    @override
    def put(self, entries: Sequence[Entry]) -> None:
        written = [(key, encoded(key, known)) for key, known in entries]
        size_bytes = sum(len(key) + len(value) for key, value in written)
        with self._lock:
            if self._env is None or self._waiting_bytes + size_bytes > MOST_WAITING_BYTES:
                self._dropped += len(written)
                return
        self._later(lambda transaction: self._keep(transaction, written), size_bytes)

    def _keep(self, transaction: Any, entries: Sequence[tuple[bytes, bytes]]) -> None:
        for key, value in entries:
            transaction.put(key, value, db=self._tables["rows"])
            self._stamp(transaction, key)

    @override
    def touch(self, keys: Sequence[bytes]) -> None:
        def stamp(transaction: Any) -> None:
            for key in keys:
                if transaction.get(key, db=self._tables["stamps"]) is not None:
                    self._stamp(transaction, key)

        self._later(stamp)

    def _stamp(self, transaction: Any, key: bytes) -> None:
        """It is asked for now."""
        now = STAMP.pack(int(self._clock() * 1000))
        before = transaction.replace(key, now, db=self._tables["stamps"])
        if before is not None:
            transaction.delete(before + key, db=self._tables["ages"])
        transaction.put(now + key, b"", db=self._tables["ages"])

    @override
    def keep_only(self, models: Mapping[str, bytes | None]) -> None:
        def prune(transaction: Any) -> None:
            known: dict[bytes, set[str]] = {scope: set() for scope in self._scopes(transaction)}
            for scope, value in transaction.cursor(self._tables["scopes"]):
                known[bytes(scope)] = set(json.loads(value))
            for model, scope in models.items():
                if scope is not None:
                    known.setdefault(scope, set()).add(model)
            for scope, names in known.items():
                left = {name for name in names if name in models and models[name] in (None, scope)}
                if left:
                    transaction.put(scope, json.dumps(sorted(left)).encode(), db=self._tables["scopes"])
                else:
                    self._forget(scope, transaction)
                    transaction.delete(scope, db=self._tables["scopes"])

        self._later(prune)

    def _scopes(self, transaction: Any) -> Iterator[bytes]:
        """Of all entries."""
        cursor = transaction.cursor(self._tables["stamps"])
        there = cursor.first()
        while there:
            scope = bytes(cursor.key())[:KEY_BYTES]
            yield scope
            there = cursor.set_range(scope + b"\xff" * (2 * KEY_BYTES + 1))

    @override
    def clear(self, model: str | None) -> None:
        def forget(transaction: Any) -> None:
            for scope, names in list(transaction.cursor(self._tables["scopes"])):
                if model in json.loads(names):
                    self._forget(bytes(scope), transaction)

        self._later(self._forget_all if model is None else forget)

    def _forget_all(self, transaction: Any) -> None:
        for name in ("rows", "stamps", "ages"):
            transaction.drop(self._tables[name], delete=False)

    def _forget(self, scope: bytes, transaction: Any) -> None:
        """Every entry of a scope; of many the rest in a later transaction."""
        cursor = transaction.cursor(self._tables["stamps"])
        for _ in range(AT_ONCE):
            if not cursor.set_range(scope) or not bytes(cursor.key()).startswith(scope):
                return
            self._delete(transaction, bytes(cursor.key()), bytes(cursor.value()))
        self._later(functools.partial(self._forget, scope))

    def _delete(self, transaction: Any, key: bytes, stamp: bytes) -> None:
        transaction.delete(key, db=self._tables["rows"])
        transaction.delete(key, db=self._tables["stamps"])
        transaction.delete(stamp + key, db=self._tables["ages"])

    def _later(self, task: Task, size_bytes: int = 0) -> None:
        with self._lock:
            self._waiting_bytes += size_bytes
        self._waiting.put((task, size_bytes))

    def _write(self) -> None:
        ends = False
        while not ends:
            tasks = [self._waiting.get()]
            if tasks[0] is not None:
                time.sleep(WRITES_EVERY_S)
            with contextlib.suppress(queue.Empty):
                while True:
                    tasks.append(self._waiting.get_nowait())
            ends = None in tasks
            self._do([task for task in tasks if task is not None])

    def _do(self, tasks: Sequence[tuple[Task, int]]) -> None:
        try:
            if self._env is None and self._clock() >= self._off_until:
                self._open_again()
            for some in self._portions(tasks):
                if self._env is not None:
                    self._in_transaction(some)
        except Exception as error:
            self._fault(error)
        finally:
            with self._lock:
                self._waiting_bytes -= sum(size_bytes for _, size_bytes in tasks)

    def _portions(self, tasks: Sequence[tuple[Task, int]]) -> Iterator[list[Task]]:
        """As many of them at once as are no large part of the file."""
        portion: list[Task] = []
        portion_bytes = 0
        for task, size_bytes in tasks:
            if portion and portion_bytes + size_bytes > LARGEST_WRITE * self._max_bytes:
                yield portion
                portion, portion_bytes = [], 0
            portion.append(task)
            portion_bytes += size_bytes
        yield portion

    def _in_transaction(self, tasks: Sequence[Task]) -> None:
        """All of these, and as many old entries leave as must; what finds no room is tried once more after that."""
        for _ in range(2):
            try:
                with self._env.begin(write=True) as transaction:
                    for task in tasks:
                        task(transaction)
                while self._is_too_full() and self._evict():
                    pass
                return
            except self._lmdb.MapFullError:
                self._env.reader_check()  # one that was killed holds on to pages
                self._evict()
        self._dropped += 1

    def _is_too_full(self) -> bool:
        return self._used_bytes() > MOST_FULL * self._max_bytes

    def _evict(self) -> bool:
        """Let the oldest entries go; whether there were any."""
        with self._env.begin(write=True) as transaction:
            cursor = transaction.cursor(self._tables["ages"])
            entries = transaction.stat(self._tables["ages"])["entries"]
            for count in range(min(max(int(entries * EVICTED_AT_ONCE), 16), AT_ONCE)):
                if not cursor.first():
                    return count > 0
                oldest = bytes(cursor.key())
                self._delete(transaction, oldest[STAMP.size :], oldest[: STAMP.size])
                self._evicted += 1
        return True

    def _used_bytes(self) -> int:
        """Of pages that hold anything."""
        with self._env.begin() as transaction:
            stats = [transaction.stat(table) for table in self._tables.values()]
        pages = sum(stat["branch_pages"] + stat["leaf_pages"] + stat["overflow_pages"] for stat in stats)
        return int(pages * stats[0]["psize"])

    # --- its file

    def _open_again(self) -> None:
        """Open the file; one that is damaged is set aside. Else it is off for a while, with the reason."""
        try:
            if self._is_damaged:
                self._set_aside(self._trouble)
            try:
                self._open()
            except self._damages as error:
                self._inode = self._file.stat().st_ino
                self._set_aside(error)
                self._open()
        except (OSError, self._lmdb.Error) as error:
            self._fault(error)
            return
        if self._trouble:
            logger.info("the cache on the disk is on again")
        self._trouble, self._is_damaged = None, False

    @property
    def _damages(self) -> tuple[type[Exception], ...]:
        of = self._lmdb
        return of.InvalidError, of.CorruptedError, of.VersionMismatchError, of.PageNotFoundError, of.PanicError

    def _open(self) -> None:
        self._file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if self._file.exists() and self._file.stat().st_size > self._max_bytes:  # a file of LMDB's never shrinks
            logger.warning("the cache's file is larger than cache.disk_mb by now: it is begun anew")
            self._file.unlink()
            self._file.with_name(f"{FILE}-lock").unlink(missing_ok=True)
        env = self._lmdb.open(
            str(self._file), subdir=False, map_size=self._max_bytes, max_dbs=4, max_readers=MOST_READERS, mode=0o600
        )
        try:
            info, page = env.info(), env.stat()["psize"]
            if (info["last_pgno"] + 1) * page > self._file.stat().st_size:
                raise self._lmdb.CorruptedError("the file has been cut off")  # reading on would end the process
            env.reader_check()
            self._tables = {name: env.open_db(name.encode()) for name in ("rows", "stamps", "ages", "scopes")}
        except BaseException:
            env.close()
            raise
        self._inode = self._file.stat().st_ino
        self._env = env

    def _set_aside(self, error: object) -> None:
        """The file and its table of locks, unless another process has done so and begun a new one."""
        if not self._file.exists() or self._file.stat().st_ino != self._inode:
            return
        aside = self._file.with_name(f"{FILE}.damaged-{int(self._clock())}")
        self._file.replace(aside)
        with contextlib.suppress(FileNotFoundError):
            self._file.with_name(f"{FILE}-lock").replace(aside.with_name(f"{aside.name}-lock"))
        logger.error("the cache's file is damaged (%s); it is set aside as %s, and a new one begun", error, aside.name)

    def _fault(self, error: Exception) -> None:
        """The disk does not do what it should: it is off for a while."""
        is_full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
        reason = "the disk is full" if is_full else f"{type(error).__name__}: {error}"
        with self._lock:
            env, self._env = self._env, None
            is_news, self._trouble = self._trouble is None, reason
            self._is_damaged = isinstance(error, self._damages)
            self._off_until = self._clock() + OFF_S
        if is_news:
            logger.warning("the cache on the disk is off for a while: %s", reason)
        self._end(env)

    def _end(self, env: Any) -> None:
        """Close what is nobody's any more, when the last reader has left it."""
        if env is not None:
            while self._readers:
                time.sleep(0.01)
            env.close()

    @override
    def state(self) -> dict[str, Any]:
        found: dict[str, Any] = {"max_bytes": self._max_bytes, "evicted": self._evicted, "dropped": self._dropped}
        found |= {"entries": 0, "bytes": 0, "oldest_seconds": 0.0, "off": self._trouble}
        with self._reading() as env:
            if env is not None:
                try:
                    found["bytes"] = self._used_bytes()
                    with env.begin() as transaction:
                        found["entries"] = transaction.stat(self._tables["rows"])["entries"]
                        cursor = transaction.cursor(self._tables["ages"])
                        if cursor.first():
                            (stamp,) = STAMP.unpack(bytes(cursor.key())[: STAMP.size])
                            found["oldest_seconds"] = round(max(self._clock() - stamp / 1000, 0.0), 1)
                except self._lmdb.Error as error:
                    found["off"] = str(error)
        return found

    @override
    def close(self) -> None:
        self._waiting.put(None)
        self._writer.join()
        with self._lock:
            env, self._env = self._env, None
        self._end(env)


def _raising(error: Exception) -> Task:
    """What a reader found, for the thread that writes to hear of."""

    def task(transaction: Any) -> None:
        raise error

    return task
