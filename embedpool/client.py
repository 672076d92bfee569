"""A client of a running server, over requests: the CLI's hands, and the users'."""

from __future__ import annotations

from typing import Any
from urllib.parse import quote, urlsplit

import requests

from embedpool.errors import EmbedpoolError, ServerUnreachable

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")


class Client:
    """Speaks to the server at `base_url`. Raises EmbedpoolError with the server's status and code."""

    def __init__(self, base_url: str, *, api_key: str | None = None, timeout_s: float = 120.0) -> None:
        self._base_url = base_url.rstrip("/")
        self._timeout_s = timeout_s
        # A proxy has no way to this machine's loopback, and management refuses what came through one.
        local = urlsplit(self._base_url).hostname in LOOPBACK_NAMES
        self._proxies = {"http": "", "https": ""} if local else None
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}

    def health(self) -> dict[str, Any]:
        """GET /health."""
        return self._call("GET", "/health")

    def status(self) -> dict[str, Any]:
        """GET /status."""
        return self._call("GET", "/status")

    def register(
        self, registration: dict[str, Any], *, replace: bool = False, timeout_s: float | None = None
    ) -> dict[str, Any]:
        """POST /models/register; returns when the model is ready."""
        path = f"/models/register?replace={str(replace).lower()}"
        return self._call("POST", path, registration, timeout_s=timeout_s)

    def set_alias(self, model: str, alias: str | None) -> dict[str, Any]:
        """POST /models/alias."""
        return self._call("POST", "/models/alias", {"model": model, "alias": alias})

    def set_enabled(self, model: str, enabled: bool, *, timeout_s: float | None = None) -> dict[str, Any]:
        """POST /models/enable; returns when the model is ready."""
        return self._call("POST", "/models/enable", {"model": model, "enabled": enabled}, timeout_s=timeout_s)

    def unregister(self, model: str) -> dict[str, Any]:
        """DELETE /models/<name or alias>."""
        return self._call("DELETE", f"/models/{quote(model, safe='')}")

    def _call(
        self, method: str, path: str, body: dict[str, Any] | None = None, *, timeout_s: float | None = None
    ) -> dict[str, Any]:
        try:
            response = requests.request(
                method,
                self._base_url + path,
                json=body,
                headers=self._headers,
                timeout=timeout_s or self._timeout_s,
                allow_redirects=False,
                proxies=self._proxies,
            )
            document = response.json()
        except requests.JSONDecodeError:
            raise ServerUnreachable(f"what answers at {self._base_url} is not embedpool") from None
        except requests.RequestException as error:
            raise ServerUnreachable(f"no answer from {self._base_url} ({type(error).__name__})") from None
        if response.ok and isinstance(document, dict):
            return document
        raise _as_error(document, response.status_code)


def _as_error(document: Any, status: int) -> EmbedpoolError:
    """The server's error, with its status and code."""
    error = document.get("error") if isinstance(document, dict) else None
    if not isinstance(error, dict):
        return ServerUnreachable("the answer is not one of embedpool")
    found = EmbedpoolError(str(error.get("message")), fields=error.get("fields"))
    found.status, found.code = status, str(error.get("code"))
    return found
