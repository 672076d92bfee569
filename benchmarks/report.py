"""The medians of a run as markdown tables, a chart and results.json."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from html import escape
from pathlib import Path
from typing import Any

from benchmarks.servers import BASELINE

HERE = Path(__file__).parent
OURS = {"embedpool-default": "openvino-float32", "embedpool-fast": "openvino-bfloat16"}  # and the ceiling of each
IN_TYPE = {"embedpool-default": ("naive", "infinity-", "mosec", "litserve", "llama-f32", "vllm-fp32")}
IN_TYPE["embedpool-fast"] = ("vllm-bf16",)  # names, or how they begin, of peers that compute in the same type
CHARTED = ("short-1", "short-8", "short-32", "short-128", "mixed16-16", "mixed256-4")
COLOURS = ("#1b6ca8", "#0aa06e", "#7fb3d5", "#9e9e9e", "#d98324", "#b5533c", "#8e6bbf", "#c2a83e")
COLOURS += ("#4f6d3a", "#a3b18a", "#6d597a", "#b56576")
COMPARED = {"": ("texts_s", "p50_ms", "p99_ms")}
# Workloads of another kind: what is compared as the rate, as p50 and as p99. There may be several rows.
COMPARED_OF = {
    "mix": {"": ("bulk_beside_texts_s", "beside_p50_ms", "beside_p99_ms")},
    "burst4-256": {" (mean, last)": ("texts_s", "mean_ms", "last_ms")},
    "burst16-16": {" (mean, last)": ("texts_s", "mean_ms", "last_ms")},
    "open": {f" of {n} (mean, p99)": ("", f"of_{n}_mean_ms", f"of_{n}_p99_ms") for n in (1, 16, 256)},
}
ASKED = """
short-1    p50-b                            <= 1.5     1.5    -
short-1    p50_ms/infinity-torch            <= 0.35    0.35   -
short-8    texts_s/a                        >= 0.8     1.2    -
short-8    texts_s/infinity-torch           >= 3       4.5    -
short-32   texts_s/a                        >= 1.2     1.9    -
short-32   texts_s/b                        >= 0.75    0.66   -
short-32   texts_s/infinity-torch           >= 2.5     4      -
short-32   texts_s/infinity-optimum         >= 1.4     -      -
short-128  texts_s/a                        >= 1.4     2.15   -
short-128  texts_s/b                        >= 0.78    0.72   -
short-128  texts_s/infinity-torch           >= 2.4     3.7    -
short-128  texts_s/infinity-optimum         >= 1.4     -      -
short-128  p99_ms/p50_ms                    <= 3       3      3
mixed16-16 texts_s/a                        >= 1.8     3.1    -
mixed16-16 texts_s/b                        >= 0.97    0.97   -
mixed16-16 texts_s/infinity-torch           >= 3.7     6      -
mixed16-16 texts_s/infinity-optimum         >= 1.8     -      -
mixed256-4 texts_s/a                        >= 1.85    3.2    -
mixed256-4 texts_s/b                        >= 0.97    0.97   -
mixed256-4 texts_s/infinity-torch           >= 3.7     6      -
mixed256-4 texts_s/infinity-optimum         >= 1.4     -      -
mix        beside_p99_ms/alone_p99_ms       <= 3       3      -
mix        bulk_beside_texts_s/bulk_alone_texts_s >= 0.75 0.75 -
mix        beside_p99_ms/infinity-torch     <= 0.1     0.1    -
hot-64     texts_s/different_texts_s        >= 2       1.5    -
short-1    texts_s/peers                    >= 1.15    1.15   -
short-8    texts_s/peers                    >= 1.15    1.15   -
short-32   texts_s/peers                    >= 1.15    1.15   -
short-128  texts_s/peers                    >= 1.15    1.15   -
mixed16-4  texts_s/peers                    >= 1       1.08   -
mixed16-16 texts_s/peers                    >= 1       1.08   -
mixed256-4 texts_s/peers                    >= 1       1.08   -
all        pss_rested_mb/pss_started_mb     <= 1.25    1.25   -
all        cosine                           >= 0.99999 0.9999 -
"""  # workload, measure, comparison, bounds for default, fast, waitress; p50-b may be 3.5 with a core a stream
Results = dict[str, Any]


def text(results: Results) -> str:
    """All tables, one after the other, in markdown."""
    parts = [
        ("", _about(results)),
        ("In process", _references(results)),
        ("texts/s, p50 / p95 / p99 in ms", _rates(results)),
        ("texts/s as ratios", _ratios(results)),
        ("Interactive beside bulk: p50 / p95 / p99 in ms, bulk in texts/s", _mix(results)),
        ("One identical text from 64 clients: texts/s", _hot(results)),
        ("What it costs", _costs(results)),
        ("What is asked for", _asked(results)),
    ]
    return "\n\n".join(f"### {title}\n\n{table}" if title else table for title, table in parts if table)


def compared(servers: Results) -> str:
    """Every server as ratios to the one of the baseline, each taken within a round. `servers` holds all rounds."""
    rows, memory = [], []
    for name in [n for n in servers if f"{n}{BASELINE}" in servers]:
        # An absent server stays absent, so both lists begin with the first round.
        rounds = list(zip(servers[name], servers[f"{name}{BASELINE}"], strict=False))
        for workload in rounds[0][0]["workloads"]:
            both = [(ours["workloads"][workload], base["workloads"][workload]) for ours, base in rounds]
            both = [pair for pair in both if not any("failed" in result for result in pair)]
            for part, keys in COMPARED_OF.get(workload, COMPARED).items():
                measured = [*keys, "cpu_s_per_1000"]
                cells = [(_ratio_of_rounds(both, key) if key else "-") if both else "failed" for key in measured]
                rows.append([name, workload + part, f"{len(both)} of {len(rounds)}", *cells])
        pss, peak = (_ratio_of_rounds(rounds, key) for key in ("pss_mb", "peak_mb"))
        memory.append(f"{name}, memory ÷ baseline: PSS {pss}, peak {peak}")
    titles = ["server", "workload", "rounds", "rate", "p50", "p99", "CPU s per 1,000 texts"]
    head = "### This checkout ÷ baseline, median of rounds (least, most)"
    return "\n".join([head, "", table(titles, rows), "", *memory])


def write(medians: Results, results: Results) -> None:
    """results.json (every round and the medians), chart.svg, and the part of README.md between its markers."""
    document = {"medians": medians, "rounds": {kind: results[kind] for kind in ("references", "servers")}}
    (HERE / "results.json").write_text(json.dumps(_rounded(document), indent=1) + "\n")
    (HERE / "chart.svg").write_text(chart(medians))
    between_markers("results", f"![texts/s against in-process encode](chart.svg)\n\n{text(medians)}")


def between_markers(name: str, found: str) -> None:
    """Put the tables of a run in the place of those that stand in README.md."""
    readme, start, end = HERE / "README.md", f"<!-- {name} -->\n", f"<!-- /{name} -->"
    before, rest = readme.read_text().split(start)
    readme.write_text(f"{before}{start}{found}\n{end}{rest.split(end)[1]}")


def chart(results: Results) -> str:
    """texts/s of each server and workload as a multiple of in-process torch fp32 `encode`, as SVG bars."""
    names = [n for n in results["servers"] if n != "embedpool-waitress"]
    colour = dict(zip(names, COLOURS, strict=False))
    bars = [(w, [(n, _ratio_to_a(results, n, w)) for n in names]) for w in CHARTED]
    bars = [(w, [(n, r) for n, r in row if r is not None]) for w, row in bars]
    most = max((r for _, row in bars for _, r in row), default=1.0)
    left, top, width, line = 110, 40, 520, 14
    scale, y, drawn = width / most, top, []
    for i, name in enumerate(names):
        x = left + 165 * (i % 4)
        at = 8 + 16 * (i // 4)
        drawn.append(f'<rect x="{x}" y="{at}" width="10" height="10" fill="{colour[name]}"/>')
        drawn.append(f'<text x="{x + 14}" y="{at + 9}">{escape(name)}</text>')
    for workload, row in bars:
        if row:
            drawn.append(f'<text x="{left - 8}" y="{y + line * len(row) / 2 + 12}" text-anchor="end">{workload}</text>')
            for name, ratio in row:
                y += line
                bar = f'x="{left}" y="{y}" width="{ratio * scale:.1f}" height="{line - 2}" fill="{colour[name]}"'
                drawn.append(f"<rect {bar}/>")
                drawn.append(f'<text x="{left + ratio * scale + 4:.1f}" y="{y + 10}">{ratio:.2f}</text>')
            y += line
    x = left + scale
    drawn.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{y + line}" stroke="#000" stroke-dasharray="3 3"/>')
    drawn.append(f'<text x="{x:.1f}" y="{y + 2 * line}" text-anchor="middle">1.0 = torch fp32 encode in process</text>')
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left + width + 150} {y + 3 * line}"'
    return "\n".join([f'{head} font-family="sans-serif" font-size="11">', *drawn, "</svg>", ""])


def _ratio_of_rounds(pairs: list[tuple[Results, Results]], key: str) -> str:
    ratios = [ours[key] / base[key] for ours, base in pairs]
    return f"{statistics.median(ratios):.3f} ({min(ratios):.3f}, {max(ratios):.3f})"


def _about(results: Results) -> str:
    about = results["about"]
    line = f"Medians of {about['rounds']} rounds of {about['seconds']:g} s a measurement, {about['cores']} cores."
    absent = [f"- absent: {name}: {reason}" for name, reason in results["absent"].items()]
    lengths = [f"{kind} texts\n{lines}" for kind, lines in results["lengths"].items()]
    return "\n".join([line, *absent, "", "```text", "\n\n".join(lengths), "```"])


def _references(results: Results) -> str:
    rows = [
        [{"torch": "(a) "}.get(name, "(b) ") + name, f"{r['short']:.0f}", f"{r['mixed']:.0f}", f"{r['p50_ms']:.1f}"]
        for name, r in results["references"].items()
    ]
    return table(["", "short texts/s", "mixed texts/s", "one text, p50 ms"], rows)


def _rates(results: Results) -> str:
    rows = []
    for workload in _workloads(results):
        cells = [_workload(results, name, workload) for name in results["servers"]]
        rows.append(
            [workload, *(f"{c['texts_s']:.0f}<br>{_latencies(c)}" if "texts_s" in c else "failed" for c in cells)]
        )
    return table(["workload", *results["servers"]], rows)


def _ratios(results: Results) -> str:
    def cell(ours: float, other: float | None) -> str:
        return f"{ours / other:.2f}" if other else "-"

    peers = [name for name in results["servers"] if not name.startswith("embedpool")]
    rows = []
    for name in [n for n in OURS if n in results["servers"] and results["references"]]:
        for workload in _workloads(results):
            if rate := _workload(results, name, workload).get("texts_s"):
                a, b = (results["references"][r][_kind(workload)] for r in ("torch", OURS[name]))
                against = [_workload(results, peer, workload).get("texts_s") for peer in peers]
                rows.append([name, workload, cell(rate, a), cell(rate, b), *(cell(rate, other) for other in against)])
    return table(["server", "workload", "x (a)", "x (b)", *(f"x {peer}" for peer in peers)], rows)


def _mix(results: Results) -> str:
    rows = []
    for name in results["servers"]:
        r = _workload(results, name, "mix")
        if "alone_p50_ms" in r:
            p99, bulk = r["beside_p99_ms"] / r["alone_p99_ms"], r["bulk_beside_texts_s"] / r["bulk_alone_texts_s"]
            latencies = [_latencies(r, "alone_"), _latencies(r, "beside_"), f"{p99:.1f}"]
            rows.append(
                [name, *latencies, f"{r['bulk_alone_texts_s']:.0f}", f"{r['bulk_beside_texts_s']:.0f}", f"{bulk:.2f}"]
            )
    return table(["server", "alone", "beside bulk", "p99 ratio", "bulk alone", "bulk beside", "bulk kept"], rows)


def _hot(results: Results) -> str:
    found = {name: _workload(results, name, "hot-64") for name in results["servers"]}
    rows = [
        [name, f"{r['texts_s']:.0f}", f"{r['different_texts_s']:.0f}", f"{r['texts_s'] / r['different_texts_s']:.2f}"]
        for name, r in found.items()
        if "texts_s" in r
    ]
    return table(["server", "identical", "different", "ratio"], rows)


def _costs(results: Results) -> str:
    rows = []
    for name, server in results["servers"].items():
        spent = [_workload(results, name, w).get("cpu_s_per_1000") for w in ("short-32", "mixed16-16")]
        start = [_cell(server.get(key), 1) for key in ("first_startup_s", "startup_s")]
        memory = [_cell(server.get(f"{key}_mb"), 0) for key in ("pss_started", "pss", "pss_rested", "peak")]
        cpu = [_cell(value, 1) for value in spent]
        rows.append([name, *start, *memory, *cpu, _cell(server.get("cosine"), 7)])
    memory_titles = ("PSS in MB: started", "at the end", "after a minute", "peak RSS")
    cpu_titles = ("CPU s per 1,000 texts: short-32", "mixed16-16")
    titles = ["server", "first start, s", "start, s", *memory_titles, *cpu_titles, "least cosine to torch fp32"]
    return table(titles, rows)


def _cell(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _asked(results: Results) -> str:
    """ASKED, with what was measured."""
    rows = []
    for line in ASKED.strip().splitlines():
        workload, measure, sign, *bounds = line.split()
        for name, bound in zip(("embedpool-default", "embedpool-fast", "embedpool-waitress"), bounds, strict=True):
            if bound != "-":
                try:
                    value = _measure(results, measure, name, workload)
                except KeyError:  # not part of this run
                    continue
                met = value >= float(bound) if sign == ">=" else value <= float(bound)
                digits = f"{value:.6f}" if measure == "cosine" else f"{value:.2f}"
                rows.append([workload, measure, name, f"{sign} {bound}", digits, "yes" if met else "**no**"])
    return table(["workload", "measure", "server", "asked", "measured", "met"], rows)


def _measure(results: Results, measure: str, name: str, workload: str) -> float:
    """One measure of ASKED. Raises KeyError if the run has not what it needs."""
    if measure == "cosine":
        return float(results["servers"][name]["cosine"])
    if workload == "all":
        value, other = measure.split("/")
        return float(results["servers"][name][value] / results["servers"][name][other])
    ours = results["servers"][name]["workloads"][workload]
    if measure == "p50-b":
        return float(ours["p50_ms"] - results["references"][OURS[name]]["p50_ms"])
    value, other = measure.split("/")
    if other in ("a", "b"):
        reference = results["references"]["torch" if other == "a" else OURS[name]]
        return float(ours[value] / reference[_kind(workload)])
    if other == "peers":  # the best of them
        peers = [peer for peer in results["servers"] if peer.startswith(IN_TYPE[name])]
        rates = [rate for peer in peers if (rate := _workload(results, peer, workload).get(value))]
        if not rates:
            raise KeyError(other)
        return float(ours[value] / max(rates))
    if other in results["servers"]:
        return float(ours[value] / results["servers"][other]["workloads"][workload][value])
    return float(ours[value] / ours[other])


def _workload(results: Results, name: str, workload: str) -> dict[str, float]:
    """What was measured; empty if it was not."""
    return results["servers"][name]["workloads"].get(workload, {})


def _workloads(results: Results) -> list[str]:
    """Those with a rate of their own, in the order they were measured."""
    found = [w for server in results["servers"].values() for w in server["workloads"]]
    return [w for w in dict.fromkeys(found) if w.startswith(("short", "mixed"))]


def _kind(workload: str) -> str:
    return "mixed" if workload.startswith("mixed") else "short"


def _latencies(result: dict[str, float], which: str = "") -> str:
    return " / ".join(f"{result[f'{which}{p}_ms']:.0f}" for p in ("p50", "p95", "p99"))


def _ratio_to_a(results: Results, name: str, workload: str) -> float | None:
    rate = _workload(results, name, workload).get("texts_s")
    return rate / results["references"]["torch"][_kind(workload)] if rate else None


def table(titles: list[str], rows: Iterable[list[str]]) -> str:
    """In markdown; nothing without rows."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|", *lines]) if lines else ""


def _rounded(value: Any) -> Any:
    """Numbers with eight digits."""
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_rounded(v) for v in value]
    return float(f"{value:.8g}") if isinstance(value, float) else value
