"""The Flask app over a real pool of fake models, reconciled from a pool.yml of its own."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flask import Flask
from werkzeug.test import TestResponse

from embedpool.config.pool_yml import PoolFile
from embedpool.config.settings import Settings
from embedpool.config.spec import FakeConfig
from embedpool.drivers.fake import FakeDriver, FakeTokenizer
from embedpool.pool.pool import Pool
from embedpool.pool.settings import PoolSettings
from embedpool.reconcile import Reconciler
from embedpool.web.app import create_app
from embedpool.web.metrics import Metrics
from tests.conftest import fake_pool_yml, open_fake, run, settle

NAME = "org/team/m"
MODEL = f"model: {NAME}, alias: m"
DEFAULTS = Settings()


@dataclasses.dataclass
class Web:
    """A running app without a socket."""

    pool: Pool
    reconciler: Reconciler
    pool_yml: Path
    app: Flask
    metrics: Metrics

    def get(self, path: str, **arguments: Any) -> TestResponse:
        return self.app.test_client().get(path, **{"buffered": True, **arguments})

    def post(self, path: str, body: Any = None, **arguments: Any) -> TestResponse:
        sent = {"json": body} if body is not None else {}
        return self.app.test_client().post(path, **{"buffered": True, **sent, **arguments})

    def delete(self, path: str, **arguments: Any) -> TestResponse:
        return self.app.test_client().delete(path, **{"buffered": True, **arguments})

    def embed(self, *texts: str, model: str = "m", headers: Any = None, **options: Any) -> TestResponse:
        return self.post("/embed", {"model": model, "texts": list(texts), "options": options}, headers=headers)

    def vectors(self, *texts: str, model: str = "m", **options: Any) -> np.ndarray:
        answer = self.embed(*texts, model=model, **options)
        assert answer.status_code == 200, answer.text
        return np.array(answer.json["vectors"])

    def status(self, model: str) -> dict[str, Any]:
        return next(m for m in self.get("/status").json["models"] if model in (m["model"], m["alias"]))


@contextlib.contextmanager
def serving(folder: Path, pool_settings: PoolSettings, *models: str, settings: Settings = DEFAULTS) -> Iterator[Web]:
    """An app whose models (see fake_pool_yml) have begun to load."""
    settings = dataclasses.replace(settings)
    object.__setattr__(settings, "base_dir", folder)  # not the developer's
    pool_yml = folder / "pool.yml"
    pool_yml.write_text(fake_pool_yml(*models))
    metrics = Metrics()
    pool_settings = dataclasses.replace(pool_settings, observer=metrics)
    pool = Pool(pool_settings, max_inflight_global=settings.defaults.max_inflight_global)
    reconciler = Reconciler(PoolFile(pool_yml), pool, load_timeout_s=20)
    try:
        reconciler.reload("start")
        yield Web(pool, reconciler, pool_yml, create_app(pool, reconciler, settings, metrics), metrics)
    finally:
        pool.stop()


MakeWeb = Callable[..., Web]


@pytest.fixture
def make_web(tmp_path: Path, pool_settings: PoolSettings) -> Iterator[MakeWeb]:
    """Apps to measure; `wait=False` does not wait for the first loads, the pool's settings may be replaced."""
    with contextlib.ExitStack() as stack:

        def make(*models: str, wait: bool = True, settings: Settings = DEFAULTS, **replaced: Any) -> Web:
            web = stack.enter_context(
                serving(tmp_path, dataclasses.replace(pool_settings, **replaced), *models, settings=settings)
            )
            if wait:
                settle(web.pool)
            return web

        yield make


@pytest.fixture
def web(make_web: MakeWeb) -> Web:
    """One ready model, org/team/m, alias m, with a prompt named query."""
    return make_web(MODEL + ", driver: {type: fake, config: {prompts: {query: 'find: '}}}")


class Gate:
    """Holds models in their load, or batches in their run, until it is opened."""

    def __init__(self) -> None:
        self.opened = threading.Event()
        self.reached = threading.Event()

    def _wait(self) -> None:
        self.reached.set()
        assert self.opened.wait(20)

    def load(self, spec: Any, memory: Any, report: Any) -> Any:
        """An `open_place` that waits."""
        self._wait()
        return open_fake(spec)

    def run(self, spec: Any, memory: Any, report: Any) -> Any:
        """An `open_place` whose batches wait."""
        place = open_fake(spec)
        run = place.run

        def waiting(batch: Any) -> Any:
            self._wait()
            return run(batch)

        place.run = waiting
        return place


@pytest.fixture
def gate() -> Iterator[Gate]:
    made = Gate()
    yield made
    made.opened.set()


def raw(*texts: str, **config: Any) -> np.ndarray:
    """What the fake driver makes of the texts, not normalised."""
    return run(FakeDriver(FakeConfig(**config)), texts, FakeTokenizer().encode(texts)).rows.values


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def refused(response: TestResponse, status: int, code: str) -> dict[str, Any]:
    """The error, once it is known to have the one shape of the contract."""
    assert response.status_code == status, response.text
    assert response.mimetype == "application/json"
    assert set(response.json) == {"error"}
    error: dict[str, Any] = response.json["error"]
    assert set(error) - {"fields"} == {"code", "message", "request_id"}
    assert error["code"] == code
    assert error["message"]
    assert error["request_id"] == response.headers["X-Request-Id"]
    return error
