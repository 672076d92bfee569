"""Real servers, driven by the installed `embedpool` command as a user would."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests

COMMAND = Path(sys.executable).with_name("embedpool")
MINILM = "sentence-transformers/all-MiniLM-L6-v2"
AT_ONCE = 2  # processes of clients, which take seconds to begin
WAIT_S = 120  # patience on a busy machine; nothing waits for it when all is well


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "tests/live" in str(item.path):
            item.add_marker("live")


class Server:
    """A folder of its own, the command in it, and the server that the command starts on a free port."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder = folder
        self.environment = {**os.environ, **environment}
        self.pool_yml = folder / ".config" / "pool.yml"
        self.log = folder / ".config" / "logs" / "embedpool.log"
        self.pid_file = folder / ".config" / "state" / "pool.pid"

    def run(
        self, *arguments: str, before: Sequence[str] = (), stdin: str | None = None, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Run `embedpool …` to its end, whatever that is; `before` stands before the command."""
        return subprocess.run(
            [*before, str(COMMAND), *arguments],
            cwd=self.folder,
            env={**self.environment, **environment},
            input=stdin,
            capture_output=True,
            text=True,
            errors="surrogateescape",
            timeout=180,
            check=False,
        )

    def cli(self, *arguments: str, code: int = 0, stdin: str | None = None, **environment: str) -> str:
        """Run `embedpool …` and check its exit code; gives what it printed."""
        done = self.run(*arguments, stdin=stdin, **environment)
        said = done.stdout + done.stderr
        assert done.returncode == code, f"embedpool {' '.join(arguments)}: {done.returncode}, not {code}\n{said}\n" + (
            self.log.read_text() if self.log.exists() else ""
        )
        return said

    def start(self, kind: str = "gunicorn", **environment: str) -> None:
        self.cli("pool", "start", "--detach", "--server", kind, "--port", "0", **environment)

    def stop(self) -> None:
        self.cli("pool", "stop")

    @property
    def pid(self) -> int:
        return int(self.pid_file.read_text().split("\n")[0])

    @property
    def url(self) -> str:
        return self.pid_file.read_text().split("\n")[1]

    @property
    def process(self) -> psutil.Process:
        return psutil.Process(self.pid)

    def get(self, path: str, **arguments: Any) -> requests.Response:
        return requests.get(self.url + path, timeout=WAIT_S, **arguments)

    def post(self, path: str, body: Any = None, **arguments: Any) -> requests.Response:
        if body is not None:
            arguments["json"] = body
        return requests.post(self.url + path, timeout=WAIT_S, **arguments)

    def embed(self, model: str, texts: list[str], **options: Any) -> requests.Response:
        return self.post("/embed", {"model": model, "texts": texts, "options": options})

    def vectors(self, model: str, texts: list[str], **options: Any) -> list[list[float]]:
        answer = self.embed(model, texts, **options)
        assert answer.status_code == 200, answer.text
        return answer.json()["vectors"]

    def status(self, model: str) -> dict[str, Any]:
        answer = self.get("/status")
        assert answer.status_code == 200, answer.text + self.log.read_text()
        return next(m for m in answer.json()["models"] if model in (m["model"], m["alias"]))

    def write_pool(self, *models: dict[str, Any]) -> None:
        """Write pool.yml as an editor would: by rename. JSON is YAML."""
        fresh = self.pool_yml.with_suffix(".new")
        fresh.write_text(json.dumps({"version": 1, "models": list(models)}))
        fresh.replace(self.pool_yml)

    def wait_ready(self) -> None:
        wait_until(lambda: self.get("/ready").status_code == 200)


def wait_until(condition: Callable[[], Any], seconds: float = WAIT_S) -> None:
    """Look again and again until the condition holds; fail after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        time.sleep(0.02)


def fake(model: str, **config: Any) -> dict[str, Any]:
    """An entry of pool.yml; scaling, queue, alias and enabled go to the entry, the rest to the fake driver."""
    entry = {key: config.pop(key) for key in ("alias", "enabled", "scaling", "queue") if key in config}
    return {"model": model, **entry, "driver": {"type": "fake", "config": config}}


@pytest.fixture(scope="session")
def graph_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Exported graphs, shared: an export takes ten seconds."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def make_server(tmp_path: Path, graph_cache: Path) -> Iterator[Callable[..., Server]]:
    """Initialised, not started. After the test no process of it is left."""
    made: list[Server] = []

    def make(name: str = "a", **environment: str) -> Server:
        folder = tmp_path / name
        folder.mkdir()
        server = Server(folder, {"EMBEDPOOL_PATHS__CACHE_DIR": str(graph_cache), **environment})
        server.cli("init")
        made.append(server)
        return server

    yield make
    for server in made:
        with contextlib.suppress(OSError, psutil.Error, ValueError):
            family = [server.process, *server.process.children(recursive=True)]
            for process in family:
                process.kill()
            psutil.wait_procs(family, timeout=10)


@pytest.fixture
def server(make_server: Callable[..., Server]) -> Server:
    return make_server()


@pytest.fixture(params=["gunicorn", "waitress"])
def kind(request: pytest.FixtureRequest) -> str:
    """Both servers."""
    return str(request.param)
