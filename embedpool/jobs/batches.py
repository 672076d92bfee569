"""Runs batches: lines of requests, in windows, whose answers are on the disk before the next window counts as done.

One process of a server runs them (it holds a lock); after any end the next goes on at the last window that was kept.
Knows no HTTP: `execute` serves a line.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import orjson
from filelock import FileLock, Timeout

from embedpool.errors import EmbedpoolError, StorageError
from embedpool.jobs.durable import GrowingFile
from embedpool.jobs.store import ERRORS, OUTPUT, Document, Store
from embedpool.jobs.windows import answered

logger = logging.getLogger(__name__)

LINES_AT_ONCE = 64  # served at the same time
WINDOW_LINES, WINDOW_BYTES = 256, 4_000_000
MOST_LINES = 1_000_000
LONGEST_LINE_BYTES = 64 << 20
MOST_FAULTS = 100  # of an input file that are told
LOOK_EVERY_S = 1.0
PAUSE_S = 5.0  # where there is no room on the disk
PRUNE_EVERY_S = 600.0
ENDS_WITHIN_S = 10.0
LONGEST_WAIT_S = 30.0  # before a busy pool is asked again
CANCELLED, EXPIRED = "batch_cancelled", "batch_expired"
BUSY = (429, 503, 504, 507)
KEYS = {"custom_id": str, "method": str, "url": str, "body": dict}


class Executed(NamedTuple):
    """What became of a line: the answer's status, body and request id, and when to ask again where it says so."""

    status: int
    body: bytes
    request_id: str
    retry_after_s: float = 1.0


Execute = Callable[[str, bytes, str], Executed]  # url, body, owner


class _Stopped(Exception):
    """The server stops; the window under way does not count."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Line:
    custom_id: str
    body: bytes
    end: int  # bytes of the input up to its end


class _Fault(NamedTuple):
    code: str
    message: str
    line: int | None
    param: str | None = None


class Runner:
    """Runs the batches of a store, the oldest first."""

    def __init__(self, store: Store, execute: Execute) -> None:
        self._store = store
        self._execute = execute
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

    def stop(self) -> None:
        """After the pool has stopped, which ends the lines that are under way; their window does not count."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join(ENDS_WITHIN_S)

    def _run(self) -> None:
        lock = FileLock(self._store.folder / "runner.lock")
        while not self._stopping.is_set():
            try:
                self._store.folder.mkdir(parents=True, exist_ok=True)
                with lock.acquire(timeout=0):
                    while not self._stopping.is_set():
                        if not self._tried():
                            self._stopping.wait(LOOK_EVERY_S)
            except Timeout:
                self._stopping.wait(LOOK_EVERY_S)
            except OSError as error:
                if not self._is_told:
                    logger.warning("batches cannot be run: %s", error)
                self._is_told = True
                self._stopping.wait(PAUSE_S)

    def _tried(self) -> bool:
        try:
            return self.step()
        except _Stopped:
            return False
        except Exception:
            logger.exception("a batch could not be run; it is tried again")
            self._stopping.wait(PAUSE_S)
            return True

    def step(self) -> bool:
        """Run the oldest batch, to its end if nothing is in the way; whether there was one."""
        now = self._store.clock()
        if now - self._pruned_at >= PRUNE_EVERY_S:
            self._pruned_at = now
            self._store.prune()
        waiting = self._store.to_run()
        if not waiting:
            return False
        try:
            _Run(self._store, waiting[0], self._execute, self._stopping).run()
        except OSError as error:
            self._pause(waiting[0], error.strerror or str(error))
        except StorageError as error:
            self._pause(waiting[0], error.message)
        except _Stopped:
            raise
        except Exception as error:
            logger.exception("batch %s cannot be run", waiting[0]["batch"]["id"])
            self._give_up(waiting[0], error)
        return True

    def _give_up(self, known: Document, error: Exception) -> None:
        """It must not keep the others waiting for ever."""
        says = error.message if isinstance(error, EmbedpoolError) else type(error).__name__
        fault = _Fault("internal_error", f"the batch cannot be run: {says}", None)
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
            fresh["batch"]["paused"] = says
            self._store.keep(fresh)
        self._stopping.wait(PAUSE_S)


class _Run:
    """One batch, from where it stands."""

    def __init__(self, store: Store, known: Document, execute: Execute, stopping: threading.Event) -> None:
        self._store = store
        self._known = known
        self._batch: Document = known["batch"]
        self._execute = execute
        self._stopping = stopping
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
        faults, total = self._faults()
        if faults:
            listed = [fault._asdict() for fault in faults]
            self._batch["errors"] = {"object": "list", "data": listed}
            self._become("failed", "failed_at")
            return
        self._batch["request_counts"]["total"] = total
        self._become("in_progress", "in_progress_at")

    def _faults(self) -> tuple[list[_Fault], int]:
        """What is wrong with the input, by lines counted from 1, and how many requests it holds."""
        faults: list[_Fault] = []
        seen: set[int] = set()  # hashes of ids, which take less than the ids
        total = 0
        try:
            with self._input.open("rb") as file:
                for number, raw in enumerate(_raw_lines(file), 1):
                    if self._stopping.is_set():
                        raise _Stopped
                    if not raw.strip():
                        continue
                    total += 1
                    if fault := self._fault(number, raw, seen):
                        faults.append(fault)
                    if len(faults) >= MOST_FAULTS:
                        break
        except FileNotFoundError:
            return [_Fault("invalid_input_file", "the input file is gone", None)], 0
        if not total:
            faults.append(_Fault("empty_file", "the input file holds no request", None))
        if total > MOST_LINES:
            faults.append(_Fault("too_many_tasks", f"the input file holds more than {MOST_LINES} requests", None))
        return faults, total

    def _fault(self, number: int, raw: bytes, seen: set[int]) -> _Fault | None:
        try:
            found = orjson.loads(raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw)
        except orjson.JSONDecodeError:
            return _Fault("invalid_json_line", "this line is not parseable as valid JSON", number)
        if not isinstance(found, dict):
            return _Fault("invalid_json_line", "this line is no JSON object", number)
        for name, kind in KEYS.items():
            if found.get(name) in (None, ""):
                return _Fault("missing_required_parameter", f"missing required parameter: {name!r}", number, name)
            if not isinstance(found[name], kind):
                return _Fault("invalid_type", f"{name} is of the wrong type", number, name)
        endpoint, url, custom_id = self._batch["endpoint"], found["url"], found["custom_id"]
        checks = (
            ("method", "invalid_method", found["method"] == "POST", "the method must be POST"),
            ("url", "mismatched_url", url == endpoint, f"the url {url[:80]!r} is not that of the batch, {endpoint!r}"),
            ("custom_id", "duplicate_custom_id", hash(custom_id) not in seen, f"{custom_id[:80]!r} was used before"),
        )
        seen.add(hash(custom_id))
        return next((_Fault(code, says, number, name) for name, code, is_right, says in checks if not is_right), None)

    # --- in progress

    def _go_on(self) -> None:
        """Window after window, until all are done, or it is cancelled or expired."""
        at = self._known["at"]
        self._output.open_at(at.get("output", 0))
        self._errors.open_at(at.get("errors", 0))
        try:
            with self._input.open("rb") as file, ThreadPoolExecutor(LINES_AT_ONCE, "batch-line") as threads:
                file.seek(at.get("input", 0))
                windows = self._until_it_ends(_windows(_lines(file, at.get("input", 0))))
                found = answered(windows, lambda lines: self._served(lines, threads), threading.Event(), name="batch")
                with contextlib.closing(found):
                    for lines, results in found:
                        self._write(lines, results)
                ended = self._ended()
                if ended is not None:  # what is left did not run
                    self._known["ended"] = ended.code
                    file.seek(self._known["at"].get("input", 0))
                    for lines in _windows(_lines(file, self._known["at"].get("input", 0))):
                        self._write(lines, [ended] * len(lines))
        finally:
            self._output.close()
            self._errors.close()
        self._become("finalizing", "finalizing_at")

    def _until_it_ends(self, windows: Iterator[list[_Line]]) -> Iterator[list[_Line]]:
        for lines in windows:
            if self._stopping.is_set():
                raise _Stopped
            if self._ended() is not None:
                return
            yield lines

    def _ended(self) -> _Fault | None:
        """Why no further line is run."""
        if self._store.cancelled_at(self._batch["id"]):
            return _Fault(CANCELLED, "the batch was cancelled before this request ran", None)
        if self._store.now() >= self._batch["expires_at"]:
            return _Fault(EXPIRED, "the batch expired before this request ran", None)
        return None

    def _served(self, lines: list[_Line], threads: ThreadPoolExecutor) -> tuple[list[_Line], list[Executed | _Fault]]:
        return lines, list(threads.map(self._serve, lines))

    def _serve(self, line: _Line) -> Executed | _Fault:
        """A busy pool is asked again, until the batch ends."""
        while True:
            if self._stopping.is_set():
                raise _Stopped
            if (ended := self._ended()) is not None:
                return ended
            found = self._execute(self._batch["endpoint"], line.body, self._known["owner"])
            if found.status not in BUSY:
                return found
            self._stopping.wait(min(found.retry_after_s, LONGEST_WAIT_S))

    def _write(self, lines: Sequence[_Line], results: Sequence[Executed | _Fault]) -> None:
        """A window, and then that it is written."""
        counts = self._batch["request_counts"]
        self._store.require_room(sum(len(found.body) for found in results if isinstance(found, Executed)))
        for line, found in zip(lines, results, strict=True):
            if isinstance(found, _Fault):
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
        self._batch["paused"] = None
        self._store.keep(self._known)

    # --- at its end

    def _finalize(self) -> None:
        """Its results become files; it may have been cut off here before."""
        expires_at, batch_id = self._known["forget_at"], self._batch["id"]
        for growing, which, name in ((self._output, "output", "output"), (self._errors, "errors", "error")):
            if self._known["at"].get(which, 0):
                file_id = self._known[f"{which}_id"]
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
        self._batch |= {"status": status, when: self._store.now()}
        if status == "cancelled":
            self._batch["cancelling_at"] = self._store.cancelled_at(self._batch["id"])
        self._store.keep(self._known)
        logger.info("batch %s is %s", self._batch["id"], status)


def _raw_lines(file: Any) -> Iterator[bytes]:
    """Lines up to a length that no request has."""
    while raw := file.readline(LONGEST_LINE_BYTES):
        yield raw


def _lines(file: Any, start: int) -> Iterator[_Line]:
    """Of an input that was found to be valid, from a place on."""
    end = start
    for raw in _raw_lines(file):
        if raw.strip():
            found = orjson.loads(raw.removeprefix(b"\xef\xbb\xbf") if end == 0 else raw)
            yield _Line(found["custom_id"], orjson.dumps(found["body"]), end + len(raw))
        end += len(raw)


def _windows(lines: Iterator[_Line]) -> Iterator[list[_Line]]:
    window: list[_Line] = []
    size = 0
    for line in lines:
        if window and (len(window) == WINDOW_LINES or size + len(line.body) > WINDOW_BYTES):
            yield window
            window, size = [], 0
        window.append(line)
        size += len(line.body)
    if window:
        yield window
