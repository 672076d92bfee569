"""The systemd unit, as far as systemd's own tools can tell without a running systemd."""

from __future__ import annotations

import subprocess

from tests.deploy.conftest import CONF, said, tool

UNIT = CONF / "embedpool.service"
MOST_EXPOSURE = 25  # in tenths


def test_the_unit_is_understood() -> None:
    """systemd knows every line of it. The server itself is not installed where the tests run."""
    done = subprocess.run([tool("systemd-analyze"), "verify", UNIT], capture_output=True, text=True, check=False)
    faults = [line for line in (done.stdout + done.stderr).splitlines() if "embedpool" in line]
    assert [line for line in faults if "is not executable: No such file" not in line] == []


def test_the_unit_exposes_little() -> None:
    """systemd's own measure of what a service could do to the machine is at most 2.5 of 10."""
    said(tool("systemd-analyze"), "security", "--offline=true", f"--threshold={MOST_EXPOSURE}", UNIT)
