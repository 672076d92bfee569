"""The commands batch create, list, show, cancel and fetch: OpenAI's batches on the running server."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from embedpool.cli.common import FAILED, NOT_RUNNING, OK, Arguments, UsageError, client_of, read_settings
from embedpool.errors import EmbedpoolError

if TYPE_CHECKING:
    from embedpool.client import Client

ERRORS = ".errors.jsonl"
LONGEST_CALL_S = 600.0  # of an upload


def batch(arguments: Arguments) -> int:
    """One of the commands."""
    client = client_of(read_settings(arguments))
    if client is None:
        print("not running", file=sys.stderr)
        return NOT_RUNNING
    commands = {"create": create, "list": show_all, "show": show, "cancel": cancel, "fetch": fetch}
    with client.again(timeout_s=LONGEST_CALL_S) as patient:
        command: Callable[[Arguments, Client], int] = next(of for name, of in commands.items() if arguments[name])
        return command(arguments, patient)


def create(arguments: Arguments, client: Client) -> int:
    """Prints the id, which the other commands want."""
    path = Path(arguments["FILE"])
    if not path.is_file():
        raise UsageError(f"no file is {path}")
    found = client.create_batch(path, endpoint=arguments["--endpoint"], window=arguments["--window"])
    print(json.dumps(found) if arguments["--json"] else found["id"])
    return OK


def show_all(arguments: Arguments, client: Client) -> int:
    """A line for each."""
    for found in client.batches():
        print(json.dumps(found) if arguments["--json"] else _line(found))
    return OK


def show(arguments: Arguments, client: Client) -> int:
    """How far it is, and what is wrong."""
    found = client.batch(arguments["ID"])
    if arguments["--json"]:
        print(json.dumps(found))
        return OK
    print(_line(found))
    for fault in (found["errors"] or {}).get("data", ()):
        where = f"line {fault['line']}: " if fault["line"] else ""
        print(f"  {where}{fault['message']} ({fault['code']})")
    if found["paused"]:
        print(f"  {found['paused']}")
    return OK


def cancel(arguments: Arguments, client: Client) -> int:
    """What is finished is kept."""
    found = client.cancel_batch(arguments["ID"])
    print(json.dumps(found) if arguments["--json"] else _line(found))
    return OK


def fetch(arguments: Arguments, client: Client) -> int:
    """Its results; exit code 1 if requests failed."""
    found = client.batch(arguments["ID"])
    if found["output_file_id"] is None and found["error_file_id"] is None:
        raise EmbedpoolError(f"{found['id']} is {found['status']} and has no results")
    out = Path(arguments["--out"] or f"{found['id']}.jsonl")
    for key, path in (("output_file_id", out), ("error_file_id", out.with_name(out.name + ERRORS))):
        if path.exists():
            raise UsageError(f"{path} exists")
        if found[key] is not None:
            client.fetch_file(found[key], path)
    counts = found["request_counts"]
    if arguments["--json"]:
        print(json.dumps(found))
    else:
        failed = f", {counts['failed']:,} failures in {out}{ERRORS}" if counts["failed"] else ""
        print(f"{counts['completed']:,} results in {out}{failed}", file=sys.stderr)
    return FAILED if counts["failed"] else OK


def _line(found: dict[str, Any]) -> str:
    counts = found["request_counts"]
    at = time.strftime("%Y-%m-%d %H:%M", time.localtime(found["created_at"]))
    failed = f", {counts['failed']:,} failed" if counts["failed"] else ""
    done = f"{counts['completed'] + counts['failed']:,} of {counts['total']:,}{failed}"
    speed = f", {found['requests_s']:,}/s, {found['seconds_left']:,} s left" if found["requests_s"] else ""
    return f"{found['id']}  {found['status']:11}  {at}  {found['endpoint']}  {done}{speed}"
