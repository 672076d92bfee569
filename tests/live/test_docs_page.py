"""/docs in a real browser."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.live.browser import QUIET, browser_path, needs_browser
from tests.live.conftest import Server, fake


@needs_browser
def test_the_page_shows_every_operation(server: Server, kind: str, tmp_path: Path) -> None:
    """The page builds itself from this server alone, and shows each path of the document."""
    server.write_pool(fake("m"))
    server.start(kind)
    server.wait_ready()
    flags = (f"--user-data-dir={tmp_path}", "--timeout=60000", "--virtual-time-budget=20000", "--dump-dom")
    done = subprocess.run(
        [browser_path(), "--headless", *QUIET, *flags, f"{server.url}/docs"],
        capture_output=True,
        text=True,
        timeout=180,
        check=True,
    )
    for path, item in server.get("/openapi.json").json()["paths"].items():
        assert f'data-path="{path}"' in done.stdout
        for operation in item.values():
            assert operation["summary"] in done.stdout
    assert "Failed to load" not in done.stdout
    server.stop()
