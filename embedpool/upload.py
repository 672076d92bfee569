"""A file on its way to a server, as a form, which is read while it is sent."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from typing import IO
from urllib.parse import quote

PIECE_BYTES = 1 << 16  # of a file that is sent or fetched


class Form:
    """An upload as a form, which is read while it is sent."""

    def __init__(self, name: str, file: IO[bytes], size: int) -> None:
        mark = secrets.token_hex(16)
        self.content_type = f"multipart/form-data; boundary={mark}"
        purpose = f'--{mark}\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
        head = f'--{mark}\r\nContent-Disposition: form-data; name="file"; filename="{quote(name)}"\r\n\r\n'
        self._head, self._tail = (purpose + head).encode(), f"\r\n--{mark}--\r\n".encode()
        self._file = file
        self._size = len(self._head) + size + len(self._tail)

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[bytes]:
        yield self._head
        while piece := self._file.read(PIECE_BYTES):
            yield piece
        yield self._tail
