"""A static model beside all-MiniLM-L6-v2, both on one server: texts/s as ratios to that of MiniLM in the same round.

The static model is the table of MiniLM's word embeddings (30,522 vectors of 384 numbers), or the one in a folder.

Usage:
  benchmarks.static [--rounds N] [--seconds S] [--folder DIR]

Options:
  --rounds N    Rounds, each of which measures everything once [default: 5].
  --seconds S   Length of a measurement [default: 3].
  --folder DIR  A static model, in the layout of sentence-transformers or model2vec.
"""

from __future__ import annotations

import json
import shutil
import statistics
import tempfile
import time
import urllib.request
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from docopt import docopt
from safetensors.numpy import load_file, save_file

from benchmarks.load import closed_loop
from benchmarks.servers import EMBEDPOOL, GRAPHS, MODEL, SERVERS, Running, running
from benchmarks.texts import model_folder, short
from embedpool.config.spec import LocalStConfig
from embedpool.drivers.local_st import LocalStDriver
from embedpool.drivers.model_files import is_model2vec
from embedpool.tasks.driver import Folders
from embedpool.tasks.item import Batch, Item

STATIC = "static"
TEXTS, BATCH_TEXTS = 4096, 64
MODULES = [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.StaticEmbedding"}]


def main() -> None:
    arguments = docopt(__doc__)
    seconds = float(arguments["--seconds"])
    rates: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(arguments["--folder"]) if arguments["--folder"] else _word_table(Path(name) / "table")
        server = replace(SERVERS["embedpool-default"], path="/v1/embeddings", command=_command)
        drivers = {MODEL: _driver(MODEL, model_folder()), STATIC: _driver(STATIC, folder)}
        with running(replace(server, texts_key="input")) as up:
            print(f"loaded into the running server in {_registered_s(up, folder):.2f} s")
            for number in range(int(arguments["--rounds"])):
                for model in (MODEL, STATIC)[:: -1 if number % 2 else 1]:
                    rates["the driver in process"][model].append(_in_process(drivers[model], seconds))
                    for clients, per_request in ((32, 1), (4, 256)):
                        what = f"HTTP, {clients} clients, {per_request} short text{'s' * (per_request > 1)} a request"
                        rates[what][model].append(_over_http(up, model, clients, per_request, seconds))
                rates["its library's encode in process"][STATIC].append(_library(folder, seconds))
    print("| | static, texts/s ÷ MiniLM's | least, most | ÷ MiniLM's with 32 clients |\n|---|---|---|---|")
    short_32 = statistics.median(rates["HTTP, 32 clients, 1 short text a request"][MODEL])
    for what, of in rates.items():
        against = of.get(MODEL) or rates["the driver in process"][MODEL]
        ratios = [a / b for a, b in zip(of[STATIC], against, strict=True)]
        beside = statistics.median(of[STATIC]) / short_32
        print(f"| {what} | {statistics.median(ratios):.1f} | {min(ratios):.1f}, {max(ratios):.1f} | {beside:.1f} |")


def _word_table(folder: Path) -> Path:
    """A StaticEmbedding of MiniLM's word embeddings."""
    folder.mkdir()
    table = load_file(model_folder() / "model.safetensors")["embeddings.word_embeddings.weight"]
    save_file({"embedding.weight": table}, folder / "model.safetensors")
    shutil.copy(model_folder() / "tokenizer.json", folder)
    (folder / "modules.json").write_text(json.dumps(MODULES))
    return folder


def _command(folder: Path, port: int) -> list[str]:
    driver = {"type": "local_st", "config": {"path": str(model_folder())}}
    (folder / ".config" / "pool.yml").write_text(
        json.dumps({"version": 1, "models": [{"model": MODEL, "driver": driver}]})
    )
    return [*EMBEDPOOL, "pool", "start"]


def _registered_s(up: Running, folder: Path) -> float:
    """How long it takes to register the static model, the request and the file included."""
    body = {"model": STATIC, "driver_type": "local_st", "driver_config": {"path": str(folder)}}
    request = urllib.request.Request(
        f"http://127.0.0.1:{up.port}/models/register", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    began_s = time.perf_counter()
    with urllib.request.urlopen(request, timeout=60) as answer:
        answer.read()
    return time.perf_counter() - began_s


def _over_http(up: Running, model: str, clients: int, per_request: int, seconds: float) -> float:
    """texts/s with vectors in base64."""
    given = short(1536)
    bodies = [
        json.dumps({"model": model, "input": given[at : at + per_request], "encoding_format": "base64"}).encode()
        for at in range(0, len(given), per_request)
    ]
    found = closed_loop(up.port, "/v1/embeddings", bodies, clients, seconds)
    return float(found["answers"] * per_request / found["seconds"])


def _driver(model: str, folder: Path) -> Callable[[Sequence[str]], object]:
    """A function that has a driver compute texts, tokenising included."""
    driver = LocalStDriver(model, LocalStConfig(path=str(folder)), 1, Folders(GRAPHS, GRAPHS))
    driver.open(lambda reason: None)

    def compute(texts: Sequence[str]) -> object:
        return driver.run(Batch("embed", [Item((text,), 0) for text in texts]))

    return compute


def _in_process(compute: Callable[[Sequence[str]], object], seconds: float) -> float:
    """texts/s in batches of 64."""
    given, done, began_s = short(TEXTS), 0, time.perf_counter()
    while (spent_s := time.perf_counter() - began_s) < seconds:
        at = done % (len(given) - BATCH_TEXTS)
        compute(given[at : at + BATCH_TEXTS])
        done += BATCH_TEXTS
    return done / spent_s


def _library(folder: Path, seconds: float) -> float:
    """texts/s of the model's own library, in one process, by its own batches."""
    model = _of_model2vec(folder) if is_model2vec(folder) else _of_sentence_transformers(folder)
    given, done, began_s = short(TEXTS), 0, time.perf_counter()
    while (spent_s := time.perf_counter() - began_s) < seconds:
        model.encode(given, show_progress_bar=False)
        done += len(given)
    return done / spent_s


def _of_model2vec(folder: Path) -> Any:
    from model2vec import StaticModel

    return StaticModel.from_pretrained(str(folder))


def _of_sentence_transformers(folder: Path) -> Any:
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(folder), device="cpu", local_files_only=True)


if __name__ == "__main__":
    main()
