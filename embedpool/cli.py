"""embedpool: one server, many text-embedding models, one address.

Usage:
  embedpool init [--root DIR] [--config FILE]
  embedpool pool start [--detach] [--server NAME] [--host H] [--port P] [--threads N] [--config FILE]
  embedpool pool stop [--config FILE]
  embedpool pool status [--json] [--config FILE]
  embedpool pool health [--json] [--config FILE]
  embedpool register --model M --type T [--alias A]
                     [--max-seq-length N] [--normalize | --no-normalize] [--dtype D]
                     [--base-url URL] [--remote-model R] [--timeout-s S] [--protocol P]
                     [--min N] [--max N] [--idle-ttl-s S] [--queue-max N] [--inflight N]
                     [--disabled] [--replace] [--set KEY=VALUE]... [--json] [--config FILE]
  embedpool set-alias --model M --alias A [--json] [--config FILE]
  embedpool enable --model M [--json] [--config FILE]
  embedpool disable --model M [--json] [--config FILE]
  embedpool unregister --model M [--json] [--config FILE]
  embedpool --help
  embedpool --version

Commands:
  init          Write config.yml, pool.yml and the folders they name. Never overwrites a file.
  pool start    Serve in the foreground until Ctrl-C, or with --detach in the background.
  pool stop     Let the server finish what it has accepted, then end it.
  pool status   Models, their states, queues and counters.
  pool health   Whether the server answers.
  register      Add a model and wait until it is ready. The same registration twice is a success.
  set-alias     Give a model a second name; --alias "" takes it away.
  enable        Switch a model on and wait until it is ready.
  disable       Switch a model off; it keeps its place.
  unregister    Remove a model.

  Without a running server, register, set-alias, enable, disable and unregister edit pool.yml.

Options:
  --config FILE       Settings. Default: $EMBEDPOOL_CONFIG, else .config/config.yml.
  --root DIR          Folder for everything init writes [default: .config].
  --detach            Start in the background; returns when the server answers.
  --server NAME       gunicorn or waitress; default server.server.
  --host H            Address to bind; default server.host.
  --port P            Port to bind; default server.port.
  --threads N         Request threads; default server.threads.
  --model M           Name of a model, for a local one its Hugging Face id; where it exists already, or its alias.
  --type T            local_st, http or fake.
  --alias A           Second name of the model.
  --max-seq-length N  Tokens kept of a text (local_st, fake).
  --normalize         Vectors of length 1; this is the default.
  --no-normalize      Vectors as the model gives them.
  --dtype D           Type of the vectors given out: float32 or float16.
  --base-url URL      Address of the remote service (http).
  --remote-model R    The model's name there (http).
  --timeout-s S       Longest wait for one answer of it, in seconds (http).
  --protocol P        What it speaks: embedpool, openai or tei (http).
  --min N             Replicas kept; 0 loads on first use.
  --max N             Replicas at most.
  --idle-ttl-s S      Seconds after which an idle replica above --min goes.
  --queue-max N       Bound of the model's queue, in texts.
  --inflight N        Batches at once in a replica.
  --disabled          Register without serving it.
  --replace           Replace a model registered with a different spec.
  --set KEY=VALUE     Any other key of driver.config; the value is read as YAML.
  --json              Machine-readable output.
  -h --help           Show this text.
  --version           Show the version.

Exit codes:
  0 done   1 failed   2 wrong usage   3 the server is not running   4 no such model
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from docopt import DocoptExit, docopt

from embedpool import __version__
from embedpool.errors import ConfigError, EmbedpoolError

if TYPE_CHECKING:
    from embedpool.client import Client
    from embedpool.config.settings import Settings
    from embedpool.config.spec import PoolSpec

OK, FAILED, USAGE, NOT_RUNNING, NO_SUCH_MODEL = 0, 1, 2, 3, 4
LOAD_TIMEOUT_S = 900.0

Arguments = dict[str, Any]


def main(argv: list[str] | None = None) -> int:
    """The `embedpool` command. Gives the exit code."""
    try:
        arguments = docopt(__doc__, argv, version=f"embedpool {__version__}")
    except DocoptExit as error:
        print(error, file=sys.stderr)
        return USAGE
    try:
        return _command_of(arguments)(arguments)
    except UsageError as error:
        print(f"embedpool: {error.message}", file=sys.stderr)
        return USAGE
    except EmbedpoolError as error:
        if arguments["--json"]:
            print(json.dumps({"ok": False, "error": {"code": error.code, "message": error.message}}))
        else:
            print(f"embedpool: {error.message}", file=sys.stderr)
        return NO_SUCH_MODEL if error.code == "model_not_found" else FAILED
    except KeyboardInterrupt:
        return FAILED


class UsageError(EmbedpoolError):
    """The command line asks for something that does not go together."""


def _command_of(arguments: Arguments) -> Callable[[Arguments], int]:
    commands: dict[str, Callable[[Arguments], int]] = {
        "init": init, "start": pool_start, "stop": pool_stop, "status": pool_status, "health": pool_health,
        "register": register, "set-alias": set_alias, "enable": enable, "disable": disable,
        "unregister": unregister,
    }  # fmt: skip
    return next(function for name, function in commands.items() if arguments[name])


# --- files


def init(arguments: Arguments) -> int:
    """Write the sample files and make the folders."""
    from embedpool.config.pool_yml import EMPTY_POOL_YML
    from embedpool.config.settings import load_settings, sample_config_yml

    root = arguments["--root"]
    config = Path(arguments["--config"] or Path(root) / "config.yml")
    _write_new(config, sample_config_yml(root))
    settings = load_settings(config, {})
    _write_new(settings.file(settings.paths.pool_yml), EMPTY_POOL_YML)
    for folder in (settings.paths.state_dir, settings.paths.logs_dir, settings.paths.cache_dir):
        settings.file(folder).mkdir(parents=True, exist_ok=True)
    return OK


def _write_new(file: Path, text: str) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("x", encoding="utf-8") as stream:
            stream.write(text)
    except FileExistsError:
        print(f"{file} exists and is left as it is")
    except OSError as error:
        raise ConfigError(f"{file} cannot be written: {error}") from None
    else:
        print(f"wrote {file}")


def _settings(arguments: Arguments) -> Settings:
    from embedpool.config.settings import find_config_yml, load_settings

    return load_settings(find_config_yml(arguments["--config"]))


# --- the server's life


def pool_start(arguments: Arguments) -> int:
    """Serve, in the foreground or detached."""
    from embedpool.config.settings import find_config_yml
    from embedpool.process import PidFile, start_detached

    # The server, its workers and a detached child all read the same file and the same overrides.
    os.environ["EMBEDPOOL_CONFIG"] = str(find_config_yml(arguments["--config"]))
    for option, variable in (
        ("--host", "SERVER__HOST"),
        ("--port", "SERVER__PORT"),
        ("--threads", "SERVER__THREADS"),
        ("--server", "SERVER__SERVER"),
    ):
        if arguments[option] is not None:
            os.environ[f"EMBEDPOOL_{variable}"] = arguments[option]
    settings = _settings(arguments)
    if running := PidFile(settings).read():
        print(f"already running: pid {running.pid}, {running.address}")
        return OK
    _refuse_broken_pool_file(settings)
    if arguments["--detach"]:
        with _progress("starting"):
            started = next(found for found in start_detached(settings, ["pool", "start"]) if found)
        print(f"started: pid {started.pid}, {started.address}")
        return OK
    from embedpool import server

    server.run(settings, settings.server.server)
    return OK


def _refuse_broken_pool_file(settings: Settings) -> None:
    from embedpool.config.pool_yml import PoolFile

    PoolFile(settings.file(settings.paths.pool_yml)).read()


def pool_stop(arguments: Arguments) -> int:
    """Drain, wait, and only then insist."""
    from embedpool import process

    settings = _settings(arguments)
    running = process.PidFile(settings).read()
    if running is None:
        print("not running", file=sys.stderr)
        return NOT_RUNNING
    with _progress("stopping"):
        by_itself = process.stop(running, settings.server.graceful_timeout_s + 15)
    print(f"stopped: pid {running.pid}" + ("" if by_itself else ", killed after the grace period"))
    return OK if by_itself else FAILED


def pool_status(arguments: Arguments) -> int:
    """The live pool, or without a server what pool.yml says."""
    settings = _settings(arguments)
    client = _client(settings)
    if client is None:
        models = _pool_file_status(settings)
        if arguments["--json"]:
            print(json.dumps({"running": False, "models": models}))
        else:
            print("not running")
            _print_models(models)
        return NOT_RUNNING
    status = client.status()
    if arguments["--json"]:
        print(json.dumps({"running": True, **status}))
        return OK
    reload = status["last_reload"] or {}
    if reload.get("error"):
        print(f"pool.yml is not followed since {reload['at']}:\n{reload['error']}\n")
    _print_models(status["models"])
    return OK


def pool_health(arguments: Arguments) -> int:
    """Whether the server answers."""
    client = _client(_settings(arguments))
    health = client.health() if client else {"ok": False}
    if arguments["--json"]:
        print(json.dumps(health))
    elif client is None:
        print("not running")
    else:
        print(f"ok: {health['models']} models, {'all loaded' if health['booted'] else 'still loading'}")
    return OK if client else NOT_RUNNING


def _pool_file_status(settings: Settings) -> list[dict[str, Any]]:
    from embedpool.config.pool_yml import PoolFile

    spec = PoolFile(settings.file(settings.paths.pool_yml)).read()
    return [
        {
            "model": m.model,
            "alias": m.alias,
            "enabled": m.enabled,
            "state": "-" if m.enabled else "disabled",
            "driver_type": m.driver.type,
        }
        for m in spec.models
    ]


def _print_models(models: list[dict[str, Any]]) -> None:
    if not models:
        print("no models; `embedpool register` adds one")
        return
    rows = [["MODEL", "ALIAS", "STATE", "TYPE", "REPLICAS", "QUEUE", "REQUESTS", "ERRORS"]]
    for m in models:
        counters = m.get("counters", {"requests": "-", "errors": {}})
        replicas = f"{m['replicas_busy']}/{m['replicas']} busy" if "replicas" in m else "-"
        cells = (m["model"], m["alias"] or "-", m["state"], m["driver_type"], replicas, m.get("queue_len", "-"))
        rows.append([*map(str, cells), str(counters["requests"]), str(sum(counters["errors"].values()))])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        print(_coloured(line, row[2]))
    for m in models:
        if m.get("last_error") and m["state"] != "ready":
            print(f"{m['model']}: {m['last_error']}")
        if successor := m.get("successor"):
            print(f"{m['model']}: the change is {successor['state']}: {successor['last_error'] or 'please wait'}")


def _coloured(line: str, state: str) -> str:
    colour = {"ready": 32, "failed": 31, "loading": 33, "disabled": 90}.get(state)
    if colour is None or not sys.stdout.isatty() or os.environ.get("NO_COLOR"):
        return line
    return f"\x1b[{colour}m{line}\x1b[0m"


# --- management: through the running server, else in the file


def register(arguments: Arguments) -> int:
    """Add a model."""
    flat = _registration(arguments)

    def offline(pool: PoolSpec) -> PoolSpec:
        from embedpool.config import edit

        return edit.register(pool, edit.parse_registration(flat), replace=arguments["--replace"])

    def online(client: Client) -> Any:
        return client.register(flat, replace=arguments["--replace"], timeout_s=LOAD_TIMEOUT_S)

    return _manage(arguments, f"loading {flat['model']}", online, offline, "registered")


def set_alias(arguments: Arguments) -> int:
    """Give a model a second name."""
    from embedpool.config import edit

    model, alias = arguments["--model"], arguments["--alias"]
    done = f"alias set to {alias}" if alias else "alias cleared"
    return _manage(
        arguments, None, lambda c: c.set_alias(model, alias), lambda p: edit.set_alias(p, model, alias), done
    )


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
        f"loading {model}" if enabled else None,
        lambda c: c.set_enabled(model, enabled, timeout_s=LOAD_TIMEOUT_S),
        lambda p: edit.set_enabled(p, model, enabled),
        "enabled" if enabled else "disabled",
    )


def unregister(arguments: Arguments) -> int:
    """Remove a model."""
    from embedpool.config import edit

    model = arguments["--model"]
    return _manage(arguments, None, lambda c: c.unregister(model), lambda p: edit.unregister(p, model), "unregistered")


def _manage(
    arguments: Arguments,
    progress: str | None,
    online: Callable[[Client], Any],
    offline: Callable[[PoolSpec], PoolSpec],
    done: str,
) -> int:
    settings = _settings(arguments)
    client = _client(settings)
    if client is None:
        from embedpool.config.pool_yml import PoolFile

        PoolFile(settings.file(settings.paths.pool_yml)).edit(offline)
        answer: dict[str, Any] = {"ok": True, "running": False}
        done += " in pool.yml; the server is not running"
    else:
        with _progress(progress):
            answer = online(client)
        answer["running"] = True
    print(json.dumps(answer) if arguments["--json"] else f"{arguments['--model']}: {done}")
    return OK


def _client(settings: Settings) -> Client | None:
    """A client of the server of the pid file, else of the one at client.base_url; None if none answers."""
    from embedpool.client import Client
    from embedpool.errors import ServerUnreachable
    from embedpool.process import PidFile

    running = PidFile(settings).read()
    key = os.environ.get(settings.client.api_key_env) if settings.client.api_key_env else None
    client = Client(running.address if running else settings.client.base_url, api_key=key, timeout_s=30)
    try:
        client.health()
    except ServerUnreachable:
        if running:
            raise  # it lives and does not answer: editing its file behind its back would hide that
        return None
    return client


NEEDED = {"local_st": (), "http": ("--base-url",), "fake": ()}
DRIVER_OPTIONS = {
    "--max-seq-length": ("max_seq_length", int, ("local_st", "fake")),
    "--dtype": ("dtype", str, ("local_st", "http", "fake")),
    "--base-url": ("base_url", str, ("http",)),
    "--remote-model": ("remote_model", str, ("http",)),
    "--timeout-s": ("timeout_s", float, ("http",)),
    "--protocol": ("protocol", str, ("http",)),
}
OTHER_OPTIONS = {
    "--model": ("model", str),
    "--alias": ("alias", str),
    "--type": ("driver_type", str),
    "--min": ("min", int),
    "--max": ("max", int),
    "--idle-ttl-s": ("idle_ttl_s", float),
    "--queue-max": ("queue_max_size", int),
    "--inflight": ("max_inflight_per_replica", int),
}


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
            config[key] = _converted(option, arguments[option], convert)
    if arguments["--normalize"] or arguments["--no-normalize"]:
        config["normalize"] = bool(arguments["--normalize"])
    for assignment in arguments["--set"]:
        config.update([_assignment(assignment)])
    flat = {
        key: _converted(option, arguments[option], convert)
        for option, (key, convert) in OTHER_OPTIONS.items()
        if arguments[option] is not None
    }
    return {**flat, "driver_config": config, "enabled": not arguments["--disabled"]}


def _converted(option: str, text: str, convert: Callable[[str], Any]) -> Any:
    try:
        return convert(text)
    except ValueError:
        raise UsageError(f"{option} must be a number, not {text!r}") from None


def _assignment(text: str) -> tuple[str, Any]:
    import yaml

    key, equals, value = text.partition("=")
    if not equals:
        raise UsageError(f"--set takes KEY=VALUE, not {text!r}")
    try:
        return key, yaml.safe_load(value)
    except yaml.YAMLError:
        raise UsageError(f"--set {key}: {value!r} is not a YAML value") from None


@contextmanager
def _progress(what: str | None) -> Iterator[None]:
    """A line on the terminal while something takes its time."""
    if what is None or not sys.stderr.isatty():
        yield
        return
    done = threading.Event()

    def spin() -> None:
        for frame in itertools.cycle("|/-\\"):
            sys.stderr.write(f"\r{frame} {what} ")
            sys.stderr.flush()
            if done.wait(0.2):
                break
        sys.stderr.write("\r\x1b[K")
        sys.stderr.flush()

    thread = threading.Thread(target=spin, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
