"""Where the results of a job go: jsonl, npy, parquet. What is written can be cut back to where a job stood.

While a job is under way its results lie beside the file that they will be, under another name.
"""

from __future__ import annotations

import abc
import contextlib
import importlib.util
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from embedpool.errors import InvalidRequest
from embedpool.jobs.durable import GrowingFile
from embedpool.jobs.sources import Row
from embedpool.outputs import SparseRow

VECTOR, SCORE, OUTPUTS = "vector", "score", "outputs"
PART, IDS, PARTS, NEW = ".part", ".ids.jsonl", ".parts", ".new"
GROUP_ROWS = 8192  # of a row group of a parquet file, at least where there are so many
ABOUT = b"embedpool"  # the key of a parquet file's metadata
NPY_HEAD_BYTES = 128

# Of shape (rows, width); of scores the width is 1. Or a list of rows: sparse, arrays of vectors, or several by name.
Values = NDArray[Any] | list[Any]
State = dict[str, Any]


class Sink(abc.ABC):
    """One file of results; `column` is what it calls them."""

    def __init__(self, path: Path, column: str) -> None:
        self.path = path
        self.column = column

    @abc.abstractmethod
    def begin(self, state: State) -> None:
        """Open it, cut back to a state; an empty one is the beginning."""

    @abc.abstractmethod
    def write(self, rows: Sequence[Row], values: Values) -> None:
        """Add results, each with its row."""

    @abc.abstractmethod
    def state(self) -> State:
        """How much there is, when all of it is on the disk."""

    @abc.abstractmethod
    def finish(self, about: Mapping[str, Any]) -> None:
        """The last result is written: the file gets its name."""

    def tidy(self) -> None:  # noqa: B027  (most have nothing to do)
        """The file has its name: nothing else is needed any more."""

    @abc.abstractmethod
    def close(self, state: State) -> None:
        """Let go of open files; one that is not finished is cut back to a state, so that the rest takes no room."""


def sink_of(path: Path, column: str) -> Sink:
    """By the end of the name. Raises InvalidRequest."""
    kinds: dict[str, type[Sink]] = {".jsonl": Jsonl, ".ndjson": Jsonl, ".npy": Npy, ".parquet": Parquet}
    kind = kinds.get(path.suffix.lower())
    if kind is None:
        raise InvalidRequest(f"{path}: the name must end with {', '.join(kinds)}")
    return kind(path, column)


def part_of(path: Path) -> Path:
    """What a file is called before it is finished."""
    return path.with_name(path.name + PART)


class Jsonl(Sink):
    """A line for each row: its id, and its vector or score."""

    def __init__(self, path: Path, column: str) -> None:
        super().__init__(path, column)
        self._file = GrowingFile(part_of(path))

    @override
    def begin(self, state: State) -> None:
        self._file.open_at(state.get("bytes", 0))

    @override
    def write(self, rows: Sequence[Row], values: Values) -> None:
        import orjson

        for row, value in zip(rows, values, strict=True):
            column = OUTPUTS if isinstance(value, dict) else self.column
            found = {"id": row.id, column: value[0] if self.column == SCORE else value}
            options = orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE
            self._file.append(orjson.dumps(found, SparseRow._asdict, options))

    @override
    def state(self) -> State:
        return {"bytes": self._file.sync()}

    @override
    def finish(self, about: Mapping[str, Any]) -> None:
        self._file.sync()
        self._file.close()
        self._file.path.replace(self.path)

    @override
    def close(self, state: State) -> None:
        self._file.close(state.get("bytes", 0))


class Npy(Sink):
    """One array of shape (rows, width), and the ids a line beside it."""

    def __init__(self, path: Path, column: str) -> None:
        super().__init__(path, column)
        self._file = GrowingFile(part_of(path))
        self._ids_path = path.with_name(path.name.removesuffix(path.suffix) + IDS)
        self._ids = GrowingFile(part_of(self._ids_path))
        self._shape: tuple[int, int] | None = None
        self._dtype = ""

    @override
    def begin(self, state: State) -> None:
        if self._ids_path.exists() and state:  # the end of a job was cut off between two renames
            self._ids_path.replace(self._ids.path)
        self._file.open_at(state.get("bytes", 0))
        self._ids.open_at(state.get("ids_bytes", 0))
        self._dtype = state.get("dtype", "")
        self._shape = (state["rows"], state["width"]) if "rows" in state else None

    @override
    def write(self, rows: Sequence[Row], values: Values) -> None:
        if isinstance(values, list):
            raise InvalidRequest(f"{self.path}: an array holds vectors alone; write jsonl or parquet")
        if self._shape is None:
            self._shape, self._dtype = (0, values.shape[1]), values.dtype.str
            self._file.append(bytes(NPY_HEAD_BYTES))
        self._file.append(np.ascontiguousarray(values, self._dtype).tobytes())
        self._ids.append(b"".join(json.dumps(row.id).encode() + b"\n" for row in rows))
        self._shape = (self._shape[0] + len(rows), self._shape[1])

    @override
    def state(self) -> State:
        found: State = {"bytes": self._file.sync(), "ids_bytes": self._ids.sync(), "dtype": self._dtype}
        return found | ({"rows": self._shape[0], "width": self._shape[1]} if self._shape else {})

    @override
    def finish(self, about: Mapping[str, Any]) -> None:
        shape, dtype = self._shape or (0, 0), self._dtype or "<f4"
        if self._shape is None:
            self._file.append(bytes(NPY_HEAD_BYTES))
        head = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': ({shape[0]}, {shape[1]}), }}"
        length = NPY_HEAD_BYTES - 10
        magic = b"\x93NUMPY\x01\x00" + length.to_bytes(2, "little")
        self._file.put(0, magic + head.ljust(length - 1).encode() + b"\n")
        for file, path in ((self._ids, self._ids_path), (self._file, self.path)):
            file.sync()
            file.close()
            file.path.replace(path)

    @override
    def close(self, state: State) -> None:
        self._file.close(state.get("bytes", 0))
        self._ids.close(state.get("ids_bytes", 0))


class Parquet(Sink):
    """Columns id and vector (a list of fixed size) or score; what made them stands in the metadata.

    A sparse row has the columns indices and values, several vectors are a list of lists; of several outputs each has a
    column of its name.

    A parquet file cannot be continued, so each part of the work is a file of its own until the last is there.
    """

    def __init__(self, path: Path, column: str) -> None:
        super().__init__(path, column)
        if importlib.util.find_spec("pyarrow") is None:
            raise InvalidRequest(f"{path}: parquet wants pyarrow: pip install 'embedpool[files]'")
        self._folder = path.with_name(path.name + PARTS)
        self._parts = 0

    @override
    def begin(self, state: State) -> None:
        self._parts = state.get("parts", 0)
        self._folder.mkdir(exist_ok=True)
        self._drop(state)
        if missing := [number for number in range(self._parts) if not self._part(number).exists()]:
            raise InvalidRequest(f"{self._part(missing[0])} is gone")

    def _drop(self, state: State) -> None:
        """The parts that are none of a state."""
        for file in self._folder.iterdir():
            if file.suffix == NEW or not file.stem.isdecimal() or int(file.stem) >= state.get("parts", 0):
                file.unlink()

    @override
    def write(self, rows: Sequence[Row], values: Values) -> None:
        from pyarrow import parquet

        new = self._part(self._parts).with_suffix(NEW)
        parquet.write_table(self._table(rows, values), new)
        with new.open("rb") as file:
            os.fsync(file.fileno())
        new.replace(self._part(self._parts))
        self._parts += 1

    @override
    def state(self) -> State:
        return {"parts": self._parts}

    @override
    def finish(self, about: Mapping[str, Any]) -> None:
        """One file of all parts, some of them at a time. Where ids are of two kinds they are texts."""
        import pyarrow
        from pyarrow import parquet

        part = part_of(self.path)
        schemas = [parquet.read_schema(self._part(number)) for number in range(self._parts)]
        schema = schemas[0] if schemas else self._table((), np.zeros((0, 1), np.float32)).schema
        if any(one.field("id").type != schema.field("id").type for one in schemas):
            schema = schema.set(0, pyarrow.field("id", pyarrow.string()))
        schema = schema.with_metadata({ABOUT: json.dumps(about, sort_keys=True).encode()})
        with parquet.ParquetWriter(part, schema) as writer:
            group: list[Any] = []
            for number in range(self._parts):
                group.append(parquet.read_table(self._part(number)).cast(schema))
                if sum(table.num_rows for table in group) >= GROUP_ROWS or number == self._parts - 1:
                    writer.write_table(pyarrow.concat_tables(group), row_group_size=1 << 20)
                    group = []
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(self.path)

    @override
    def tidy(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    @override
    def close(self, state: State) -> None:
        with contextlib.suppress(OSError):
            self._drop(state)

    def _part(self, number: int) -> Path:
        return self._folder / f"{number:08}.parquet"

    def _table(self, rows: Sequence[Row], values: Values) -> Any:
        import pyarrow

        ids = [row.id for row in rows]
        of_ids = pyarrow.array(ids if all(isinstance(one, int) for one in ids) else [str(one) for one in ids])
        if isinstance(values, list) and values and isinstance(values[0], dict):
            columns: dict[str, Any] = {}
            for output in values[0]:
                columns |= _columns(output, [row[output] for row in values])
        else:
            columns = _columns(self.column, values)
        return pyarrow.table({"id": of_ids, **columns})


def _columns(name: str, values: Values) -> dict[str, Any]:
    """The columns of rows of one kind."""
    import pyarrow

    if isinstance(values, np.ndarray) or (values and isinstance(values[0], np.ndarray) and values[0].ndim == 1):
        return {name: _vectors(np.asarray(values)) if name != SCORE else pyarrow.array(np.ravel(values))}
    if values and isinstance(values[0], SparseRow):
        prefix = "" if name == VECTOR else f"{name}_"
        return {
            f"{prefix}{part}": _lists([getattr(row, part) for row in values], pyarrow.array)
            for part in SparseRow._fields
        }
    return {name: _lists(values, _vectors)}


def _vectors(values: NDArray[Any]) -> Any:
    """Of shape (vectors, width)."""
    import pyarrow

    flat = pyarrow.array(np.ascontiguousarray(values).ravel())
    return pyarrow.FixedSizeListArray.from_arrays(flat, values.shape[1])


def _lists(arrays: Sequence[NDArray[Any]], of_all: Callable[[NDArray[Any]], Any]) -> Any:
    """A list for each array, of what `of_all` makes of them laid end to end."""
    import pyarrow

    ends = np.cumsum([0, *map(len, arrays)]).astype(np.int32)
    there = [array for array in arrays if len(array)]  # one without vectors may not know how long they would be
    return pyarrow.ListArray.from_arrays(pyarrow.array(ends), of_all(np.concatenate(there or arrays[:1])))
