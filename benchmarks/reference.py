"""What the model does in one process, without a server: python -m benchmarks.reference prints the ceilings.

Usage:
  benchmarks.reference [--cache-dir DIR]
  benchmarks.reference --vectors FILE [--texts N]

Options:
  --cache-dir DIR  Where exported graphs are kept, as embedpool's paths.cache_dir.
  --vectors FILE   Only write the torch fp32 vectors of mixed texts there, as .npy.
  --texts N        How many [default: 200].

Prints JSON: for `torch` (encode, fp32), `openvino-float32` and `openvino-bfloat16` the best texts/s of short and mixed
texts with the settings that gave it, and p50_ms of one short text on all cores.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from docopt import docopt

from benchmarks import texts

TEXTS = 640
TRIED_TEXTS = 256  # to find the two best settings, which are then measured with all
MAX_TOKENS = 256
SINGLE_TEXTS = 150
BATCH_SIZES = (8, 16, 32, 64, 128)

Encode = Callable[[list[str]], Any]


def main() -> None:
    arguments = docopt(__doc__)
    if arguments["--vectors"]:
        vectors = _sentence_transformer().encode(texts.mixed(int(arguments["--texts"])), show_progress_bar=False)
        np.save(arguments["--vectors"], vectors)
        return
    measured: dict[str, Any] = {"torch": _torch()}
    for dtype in ("float32", "bfloat16"):
        measured[f"openvino-{dtype}"] = _openvino(dtype, Path(arguments["--cache-dir"] or ".config/cache"))
    print(json.dumps(measured))


def _torch() -> dict[str, Any]:
    """SentenceTransformer.encode, which sorts by length itself."""
    model = _sentence_transformer()

    def encode(batch_size: int) -> Encode:
        return lambda given: model.encode(given, batch_size=batch_size, show_progress_bar=False)

    return _best({f"batch {size}": encode(size) for size in BATCH_SIZES}, encode(1))


def _openvino(dtype: str, cache_dir: Path) -> dict[str, Any]:
    """The graph embedpool compiles: one stream on all cores, or a stream for each core with a thread of its own."""
    from embedpool.config.spec import LocalStConfig
    from embedpool.drivers import openvino_cache, openvino_graph
    from embedpool.drivers.layout import read_layout
    from embedpool.drivers.packing import pack
    from embedpool.drivers.tokenizer import tokenizer_of
    from embedpool.places.cores import available_cores

    cores, config = available_cores(), LocalStConfig()
    layout = read_layout(texts.model_folder(), config)
    tokenizer = tokenizer_of(layout)
    graphs = openvino_cache.exported(layout.folder, config, cache_dir, lambda: None)

    step = openvino_graph.LONG_ROW_STEP[dtype]

    def encode(streams: int, batch_size: int) -> Encode:
        run = openvino_graph.Compiled(graphs / "model.xml", dtype, threads=cores, streams=streams)
        threads = ThreadPoolExecutor(streams)

        def call(given: list[str]) -> Any:
            ids = sorted((i[: MAX_TOKENS - 1] + i[-1:] for i in tokenizer.encode(given)), key=len, reverse=True)
            batches = [ids[at : at + batch_size] for at in range(0, len(ids), batch_size)]
            return np.concatenate(list(threads.map(lambda batch: run(pack(batch, tokenizer.pad_id, step)), batches)))

        return call

    kinds = sorted({1, cores})
    calls = {f"streams {s}, batch {size}": encode(s, size) for s in kinds for size in BATCH_SIZES}
    return _best(calls, encode(1, 1))


def _best(calls: dict[str, Encode], single: Encode) -> dict[str, Any]:
    """texts/s of the fastest of `calls` for each kind of text, under what it is called, and p50_ms of one text."""
    result: dict[str, Any] = {}
    for kind, given in (("short", texts.short(TEXTS)), ("mixed", texts.mixed(TEXTS))):
        tried = {name: _rate(call, given[:TRIED_TEXTS]) for name, call in calls.items()}
        first_two = sorted(tried, key=tried.__getitem__)[-2:]
        rates = {name: _rate(calls[name], given) for name in first_two}
        best = max(rates, key=rates.__getitem__)
        result |= {kind: rates[best], f"{kind}_at": best}
    spent_s = []
    for text in texts.short(SINGLE_TEXTS):
        began_s = time.perf_counter()
        single([text])
        spent_s.append(time.perf_counter() - began_s)
    return {**result, "p50_ms": 1000 * statistics.median(spent_s)}


def _rate(call: Encode, given: list[str]) -> float:
    """texts/s, after a warm-up."""
    call(given[::10])
    began_s = time.perf_counter()
    call(given)
    return len(given) / (time.perf_counter() - began_s)


def _sentence_transformer() -> Any:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(texts.model_folder()), device="cpu", local_files_only=True)
    model.max_seq_length = MAX_TOKENS
    return model.eval()


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # as embedpool does
    main()
