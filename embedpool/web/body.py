"""The body of a request: its type and encoding, its JSON, within the limits."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import zlib
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import orjson
from flask import Request, current_app

from embedpool.config.fields import StrictSchema
from embedpool.config.settings import Limits
from embedpool.errors import BadJson, BodyTooLarge, UnsupportedMediaType
from embedpool.web.compat import CompatSchema
from embedpool.web.http_request import HttpRequest
from embedpool.web.intake import INTAKE, LARGE_BYTES, Intake
from embedpool.web.schemas import load

JSON = "application/json"
TEXT_FIELDS = ("input", "inputs", "prompt", "texts", "query", "documents", "queries", "text_1", "text_2")
LONGEST_NUMBER = 19  # digits
OWN_HOSTS = "embedpool.own_hosts"
# Types that programs send JSON with when nobody has told them the type; a page in a browser can send them, too.
UNTOLD = ("", "text/plain", "application/x-www-form-urlencoded")


def read_json(request: HttpRequest, schema: type[StrictSchema], limits: Limits) -> dict[str, Any]:
    """The request's JSON object through a schema. Raises the 400s, 413, 415 and 422 of the contract."""
    return load(schema, read_document(request, limits, whatever_type=issubclass(schema, CompatSchema)))


def read_document(request: HttpRequest, limits: Limits, *, whatever_type: bool = False) -> dict[str, Any]:
    """The request's JSON object; with `whatever_type` also from a program that does not tell the type."""
    if request.mimetype != JSON and not (whatever_type and request.mimetype in UNTOLD and is_from_a_program(request)):
        raise UnsupportedMediaType(f"send Content-Type: {JSON}, not {request.mimetype or 'none at all'}")
    intake: Intake = current_app.extensions[INTAKE]
    request.held_bytes += intake.take(request.content_length or 0)  # before it is read into memory
    body = read_body(request, limits)
    try:
        with intake.one_at_a_time if len(body) > LARGE_BYTES else contextlib.nullcontext():
            document = _parsed(body)
    except (ValueError, RecursionError) as error:
        raise BadJson(f"the body is not JSON: {error}") from None
    if not isinstance(document, dict):
        raise BadJson("the body must be a JSON object")
    return document


def _parsed(body: bytes) -> Any:
    """Half a character, as programs make that cut texts by UTF-16, is let in: its text fails alone, later."""
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as error:
        if "surrogate" not in str(error):
            raise
        document = json.loads(body, parse_int=_whole_number, parse_constant=_no_number)
        if not isinstance(document, dict):
            return document
        # Half characters may stand in texts alone: names are quoted in answers and logs.
        return {_whole(key): _whole(value, key in TEXT_FIELDS) for key, value in document.items()}


def _whole(value: Any, is_text: bool = False) -> Any:
    """Without half characters, unless it is a text; names never have any."""
    if isinstance(value, str):
        return value if is_text else value.encode(errors="replace").decode()
    if isinstance(value, dict):
        return {_whole(key): _whole(inner, is_text) for key, inner in value.items()}
    return [_whole(inner, is_text) for inner in value] if isinstance(value, list) else value


def _whole_number(digits: str) -> int:
    if len(digits) > LONGEST_NUMBER:
        raise ValueError("a number is too long")
    return int(digits)


def _no_number(word: str) -> float:
    raise ValueError(f"{word} is no number")


def is_from_a_program(request: Request) -> bool:
    """Whether no page in a browser can have sent it: that would tell its origin, or be under a name it has made up."""
    if "Origin" in request.headers or request.headers.get("Sec-Fetch-Site", "none") != "none":
        return False
    host = host_of(f"//{request.host}")
    with contextlib.suppress(ValueError):
        return bool(ipaddress.ip_address(host))
    return host in current_app.extensions[OWN_HOSTS]


def host_of(url: str) -> str:
    """The host of a URL, "" if it has none."""
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def read_body(request: HttpRequest, limits: Limits) -> bytes:
    """The body, unpacked, if it is within `max_body_bytes`. Raises BodyTooLarge, UnsupportedMediaType and BadJson."""
    length, most = request.content_length, limits.max_body_bytes
    if length is not None and length > most:
        raise BodyTooLarge(f"the body has {length} bytes, the limit is {most}")
    body = request.get_data(cache=False)
    if encoding := request.headers.get("Content-Encoding", "").strip().lower():
        intake: Intake = current_app.extensions[INTAKE]
        with intake.one_at_a_time:  # until it is counted
            body = _unpacked(body, encoding, most)
            request.held_bytes += intake.take(len(body))
    if len(body) > most:
        raise BodyTooLarge(f"the body is over the limit of {most} bytes")
    return body


def _unpacked(body: bytes, encoding: str, most: int) -> bytes:
    """Up to one byte more than `most`."""
    unpack = UNPACKING.get(encoding)
    if unpack is None:
        raise UnsupportedMediaType(f"Content-Encoding {encoding!r:.40} is not read here: send {', '.join(UNPACKING)}")
    try:
        return unpack(body, most + 1)
    except ImportError:
        raise UnsupportedMediaType(f"Content-Encoding {encoding!r} needs a package that is not installed") from None
    except Exception as error:  # each library has kinds of its own
        raise BadJson(f"the body is not {encoding}: {error}") from None


def _inflated(body: bytes, most: int) -> bytes:
    found = b""
    while True:  # gzip may have several members
        unpacker = zlib.decompressobj(zlib.MAX_WBITS | 32)  # gzip or zlib
        found += unpacker.decompress(body, most - len(found))
        if len(found) >= most:
            return found
        if not unpacker.eof:
            raise ValueError("it ends too soon")
        body = unpacker.unused_data
        if not body:
            return found


def _zstd(body: bytes, most: int) -> bytes:
    import zstandard

    with zstandard.ZstdDecompressor().stream_reader(body) as stream:
        return bytes(stream.read(most))


def _brotli(body: bytes, most: int) -> bytes:
    import brotli

    unpacker = brotli.Decompressor()
    found = bytes(unpacker.process(body, output_buffer_limit=most))
    if not unpacker.is_finished() and len(found) < most:
        raise ValueError("it ends too soon")
    return found


UNPACKING: dict[str, Callable[[bytes, int], bytes]] = {
    "gzip": _inflated,
    "x-gzip": _inflated,
    "deflate": _inflated,
    "zstd": _zstd,
    "br": _brotli,
    "identity": lambda body, most: body,
}
