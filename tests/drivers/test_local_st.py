"""A local SentenceTransformer, with the real MiniLM."""

from __future__ import annotations

import gc
import re
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedpool.config.spec import DriverSpec, LocalStConfig, ModelSpec, Scaling
from embedpool.drivers import local_st, make_driver, open_tokenizer, openvino_cache, openvino_graph, torch_run
from embedpool.drivers.layout import Layout
from embedpool.drivers.library import Library
from embedpool.drivers.local_st import LocalStDriver
from embedpool.drivers.packing import pack
from embedpool.drivers.pipeline import Pipeline
from embedpool.drivers.space import of_files
from embedpool.drivers.tokenizer import FolderTokenizer
from embedpool.errors import ModelFailed
from embedpool.places.cores import available_cores
from embedpool.tasks.driver import Folders
from embedpool.tasks.item import Batch
from embedpool.tasks.rows import Rows
from tests.conftest import NOWHERE, open_here, run
from tests.drivers.conftest import MINILM, TEXTS, cached_in, cosines


def ids_of(tokenizer: FolderTokenizer, texts: list[str], limit: int | None = None) -> list[list[int]]:
    """As the door makes them."""
    limit = limit or tokenizer.default_max_tokens or 0
    return [tokenizer.cut(i, limit, "right") for i in tokenizer.encode(texts)]


def test_vectors_are_those_of_encode(driver: LocalStDriver, tokenizer: FolderTokenizer, expected: np.ndarray) -> None:
    """Vectors of token ids equal SentenceTransformer.encode on every kind of text, long ones included."""
    vectors = run(driver, TEXTS, ids_of(tokenizer, TEXTS)).rows.values
    assert vectors.dtype == np.float32
    assert vectors.shape == expected.shape == (len(TEXTS), 384)
    assert cosines(vectors, expected).min() >= 0.99999


def test_the_runtime_does_not_part_spaces(
    torch_driver: LocalStDriver, openvino_driver: LocalStDriver, folder: Path
) -> None:
    """Nor does the dtype it computes in: the space is that of the model's files."""
    assert torch_driver.facts.space == openvino_driver.facts.space == of_files(folder, "embed")


def test_vectors_do_not_depend_on_their_batch(
    driver: LocalStDriver, tokenizer: FolderTokenizer, expected: np.ndarray
) -> None:
    """A text has the same vector alone, with others, and padded beside a long one."""
    order = list(reversed(range(len(TEXTS))))
    shuffled = [TEXTS[i] for i in order]
    assert cosines(run(driver, shuffled, ids_of(tokenizer, shuffled)).rows.values, expected[order]).min() >= 0.99999
    for i in (0, 2, 12, len(TEXTS) - 1):
        alone = run(driver, [TEXTS[i]], ids_of(tokenizer, [TEXTS[i]])).rows.values
        assert cosines(alone, expected[[i]]).min() >= 0.99999


def test_without_ids_the_texts_are_tokenized(driver: LocalStDriver, expected: np.ndarray) -> None:
    """A driver can be given texts alone."""
    assert cosines(run(driver, TEXTS[:4]).rows.values, expected[:4]).min() >= 0.99999


def test_longer_texts_than_the_models_default(
    driver: LocalStDriver, tokenizer: FolderTokenizer, reference: Any
) -> None:
    """A request may raise max_seq_length up to the model's positions, and gets what the model makes of that much."""
    own, reference.max_seq_length = reference.max_seq_length, 512
    try:
        expected = reference.encode(TEXTS[-2:], show_progress_bar=False)
    finally:
        reference.max_seq_length = own
    assert cosines(run(driver, TEXTS[-2:], ids_of(tokenizer, TEXTS[-2:], 512)).rows.values, expected).min() >= 0.99999


def test_as_many_threads_as_it_says_may_run_it(
    openvino_driver: LocalStDriver, tokenizer: FolderTokenizer, expected: np.ndarray
) -> None:
    """Batches that run at once in one OpenVINO model do not disturb each other's vectors."""

    def closeness(i: int) -> np.ndarray:
        part = TEXTS[i : i + 5]
        return cosines(run(openvino_driver, part, ids_of(tokenizer, part)).rows.values, expected[i : i + 5])

    with ThreadPoolExecutor(max(openvino_driver.facts.slots, 2)) as threads:
        assert min(c.min() for c in threads.map(closeness, range(0, 30, 2))) >= 0.99999


@pytest.mark.usefixtures("openvino_driver")  # its graph is in the cache
def test_a_second_copy_for_lone_batches_gives_the_same_vectors(cache_dir: Path, tokenizer: FolderTokenizer) -> None:
    """As the first, which runs them until there is one."""
    (file,) = cache_dir.rglob("model.xml")
    graph = openvino_graph.Graph(file, "float32", 2)
    inputs = pack(ids_of(tokenizer, TEXTS[2:6]), tokenizer.pad_id)
    first, *_ = (graph(inputs) for _ in range(openvino_graph.LONE_BATCHES))
    assert graph.copy_for_lone_batches(time.monotonic())
    np.testing.assert_allclose(graph(inputs), first, atol=1e-6)


def test_a_loaded_driver_tells_what_runs_where(torch_driver: LocalStDriver, openvino_driver: LocalStDriver) -> None:
    """/status can show backend, arithmetic, device and dimension; torch runs one batch at once, OpenVINO one a core."""
    for driver, backend in ((torch_driver, "torch"), (openvino_driver, "openvino")):
        shown = driver.facts.description
        assert (shown["backend"], shown["compute_dtype"], shown["device"], shown["dim"]) == (
            backend,
            "float32",
            "cpu",
            384,
        )
    assert torch_driver.facts.slots == 1
    assert openvino_driver.facts.slots == available_cores()


@pytest.mark.parametrize("bears_it", [True, False])
def test_weights_are_prepacked_where_that_is_faster(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tokenizer: FolderTokenizer,
    expected: np.ndarray,
    bears_it: bool,
) -> None:
    """torch's weights are laid out for oneDNN where a layer is measured to gain by it; vectors stay those of encode,
    also of a model that does not bear it."""

    def spoil(modules: Any) -> None:
        for module in modules:
            for parameter in module.parameters():
                parameter.data.neg_()

    monkeypatch.setattr(torch_run, "PREPACKED_LEAST_GAIN", 0.0)
    if not bears_it:
        monkeypatch.setattr(torch_run, "prepack", spoil)
    driver = LocalStDriver(MINILM, LocalStConfig(backend="torch"), 1, cached_in(tmp_path))
    open_here(driver)
    assert ("prepacked" in driver.facts.description) is bears_it
    assert cosines(run(driver, TEXTS, ids_of(tokenizer, TEXTS)).rows.values, expected).min() >= 0.99999
    driver.close()


@pytest.mark.usefixtures("openvino_driver")  # its graph is in the cache
@pytest.mark.parametrize(("least_gain", "dtype"), [(0.0, "bfloat16"), (1e9, "float32")])
def test_profile_fast_takes_bfloat16_where_it_is_faster_and_names_its_cost(
    cache_dir: Path, monkeypatch: pytest.MonkeyPatch, least_gain: float, dtype: str
) -> None:
    """`profile: fast` is a measurement, not a hope: what it found, and the cosine it costs, stand in /status."""
    monkeypatch.setattr(local_st, "FAST_LEAST_GAIN", least_gain)
    driver = LocalStDriver(MINILM, LocalStConfig(backend="openvino", profile="fast"), 1, cached_in(cache_dir))
    open_here(driver)
    assert driver.facts.description["compute_dtype"] == dtype
    assert re.search(
        r"bfloat16 is [\d.]+ times as fast here, at a cosine to float32 of [01]\.\d{6}", str(driver.facts.description)
    )
    driver.close()


@pytest.mark.usefixtures("openvino_driver")  # its graph is in the cache
def test_bfloat16_is_close(cache_dir: Path, tokenizer: FolderTokenizer, expected: np.ndarray) -> None:
    """`compute_dtype: bfloat16` trades little: cosine of 0.999 and more."""
    driver = LocalStDriver(MINILM, LocalStConfig(backend="openvino", compute_dtype="bfloat16"), 1, cached_in(cache_dir))
    open_here(driver)
    vectors = run(driver, TEXTS, ids_of(tokenizer, TEXTS)).rows.values
    driver.close()
    assert cosines(vectors, expected).min() >= 0.999


@pytest.mark.parametrize("backend", ["torch", "openvino", "auto"])
def test_more_tokens_than_positions_are_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    """A max_seq_length above the model's positions is refused before anything is loaded."""
    monkeypatch.setattr(LocalStDriver, "_load", lambda *_: pytest.fail("loaded"))
    driver = LocalStDriver(MINILM, LocalStConfig(backend=backend, max_seq_length=513), 1, cached_in(tmp_path))
    with pytest.raises(ModelFailed, match="512"):
        open_here(driver)


class Watched(LocalStDriver):
    """Remembers the library it made, without keeping it."""

    def _library(self, layout: Layout, backend: str, dtype: str) -> Library:
        library = super()._library(layout, backend, dtype)
        self.library = weakref.ref(library)
        return library


def test_close_gives_the_weights_back(folder: Path, tmp_path: Path) -> None:
    """A closed driver holds no weights; opened anew it serves again."""
    driver = Watched(MINILM, LocalStConfig(backend="torch"), 1, cached_in(tmp_path))
    for _ in range(2):
        open_here(driver)
        library = driver.library
        driver.close()
        gc.collect()
        assert library() is None


class Ones(Pipeline):
    """Gives the same vector for each text."""

    def __init__(self, tokenizer: FolderTokenizer, value: float = 1.0) -> None:
        super().__init__(tokenizer)
        self._value = value

    def run(self, batch: Batch) -> Any:
        values = np.full((len(batch.items), 3), self._value, np.float32)
        return Rows(values, np.arange(len(values) + 1)) if batch.task == "tokens" else Rows(values)


def on_torch(value: float = 1.0) -> Any:
    """In the place of LocalStDriver._on_torch."""
    return lambda self, layout, tokenizers, backend: {r: Ones(t, value) for r, t in tokenizers.items()}


@pytest.mark.parametrize(
    ("error", "why"),
    [(ImportError("openvino is not installed"), "not installed"), (RuntimeError("no such operation"), "no such")],
)
def test_auto_falls_back_to_torch_and_says_why(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, why: str
) -> None:
    """`backend: auto` serves with torch where OpenVINO is missing or cannot run the model; asked for, it is refused."""

    def exported(*arguments: Any) -> Path:
        raise error

    monkeypatch.setattr(openvino_cache, "exported", exported)
    monkeypatch.setattr(local_st.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(local_st, "find_model_folder", lambda *_: folder)
    monkeypatch.setattr(LocalStDriver, "_on_torch", on_torch())
    driver = LocalStDriver(MINILM, LocalStConfig(), 1, cached_in(tmp_path))
    open_here(driver)
    assert driver.facts.description["backend"] == "torch"
    assert why in str(driver.facts.description["why"])
    with pytest.raises(type(error)):
        open_here(LocalStDriver(MINILM, LocalStConfig(backend="openvino"), 1, cached_in(tmp_path)))


def test_vectors_that_are_not_finite_do_not_open(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that gives NaN for a plain sentence is refused when it loads."""

    monkeypatch.setattr(LocalStDriver, "_on_torch", on_torch(np.nan))
    with pytest.raises(ModelFailed, match="not finite"):
        open_here(LocalStDriver(MINILM, LocalStConfig(backend="torch"), 1, cached_in(tmp_path)))


@pytest.mark.parametrize(
    ("by_ids", "says"),
    [(RuntimeError("I want pixels"), "RuntimeError: I want pixels"), (np.ones, "are others than those of encode")],
)
def test_a_model_that_cannot_be_fed_ids_is_run_by_encode(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: np.ndarray, by_ids: Any, says: str
) -> None:
    """Where token ids do not give encode's vectors, encode itself is used, and /status says why."""

    def by_its_ids(inputs: dict[str, Any], read: Any) -> Any:
        if isinstance(by_ids, Exception):
            raise by_ids
        return read(np.asarray(by_ids((len(inputs["input_ids"]), 384)), np.float32))

    monkeypatch.setattr(torch_run, "torch_run", lambda *_, **__: by_its_ids)
    driver = LocalStDriver(MINILM, LocalStConfig(backend="torch"), 1, cached_in(tmp_path))
    open_here(driver)
    assert says in str(driver.facts.description["by_encode"])
    assert cosines(run(driver, TEXTS).rows.values, expected).min() >= 0.99999
    driver.close()


def test_the_table_knows_it(folder: Path, tmp_path: Path) -> None:
    """A spec of type local_st gives this driver, its cores shared out among the replicas, and the model's tokenizer."""
    spec = ModelSpec(MINILM, DriverSpec("local_st", LocalStConfig()), scaling=Scaling(max=64))
    driver = make_driver(spec, Folders(tmp_path, tmp_path), {})
    assert isinstance(driver, LocalStDriver)
    assert driver._cores == 1
    assert open_tokenizer(spec, NOWHERE).encode([""]) == [[101, 102]]
