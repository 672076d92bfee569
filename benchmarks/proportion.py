"""Cost grows in proportion: texts a second by texts in a request, and what an idle server with three models uses.

Usage:
  proportion.py [--rounds N] [--idle-s S]

Options:
  --rounds N  Rounds, each of which asks in every size [default: 3].
  --idle-s S  How long the idle server is watched, in seconds [default: 60].
"""

from __future__ import annotations

import json
import statistics
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

from docopt import docopt

from benchmarks.servers import EMBEDPOOL, MODEL, SERVERS, Running, running
from benchmarks.texts import mixed, model_folder

SIZES = (16, 128, 1024, 8192)
TEXTS = 8192  # in each size, in as many requests as it takes


def main() -> None:
    arguments = docopt(__doc__)
    rates: dict[int, list[float]] = defaultdict(list)
    peaks: dict[int, float] = {}
    texts = mixed(TEXTS)
    with running(SERVERS["embedpool-default"]) as up:
        for number in range(int(arguments["--rounds"])):
            for size in SIZES[number % 2 :] + SIZES[: number % 2]:
                start_s = time.perf_counter()
                for at in range(0, TEXTS, size):
                    up.ask(texts[at : at + size], timeout_s=600)
                rates[size].append(TEXTS / (time.perf_counter() - start_s))
                peaks.setdefault(size, up.peak_mb())
    first = statistics.median(rates[SIZES[0]])
    print("| texts a request | texts/s ÷ that with 16 | peak memory until then, MB |\n|---|---|---|")
    for size in SIZES:
        print(f"| {size:,} | {statistics.median(rates[size]) / first:.2f} | {peaks[size]:.0f} |")
    with running(replace(SERVERS["embedpool-default"], command=_three_models)) as up:
        _watch_idle(up, float(arguments["--idle-s"]))


def _three_models(folder: Path, port: int) -> list[str]:
    driver = {"type": "local_st", "config": {"path": str(model_folder())}}
    models = [{"model": name, "driver": driver} for name in (MODEL, "second", "third")]
    (folder / ".config" / "pool.yml").write_text(json.dumps({"version": 1, "models": models}))
    return [*EMBEDPOOL, "pool", "start"]


def _watch_idle(up: Running, seconds: float) -> None:
    time.sleep(5)  # what loading left to do is done
    processes = [up.process, *up.process.children(recursive=True)]
    before_s, switches = up.cpu_s(), sum(p.num_ctx_switches().voluntary for p in processes)
    time.sleep(seconds)
    used, woken = (up.cpu_s() - before_s) / seconds, sum(p.num_ctx_switches().voluntary for p in processes) - switches
    print(f"\nidle, three models: {100 * used:.2f}% of a core; main threads woken {woken / seconds:.1f} times a second")


if __name__ == "__main__":
    main()
