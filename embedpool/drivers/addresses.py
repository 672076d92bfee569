"""The addresses of a remote service: those that pool.yml names, and those behind a name with dns+ before it."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Sequence
from typing import NamedTuple
from urllib.parse import urlsplit

from embedpool.config.checks import DNS
from embedpool.drivers.upstream import Upstream
from embedpool.errors import UpstreamError

logger = logging.getLogger(__name__)


class Address(NamedTuple):
    """A URL, and where it is reached if not wherever its host's name leads."""

    url: str
    ip: str | None = None


def lookup(host: str, port: int) -> list[str]:
    """The IP addresses of a name now, in order. The one place where names are looked up. Raises OSError."""
    return sorted({str(info[4][0]) for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)})


class Addresses:
    """`current` are those that may be asked; `refresh` follows the names. One thread at a time refreshes."""

    def __init__(self, urls: Sequence[str], make: Callable[[Address], Upstream]) -> None:
        self._urls = urls
        self._make = make
        self._known: dict[Address, Upstream] = {}
        self._of_name: dict[str, list[Address]] = {}
        self._unknown: set[str] = set()  # names that could not be looked up, and that this was told of
        self._leaving: list[Upstream] = []
        self.are_names = any(url.startswith(DNS) for url in urls)
        self.current: tuple[Upstream, ...] = ()

    @property
    def are_several(self) -> bool:
        """Now, or any time later."""
        return self.are_names or len(self._urls) > 1

    def refresh(self) -> bool:
        """Look the names up again; whether an address has come or gone. Raises UpstreamError if there is none.

        One that has gone is asked until one that is there serves: all may be exchanged at once.
        """
        found = dict.fromkeys(address for url in self._urls for address in self._behind(url))
        if not found:
            raise UpstreamError(f"no address is known of {', '.join(sorted(map(_host, self._unknown)))}")
        self._leaving = [upstream for upstream in self._leaving if not _closed_if_idle(upstream)]
        if found.keys() == self._known.keys():
            return False
        there = {address: self._known.get(address) or self._make(address) for address in found}
        gone = {address: upstream for address, upstream in self._known.items() if address not in found}
        if all(upstream.fault for upstream in there.values()):
            self._known = there | gone
        else:
            self._known = there
            self._leaving += gone.values()  # somebody may have chosen it just now: it is closed later
            for upstream in gone.values():
                logger.info("%s is gone from its name, and is asked no more", upstream.name)
        self.current = tuple(self._known.values())
        return True

    def _behind(self, url: str) -> list[Address]:
        if not url.startswith(DNS):
            return [Address(url)]
        plain = url.removeprefix(DNS)
        parts = urlsplit(plain)
        try:
            ips = lookup(parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80))
            if not ips:
                raise OSError("it stands for no address")
        except (OSError, UnicodeError) as error:
            if url not in self._unknown:
                logger.warning("%s cannot be looked up (%s); what was known of it is used", _host(url), error)
            self._unknown.add(url)
            return self._of_name.get(url, [])
        self._unknown.discard(url)
        self._of_name[url] = [Address(plain, ip) for ip in ips]
        return self._of_name[url]

    def close(self) -> None:
        """The connections of all."""
        for upstream in (*self.current, *self._leaving):
            upstream.close()


def _closed_if_idle(upstream: Upstream) -> bool:
    if upstream.outstanding:
        return False
    upstream.close()
    return True


def _host(url: str) -> str:
    return urlsplit(url).hostname or ""
