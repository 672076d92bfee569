"""One embedpool in front of three, beside the three asked directly: texts/s as a ratio.

The three have the fake driver, which takes 50 ms for a batch and next to no CPU time, since all share one machine.

Usage:
  benchmarks.front [--rounds N] [--seconds S] [--write]

Options:
  --rounds N   Each round measures both [default: 5].
  --seconds S  How long clients ask [default: 8].
  --write      Write the table of README.md.
"""

from __future__ import annotations

import contextlib
import statistics
from concurrent.futures import ThreadPoolExecutor

from docopt import docopt

from benchmarks import texts
from benchmarks.load import Group, drive
from benchmarks.report import between_markers, table
from benchmarks.servers import Running, running, serving

MACHINES, CLIENTS_A_MACHINE, TEXTS_A_REQUEST = 3, 8, 16
FAKE = {"type": "fake", "config": {"delay_ms": 50, "dim": 384}}
ASKED = 0.9


def main() -> None:
    """Measure, print, and write."""
    arguments = docopt(__doc__)
    rounds, seconds = int(arguments["--rounds"]), float(arguments["--seconds"])
    given = texts.short(1500)
    ratios = []
    with contextlib.ExitStack() as stack:
        behind = [stack.enter_context(running(serving({"driver": FAKE}))) for _ in range(MACHINES)]
        urls = [f"http://127.0.0.1:{up.port}/embed" for up in behind]
        config = {"base_url": urls[0], "base_urls": urls[1:]}
        front = stack.enter_context(running(serving({"driver": {"type": "http", "config": config}})))
        for number in range(rounds):
            found = {}
            for name in ("direct", "front") if number % 2 else ("front", "direct"):
                found[name] = _rate(behind if name == "direct" else [front], given, seconds)
            ratios.append(found["front"] / found["direct"])
            print(found, f"{ratios[-1]:.2f}", flush=True)
    middle = statistics.median(ratios)
    row = [
        "texts/s through one in front ÷ asked directly", f">= {ASKED}",
        f"{middle:.2f} ({min(ratios):.2f}, {max(ratios):.2f})", "yes" if middle >= ASKED else "**no**",
    ]  # fmt: skip
    told = table(["what", "asked", "measured", "met"], [row])
    print(told)
    if arguments["--write"]:
        command = f"`--rounds {rounds} --seconds {seconds:g}`"
        between_markers("front", f"Median, least and most of {rounds} rounds, {command}.\n\n{told}")


def _rate(servers: list[Running], given: list[str], seconds: float) -> float:
    """Texts a second of all together, which as many clients share in any case."""
    bodies = [servers[0].server.body(given[at : at + TEXTS_A_REQUEST]) for at in range(0, len(given), TEXTS_A_REQUEST)]
    clients = CLIENTS_A_MACHINE * MACHINES // len(servers)

    def one(up: Running) -> float:
        result = drive(up.port, up.server.path, [Group("all", clients, bodies)], seconds)["all"]
        return TEXTS_A_REQUEST * result["answers"] / result["seconds"]

    with ThreadPoolExecutor(len(servers)) as threads:
        return sum(threads.map(one, servers))


if __name__ == "__main__":
    main()
