"""The commands cache show and cache clear: rows that the running server has computed before."""

from __future__ import annotations

import json
import sys

from embedpool.cli.common import NOT_RUNNING, OK, Arguments, client_of, read_settings
from embedpool.cli.table import aligned


def cache(arguments: Arguments) -> int:
    """One of the commands."""
    client = client_of(read_settings(arguments))
    if client is None:
        print("not running", file=sys.stderr)
        return NOT_RUNNING
    if arguments["clear"]:
        found = client.clear_cache(arguments["--model"])
        print(json.dumps(found) if arguments["--json"] else "cleared")
        return OK
    status = client.status()
    models = [
        {
            "model": entry["model"],
            "cached": entry["cached"],
            "hits": entry["counters"]["cache_hits"],
            "misses": entry["counters"]["cache_misses"],
        }
        for entry in status["models"]
    ]
    if arguments["--json"]:
        print(json.dumps({"cache": status["cache"], "models": models}))
        return OK
    for name, layer in (status["cache"] or {}).items():
        print(f"{name}: {_said(layer)}" if layer else f"{name}: off")
    rows = [["MODEL", "CACHED", "HITS", "MISSES"]]
    for entry in models:
        rows.append([entry["model"], "yes" if entry["cached"] else "no", f"{entry['hits']:,}", f"{entry['misses']:,}"])
    print("\n".join(aligned(rows)))
    return OK


def _said(layer: dict[str, float | str | None]) -> str:
    """What a layer holds, in a line."""
    megabytes = "{:.1f} of {:.0f} MB".format(*(float(layer[key] or 0) / 1e6 for key in ("bytes", "max_bytes")))
    said = f"{layer['entries']:,} rows, {megabytes}, {layer['evicted']:,} left for want of room"
    return f"off: {layer['off']}" if layer.get("off") else said
