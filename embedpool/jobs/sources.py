"""Files of texts, read row by row in bounded memory: txt, jsonl, csv, parquet.

A row that holds no text carries its error and goes on to the failures; what is wrong with a file as a whole is raised.
"""

from __future__ import annotations

import csv
import dataclasses
import glob
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeGuard

from embedpool.errors import InvalidRequest

ROWS_AT_ONCE = 1024  # of a parquet file
LONGEST_FIELD_CHARS = 1 << 27  # of a csv file; the csv module's own limit is 131,072
FORMATS = (".txt", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """An input: its place in all files, its id, its parts (a text, or a query and a document) or why it has none.

    `end` is how many bytes of all files have been read with it, about.
    """

    index: int
    id: str | int
    parts: tuple[str, ...]
    end: int
    error: str = ""


class Files:
    """Files that make one row of inputs, in order. Raises InvalidRequest if there are none, or one cannot be read."""

    def __init__(self, patterns: Sequence[str], columns: Sequence[str], id_column: str | None) -> None:
        self.paths = [path for pattern in patterns for path in _found(pattern)]
        self._columns = tuple(columns)
        self._id_column = id_column
        self._readers = [_reader(path) for path in self.paths]
        self.sizes = [path.stat().st_size for path in self.paths]

    @property
    def total_bytes(self) -> int:
        """Of all files."""
        return sum(self.sizes)

    def fingerprint(self) -> list[list[Any]]:
        """What tells these files from others: names, sizes, and when they were written."""
        return [[str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns] for path in self.paths]

    def rows(self, after: int = 0) -> Iterator[Row]:
        """The rows from number `after` on."""
        index = before = 0
        for path, size, reader in zip(self.paths, self.sizes, self._readers, strict=True):
            for record, end in reader(path, self._wanted):
                if index >= after:
                    yield self._row(index, record, before + end)
                index += 1
            before += size

    @property
    def _wanted(self) -> list[str]:
        return [*self._columns, *([self._id_column] if self._id_column else [])]

    def _row(self, index: int, record: Any, end: int) -> Row:
        if isinstance(record, str) and len(self._columns) == 1:  # a line, which has no columns
            return Row(index, index, (record,), end)
        if not isinstance(record, dict):
            return Row(index, index, (), end, record.says if isinstance(record, _Broken) else "it is no object")
        given = record.get(self._id_column) if self._id_column else index
        if self._id_column and not _is_id(given):
            says = (
                f"its {self._id_column} is no text and no number of 64 bits"
                if given is not None
                else (f"it has no {self._id_column}")
            )
            return Row(index, index, (), end, says)
        parts = tuple(record.get(name) for name in self._columns)
        missing = [name for name, part in zip(self._columns, parts, strict=True) if not isinstance(part, str)]
        identity = given if _is_id(given) else index
        if missing:
            return Row(index, identity, (), end, f"{', '.join(missing)}: not a text")
        return Row(index, identity, tuple(str(part) for part in parts), end)


def _is_id(given: Any) -> TypeGuard[str | int]:
    """Whether every kind of file of results can hold it."""
    return isinstance(given, str) or (type(given) is int and -(2**63) <= given < 2**63)


@dataclasses.dataclass(frozen=True, slots=True)
class _Broken:
    """A row that cannot be read."""

    says: str


Records = Iterator[tuple[Any, int]]  # each with the bytes of its file that have been read, about


def _found(pattern: str) -> list[Path]:
    """The files that a pattern means: itself, those of a folder, or of a glob."""
    path = Path(pattern)
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if file.suffix.lower() in FORMATS)
    else:
        found = [path] if path.is_file() else sorted(Path(one) for one in glob.glob(pattern, recursive=True))
    if not found:
        raise InvalidRequest(f"no file is {pattern}")
    return found


def _reader(path: Path) -> Callable[[Path, Sequence[str]], Records]:
    suffix = path.suffix.lower()
    if suffix in (".jsonl", ".ndjson"):
        return _jsonl
    if suffix in (".csv", ".tsv"):
        return _csv
    if suffix == ".parquet":
        return _parquet
    if suffix == ".txt":
        return _txt
    raise InvalidRequest(f"{path}: the name must end with {', '.join(FORMATS)}")


def _txt(path: Path, wanted: Sequence[str]) -> Records:
    """A text a line; an empty line is a text."""
    end = 0
    with path.open("rb") as file:
        for raw in file:
            end += len(raw)
            try:
                yield raw.decode().removesuffix("\n").removesuffix("\r"), end
            except UnicodeDecodeError:
                yield _Broken("it is not UTF-8"), end


def _jsonl(path: Path, wanted: Sequence[str]) -> Records:
    """An object a line, or a string; blank lines are nothing."""
    end = 0
    with path.open("rb") as file:
        for raw in file:
            end += len(raw)
            if raw.strip():
                try:
                    yield json.loads(raw), end
                except ValueError as error:
                    yield _Broken(f"it is not JSON: {error}"), end


def _csv(path: Path, wanted: Sequence[str]) -> Records:
    """With a head that names the columns."""
    end = 0

    def lines() -> Iterator[str]:
        nonlocal end
        with path.open("rb") as file:
            for raw in file:
                end += len(raw)
                # What is not UTF-8 becomes halves of characters, so that its row fails alone.
                yield raw.decode("utf-8-sig" if end == len(raw) else "utf-8", "surrogateescape")

    csv.field_size_limit(LONGEST_FIELD_CHARS)
    try:
        reader = csv.DictReader(lines(), delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
        _require_columns(path, wanted, reader.fieldnames or ())
        for record in reader:
            yield record, end
    except csv.Error as error:
        raise InvalidRequest(f"{path}: {error}") from None


def _parquet(path: Path, wanted: Sequence[str]) -> Records:
    """The columns that are wanted, some rows at a time."""
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise InvalidRequest(f"{path}: reading parquet wants pyarrow: pip install 'embedpool[files]'") from None
    try:
        with ParquetFile(path) as file:
            _require_columns(path, wanted, file.schema_arrow.names)
            ends = _ends(file.metadata, wanted, path.stat().st_size)
            for batch in file.iter_batches(ROWS_AT_ONCE, columns=list(wanted)):
                yield from zip(batch.to_pylist(), ends)  # noqa: B905  (the ends go on)
    except pyarrow.ArrowException as error:
        raise InvalidRequest(f"{path}: {error}") from None


def _ends(metadata: Any, wanted: Sequence[str], size: int) -> Iterator[int]:
    """How much of a parquet file's `size` has been read with each row: by what its columns take in each row group."""
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    columns = ([group.column(i) for i in range(group.num_columns)] for group in groups)
    taken = [sum(c.total_uncompressed_size for c in of if c.path_in_schema in wanted) for of in columns]
    before, total = 0, max(sum(taken), 1)
    for group, bytes_ in zip(groups, taken, strict=True):
        for row in range(1, group.num_rows + 1):
            yield size * (before * group.num_rows + bytes_ * row) // (total * group.num_rows)
        before += bytes_


def _require_columns(path: Path, wanted: Sequence[str], there: Sequence[str]) -> None:
    if missing := [name for name in wanted if name not in there]:
        raise InvalidRequest(f"{path} has no column {', '.join(missing)}; it has {', '.join(there)}")
