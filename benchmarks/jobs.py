"""Jobs: `embedpool embed --in` beside requests that ask for the same, and clients beside a batch; as ratios.

Usage:
  benchmarks.jobs [--rounds N] [--texts N] [--seconds S] [--kills N] [--write]

Options:
  --rounds N   Each round measures everything once [default: 3].
  --texts N    Texts of a file, of mixed lengths [default: 4000].
  --seconds S  How long clients ask, alone and beside a batch [default: 30].
  --kills N    Also run the command killed so many times and resumed; 2,000 rows are compared [default: 0].
  --write      Write the table of README.md.

What is measured, of one server with the packaged MiniLM in fp32:
  requests  texts/s of four clients that send 256 mixed texts a request, as many texts as the file has (mixed256-4)
  file      texts/s of the command, from its start to its end, text file in and npy out
  killed    likewise, killed by turns and resumed with --resume
  batch     texts/s of a batch of the server, a text a line
  beside    8 clients that embed one short text and think for 100 ms: alone, and beside the batch
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import random
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import requests
from docopt import docopt
from numpy.typing import NDArray

from benchmarks import texts
from benchmarks.load import Group, drive
from benchmarks.report import between_markers, table
from benchmarks.servers import EMBEDPOOL, MODEL, QUIET, SERVERS, Running, running

CLIENTS, TEXTS_A_REQUEST = 4, 256
INTERACTIVE_CLIENTS, THOUGHT_S = 8, 0.1
BOUNDS = {  # what is asked of each ratio: at least, or at most
    "file": (">=", 0.95), "killed": (">=", 0.95), "p99": ("<=", 3.0), "kept": (">=", 0.7),
}  # fmt: skip
RATIOS = {
    "file": "`embed --in`, texts/s ÷ mixed256-4", "killed": "`embed --in`, killed and resumed, ÷ mixed256-4",
    "batch": "batch, texts/s ÷ mixed256-4",
    "p99": "p99 of clients beside a batch ÷ alone", "kept": "texts/s of the batch beside clients ÷ alone",
}  # fmt: skip
LONG_S = 600.0
COMPARED = 2000  # rows with fresh ones


def main() -> None:
    """Measure, print, and write."""
    arguments = docopt(__doc__)
    rounds, count, seconds = int(arguments["--rounds"]), int(arguments["--texts"]), float(arguments["--seconds"])
    kills = int(arguments["--kills"])
    given = [" ".join(text.split()) for text in texts.mixed(count)]
    measured: list[dict[str, float]] = []
    with running(SERVERS["embedpool-default"]) as up:
        up.ask(given[:64])
        for number in range(rounds):
            measured.append(_round(up, given, seconds, kills, file_first=bool(number % 2)))
            print(measured[-1], flush=True)
    rows = []
    for name, title in RATIOS.items():
        if name not in measured[0]:
            continue
        values = [one[name] for one in measured]
        middle = statistics.median(values)
        asked = met = ""
        if name in BOUNDS:
            is_least, bound = BOUNDS[name]
            asked = f"{is_least} {bound}"
            met = "yes" if (middle >= bound if is_least == ">=" else middle <= bound) else "**no**"
        rows.append([title, asked, f"{middle:.2f} ({min(values):.2f}, {max(values):.2f})", met])
    found = table(["what", "asked", "measured", "met"], rows)
    print(found)
    if arguments["--write"]:
        command = f"`--rounds {rounds} --texts {count} --seconds {seconds:g} --kills {kills}`"
        between_markers("jobs", f"Medians, least and most of {rounds} rounds, {command}.\n\n{found}")


def _round(up: Running, given: list[str], seconds: float, kills: int, *, file_first: bool) -> dict[str, float]:
    found: dict[str, float] = {}
    measures: list[tuple[str, Callable[[Running, list[str]], float]]] = [("requests_s", _requests), ("file_s", _file)]
    if kills:
        measures.append(("killed_s", functools.partial(_file, kills=kills)))
    for name, measure in measures[::-1] if file_first else measures:
        found[name] = measure(up, given)
    found |= _beside_a_batch(up, given, seconds)
    found["file"] = found["file_s"] / found["requests_s"]
    if kills:
        found["killed"] = found["killed_s"] / found["requests_s"]
    found["batch"] = found["batch_s"] / found["requests_s"]
    return found


def _requests(up: Running, given: list[str]) -> float:
    parts = [given[at : at + TEXTS_A_REQUEST] for at in range(0, len(given), TEXTS_A_REQUEST)]
    group = Group("all", CLIENTS, [up.server.body(part) for part in parts], requests=len(parts))
    return len(given) / drive(up.port, up.server.path, [group])["all"]["seconds"]


def _file(up: Running, given: list[str], kills: int = 0) -> float:
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "texts.txt").write_text("\n".join(given))
        where = {"EMBEDPOOL_CLIENT__BASE_URL": f"http://127.0.0.1:{up.port}", "PYTHONPATH": str(up.server.checkout)}
        command = [*EMBEDPOOL, "embed", "--model", MODEL, "--in", "texts.txt", "--out", "vectors.npy"]
        here: dict[str, Any] = {"cwd": name, "env": {**os.environ, **QUIET, **where}, "text": True}
        subprocess.run([*EMBEDPOOL, "init"], check=True, stdout=subprocess.DEVNULL, **here)
        began_s = time.perf_counter()
        for kill in range(kills):
            begun = subprocess.Popen([*command, *["--resume"] * bool(kill)], stderr=subprocess.DEVNULL, **here)
            while begun.poll() is None and _rows_done(Path(name)) < len(given) * (kill + 1) // (kills + 1):
                time.sleep(0.01)
            begun.kill()
            begun.wait()
        done = subprocess.run([*command, *["--resume"] * bool(kills)], check=False, stderr=subprocess.PIPE, **here)
        if done.returncode:
            raise RuntimeError(done.stderr)
        took_s = time.perf_counter() - began_s
        if kills:
            _compare(up, given, np.load(Path(name) / "vectors.npy"))
        return len(given) / took_s


def _rows_done(folder: Path) -> int:
    """As far as the job says."""
    with contextlib.suppress(OSError, ValueError):
        return int(json.loads((folder / "vectors.npy.job").read_text())["progress"]["rows"])
    return 0


def _compare(up: Running, given: list[str], vectors: NDArray[Any]) -> None:
    """Some of the rows with fresh ones."""
    assert len(vectors) == len(given)
    chosen = random.Random(21).sample(range(len(given)), min(COMPARED, len(given)))
    for at in range(0, len(chosen), TEXTS_A_REQUEST):
        some = chosen[at : at + TEXTS_A_REQUEST]
        np.testing.assert_allclose(vectors[some], up.ask([given[i] for i in some]), atol=1e-4)


def _beside_a_batch(up: Running, given: list[str], seconds: float) -> dict[str, float]:
    """Clients alone, the batch alone, and both; the batch is cancelled when all is seen."""

    def interactive() -> dict[str, Any]:
        bodies = [up.server.body([text]) for text in texts.short(1500)]
        group = Group("clients", INTERACTIVE_CLIENTS, bodies, think_s=THOUGHT_S)
        return drive(up.port, up.server.path, [group], seconds)["clients"]

    alone = interactive()
    with _batch(up, given):
        before, began_s = _texts(up), time.perf_counter()
        time.sleep(seconds)
        batch_s = (_texts(up) - before) / (time.perf_counter() - began_s)
        before, began_s = _texts(up), time.perf_counter()
        both = interactive()
        beside_s = (_texts(up) - before - both["answers"]) / (time.perf_counter() - began_s)
    return {
        "alone_p99_ms": alone["p99_ms"], "beside_p99_ms": both["p99_ms"], "batch_s": batch_s,
        "p99": both["p99_ms"] / alone["p99_ms"], "kept": beside_s / batch_s,
    }  # fmt: skip


@contextlib.contextmanager
def _batch(up: Running, given: list[str]) -> Iterator[None]:
    """One that runs, of the texts again and again, until it is left."""
    url = f"http://127.0.0.1:{up.port}/v1"
    lines = [
        {"custom_id": f"{i}", "method": "POST", "url": "/v1/embeddings", "body": {"model": MODEL, "input": text}}
        for i, text in enumerate(given * 10)
    ]
    content = "".join(json.dumps(line) + "\n" for line in lines)
    files = {"file": ("texts.jsonl", content)}
    file = requests.post(f"{url}/files", files=files, data={"purpose": "batch"}, timeout=LONG_S).json()
    body = {"input_file_id": file["id"], "endpoint": "/v1/embeddings", "completion_window": "24h"}
    batch_id = requests.post(f"{url}/batches", json=body, timeout=LONG_S).json()["id"]

    def now() -> dict[str, Any]:
        found: dict[str, Any] = requests.get(f"{url}/batches/{batch_id}", timeout=LONG_S).json()
        return found

    while not now()["request_counts"]["completed"]:
        time.sleep(0.1)
    try:
        yield
        if now()["status"] != "in_progress":
            raise RuntimeError(f"the batch did not run all the time: {now()}")
    finally:
        requests.post(f"{url}/batches/{batch_id}/cancel", json={}, timeout=LONG_S)
        while now()["status"] not in ("cancelled", "completed"):
            time.sleep(0.1)


def _texts(up: Running) -> int:
    """That the model has answered."""
    models = requests.get(f"http://127.0.0.1:{up.port}/status", timeout=LONG_S).json()["models"]
    return int(models[0]["counters"]["texts"])


if __name__ == "__main__":
    main()
