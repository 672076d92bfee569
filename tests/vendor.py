"""Fetches the page's libraries from npm and lists their hashes: python -m tests.vendor. The tests compare the list."""

from __future__ import annotations

import hashlib
import subprocess
import tarfile
import tempfile
from pathlib import Path

VENDOR = Path(__file__).parents[1] / "embedpool" / "web" / "page" / "vendor"
PACKAGES = {
    "lit-html": (
        "3.3.3",
        [
            "lit-html.js",
            "directive.js",
            "directive-helpers.js",
            "directives/repeat.js",
            "directives/live.js",
            "LICENSE",
        ],
    ),
    "uplot": ("1.6.32", ["dist/uPlot.iife.min.js", "dist/uPlot.min.css", "LICENSE"]),
}


def main() -> None:
    """Write the files, and VENDORED."""
    lines = ["# sha256, file, package, path in it; made by tests/vendor.py"]
    for name, (version, files) in PACKAGES.items():
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run(["npm", "pack", "--silent", f"{name}@{version}"], cwd=folder, check=True)
            with tarfile.open(next(Path(folder).glob("*.tgz"))) as package:
                for file in files:
                    member = package.extractfile(f"package/{file}")
                    assert member is not None
                    content = member.read()
                    at = VENDOR / name / file.removeprefix("dist/")
                    at.parent.mkdir(parents=True, exist_ok=True)
                    at.write_bytes(content)
                    digest = hashlib.sha256(content).hexdigest()
                    lines.append(f"{digest} {at.relative_to(VENDOR).as_posix()} {name}@{version} {file}")
    (VENDOR / "VENDORED").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
