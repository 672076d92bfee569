"""Management of models: through the running server, or without one in pool.yml, by the same functions."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from embedpool.cli.common import (
    OK,
    Arguments,
    UsageError,
    assignments,
    client_of,
    converted,
    pool_file,
    read_settings,
)
from embedpool.cli.progress import watched

if TYPE_CHECKING:
    from embedpool.client import Client
    from embedpool.config.spec import PoolSpec

LOAD_TIMEOUT_S = 900.0


def register(arguments: Arguments) -> int:
    """Add a model."""
    flat = _registration(arguments)

    def offline(pool: PoolSpec) -> PoolSpec:
        from embedpool.config import edit

        return edit.register(pool, edit.parse_registration(flat), replace=arguments["--replace"])

    def online(client: Client) -> Any:
        return client.register(flat, replace=arguments["--replace"], timeout_s=LOAD_TIMEOUT_S)

    return _manage(arguments, online, offline, "registered", is_loading=True)


def set_alias(arguments: Arguments) -> int:
    """Give a model a second name."""
    from embedpool.config import edit

    model, alias = arguments["--model"], arguments["--alias"]
    done = f"alias set to {alias}" if alias else "alias cleared"
    return _manage(arguments, lambda c: c.set_alias(model, alias), lambda p: edit.set_alias(p, model, alias), done)


def enable(arguments: Arguments) -> int:
    """Switch a model on."""
    return _set_enabled(arguments, True)


def disable(arguments: Arguments) -> int:
    """Switch a model off."""
    return _set_enabled(arguments, False)


def _set_enabled(arguments: Arguments, enabled: bool) -> int:
    from embedpool.config import edit

    model = arguments["--model"]
    return _manage(
        arguments,
        lambda c: c.set_enabled(model, enabled, timeout_s=LOAD_TIMEOUT_S),
        lambda p: edit.set_enabled(p, model, enabled),
        "enabled" if enabled else "disabled",
        is_loading=enabled,
    )


def unregister(arguments: Arguments) -> int:
    """Remove a model."""
    from embedpool.config import edit

    model = arguments["--model"]
    return _manage(arguments, lambda c: c.unregister(model), lambda p: edit.unregister(p, model), "unregistered")


def _manage(
    arguments: Arguments,
    online: Callable[[Client], Any],
    offline: Callable[[PoolSpec], PoolSpec],
    done: str,
    *,
    is_loading: bool = False,
) -> int:
    settings = read_settings(arguments)
    client = client_of(settings)
    if client is None:
        pool_file(settings).edit(offline)
        answer: dict[str, Any] = {"ok": True, "running": False}
        done += " in pool.yml; the server is not running"
    else:
        with _shown(arguments, client) if is_loading else contextlib.nullcontext():
            answer = online(client)
        answer["running"] = True
    if arguments["--json"]:
        print(json.dumps(answer))
        return OK
    print(f"{arguments['--model']}: {done}")
    runs_on = answer.get("runs_on") or {}
    for says in filter(None, map(runs_on.get, ("assumed", "by_encode"))):
        print(f"{arguments['--model']}: {says}")
    return OK


def _shown(arguments: Arguments, client: Client) -> AbstractContextManager[None]:
    """How far the model is, asked over a connection of its own."""
    if arguments["--json"]:
        return contextlib.nullcontext()
    watcher = client.again()
    return watched(arguments["--model"], lambda: watcher.progress(arguments["--model"]))


# --- a registration from options

NEEDED = {"local_st": (), "http": ("--base-url",), "fake": ()}
DRIVER_OPTIONS = {
    "--max-seq-length": ("max_seq_length", int, ("local_st", "fake")),
    "--dtype": ("dtype", str, ("local_st", "http", "fake")),
    "--base-url": ("base_url", str, ("http",)),
    "--remote-model": ("remote_model", str, ("http",)),
    "--timeout-s": ("timeout_s", float, ("http",)),
    "--protocol": ("protocol", str, ("http",)),
}
OTHER_OPTIONS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "--model": ("model", str),
    "--alias": ("alias", str),
    "--type": ("driver_type", str),
    "--place": ("place", str),
    "--resources": ("resources", lambda given: _from_json("--resources", given)),
    "--min": ("min", int),
    "--max": ("max", int),
    "--idle-ttl-s": ("idle_ttl_s", float),
    "--queue-max": ("queue_max_size", int),
    "--inflight": ("max_inflight_per_replica", int),
}


def _from_json(option: str, given: str) -> Any:
    """Raises UsageError."""
    try:
        return json.loads(given)
    except ValueError:
        raise UsageError(f"{option} must be JSON, not {given!r}") from None


def _registration(arguments: Arguments) -> dict[str, Any]:
    """The flat registration of POST /models/register. Raises UsageError in a sentence."""
    kind = arguments["--type"]
    if kind not in NEEDED:
        raise UsageError(f"--type must be one of {', '.join(NEEDED)}, not {kind!r}")
    for option in NEEDED[kind]:
        if arguments[option] is None:
            raise UsageError(f"a model of type {kind} needs {option}")
    config: dict[str, Any] = {}
    for option, (key, convert, kinds) in DRIVER_OPTIONS.items():
        if arguments[option] is not None:
            if kind not in kinds:
                raise UsageError(f"{option} is for type {' and '.join(kinds)}, not for {kind}")
            config[key] = converted(option, arguments[option], convert)
    if arguments["--normalize"] or arguments["--no-normalize"]:
        config["normalize"] = bool(arguments["--normalize"])
    config.update(assignments(arguments))
    flat = {
        key: converted(option, arguments[option], convert)
        for option, (key, convert) in OTHER_OPTIONS.items()
        if arguments[option] is not None
    }
    return {**flat, "driver_config": config, "enabled": not arguments["--disabled"]}
