"""The contract between the loop and the app it serves; EmbedpoolApp in server.py fulfils it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from embedpool.config.settings import Settings


class App(Protocol):
    """What the loop needs of the WSGI app it serves. The I/O thread calls it all, but for `__call__` and `stop`."""

    settings: Settings

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        """Answer a request, as WSGI says; request threads call this."""

    def listens_at(self, hosts: Sequence[str]) -> None:
        """Learn the addresses of the listening sockets, before the first request."""

    @property
    def is_booted(self) -> bool:
        """Whether it has loaded what it is to serve."""

    def beat(self) -> None:
        """Learn that the loop turns; called once a second."""

    def refusal(self, method: str, path: str, headers: Mapping[str, str]) -> tuple[int, bytes] | None:
        """Status and body of the answer to a caller who may not send this; None if he may. Headers as CONTENT_TYPE."""

    def begin_to_stop(self, *, replaced: bool = False) -> None:
        """Let nothing change the pool any more, and let /ready fail unless replaced. Requests are still served."""

    def stop(self) -> int:
        """Give up the requests that are still being served, on a thread of its own. Returns how many."""
