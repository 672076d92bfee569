"""This checkout of embedpool and another one serve at the same time, so that whatever the machine does meets both.

Rounds in turns (`benchmarks.run --baseline`) tell what a server does alone, but the machine drifts between them. Here
both have half of it at every moment: the ratios of CPU time have a fraction of the noise. Those of the rates count only
where there are many clients.

Usage:
  benchmarks.beside CHECKOUT [--server NAME] [--workloads NAMES] [--rounds N] [--seconds S]

Options:
  --server NAME      An embedpool server of servers.py [default: embedpool-default].
  --workloads NAMES  Comma-separated, of those of benchmarks.run [default: short-1,short-32,short-128,mixed16-16].
  --rounds N         Measurements of each workload [default: 20].
  --seconds S        Length of one [default: 3].
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from docopt import docopt

from benchmarks.run import WORKLOADS
from benchmarks.servers import SERVERS, Running, of_baseline, running


def main() -> None:
    arguments = docopt(__doc__)
    server, seconds = SERVERS[arguments["--server"]], float(arguments["--seconds"])
    with (
        running(server) as ours,
        running(of_baseline(server, Path(arguments["CHECKOUT"]).resolve())) as theirs,
        ThreadPoolExecutor(2) as threads,
    ):
        for up in (ours, theirs):
            WORKLOADS["short-8"](up, 1)  # warm

        def measure(up: Running, workload: str) -> tuple[float, float]:
            before_s = up.cpu_s()
            result = WORKLOADS[workload](up, seconds)
            return result["texts_s"], (up.cpu_s() - before_s) / result["texts"]

        print("this checkout ÷ the other, mean of rounds ± its standard error")
        print("| workload | rounds | rate | CPU s per 1,000 texts |\n|---|---|---|---|")
        for workload in arguments["--workloads"].split(","):
            ratios: list[Sequence[float]] = []
            for number in range(int(arguments["--rounds"])):
                order = -1 if number % 2 else 1  # which of them begins
                measured = list(threads.map(measure, (ours, theirs)[::order], [workload] * 2))[::order]
                ratios.append([a / b for a, b in zip(*measured, strict=True)])
            rate, cpu = ([ratio[i] for ratio in ratios] for i in (0, 1))
            print(f"| {workload} | {len(ratios)} | {_shown(rate)} | {_shown(cpu)} |", flush=True)


def _shown(ratios: Sequence[float]) -> str:
    error = statistics.stdev(ratios) / len(ratios) ** 0.5
    return f"{statistics.mean(ratios):.3f} ± {error:.3f}"


if __name__ == "__main__":
    main()
