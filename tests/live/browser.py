"""Which browser tests drive, and whether they may do without one."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
QUIET = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update",
)  # fmt: skip
AXE = Path(sys.prefix) / "clients" / "node_modules" / "axe-core" / "axe.min.js"

# Set by .ci/run where a browser is: its tests then fail rather than be left out. Its name is not one of a setting.
IS_REQUIRED = os.environ.get("TESTS_REQUIRE_BROWSER") == "1"

needs_browser = pytest.mark.skipif(CHROMIUM is None and not IS_REQUIRED, reason="needs Chromium")


def browser_path() -> str:
    """Where it is. Fails the test that asks where it is required and not there."""
    assert CHROMIUM is not None, "TESTS_REQUIRE_BROWSER is set, and there is no Chromium"
    return CHROMIUM


def axe_source() -> str | None:
    """axe-core, from npm; None where it may be left out. Fails where it is required and could be had."""
    if AXE.exists():
        return AXE.read_text()
    assert not (IS_REQUIRED and shutil.which("npm")), f"TESTS_REQUIRE_BROWSER is set, and {AXE} is not there"
    return None
