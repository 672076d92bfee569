"""Request and answer formats of remote services. To add a protocol, write two functions and a line in the table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from embedpool.errors import UnsupportedOption


class Protocol(NamedTuple):
    """Request and answer format of one kind of service."""

    path: str
    body: Callable[[str, Sequence[str], Mapping[str, Any]], dict[str, Any]]
    read: Callable[[Any], tuple[list[Any], int | None, list[int]]]  # vectors, tokens, truncated


RAW = {"normalize": False, "dtype": "float32"}  # the final form is made here


def _embedpool_body(model: str, texts: Sequence[str], options: Mapping[str, Any]) -> dict[str, Any]:
    return {"model": model, "texts": list(texts), "options": {**RAW, **options}}


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
