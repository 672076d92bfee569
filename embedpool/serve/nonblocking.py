"""A socket that sends and receives without releasing the GIL, and whether its other side has gone.

Python releases the GIL for each system call and then waits until it gets it back: among many request threads that takes
far longer than sending an answer does. These calls never block, so they keep it. Where one fails, or there is no C
library to call, the socket makes Python's own call, which raises the right error.
"""

from __future__ import annotations

import ctypes
import select
import socket
from collections.abc import Callable
from typing import Any

from typing_extensions import override

MOST_BYTES = 1 << 16  # above it copying alone would keep other threads waiting


def _c_function(name: str, *arguments: Any) -> Callable[..., int]:
    """A function of the C library, or one that always fails where the library has none of that name."""
    try:
        function = getattr(ctypes.PyDLL(None), name)
    except (AttributeError, OSError, TypeError):  # TypeError on Windows
        return lambda *_: -1
    function.argtypes, function.restype = arguments, ctypes.c_ssize_t
    return function  # type: ignore[no-any-return]


_send = _c_function("send", ctypes.c_int, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_int)
_recv = _c_function("recv", ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def is_gone(connection: socket.socket) -> bool:
    """Whether the other side of an open connection is there no more; it may have shut its sending side alone."""
    if not hasattr(select, "poll"):
        return False
    poll = select.poll()
    poll.register(connection, 0)  # errors and hang-ups are told in any case
    return bool(poll.poll(0))


class Socket(socket.socket):
    """A connected non-blocking socket, which takes over the descriptor of another object.

    No thread may close it while another uses it: the descriptor may belong to another file by then.
    """

    def __init__(self, of: socket.socket) -> None:
        super().__init__(of.family, of.type, of.proto, fileno=of.detach())
        self.setblocking(False)

    @override
    def send(self, data: Any, flags: int = 0) -> int:
        if type(data) is not bytes or len(data) > MOST_BYTES:
            return super().send(data, flags)
        sent = _send(self.fileno(), data, len(data), flags)
        return sent if sent >= 0 else super().send(data, flags)

    @override
    def recv(self, size: int, flags: int = 0) -> bytes:
        if size > MOST_BYTES:
            return super().recv(size, flags)
        buffer = ctypes.create_string_buffer(size)
        received = _recv(self.fileno(), buffer, size, flags)
        return ctypes.string_at(buffer, received) if received >= 0 else super().recv(size, flags)
