"""Vectors → JSON, base64 or npy, without passing a float through Python."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
import orjson
from flask import Response

from embedpool.pool.request import Result
from embedpool.tasks.embed import Vectors

NPY = "application/x-npy"

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


def embed_response(result: Result, encoding: str, dimensions: int | None = None, *, partial: bool = False) -> Response:
    """The answer of POST /embed; `dimensions` are those that were asked for."""
    return json_response(
        {
            "model": result.model,
            "dim": dimensions or result.width,
            **_vectors(result, encoding, partial=partial),
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


def _vectors(result: Result, encoding: str, *, partial: bool) -> dict[str, Any]:
    """With `partial`, null for each text that failed, and why it did."""
    vectors: Any = as_base64(result.vectors) if encoding == "base64" else result.vectors
    if not partial:
        return {"vectors": vectors}
    return {"vectors": [None if i in result.errors else v for i, v in enumerate(vectors)], **errors_of(result)}


def errors_of(result: Result) -> dict[str, Any]:
    """What a partial answer says of the inputs that failed."""
    return {
        "errors": [
            {"index": i, "code": error.code, "message": error.message, "at_fault": bool(error.inputs)}
            for i, error in sorted(result.errors.items())
        ]
    }


def npy_response(result: Result) -> Response:
    """One .npy array of shape (texts, dim); the counts travel in headers."""
    stream = io.BytesIO()
    np.save(stream, result.vectors, allow_pickle=False)
    response = Response(stream.getvalue(), mimetype=NPY)
    response.headers["X-Embedpool-Model"] = result.model
    response.headers["X-Embedpool-Tokens"] = str(result.tokens)
    response.headers["X-Embedpool-Truncated"] = str(len(result.truncated))
    return response
