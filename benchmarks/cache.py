"""What the cache gives: texts that come again, beside a server without it and beside a model that costs nothing.

Usage:
  benchmarks.cache [--rounds N] [--seconds S] [--texts N] [--disk] [--write]

Options:
  --rounds N   Each round measures every server [default: 5].
  --seconds S  How long each is asked in each way [default: 4].
  --texts N    Different short texts that are known [default: 100000].
  --disk       Keep them on the disk, with a memory that holds a hundredth.
  --write      Write the table of README.md.
"""

from __future__ import annotations

import contextlib
import itertools
import statistics
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from docopt import docopt

from benchmarks import texts
from benchmarks.load import closed_loop
from benchmarks.report import between_markers, table
from benchmarks.servers import Running, running, serving

MANY, AT_ONCE = 256, 4  # texts a request, and requests
ENTRY_BYTES = 2200  # of 384 numbers, about
LOCAL = {"type": "local_st"}
FREE = {"type": "fake", "config": {"dim": 384}}


def main() -> None:
    """Measure, print, and write."""
    arguments = docopt(__doc__)
    rounds, seconds, count = int(arguments["--rounds"]), float(arguments["--seconds"]), int(arguments["--texts"])
    size_mb = 1 + count * ENTRY_BYTES // 1_000_000
    kept = {"memory_mb": size_mb // 100, "disk_mb": 4 * size_mb} if arguments["--disk"] else {"memory_mb": size_mb}
    known = [f"{text} {i}" for i, text in zip(range(count), itertools.cycle(texts.short(1500)))]
    found: dict[str, list[float]] = {}
    with contextlib.ExitStack() as stack:
        servers = {
            "cached": serving({"driver": LOCAL}, cache={"enabled": True, **kept}),
            "plain": serving({"driver": LOCAL}, cache={"enabled": False}),
            "free": serving({"driver": FREE}, cache={"enabled": False}),
        }
        ups = {name: stack.enter_context(running(server)) for name, server in servers.items()}
        _fill(ups["cached"], known)
        fresh = (f"{text} anew {i}" for i, text in enumerate(itertools.cycle(texts.short(1500))))
        for number in range(rounds):
            for name, value in _round(ups, known, fresh, seconds, backwards=number % 2 == 1):
                print(f"{name}: {value:.3f}", flush=True)
                found.setdefault(name, []).append(value)
    rows = []
    for (name, sign, bound), values in zip(ASKED, found.values(), strict=True):
        middle = statistics.median(values)
        met = middle >= bound if sign == ">=" else middle <= bound
        measured = f"{middle:.2f} ({min(values):.2f}, {max(values):.2f})"
        rows.append([name, f"{sign} {bound}", measured, "yes" if met else "**no**"])
    told = table(["what", "asked", "measured", "met"], rows)
    print(told)
    if arguments["--write"]:
        command = f"`--rounds {rounds} --seconds {seconds:g} --texts {count}`"
        between_markers("cache", f"Medians, least and most of {rounds} rounds, {command}.\n\n{told}")


ASKED = (
    ("32 clients, one known text a request: texts/s ÷ computed", ">=", 2.5),
    ("32 clients, one known text a request: texts/s ÷ of a model that costs nothing", ">=", 0.7),
    ("one client, one known text a request: p50 over that of a model that costs nothing, ms", "<=", 1.0),
    (f"4 clients, {MANY} known texts a request: texts/s ÷ computed", ">=", 20.0),
    ("32 clients, one text a request, none known: texts/s ÷ of a server without a cache", ">=", 0.97),
)


def _round(
    ups: dict[str, Running], known: list[str], fresh: Iterator[str], seconds: float, *, backwards: bool
) -> Iterator[tuple[str, float]]:
    """What ASKED asks for, in its order."""
    names = list(ups)[:: -1 if backwards else 1]
    ask = partial(_ask, seconds=seconds)
    one = {name: ask(ups[name], known, 1, 32) for name in names}
    alone = {name: ask(ups[name], known, 1, 1) for name in names}
    many = {name: ask(ups[name], known, MANY, AT_ONCE) for name in names if name != "free"}
    new = {name: ask(ups[name], list(itertools.islice(fresh, 10_000)), 1, 32) for name in names if name != "free"}
    values: tuple[Callable[[], float], ...] = (
        lambda: one["cached"]["texts_s"] / one["plain"]["texts_s"],
        lambda: one["cached"]["texts_s"] / one["free"]["texts_s"],
        lambda: alone["cached"]["p50_ms"] - alone["free"]["p50_ms"],
        lambda: many["cached"]["texts_s"] / many["plain"]["texts_s"],
        lambda: new["cached"]["texts_s"] / new["plain"]["texts_s"],
    )
    for (name, _, _), value in zip(ASKED, values, strict=True):
        yield name, value()


def _ask(up: Running, given: list[str], per_request: int, clients: int, seconds: float) -> dict[str, float]:
    bodies = [up.server.body(given[at : at + per_request]) for at in range(0, len(given), per_request)]
    result = closed_loop(up.port, up.server.path, bodies, clients, seconds)
    return {"texts_s": per_request * result["answers"] / result["seconds"], "p50_ms": result["p50_ms"]}


def _fill(up: Running, known: list[str]) -> None:
    parts = [known[at : at + MANY] for at in range(0, len(known), MANY)]
    with ThreadPoolExecutor(AT_ONCE) as threads:
        for _ in threads.map(up.ask, parts):
            pass


if __name__ == "__main__":
    main()
