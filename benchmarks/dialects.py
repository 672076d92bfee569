"""What a dialect costs: server CPU of one-text requests in each API's words, as a ratio to POST /embed.

Usage:
  dialects.py [--rounds N] [--requests N]

Options:
  --rounds N    Rounds, each of which asks in every dialect, beginning with another [default: 7].
  --requests N  Requests of a dialect in a round [default: 400].
"""

from __future__ import annotations

import http.client
import json
import statistics
from collections import defaultdict

from docopt import docopt

from benchmarks.servers import MODEL, SERVERS, Running, running
from benchmarks.texts import short

DIALECTS = {
    "native": ("/embed", lambda text: {"model": MODEL, "texts": [text]}),
    "OpenAI": ("/v1/embeddings", lambda text: {"model": MODEL, "input": text}),
    "OpenAI, base64": ("/v1/embeddings", lambda text: {"model": MODEL, "input": text, "encoding_format": "base64"}),
    "TEI": (f"/tei/{MODEL}/embed", lambda text: {"inputs": text}),
    "Cohere": ("/v2/embed", lambda text: {"model": MODEL, "texts": [text], "input_type": "search_document"}),
    "Ollama": ("/api/embed", lambda text: {"model": MODEL, "input": text}),
}


def main() -> None:
    arguments = docopt(__doc__)
    rounds, requests = int(arguments["--rounds"]), int(arguments["--requests"])
    texts = short(requests)
    spent_s: dict[str, list[float]] = defaultdict(list)
    with running(SERVERS["embedpool-default"]) as up:
        for number in range(rounds + 1):  # the first warms up
            names = list(DIALECTS)
            for name in names[number % len(names) :] + names[: number % len(names)]:
                cpu_s = _cpu_s(up, name, texts)
                if number:
                    spent_s[name].append(cpu_s / requests)
    print("| dialect | CPU ÷ native (median of rounds) | least, most |\n|---|---|---|")
    for name, values in spent_s.items():
        ratios = [value / native for value, native in zip(values, spent_s["native"], strict=True)]
        print(f"| {name} | {statistics.median(ratios):.2f} | {min(ratios):.2f}, {max(ratios):.2f} |")


def _cpu_s(up: Running, name: str, texts: list[str]) -> float:
    """CPU seconds of the server for each text in a request of its own, one after the other, on one connection."""
    path, body_of = DIALECTS[name]
    bodies = [json.dumps(body_of(text)).encode() for text in texts]
    connection = http.client.HTTPConnection("127.0.0.1", up.port, timeout=60)
    before_s = up.cpu_s()
    for body in bodies:
        connection.request("POST", path, body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        content = answer.read()
        if answer.status != 200:
            raise SystemExit(f"{name}: {answer.status} {content!r:.200}")
    after_s = up.cpu_s()
    connection.close()
    return after_s - before_s


if __name__ == "__main__":
    main()
