"""Tables of the commands."""

from __future__ import annotations

import os
import sys
from typing import Any


def print_models(models: list[dict[str, Any]]) -> None:
    """One line for each model, with its errors below."""
    if not models:
        print("no models; `embedpool register` adds one")
        return
    rows = [["MODEL", "ALIAS", "STATE", "TYPE", "REPLICAS", "QUEUE", "REQUESTS", "ERRORS"]]
    for m in models:
        counters = m.get("counters", {"requests": "-", "errors": {}})
        replicas = f"{m['replicas']} ({m['replicas_busy']} busy)" if "replicas" in m else "-"
        cells = (m["model"], m["alias"] or "-", m["state"], m["driver_type"], replicas, m.get("queue_len", "-"))
        rows.append([*map(str, cells), str(counters["requests"]), str(sum(counters["errors"].values()))])
    for line, row in zip(aligned(rows), rows, strict=True):
        print(_coloured(line, row[2]))
    for m in models:
        if m.get("last_error") and m["state"] != "ready":
            print(f"{m['model']}: {m['last_error']}")
        if successor := m.get("successor"):
            print(f"{m['model']}: the change is {successor['state']}: {successor['last_error'] or 'please wait'}")


def aligned(rows: list[list[str]]) -> list[str]:
    """A line for each row, its cells below each other."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _coloured(line: str, state: str) -> str:
    colour = {"ready": 32, "failed": 31, "loading": 33, "disabled": 90}.get(state)
    if colour is None or not sys.stdout.isatty() or os.environ.get("NO_COLOR"):
        return line
    return f"\x1b[{colour}m{line}\x1b[0m"
