"""The commands that the docs show, pasted into a shell beside a running server, a page at a time."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs import PAGES, ROOT
from tests.live.conftest import MINILM, Server

BLOCK = re.compile(r"(<!-- not run: [^>]+ -->\n)?```(bash|python)\n(.*?)```", re.DOTALL)
SHOWN = re.compile(r"http://127\.0\.0\.1:8876")
# A shell that stops at the first command that fails; curl fails where a server answers with an error.
SHELL = 'set -euo pipefail\ncurl() { command curl --fail-with-body "$@"; }\n'


def blocks(page: Path) -> list[tuple[str, str]]:
    """What a reader may paste, and in what: a shell or Python. A block that is not run says why."""
    return [(language, code) for reason, language, code in BLOCK.findall(page.read_text()) if not reason]


RUN = [page for page in (ROOT / "README.md", *sorted(PAGES.glob("*.md"))) if blocks(page)]


def test_pages_with_commands_are_found() -> None:
    """Else nothing is run below."""
    assert {page.name for page in RUN} >= {
        "README.md",
        "getting-started.md",
        "http-api.md",
        "clients.md",
        "security.md",
    }


@pytest.mark.parametrize("page", RUN, ids=lambda page: page.name)
def test_the_commands_of_a_page_work_when_pasted(server: Server, page: Path) -> None:
    """One after the other, beside a server that `make run` has started."""
    server.write_pool({"model": MINILM, "alias": "minilm-l6", "driver": {"type": "local_st"}})
    server.start()
    server.wait_ready()
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for language, shown in blocks(page):
        code = SHOWN.sub(server.url, shown)
        done = subprocess.run(
            ["bash", "-c", SHELL + code] if language == "bash" else [sys.executable, "-c", code],
            cwd=server.folder,
            env={**server.environment, "PATH": path},
            capture_output=True,
            text=True,
            timeout=180,
            check=False,
        )
        assert done.returncode == 0, f"{code}\n{done.stdout}\n{done.stderr}"
    server.stop()
