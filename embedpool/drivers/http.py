"""A remote embedding service, spoken to through requests: pooled connections, time-outs, retries, checked answers."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import requests
from requests.adapters import HTTPAdapter
from requests.utils import get_auth_from_url
from urllib3.exceptions import ReadTimeoutError
from urllib3.util.retry import Retry

from embedpool import tracing
from embedpool.config.spec import HttpConfig, ModelSpec
from embedpool.drivers.base import PROBE_TEXT, Driver, Embeddings, Ids, Meter, describe
from embedpool.errors import UnsupportedOption, UpstreamError

BACKOFF_FACTOR_S = 0.2
RETRIED_STATUS = (429, 500, 502, 503, 504)
LONGEST_RETRY_AFTER_S = 30
LONGEST_QUOTE = 300  # characters of a remote's message that are passed on


class _Retry(Retry):
    """As the library's, but an answer that does not come within `timeout_s` is not waited for again."""

    def increment(  # the library's signature
        self,
        method: str | None = None,
        url: str | None = None,
        response: Any = None,
        error: Exception | None = None,
        _pool: Any = None,
        _stacktrace: Any = None,
    ) -> Self:
        """See Retry."""
        if isinstance(error, ReadTimeoutError):
            raise error
        return super().increment(method, url, response, error, _pool, _stacktrace)


class Protocol(NamedTuple):
    """How one kind of service is asked and what it answers."""

    path: str
    body: Callable[[str, Sequence[str], Mapping[str, Any]], dict[str, Any]]
    read: Callable[[Any], tuple[list[Any], int | None, list[int]]]  # vectors, tokens, truncated


class RemoteMeter(Meter):
    """The remote tokenizes; here texts are only estimated."""

    tokenizes = False

    def measure(self, texts: Sequence[str]) -> None:
        """See Meter."""


class HttpDriver(Driver):
    """Raises UpstreamError with the remote's status and message, never its key."""

    parallel = 8

    def __init__(self, model: str, config: HttpConfig) -> None:
        self.max_batch_texts = config.max_batch_texts
        self._model = config.remote_model or model
        self._config = config
        self._protocol = PROTOCOLS[config.protocol]
        self._url = config.base_url.rstrip("/") + self._protocol.path
        self._dim: int | None = None
        self._secrets: list[str] = []

    def open(self) -> None:
        """Read the secrets, connect, and prove the service with one text."""
        self._session = requests.Session()
        self._session.headers["User-Agent"] = "embedpool"
        in_url = get_auth_from_url(self._config.base_url)
        # Set in any case, else a ~/.netrc would take the place of our key.
        self._session.auth = in_url if any(in_url) else lambda request: request
        headers = {name: _secret(variable) for name, variable in self._config.headers.items()}
        if self._config.api_key:
            headers["Authorization"] = f"Bearer {_secret(self._config.api_key)}"
        self._session.headers.update(headers)
        self._secrets = [value.removeprefix("Bearer ") for value in headers.values()]
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, HTTPAdapter(pool_maxsize=64))
        self.configure(self._config)
        try:
            self.probe()
        except BaseException:
            self.close()
            raise
        self.description = describe(protocol=self._config.protocol, dim=self._dim)

    def configure(self, config: HttpConfig) -> None:
        """Time-out, retries and batch size apply at once."""
        self._config = config
        self.max_batch_texts = config.max_batch_texts
        retry = _Retry(
            total=config.retries,
            backoff_factor=BACKOFF_FACTOR_S,
            backoff_jitter=BACKOFF_FACTOR_S,
            status_forcelist=RETRIED_STATUS,
            allowed_methods=None,
            raise_on_status=False,
            retry_after_max=LONGEST_RETRY_AFTER_S,
        )
        for adapter in self._session.adapters.values():
            adapter.max_retries = retry  # type: ignore[attr-defined]

    def embed(self, texts: Sequence[str], ids: Sequence[Ids] | None, options: Mapping[str, Any]) -> Embeddings:
        """One call. The answer must hold a finite vector of the known dimension for each text."""
        response = self._post(self._protocol.body(self._model, texts, options))
        try:
            vectors, tokens, truncated = self._protocol.read(response.json())
            with np.errstate(over="ignore"):  # becomes infinite, which the worker refuses
                array = np.asarray(vectors, dtype=np.float32)
            if not isinstance(tokens, int | None) or not all(isinstance(i, int) for i in truncated):
                raise TypeError("counts must be whole numbers")
        except (ValueError, TypeError, KeyError, AttributeError, IndexError, OverflowError) as error:
            raise UpstreamError(
                f"the remote service's answer is not one of protocol {self._config.protocol!r} ({type(error).__name__})"
            ) from None
        if array.ndim != 2 or array.shape[0] != len(texts) or not array.shape[1]:
            raise UpstreamError(f"the remote service gave vectors of shape {array.shape} for {len(texts)} texts")
        if self._dim is not None and array.shape[1] != self._dim:
            raise UpstreamError(f"the remote service's vectors went from {self._dim} to {array.shape[1]} numbers")
        self._dim = array.shape[1]
        return Embeddings(array, tokens, [i for i in truncated if 0 <= i < len(texts)])

    def probe(self) -> None:
        """See Driver."""
        if not np.isfinite(self.embed([PROBE_TEXT], None, {}).vectors).all():
            raise UpstreamError("the remote service gives vectors that are not finite")

    def close(self) -> None:
        """Close the connections."""
        self._session.close()

    def _post(self, body: dict[str, Any]) -> requests.Response:
        try:
            response = self._session.post(
                self._url,
                json=body,
                timeout=self._config.timeout_s,
                allow_redirects=False,
                headers=dict(tracing.outgoing()),
            )
        except requests.RequestException as error:
            raise UpstreamError(f"the remote service does not answer: {_reason(error)}") from None
        if response.status_code == 200:
            return response
        raise UpstreamError(
            f"the remote service answered {response.status_code}: {self._message(response)}",
            remote_status=response.status_code,
            retry_after_s=_seconds(response.headers.get("Retry-After")),
        )

    def _message(self, response: requests.Response) -> str:
        """What the remote says is wrong, shortened and without our keys."""
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


def _secret(variable: str) -> str:
    value = os.environ.get(variable)
    if not value:
        raise UpstreamError(f"the environment variable {variable} is not set in the server's process")
    return value


def _reason(error: requests.RequestException) -> str:
    """The kind of failure; the library's own text would show the URL with its credentials."""
    if isinstance(error, requests.Timeout):
        return "timed out"
    if isinstance(error, requests.exceptions.SSLError):
        return "the TLS handshake failed"
    return "connection failed" if isinstance(error, requests.ConnectionError) else type(error).__name__


def _seconds(retry_after: str | None) -> float | None:
    try:
        seconds = float(retry_after or "")
    except ValueError:
        return None
    return seconds if seconds >= 0 and math.isfinite(seconds) else None


# --- the protocols


def _embedpool_body(model: str, texts: Sequence[str], options: Mapping[str, Any]) -> dict[str, Any]:
    return {"model": model, "texts": list(texts), "options": dict(options)}


def _embedpool_read(document: Any) -> tuple[list[Any], int | None, list[int]]:
    meta = document.get("meta") or {}
    return document["vectors"], meta.get("tokens"), list(meta.get("truncated") or [])


def _openai_body(model: str, texts: Sequence[str], options: Mapping[str, Any]) -> dict[str, Any]:
    _refuse("openai", options, "truncate", "max_seq_length", "prompt_name")
    return {**options, "model": model, "input": list(texts), "encoding_format": "float"}


def _openai_read(document: Any) -> tuple[list[Any], int | None, list[int]]:
    data = sorted(document["data"], key=lambda entry: entry.get("index", 0))
    return [entry["embedding"] for entry in data], (document.get("usage") or {}).get("prompt_tokens"), []


def _tei_body(model: str, texts: Sequence[str], options: Mapping[str, Any]) -> dict[str, Any]:
    _refuse("tei", options, "max_seq_length")
    passed_on = dict(options)
    policy = passed_on.pop("truncate", "right")
    passed_on.pop("input_type", None)  # it knows no such thing; `driver.config.prompts` does
    body = {**passed_on, "inputs": list(texts), "normalize": False, "truncate": policy != "error"}
    if policy == "left":
        body["truncation_direction"] = "Left"
    return body


def _tei_read(document: Any) -> tuple[list[Any], int | None, list[int]]:
    return list(document), None, []


def _refuse(protocol: str, options: Mapping[str, Any], *names: str) -> None:
    for name in names:
        if name in options:
            message = f"a remote service of protocol {protocol!r} cannot be asked for it"
            raise UnsupportedOption(f"options.{name}: {message}", fields={f"options.{name}": message})


PROTOCOLS = {
    "embedpool": Protocol("", _embedpool_body, _embedpool_read),
    "openai": Protocol("/embeddings", _openai_body, _openai_read),
    "tei": Protocol("/embed", _tei_body, _tei_read),
}


def make_driver(spec: ModelSpec, cache_dir: Path) -> Driver:
    """See embedpool.drivers."""
    assert isinstance(spec.driver.config, HttpConfig)
    return HttpDriver(spec.model, spec.driver.config)


def open_meter(spec: ModelSpec) -> Meter:
    """See embedpool.drivers."""
    return RemoteMeter()
