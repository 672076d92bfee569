"""Runs batches: which of them when, and what becomes of those that cannot go on.

One process of a server runs them (it holds a lock); after any end the next goes on at the last window that was kept.
The batches of an owner run one after the other, those of several owners side by side. No turn is needed to be checked,
nor to end without having run.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

from filelock import FileLock, Timeout

from embedpool.errors import EmbedpoolError, StorageError
from embedpool.jobs.batch_input import Fault
from embedpool.jobs.batch_run import LINES_AT_ONCE, BatchRun, Execute, Executed, Stopped, ended
from embedpool.jobs.store import FINISHED, Document, Store

logger = logging.getLogger(__name__)

BATCHES_AT_ONCE = 4
LOOK_EVERY_S = 1.0  # for batches that another process was given
TELL_EVERY_S = 10.0
PAUSE_S = 5.0  # where there is no room on the disk
PRUNE_EVERY_S = 600.0
ENDS_WITHIN_S = 10.0


class Observer:
    """Is told what becomes of batches."""

    def lines_ran(self, completed: int, failed: int) -> None:
        """So many more have."""

    def batch_ended(self, status: str) -> None:
        """One is over."""

    def batches_seen(self, unfinished: Mapping[str, int], used_bytes: int, most_bytes: int) -> None:
        """How many are not finished, by status; what all files and results take, and may take."""


class Runner:
    """Runs the batches of a store, of each owner the oldest first."""

    def __init__(self, store: Store, execute: Execute, observer: Observer | None = None) -> None:
        self._store = store
        self._execute = execute
        self._observer = observer or Observer()
        self._line_slots = threading.BoundedSemaphore(LINES_AT_ONCE)
        self._told_at = float("-inf")
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._pruned_at = float("-inf")
        self._is_told = False  # why it cannot run
        self._running: dict[str, tuple[str | None, Future[None]]] = {}  # by batch; whose turn it is

    def start(self) -> None:
        """In a thread of its own; of several processes the one that gets the lock."""
        self._thread = threading.Thread(target=self._run, name="batches", daemon=True)
        self._thread.start()

    def begin_to_stop(self) -> None:
        """Begin no further line. What is under way is not waited for here."""
        self._stopping.set()
        self._store.has_new.set()

    def stop(self) -> None:
        """After the pool has stopped, which ends the lines that are under way; their window does not count."""
        self.begin_to_stop()
        if self._thread is not None:
            self._thread.join(ENDS_WITHIN_S)

    def _run(self) -> None:
        lock = FileLock(self._store.folder / "runner.lock")
        while not self._stopping.is_set():
            try:
                self._store.folder.mkdir(parents=True, exist_ok=True)
                with (
                    lock.acquire(timeout=0),
                    ThreadPoolExecutor(BATCHES_AT_ONCE, "batch") as in_turn,
                    ThreadPoolExecutor(1, "batch-beside") as beside,
                ):
                    self._running.clear()
                    while not self._stopping.is_set():
                        self._store.has_new.clear()
                        self._begin_some(in_turn, beside)
                        self._store.has_new.wait(LOOK_EVERY_S)
            except Timeout:
                self._stopping.wait(LOOK_EVERY_S)
            except OSError as error:
                if not self._is_told:
                    logger.warning("batches cannot be run: %s", error)
                self._is_told = True
                self._stopping.wait(PAUSE_S)

    def _begin_some(self, in_turn: ThreadPoolExecutor, beside: ThreadPoolExecutor) -> None:
        """Of each owner that has none running the oldest; and those that need no turn. A failed look ends none."""
        try:
            for batch_id in [batch_id for batch_id, (_, run) in self._running.items() if run.done()]:
                del self._running[batch_id]
            for known in self._look():
                batch, owner = known["batch"], known["owner"]
                busy = {of for of, _ in self._running.values() if of is not None}
                if batch["id"] in self._running:
                    continue
                if batch["status"] == "validating":
                    self._running[batch["id"]] = None, beside.submit(self._run_one, known, BatchRun.check)
                elif ended(self._store, batch):
                    self._running[batch["id"]] = None, beside.submit(self._run_one, known)
                elif owner not in busy and len(busy) < BATCHES_AT_ONCE:
                    self._running[batch["id"]] = owner, in_turn.submit(self._run_one, known)
        except Exception:
            logger.exception("no batch could be looked for; it is tried again")
            self._stopping.wait(PAUSE_S)

    def step(self) -> bool:
        """Run the oldest batch, to its end if nothing is in the way; whether there was one."""
        waiting = self._look()
        if waiting:
            self._run_one(waiting[0])
        return bool(waiting)

    def _look(self) -> list[Document]:
        """The batches that are not finished, the oldest first."""
        now = self._store.clock()
        if now - self._pruned_at >= PRUNE_EVERY_S:
            self._pruned_at = now
            self._store.prune()
        waiting = self._store.to_run()
        self._tell(waiting)
        return waiting

    def _run_one(self, known: Document, how: Callable[[BatchRun], None] = BatchRun.run) -> None:
        run = BatchRun(self._store, known, self._in_turn, self._stopping, self._lines_ran)
        try:
            try:
                how(run)
            except (OSError, StorageError, Stopped):
                raise
            except EmbedpoolError as error:
                self._give_up(run, known, error.message)
            except Exception as error:
                logger.exception("batch %s cannot be run", known["batch"]["id"])
                self._give_up(run, known, type(error).__name__)
        except OSError as error:
            self._pause(run, known, error.strerror or str(error))
        except StorageError as error:
            self._pause(run, known, error.message)
        except Stopped:
            pass
        else:
            if known["batch"]["status"] in FINISHED:
                self._observer.batch_ended(known["batch"]["status"])
        finally:
            self._store.has_new.set()  # the owner's next may run

    def _in_turn(self, url: str, body: bytes, owner: str) -> Executed:
        with self._line_slots:
            return self._execute(url, body, owner)

    def _lines_ran(self, completed: int, failed: int) -> None:
        self._observer.lines_ran(completed, failed)
        self._tell()

    def _tell(self, waiting: list[Document] | None = None) -> None:
        """What there is, now and then."""
        if time.monotonic() - self._told_at < TELL_EVERY_S:
            return
        self._told_at = time.monotonic()
        batches = [known["batch"] for known in (self._store.to_run() if waiting is None else waiting)]
        counts = Counter("paused" if self._store.paused(batch["id"]) else batch["status"] for batch in batches)
        self._observer.batches_seen(counts, self._store.used_bytes(), self._store.most_bytes)

    def _give_up(self, run: BatchRun, known: Document, says: str) -> None:
        """It must not keep the others waiting for ever."""
        logger.warning("batch %s cannot be run: %s", known["batch"]["id"], says)
        run.fail([Fault("internal_error", f"the batch cannot be run: {says}")])

    def _pause(self, run: BatchRun, known: Document, why: str) -> None:
        """The disk is full, say: it goes on when there is room, and says so until then."""
        batch_id, says = known["batch"]["id"], f"paused: {why}"
        if (before := self._store.paused(batch_id)) is None or before["says"] != says:
            logger.warning("batch %s is %s", batch_id, says)
        self._store.pause(batch_id, says, run.wants_bytes)
        self._stopping.wait(PAUSE_S)
