"""What a process of its own costs a model: texts/s of its driver there, as a ratio to that in this process.

Usage:
  isolation.py [--rounds N] [--seconds S] [--backend NAME]

Options:
  --rounds N      Rounds, each of which measures both placements [default: 5].
  --seconds S     How long each is measured in a round [default: 4].
  --backend NAME  The model's backend [default: auto].
"""

from __future__ import annotations

import functools
import statistics
import tempfile
import threading
import time
from pathlib import Path

from docopt import docopt

from benchmarks.texts import mixed, model_folder, short
from embedpool.config.spec import DriverSpec, LocalStConfig, ModelSpec
from embedpool.drivers import make_driver, open_tokenizer
from embedpool.places import open_place
from embedpool.tasks.driver import Folders, Place
from embedpool.tasks.item import Batch, Item

BATCH_TEXTS = 32


def main() -> None:
    arguments = docopt(__doc__)
    rounds, seconds = int(arguments["--rounds"]), float(arguments["--seconds"])
    with tempfile.TemporaryDirectory() as cache:
        driver = DriverSpec("local_st", LocalStConfig(path=str(model_folder()), backend=arguments["--backend"]))
        specs = {place: ModelSpec("minilm", driver, place=place) for place in ("thread", "process")}
        folders = Folders(Path(cache), Path(cache))
        places = {
            name: open_place(spec, functools.partial(make_driver, spec, folders, {})) for name, spec in specs.items()
        }
        tokenizer = open_tokenizer(specs["thread"], folders)
        print("| texts | process ÷ thread (median of rounds) | least, most |\n|---|---|---|")
        for name, texts in {"short": short(256), "mixed lengths, sorted": sorted(mixed(256), key=len)}.items():
            ids = [tokenizer.cut(i, 256, "right") for i in tokenizer.encode(texts) or ()]
            items = [Item((text,), len(i), i) for text, i in zip(texts, ids, strict=True)]
            batches = [Batch("embed", items[i : i + BATCH_TEXTS]) for i in range(0, 256, BATCH_TEXTS)]
            ratios = []
            for number in range(rounds + 1):  # the first warms up
                order = ["thread", "process"] if number % 2 else ["process", "thread"]
                rates = {place: _texts_s(places[place], batches, seconds) for place in order}
                if number:
                    ratios.append(rates["process"] / rates["thread"])
            print(f"| {name} | {statistics.median(ratios):.3f} | {min(ratios):.3f}, {max(ratios):.3f} |")
        for place in places.values():
            place.close()


def _texts_s(place: Place, batches: list[Batch], seconds: float) -> float:
    """As many threads as serve the driver well, each running one batch after the other."""
    done = [0] * place.facts.slots

    def run(number: int) -> None:
        i = number
        while time.perf_counter() < end:
            place.run(batches[i % len(batches)])
            done[number] += BATCH_TEXTS
            i += 1

    start = time.perf_counter()
    end = start + seconds
    threads = [threading.Thread(target=run, args=(number,)) for number in range(place.facts.slots)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(done) / (time.perf_counter() - start)


if __name__ == "__main__":
    main()
