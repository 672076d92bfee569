"""Servers that are broken on purpose: short in `make test`, at full length with `--long`, and the figures of that."""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import psutil
import pytest

from tests.live.conftest import COMMAND, WAIT_S, Server, graph_cache, kind, make_server, server, wait_until

__all__ = ["graph_cache", "kind", "make_server", "server"]

README = Path(__file__).with_name("README.md")
START, END = "<!-- figures -->\n", "<!-- /figures -->"
LONGEST_S = 3600
passed: dict[str, str] = {}  # test → its figures


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker("live")
            if config.getoption("long"):
                item.add_marker(pytest.mark.timeout(LONGEST_S))


@pytest.fixture
def length(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """`length(short=…, long=…)`: the one of the two that this run is about."""
    is_long = request.config.getoption("long")
    return lambda *, short, long: long if is_long else short


class Figures(Protocol):
    def __call__(self, name: str, value: object) -> None: ...


@pytest.fixture
def figures(request: pytest.FixtureRequest) -> Figures:
    """`figures("kills", 500)`: what the table in README.md says of this test after `make chaos`."""
    return lambda name, value: request.node.user_properties.append((name, value))


@pytest.fixture
def rng(request: pytest.FixtureRequest, figures: Figures) -> random.Random:
    """Follows from the seed that pytest prints and takes: `--randomly-seed=N`."""
    seed = request.config.getoption("randomly_seed")
    figures("seed", seed)
    return random.Random(f"{seed} {request.node.name}")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" and report.passed and report.nodeid.startswith("tests/chaos/"):
        name = report.nodeid.partition("::")[2]
        passed[name] = ", ".join(f"{key} {value}" for key, value in report.user_properties)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if session.config.getoption("long") and passed:
        README.write_text(with_figures(README.read_text(), passed))


def with_figures(page: str, found: dict[str, str]) -> str:
    """The page with the rows of these tests written anew between its markers."""
    before, rest = page.split(START)
    table, after = rest.split(END)
    rows = dict(line.strip("| ").split(" | ", 1) for line in table.splitlines()[2:])
    rows.update({f"`{name}`": said for name, said in found.items()})
    lines = ["| test | figures |", "|---|---|", *(f"| {name} | {rows[name]} |" for name in sorted(rows))]
    return f"{before}{START}{chr(10).join(lines)}\n{END}{after}"


def quantile(values: list[float], share: float) -> float:
    return sorted(values)[int(share * (len(values) - 1))]


@contextlib.contextmanager
def foreground(server: Server, kind: str, *before: str, **arguments: Any) -> Iterator[subprocess.Popen[bytes]]:
    """The server as a child of this process, answering; `before` stands before the command. Killed at the end."""
    command = [*before, str(COMMAND), "pool", "start", "--server", kind, "--port", "0"]
    with server.log.open("ab") as log:
        child = subprocess.Popen(
            command,
            cwd=server.folder,
            env=server.environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
            **arguments,
        )
    try:
        wait_until(lambda: child.poll() is not None or answers(server, child.pid))
        assert child.poll() is None, server.log.read_text()
        yield child
    finally:
        kill(child)


def answers(server: Server, pid: int) -> bool:
    """Whether the server with this pid has begun to serve."""
    try:
        return server.pid == pid and server.get("/health").status_code == 200
    except (OSError, ValueError):  # no pid file yet, or nobody at its address
        return False


def kill(child: subprocess.Popen[bytes]) -> None:
    """kill -9 of the whole server at once: gunicorn's master and its workers share a process group."""
    with contextlib.suppress(ProcessLookupError):
        family = psutil.Process(child.pid).children(recursive=True) if child.poll() is None else []
        os.killpg(child.pid, 9)
        wait_until(lambda: all(is_over(process) for process in family))
    child.wait(WAIT_S)


def is_over(process: psutil.Process) -> bool:
    """Also if its new parent, whoever that is, has not asked for its exit code yet."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
