"""Rows → JSON, base64, npy or npz, without passing a float through Python."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import orjson
from flask import Response

from embedpool.pool.request import Result
from embedpool.tasks.embed import Vectors
from embedpool.tasks.hybrid import TASK_OF_OUTPUT
from embedpool.tasks.rows import Rows

NPY, NPZ = "application/x-npy", "application/x-npz"
Names = Callable[[list[int]], list[str]]  # tokens of the vocabulary

# Bytes of a number of a vector, about, in an answer of each form; packed precisions are meant in JSON.
NUMBER_BYTES = {"float": 12, "base64": 16 / 3, "npy": 4, "int8": 4, "uint8": 4, "binary": 5 / 8, "ubinary": 4 / 8}


def json_response(document: Any, status: int = 200) -> Response:
    """Any document; numpy arrays in it become lists of numbers."""
    body = orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY)
    return Response(body, status, mimetype="application/json")


def as_base64(vectors: Vectors) -> list[str]:
    """One string per vector: its bytes, little-endian, in its dtype."""
    little = np.ascontiguousarray(vectors, dtype=vectors.dtype.newbyteorder("<"))
    return [base64.b64encode(row).decode("ascii") for row in little]


def forms_of(rows: Rows, encoding: str, names: Names | None = None) -> Any:
    """What stands for each row: numbers, an object of indices and values (and tokens by `names`), or a list of vectors.

    In base64 each array of numbers is a string, each vector one of its own.
    """
    if rows.splits is None:
        return as_base64(rows.values) if encoding == "base64" else rows.values
    spans = [slice(a, b) for a, b in zip(rows.splits[:-1].tolist(), rows.splits[1:].tolist(), strict=True)]
    if rows.indices is None:
        vectors = [rows.values[span] for span in spans]
        return [as_base64(found) for found in vectors] if encoding == "base64" else vectors
    found = []
    for span in spans:
        row: dict[str, Any] = {"indices": rows.indices[span], "values": rows.values[span]}
        if encoding == "base64":
            row = {name: as_base64(array[None])[0] for name, array in row.items()}
        if names is not None:
            row["tokens"] = names(rows.indices[span].tolist())
        found.append(row)
    return found


def answers_of(rows: Rows, encoding: str, names: Names | None = None) -> list[dict[str, Any]]:
    """For each row `vector`, or where there are several outputs `outputs`, by their names."""
    if not rows.also:
        return [{"vector": form} for form in forms_of(rows, encoding, names)]
    outputs = _outputs(rows, encoding, names)
    return [{"outputs": {name: forms[i] for name, forms in outputs.items()}} for i in range(len(rows))]


def _outputs(rows: Rows, encoding: str, names: Names | None) -> dict[str, Sequence[Any]]:
    return {
        name: forms_of(rows.also[task], encoding, names) for name, task in TASK_OF_OUTPUT.items() if task in rows.also
    }


def arrays_of(rows: Rows) -> dict[str, Any]:
    """The arrays of rows by name; of several outputs with the output's name before it, and a dot."""
    if not rows.also:
        return dict(rows.arrays())
    return {
        f"{output}.{name}": array
        for output, task in TASK_OF_OUTPUT.items()
        if task in rows.also
        for name, array in rows.also[task].arrays().items()
    }


def embed_response(
    result: Result,
    encoding: str,
    dimensions: int | None = None,
    *,
    names: Names | None = None,
    partial: bool = False,
) -> Response:
    """The answer of POST /embed; `dimensions` are those that were asked for."""
    widths = [rows.width for rows in (result.rows, *result.rows.also.values())]
    return json_response(
        {
            "model": result.model,
            "dim": None if result.rows.indices is not None else dimensions or max(widths),
            **_rows(result, encoding, names, partial=partial),
            "meta": {"count": len(result.rows), **timing(result)},
        }
    )


def timing(result: Result) -> dict[str, Any]:
    """What was done for a result, for the `meta` of an answer."""
    return {
        "tokens": result.tokens,
        "truncated": result.truncated,
        "queue_ms": round(result.queue_ms, 3),
        "compute_ms": round(result.compute_ms, 3),
        "total_ms": round(result.total_ms, 3),
        "replicas": result.replicas,
    }


def _rows(result: Result, encoding: str, names: Names | None, *, partial: bool) -> dict[str, Any]:
    """With `partial`, null for each text that failed, and why it did."""

    def those_that_are(forms: Sequence[Any]) -> Sequence[Any]:
        return [None if i in result.errors else form for i, form in enumerate(forms)] if partial else forms

    told = errors_of(result) if partial else {}
    if not result.rows.also:
        return {"vectors": those_that_are(forms_of(result.rows, encoding, names)), **told}
    outputs = _outputs(result.rows, encoding, names)
    return {"outputs": {name: those_that_are(forms) for name, forms in outputs.items()}, **told}


def errors_of(result: Result) -> dict[str, Any]:
    """What a partial answer says of the inputs that failed."""
    return {
        "errors": [
            {"index": i, "code": error.code, "message": error.message, "at_fault": bool(error.inputs)}
            for i, error in sorted(result.errors.items())
        ]
    }


def npy_response(result: Result) -> Response:
    """One .npy array of shape (texts, dim), or an .npz of the arrays of other rows; the counts travel in headers."""
    stream = io.BytesIO()
    rows, is_one_array = result.rows, result.rows.splits is None and not result.rows.also
    if is_one_array:
        np.save(stream, result.vectors, allow_pickle=False)
    else:
        np.savez(stream, allow_pickle=False, **arrays_of(rows))
    response = Response(stream.getvalue(), mimetype=NPY if is_one_array else NPZ)
    response.headers["X-Embedpool-Model"] = result.model
    response.headers["X-Embedpool-Tokens"] = str(result.tokens)
    response.headers["X-Embedpool-Truncated"] = str(len(result.truncated))
    return response
