"""Allowlists for models: folders below the configured roots, remote hosts that are configured, no metadata address."""

from __future__ import annotations

import fnmatch
import ipaddress
import socket
from pathlib import Path

from urllib3.exceptions import LocationParseError
from urllib3.util import parse_url

from embedpool.config.settings import Settings
from embedpool.config.spec import HttpConfig, LocalStConfig, ModelSpec
from embedpool.errors import Forbidden

# Where clouds tell a machine its secrets; beside them every link-local address is refused.
METADATA = {ipaddress.ip_address(address) for address in ("100.100.100.200", "192.0.0.192", "fd00:ec2::254")}
NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a listener at this address; "" is one on a unix socket."""
    try:
        return ipaddress.ip_address(host.strip("[]").split("%")[0]).is_loopback
    except ValueError:
        return host in ("localhost", "")


def check(spec: ModelSpec, settings: Settings) -> None:
    """Raises Forbidden with the reason."""
    config = spec.driver.config
    if isinstance(config, LocalStConfig) and config.path:
        _check_folder(spec.model, config.path, [settings.file(root) for root in settings.security.model_roots])
    if isinstance(config, HttpConfig):
        for address in config.addresses:
            _check_host(spec.model, address, settings.security.remote_hosts)


def _check_folder(model: str, path: str, roots: list[Path]) -> None:
    """Links are followed first: it is where the files are that counts."""
    folder = Path(path).resolve()
    if roots and not any(folder.is_relative_to(root.resolve()) for root in roots):
        raise Forbidden(f"{model!r}: the folder {path} is below none of security.model_roots")


def _check_host(model: str, base_url: str, allowed: tuple[str, ...]) -> None:
    try:
        host = (parse_url(base_url).host or "").strip("[]").lower()  # the parser of what connects
    except LocationParseError:
        raise Forbidden(f"{model!r}: the address has no host") from None
    if allowed and not any(fnmatch.fnmatchcase(host, pattern.lower()) for pattern in allowed):
        raise Forbidden(f"{model!r}: {host} is none of security.remote_hosts")
    for address in _addresses(host):
        if _tells_secrets(address):
            raise Forbidden(f"{model!r}: {host} is an address at which machines are told secrets")


def check_peer(address: str) -> None:
    """Raises Forbidden for an address that a connection has reached, by whatever name: that may change its meaning."""
    if _tells_secrets(_plain(ipaddress.ip_address(address.split("%", maxsplit=1)[0]))):
        raise Forbidden("the remote service is at an address at which machines are told secrets")


_Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def _tells_secrets(address: _Address) -> bool:
    return address.is_link_local or address in METADATA


def _plain(address: _Address) -> _Address:
    """The IPv4 address that stands in an IPv6 one, if one does."""
    if isinstance(address, ipaddress.IPv4Address):
        return address
    if address in NAT64:
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped or address.sixtofour or address


def _addresses(host: str) -> list[_Address]:
    """All that the name stands for; none if it stands for nothing, which the driver will find out."""
    try:
        found = {str(info[4][0]).split("%")[0] for info in socket.getaddrinfo(host, None)}
    except (OSError, UnicodeError):
        return []
    return [_plain(ipaddress.ip_address(text)) for text in sorted(found)]
