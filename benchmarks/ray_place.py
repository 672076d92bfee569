"""`place: ray` beside `place: process`: what the way to an actor costs, on one machine.

Usage:
  benchmarks.ray_place [--rounds N] [--seconds S] [--write]

Options:
  --rounds N   Each round measures both [default: 7].
  --seconds S  How long clients ask [default: 6].
  --write      Write the table of README.md.

The cluster is the one that embedpool starts for itself, the model the packaged MiniLM in fp32, two CPUs in both places.
"""

from __future__ import annotations

import contextlib
import os
import statistics
from collections.abc import Iterator

import psutil
from docopt import docopt

from benchmarks import texts
from benchmarks.load import Group, drive
from benchmarks.report import between_markers, table
from benchmarks.servers import Running, Server, running, serving

TEXTS_A_BATCH, CLIENTS = 32, 32
MOST_MS, LEAST_RATIO = 5.0, 0.9


def _serving(place: str) -> Server:
    driver = {"type": "local_st", "config": {"path": str(texts.model_folder())}}
    resources = {"resources": {"num_cpus": 2}} if place == "ray" else {}
    return serving({"place": place, "driver": driver, **resources})


def main() -> None:
    """Measure, print, and write."""
    arguments = docopt(__doc__)
    rounds, seconds = int(arguments["--rounds"]), float(arguments["--seconds"])
    measured: list[dict[str, float]] = []
    os.environ["EMBEDPOOL_BATCHING__MAX_BATCH_MS"] = "500"  # so that 32 texts are one batch in both
    with running(_serving("process")) as process, running(_serving("ray")) as ray:
        for number in range(rounds):
            found: dict[str, dict[str, float]] = {}
            for name, up in [("process", process), ("ray", ray)][:: 1 if number % 2 else -1]:
                found[name] = _measure(up, seconds)
            measured.append(
                {
                    "ms": found["ray"]["batch_ms"] - found["process"]["batch_ms"],
                    "ratio": found["ray"]["texts_s"] / found["process"]["texts_s"],
                    "cores": found["ray"]["cores_of_ray"],
                }
            )
            print(found, measured[-1], flush=True)
    over = {name: [one[name] for one in measured] for name in measured[0]}
    middle = {name: statistics.median(values) for name, values in over.items()}
    spread = {name: f"{middle[name]:.2f} ({min(values):.2f}, {max(values):.2f})" for name, values in over.items()}
    is_met = ("yes" if middle["ms"] <= MOST_MS else "**no**", "yes" if middle["ratio"] >= LEAST_RATIO else "**no**")
    rows = [
        ["a batch of 32 short texts, ms more than in a process", f"<= {MOST_MS:g}", spread["ms"], is_met[0]],
        ["texts/s of 32 clients ÷ those in a process", f">= {LEAST_RATIO}", spread["ratio"], is_met[1]],
        ["cores that Ray's own processes took meanwhile", "", spread["cores"], ""],
    ]
    told = table(["what", "asked", "measured", "met"], rows)
    print(told)
    if arguments["--write"]:
        command = f"`--rounds {rounds} --seconds {seconds:g}`"
        between_markers("ray", f"Medians, least and most of {rounds} rounds, {command}.\n\n{told}")


def _measure(up: Running, seconds: float) -> dict[str, float]:
    short = texts.short(1500)
    parts = [short[at : at + TEXTS_A_BATCH] for at in range(0, len(short) - TEXTS_A_BATCH, TEXTS_A_BATCH)]
    lone = Group("lone", 1, [up.server.body(part) for part in parts])
    batch_ms = drive(up.port, up.server.path, [lone], seconds)["lone"]["p50_ms"]
    before = _cpu_of_ray_s()
    many = Group("many", CLIENTS, [up.server.body([text]) for text in short])
    result = drive(up.port, up.server.path, [many], seconds)["many"]
    cores = (_cpu_of_ray_s() - before) / result["seconds"]
    return {"batch_ms": batch_ms, "texts_s": result["answers"] / result["seconds"], "cores_of_ray": cores}


def _cpu_of_ray_s() -> float:
    """Of the cluster's own processes, without the actors."""
    return sum(sum(process.cpu_times()[:2]) for process in _of_ray())


def _of_ray() -> Iterator[psutil.Process]:
    for process in psutil.process_iter(["cmdline", "name"]):
        with contextlib.suppress(psutil.Error):
            words = " ".join(process.info["cmdline"] or ())
            if "embedpool-ray-" in words or process.info["name"].startswith(("ray::Dash", "ray::Runtime", "ray::IDLE")):
                yield process


if __name__ == "__main__":
    main()
