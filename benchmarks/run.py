"""Measure embedpool and its references on this machine, in interleaved rounds.

Usage:
  benchmarks.run [--rounds N] [--servers NAMES] [--workloads NAMES] [--seconds S] [--cosine N]
                 [--no-references] [--write] [--baseline CHECKOUT]

Options:
  --rounds N         Each round measures every reference, server and workload once [default: 3].
  --servers NAMES    Comma-separated, of those in servers.py [default: all].
  --workloads NAMES  Comma-separated, of those below [default: all].
  --seconds S        Length of a timed measurement; fixed work is sized by it too [default: 8].
  --cosine N         Texts compared with torch fp32 encode in the first round, up to 2,000; 0: none [default: 200].
  --no-references    Leave out the references in process, which take minutes.
  --write            Write results.json, chart.svg and the tables of README.md.
  --baseline CHECKOUT
                     Measure each embedpool server also with the code of this other checkout of embedpool, in the same
                     rounds, and print the ratios. The references in process are then left out, which saves their time.

Workloads:
  short-1, short-8, short-32, short-128                         one short text a request, by so many clients
  mixed16-1, mixed16-4, mixed16-16, mixed256-1, mixed256-4      16 or 256 mixed texts a request, fixed work
  mix      an endless bulk client of 256 mixed texts a request beside 8 clients of one short text and 50 ms of thought
  hot-64   one identical short text from 64 clients, and different ones
  burst4-256, burst16-16    so many requests of 256 or 16 texts of like length at the same moment, to an idle server
  open     Poisson arrivals at 60% of what the first server can: of 16 requests 9 have 16 texts, 6 have one, 1 has 256
"""

from __future__ import annotations

import contextlib
import itertools
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from docopt import docopt

from benchmarks import report, texts
from benchmarks.load import Arrival, Group, LoadError, arrive, closed_loop, drive
from benchmarks.servers import GRAPHS, SERVERS, Absent, Running, Server, of_baseline, plain, running

SHORT_TEXTS, MIXED_TEXTS, ALIKE_TEXTS = 1500, 2560, 1024
FIXED_TEXTS_PER_S = 200  # fixed work: as many texts as a server of this rate answers in --seconds
OPEN_SIZES = {16: 9, 1: 6, 256: 1}  # texts of a request: how often, of 16
OPEN_LOAD, OPEN_TIMES = 0.6, 8  # of what a server can, for so many times --seconds
MEASURED_CAPACITY: list[float] = []
REST_S = 60.0  # after which a server should have given back what it took
REST_S = 60.0  # after which a server should have given back what it took
INTERACTIVE_CLIENTS, THOUGHT_S, LEAST_BULK_ANSWERS = 8, 0.05, 4
Result = dict[str, Any]


def short(up: Running, seconds: float, clients: int) -> Result:
    """One short text a request."""
    return _rated(closed_loop(up.port, up.server.path, _bodies(up, texts.short(SHORT_TEXTS), 1), clients, seconds), 1)


def mixed(up: Running, seconds: float, per_request: int, clients: int) -> Result:
    """Fixed work of mixed texts: the same number of requests for each client, as near as can be."""
    each = max(1, round(seconds * FIXED_TEXTS_PER_S / (per_request * clients)))
    group = Group("all", clients, _bodies(up, texts.mixed(MIXED_TEXTS), per_request), requests=each * clients)
    return _rated(drive(up.port, up.server.path, [group])["all"], per_request)


def mix(up: Running, seconds: float) -> Result:
    """Interactive clients and a bulk client, each alone and both at once. Rates are up to the last bulk answer."""

    def interactive() -> Group:
        bodies = _bodies(up, texts.short(SHORT_TEXTS), 1)
        return Group("interactive", INTERACTIVE_CLIENTS, bodies, think_s=THOUGHT_S)

    def bulk() -> Group:
        return Group("bulk", 1, _bodies(up, texts.mixed(MIXED_TEXTS), 256), least_answers=LEAST_BULK_ANSWERS)

    go = partial(drive, up.port, up.server.path, seconds=seconds)
    alone, bulk_alone, both = go([interactive()])["interactive"], go([bulk()])["bulk"], go([interactive(), bulk()])
    result: Result = {"texts": 0}
    for name, group in {"alone": alone, "beside": both["interactive"]}.items():
        rated = _rated(group, 1)
        result |= {f"{name}_{key}": value for key, value in rated.items() if key.endswith("_ms")}
        result["texts"] += rated["texts"]
    for name, group in {"bulk_alone": bulk_alone, "bulk_beside": both["bulk"]}.items():
        rated = _rated(group, 256)
        result[f"{name}_texts_s"] = rated["texts_s"]
        result["texts"] += rated["texts"]
    return result


def hot(up: Running, seconds: float, clients: int) -> Result:
    """One identical text from all clients, against different texts."""
    different = short(up, seconds, clients)
    same = _rated(
        closed_loop(up.port, up.server.path, _bodies(up, texts.short(SHORT_TEXTS)[:1], 1), clients, seconds), 1
    )
    return {**same, "different_texts_s": different["texts_s"], "texts": same["texts"] + different["texts"]}


def burst(up: Running, seconds: float, per_request: int, requests: int) -> Result:
    """Equal requests at once, again and again; `seconds` of them, about."""
    count = max(1, round(seconds * FIXED_TEXTS_PER_S / (per_request * requests)))
    bodies = itertools.cycle(_bodies(up, texts.alike(ALIKE_TEXTS), per_request))
    rounds = [[Arrival(0.0, "all", next(bodies)) for _ in range(requests)] for _ in range(count)]
    found = arrive(up.port, up.server.path, rounds)["all"]
    rate = per_request * requests / found["seconds"]
    return {"texts": found["answers"] * per_request, "texts_s": rate, "mean_ms": found["mean_ms"],
            "last_ms": 1000 * found["seconds"]}  # fmt: skip


def open_arrivals(up: Running, seconds: float) -> Result:
    """The same requests at the same times for every server of a run."""
    rate = _capacity(up)
    per_request = sum(size * times for size, times in OPEN_SIZES.items()) / sum(OPEN_SIZES.values())
    chance, at_s, arrivals = random.Random(7), 0.0, []
    bodies = {size: itertools.cycle(_bodies(up, texts.mixed(MIXED_TEXTS), size)) for size in OPEN_SIZES}
    while at_s < OPEN_TIMES * seconds:
        (size,) = chance.choices(list(OPEN_SIZES), list(OPEN_SIZES.values()))
        arrivals.append(Arrival(at_s, str(size), next(bodies[size])))
        at_s += chance.expovariate(OPEN_LOAD * rate / per_request)
    found = arrive(up.port, up.server.path, [arrivals])
    result: Result = {"texts": sum(found[size]["answers"] * int(size) for size in found)}
    for size, of_size in found.items():
        result |= {f"of_{size}_{key}": of_size[key] for key in ("mean_ms", "p99_ms")}
    return result


def _capacity(up: Running) -> float:
    """Texts a second of the server that is asked first: what all are offered a part of."""
    if not MEASURED_CAPACITY:
        MEASURED_CAPACITY.append(mixed(up, 8.0, 16, 16)["texts_s"])
    return MEASURED_CAPACITY[0]


WORKLOADS: dict[str, Callable[[Running, float], Result]] = {
    **{f"short-{c}": partial(short, clients=c) for c in (1, 8, 32, 128)},
    **{f"mixed16-{c}": partial(mixed, per_request=16, clients=c) for c in (1, 4, 16)},
    **{f"mixed256-{c}": partial(mixed, per_request=256, clients=c) for c in (1, 4)},
    "mix": mix,
    "hot-64": partial(hot, clients=64),
    "burst4-256": partial(burst, per_request=256, requests=4),
    "burst16-16": partial(burst, per_request=16, requests=16),
    "open": open_arrivals,
}


def main() -> None:
    arguments = docopt(__doc__)
    names = _chosen(arguments["--servers"], list(SERVERS))
    workloads = _chosen(arguments["--workloads"], list(WORKLOADS))
    seconds, rounds, cosine_texts = (
        float(arguments["--seconds"]),
        *(int(arguments[a]) for a in ("--rounds", "--cosine")),
    )
    groups = [[SERVERS[name]] for name in names]
    if arguments["--baseline"]:
        if arguments["--write"]:
            sys.exit("--write is refused with --baseline: results.json and README.md are about this checkout alone.")
        _add_baseline(groups, Path(arguments["--baseline"]).resolve())
    lengths = {kind: texts.histogram(some) for kind, some in _corpora().items()}
    print("\n\n".join(f"{kind} texts\n{lines}" for kind, lines in lengths.items()), flush=True)
    results: Result = {
        "about": {"rounds": rounds, "seconds": seconds, "cores": len(psutil.Process().cpu_affinity())},
        "lengths": lengths,
        "references": {},
        "servers": {},
        "absent": {},
    }
    expected = _expected(cosine_texts) if cosine_texts else None
    for number in range(rounds):
        print(f"round {number + 1} of {rounds}", flush=True)
        if not (arguments["--baseline"] or arguments["--no-references"]):
            print("in process", flush=True)
            _append(results["references"], _references())
        at = number % len(groups)
        for group in groups[at:] + groups[:at]:  # another server first in each round
            for server in reversed(group) if number % 2 else group:
                if server.name not in results["absent"]:
                    try:
                        measured = _server(server, workloads, seconds, expected, first_round=number == 0)
                    except (Absent, OSError) as error:  # the other rounds go on without it
                        print(f"{server.name}: ABSENT: {error}", flush=True)
                        results["absent"][server.name] = plain(str(error))
                    else:
                        _append(results["servers"], {server.name: measured})
    medians = _medians(results)
    print(report.text(medians))
    if arguments["--baseline"]:
        print(f"\n{report.compared(results['servers'])}")
    if arguments["--write"]:
        report.write(medians, results)


def _add_baseline(groups: list[list[Server]], checkout: Path) -> None:
    """Put beside each embedpool server the same one of `checkout`, and start every one of them once.

    A first start may export the graph, which takes memory that the measured starts are not to be charged with.
    """
    if not (checkout / "embedpool" / "__main__.py").exists():
        sys.exit(f"--baseline {checkout} is not a checkout of embedpool: it has no embedpool/__main__.py.")
    for group in groups:
        if group[0].checkout:
            group.append(of_baseline(group[0], checkout))
            for server in group:
                with contextlib.suppress(Absent, OSError), running(server):  # the rounds say why it is absent
                    pass


def _server(server: Server, workloads: list[str], seconds: float, expected: Any, *, first_round: bool) -> Result:
    """All workloads of one server, from its start to its stop. A workload that fails is reported by its reason.

    Only the first round measures cosines, a start that is the first, and the memory after a rest, which take time.
    """
    print(server.name, flush=True)
    result: Result = {"workloads": {}}
    if first_round and server.first_start:
        with running(server, first_start=True) as up:
            result["first_startup_s"] = up.startup_s
    with running(server) as up:
        result["startup_s"] = up.startup_s
        warm = texts.mixed(MIXED_TEXTS)[-64:]
        with ThreadPoolExecutor(4) as threads:
            list(threads.map(up.ask, [warm[:1], warm[:16], warm[16:32], *[[t] for t in warm]]))
        result["pss_started_mb"] = up.pss_mb()
        if first_round and expected is not None:
            result["cosine"] = _cosine(up, expected)
            print(f"  cosine to torch fp32: least {result['cosine']:.7f} of {len(expected)}", flush=True)
        if "open" in workloads:
            _capacity(up)
        for workload in workloads:
            before_s = up.cpu_s()
            try:
                measured = WORKLOADS[workload](up, seconds)
            except (LoadError, OSError) as error:
                print(f"  {workload}: FAILED: {error}", flush=True)
                result["workloads"][workload] = {"failed": 1}
                continue
            measured["cpu_s_per_1000"] = 1000 * (up.cpu_s() - before_s) / measured["texts"]
            result["workloads"][workload] = measured
            print(f"  {workload}: " + ", ".join(f"{k} {v:.4g}" for k, v in measured.items()), flush=True)
        result |= {"peak_mb": up.peak_mb(), "pss_mb": up.pss_mb()}
        if first_round:
            time.sleep(REST_S)
            result["pss_rested_mb"] = up.pss_mb()
    return result


def _rated(result: Result, per_request: int) -> Result:
    """A result of load.py with texts and texts/s, up to the last answer."""
    count = result["answers"] * per_request
    latencies = {key: value for key, value in result.items() if key.endswith("_ms")}
    return {"texts": count, "texts_s": count / result["seconds"], **latencies}


def _bodies(up: Running, given: Sequence[str], per_request: int) -> list[bytes]:
    return [up.server.body(list(given[at : at + per_request])) for at in range(0, len(given), per_request)]


def _corpora() -> dict[str, list[str]]:
    return {"short": texts.short(SHORT_TEXTS), "mixed": texts.mixed(MIXED_TEXTS)}


def _references() -> Result:
    return json.loads(_in_process("--cache-dir", str(GRAPHS)))


def _expected(count: int) -> Any:
    """Vectors of the first `count` mixed texts by torch fp32 encode, of shape (count, dim)."""
    with tempfile.NamedTemporaryFile(suffix=".npy") as file:
        _in_process("--vectors", file.name, "--texts", str(count))
        return np.load(file.name)


def _in_process(*arguments: str) -> str:
    command = [sys.executable, "-m", "benchmarks.reference", *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True).stdout


def _cosine(up: Running, expected: Any) -> float:
    """The least cosine to `expected` of the same texts through HTTP, from 8 clients with 16 texts a request."""
    given = texts.mixed(MIXED_TEXTS)[: len(expected)]
    with ThreadPoolExecutor(8) as threads:
        parts = threads.map(up.ask, [given[at : at + 16] for at in range(0, len(given), 16)])
        vectors = np.concatenate([np.asarray(part) for part in parts])
    norms = np.linalg.norm(vectors, axis=1) * np.linalg.norm(expected, axis=1)
    return float(((vectors * expected).sum(axis=1) / norms).min())


def _append(gathered: Result, measured: Result) -> None:
    for name, value in measured.items():
        gathered.setdefault(name, []).append(value)


def _medians(results: Result) -> Result:
    """`results` with each list of rounds replaced by the medians of its numbers."""
    of_rounds = {kind: {n: _median(v) for n, v in results[kind].items()} for kind in ("references", "servers")}
    return {**results, **of_rounds}


def _median(values: list[Any]) -> Any:
    """Of numbers their median, of dicts the medians key by key, else the first value."""
    if isinstance(values[0], dict):
        return {key: _median([v[key] for v in values if key in v]) for v in values for key in v}
    return statistics.median(values) if isinstance(values[0], (int, float)) else values[0]


def _chosen(given: str, known: list[str]) -> list[str]:
    names = known if given == "all" else given.split(",")
    if unknown := set(names) - set(known):
        sys.exit(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(known)}")
    return names


if __name__ == "__main__":
    main()
