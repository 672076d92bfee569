"""Rows that are no vectors, as whoever asks a server for them has them: sparse ones, and one vector for each token."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

OF_PRECISION = {"int8": "i1", "uint8": "u1", "binary": "i1", "ubinary": "u1"}  # what its numbers are
DENSE, SPARSE, MULTIVECTOR = "dense", "sparse", "multivector"


class SparseRow(NamedTuple):
    """Token ids (int32, ascending) and what each of them weighs (float32)."""

    indices: NDArray[np.int32]
    values: NDArray[np.float32]


def rows_of_arrays(arrays: Mapping[str, NDArray[Any]]) -> Any:
    """Of the arrays in an .npz answer of POST /embed: a row for each text; of several outputs such rows by name."""
    if "values" not in arrays:
        names = dict.fromkeys(name.partition(".")[0] for name in arrays)
        return {
            output: rows_of_arrays(
                {name.partition(".")[2]: arrays[name] for name in arrays if name.startswith(f"{output}.")}
            )
            for output in names
        }
    values = arrays["values"]
    if "splits" not in arrays:
        return values
    ends = arrays["splits"][1:-1]
    rows = np.split(values, ends)
    if "indices" not in arrays:
        return rows
    return [SparseRow(*row) for row in zip(np.split(arrays["indices"], ends), rows, strict=True)]


def row_of_base64(form: Any, dtype: str = "<f4") -> Any:
    """A row of an answer in JSON whose numbers are base64: a vector, an array of vectors, a SparseRow, or several."""
    if isinstance(form, str):
        return np.frombuffer(base64.b64decode(form), dtype)
    if isinstance(form, list):
        vectors = [row_of_base64(vector, dtype) for vector in form]
        return np.stack(vectors) if vectors else np.zeros((0, 0), dtype)
    if "indices" in form:
        return SparseRow(row_of_base64(form["indices"], "<i4"), row_of_base64(form["values"]))
    return {output: row_of_base64(row, dtype) for output, row in form.items()}


def rows_of_json(found: Mapping[str, Any], precision: str | None) -> Any:
    """Of an answer of POST /embed in JSON whose numbers are base64: an array of vectors, or a list of other rows."""
    forms = forms_in(found)
    is_half = max(map(_longest_bytes, forms), default=0) == 2 * (found["dim"] or 0)
    dtype = OF_PRECISION.get(precision or "") or ("<f2" if is_half else "<f4")
    if not all(isinstance(form, str | None) for form in forms):
        return [None if form is None else row_of_base64(form, dtype) for form in forms]
    vectors = [None if form is None else base64.b64decode(form) for form in forms]
    length = next((len(vector) for vector in vectors if vector is not None), 0)
    return np.frombuffer(b"".join(vector or bytes(length) for vector in vectors), dtype).reshape(len(vectors), -1)


def _longest_bytes(form: Any) -> int:
    """Of the vectors in such a row, or in none, the longest one's bytes."""
    if isinstance(form, str):
        return len(form) * 3 // 4 - form.count("=", -2)
    if isinstance(form, list):
        return max(map(_longest_bytes, form[:1]), default=0)  # all are as long
    return max(map(_longest_bytes, form.values()), default=0) if form and "indices" not in form else 0


def rows_each(arrays: Mapping[str, NDArray[Any]]) -> Any:
    """As `rows_of_arrays`, but of several outputs an object of them for each text."""
    found = rows_of_arrays(arrays)
    if not isinstance(found, dict):
        return found
    return [dict(zip(found, row, strict=True)) for row in zip(*found.values(), strict=True)]


def forms_in(found: Mapping[str, Any]) -> list[Any]:
    """What stands for each text in an answer of POST /embed in JSON; of several outputs an object of them."""
    if "outputs" not in found:
        return list(found["vectors"])
    outputs = found["outputs"]
    rows = map(list, zip(*outputs.values(), strict=True))
    return [None if None in row else dict(zip(outputs, row, strict=True)) for row in rows]
