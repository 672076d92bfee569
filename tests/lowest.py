"""The least versions that setup.cfg allows, as constraints for pip: `make test-lowest` shows that they are true."""

from __future__ import annotations

import configparser
import re
import sys
from pathlib import Path

SETUP_CFG = Path(__file__).parents[1] / "setup.cfg"
EXTRAS = ("demo", "openvino", "files", "otel")  # of what users install, not of what tests need
PINNED = ("torch",)  # conf/constraints.txt says which
FLOOR = re.compile(r"(?P<name>[\w.-]+)>=(?P<floor>[\w.]+)")


def floors() -> dict[str, str]:
    """Name → version of each requirement that names one."""
    setup = configparser.ConfigParser()
    setup.read(SETUP_CFG)
    named = setup["options"]["install_requires"] + "".join(setup["options.extras_require"][name] for name in EXTRAS)
    return {found["name"]: found["floor"] for found in FLOOR.finditer(named) if found["name"] not in PINNED}


if __name__ == "__main__":
    sys.stdout.write("".join(f"{name}=={floor}\n" for name, floor in floors().items()))
