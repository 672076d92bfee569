"""Rerankers: servers beside CrossEncoder.predict in one process, in interleaved rounds; pairs/s as ratios.

The model is a MiniLM trained here (reranker.py), in fp32 everywhere.

Usage:
  benchmarks.rerank [--rounds N] [--seconds S] [--servers NAMES] [--write]

Options:
  --rounds N       Each round measures the reference and every server once [default: 3].
  --seconds S      Sizes the work of a measurement [default: 8].
  --servers NAMES  Comma-separated, of embedpool, infinity-torch, naive [default: all].
  --write          Write the tables of README.md.

Workloads:
  rank100-1, rank100-4, rank100-16   a query and 100 passages of 20 to 200 tokens a request, by so many clients
  rank10-16                          a query and 10 short documents a request, by 16 clients
  beside embed   one client that reranks 1,000 passages without end, beside 8 that embed one short text on another model
  beside rerank  the same, beside 8 that rerank 10 short documents on the same model
"""

from __future__ import annotations

import json
import random
import statistics
import subprocess
import sys
import time
import urllib.request
from collections import defaultdict
from collections.abc import Iterable
from functools import cache, partial
from pathlib import Path
from typing import Any

from docopt import docopt

from benchmarks import texts
from benchmarks.load import Group, drive
from benchmarks.report import between_markers, table
from benchmarks.reranker import query_of, reranker_folder
from benchmarks.servers import CACHE, EMBEDPOOL, MODEL, OURS, Absent, Running, Server, infinity, naive, running

EMBEDDER = "minilm"
PREDICT = "predict"
PASSAGES, SHORT_TEXTS = 3000, 1500
PAIRS_PER_S = 60  # fixed work: as many pairs as a server of this rate scores in --seconds
BATCH_SIZES = (8, 16, 32, 64, 128)
TRIED_PAIRS = 128  # to find the best batch size
QUERIES = 8
INTERACTIVE_CLIENTS, BULK_DOCUMENTS, LEAST_BULK_ANSWERS = 8, 1000, 2
THOUGHT_S = {"beside embed": 0.1, "beside rerank": 1.0}  # so that they ask for about a fifth of the machine
ASKED = {
    "rank100-4": {PREDICT: 1.2, "infinity-torch": 2.0},
    "rank100-16": {PREDICT: 1.2, "infinity-torch": 2.0},
    "rank10-16": {PREDICT: 1.2, "infinity-torch": 2.0},
}
MOST_PADDING, MOST_P99_RATIO, LEAST_BULK_KEPT = 1.1, 3.0, 0.7
Pairs = tuple[str, list[str]]  # a query and its documents


class Reranker(Server):
    """A server that is asked to rerank: what it is sent, and the scores of its answer."""

    def body(self, given: list[str]) -> bytes:
        """The first text is the query."""
        return json.dumps({"model": MODEL, "query": given[0], "documents": given[1:] or given}).encode()

    def vectors(self, answer: bytes) -> list[list[float]]:
        """Of the documents in their order."""
        results = sorted(json.loads(answer)["results"], key=lambda entry: entry["index"])
        return [[entry["relevance_score"]] for entry in results]


folder = partial(reranker_folder, CACHE)


def _embedpool(at: Path, port: int) -> list[str]:
    """A reranker, and an embedder that is asked beside it."""
    paths = {MODEL: folder(), EMBEDDER: texts.model_folder()}
    models = [
        {"model": name, "driver": {"type": "local_st", "config": {"path": str(path)}}} for name, path in paths.items()
    ]
    (at / ".config" / "pool.yml").write_text(json.dumps({"version": 1, "models": models}))
    return [*EMBEDPOOL, "pool", "start"]


_COMMON: dict[str, Any] = {"path": "/rerank", "model_folder": folder}
_ALL = (
    Reranker("embedpool", "exact fp32, backend auto", _embedpool, **OURS, **_COMMON),
    Reranker("infinity-torch", "infinity 0.0.78", infinity("torch", folder), "infinity-torch", **_COMMON),
    Reranker("naive", "Flask on gunicorn gthread, predict per request", naive("naive_rerank"), **_COMMON),
)
SERVERS = {server.name: server for server in _ALL}
WORKLOADS = {"rank100-1": (100, 1), "rank100-4": (100, 4), "rank100-16": (100, 16), "rank10-16": (10, 16)}


@cache
def requests_of(documents: int, count: int) -> list[Pairs]:
    """`count` different requests of so many documents: passages for 100 and more, else short texts."""
    given = texts.passages(PASSAGES) if documents >= 100 else texts.short(SHORT_TEXTS)
    chance = random.Random(documents)
    queries = [query_of(text, chance) for text in chance.sample(texts.passages(PASSAGES), QUERIES)]
    return [(queries[i % QUERIES], chance.sample(given, documents)) for i in range(count)]


def work(workload: str, seconds: float) -> tuple[list[Pairs], int]:
    """The requests of a workload, as many for each client, and the clients."""
    documents, clients = WORKLOADS[workload]
    each = max(1, round(seconds * PAIRS_PER_S / (documents * clients)))
    return requests_of(documents, each * clients), clients


def main() -> None:
    """Measure, print, and write."""
    arguments = docopt(__doc__)
    rounds, seconds = int(arguments["--rounds"]), float(arguments["--seconds"])
    names = list(SERVERS) if arguments["--servers"] == "all" else arguments["--servers"].split(",")
    if unknown := set(names) - set(SERVERS):
        sys.exit(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(SERVERS)}")
    measured: dict[str, list[dict[str, Any]]] = defaultdict(list)
    absent: dict[str, str] = {}
    for number in range(rounds):
        print(f"round {number + 1} of {rounds}", flush=True)
        measured[PREDICT].append(json.loads(_in_process(seconds)))
        print(f"  {PREDICT}: {measured[PREDICT][-1]}", flush=True)
        at = number % len(names)
        for name in [name for name in names[at:] + names[:at] if name not in absent]:
            try:
                measured[name].append(_server(SERVERS[name], seconds))
            except (Absent, OSError) as error:
                print(f"{name}: ABSENT: {error}", flush=True)
                absent[name] = str(error)
    found = report(measured, absent)
    print(found)
    if arguments["--write"]:
        between_markers("rerank", f"Medians of {rounds} rounds, `--seconds {seconds:g}`.\n\n{found}")


def _server(server: Server, seconds: float) -> dict[str, Any]:
    """All that is measured of a server, from its start to its stop."""
    print(server.name, flush=True)
    found: dict[str, Any] = {}
    with running(server) as up:
        for query, documents in requests_of(100, 2):
            up.ask([query, *documents])
        for workload in WORKLOADS:
            given, clients = work(workload, seconds)
            before = _counters(up)
            group = Group("all", clients, [_body(up, pairs) for pairs in given], requests=len(given))
            result = drive(up.port, server.path, [group])["all"]
            pairs = result["answers"] * WORKLOADS[workload][0]
            found[workload] = {"pairs_s": pairs / result["seconds"], "p50_ms": result["p50_ms"]}
            if before:
                after = _counters(up)
                padded, real = (after[name] - before[name] for name in ("padded_tokens", "batch_tokens"))
                found[workload]["padding"] = padded / real
            print(f"  {workload}: {found[workload]}", flush=True)
        if server.checkout:
            for name in THOUGHT_S:
                found[name] = _beside(up, name, seconds)
                print(f"  {name}: {found[name]}", flush=True)
    return found


def _beside(up: Running, name: str, seconds: float) -> dict[str, float]:
    """A client that reranks 1,000 passages without end, eight that think between requests; each alone, then both."""

    def bulk() -> Group:
        bodies = [_body(up, pairs) for pairs in requests_of(BULK_DOCUMENTS, 3)]
        return Group("bulk", 1, bodies, least_answers=LEAST_BULK_ANSWERS)

    def interactive() -> Group:
        if name == "beside embed":
            bodies = [json.dumps({"model": EMBEDDER, "texts": [text]}).encode() for text in texts.short(SHORT_TEXTS)]
            return Group("interactive", INTERACTIVE_CLIENTS, bodies, think_s=THOUGHT_S[name], path="/embed")
        bodies = [_body(up, pairs) for pairs in requests_of(10, 200)]
        return Group("interactive", INTERACTIVE_CLIENTS, bodies, think_s=THOUGHT_S[name])

    go = partial(drive, up.port, up.server.path, seconds=seconds)
    alone, bulk_alone, both = go([interactive()])["interactive"], go([bulk()])["bulk"], go([interactive(), bulk()])
    kept = (both["bulk"]["answers"] / both["bulk"]["seconds"]) / (bulk_alone["answers"] / bulk_alone["seconds"])
    beside = both["interactive"]
    return {
        "alone_p99_ms": alone["p99_ms"], "beside_p99_ms": beside["p99_ms"],
        "p99_ratio": beside["p99_ms"] / alone["p99_ms"], "p50_ratio": beside["p50_ms"] / alone["p50_ms"],
        "bulk_kept": kept,
    }  # fmt: skip


def _body(up: Running, pairs: Pairs) -> bytes:
    return up.server.body([pairs[0], *pairs[1]])


def _counters(up: Running) -> dict[str, Any]:
    """Those of an embedpool's reranker; none of another server."""
    if not up.server.checkout:
        return {}
    with urllib.request.urlopen(f"http://127.0.0.1:{up.port}/status", timeout=60) as answer:
        models = json.loads(answer.read())["models"]
    counters: dict[str, Any] = next(entry["counters"] for entry in models if entry["model"] == MODEL)
    return counters


# --- in one process


def _in_process(seconds: float) -> str:
    command = [sys.executable, "-c", f"from benchmarks import rerank; rerank.predict({seconds})"]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True).stdout


def predict(seconds: float) -> None:
    """Print pairs/s of CrossEncoder.predict for the documents of each workload, at its best batch size, as JSON.

    It is given all pairs of a workload at once, and sorts them by length.
    """
    from sentence_transformers import CrossEncoder

    model = CrossEncoder(str(folder()), device="cpu", local_files_only=True)

    def rate(pairs: list[tuple[str, str]], batch_size: int) -> float:
        began_s = time.perf_counter()
        model.predict(pairs, batch_size=batch_size, show_progress_bar=False)
        return len(pairs) / (time.perf_counter() - began_s)

    found: dict[int, dict[str, float]] = {}
    for workload in ("rank100-4", "rank10-16"):
        pairs = [(query, document) for query, documents in work(workload, seconds)[0] for document in documents]
        rate(pairs[:TRIED_PAIRS], 32)
        tried = {size: rate(pairs[:TRIED_PAIRS], size) for size in BATCH_SIZES}
        best = sorted(tried, key=tried.__getitem__)[-2:]
        found[WORKLOADS[workload][0]] = {"pairs_s": max(rate(pairs, size) for size in best)}
    print(json.dumps({workload: found[documents] for workload, (documents, _) in WORKLOADS.items()}))


# --- what is told


def report(measured: dict[str, list[dict[str, Any]]], absent: dict[str, str]) -> str:
    """Tables of medians; a ratio is taken within a round."""
    lines = [f"- absent: {name}: {reason}" for name, reason in absent.items()]
    others = [name for name in measured if name != "embedpool"]
    rows = []
    for workload in WORKLOADS:
        rates = [f"{_median(entry[workload]['pairs_s'] for entry in measured[name]):.0f}" for name in measured]
        ratios = [_ratios(measured, workload, other) for other in others] if "embedpool" in measured else []
        rows.append([workload, *rates, *ratios])
    titles = ["pairs/s", *measured, *(f"embedpool ÷ {other}" for other in others if "embedpool" in measured)]
    parts = ["\n".join(lines), table(titles, rows)]
    if ours := measured.get("embedpool"):
        rows = [
            [name, *(_over(entry[name][key] for entry in ours) for key in ("p99_ratio", "p50_ratio", "bulk_kept"))]
            for name in THOUGHT_S
        ]
        parts.append(table(["1,000 documents", "p99 ÷ alone", "p50 ÷ alone", "bulk kept"], rows))
        parts.append(table(["what", "asked", "measured", "met"], _asked(measured, others)))
    return "\n\n".join(filter(None, parts))


def _asked(measured: dict[str, list[dict[str, Any]]], others: list[str]) -> Iterable[list[str]]:
    ours = measured["embedpool"]
    for workload, bounds in ASKED.items():
        for other in [other for other in bounds if other in others]:
            ratio = _median(_each(measured, workload, other))
            yield _verdict(f"{workload}, pairs/s ÷ {other}", ratio, bounds[other], at_least=True)
    for workload in WORKLOADS:
        padding = _median(entry[workload]["padding"] for entry in ours)
        yield _verdict(f"{workload}, padded ÷ real tokens", padding, MOST_PADDING, at_least=False)
    for name in THOUGHT_S:
        p99, kept = (_median(entry[name][key] for entry in ours) for key in ("p99_ratio", "bulk_kept"))
        yield _verdict(f"{name}, p99 ÷ alone", p99, MOST_P99_RATIO, at_least=False)
        yield _verdict(f"{name}, bulk kept", kept, LEAST_BULK_KEPT, at_least=True)


def _verdict(what: str, value: float, bound: float, *, at_least: bool) -> list[str]:
    met = value >= bound if at_least else value <= bound
    return [what, f"{'>=' if at_least else '<='} {bound}", f"{value:.2f}", "yes" if met else "**no**"]


def _each(measured: dict[str, list[dict[str, Any]]], workload: str, other: str) -> list[float]:
    """embedpool's rate by the other's, of each round."""
    rounds = zip(measured["embedpool"], measured[other], strict=False)
    return [ours[workload]["pairs_s"] / theirs[workload]["pairs_s"] for ours, theirs in rounds]


def _ratios(measured: dict[str, list[dict[str, Any]]], workload: str, other: str) -> str:
    return _over(_each(measured, workload, other))


def _over(values: Iterable[float]) -> str:
    found = list(values)
    return f"{statistics.median(found):.2f} ({min(found):.2f}, {max(found):.2f})"


def _median(values: Iterable[float]) -> float:
    return statistics.median(list(values))


if __name__ == "__main__":
    main()
