"""Requests as they should not be, on all paths that /openapi.json names, from one random generator."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator
from typing import Any

Document = dict[str, Any]

SERVED, MANAGED = "m", "other"  # what management is asked to change is not what is served
OWN_VALUES = {"driver_type": "fake", "driver_config": {"dim": 8}, "min": 1, "max": 1, "idle_ttl_s": 1}
DEEP = 20_000
ODD_VALUES: list[Any] = [
    None,
    True,
    -1,
    0,
    2**31,
    2**64,
    10**30,
    1e308,
    0.1,
    float("nan"),
    float("inf"),
    "",
    " ",
    "\0",
    "\ud800",
    "\u202e\U0001f600",
    "x" * 70_000,
    "-1",
    [],
    [[]],
    [None],
    ["a", 1],
    [""] * 1_000,
    {},
    {"": {}},
    {"model": "m"},
]
ODD_BODIES: list[bytes] = [
    b"",
    b"\0",
    b"\xff\xfe{\0}\0",
    b"\xef\xbb\xbf{}",
    b'"text"',
    b"[]",
    b"null",
    b"NaN",
    b"{" * DEEP,
    b"[" * DEEP + b"]" * DEEP,
    b'{"model":' * DEEP + b"1" + b"}" * DEEP,
    b'{"model": "m", "texts": ' + b"[" * DEEP + b"]" * DEEP + b"}",
    b'{"model": "m", "texts": [' + b"1" * 10_000 + b"]}",
    b'{"model": "m", "texts": ["\\ud800"]}',
    b'{"model": "m", "texts": ["\xff\xfe"]}',
    b'{"model": "m", "model": "n", "texts": ["a"]}',
    b'{"model": "m", "texts": ["a"]} {"more": 1}',
    b"{'model': 'm'}",
    b"\x1f\x8b\x08\x00\x00\x00\x00\x00",
    b"model=m&texts=a",
    b'{"text": "a"}\n{"text": \n\n\n[]\n{"text": 1}\n\xff\n{"text": "b"}',
]
ODD_TARGETS: list[bytes] = [
    b"",
    b"*",
    b"/%",
    b"/%zz%00%ff",
    b"/\xff\xfe",
    b"/\0",
    b"//embed",
    b"/../../etc/passwd",
    b"/embed/../embed",
    b"http://localhost/embed",
    b"http://[::1/embed",
    b"/embed?model=%ff&wait=\0",
    b"/models/%2e%2e%2f",
    b"/tei//embed",
    b"/embed#fragment",
    b"/" + b"a" * 20_000,
    b"/embed?" + b"a=1&" * 5_000,
    b"/ embed x",
]
ODD_LINES: list[bytes] = [
    b"GET\r\n\r\n",
    b"\r\n\r\n\r\n",
    b"\0\0\0\0\r\n\r\n",
    b"GET / HTTP/9.9\r\n\r\n",
    b"GET / HTTP/1.0\r\n\r\n",
    b"GET / http/1.1\r\nHost: x\r\n\r\n",
    b"get /health HTTP/1.1\r\nHost: x\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"CONNECT localhost:1 HTTP/1.1\r\nHost: x\r\n\r\n",
    b"TRACE / HTTP/1.1\r\nHost: x\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(256)),
    b"GET /health HTTP/1.1\nHost: x\n\n",
    b"GET /health HTTP/1.1\r\n\r\n",
]
ODD_HEADERS: list[bytes] = [
    b"Content-Length: -1",
    b"Content-Length: +5",
    b"Content-Length: 0x10",
    b"Content-Length: 1_0",
    b"Content-Length: 5, 5",
    b"Content-Length: 5\r\nContent-Length: 6",
    b"Content-Length: " + b"9" * 30,
    b"Content-Length: " + b"9" * 5_000,
    b"Content-Length: \xb2",
    b"Content-Length:",
    b"Content-Length: 3",
    b"Content-Length: 100000",
    b"Transfer-Encoding: chunked\r\nContent-Length: 5",
    b"Transfer-Encoding: gzip, chunked",
    b"Transfer-Encoding: identity",
    b"Transfer-Encoding: \x0bchunked",
    b"Transfer-Encoding : chunked",
    b"Expect: 100-continue",
    b"Expect: nothing",
    b"Connection: close, keep-alive, \0",
    b"Connection: upgrade\r\nUpgrade: websocket",
    b"Host:",
    b"Host: [::1",
    b"Host: a b\r\nHost: c",
    b"Origin: null",
    b"Accept: application/x-npy;q=\xff",
    b"Accept: ,;,q=x",
    b"Accept-Encoding: " + b"gzip," * 1_000,
    b"Authorization: Bearer \xff",
    b"Authorization: Basic ====",
    b"X-Request-Timeout-Ms: nan",
    b"X-Request-Timeout-Ms: inf",
    b"X-Request-Timeout-Ms: -1",
    b"X-Request-Timeout-Ms: 1e400",
    b"X-Request-Timeout-Ms: " + b"9" * 5_000,
    b"X-Embedpool-Hops: -1",
    b"X-Embedpool-Hops: " + b"9" * 5_000,
    b"traceparent: 00-0-0-0",
    b"traceparent: \xff\r\ntracestate: =,=",
    b"X-Forwarded-For: \0",
    b'Forwarded: for="',
    b"Cookie: " + b"a=b;" * 1_000,
    b"Range: bytes=-1--",
    b"No colon",
    b": no name",
    b"Name with blanks: 1",
    b" folded: 1",
    b"X-Nul: a\0b",
    b"X-Cr: a\rb",
    b"X-Long: " + b"a" * 300_000,
    b"\r\n".join(b"X-%d: 1" % i for i in range(2_000)),
    b"Content-Encoding: gzip",
]
ODD_TYPES: list[bytes] = [
    b"",
    b"text/plain",
    b"application/json; charset=nonsense",
    b"application/json; charset=utf-16",
    b"application/json;;;=",
    b"application/x-ndjson",
    b"application/x-www-form-urlencoded",
    b"multipart/form-data",
    b"multipart/form-data; boundary=x",
    b"\xff/\xff",
    b"a" * 5_000,
]
ODD_CHUNKS: list[bytes] = [
    b"zz\r\n",
    b"-1\r\n",
    b"0x5\r\nhello\r\n0\r\n\r\n",
    b"f" * 40 + b"\r\n",
    b"5\r\nhel",
    b"5\r\nhelloworld\r\n0\r\n\r\n",
    b"5\nhello\n0\n\n",
    b"5;ext=\0\r\nhello\r\n0\r\n\r\n",
    b"0\r\nTrailer: x\r\n\r\n",
    b"0\r\n\r\n",
    b"\r\n\r\n",
    b"1\r\n{\r\n" * 2_000 + b"0\r\n\r\n",
    b";" * 100_000,
]


def requests_of(api: Document, rng: random.Random) -> Iterator[bytes]:
    """Without end, each with something wrong in its head, its target, its body or its length; a few are right."""
    operations = [(method, path, spec) for path, by in api["paths"].items() for method, spec in by.items()]
    ways = [odd_line, odd_target, odd_head, odd_length, odd_type, odd_body, odd_value, odd_bytes, cut_short]
    while True:
        method, path, spec = rng.choice(operations)
        is_managed = method == "delete" or (method == "post" and path.startswith(("/models", "/reload")))
        name = MANAGED if is_managed else SERVED
        target = path.replace("{name}", name).replace("{file}", "start.js").encode()
        schema = spec.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema")
        document = example(schema, api, rng) if schema else None
        if isinstance(document, dict) and "model" in document:
            document["model"] = name
        yield rng.choice(ways)(method.upper().encode(), target, document, rng)


def example(schema: Document, api: Document, rng: random.Random, name: str = "") -> Any:
    """A value that the schema allows, or nearly; what is optional is there or not."""
    if name in OWN_VALUES:
        return copy.deepcopy(OWN_VALUES[name])
    if "$ref" in schema:
        return example(api["components"]["schemas"][schema["$ref"].rsplit("/", 1)[1]], api, rng)
    if "anyOf" in schema:
        return example(rng.choice(schema["anyOf"]), api, rng, name)
    if "enum" in schema:
        return rng.choice(schema["enum"])
    kind = schema.get("type")
    if isinstance(kind, list):
        kind = rng.choice(kind)
    if kind == "object":
        required = schema.get("required", [])
        known = schema.get("properties", {}).items()
        return {key: example(of, api, rng, key) for key, of in known if key in required or rng.random() < 0.2}
    if kind == "array":
        return [example(schema.get("items", {}), api, rng) for _ in range(rng.randint(1, 3))]
    simple: dict[str | None, Any] = {"integer": 4, "number": 4, "boolean": True, "null": None}
    return simple.get(kind, f"text {rng.randrange(100)}")


def message(
    method: bytes, target: bytes, body: bytes, *headers: bytes, content_type: bytes = b"application/json"
) -> bytes:
    """A request in which a header that is given stands in the place of the one of that name."""
    given = b"\r\n".join(headers).lower()
    lines = [b"%s %s HTTP/1.1" % (method, target)]
    if b"host:" not in given:
        lines.append(b"Host: localhost")
    if b"content-length" not in given and b"transfer-encoding" not in given and (body or method == b"POST"):
        lines.append(b"Content-Length: %d" % len(body))
    if content_type:
        lines.append(b"Content-Type: " + content_type)
    return b"\r\n".join([*lines, *headers]) + b"\r\n\r\n" + body


def as_json(document: Any) -> bytes:
    return b"" if document is None else json.dumps(document).encode()


# --- what can be wrong: method, target, document and generator → bytes

Way = Callable[[bytes, bytes, Any, random.Random], bytes]


def odd_line(method: bytes, target: bytes, document: Any, rng: random.Random) -> bytes:
    return rng.choice(ODD_LINES)


def odd_target(method: bytes, target: bytes, document: Any, rng: random.Random) -> bytes:
    odd = rng.choice([*ODD_TARGETS, target + rng.choice(ODD_TARGETS), target + b"?" + rng.randbytes(8).hex().encode()])
    return message(method, odd, as_json(document))


def odd_head(method: bytes, target: bytes, document: Any, rng: random.Random) -> bytes:
    return message(method, target, as_json(document), *rng.sample(ODD_HEADERS, rng.randint(1, 3)))


def odd_length(method: bytes, target: bytes, document: Any, rng: random.Random) -> bytes:
    return message(method, target, rng.choice(ODD_CHUNKS), b"Transfer-Encoding: chunked")


def odd_type(method: bytes, target: bytes, document: Any, rng: random.Random) -> bytes:
    return message(method, target, as_json(document), content_type=rng.choice(ODD_TYPES))


def odd_body(method: bytes, target: bytes, document: Any, rng: random.Random) -> bytes:
    content_type = b"application/json" if rng.random() < 0.8 else b"application/x-ndjson"
    return message(method, target, rng.choice(ODD_BODIES), content_type=content_type)


def odd_value(method: bytes, target: bytes, document: Any, rng: random.Random) -> bytes:
    """One value, anywhere in the document, becomes another; or a key comes or goes."""
    if not isinstance(document, dict) or not document:
        return message(method, target, as_json(rng.choice(ODD_VALUES)))
    node: Any = document
    while True:
        key = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
        if not node[key] or not isinstance(node[key], dict | list) or rng.random() < 0.5:
            break
        node = node[key]
    action = rng.random()
    if action < 0.8:
        node[key] = rng.choice(ODD_VALUES)
    elif action < 0.9:
        del node[key]
    elif isinstance(node, dict):
        node[rng.choice(["", "\0", "texts", "__class__", "x" * 1_000])] = rng.choice(ODD_VALUES)
    return message(method, target, as_json(document))


def odd_bytes(method: bytes, target: bytes, document: Any, rng: random.Random) -> bytes:
    """Some bytes, in any place of the request, are others."""
    data = bytearray(message(method, target, as_json(document)))
    for _ in range(rng.randint(1, 5)):
        data[rng.randrange(len(data))] = rng.randrange(256)
    return bytes(data)


def cut_short(method: bytes, target: bytes, document: Any, rng: random.Random) -> bytes:
    data = message(method, target, as_json(document))
    return data[: rng.randrange(1, len(data))]
