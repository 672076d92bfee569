"""A row as bytes, with a checksum."""

from __future__ import annotations

import struct
import zlib
from typing import Any

import numpy as np

from embedpool.tasks.rows import Rows

HEAD = struct.Struct("<BII")  # the kind of the row, its width, and a checksum
DENSE, RAGGED, SPARSE = range(3)


def encoded(key: bytes, row: Rows) -> bytes:
    """One row; its checksum is that of its key, too, so that it counts for no other."""
    kind = DENSE if row.splits is None else RAGGED if row.indices is None else SPARSE
    body = np.ascontiguousarray(row.values, np.float32).tobytes()
    if row.indices is not None:
        body += np.ascontiguousarray(row.indices, np.int32).tobytes()
    return HEAD.pack(kind, row.width, zlib.crc32(body, zlib.crc32(key))) + body


def decoded(key: bytes, value: Any) -> Rows | None:
    """The row in these bytes; None if they are not what was written under this key."""
    if len(value) < HEAD.size:
        return None
    kind, width, checksum = HEAD.unpack(value[: HEAD.size])
    body = bytes(value[HEAD.size :])
    if zlib.crc32(body, zlib.crc32(key)) != checksum:
        return None
    if kind == SPARSE:
        half = len(body) // 2
        values, indices = np.frombuffer(body[:half], np.float32), np.frombuffer(body[half:], np.int32)
        return Rows(values, np.array([0, len(values)], np.int64), indices)
    values = np.frombuffer(body, np.float32).reshape(-1, width) if width else np.zeros((0, 0), np.float32)
    return Rows(values, None if kind == DENSE else np.array([0, len(values)], np.int64))
