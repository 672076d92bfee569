"""An entry of the cache as bytes, with a checksum."""

from __future__ import annotations

import struct
import zlib
from typing import Any

import numpy as np

from embedpool.pool.request import Known
from embedpool.tasks.rows import Rows

CHECKSUM = struct.Struct("<I")  # of the key and all that follows, so that an entry counts for no other key
HEAD = struct.Struct("<B?dI")  # the kind of the row, whether the input was truncated, its tokens, the row's width
DENSE, RAGGED, SPARSE = range(3)


def encoded(key: bytes, known: Known) -> bytes:
    """One entry."""
    row = known.row
    kind = DENSE if row.splits is None else RAGGED if row.indices is None else SPARSE
    body = HEAD.pack(kind, known.is_truncated, known.tokens, row.width)
    body += np.ascontiguousarray(row.values, np.float32).tobytes()
    if row.indices is not None:
        body += np.ascontiguousarray(row.indices, np.int32).tobytes()
    return CHECKSUM.pack(zlib.crc32(body, zlib.crc32(key))) + body


def decoded(key: bytes, value: Any) -> Known | None:
    """The entry in these bytes; None if they are not what was written under this key."""
    body = bytes(value[CHECKSUM.size :])
    if len(body) < HEAD.size or CHECKSUM.unpack(value[: CHECKSUM.size]) != (zlib.crc32(body, zlib.crc32(key)),):
        return None
    kind, is_truncated, tokens, width = HEAD.unpack(body[: HEAD.size])
    numbers = body[HEAD.size :]
    if kind == SPARSE:
        half = len(numbers) // 2
        values, indices = np.frombuffer(numbers[:half], np.float32), np.frombuffer(numbers[half:], np.int32)
        row = Rows(values, np.array([0, len(values)], np.int64), indices)
    else:
        values = np.frombuffer(numbers, np.float32).reshape(-1, width) if width else np.zeros((0, 0), np.float32)
        row = Rows(values, None if kind == DENSE else np.array([0, len(values)], np.int64))
    return Known(row, tokens, is_truncated)
