"""Vectors → JSON, base64 or npy."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest

from embedpool.pool.request import Result
from embedpool.tasks.rows import Rows
from embedpool.web.encoding import as_base64, embed_response, json_response, npy_response

VECTORS = np.array([[0.1, -1.5, 3e-8], [1, 2, 3]], np.float32)


def result(vectors: np.ndarray) -> Result:
    return Result("org/m", "a space", Rows(vectors), vectors.shape[1], 7, [1], 0.5, 0.12345, 1.0, 2.0, ["org/m#1"])


@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f2", ">f2", "i1", "u1"])
def test_base64_is_little_endian_in_its_dtype(dtype: str) -> None:
    """Every vector is one string of its little-endian bytes, whatever machine made it."""
    vectors = VECTORS.astype(dtype) if dtype[-2] == "f" else np.array([[1, 2, 3], [4, 5, 6]], dtype)
    little = np.dtype(dtype).newbyteorder("<")
    decoded = [np.frombuffer(base64.b64decode(s), little) for s in as_base64(vectors)]
    np.testing.assert_array_equal(np.stack(decoded), vectors)


def test_vectors_that_do_not_lie_together_in_memory() -> None:
    """A cut of wider vectors is encoded as such."""
    wide = np.arange(20, dtype=np.float32).reshape(2, 10)
    decoded = [np.frombuffer(base64.b64decode(s), "<f4") for s in as_base64(wide[:, ::2])]
    np.testing.assert_array_equal(np.stack(decoded), wide[:, ::2])


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int8, np.uint8])
def test_json_shows_the_exact_numbers(dtype: type) -> None:
    """Numbers read back from JSON are those that were sent."""
    vectors = np.array([[1, 2, 3], [100, 0, 7]], dtype)
    answer = embed_response(result(vectors), "float")
    assert answer.mimetype == "application/json"
    np.testing.assert_array_equal(np.array(answer.json["vectors"], dtype), vectors)


def test_float32_survives_json() -> None:
    """JSON carries enough digits for every float32."""
    np.testing.assert_array_equal(np.array(embed_response(result(VECTORS), "float").json["vectors"], "f4"), VECTORS)


def test_the_meta_of_an_answer() -> None:
    """The answer tells counts, truncated texts, times and replicas beside the vectors."""
    assert embed_response(result(VECTORS), "base64").json == {
        "model": "org/m",
        "dim": 3,
        "vectors": as_base64(VECTORS),
        "meta": {
            "count": 2,
            "tokens": 7,
            "truncated": [1],
            "queue_ms": 0.123,
            "compute_ms": 1.0,
            "total_ms": 2.0,
            "replicas": ["org/m#1"],
        },
    }


def test_npy_is_one_array_and_its_counts_are_headers() -> None:
    """The npy answer can be loaded without pickle and tells its model and counts in headers."""
    answer = npy_response(result(VECTORS))
    np.testing.assert_array_equal(np.load(io.BytesIO(answer.data), allow_pickle=False), VECTORS)
    assert answer.mimetype == "application/x-npy"
    assert answer.headers["X-Embedpool-Model"] == "org/m"
    assert answer.headers["X-Embedpool-Tokens"] == "7"
    assert answer.headers["X-Embedpool-Truncated"] == "1"


def test_json_response_has_its_status() -> None:
    """Any document can be answered with any status."""
    answer = json_response({"a": [1, "ü"]}, 202)
    assert (answer.status_code, answer.json) == (202, {"a": [1, "ü"]})
