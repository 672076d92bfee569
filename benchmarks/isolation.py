"""What a process of its own costs a model: texts/s of its driver there, as a ratio to that in this process.

Usage:
  isolation.py [--rounds N] [--seconds S] [--backend NAME]

Options:
  --rounds N      Rounds, each of which measures both placements [default: 5].
  --seconds S     How long each is measured in a round [default: 4].
  --backend NAME  The model's backend [default: auto].
"""

from __future__ import annotations

import statistics
import tempfile
import threading
import time
from pathlib import Path

from docopt import docopt
from embedpool.drivers.base import Driver

from benchmarks.texts import mixed, model_folder, short
from embedpool.config.spec import DriverSpec, LocalStConfig, ModelSpec
from embedpool.drivers import make_driver, open_meter

BATCH_TEXTS = 32


def main() -> None:
    arguments = docopt(__doc__)
    rounds, seconds = int(arguments["--rounds"]), float(arguments["--seconds"])
    with tempfile.TemporaryDirectory() as cache:
        drivers: dict[str, Driver] = {}
        for isolation in ("thread", "process"):
            config = LocalStConfig(
                path=str(model_folder()), isolation=isolation, backend=arguments["--backend"], max_seq_length=256
            )
            spec = ModelSpec("minilm", DriverSpec("local_st", config))
            drivers[isolation] = make_driver(spec, Path(cache))
            drivers[isolation].open()
        meter = open_meter(spec)
        print("| texts | process ÷ thread (median of rounds) | least, most |\n|---|---|---|")
        for name, texts in {"short": short(256), "mixed lengths, sorted": sorted(mixed(256), key=len)}.items():
            ids = [meter.cut(i, 256, "right") for i in meter.measure(texts) or ()]
            batches = [(texts[i : i + BATCH_TEXTS], ids[i : i + BATCH_TEXTS]) for i in range(0, 256, BATCH_TEXTS)]
            ratios = []
            for number in range(rounds + 1):  # the first warms up
                order = ["thread", "process"] if number % 2 else ["process", "thread"]
                rates = {isolation: _texts_s(drivers[isolation], batches, seconds) for isolation in order}
                if number:
                    ratios.append(rates["process"] / rates["thread"])
            print(f"| {name} | {statistics.median(ratios):.3f} | {min(ratios):.3f}, {max(ratios):.3f} |")
        for driver in drivers.values():
            driver.close()


def _texts_s(driver: Driver, batches: list[tuple[list[str], list[list[int]]]], seconds: float) -> float:
    """As many threads as serve the driver well, each running one batch after the other."""
    done = [0] * driver.parallel

    def run(number: int) -> None:
        i = number
        while time.perf_counter() < end:
            driver.embed(*batches[i % len(batches)], {})
            done[number] += BATCH_TEXTS
            i += 1

    start = time.perf_counter()
    end = start + seconds
    threads = [threading.Thread(target=run, args=(number,)) for number in range(driver.parallel)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(done) / (time.perf_counter() - start)


if __name__ == "__main__":
    main()
