"""The cache of exported graphs; what a real one computes is in test_local_st."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedpool.drivers import openvino_graph
from embedpool.drivers.local_st import LocalStDriver
from embedpool.drivers.openvino_graph import Pipeline, compiled, exported
from embedpool.drivers.tokenizer import pad
from embedpool.errors import ModelFailed

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("openvino") is None,  # not importorskip: a bare import starts OpenVINO's telemetry
    reason="openvino is not installed",
)


class Loaded(Exception):
    """The model was loaded, so the graph was not in the cache."""


def load_model() -> Any:
    raise Loaded


@pytest.mark.usefixtures("openvino_driver")
def test_a_graph_is_exported_once(folder: Path, cache_dir: Path) -> None:
    """A graph in the cache is used without loading the model, by every replica and after every restart."""
    graph = exported(folder, cache_dir, load_model)
    assert graph.is_file()
    assert graph.with_suffix(".bin").stat().st_size > 80_000_000  # float32, not compressed
    assert exported(folder, cache_dir, load_model) == graph
    assert [p.name for p in (cache_dir / "openvino").iterdir()] == [graph.parent.name]  # nothing temporary is left


@pytest.mark.usefixtures("openvino_driver")
def test_a_cache_that_may_only_be_read_is_used(folder: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as one in an image: that it was used cannot be noted there."""

    def refused(*_: Any) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "utime", refused)
    assert exported(folder, cache_dir, load_model).is_file()


def test_what_nobody_has_used_for_long_is_deleted(
    openvino_driver: LocalStDriver, folder: Path, cache_dir: Path
) -> None:
    """Graphs of older models, and what exports left that were cut off, go with the next export; the others stay."""
    graphs = cache_dir / "openvino"
    days = {"old-graph": 31, "graph": 29, "export-cut": 2, "export-at-work": 0}
    for name, age in days.items():
        (graphs / name).mkdir()
        (graphs / name / "model.bin").write_bytes(b"x")
        os.utime(graphs / name, (time.time() - age * 86400,) * 2)
    graph = exported(folder, cache_dir, load_model)
    os.utime(graph.parent, (0, 0))
    assert exported(folder, cache_dir, load_model) == graph
    openvino_graph._prune(graphs)
    assert {path.name for path in graphs.iterdir()} == {"graph", "export-at-work", graph.parent.name}
    for name in ("graph", "export-at-work"):
        shutil.rmtree(graphs / name)


@pytest.mark.usefixtures("openvino_driver")
def test_the_same_files_elsewhere_are_the_same_model(folder: Path, copied_folder: Path, cache_dir: Path) -> None:
    """A model that was moved, times and all, needs no new export."""
    assert exported(copied_folder, cache_dir, load_model) == exported(folder, cache_dir, load_model)


@pytest.mark.usefixtures("openvino_driver")
@pytest.mark.parametrize("change", ["content", "time", "new file", "removed file"])
def test_a_changed_model_is_exported_anew(copied_folder: Path, cache_dir: Path, change: str) -> None:
    """The graph of a model whose files have changed is not used."""
    file = copied_folder / "config.json"
    if change == "content":
        file.write_text(file.read_text() + " ")
    elif change == "time":
        os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))
    elif change == "new file":
        (copied_folder / "1_Pooling" / "more.json").write_text("{}")
    else:
        (copied_folder / "data_config.json").unlink()
    with pytest.raises(Loaded):
        exported(copied_folder, cache_dir, load_model)


def test_another_version_of_a_library_exports_anew(
    openvino_driver: LocalStDriver, folder: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph made by other versions of the libraries is not used."""
    monkeypatch.setattr(openvino_graph, "version", lambda name: "99")
    with pytest.raises(Loaded):
        exported(folder, cache_dir, load_model)


def test_openvino_reports_nothing_over_the_network() -> None:
    """OpenVINO's telemetry, which would report each import, is never loaded; its converter works without it."""
    code = (
        "import sys; from embedpool.drivers import openvino_graph as graph; graph._openvino().convert_model;"
        " sys.exit(sys.modules.get('openvino_telemetry') is not None)"
    )
    assert subprocess.run([sys.executable, "-c", code], env=dict(os.environ), check=False).returncode == 0


# --- with a graph small enough to make for each test: a vector is (tokens of the text, 1)


class Tiny:
    """Stands for a SentenceTransformer; `second` is the second number of encode's vectors."""

    def __init__(self, second: float = 1.0) -> None:
        self._second = second

    class tokenizer:
        pad_token_id = 0

        def __new__(cls, text: str) -> Any:
            return {"input_ids": [1] * len(text.split())}

    def encode(self, texts: list[str], **arguments: Any) -> Any:
        return np.array([[len(text.split()), self._second] for text in texts])


def tiny_graph(model: Any) -> Any:
    openvino = openvino_graph._openvino()
    from openvino import opset13 as ops

    mask = ops.parameter([-1, -1], np.int64, name="attention_mask")
    mask.output(0).tensor.set_names({"attention_mask"})
    length = ops.reduce_sum(ops.convert(mask, "f32"), np.array([1]), keep_dims=True)
    one = ops.divide(length, length)
    return openvino.Model([ops.result(ops.concat([length, one], 1))], [mask], "tiny")


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose model converts to the tiny graph."""
    monkeypatch.setattr(openvino_graph, "_convert", tiny_graph)
    folder = tmp_path / "small"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


def test_a_graph_is_kept_and_computes(small: Path, tmp_path: Path) -> None:
    """What was exported gives float32 vectors, a row a text; inputs that the graph has not are left out."""
    run = compiled(exported(small, tmp_path / "cache", Tiny), "float32", threads=1, streams=1)
    vectors = run(pad([[1, 1, 1], [1]], 0))
    assert vectors.dtype == np.float32
    np.testing.assert_array_equal(vectors, [[3, 1], [1, 1]])


def test_a_batch_that_runs_alone_has_all_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lone batch runs on all cores; one beside it on its own. Of a large model, whose copy costs, each on its own."""
    seen: list[int] = []

    def fake(graph: Path, dtype: str, *, threads: int, streams: int) -> Any:
        def run(inputs: dict[str, Any]) -> None:
            seen.append(threads // streams)
            for inner in inputs.values():  # a batch that begins meanwhile
                pipeline(inner)

        return run

    monkeypatch.setattr(openvino_graph, "compiled", fake)
    graph = tmp_path / "model.xml"
    graph.with_suffix(".bin").write_bytes(b"12345")
    pipeline = Pipeline(graph, "float32", 4)
    pipeline({"meanwhile": {}})
    pipeline({})
    assert seen == [4, 1, 4]
    assert pipeline.cores_alone == "all"
    monkeypatch.setattr(openvino_graph, "COMPILED_TWICE_BYTES", 4)
    seen.clear()
    large = Pipeline(graph, "float32", 4)
    large({})
    assert (seen, large.cores_alone) == ([1], "one")


def test_an_answer_outlives_the_next_run(small: Path, tmp_path: Path) -> None:
    """Vectors given out are not written over by the next batch."""
    run = compiled(exported(small, tmp_path / "cache", Tiny), "float32", threads=1, streams=1)
    first = run(pad([[1, 1, 1]], 0))
    run(pad([[1]], 0))
    np.testing.assert_array_equal(first, [[3, 1]])


def test_a_graph_that_cannot_be_written_is_told_of_in_so_many_words(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OpenVINO's own words for a full disk tell nobody where it is; nothing is left there."""

    def refuse(model: Any, file: Path, **options: Any) -> None:
        file.parent.mkdir()
        file.write_text("a part")
        raise RuntimeError("basic_ios::clear: iostream error")

    monkeypatch.setattr("openvino.save_model", refuse)
    with pytest.raises(ModelFailed, match=f"the graph cannot be written to {tmp_path / 'cache'}"):
        exported(small, tmp_path / "cache", Tiny)
    assert list((tmp_path / "cache" / "openvino").iterdir()) == []


def test_a_graph_with_other_vectors_is_not_kept(small: Path, tmp_path: Path) -> None:
    """A graph that does not compute what encode gives is refused and leaves nothing in the cache."""
    with pytest.raises(ModelFailed, match="cosine"):
        exported(small, tmp_path / "cache", lambda: Tiny(second=-100.0))
    assert list((tmp_path / "cache" / "openvino").iterdir()) == []


def test_another_process_may_be_first(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When two processes export the same model, the one that comes second uses the first one's graph."""
    first: list[Path] = []
    real = openvino_graph._compare

    def meanwhile(*arguments: Any) -> None:
        real(*arguments)
        monkeypatch.setattr(openvino_graph, "_compare", real)
        first.append(exported(small, tmp_path / "cache", Tiny))

    monkeypatch.setattr(openvino_graph, "_compare", meanwhile)
    assert exported(small, tmp_path / "cache", Tiny) == first[0]
    assert [p.name for p in (tmp_path / "cache" / "openvino").iterdir()] == [first[0].parent.name]


def test_a_full_disk_is_not_hidden(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph that cannot be put in its place is an error, not a silent miss."""

    def rename(*arguments: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(openvino_graph.os, "rename", rename)
    with pytest.raises(OSError, match="no space"):
        exported(small, tmp_path / "cache", Tiny)


@pytest.mark.usefixtures("openvino_driver")
@pytest.mark.parametrize("damage", ["zeros", "empty", "gone", "unsigned"])
def test_a_damaged_graph_is_made_anew(folder: Path, cache_dir: Path, tmp_path: Path, damage: str) -> None:
    """As a power cut leaves it: such a file may still load, and give vectors of zeros."""
    whole = exported(folder, cache_dir, load_model)
    copied = tmp_path / "openvino" / whole.parent.name
    shutil.copytree(whole.parent, copied)
    assert exported(folder, tmp_path, load_model) == copied / "model.xml"
    weights = copied / "model.bin"
    if damage == "zeros":
        with weights.open("r+b") as file:
            file.seek(1_000_000)
            file.write(bytes(1000))
    elif damage == "empty":
        weights.write_bytes(b"")
    elif damage == "gone":
        weights.unlink()
    else:
        (copied / openvino_graph.HASHES).unlink()
    with pytest.raises(Loaded):
        exported(folder, tmp_path, load_model)
    assert not copied.exists()
