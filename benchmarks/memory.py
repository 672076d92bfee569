"""What models take of a server's memory, and what stays when they are gone: PSS in MB over that of an empty server.

Usage:
  benchmarks.memory [--rounds N] [--write]

Options:
  --rounds N   Each round starts a server for each number type [default: 3].
  --write      Write the table of README.md.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from docopt import docopt

from benchmarks import texts
from benchmarks.report import between_markers, table
from benchmarks.run import REST_S
from benchmarks.servers import running, serving
from embedpool.client import Client

TYPES = ("float32", "bfloat16")
FIRST, FURTHER, SAME, ALONE, GONE = (
    "the first model, exported anew",
    "a further model of other files",
    "a further model of the same files",
    "the first again, once it is asked for one text at a time",
    "when all are gone",
)
ASKED_MB = {FIRST: 330, FURTHER: 200, GONE: 60}
LONE_TEXTS = 100


EMPTY = serving({"driver": {"type": "fake"}})  # to answer that it is there


def main() -> None:
    """Measure, print, and write."""
    arguments = docopt(__doc__)
    rounds = int(arguments["--rounds"])
    found: dict[tuple[str, str], list[float]] = {}
    for _ in range(rounds):
        for dtype in TYPES:
            for what, mb in _measured(dtype):
                print(f"{dtype}: {what}: {mb:.0f} MB", flush=True)
                found.setdefault((what, dtype), []).append(mb)
    rows = []
    for (what, dtype), values in found.items():
        asked, middle = ASKED_MB.get(what), statistics.median(values)
        met = "-" if asked is None else "yes" if middle <= asked else "**no**"
        measured = f"{middle:.0f} ({min(values):.0f}, {max(values):.0f})"
        rows.append([what, dtype, f"<= {asked}" if asked else "-", measured, met])
    told = table(["what is there", "type", "asked, MB", "measured, MB", "met"], rows)
    print(told)
    if arguments["--write"]:
        between_markers("memory", f"Median, least and most, `--rounds {rounds}`.\n\n{told}")


def _measured(dtype: str) -> Iterator[tuple[str, float]]:
    """What each step has taken, the last one over the empty server."""
    with (
        running(EMPTY, first_start=True) as up,
        tempfile.TemporaryDirectory() as name,
        Client(f"http://127.0.0.1:{up.port}") as client,
    ):
        folders = [Path(name) / number for number in ("first", "further")]
        for number, folder in enumerate(folders):
            shutil.copytree(texts.model_folder(), folder)
            (folder / "README.md").write_text(str(number))
        before_mb = empty_mb = up.pss_mb()
        models: list[str] = []
        for what, folder in ((FIRST, folders[0]), (FURTHER, folders[1]), (SAME, folders[1])):
            models.append(f"m{len(models)}")
            config = {"path": str(folder), "compute_dtype": dtype}
            client.register({"model": models[-1], "driver_type": "local_st", "driver_config": config})
            client.embed(texts.mixed(64), model=models[-1])
            time.sleep(REST_S)
            yield what, up.pss_mb() - before_mb
            before_mb = up.pss_mb()
        for text in texts.short(LONE_TEXTS):
            client.embed([text], model=models[0])
        time.sleep(REST_S)
        yield ALONE, up.pss_mb() - before_mb
        for model in models:
            client.unregister(model)
        time.sleep(REST_S)
        yield GONE, up.pss_mb() - empty_mb


if __name__ == "__main__":
    main()
