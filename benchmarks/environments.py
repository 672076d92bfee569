"""The environments that peers run in, each made once from its file of requirements."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
CACHE = Path(os.environ.get("EMBEDPOOL_BENCH_CACHE", Path.home() / ".cache" / "embedpool-bench"))
UNINSTALL = "# uninstall:"


class Absent(Exception):
    """A server that cannot be installed or started here, with the reason."""


def install(name: str) -> Path:
    """The python of the environment that requirements/<name>.txt describes, made if need be. Raises Absent.

    Packages that a line of it names after `# uninstall:` are taken out again.
    """
    requirements, folder = HERE / "requirements" / f"{name}.txt", CACHE / name
    python, stamp = folder / "bin" / "python", folder / "installed"
    digest = hashlib.sha256(requirements.read_bytes()).hexdigest()
    if stamp.exists() and stamp.read_text() == digest:
        return python
    print(f"installing {name}, once", file=sys.stderr, flush=True)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    lines = requirements.read_text().splitlines()
    torch = next(line for line in lines if line.startswith("torch=="))
    unwanted = [name for line in lines if line.startswith(UNINSTALL) for name in line.removeprefix(UNINSTALL).split()]
    for command in (
        [sys.executable, "-m", "venv", "--clear", str(folder)],
        [*pip, torch],  # alone and first, so that the build of the default find-links is taken
        [*pip, "-r", str(requirements)],
        *([[*pip[:3], "uninstall", "--yes", "--quiet", *unwanted]] if unwanted else []),
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["installing failed"]
            raise Absent(plain(" ".join(errors)))
    stamp.write_text(digest)
    return python


def plain(message: str) -> str:
    """A message without addresses and folders, to be shown elsewhere."""
    return re.sub(r"(\w+://)?/?[\w.+-]*/[\w./+-]+", "…", message)[-500:]
