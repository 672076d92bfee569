"""Notices that a file has changed: watchdog sets an Event, a thread of our own debounces, compares and calls back.

watchdog's handler may do nothing else: an exception in it ends the observer for good, and a slow one blocks its stop.
A look every `poll_interval_s` beside it covers symlink swaps, recreated folders and exhausted inotify limits.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path

from watchdog.events import (
    EVENT_TYPE_CLOSED_NO_WRITE,
    EVENT_TYPE_OPENED,
    FileSystemEvent,
    FileSystemEventHandler,
)
from watchdog.observers import Observer
from watchdog.observers.api import BaseObserver
from watchdog.observers.polling import PollingObserver

logger = logging.getLogger(__name__)


class Watch:
    """Calls `on_change()` on its own thread after the content of `path` has changed and come to rest."""

    def __init__(
        self,
        path: Path,
        on_change: Callable[[], None],
        *,
        is_behind: Callable[[bytes | None], bool] = lambda content: False,
        observer: str = "native",
        poll_interval_s: float = 2.0,
        debounce_ms: int = 200,
    ) -> None:
        self._path = path
        self._on_change = on_change
        self._is_behind = is_behind  # the one that is called back, after changes that it made and saw itself
        self._observer_kind = observer
        self._poll_interval_s = poll_interval_s
        self._debounce_s = debounce_ms / 1000
        self._event = threading.Event()
        self._stopping = threading.Event()
        self._seen = self._content()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._observer: BaseObserver | None = None

    def start(self) -> None:
        """Begin to watch. A system without file events is logged and polled."""
        self._observer = self._start_observer()
        self._thread.start()

    def stop(self) -> None:
        """Stop both threads."""
        self._stopping.set()
        self._event.set()
        if self._observer is not None:
            self._observer.stop()
            self._observer.join()
        if self._thread.ident is not None:
            self._thread.join()

    def check_once(self) -> bool:
        """One look at the file: calls back if its content differs from the last look, or from what was followed since.

        Says whether it did.
        """
        content = self._content()
        if content == self._seen and not self._is_behind(content):
            return False
        self._seen = content
        try:
            self._on_change()
        except Exception:
            logger.exception("the callback for a change of %s failed", self._path)
        return True

    def _run(self) -> None:
        while not self._stopping.is_set():
            if self._event.wait(self._poll_interval_s):
                self._stopping.wait(self._debounce_s)
                self._event.clear()
            if not self._stopping.is_set():
                self.check_once()

    def _content(self) -> bytes | None:
        try:
            return self._path.read_bytes()
        except OSError:
            return None

    def _start_observer(self) -> BaseObserver | None:
        observer: BaseObserver = (
            PollingObserver(timeout=self._poll_interval_s) if self._observer_kind == "polling" else Observer()
        )
        handler = _SetEvent(self._path, self._event)
        # Editors save by rename and Kubernetes swaps a link, so the folders are watched, not the file.
        folders = {self._path.parent, Path(os.path.realpath(self._path)).parent}
        try:
            for folder in filter(Path.is_dir, folders):
                observer.schedule(handler, str(folder))
            observer.start()
        except OSError as error:
            observer.stop()
            logger.warning("no file events for %s (%s); looking every %s s", self._path, error, self._poll_interval_s)
            return None
        return observer


class _SetEvent(FileSystemEventHandler):
    """Runs on watchdog's thread: sets the event, except for our own reads."""

    def __init__(self, path: Path, event: threading.Event) -> None:
        self._names = {path.name, Path(os.path.realpath(path)).name, "..data"}
        self._event = event

    def on_any_event(self, event: FileSystemEvent) -> None:
        if event.event_type in (EVENT_TYPE_OPENED, EVENT_TYPE_CLOSED_NO_WRITE):
            return
        touched = {os.path.basename(os.fsdecode(p)) for p in (event.src_path, event.dest_path) if p}
        if touched & self._names:
            self._event.set()
