"""Rows that were computed before, by what decides their numbers: in memory, and behind that on the disk.

A key is put together from the scope (whose numbers they are, and what computed them, in which type), the owner (the
caller whose request made the entry, or nobody where all share), and the item's own key. Each is a hash of fixed length,
so no two can be joined to the same key. An entry is a row as a driver gave it, before its task's `finish`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from embedpool.pool.request import Known, Request
from embedpool.tasks.driver import Facts
from embedpool.tasks.item import KEY_BYTES, Item

logger = logging.getLogger(__name__)

ENTRY_BYTES = 600  # about what an entry takes in memory beside its numbers
LOOK_EVERY_S = 1.0  # whether another process has cleared the cache
TOUCH_EVERY_S = 600.0  # how often the disk hears of an entry that is asked for again and again
NOBODY = bytes(KEY_BYTES)
NOT_KEPT = ("tokens",)  # rows as long as their texts, which are seldom asked for again: they would drive all others out

Entry = tuple[bytes, Known]


def scope_of(facts: Facts) -> bytes:
    """Equal where two open drivers give the same numbers."""
    return hashlib.blake2b(json.dumps([facts.space, facts.runtime]).encode(), digest_size=KEY_BYTES).digest()


class Disk(Protocol):
    """Keeps entries on a disk. None of its methods raises, and `put` waits for nothing."""

    def get(self, keys: Sequence[bytes]) -> dict[bytes, Known]:
        """The entries that are there."""

    def put(self, entries: Sequence[Entry]) -> None:
        """Keep these, a moment later."""

    def touch(self, keys: Sequence[bytes]) -> None:
        """They were asked for just now."""

    def keep_only(self, models: Mapping[str, bytes | None]) -> None:
        """Forget the scopes that none of these models has; one whose scope is not known yet keeps those it had."""

    def clear(self, model: str | None) -> None:
        """Forget the entries of the scopes that a model has or had, open or not; None: of all."""

    def state(self) -> dict[str, Any]:
        """For /status."""

    def close(self) -> None:
        """Write what waits."""


@dataclasses.dataclass(slots=True)
class _Kept:
    known: Known
    size_bytes: int
    made_at: float  # on the clock
    touched_at: float  # when the disk heard last that it is asked for


class Cache:
    """Thread-safe, of all models of a pool. The memory holds `memory_bytes`, those least recently used leave first."""

    def __init__(
        self,
        memory_bytes: int = 0,
        disk: Disk | None = None,
        *,
        shared: bool = False,
        cleared_file: Path | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Where callers do not share entries (`shared`), each finds only those that its own requests made."""
        self.disk = disk
        self.memory_bytes = memory_bytes
        self._shared = shared
        self._clock = clock
        self._lock = threading.Lock()  # guards everything below; held for a few instructions a row
        self._kept: OrderedDict[bytes, _Kept] = OrderedDict()
        self._bytes = self._evicted = 0
        self._cleared_file = cleared_file
        self._cleared_ns = self._cleared_at_ns()
        self._looked_at = clock()

    @property
    def is_on(self) -> bool:
        """Whether anything is kept at all."""
        return self.memory_bytes > 0 or self.disk is not None

    def key(self, scope: bytes, caller: str, item: Item) -> bytes:
        """Of an item of this caller."""
        owner = NOBODY
        if caller and not self._shared:
            owner = hashlib.blake2b(caller.encode(), digest_size=KEY_BYTES).digest()
        return scope + owner + item.key

    def get(self, keys: Sequence[bytes]) -> dict[bytes, Known]:
        """The entries that are there."""
        self._follow_others()
        found: dict[bytes, Known] = {}
        touched: list[bytes] = []
        now = self._clock()
        with self._lock:
            for key in keys:
                if kept := self._kept.get(key):
                    self._kept.move_to_end(key)
                    found[key] = kept.known
                    if self.disk is not None and now - kept.touched_at > TOUCH_EVERY_S:
                        kept.touched_at = now
                        touched.append(key)
        if self.disk is None:
            return found
        if touched:
            self.disk.touch(touched)
        if len(found) < len(keys) and (rest := [key for key in keys if key not in found]):
            on_disk = self.disk.get(rest)
            if on_disk:
                self._put(list(on_disk.items()))
                self.disk.touch(list(on_disk))
                found.update(on_disk)
        return found

    def put(self, entries: Sequence[Entry]) -> None:
        """Keep these rows."""
        self._put(entries)
        if self.disk is not None:
            self.disk.put(entries)

    def _put(self, entries: Sequence[Entry]) -> None:
        now = self._clock()
        with self._lock:
            for key, known in entries:
                arrays = known.row.arrays().values()
                size_bytes = ENTRY_BYTES + sum(array.nbytes for array in arrays)
                if size_bytes > self.memory_bytes:
                    continue
                for array in arrays:
                    array.flags.writeable = False  # from now on several requests may read it
                if before := self._kept.pop(key, None):
                    self._bytes -= before.size_bytes
                self._kept[key] = _Kept(known, size_bytes, now, now)
                self._bytes += size_bytes
            while self._bytes > self.memory_bytes:
                _, oldest = self._kept.popitem(last=False)
                self._bytes -= oldest.size_bytes
                self._evicted += 1

    def keep_only(self, models: Mapping[str, bytes | None]) -> None:
        """Forget the scopes that none of these models has any more."""
        if None not in models.values():
            self._forget(lambda key: key[:KEY_BYTES] not in models.values())
        if self.disk is not None:
            self.disk.keep_only(models)

    def clear(self, model: str | None = None, scope: bytes | None = None) -> None:
        """Forget the entries of a model, whose open drivers have this scope, if any are; without a model all."""
        self._forget(lambda key: model is None or key[:KEY_BYTES] == scope)
        if self.disk is not None:
            self.disk.clear(model)
        if self._cleared_file is not None:
            try:
                self._cleared_file.parent.mkdir(parents=True, exist_ok=True)
                self._cleared_file.touch()
                self._cleared_ns = self._cleared_at_ns()
            except OSError as error:
                logger.warning("other workers do not hear that the cache was cleared: %s", error)

    def _forget(self, is_meant: Callable[[bytes], bool]) -> None:
        with self._lock:
            gone = [key for key in self._kept if is_meant(key)]
            for key in gone:
                self._bytes -= self._kept.pop(key).size_bytes

    def _follow_others(self) -> None:
        """Forget all if another process has cleared the cache."""
        if self._cleared_file is None or (now := self._clock()) - self._looked_at < LOOK_EVERY_S:
            return
        self._looked_at = now
        if (cleared_ns := self._cleared_at_ns()) != self._cleared_ns:
            self._cleared_ns = cleared_ns
            self._forget(lambda key: True)

    def _cleared_at_ns(self) -> int:
        try:
            return self._cleared_file.stat().st_mtime_ns if self._cleared_file else 0
        except OSError:
            return 0

    def state(self) -> dict[str, Any]:
        """Of each layer: what it holds and may hold, what has left it for want of room, how old the oldest entry is."""
        self._follow_others()
        with self._lock:
            oldest = next(iter(self._kept.values()), None)
            memory: dict[str, Any] = {
                "entries": len(self._kept),
                "bytes": self._bytes,
                "max_bytes": self.memory_bytes,
                "evicted": self._evicted,
                "oldest_seconds": round(self._clock() - oldest.made_at, 1) if oldest else 0.0,
            }
        return {"memory": memory, "disk": self.disk.state() if self.disk is not None else None}

    def close(self) -> None:
        """Write what waits for the disk."""
        if self.disk is not None:
            self.disk.close()


class ModelCache:
    """What one model asks of the cache. `scope` is that of its open drivers, None before the first is open."""

    def __init__(self, cache: Cache, looked_up: Callable[[int, int], None] = lambda hits, misses: None) -> None:
        """`looked_up` is told how many rows of a request were known, and how many were not."""
        self._cache = cache
        self._looked_up = looked_up
        self.scope: bytes | None = None
        self._wanted = "auto"
        self._is_cacheable = False

    @property
    def is_on(self) -> bool:
        """Whether this model's rows are kept: as its spec says, or its driver."""
        return self._cache.is_on and (self._is_cacheable if self._wanted == "auto" else self._wanted == "on")

    def follow(self, wanted: str) -> None:
        """What the model's spec says: on, off, or auto, which leaves it to the driver."""
        self._wanted = wanted

    def opened(self, facts: Facts) -> None:
        """A driver of the model is open."""
        self._is_cacheable = facts.cacheable
        self.scope = scope_of(facts)

    def find(self, request: Request, items: Sequence[Item]) -> list[Item]:
        """Give the request the rows that are known; the items that are left."""
        call, scope = request.call, self.scope
        if scope is None or not self.is_on or not call.reads_cache or request.task.name in NOT_KEPT:
            return list(items)
        keys = [self._cache.key(scope, call.caller, item) for item in items]
        found = self._cache.get(keys)
        hits = sum(key in found for key in keys) if found else 0
        self._looked_up(hits, len(keys) - hits)
        if not found:
            return list(items)
        left = []
        for item, key in zip(items, keys, strict=True):
            if known := found.get(key):
                request.recall(item, known)
            else:
                left.append(item)
        return left

    def keep(self, facts: Facts, computed: Sequence[tuple[Item, Known]]) -> None:
        """Keep rows that a driver with these facts has given, for each caller who waited for one."""
        if not self.is_on:
            return
        scope = scope_of(facts)
        entries: dict[bytes, Known] = {}
        for item, known in computed:
            for equal in item.equals:
                call, task = equal.request.call, equal.request.task
                if call.writes_cache and task.name not in NOT_KEPT:
                    entries[self._cache.key(scope, call.caller, equal)] = known
        if entries:
            self._cache.put(list(entries.items()))
