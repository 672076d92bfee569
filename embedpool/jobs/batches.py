"""Runs batches: lines of requests, in windows, whose answers are on the disk before the next window counts as done.

One process of a server runs them (it holds a lock); after any end the next goes on at the last window that was kept.
The batches of an owner run one after the other, those of several owners side by side. Knows no HTTP: `execute` serves a
line.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import orjson
from filelock import FileLock, Timeout

from embedpool.errors import EmbedpoolError, StorageError
from embedpool.jobs.batch_input import Checked, Fault, Line, windows
from embedpool.jobs.durable import GrowingFile
from embedpool.jobs.speed import Speed
from embedpool.jobs.store import ERRORS, FINISHED, OUTPUT, Document, Store
from embedpool.jobs.windows import answered

logger = logging.getLogger(__name__)

LINES_AT_ONCE = 64  # served at the same time, of all batches together
BATCHES_AT_ONCE = 4
LOOK_EVERY_S = 1.0  # for batches that another process was given
TELL_EVERY_S = 10.0
PAUSE_S = 5.0  # where there is no room on the disk
PRUNE_EVERY_S = 600.0
ENDS_WITHIN_S = 10.0
LONGEST_WAIT_S = 30.0  # before a busy pool is asked again
CANCELLED, EXPIRED = "batch_cancelled", "batch_expired"
BUSY = (429, 503, 504, 507)


class Executed(NamedTuple):
    """What became of a line: the answer's status, body, id and tokens, and when to ask again where it says so."""

    status: int
    body: bytes
    request_id: str
    tokens: int = 0
    retry_after_s: float = 1.0


Execute = Callable[[str, bytes, str], Executed]  # url, body, owner


class _Stopped(Exception):
    """The server stops; the window under way does not count."""


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
                with lock.acquire(timeout=0), ThreadPoolExecutor(BATCHES_AT_ONCE, "batch") as threads:
                    running: dict[str, Future[None]] = {}
                    while not self._stopping.is_set():
                        self._store.has_new.clear()
                        self._begin_some(running, threads)
                        self._store.has_new.wait(LOOK_EVERY_S)
            except Timeout:
                self._stopping.wait(LOOK_EVERY_S)
            except OSError as error:
                if not self._is_told:
                    logger.warning("batches cannot be run: %s", error)
                self._is_told = True
                self._stopping.wait(PAUSE_S)

    def _begin_some(self, running: dict[str, Future[None]], threads: ThreadPoolExecutor) -> None:
        """Of each owner that has none `running` the oldest. A look that fails ends none of those."""
        try:
            for owner in [owner for owner, run in running.items() if run.done()]:
                del running[owner]
            for known in self._look():
                if known["owner"] not in running and len(running) < BATCHES_AT_ONCE:
                    running[known["owner"]] = threads.submit(self._run_one, known)
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

    def _run_one(self, known: Document) -> None:
        try:
            _Run(self._store, known, self._in_turn, self._stopping, self._lines_ran).run()
        except OSError as error:
            self._pause(known, error.strerror or str(error))
        except StorageError as error:
            self._pause(known, error.message)
        except _Stopped:
            return
        except Exception as error:
            logger.exception("batch %s cannot be run", known["batch"]["id"])
            self._give_up(known, error)
        finally:
            self._store.has_new.set()  # the owner's next may run
        if known["batch"]["status"] in FINISHED:
            self._observer.batch_ended(known["batch"]["status"])

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
        counts = Counter("paused" if batch["paused"] else batch["status"] for batch in batches)
        self._observer.batches_seen(counts, self._store.used_bytes(), self._store.most_bytes)

    def _give_up(self, known: Document, error: Exception) -> None:
        """It must not keep the others waiting for ever."""
        says = error.message if isinstance(error, EmbedpoolError) else type(error).__name__
        fault = Fault("internal_error", f"the batch cannot be run: {says}")
        known["batch"] |= {
            "status": "failed", "failed_at": self._store.now(), "errors": {"object": "list", "data": [fault._asdict()]},
        }  # fmt: skip
        self._store.keep(known)

    def _pause(self, known: Document, why: str) -> None:
        """The disk is full, say: it goes on when there is room, and says so until then."""
        says = f"paused: {why}"
        logger.warning("batch %s is %s", known["batch"]["id"], says)
        with contextlib.suppress(OSError):
            fresh = next(one for one in self._store.to_run() if one["batch"]["id"] == known["batch"]["id"])
            fresh["batch"] |= {"paused": says, "requests_s": None, "seconds_left": None}
            self._store.keep(fresh)
        self._stopping.wait(PAUSE_S)


class _Run:
    """One batch, from where it stands."""

    def __init__(
        self,
        store: Store,
        known: Document,
        execute: Execute,
        stopping: threading.Event,
        ran: Callable[[int, int], None],
    ) -> None:
        self._store = store
        self._known = known
        self._batch: Document = known["batch"]
        self._execute = execute
        self._stopping = stopping
        self._ran = ran
        folder = store.place_of(self._batch["id"])
        self._output, self._errors = GrowingFile(folder / OUTPUT), GrowingFile(folder / ERRORS)
        self._input: Path = store.content(self._batch["input_file_id"])

    def run(self) -> None:
        if self._batch["status"] == "validating":
            self._validate()
        if self._batch["status"] == "in_progress":
            self._go_on()
        if self._batch["status"] == "finalizing":
            self._finalize()

    # --- validating

    def _validate(self) -> None:
        if self._store.cancelled_at(self._batch["id"]):
            self._become("cancelled", "cancelled_at")
            return
        found = Checked(self._input, self._batch["endpoint"], self._raise_if_stopping)
        if found.faults:
            self._batch["errors"] = {"object": "list", "data": [fault._asdict() for fault in found.faults]}
            self._become("failed", "failed_at")
            return
        self._batch["request_counts"]["total"] = found.requests
        self._batch["model"] = next(iter(found.models)) if len(found.models) == 1 else None
        self._become("in_progress", "in_progress_at")

    # --- in progress

    def _go_on(self) -> None:
        """Window after window, until all are done, or it is cancelled or expired."""
        at = self._known["at"]
        self._output.open_at(at.get("output", 0))
        self._errors.open_at(at.get("errors", 0))
        try:
            with self._input.open("rb") as file, ThreadPoolExecutor(LINES_AT_ONCE, "batch-line") as threads:
                begun = at.get("input", 0)
                speed = Speed(begun, self._input.stat().st_size)
                given = self._until_it_ends(windows(file, begun))
                found = answered(given, lambda lines: self._served(lines, threads), threading.Event(), name="batch")
                with contextlib.closing(found):
                    for lines, results in found:
                        self._write(lines, results, speed)
                ended = self._ended()
                if ended is not None:  # what is left did not run
                    self._known["ended"] = ended.code
                    for lines in windows(file, self._known["at"].get("input", 0)):
                        self._write(lines, [ended] * len(lines), speed)
        finally:
            self._output.close()
            self._errors.close()
        self._become("finalizing", "finalizing_at")

    def _raise_if_stopping(self) -> None:
        if self._stopping.is_set():
            raise _Stopped

    def _until_it_ends(self, given: Iterator[list[Line]]) -> Iterator[list[Line]]:
        for lines in given:
            self._raise_if_stopping()
            if self._ended() is not None:
                return
            yield lines

    def _ended(self) -> Fault | None:
        """Why no further line is run."""
        if self._store.cancelled_at(self._batch["id"]):
            return Fault(CANCELLED, "the batch was cancelled before this request ran")
        if self._store.now() >= self._batch["expires_at"]:
            return Fault(EXPIRED, "the batch expired before this request ran")
        return None

    def _served(self, lines: list[Line], threads: ThreadPoolExecutor) -> tuple[list[Line], list[Executed | Fault]]:
        return lines, list(threads.map(self._serve, lines))

    def _serve(self, line: Line) -> Executed | Fault:
        """A busy pool is asked again, until the batch ends."""
        while True:
            self._raise_if_stopping()
            if (ended := self._ended()) is not None:
                return ended
            found = self._execute(self._batch["endpoint"], line.body, self._known["owner"])
            if found.status not in BUSY:
                return found
            self._stopping.wait(min(found.retry_after_s, LONGEST_WAIT_S))

    def _write(self, lines: Sequence[Line], results: Sequence[Executed | Fault], speed: Speed) -> None:
        """A window, and then that it is written."""
        counts = self._batch["request_counts"]
        before = dict(counts)
        self._store.require_room(sum(len(found.body) for found in results if isinstance(found, Executed)))
        for line, found in zip(lines, results, strict=True):
            if isinstance(found, Fault):
                answer: Any = None
                error: Any = {"code": found.code, "message": found.message}
            else:
                body = orjson.Fragment(found.body)
                answer, error = {"status_code": found.status, "request_id": found.request_id, "body": body}, None
            is_good = answer is not None and answer["status_code"] < 400
            mark = f"{self._batch['id'].removeprefix('batch_')}{line.end:x}"  # the same whenever it is run
            told = {"id": f"batch_req_{mark}", "custom_id": line.custom_id, "response": answer, "error": error}
            (self._output if is_good else self._errors).append(orjson.dumps(told, option=orjson.OPT_APPEND_NEWLINE))
            counts["completed" if is_good else "failed"] += 1
        self._known["at"] = {"input": lines[-1].end, "output": self._output.sync(), "errors": self._errors.sync()}
        tokens = sum(found.tokens for found in results if isinstance(found, Executed))
        speed.add(lines[-1].end, len(lines))
        self._batch |= {
            "paused": None, "usage": _used(self._batch["usage"], tokens),
            "requests_s": round(speed.requests_s, 1), "seconds_left": round(speed.seconds_left),
        }  # fmt: skip
        self._store.keep(self._known)
        self._ran(counts["completed"] - before["completed"], counts["failed"] - before["failed"])

    # --- at its end

    def _finalize(self) -> None:
        """Its results become files; it may have been cut off here before."""
        expires_at, batch_id = self._known["forget_at"], self._batch["id"]
        for growing, results, name in ((self._output, "output", "output"), (self._errors, "errors", "error")):
            if self._known["at"].get(results, 0):
                file_id = self._known[f"{results}_id"]
                self._store.adopt(
                    growing.path, file_id, self._known["owner"], filename=f"{batch_id}_{name}.jsonl",
                    purpose="batch_output", expires_at=expires_at,
                )  # fmt: skip
                self._batch[f"{name}_file_id"] = file_id
            else:
                growing.path.unlink(missing_ok=True)
        status = {CANCELLED: "cancelled", EXPIRED: "expired"}.get(self._known.get("ended", ""), "completed")
        self._become(status, f"{status}_at")

    def _become(self, status: str, when: str) -> None:
        self._batch |= {"status": status, when: self._store.now(), "requests_s": None, "seconds_left": None}
        if status == "cancelled":
            self._batch["cancelling_at"] = self._store.cancelled_at(self._batch["id"])
        self._store.keep(self._known)
        counts = self._batch["request_counts"]
        logger.info(
            "batch %s is %s: %d requests, %d completed, %d failed",
            self._batch["id"], status, counts["total"], counts["completed"], counts["failed"],
        )  # fmt: skip


def _used(known: Document | None, tokens: int) -> Document:
    """Tokens of a batch, with so many more, in the words of OpenAI's API."""
    total = tokens + (known["total_tokens"] if known else 0)
    return {
        "input_tokens": total, "input_tokens_details": {"cached_tokens": 0}, "output_tokens": 0,
        "output_tokens_details": {"reasoning_tokens": 0}, "total_tokens": total,
    }  # fmt: skip
