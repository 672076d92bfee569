"""Vectors without curl: `embedpool embed "text"`, or `… | embedpool embed -`."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from typing import Any

from embedpool.cli.common import NOT_RUNNING, OK, Arguments, UsageError, client_of, read_settings
from embedpool.cli.files import from_files, options_of
from embedpool.errors import ModelChanged

LINES_AT_ONCE = 500


def embed(arguments: Arguments) -> int:
    """Print a vector a line, some hundred at a time; or files in, a file out."""
    if arguments["--in"]:
        return from_files(arguments, pairs=False, choose=_only_model)
    import orjson

    options = options_of(arguments)
    if "model" in options:
        raise UsageError("the model is named by --model")
    client = client_of(read_settings(arguments))
    if client is None:
        print("not running", file=sys.stderr)
        return NOT_RUNNING
    with client:
        model = arguments["--model"] or _only_model(client.status()["models"])
        texts = _lines() if arguments["TEXT"] == ["-"] else iter(arguments["TEXT"])
        spaces = set()
        while some := list(itertools.islice(texts, LINES_AT_ONCE)):
            vectors = (client.embed_json if "output" in options else client.embed)(some, model=model, **options)
            spaces.add(client.space)
            if len(spaces) > 1:
                raise ModelChanged(f"{model!r} has become another model; what is printed above is of the one before")
            for vector in vectors:
                sys.stdout.buffer.write(orjson.dumps(vector, option=orjson.OPT_SERIALIZE_NUMPY) + b"\n")
            sys.stdout.buffer.flush()
    return OK


def _only_model(models: list[dict[str, Any]]) -> str:
    names = [str(entry["model"]) for entry in models]
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
