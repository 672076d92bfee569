"""Files in, a file out: a job that goes on where it was, however it ended.

After each window its results are on the disk, and then the job's own file says so (`<out>.job`, replaced as a whole).
Whatever lies beyond is cut off when the job is resumed, so no input is missing, and none is there twice.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from numpy.typing import NDArray

from embedpool import __version__
from embedpool.errors import InvalidRequest, ModelChanged
from embedpool.jobs.durable import GrowingFile, write_json
from embedpool.jobs.sinks import Sink
from embedpool.jobs.sources import Files, Row
from embedpool.jobs.windows import answered, in_windows

WINDOW_ROWS, WINDOW_CHARS = 500, 2_000_000  # two of them are under way
JOB, FAILED = ".job", ".failed.jsonl"
LOCK = ".lock"
VERSION = 1


@dataclasses.dataclass(frozen=True, slots=True)
class Computed:
    """What came of some inputs: a row for each (see sinks.py), and code and message of those that failed."""

    values: NDArray[Any] | list[Any]
    errors: Mapping[int, tuple[str, str]]
    space: str
    tokens: int = 0
    truncated: int = 0


@dataclasses.dataclass(slots=True)
class Progress:
    """How far a job is; the bytes are those of its files."""

    rows: int = 0
    bytes: int = 0
    tokens: int = 0
    truncated: int = 0
    failed: int = 0


Compute = Callable[[Sequence[Row]], Computed]


class FileJob:
    """`work` is what must be the same when it is resumed: the model, the options, the columns."""

    def __init__(self, files: Files, sink: Sink, work: Mapping[str, Any]) -> None:
        self._files = files
        self._sink = sink
        self._about = {**work, "version": __version__}
        self._work = {**work, "files": files.fingerprint(), "version": VERSION}
        self._job = sink.path.with_name(sink.path.name + JOB)
        self._failed = GrowingFile(sink.path.with_name(sink.path.name + FAILED))
        self._kept: dict[str, Any] = {}  # what the job's own file says
        self.space = ""
        self.progress = Progress()
        self.total_bytes = files.total_bytes

    @property
    def failures(self) -> Path:
        """The file of the inputs that failed."""
        return self._failed.path

    @property
    def has_begun(self) -> bool:
        """Whether there is something to resume."""
        return self._job.exists()

    def run(self, compute: Compute, tell: Callable[[Progress], None] = lambda progress: None) -> Progress:
        """Until all is done; goes on where it was. Raises what `compute` raises, InvalidRequest and ModelChanged."""
        lock = FileLock(self._job.with_name(self._job.name + LOCK))
        try:
            with lock.acquire(timeout=0):
                try:
                    return self._run(compute, tell)
                finally:
                    Path(lock.lock_file).unlink(missing_ok=True)
        except Timeout:
            raise InvalidRequest(f"{self._job}: another process is at this job") from None

    def _run(self, compute: Compute, tell: Callable[[Progress], None]) -> Progress:
        sink_state = self._resume()
        if sink_state and self._sink.path.exists():  # all was done but to say so
            return self._end()
        over = threading.Event()
        try:
            self._begin(sink_state)
            found = answered(
                _windows(self._files.rows(self.progress.rows)), lambda rows: (rows, _of_good(rows, compute)), over,
                name="job",
            )  # fmt: skip
            with contextlib.closing(found):
                for rows, computed in found:
                    self._write(rows, computed)
                    tell(self.progress)
            self._sink.finish({**self._about, "space": self.space})
            self._failed.sync()
        finally:
            self._sink.close(self._kept.get("sink", {}))
            self._failed.close(self._kept.get("failed_bytes", 0))
        return self._end()

    def _begin(self, sink_state: dict[str, Any]) -> None:
        """Raises InvalidRequest where what was written is there no more."""
        try:
            self._sink.begin(sink_state)
        except InvalidRequest as error:
            raise InvalidRequest(f"{error.message}; delete {self._job} to begin anew") from None

    def _end(self) -> Progress:
        self._failed.close()
        self._sink.tidy()
        if not self.progress.failed:
            self.failures.unlink(missing_ok=True)
        self._job.unlink(missing_ok=True)
        return self.progress

    def _resume(self) -> dict[str, Any]:
        """The sink's state of a job that has begun. Raises InvalidRequest for one of other work."""
        known: dict[str, Any] = {}
        if self._job.exists():
            known = json.loads(self._job.read_text())
            for name in self._work:
                if known["work"].get(name) != json.loads(json.dumps(self._work[name])):
                    says = f"{name} was {known['work'].get(name)}, and is {self._work[name]}"
                    raise InvalidRequest(f"{self._job} is of another job: {says}; delete it to begin anew")
            self._kept = known
            self.progress, self.space = Progress(**known["progress"]), known["space"]
        self._failed.open_at(known.get("failed_bytes", 0))
        state: dict[str, Any] = known.get("sink", {})
        return state

    def _write(self, rows: Sequence[Row], computed: Computed | None) -> None:
        """A window, and then that it is written."""
        errors = {row.index: ("invalid_row", row.error) for row in rows if row.error}
        good = [row for row in rows if not row.error]
        if computed is not None:
            if self.space and computed.space != self.space:
                says = f"its space was {self.space}, and is {computed.space}"
                raise ModelChanged(f"the model has become another one: {says}")
            self.space = computed.space
            errors |= {good[i].index: found for i, found in computed.errors.items()}
            there = [i for i in range(len(good)) if i not in computed.errors]
            if there:
                values = computed.values
                kept = [values[i] for i in there] if isinstance(values, list) else values[there]
                self._sink.write([good[i] for i in there], kept)
            self.progress.tokens += computed.tokens
            self.progress.truncated += computed.truncated
        for row in rows:
            if row.index in errors:
                code, message = errors[row.index]
                line = {"index": row.index, "id": row.id, "code": code, "message": message}
                self._failed.append(json.dumps(line).encode() + b"\n")
        self.progress.rows = rows[-1].index + 1
        self.progress.bytes = rows[-1].end
        self.progress.failed += len(errors)
        self._keep()

    def _keep(self) -> None:
        known = {
            "work": self._work,
            "space": self.space,
            "sink": self._sink.state(),
            "failed_bytes": self._failed.sync(),
            "progress": dataclasses.asdict(self.progress),
        }
        write_json(self._job, known)
        self._kept = known


def _of_good(rows: Sequence[Row], compute: Compute) -> Computed | None:
    good = [row for row in rows if not row.error]
    return compute(good) if good else None


def _windows(rows: Iterator[Row]) -> Iterator[list[Row]]:
    return in_windows(rows, lambda row: sum(map(len, row.parts)), most=WINDOW_ROWS, most_size=WINDOW_CHARS)
