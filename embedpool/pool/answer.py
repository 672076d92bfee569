"""The jobs of a request, done, become its answer: gathered in order, then brought into the final form."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from embedpool.config.spec import ModelSpec
from embedpool.errors import EmbedpoolError, InferenceFailed, InvalidRequest
from embedpool.pool.door import Measured
from embedpool.pool.job import Flow, Job
from embedpool.pool.request import EmbedOptions, EmbedResult, Vectors

NO_FLOAT16 = "the vectors do not fit float16; ask for float32 or normalize"


def gather(
    flow: Flow,
    measured: Measured,
    options: EmbedOptions,
    spec: ModelSpec,
    *,
    arrived_at: float,
    measured_at: float,
    now: float,
) -> EmbedResult:
    """The answer of a request whose jobs are all done. Times are of the pool's clock, in seconds."""
    jobs = flow.jobs
    parts = [job.vectors for job in jobs if job.vectors is not None]
    errors = {job.offset + row: error for job in jobs for row, error in job.lost.items()}
    if errors or measured.refused:
        raw, errors = _around_gaps(jobs, measured, errors)
    else:
        raw = parts[0] if len(parts) == 1 else np.concatenate(parts)
    config = spec.driver.config
    if flow.partial and raw.shape[1]:
        raw, errors = _without_what_overflows(raw, errors, options, normalize=config.normalize, dtype=config.dtype)
    counted = sum(job.counted for job in jobs)
    return EmbedResult(
        model=spec.model,
        vectors=finish(raw, options, normalize=config.normalize, dtype=config.dtype) if raw.shape[1] else raw,
        dim=options.dimensions or raw.shape[1],
        tokens=round(counted) if counted else sum(count for i, count in enumerate(measured.tokens) if i not in errors),
        truncated=measured.truncated or [job.offset + i for job in jobs for i in sorted(job.truncated)],
        measure_ms=1000 * (measured_at - arrived_at),
        queue_ms=1000 * max(flow.started_at - arrived_at, 0),
        compute_ms=1000 * flow.compute_s,
        total_ms=1000 * (now - arrived_at),
        replicas=sorted(flow.replicas),
        errors=errors,
    )


def _without_what_overflows(
    raw: Vectors, errors: dict[int, EmbedpoolError], options: EmbedOptions, *, normalize: bool, dtype: str
) -> tuple[Vectors, dict[int, EmbedpoolError]]:
    """Vectors that do not fit the dtype are errors of their texts alone."""
    if (options.dtype or dtype) != "float16" or options.precision != "float32":
        return raw, errors
    final = finish(raw, dataclasses.replace(options, dtype="float32"), normalize=normalize, dtype="float32")
    too_large = np.flatnonzero(np.abs(final).max(axis=1, initial=0) > np.finfo(np.float16).max)
    if not too_large.size:
        return raw, errors
    raw = raw.copy()
    raw[too_large] = 0
    return raw, {**errors, **{int(i): InferenceFailed(NO_FLOAT16) for i in too_large}}


def _around_gaps(
    jobs: Sequence[Job], measured: Measured, lost: Mapping[int, EmbedpoolError]
) -> tuple[Vectors, dict[int, EmbedpoolError]]:
    """Vectors of all texts, zeros for those that failed, and why these did; `lost` counts among the texts that went on.

    Where all failed the vectors have no dimension.
    """
    kept = measured.kept
    errors = {**measured.refused, **{kept[i]: error for i, error in lost.items()}}
    dim = next((job.vectors.shape[1] for job in jobs if job.vectors is not None), 0)
    raw = np.zeros((len(measured.texts), dim), dtype=np.float32)
    for job in jobs:
        for row in range(len(job)):
            if job.vectors is not None and row not in job.lost:
                raw[kept[job.offset + row]] = job.vectors[row]
    return raw, dict(sorted(errors.items()))


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
        raise InferenceFailed(NO_FLOAT16)
    return cast
