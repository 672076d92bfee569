"""What the page costs the road: 32 clients of one short text each, alone and beside pages that ask for GET /live.

Usage:
  benchmarks.page [--rounds N] [--seconds S] [--pages N]

Options:
  --rounds N   Rounds, each of which measures both, in turns [default: 7].
  --seconds S  Length of a measurement [default: 8].
  --pages N    Pages that are open; each asks every two seconds [default: 20].
"""

from __future__ import annotations

import contextlib
import http.client
import json
import statistics
import threading
from collections.abc import Iterator
from typing import Any

from docopt import docopt

from benchmarks.load import closed_loop
from benchmarks.servers import SERVERS, Running, running
from benchmarks.texts import short
from embedpool.web.history import STEP_S

CLIENTS = 32


def main() -> None:
    """Print the ratios."""
    arguments = docopt(__doc__)
    rounds, seconds, pages = (int(arguments["--rounds"]), float(arguments["--seconds"]), int(arguments["--pages"]))
    found: dict[int, list[dict[str, float]]] = {0: [], pages: []}
    with running(SERVERS["embedpool-default"]) as up:
        for number in range(rounds + 1):  # the first warms up
            for count in (0, pages) if number % 2 else (pages, 0):
                measured = _measure(up, seconds, count)
                if number:
                    found[count].append(measured)
    print(f"| {pages} pages beside {CLIENTS} clients ÷ none | median | least, most |\n|---|---|---|")
    for name in ("rate", "cpu_s"):
        ratios = [beside[name] / alone[name] for beside, alone in zip(found[pages], found[0], strict=True)]
        title = {"rate": "requests/s", "cpu_s": "CPU of the server a request"}[name]
        print(f"| {title} | {statistics.median(ratios):.3f} | {min(ratios):.3f}, {max(ratios):.3f} |")
    print(f"answers to pages: {statistics.mean(one['polls'] for one in found[pages]):.0f} a measurement")


def _measure(up: Running, seconds: float, pages: int) -> dict[str, float]:
    bodies = [up.server.body([text]) for text in short(1500)]
    with _open_pages(up.port, pages) as polls:
        before_s = up.cpu_s()
        result = closed_loop(up.port, up.server.path, bodies, CLIENTS, seconds)
        spent_s = up.cpu_s() - before_s
    answers = result["answers"]
    return {"rate": answers / result["seconds"], "cpu_s": spent_s / answers, "polls": len(polls)}


@contextlib.contextmanager
def _open_pages(port: int, count: int) -> Iterator[list[int]]:
    """Each asks as the page does: for what is new since its last answer."""
    over, polls = threading.Event(), list[int]()

    def page(number: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        known, process = 0, ""
        wait_s = STEP_S * number / count
        while not over.wait(wait_s):
            connection.request("GET", f"/live?since={known}&process={process}")
            document: dict[str, Any] = json.loads(connection.getresponse().read())
            known, process, wait_s = document["number"], document["process"], STEP_S
            polls.append(known)
        connection.close()

    threads = [threading.Thread(target=page, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    try:
        yield polls
    finally:
        over.set()
        for thread in threads:
            thread.join()


if __name__ == "__main__":
    main()
