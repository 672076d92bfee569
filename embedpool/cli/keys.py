"""The commands key create, list and revoke. They edit keys.yml; a running server follows the file."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

from embedpool.cli.common import OK, Arguments, UsageError, converted, read_settings

if TYPE_CHECKING:
    from embedpool.config.keys import KeysFile

LIMITS = {"--weight": float, "--requests-per-s": float, "--texts-per-s": float, "--concurrent": int}


def create(arguments: Arguments) -> int:
    """Make a key and show it, this once."""
    from embedpool.config.keys import make_key

    values: dict[str, Any] = {"scopes": _listed(arguments["--scopes"])}
    if arguments["--models"]:
        values["models"] = _listed(arguments["--models"])
    for option, convert in LIMITS.items():
        if arguments[option] is not None:
            values[option.strip("-").replace("-", "_")] = converted(option, arguments[option], convert)
    entry, key = make_key(arguments["--name"] or "", **values)
    _file(arguments).edit(lambda keys: (*keys, entry))
    if arguments["--json"]:
        print(json.dumps({"ok": True, "id": entry.id, "key": key}))
    else:
        print(f"{entry.id} may {' and '.join(entry.scopes)}; the key is shown this once:", file=sys.stderr)
        print(key)
    return OK


def show(arguments: Arguments) -> int:
    """Every key, without its hash."""
    keys = _file(arguments).read()
    shown = ("id", "name", "scopes", "models", "weight", "requests_per_s", "texts_per_s", "concurrent", "created")
    entries = [{name: getattr(key, name) for name in shown} for key in keys]
    if arguments["--json"]:
        print(json.dumps({"ok": True, "keys": entries}))
        return OK
    if not keys:
        print("no keys; `embedpool key create` makes one")
    for key in keys:
        models = ", ".join(key.models) or "all models"
        print(f"{key.id}  {'+'.join(key.scopes):11}  {key.created}  {key.name or '-'}  {models}")
    return OK


def revoke(arguments: Arguments) -> int:
    """Take a key away."""
    wanted = arguments["--id"]

    def without(keys: tuple[Any, ...]) -> tuple[Any, ...]:
        if wanted not in [key.id for key in keys]:
            raise UsageError(f"no key {wanted!r}; `embedpool key list` shows them")
        return tuple(key for key in keys if key.id != wanted)

    file = _file(arguments)
    is_last = {key.id for key in file.read()} == {wanted}
    if is_last and not (arguments["--yes"] or _confirmed()):
        raise UsageError("this is the last key: without it the server asks nobody for a key; say --yes to revoke it")
    file.edit(without)
    if is_last and not file.read():
        file.revoke_last()
    print(json.dumps({"ok": True, "revoked": wanted}) if arguments["--json"] else f"{wanted}: revoked")
    return OK


def _file(arguments: Arguments) -> KeysFile:
    from embedpool.config.keys import keys_file

    return keys_file(read_settings(arguments))


def _confirmed() -> bool:
    """Whether a person at the terminal says yes."""
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return False
    print(
        "This is the last key: without it the server asks nobody for a key. Revoke it? [y/N] ", end="", file=sys.stderr
    )
    return input().strip().lower() in ("y", "yes")


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]
