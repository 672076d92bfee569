"""The source distribution and the wheel work by themselves: everything that the server needs is in them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import requests

from tests.live.conftest import Server, wait_until

ROOT = Path(__file__).parents[2]
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
Install = Callable[[Path, Path], tuple[list[str], dict[str, str]]]  # how to call Python then, and its environment


def beside_what_is_here(wheel: Path, folder: Path) -> tuple[list[str], dict[str, str]]:
    """Installed alone; its dependencies are those of this environment, which tests/test_layout.py compares."""
    subprocess.run([*PIP, "install", "--no-deps", "--target", str(folder), str(wheel)], check=True)
    return [sys.executable, "-P"], {"PYTHONPATH": str(folder)}


def with_what_it_asks_for(wheel: Path, folder: Path) -> tuple[list[str], dict[str, str]]:
    """Installed with its dependencies, and nothing else, in an environment of its own."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = str(folder / "bin" / "python")
    constraint = ["--constraint", str(ROOT / "conf" / "constraints.txt")]
    nothing_else = {"PYTHONPATH": ""}
    install = [python, *PIP[1:], "install", *constraint, str(wheel)]
    subprocess.run(install, env={**os.environ, **nothing_else}, check=True)
    return [python, "-P"], nothing_else


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("install", [beside_what_is_here, pytest.param(with_what_it_asks_for, marks=pytest.mark.long)])
def test_a_wheel_serves(tmp_path: Path, server: Server, install: Install) -> None:
    """Installed apart from the repository: init, start, embed, the page and the document of the API."""
    copy = tmp_path / "source"
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, files.split("\0")):
        if name.startswith(("embedpool/", "setup", "pyproject", "README", "LICENSE", "MANIFEST", "conf/")):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((ROOT / name).read_bytes())
    program = f"from setuptools.build_meta import build_sdist; build_sdist({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", program], cwd=copy, check=True, stdout=subprocess.DEVNULL)
    (source,) = tmp_path.glob("embedpool-*.tar.gz")
    subprocess.run([*PIP, "wheel", "--no-deps", "--wheel-dir", str(tmp_path), str(source)], check=True)
    (wheel,) = tmp_path.glob("embedpool-*.whl")
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if name.startswith(("tests", "benchmarks"))]
    installed = tmp_path / "installed"
    python, variables = install(wheel, installed)
    environment = {**server.environment, **variables}
    embedpool = [*python, "-m", "embedpool"]
    where = [*python, "-c", "import embedpool; print(embedpool.__file__)"]
    found = subprocess.run(where, env=environment, check=True, capture_output=True, text=True)
    assert found.stdout.startswith(str(installed))
    subprocess.run([*embedpool, "init"], cwd=server.folder, env=environment, check=True, stdout=subprocess.DEVNULL)
    register = ["register", "--model", "m", "--type", "fake"]
    subprocess.run([*embedpool, *register], cwd=server.folder, env=environment, check=True, stdout=subprocess.DEVNULL)
    start = [*embedpool, "pool", "start", "--port", "0"]
    with subprocess.Popen(start, cwd=server.folder, env=environment, stderr=subprocess.DEVNULL) as process:
        wait_until(server.pid_file.exists)
        server.wait_ready()
        asked = subprocess.run(
            [str(installed / "bin" / "embedpool"), "embed", "--model", "m", "a"], cwd=server.folder, env=environment,
            check=True, capture_output=True, text=True,
        )  # fmt: skip
        assert len(json.loads(asked.stdout)) == 384
        for path in ("/ui", "/ui/app.js", "/ui/vendor/uplot/uPlot.iife.min.js", "/docs", "/openapi.json"):
            assert requests.get(server.url + path, timeout=60).status_code == 200, path
        process.terminate()
        assert process.wait(60) == 0
