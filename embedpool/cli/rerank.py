"""Documents in the order of their relevance to a query, without curl."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from embedpool.cli.common import (
    NOT_RUNNING,
    OK,
    Arguments,
    UsageError,
    assignments,
    client_of,
    converted,
    read_settings,
)
from embedpool.cli.files import from_files


def rerank(arguments: Arguments) -> int:
    """Print a document a line, the best first, its score before it; or files in, a file out."""
    if arguments["--in"]:
        return from_files(arguments, pairs=True, choose=only_reranker)
    top_n = None if arguments["--top"] is None else converted("--top", arguments["--top"], int)
    client = client_of(read_settings(arguments))
    if client is None:
        print("not running", file=sys.stderr)
        return NOT_RUNNING
    documents = _lines(arguments["FILE"] or "-")
    if not documents:
        return OK
    with client:
        model = arguments["--model"] or only_reranker(client.status()["models"])
        ranked = client.rerank(arguments["QUERY"], documents, model=model, top_n=top_n, **assignments(arguments))
    for found in ranked:
        document = documents[found.index]
        if arguments["--json"]:
            print(json.dumps({"index": found.index, "score": found.score, "document": document}))
        else:
            print(f"{found.score:.6f}\t{document}")
    return OK


def _lines(file: str) -> list[str]:
    """Those of a file, or of standard input; an empty one is a document."""
    try:
        given = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
        return given.decode().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{file} cannot be read: {error}") from None


def only_reranker(models: list[dict[str, object]]) -> str:
    """The name of the only model that is known to rerank, else of the only one that may. Raises UsageError."""
    names = [str(entry["model"]) for entry in models if entry["kinds"] == ["rerank"]]
    names = names or [str(entry["model"]) for entry in models if not entry["kinds"]]  # of which nothing is known yet
    if len(names) != 1:
        raise UsageError(f"rerank needs --model: {', '.join(names) if names else 'no reranker is registered'}")
    return names[0]
