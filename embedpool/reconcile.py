"""pool.yml becomes the live pool. The one writer of the live pool, under one lock; it always re-reads the file.

Nobody passes specs around, so an older state can never land last. A registration loads its candidate unrouted, then
edits the file, then reconciles: failure needs no undo, and the file lock is never held during a load.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from embedpool.config import edit, files
from embedpool.config.pool_yml import PoolFile, parse
from embedpool.config.spec import ModelSpec, PoolSpec
from embedpool.errors import ModelNotFound, PoolFileInvalid, ShuttingDown, StorageError
from embedpool.pool.pool import Pool

logger = logging.getLogger(__name__)

LAST_POOL = "last-pool.yml"  # in state_dir: pool.yml as it was followed last


class Reconciler:
    """Called by management routes (request threads) and by the watch (its thread)."""

    def __init__(
        self, pool_file: PoolFile, pool: Pool, last_pool: PoolFile | None = None, *, load_timeout_s: float = 600.0
    ) -> None:
        """`last_pool` is a copy of pool.yml as it was followed last."""
        self.pool_file = pool_file
        self.has_applied = False  # the pool is one that pool.yml described, now or before this process began
        self._last_pool = last_pool
        self.last_reload: dict[str, Any] | None = None
        self.reloads: Counter[str] = Counter()
        self._pool = pool
        self._load_timeout_s = load_timeout_s
        self._lock = threading.Lock()
        self._followed: tuple[int, ...] | None = None  # the stamp of the file as it was read last
        self._read: bytes | None = None  # what it held then

    def begin(self) -> None:
        """At the start: follow the file, or if it is broken the copy of what was followed last."""
        try:
            self.reload("start")
        except PoolFileInvalid:
            if self._last_pool is None:
                return
            try:
                spec = self._last_pool.read()
            except PoolFileInvalid:
                logger.error("there is no pool yet that could be served")
                return
            with self._lock:
                if not self.has_applied:
                    self._pool.apply(spec)
                    self.has_applied = True
            logger.error("the pool that was served last is served")

    def reload(self, reason: str) -> PoolSpec:
        """Make the live pool what the file says. Raises PoolFileInvalid; the old pool then goes on."""
        with self._lock:
            self._followed, self._read = files.stamp(self.pool_file.path), None
            try:
                text = self.pool_file.content()
                self._read = text.encode()
                spec = parse(text, str(self.pool_file.path))
            except PoolFileInvalid as error:
                if not self.last_reload or self.last_reload["error"] != error.message:
                    logger.error("pool.yml is not followed: %s", error.message)
                self._note(reason, error.message)
                raise
            self._pool.apply(spec)
            self.has_applied = True
            self._keep(text)
            self._note(reason, None)
            return spec

    def _keep(self, text: str) -> None:
        """Keep what was followed, for a process that begins beside a broken file."""
        if self._last_pool is None:
            return
        try:
            if not self._last_pool.path.exists() or self._last_pool.content() != text:
                self._last_pool.path.parent.mkdir(parents=True, exist_ok=True)
                with files.locked(self._last_pool.path):
                    files.replace(self._last_pool.path, text, new_mode=0o600)
        except (PoolFileInvalid, StorageError, OSError) as error:
            logger.warning("%s does not hold the present pool: %s", self._last_pool.path, error)

    def on_file_change(self) -> None:
        """For the watch: a broken file is noted, in last_reload and in the log, and changes nothing."""
        with contextlib.suppress(PoolFileInvalid):
            self.reload("pool.yml changed")

    def is_behind(self, content: bytes | None) -> bool:
        """Whether the file, which holds this, was read last when it held something else."""
        return None not in (content, self._read) and content != self._read

    def catch_up(self, name: str) -> bool:
        """For a name that no model has: whether one has it once the file, changed a moment ago, is followed.

        Another worker of this server may have answered the registration before this one was told.
        """
        if files.stamp(self.pool_file.path) in (None, self._followed):
            return False
        with contextlib.suppress(PoolFileInvalid):  # the watch will tell
            if self.pool_file.read().find(name):
                self.reload("a name was not known")
        return self._pool.knows(name)

    # --- management: each edits the file, follows it and gives the model's name.
    # All raise PoolFileInvalid and StorageError, and what their function of config/edit.py raises.

    def register(self, spec: ModelSpec, *, replace: bool, wait: bool) -> str:
        """Add or replace a model; with `wait` it is loaded first. Raises ModelFailed."""

        def change(pool: PoolSpec) -> PoolSpec:
            return edit.register(pool, spec, replace=replace)

        before = self.pool_file.read()
        change(before)  # refused before anything is loaded
        self._change_loaded(change, before.find(spec.model), spec, "register", wait=wait)
        return spec.model

    def set_enabled(self, name: str, enabled: bool) -> str:
        """Switch a model on, loaded first, or off. Raises ModelFailed."""
        old = edit.find(self.pool_file.read(), name)
        new = dataclasses.replace(old, enabled=enabled)
        self._change_loaded(lambda p: edit.set_enabled(p, old.model, enabled), old, new, "enable", wait=True)
        return old.model

    def set_alias(self, name: str, alias: str | None) -> str:
        """Give a model an alias, or take it away."""
        return self._change_named(name, lambda pool, model: edit.set_alias(pool, model, alias), "alias")

    def unregister(self, name: str) -> str:
        """Remove a model."""
        return self._change_named(name, edit.unregister, "unregister")

    def _change_named(self, name: str, change: Callable[[PoolSpec, str], PoolSpec], reason: str) -> str:
        found: list[str] = []

        def named(pool: PoolSpec) -> PoolSpec:
            found.append(edit.find(pool, name).model)
            return change(pool, found[-1])

        self._change(named, reason)
        return found[-1]

    def _change_loaded(
        self,
        change: Callable[[PoolSpec], PoolSpec],
        old: ModelSpec | None,
        new: ModelSpec,
        reason: str,
        *,
        wait: bool,
    ) -> None:
        if not (wait and new.enabled and (old is None or old.load_key != new.load_key)):
            if old is not None and new.enabled and old.enabled:
                with contextlib.suppress(ModelNotFound):  # in the file, and not live yet
                    self._pool.find(new.model).check(new)
            self._change(change, reason)
            if wait and new.enabled:  # 200 means ready, also for what is in the file already
                try:
                    self._pool.find(new.model).require_loaded(self._load_timeout_s)
                except (ModelNotFound, ShuttingDown):  # removed by somebody else since, perhaps while it was loading
                    if self._pool.stopping:
                        raise
            return
        with self._pool.prepared(new, self._load_timeout_s):
            self._change(change, reason)

    def _change(self, change: Callable[[PoolSpec], PoolSpec], reason: str) -> None:
        self.pool_file.edit(change)
        self.reload(reason)

    def _note(self, reason: str, error: str | None) -> None:
        self.reloads["failed" if error else "ok"] += 1
        self.last_reload = {
            "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "reason": reason,
            "ok": error is None,
            "error": error,
        }
