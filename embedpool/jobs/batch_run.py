"""One batch, from where it stands: checked, its lines run in windows, and its results made files.

A window's answers are on the disk before it counts as done. Knows no HTTP: `execute` serves a line.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, NamedTuple

import orjson

from embedpool.errors import NotFound
from embedpool.jobs.batch_input import Checked, Fault, Line, windows
from embedpool.jobs.durable import GrowingFile
from embedpool.jobs.speed import Speed
from embedpool.jobs.store import ERRORS, FINISHED, OUTPUT, Document, Store
from embedpool.jobs.windows import answered

logger = logging.getLogger(__name__)

LINES_AT_ONCE = 64  # served at the same time, of all batches together
LONGEST_WAIT_S = 30.0  # before a busy pool is asked again
LINE_BYTES = 512  # of a result, about, beside the answer
CANCELLED, EXPIRED = "batch_cancelled", "batch_expired"
BUSY = (429, 503, 504, 507)
FAILED_MODEL = "model_failed"
MOST_TRIES = {"deadline_exceeded": 3, FAILED_MODEL: 20}  # of a line; with other errors of BUSY until the batch ends


class Executed(NamedTuple):
    """What became of a line: the answer's status, body, id and tokens, when to ask again where it says so, its error"""

    status: int
    body: bytes
    request_id: str
    tokens: int = 0
    retry_after_s: float = 1.0
    code: str = ""


Execute = Callable[[str, bytes, str], Executed]  # url, body, owner


class Stopped(Exception):
    """The server stops; the window under way does not count."""


def ended(store: Store, batch: Document) -> Fault | None:
    """Why no further line of it is run."""
    if store.cancelled_at(batch["id"]):
        return Fault(CANCELLED, "the batch was cancelled before this request ran")
    if store.now() >= batch["expires_at"]:
        return Fault(EXPIRED, "the batch expired before this request ran")
    return None


class BatchRun:
    """One batch, from where it stands. `wants_bytes` is what it last wanted of the disk."""

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
        self._kept: Document = known["at"]
        self._failed_models: set[Any] = set()  # for which a line was tried often enough
        self.wants_bytes = 0

    def check(self) -> None:
        """If it is to be validated."""
        if self._batch["status"] == "validating":
            self._validate()

    def run(self) -> None:
        """To its end. Raises NotFound if its input is gone, StorageError and OSError where there is no room, Stopped"""
        self.check()
        if self._batch["status"] == "in_progress":
            self._go_on()
        if self._batch["status"] == "finalizing":
            self._finalize()

    # --- validating

    def _validate(self) -> None:
        if self._store.cancelled_at(self._batch["id"]):
            self._become("cancelled")
            return
        found = Checked(self._input, self._batch["endpoint"], self._raise_if_stopping, self._store.most_requests)
        if found.faults:
            self.fail(found.faults)
            return
        self._batch["request_counts"]["total"] = found.requests
        self._batch["model"] = next(iter(found.models)) if len(found.models) == 1 else None
        self._become("in_progress")

    # --- in progress

    def _go_on(self) -> None:
        """Window after window, until all are done, or it is cancelled or expired."""
        at = self._kept
        if (paused := self._store.paused(self._batch["id"])) and self._ended() is None:
            self.wants_bytes = paused["wants_bytes"]
            self._store.require_room(self.wants_bytes)  # before anything is computed
        try:
            self._output.open_at(at.get("output", 0))
            self._errors.open_at(at.get("errors", 0))
            with self._opened_input() as file, ThreadPoolExecutor(LINES_AT_ONCE, "batch-line") as threads:
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
        finally:  # the window under way, which may be half written, takes no room
            self._output.close(self._kept.get("output", 0))
            self._errors.close(self._kept.get("errors", 0))
        self._become("finalizing")

    def _opened_input(self) -> IO[bytes]:
        try:
            return self._input.open("rb")
        except FileNotFoundError:
            raise NotFound("the input file is gone") from None

    def _raise_if_stopping(self) -> None:
        if self._stopping.is_set():
            raise Stopped

    def _until_it_ends(self, given: Iterator[list[Line]]) -> Iterator[list[Line]]:
        for lines in given:
            self._raise_if_stopping()
            if self._ended() is not None:
                return
            yield lines

    def _ended(self) -> Fault | None:
        return ended(self._store, self._batch)

    def _served(self, lines: list[Line], threads: ThreadPoolExecutor) -> tuple[list[Line], list[Executed | Fault]]:
        return lines, list(threads.map(self._serve, lines))

    def _serve(self, line: Line) -> Executed | Fault:
        """A busy pool is asked again, until the batch ends; where trouble seems to last, only so often."""
        for tries in itertools.count(1):
            self._raise_if_stopping()
            if (over := self._ended()) is not None:
                return over
            found = self._execute(self._batch["endpoint"], line.body, self._known["owner"])
            if found.status not in BUSY:
                self._failed_models.discard(line.model)
                return found
            if tries >= MOST_TRIES.get(found.code, math.inf):
                if found.code == FAILED_MODEL:
                    self._failed_models.add(line.model)
                return found
            if found.code == FAILED_MODEL and line.model in self._failed_models:
                return found
            self._stopping.wait(min(found.retry_after_s, LONGEST_WAIT_S))
        raise AssertionError("it counts without end")

    def _write(self, lines: Sequence[Line], results: Sequence[Executed | Fault], speed: Speed) -> None:
        """A window, and then that it is written."""
        counts = self._batch["request_counts"]
        before = dict(counts)
        answers = (len(found.body) for found in results if isinstance(found, Executed))
        self.wants_bytes = sum(answers) + LINE_BYTES * len(lines)
        self._store.require_room(self.wants_bytes)
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
            "usage": _used(self._batch["usage"], tokens),
            "requests_s": round(speed.requests_s, 1), "seconds_left": round(speed.seconds_left),
        }  # fmt: skip
        self._store.keep(self._known)
        self._kept = self._known["at"]
        self._store.go_on(self._batch["id"])
        self._ran(counts["completed"] - before["completed"], counts["failed"] - before["failed"])

    # --- at its end

    def _finalize(self) -> None:
        """Its results become files; it may have been cut off here before."""
        expires_at, batch_id = self._store.now() + self._known["lives_s"], self._batch["id"]
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
        self._become(status)

    def fail(self, faults: Sequence[Fault]) -> None:
        """It has ended, for that."""
        self._batch["errors"] = {"object": "list", "data": [fault._asdict() for fault in faults]}
        self._become("failed")

    def _become(self, status: str) -> None:
        now = self._store.now()
        self._batch |= {"status": status, f"{status}_at": now, "requests_s": None, "seconds_left": None}
        if status in FINISHED:
            self._known["ended_at"] = now
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
