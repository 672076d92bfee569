"""The cache of OpenVINO graphs: a model is exported once, in a process of its own, and looked up from then on."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from embedpool.config.spec import LocalStConfig
from embedpool.errors import ModelFailed

logger = logging.getLogger(__name__)

FORM = 5  # of what is exported; graphs of another one are made anew
LIBRARIES = ("openvino", "torch", "transformers", "sentence-transformers")
HASHES = "hashes.json"
UNUSED_S = 30 * 86400.0  # a graph that nobody has loaded for so long is deleted
UNFINISHED, UNFINISHED_S = "export-", 86400.0  # the same of an export that never ended


def exported(folder: Path, config: LocalStConfig, cache: Path, on_export: Callable[[], None]) -> Path:
    """The folder with a graph for each route of the model, exported unless the cache has it.

    The key holds the model's files and the libraries' versions. `on_export` is called before an export. Raises
    ModelFailed if a graph gives other vectors than the model's library, or cannot be written.
    """
    graphs = cache / "openvino" / f"{folder.name}-{_key(folder)}"
    if graphs.exists() and is_whole(graphs):
        with contextlib.suppress(OSError):  # others may own the cache
            os.utime(graphs)  # see _prune
        return graphs
    if graphs.exists():
        logger.warning("the cached graph %s is damaged, or older than its check, and is made anew", graphs)
        shutil.rmtree(graphs, ignore_errors=True)
    logger.info("exporting %s to OpenVINO, once", folder)
    on_export()
    graphs.parent.mkdir(parents=True, exist_ok=True)
    _prune(graphs.parent)
    with tempfile.TemporaryDirectory(prefix=UNFINISHED, dir=graphs.parent) as temporary:
        new = Path(temporary) / "new"
        export(folder, config, new)
        _sign(new)
        try:
            os.rename(new, graphs)
        except OSError:
            if not graphs.exists():  # else another process was first
                raise
    return graphs


def export(folder: Path, config: LocalStConfig, new: Path) -> None:
    """Have openvino_export.py write the graphs into the folder `new`, in a process of its own. Raises ModelFailed.

    That one loads torch, and ends with this one.
    """
    command = [sys.executable, "-P", "-m", "embedpool.drivers.openvino_export"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    with (
        tempfile.TemporaryFile() as said,
        subprocess.Popen(  # noqa: S603  (of this program's own words)
            command, bufsize=0, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, env=environment
        ) as process,
    ):
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(OSError):  # it has ended: told below
            process.stdin.write(pickle.dumps((folder, config, new)))
        answer = process.stdout.read()
        exit_code = process.wait()
        said.seek(0)
        last_words = said.read().decode(errors="replace").strip().rpartition("\n")[2]
    if exit_code:
        raise ModelFailed(f"the process that exports it ended with exit code {exit_code}: {last_words[:500]}")
    if fault := json.loads(answer)["fault"]:
        raise ModelFailed(fault)


def _prune(graphs: Path) -> None:
    """Delete what nobody has loaded for long: graphs of older models and libraries, and exports that were cut off."""
    now = time.time()
    for folder in graphs.iterdir():
        longest_s = UNFINISHED_S if folder.name.startswith(UNFINISHED) else UNUSED_S
        with contextlib.suppress(OSError):
            if now - folder.stat().st_mtime > longest_s:
                logger.info("the cached graph %s is deleted: nobody has used it for long", folder)
                shutil.rmtree(folder)


def is_whole(graphs: Path) -> bool:
    """Whether its files are those that were compared with `encode`, byte for byte."""
    try:
        expected = json.loads((graphs / HASHES).read_text())
        return bool(expected) and all(_sha256(graphs / name) == found for name, found in expected.items())
    except (OSError, ValueError, AttributeError):
        return False


def _sign(folder: Path) -> None:
    """Write the hashes of a graph's files beside them, and all of it to the disk."""
    files = sorted(file for file in folder.iterdir() if file.is_file())
    (folder / HASHES).write_text(json.dumps({file.name: _sha256(file) for file in files}))
    for file in (*files, folder / HASHES):
        with file.open("rb") as stream:
            os.fsync(stream.fileno())


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _key(folder: Path) -> str:
    files = sorted(f for f in folder.rglob("*") if f.is_file() and "__pycache__" not in f.parts)
    facts = [f"{f.relative_to(folder)} {f.stat().st_size} {f.stat().st_mtime_ns}" for f in files]
    facts += [f"{name} {version(name)}" for name in LIBRARIES] + [f"form {FORM}"]
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:16]
