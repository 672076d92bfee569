"""The input of a batch: a request a line, all of them checked before the first runs."""

from __future__ import annotations

import array
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orjson
from numpy.typing import NDArray

from embedpool.jobs.windows import in_windows

WINDOW_LINES, WINDOW_BYTES = 128, 2_000_000  # two of them are under way
MOST_LINES = 1_000_000
LONGEST_LINE_BYTES = 64 << 20
MOST_FAULTS = 100  # of a file that are told
NO_JSON = object()
KEYS = {"custom_id": str, "method": str, "url": str, "body": dict}


@dataclasses.dataclass(frozen=True, slots=True)
class Line:
    """A request of a file."""

    custom_id: str
    body: bytes
    end: int  # bytes of the file up to its end
    model: Any = None


class Fault(NamedTuple):
    """What is wrong, as OpenAI's API has it; lines are counted from 1."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None


class Checked:
    """What a file is found to hold. `before_each` is called before each line, and may raise."""

    def __init__(
        self, path: Path, endpoint: str, before_each: Callable[[], None] = lambda: None, most: int = MOST_LINES
    ) -> None:
        self.faults: list[Fault] = []
        self.requests = 0
        self.models: set[Any] = set()  # two at most
        self._endpoint = endpoint
        self._ids = array.array("q")  # hashes of them, which take less than the ids
        try:
            with path.open("rb") as file:
                self._check(file, before_each)
                if (twice := self._twice()).size:
                    file.seek(0)
                    self._name(file, twice, before_each)
        except FileNotFoundError:
            self.faults.append(Fault("invalid_input_file", "the input file is gone"))
            return
        if not self.requests:
            self.faults.append(Fault("empty_file", "the input file holds no request"))
        if self.requests > most:
            says = f"the input file holds {self.requests} requests, and may hold {most} (limits.max_batch_requests)"
            self.faults.append(Fault("too_many_tasks", says))

    def _check(self, file: Any, before_each: Callable[[], None]) -> None:
        for number, found in _documents(file):
            before_each()
            self.requests += 1
            if fault := self._fault(number, found):
                self.faults.append(fault)
            if len(self.faults) >= MOST_FAULTS:
                return

    def _twice(self) -> NDArray[np.int64]:
        """The hashes that several ids have, some of them: so many that they name enough faults."""
        hashes = np.sort(np.frombuffer(self._ids, np.int64))
        return np.unique(hashes[1:][hashes[1:] == hashes[:-1]])[:MOST_FAULTS]

    def _name(self, file: Any, twice: NDArray[np.int64], before_each: Callable[[], None]) -> None:
        """The lines whose ids, among those with such hashes, were used before."""
        hashes, seen, faulty = set(twice.tolist()), set(), {fault.line for fault in self.faults}
        for number, found in _documents(file):
            before_each()
            custom_id = found.get("custom_id") if isinstance(found, dict) else None
            if number in faulty or not isinstance(custom_id, str) or hash(custom_id) not in hashes:
                continue
            if custom_id in seen:
                says = f"{custom_id[:80]!r} was used before"
                self.faults.append(Fault("duplicate_custom_id", says, number, "custom_id"))
            seen.add(custom_id)
            if len(self.faults) >= MOST_FAULTS:
                break
        self.faults.sort(key=lambda fault: fault.line or 0)

    def _fault(self, number: int, found: Any) -> Fault | None:
        if found is NO_JSON:
            return Fault("invalid_json_line", "this line is not parseable as valid JSON", number)
        if not isinstance(found, dict):
            return Fault("invalid_json_line", "this line is no JSON object", number)
        for name, kind in KEYS.items():
            if found.get(name) in (None, ""):
                return Fault("missing_required_parameter", f"missing required parameter: {name!r}", number, name)
            if not isinstance(found[name], kind):
                return Fault("invalid_type", f"{name} is of the wrong type", number, name)
        endpoint, url, custom_id = self._endpoint, found["url"], found["custom_id"]
        self._ids.append(hash(custom_id))
        checks = (
            ("method", "invalid_method", found["method"] == "POST", "the method must be POST"),
            ("url", "mismatched_url", url == endpoint, f"the url {url[:80]!r} is not that of the batch, {endpoint!r}"),
        )
        model = found["body"].get("model")
        if len(self.models) < 2 and isinstance(model, str):
            self.models.add(model)
        return next((Fault(code, says, number, name) for name, code, is_right, says in checks if not is_right), None)


def _documents(file: Any) -> Iterator[tuple[int, Any]]:
    """What the lines hold that are not blank, each with its number: a document or NO_JSON."""
    for number, raw in enumerate(_raw_lines(file), 1):
        if raw.strip():
            try:
                yield number, orjson.loads(raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw)
            except orjson.JSONDecodeError:
                yield number, NO_JSON


def windows(file: Any, start: int) -> Iterator[list[Line]]:
    """Of a file that was found to be valid, from a place on."""
    file.seek(start)
    lines = _lines(file, start)
    return in_windows(lines, lambda line: len(line.body), most=WINDOW_LINES, most_size=WINDOW_BYTES)


def _lines(file: Any, start: int) -> Iterator[Line]:
    end = start
    for raw in _raw_lines(file):
        if raw.strip():
            found = orjson.loads(raw.removeprefix(b"\xef\xbb\xbf") if end == 0 else raw)
            body, model = found["body"], found["body"].get("model")
            known = model if isinstance(model, str) else None
            yield Line(found["custom_id"], orjson.dumps(body), end + len(raw), known)
        end += len(raw)


def _raw_lines(file: Any) -> Iterator[bytes]:
    """Lines up to a length that no request has."""
    while raw := file.readline(LONGEST_LINE_BYTES):
        yield raw
