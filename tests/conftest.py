"""Every test: no leaked thread, no warning, no environment of the developer's."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from embedpool.config import pool_yml
from embedpool.config.spec import PoolSpec
from embedpool.drivers import make_driver, open_meter
from embedpool.pool.pool import Pool
from embedpool.pool.replica_set import Engine

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

# Threads that libraries keep for good once used.
OF_LIBRARIES = ("tqdm", "TMonitor", "OpenVINO", "pytest_timeout")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="tests/chaos at full length, about an hour")


@pytest.fixture(autouse=True)
def _no_leaked_threads() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    leaked = []
    for thread in set(threading.enumerate()) - before:
        if type(thread).__name__ in OF_LIBRARIES or thread.name.startswith(OF_LIBRARIES):
            continue
        thread.join(10)
        if thread.is_alive():
            leaked.append(thread.name)
    assert not leaked, f"threads left behind: {leaked}"


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("EMBEDPOOL_"):
            monkeypatch.delenv(name)


def open_fake(spec, memory=None):
    """`open_driver` as the server passes it to the pool."""
    driver = make_driver(spec, Path())
    driver.memory = {} if memory is None else memory
    driver.open()
    return driver


@pytest.fixture
def engine() -> Engine:
    """What the server gives the pool, with the shipped drivers."""
    return Engine(open_fake, open_meter, request_timeout_s=20)


@pytest.fixture
def pool(engine: Engine) -> Iterator[Pool]:
    """An empty pool, stopped at the end."""
    made = Pool(engine)
    yield made
    made.stop()


def fake_pool_yml(*models: str) -> str:
    """The text of a pool.yml; each model is the inside of a flow mapping, completed by the fake driver."""
    lines = [f"  - {{{m}}}" if "driver" in m else f"  - {{{m}, driver: {{type: fake}}}}" for m in models]
    return "version: 1\nmodels:\n" + "\n".join(lines) + "\n" if lines else "version: 1\nmodels: []\n"


def fake_spec(*models: str) -> PoolSpec:
    """The PoolSpec of such a text."""
    return pool_yml.parse(fake_pool_yml(*models))


def settle(pool: Pool) -> None:
    """Wait for every model's first load."""
    for served in pool.models:
        assert served.wait_settled(20)
