"""The address that the server listens at: who may reach it, binding it, and how programs on this machine call it."""

from __future__ import annotations

import ipaddress
import socket

from embedpool.config.keys import KeysFile
from embedpool.config.settings import Settings
from embedpool.errors import ConfigError
from embedpool.serve.connections import LISTEN_BACKLOG


def require_a_key(settings: Settings) -> None:
    """Raises ConfigError if other machines can reach a server that has no key, or if keys.yml is broken."""
    security = settings.security
    keys = KeysFile(settings.file(security.keys_file)).read()
    if security.insecure or _is_loopback(settings.server.host):
        return
    if not (security.admin_key_env or security.embed_key_env or keys):
        raise ConfigError(
            f"{settings.server.host} is reached from other machines and there is no key: make one with "
            "`embedpool key create`, or say --insecure"
        )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def bind(settings: Settings) -> socket.socket:
    """Open the listening socket. Raises ConfigError with the reason."""
    host, port = settings.server.host, settings.server.port
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=LISTEN_BACKLOG)
    except OSError as error:
        raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror or error}") from None


def address_of(listener: socket.socket) -> str:
    """The URL at which a program on this machine reaches the server."""
    host, port = listener.getsockname()[:2]
    return f"http://{shown({'0.0.0.0': '127.0.0.1', '::': '::1'}.get(host, host))}:{port}"  # noqa: S104


def shown(host: str) -> str:
    """A host as it stands in a URL."""
    return f"[{host}]" if ":" in host else host
