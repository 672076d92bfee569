"""What the pool is asked and what it answers, and the final form of vectors."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedpool.errors import InferenceFailed, InvalidRequest

Vectors = NDArray[Any]  # shape (texts, dim)


@dataclasses.dataclass(frozen=True, slots=True)
class EmbedOptions:
    """Options of one request; None means the model's own setting. `extra` is passed on to remote services."""

    normalize: bool | None = None
    max_seq_length: int | None = None
    dtype: str | None = None
    dimensions: int | None = None
    prompt: str | None = None
    prompt_name: str | None = None
    truncate: str | None = None
    precision: str = "float32"
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, slots=True)
class EmbedRequest:
    """Texts for a model. `client_gone()` tells, from any thread, that nobody waits for the answer any more."""

    model: str
    texts: Sequence[str]
    options: EmbedOptions = EmbedOptions()
    timeout_s: float | None = None
    weight: float = 1.0
    client_gone: Callable[[], bool] = lambda: False


@dataclasses.dataclass(frozen=True, slots=True)
class EmbedResult:
    """`vectors` has shape (texts, dim) in the order of the request; times are in milliseconds."""

    model: str
    vectors: Vectors
    dim: int
    tokens: int
    truncated: list[int]
    queue_ms: float
    compute_ms: float
    total_ms: float
    replicas: list[str]


def finish(vectors: Vectors, options: EmbedOptions, *, normalize: bool, dtype: str) -> Vectors:
    """The vectors as asked: cut to `dimensions`, normalised, then in the asked precision and dtype.

    Takes float32 of shape (n, dim). int8 is clip(round(127·v)) of the normalised vector, so it does not depend on its
    batch; uint8 is int8 + 128; binary packs the signs of 8 values into a byte, ubinary the same unsigned (both as
    sentence-transformers does).
    """
    wanted = options.normalize if options.normalize is not None else normalize
    if options.dimensions is not None:
        if options.dimensions > vectors.shape[1]:
            message = f"{options.dimensions} is more than the model's {vectors.shape[1]}"
            raise InvalidRequest(
                f"options.dimensions: {message}",
                fields={"options.dimensions": message},
            )
        vectors = vectors[:, : options.dimensions]
    if wanted or options.precision in ("int8", "uint8"):
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        vectors = vectors / np.maximum(lengths, 1e-12)
    if options.precision == "float32":
        return _in_dtype(vectors, options.dtype or dtype)
    if options.precision in ("int8", "uint8"):
        scaled = np.clip(np.round(vectors * 127), -127, 127)
        return scaled.astype(np.int8) if options.precision == "int8" else (scaled + 128).astype(np.uint8)
    packed = np.packbits(vectors > 0, axis=1)
    return packed if options.precision == "ubinary" else (packed.astype(np.int16) - 128).astype(np.int8)


def _in_dtype(vectors: Vectors, dtype: str) -> Vectors:
    if dtype == "float32":
        return np.ascontiguousarray(vectors, dtype=np.float32)
    with np.errstate(over="ignore"):
        cast = np.ascontiguousarray(vectors, dtype=np.float16)
    if not np.isfinite(cast).all():
        raise InferenceFailed("the vectors do not fit float16; ask for float32 or normalize")
    return cast
