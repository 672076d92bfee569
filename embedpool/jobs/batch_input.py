"""The input of a batch: a request a line, all of them checked before the first runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from embedpool.jobs.windows import in_windows

WINDOW_LINES, WINDOW_BYTES = 128, 2_000_000  # two of them are under way
MOST_LINES = 1_000_000
LONGEST_LINE_BYTES = 64 << 20
MOST_FAULTS = 100  # of a file that are told
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

    def __init__(self, path: Path, endpoint: str, before_each: Callable[[], None] = lambda: None) -> None:
        self.faults: list[Fault] = []
        self.requests = 0
        self.models: set[Any] = set()  # two at most
        self._endpoint = endpoint
        self._seen: set[int] = set()  # hashes of ids, which take less than the ids
        try:
            with path.open("rb") as file:
                self._check(file, before_each)
        except FileNotFoundError:
            self.faults.append(Fault("invalid_input_file", "the input file is gone"))
            return
        if not self.requests:
            self.faults.append(Fault("empty_file", "the input file holds no request"))
        if self.requests > MOST_LINES:
            self.faults.append(Fault("too_many_tasks", f"the input file holds more than {MOST_LINES} requests"))

    def _check(self, file: Any, before_each: Callable[[], None]) -> None:
        for number, raw in enumerate(_raw_lines(file), 1):
            before_each()
            if not raw.strip():
                continue
            self.requests += 1
            if fault := self._fault(number, raw):
                self.faults.append(fault)
            if len(self.faults) >= MOST_FAULTS:
                return

    def _fault(self, number: int, raw: bytes) -> Fault | None:
        try:
            found = orjson.loads(raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw)
        except orjson.JSONDecodeError:
            return Fault("invalid_json_line", "this line is not parseable as valid JSON", number)
        if not isinstance(found, dict):
            return Fault("invalid_json_line", "this line is no JSON object", number)
        for name, kind in KEYS.items():
            if found.get(name) in (None, ""):
                return Fault("missing_required_parameter", f"missing required parameter: {name!r}", number, name)
            if not isinstance(found[name], kind):
                return Fault("invalid_type", f"{name} is of the wrong type", number, name)
        endpoint, url, custom_id = self._endpoint, found["url"], found["custom_id"]
        is_new = hash(custom_id) not in self._seen
        checks = (
            ("method", "invalid_method", found["method"] == "POST", "the method must be POST"),
            ("url", "mismatched_url", url == endpoint, f"the url {url[:80]!r} is not that of the batch, {endpoint!r}"),
            ("custom_id", "duplicate_custom_id", is_new, f"{custom_id[:80]!r} was used before"),
        )
        self._seen.add(hash(custom_id))
        model = found["body"].get("model")
        if len(self.models) < 2 and isinstance(model, str):
            self.models.add(model)
        return next((Fault(code, says, number, name) for name, code, is_right, says in checks if not is_right), None)


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
