"""One address of a remote service: its connections, its answers, and a circuit breaker."""

from __future__ import annotations

import base64
import contextlib
import logging
import math
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from email.utils import mktime_tz, parsedate_tz
from typing import Any
from urllib.parse import quote, urlsplit

import requests
import urllib3
from requests.adapters import HTTPAdapter
from requests.utils import get_auth_from_url, get_environ_proxies

from embedpool import tracing
from embedpool.config import guard
from embedpool.config.settings import secret_value
from embedpool.drivers.pace import Pace
from embedpool.errors import FAILED_INPUTS_HEADER, REFUSALS, Forbidden, UpstreamError, forget_frames

logger = logging.getLogger(__name__)

NOT_ASKED = "not asked yet"
FAILURES_TO_OPEN = 5  # in a row; an address is then left alone until it has proved itself
PASSING_STATUS = (500, 502, 503, 504)
CONNECT_TIMEOUT_S = 10.0
CONNECTIONS = 64
READ_BYTES = 1 << 16
LONGEST_QUOTE = 300  # characters of a remote's message that are passed on
RETRY_SHARE = 0.2
RETRY_RESERVE = 10.0


class _Http(urllib3.connection.HTTPConnection):
    """Looks whom it has reached before it sends anything: a name may mean another address than at its check."""

    ip: str | None = None  # where it goes; else where its host's name leads

    def _new_conn(self) -> socket.socket:
        name = self.host  # which goes on to stand in the Host header, and in what a certificate must be of
        self.host = self.ip or name
        try:
            connected = super()._new_conn()
        finally:
            self.host = name
        try:
            guard.check_peer(connected.getpeername()[0])
        except Forbidden as error:
            connected.close()
            raise UpstreamError(error.message) from None
        return connected


class _Https(_Http, urllib3.connection.HTTPSConnection):
    pass


def _pools(ip: str | None) -> dict[str, type[urllib3.HTTPConnectionPool]]:
    """Of connections to that address, whatever their host's name says."""

    class Http(urllib3.HTTPConnectionPool):
        ConnectionCls = type("Http", (_Http,), {"ip": ip})

    class Https(urllib3.HTTPSConnectionPool):
        ConnectionCls = type("Https", (_Https,), {"ip": ip})

    return {"http": Http, "https": Https}


class Upstream:
    """A circuit breaker around one address: `fault` says why it is not asked, None while it is. Thread-safe.

    With an `ip` its connections go there. `proxy` is a URL, or env. `on_call_ended` is called on the thread that
    called, whatever became of the call.
    """

    def __init__(
        self,
        base_url: str,
        path: str,
        headers: Mapping[str, str],
        proxy: str | None = None,
        on_call_ended: Callable[[], None] = lambda: None,
        *,
        ip: str | None = None,
    ) -> None:
        parts = urlsplit(base_url)
        host = parts.netloc.rpartition("@")[2]
        if ip:
            port = f":{parts.port}" if parts.port else ""
            host = (f"[{ip}]" if ":" in ip else ip) + port
        self.name = host + parts.path.rstrip("/")
        self.fault: str | None = NOT_ASKED
        self.outstanding = 0  # calls
        self._failures = 0  # in a row
        self._pace = Pace(time.monotonic)
        self._on_call_ended = on_call_ended
        self._lock = threading.Lock()
        self._url = base_url.rstrip("/") + path
        self._session = requests.Session()
        self._session.trust_env = False  # else a proxy of the environment gets our key, unasked
        self._session.verify = os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("CURL_CA_BUNDLE") or True
        self._session.proxies = self._proxies(base_url, proxy)
        self._adapter = HTTPAdapter(pool_maxsize=CONNECTIONS)
        self._adapter.poolmanager.pool_classes_by_scheme = _pools(ip)
        self._session.headers["User-Agent"] = "embedpool"
        in_url = get_auth_from_url(base_url)
        self._session.auth = in_url if any(in_url) else None
        self._session.headers.update(headers)
        self._secrets = [h.removeprefix("Bearer ") for h in headers.values()]
        if any(in_url):
            basic = base64.b64encode(":".join(in_url).encode()).decode()
            self._secrets += [s for s in (basic, in_url[1], quote(in_url[1], safe="")) if s]
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, self._adapter)

    def _proxies(self, base_url: str, proxy: str | None) -> dict[str, str]:
        """By scheme; none for an address of this machine, to which a proxy has no way."""
        host = urlsplit(base_url).hostname or ""
        if guard.is_loopback(host):
            return {}
        named = {scheme: found for scheme, found in get_environ_proxies(base_url).items() if scheme != "no"}
        if proxy == "env":
            return named
        if proxy is None and named:
            logger.warning("%s is called directly: a proxy of the environment is for models of `proxy: env`", host)
        return {"http": proxy, "https": proxy} if proxy else {}

    @property
    def rest_s(self) -> float:
        """Seconds until it may be called again, after it has asked for a pause."""
        return self._pace.rest_s

    @property
    def takes_a_call(self) -> bool:
        """Whether it bears one more now."""
        return not self.rest_s and self.outstanding + 1 <= self._pace.at_once

    @contextlib.contextmanager
    def call(self, *, may_be_a_text: bool = False) -> Iterator[None]:
        """Count one call and how it ends. What it refuses, and 429, is no failure of the address.

        Nor is what one of several texts may have caused, as long as nobody knows.
        """
        with self._lock:
            self.outstanding += 1
        began_at = time.monotonic()
        try:
            yield
        except UpstreamError as error:
            with self._lock:
                if error.is_busy:
                    self._pace.refused(began_at, self.outstanding, error.retry_after_s)
                is_no_failure = error.remote_status in REFUSALS or error.is_busy
                if is_no_failure:
                    self._failures = 0
            if not (is_no_failure or error.rows or (may_be_a_text and error.content_may_cause)):
                self.count_failure(error.for_the_log)
            raise
        else:
            with self._lock:
                self._failures = 0
                self._pace.served()
        finally:
            with self._lock:
                self.outstanding -= 1
            self._on_call_ended()

    def note(self, error: UpstreamError) -> None:
        """A call that was not counted failed: if it was for being too many, it rests."""
        if error.is_busy:
            with self._lock:
                self._pace.refused(time.monotonic(), self.outstanding + 1, error.retry_after_s)

    def count_failure(self, reason: str) -> None:
        """A call failed, and no text was at fault in it. Everybody may read the reason."""
        with self._lock:
            self._failures += 1
            if self._failures >= FAILURES_TO_OPEN:
                self.fault = reason

    def admit(self) -> None:
        """It has proved itself: ask it from now on."""
        with self._lock:
            self._failures = 0
            self.fault = None

    def post(self, body: dict[str, Any], timeout_s: float, most_bytes: int) -> requests.Response:
        """One attempt, of so long and an answer of so many bytes at most.

        Raises UpstreamError with the remote's status and message, never its key.
        """
        deadline = time.monotonic() + timeout_s
        try:
            with self._session.post(
                self._url,
                json=body,
                timeout=(min(CONNECT_TIMEOUT_S, timeout_s), timeout_s),
                allow_redirects=False,
                headers=dict(tracing.outgoing()),
                stream=True,
            ) as response:
                _read(response, deadline, most_bytes)
        except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
            forget_frames(error)
            is_late = isinstance(error, requests.Timeout | urllib3.exceptions.TimeoutError)
            says = f"the remote service does not answer: {_reason(error)}"
            raise UpstreamError(says, passing=not is_late, content_may_cause=True) from None
        if response.status_code == 200:
            return response
        named = _indices(response.headers.get(FAILED_INPUTS_HEADER))
        raise UpstreamError(
            f"the remote service answered {response.status_code}",
            said=self.words_of(response),
            remote_status=response.status_code,
            retry_after_s=_seconds(response.headers.get("Retry-After")),
            passing=response.status_code in PASSING_STATUS and not named,
            rows=named,
        )

    def close(self) -> None:
        """Close the connections; the library itself does so when the garbage is collected."""
        pools = self._adapter.poolmanager.pools
        for key in pools.keys():  # noqa: SIM118  (it is no dict)
            pools[key].close()
        self._session.close()

    def words_of(self, response: requests.Response) -> str:
        """The remote's error message, shortened and without our keys."""
        try:
            document = response.json()
            error = document.get("error", document) if isinstance(document, dict) else document
            text = error.get("message") or error.get("detail") if isinstance(error, dict) else error
            text = str(text or document)
        except ValueError:
            text = response.text
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return re.sub(r"\s+", " ", text)[:LONGEST_QUOTE]


def _read(response: requests.Response, deadline: float, most_bytes: int) -> None:
    """Its whole body, unpacked, as the library would read it; but for that each byte may take as long as a call."""
    content = bytearray()
    while part := response.raw.read1(READ_BYTES, decode_content=True):
        content += part
        if len(content) > most_bytes:
            says = f"the remote service's answer is larger than {most_bytes} bytes"
            raise UpstreamError(says, content_may_cause=True)
        if time.monotonic() > deadline:
            raise requests.ReadTimeout
    response._content = bytes(content)


def secret(variable: str) -> str:
    """The value of an environment variable. Raises UpstreamError."""
    value = secret_value(variable)
    if not value:
        raise UpstreamError(f"the environment variable {variable} is not set in the server's process")
    return value


def _reason(error: Exception) -> str:
    """The kind of failure; the library's own text would show the URL with its credentials."""
    if isinstance(error, requests.Timeout | urllib3.exceptions.TimeoutError):
        return "timed out"
    if isinstance(error, requests.exceptions.SSLError):
        return "the TLS handshake failed"
    return "connection failed" if isinstance(error, requests.ConnectionError) else type(error).__name__


def _seconds(retry_after: str | None) -> float | None:
    """A number of seconds, or a date (RFC 9110)."""
    try:
        seconds = float(retry_after or "")
    except ValueError:
        date = parsedate_tz(retry_after)
        seconds = max(mktime_tz(date) - time.time(), 0.0) if date else math.nan
    return seconds if seconds >= 0 and math.isfinite(seconds) else None


def _indices(named: str | None) -> list[int]:
    """Another embedpool names the texts at fault, whatever the protocol."""
    return [int(index) for index in re.findall(r"\d{1,9}", named or "")]
