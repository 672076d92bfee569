"""A model's files fetched, checked and exported before they are needed."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from embedpool.cli.common import OK, Arguments, UsageError, assignments, read_settings
from embedpool.cli.progress import MB, Display
from embedpool.errors import ConfigError

if TYPE_CHECKING:
    from embedpool.config.spec import LocalStConfig
    from embedpool.tasks.driver import Progress


def pull(arguments: Arguments) -> int:
    """Find or fetch it, open it once as a server would, and close it."""
    from embedpool.drivers.local_st import LocalStDriver
    from embedpool.drivers.model_folder import find_model_folder
    from embedpool.tasks.driver import Folders

    model, to, converts = arguments["MODEL"], arguments["--to"], arguments["--convert"]
    if converts and not to:
        raise UsageError("--convert needs --to: what it makes is a model of its own")
    config = _config(arguments)
    settings = read_settings(arguments)
    folders = Folders(settings.file(settings.paths.cache_dir), settings.file(settings.paths.state_dir))
    display = Display(model)

    def report(progress: Progress) -> None:
        if not arguments["--json"]:
            display.show(*progress)

    try:
        folder = find_model_folder(model, config, folders.state, report, pickles=converts)
        if to:
            folder = _copied(folder, Path(to).absolute(), converts=converts)
            config = _config(arguments, path=str(folder), revision=None)
        driver = LocalStDriver(model, config, 1, folders)
        driver.report = report
        facts = driver.open(lambda reason: None)
        driver.close()
    finally:
        display.close()
    size_bytes = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    if arguments["--json"]:
        answer = {"ok": True, "model": model, "folder": str(folder), "bytes": size_bytes, "space": facts.space}
        print(json.dumps({**answer, "runs_on": dict(facts.description)}))
        return OK
    print(f"{model}: {size_bytes / MB:.0f} MB in {folder}; runs on {facts.description['backend']}")
    for says in filter(None, map(facts.description.get, ("assumed", "by_encode"))):
        print(f"{model}: {says}")
    if to:
        print(f"register it with `--set path={folder}`")
    return OK


def _config(arguments: Arguments, **more: Any) -> LocalStConfig:
    """What --set and --revision say. Raises InvalidRequest."""
    from embedpool.config import edit
    from embedpool.config.spec import LocalStConfig

    given = {"revision": arguments["--revision"], **assignments(arguments), **more}
    known = {key: value for key, value in given.items() if value is not None}
    spec = edit.parse_registration({"model": arguments["MODEL"], "driver_type": "local_st", "driver_config": known})
    config = spec.driver.config
    assert isinstance(config, LocalStConfig)
    if config.trust_remote_code:
        raise UsageError("trust_remote_code may only be set in pool.yml")
    return config


def _copied(folder: Path, to: Path, *, converts: bool) -> Path:
    """The files that are loaded, in a folder that can be carried elsewhere. Raises UsageError and ConfigError."""
    from embedpool.drivers.convert import converted
    from embedpool.drivers.hub import UNSAFE_OR_UNUSED

    if to.exists() and any(to.iterdir()):
        raise UsageError(f"--to: {to} holds files already")
    try:
        if converts:
            for name in converted(folder, to):
                print(f"converted {name}", file=sys.stderr)
            return to
        shutil.copytree(folder, to, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*UNSAFE_OR_UNUSED, ".*"))
    except (OSError, shutil.Error) as error:
        raise ConfigError(f"{to} cannot be written: {error}") from None
    return to
