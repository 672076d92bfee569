"""Vectors without curl: `embedpool embed "text"`, or `… | embedpool embed -`."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from embedpool.cli.common import NOT_RUNNING, OK, Arguments, UsageError, assignments, client_of, read_settings
from embedpool.errors import ModelChanged

if TYPE_CHECKING:
    from embedpool.client import Client

LINES_AT_ONCE = 500


def embed(arguments: Arguments) -> int:
    """Print a vector a line, some hundred at a time."""
    import orjson

    options = assignments(arguments)
    if "model" in options:
        raise UsageError("the model is named by --model")
    client = client_of(read_settings(arguments))
    if client is None:
        print("not running", file=sys.stderr)
        return NOT_RUNNING
    with client:
        model = arguments["--model"] or _only_model(client)
        texts = _lines() if arguments["TEXT"] == ["-"] else iter(arguments["TEXT"])
        spaces = set()
        while some := list(itertools.islice(texts, LINES_AT_ONCE)):
            vectors = client.embed(some, model=model, **options)
            spaces.add(client.space)
            if len(spaces) > 1:
                raise ModelChanged(f"{model!r} has become another model; what is printed above is of the one before")
            for vector in vectors:
                sys.stdout.buffer.write(orjson.dumps(vector, option=orjson.OPT_SERIALIZE_NUMPY) + b"\n")
            sys.stdout.buffer.flush()
    return OK


def _only_model(client: Client) -> str:
    names = [str(entry["model"]) for entry in client.status()["models"]]
    if len(names) != 1:
        raise UsageError(f"embed needs --model: {', '.join(names) if names else 'no model is registered'}")
    return names[0]


def _lines() -> Iterator[str]:
    """Standard input, line by line; an empty line is a text."""
    for number, line in enumerate(sys.stdin.buffer, 1):
        try:
            yield line.decode().removesuffix("\n").removesuffix("\r")
        except UnicodeDecodeError:
            raise UsageError(f"line {number} of standard input is not UTF-8") from None
