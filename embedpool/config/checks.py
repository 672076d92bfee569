"""Checks of single values of config.yml and pool.yml. Each raises marshmallow's ValidationError."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import marshmallow as ma

MODEL_SLOT, TEXTS_SLOT, TEXT_SLOT = "{model}", "{texts}", "{text}"  # in a request of protocol template
DNS = "dns+"  # before a URL
SECRET_PREFIX = "EMBEDPOOL_SECRET_"  # noqa: S105  (the prefix of variable names, not a secret)
ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[A-Za-z0-9.:_\[\]-]+\Z")
NOT_IN_A_URL = re.compile(r"[\\\s\x00-\x20\x7f]")


def secret_variable(name: str) -> None:
    """Refuse a name that is not an EMBEDPOOL_SECRET_… variable, so that no file contains a secret."""
    if not name.startswith(SECRET_PREFIX):
        raise ma.ValidationError(
            f"must be the name of an environment variable that starts with {SECRET_PREFIX}, not the secret itself"
        )


def secret_variables(headers: Mapping[str, str]) -> None:
    """Their values are names of variables that may hold secrets."""
    for name in headers.values():
        secret_variable(name)


def http_url(url: str) -> None:
    """Of a form that all programs read alike."""
    if not url.startswith(("http://", "https://")) or len(url.split("://", 1)[1].strip("/")) == 0:
        raise ma.ValidationError("must be an http:// or https:// URL")
    if NOT_IN_A_URL.search(url):  # programs disagree where the host of such a URL ends
        raise ma.ValidationError("must hold no backslash, blank or control character")


def remote_url(url: str) -> None:
    """Such a URL, or one whose host's name stands for many addresses."""
    http_url(url.removeprefix(DNS))


def remote_urls(urls: tuple[str, ...]) -> None:
    """Each."""
    for url in urls:
        remote_url(url)


def proxy_url(given: str) -> None:
    """Without credentials, which would stand in pool.yml."""
    if given == "env":
        return
    http_url(given)
    if "@" in given:
        raise ma.ValidationError("must hold no user or password: set it in HTTPS_PROXY or HTTP_PROXY, and say env here")


def holds_a_text(form: Any) -> bool:
    """Whether a request's form has a place for a single text."""
    if isinstance(form, dict | list):
        return any(map(holds_a_text, form.values() if isinstance(form, dict) else form))
    return isinstance(form, str) and TEXT_SLOT in form


def holds_texts(form: Any) -> bool:
    """Whether it has a place for any number of texts."""
    if isinstance(form, dict):
        return any(map(holds_texts, form.values()))
    if isinstance(form, list):
        return any(map(holds_texts, form)) or (len(form) == 1 and holds_a_text(form))
    return bool(form == TEXTS_SLOT)


def as_json(form: Mapping[str, Any]) -> None:
    """YAML knows dates, and keys that are numbers."""
    try:
        is_json = json.loads(json.dumps(form, allow_nan=False)) == form
    except (TypeError, ValueError):
        is_json = False
    if not is_json:
        raise ma.ValidationError("must be what JSON can hold: dates and keys that are numbers want quotation marks")


def absolute(path: str) -> None:
    """A path."""
    if not Path(path).is_absolute():
        raise ma.ValidationError("must be an absolute path: the server may run in another folder")


def origins(given: tuple[str, ...]) -> None:
    """Of web pages."""
    for origin in given:
        if origin != "*" and not ORIGIN.match(origin):
            raise ma.ValidationError(f"{origin!r} is no origin: scheme, host and port, such as https://app.example")
