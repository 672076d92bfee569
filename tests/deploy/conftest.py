"""What the tests of the image, the manifests and the unit share: the tools they need, each looked for by name."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs import ROOT

CONF = ROOT / "conf"


def tool(name: str) -> str:
    """A program on the path or beside this Python; without it the test is skipped."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        pytest.skip(f"needs {name}")
    return found


def said(*command: str | Path, code: int = 0) -> str:
    """What a command prints, which has to end with that exit code."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == code, f"{command}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr
