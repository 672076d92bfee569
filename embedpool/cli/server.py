"""init, and the server's life: start, stop, status, health."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from embedpool.cli.common import (
    FAILED,
    NOT_RUNNING,
    OK,
    Arguments,
    UsageError,
    client_of,
    converted,
    pool_file,
    progress,
    read_settings,
)
from embedpool.cli.table import print_models
from embedpool.errors import ConfigError

if TYPE_CHECKING:
    from embedpool.config.settings import Settings


def init(arguments: Arguments) -> int:
    """Write the sample files and make the folders."""
    from embedpool.config.config_yml import load_settings
    from embedpool.config.pool_yml import EMPTY_POOL_YML
    from embedpool.config.sample import sample_config_yml

    root = arguments["--root"]
    config = Path(arguments["--config"] or os.environ.get("EMBEDPOOL_CONFIG") or Path(root) / "config.yml")
    _write_new(config, sample_config_yml(root))
    settings = load_settings(config, {})
    _write_new(settings.file(settings.paths.pool_yml), EMPTY_POOL_YML)
    for folder in (settings.paths.state_dir, settings.paths.logs_dir, settings.paths.cache_dir):
        try:
            settings.file(folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"{settings.file(folder)} cannot be made: {error}") from None
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


def start(arguments: Arguments) -> int:
    """Serve, in the foreground or detached."""
    if sys.platform == "win32":
        raise UsageError("the server does not run on Windows: run it in WSL, in a container or on another machine")
    from embedpool.config.config_yml import find_config_yml
    from embedpool.serve.process import PidFile, start_detached

    # The server, its workers and a detached child all read the same file and the same overrides.
    os.environ["EMBEDPOOL_CONFIG"] = str(find_config_yml(arguments["--config"]))
    if arguments["--server"] not in (None, "gunicorn", "waitress"):
        raise UsageError(f"--server must be gunicorn or waitress, not {arguments['--server']!r}")
    for option in ("--port", "--threads"):
        if arguments[option] is not None:
            converted(option, arguments[option], int)
    for option in ("--host", "--port", "--threads", "--server"):
        if arguments[option] is not None:
            os.environ[f"EMBEDPOOL_SERVER__{option.strip('-').upper()}"] = arguments[option]
    if arguments["--insecure"]:
        os.environ["EMBEDPOOL_SECURITY__INSECURE"] = "true"
    settings = read_settings(arguments)
    if running := PidFile(settings).read():
        print(f"already running: pid {running.pid}, {running.address}")
        return OK
    pool_file(settings).read()  # a broken file is refused here, with its line
    if arguments["--detach"]:
        with progress("starting"):
            running = start_detached(settings)
        print(f"started: pid {running.pid}, {running.address}; `embedpool pool status` shows when models are loaded")
        return OK
    from embedpool.serve import run

    run.run(settings, settings.server.server)
    return OK


def stop(arguments: Arguments) -> int:
    """Drain, wait, and only then insist."""
    from embedpool.serve import process

    settings = read_settings(arguments)
    running = process.PidFile(settings).read()
    if running is None:
        print("not running", file=sys.stderr)
        return NOT_RUNNING
    with progress("stopping"):
        by_itself = process.stop(running, settings.server.longest_stop_s + process.STOP_MARGIN_S)
    print(f"stopped: pid {running.pid}" + ("" if by_itself else ", killed after the grace period"))
    return OK if by_itself else FAILED


def status(arguments: Arguments) -> int:
    """The live pool, or without a server what pool.yml says."""
    settings = read_settings(arguments)
    client = client_of(settings)
    if client is None:
        models = _pool_file_status(settings)
        if arguments["--json"]:
            print(json.dumps({"running": False, "models": models}))
        else:
            print("not running")
            print_models(models)
        return NOT_RUNNING
    answer = client.status()
    if fault := answer.get("keys", {}).get("fault"):
        print(f"nobody's key is known: {fault}\n", file=sys.stderr)
    if arguments["--json"]:
        print(json.dumps({"running": True, **answer}))
        return OK
    reload = answer["last_reload"] or {}
    if reload.get("error"):
        print(f"pool.yml is not followed since {reload['at']}:\n{reload['error']}\n")
    print_models(answer["models"])
    return OK


def health(arguments: Arguments) -> int:
    """Whether the server answers."""
    client = client_of(read_settings(arguments))
    answer = client.health() if client else {"ok": False}
    if arguments["--json"]:
        print(json.dumps(answer))
    elif client is None:
        print("not running")
    else:
        print(f"ok: {answer['models']} models, {'all loaded' if answer['booted'] else 'still loading'}")
    return OK if client else NOT_RUNNING


def _pool_file_status(settings: Settings) -> list[dict[str, Any]]:
    spec = pool_file(settings).read()
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
