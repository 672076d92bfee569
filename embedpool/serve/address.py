"""The address that the server listens at: binding it, and how programs on this machine call it."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence

from embedpool.config.settings import Settings, url_at
from embedpool.errors import ConfigError
from embedpool.serve.connections import LISTEN_BACKLOG

UNIX = "unix:"


def host_of(listener: socket.socket) -> str:
    """The address that a listening socket is bound to; "" for one on a unix socket."""
    name = listener.getsockname()
    return str(name[0]) if isinstance(name, tuple) else ""


def bind(settings: Settings) -> socket.socket:
    """Open the listening socket. Raises ConfigError with the reason."""
    host, port = settings.server.host, settings.server.port
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=LISTEN_BACKLOG)
    except OSError as error:
        raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror or error}") from None


def address_of(listeners: Sequence[socket.socket]) -> str:
    """The URL at which a program on this machine reaches the server; unix:PATH if it has no other address."""
    with_a_port = [listener for listener in listeners if host_of(listener)]
    if not with_a_port:
        return UNIX + os.fsdecode(listeners[0].getsockname())
    return url_at(*with_a_port[0].getsockname()[:2])
