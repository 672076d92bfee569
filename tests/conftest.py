"""Every test: no leaked thread, no warning, no environment of the developer's."""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from embedpool.config import pool_yml
from embedpool.config.spec import ModelSpec, PoolSpec
from embedpool.drivers import make_driver, open_tokenizer
from embedpool.places import cores, open_place
from embedpool.pool.pool import Pool
from embedpool.pool.request import Call, Result
from embedpool.pool.settings import PoolSettings
from embedpool.tasks.driver import Driver, Folders, Place, Report, unheard
from embedpool.tasks.embed import Embed, EmbedOptions
from embedpool.tasks.item import Batch, Ids, Item
from embedpool.tasks.rows import Answer
from embedpool.tasks.tokenizer import Tokenizer

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

# Threads that live as long as the process: of libraries, and one that tends compiled graphs.
FOR_GOOD = ("tqdm", "TMonitor", "OpenVINO", "pytest_timeout", "tend-graphs")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="tests/chaos at full length, about an hour, and long tests")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--long"):
        for item in items:
            if item.get_closest_marker("long"):
                item.add_marker(pytest.mark.skip(reason="it is long; --long runs it"))


@pytest.fixture(autouse=True)
def _no_leaked_threads() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    leaked = []
    for thread in set(threading.enumerate()) - before:
        if type(thread).__name__ in FOR_GOOD or thread.name.startswith(FOR_GOOD):
            continue
        thread.join(10)
        if thread.is_alive():
            leaked.append(thread.name)
    assert not leaked, f"threads left behind: {leaked}"


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    """A test may configure the log of this process; the next captures what it asks for."""
    loggers = [logging.getLogger(), logging.getLogger("embedpool")]
    levels, handlers = [logger.level for logger in loggers], [*loggers[0].handlers]
    requests = logging.getLogger("embedpool.web.request_log")
    is_disabled = requests.disabled
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)
    loggers[0].handlers[:] = handlers
    requests.disabled = is_disabled


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("EMBEDPOOL_"):
            monkeypatch.delenv(name)


NOWHERE = Folders(Path(os.devnull, "cache"), Path(os.devnull, "state"))  # what cannot be kept is done without


def open_fake(spec: ModelSpec, memory: dict[str, Any] | None = None, report: Report = unheard) -> Place:
    """`open_place` as the server passes it to the pool, but that a test starts no Ray by the way."""
    spec = dataclasses.replace(spec, place="thread") if spec.place == "ray" else spec
    make = functools.partial(make_driver, spec, NOWHERE, {} if memory is None else memory)
    return open_place(spec, make, report=report, state_dir=NOWHERE.state)


def open_fake_tokenizer(spec: ModelSpec, report: Report = unheard) -> Tokenizer:
    """`open_tokenizer`, likewise."""
    return open_tokenizer(spec, NOWHERE)


@pytest.fixture(autouse=True)
def _all_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test lets this process use holds for this test alone."""
    monkeypatch.setattr(cores, "_most", None)


@pytest.fixture
def pool_settings() -> PoolSettings:
    """What the server gives the pool, with the shipped drivers."""
    return PoolSettings(open_fake, open_fake_tokenizer, request_timeout_s=20)


@pytest.fixture
def pool(pool_settings: PoolSettings) -> Iterator[Pool]:
    """An empty pool, stopped at the end."""
    made = Pool(pool_settings)
    yield made
    made.stop()


def open_here(driver: Any) -> Any:
    """Open a driver; `facts`, and the `reasons` for which it said that it was lost, stand on it for the test."""
    driver.reasons = []
    driver.facts = driver.open(driver.reasons.append)
    return driver


def ask(pool: Pool, model: str, *texts: str, **options: Any) -> Result:
    """The pool's answer to somebody who waits for 20 seconds."""
    return pool.submit(model, Embed(texts, EmbedOptions(**options)), Call(pool.clock(), 20))


def run(
    driver: Driver | Place, texts: Sequence[str], ids: Sequence[Ids] | None = None, options: Mapping[str, Any] = {}
) -> Answer:
    """What a driver makes of texts."""
    items = [Item((text,), 0, ids[i] if ids else None) for i, text in enumerate(texts)]
    return driver.run(Batch("embed", items, options))


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
        assert served.replicas.settled.wait(20)


def wait_until(condition: Callable[[], Any], looks: int = 1000) -> None:
    """Poll; nothing waits that long when all is well."""
    for _ in range(looks):
        if condition():
            return
        threading.Event().wait(0.01)
    raise AssertionError("the condition did not come true")
