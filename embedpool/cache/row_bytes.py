"""An entry of the cache as bytes, with a checksum."""

from __future__ import annotations

import struct
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedpool.pool.request import Known
from embedpool.tasks.rows import Rows

FORM = 2  # of an entry; those of another one are none
CHECKSUM = struct.Struct("<I")  # of form, key and all that follows, so that an entry counts for no other key
HEAD = struct.Struct("<?dB")  # whether the input was truncated, its tokens, how many arrays the row has
ARRAY = struct.Struct("<B3sBII")  # characters of its name, its type, its dimensions, and its shape, if it has so many


def encoded(key: bytes, known: Known) -> bytes:
    """One entry."""
    arrays = known.row.arrays()
    parts = [HEAD.pack(known.is_truncated, known.tokens, len(arrays))]
    for name, array in arrays.items():
        rows, width = (*array.shape, 0)[:2]
        parts += [ARRAY.pack(len(name), array.dtype.str.encode(), array.ndim, rows, width), name.encode()]
        parts.append(np.ascontiguousarray(array).tobytes())
    body = b"".join(parts)
    return CHECKSUM.pack(_checksum(key, body)) + body


def decoded(key: bytes, value: Any) -> Known | None:
    """The entry in these bytes; None if they are not what was written under this key."""
    body = bytes(value[CHECKSUM.size :])
    if len(body) < HEAD.size or CHECKSUM.unpack(value[: CHECKSUM.size]) != (_checksum(key, body),):
        return None
    is_truncated, tokens, count = HEAD.unpack_from(body)
    arrays: dict[str, NDArray[Any]] = {}
    at = HEAD.size
    for _ in range(count):
        name_length, dtype, dimensions, *shape = ARRAY.unpack_from(body, at)
        at += ARRAY.size + name_length
        numbers = int(np.prod(shape[:dimensions]))
        array = np.frombuffer(body, dtype.decode(), numbers, at).reshape(shape[:dimensions])
        arrays[body[at - name_length : at].decode()] = array
        at += array.nbytes
    return Known(Rows.of_arrays(arrays), tokens, is_truncated)


def _checksum(key: bytes, body: bytes) -> int:
    return zlib.crc32(body, zlib.crc32(key, FORM))
