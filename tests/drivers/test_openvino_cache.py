"""The cache of exported graphs; what a real one computes is in test_local_st."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedpool.config.spec import LocalStConfig
from embedpool.drivers import fidelity, openvino_cache
from embedpool.drivers.library import Library
from embedpool.drivers.local_st import LocalStDriver
from embedpool.drivers.openvino_cache import exported
from embedpool.drivers.openvino_graph import Compiled, import_openvino
from embedpool.drivers.packing import pack
from embedpool.errors import ModelFailed
from embedpool.tasks.rows import Rows
from tests.zoo import make

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("openvino") is None,  # not importorskip: a bare import starts OpenVINO's telemetry
    reason="openvino is not installed",
)


REAL_EXPORT = openvino_cache.export


class Exporting(Exception):
    """The graph was not in the cache."""


def refuse_to_export() -> None:
    raise Exporting


def graphs_of(folder: Path, cache_dir: Path, on_export: Callable[[], None] = refuse_to_export) -> Path:
    """The folder with the graphs of a model."""
    return exported(folder, LocalStConfig(), cache_dir, on_export)


@pytest.mark.usefixtures("openvino_driver")
def test_a_graph_is_exported_once(folder: Path, cache_dir: Path) -> None:
    """A graph in the cache is used without loading the model, by every replica and after every restart."""
    graphs = graphs_of(folder, cache_dir)
    assert (graphs / "model.bin").stat().st_size > 80_000_000  # float32, not compressed
    assert graphs_of(folder, cache_dir) == graphs
    assert list((cache_dir / "openvino").iterdir()) == [graphs]  # nothing temporary is left


@pytest.mark.usefixtures("openvino_driver")
def test_a_cache_that_may_only_be_read_is_used(folder: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as one in an image: that it was used cannot be noted there."""

    def refused(*_: Any) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "utime", refused)
    assert graphs_of(folder, cache_dir).is_dir()


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
    used = graphs_of(folder, cache_dir)
    os.utime(used, (0, 0))
    assert graphs_of(folder, cache_dir) == used
    openvino_cache._prune(graphs)
    assert {path.name for path in graphs.iterdir()} == {"graph", "export-at-work", used.name}
    for name in ("graph", "export-at-work"):
        shutil.rmtree(graphs / name)


@pytest.mark.usefixtures("openvino_driver")
def test_the_same_files_elsewhere_are_the_same_model(folder: Path, copied_folder: Path, cache_dir: Path) -> None:
    """A model that was moved, times and all, needs no new export."""
    assert graphs_of(copied_folder, cache_dir) == graphs_of(folder, cache_dir)


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
    with pytest.raises(Exporting):
        graphs_of(copied_folder, cache_dir)


@pytest.mark.usefixtures("openvino_driver")
@pytest.mark.parametrize(("what", "other"), [("version", lambda name: "99"), ("FORM", openvino_cache.FORM - 1)])
def test_another_version_exports_anew(
    folder: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch, what: str, other: object
) -> None:
    """A graph made by other versions of the libraries, or in another form, is not used."""
    monkeypatch.setattr(openvino_cache, what, other)
    with pytest.raises(Exporting):
        graphs_of(folder, cache_dir)


# --- with a model small enough to export it in each test


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("bert, mean", tmp_path_factory.mktemp("small"))


def export(small: Path, cache: Path) -> Path:
    return graphs_of(small, cache, lambda: None)


def test_a_graph_is_kept_and_computes(small: Path, tmp_path: Path) -> None:
    """What was exported gives float32 vectors, a row a text; one that was given out outlives the next run."""
    run = Compiled(export(small, tmp_path) / "model.xml", "float32", threads=1, streams=1)
    vectors = run(pack([[2, 7, 3], [2, 3]], 0))
    assert (vectors.dtype, vectors.shape) == (np.float32, (2, 32))
    before = vectors.copy()
    run(pack([[2, 9, 3]], 0))
    np.testing.assert_array_equal(vectors, before)


def test_no_reshape_of_a_graph_waits_to_be_told_a_shape(small: Path, tmp_path: Path) -> None:
    """Its inputs are known to be of one size; nor does a reshape to the same shape keep attention from fusing."""
    graph = import_openvino().Core().read_model(str(export(small, tmp_path) / "model.xml"))
    reshapes = [node for node in graph.get_ops() if node.get_type_name() == "Reshape"]
    attention = [node for node in graph.get_ops() if node.get_type_name() == "ScaledDotProductAttention"]
    assert {node.input_value(1).get_node().get_type_name() for node in reshapes} == {"Constant"}
    readers = [port.get_node() for node in attention for port in node.output(0).get_target_inputs()]
    assert {node.get_type_name() for node in readers} == {"Transpose"}


def test_a_graph_that_cannot_be_written_is_told_of_in_so_many_words(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OpenVINO's own words for a full disk tell nobody where it is; nothing is left there."""

    def refuse(model: Any, file: Path, **options: Any) -> None:
        file.parent.mkdir(exist_ok=True)
        file.write_text("a part")
        raise RuntimeError("basic_ios::clear: iostream error")

    monkeypatch.setattr("openvino.save_model", refuse)
    with pytest.raises(ModelFailed, match=f"the graph cannot be written to {tmp_path}"):
        export(small, tmp_path)
    assert list((tmp_path / "openvino").iterdir()) == []


def test_exporting_loads_no_torch_here(small: Path, tmp_path: Path) -> None:
    """It happens in a process of its own: the server stays as small as if the graph had been there."""
    code = (
        "import sys; from pathlib import Path; from embedpool.config.spec import LocalStConfig;"
        " from embedpool.drivers.openvino_cache import exported;"
        " print(exported(Path(sys.argv[1]), LocalStConfig(), Path(sys.argv[2]), lambda: None));"
        " sys.exit('torch' in sys.modules)"
    )
    command = [sys.executable, "-c", code, str(small), str(tmp_path)]
    found = subprocess.run(command, env=dict(os.environ), check=True, capture_output=True, text=True).stdout
    assert openvino_cache.is_whole(Path(found.strip()))


def test_an_export_that_dies_is_told_of(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when the system has no memory for it; nothing is left."""
    monkeypatch.setattr(openvino_cache, "export", REAL_EXPORT)
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with pytest.raises(ModelFailed, match="the process that exports it ended with exit code 1"):
        export(small, tmp_path)
    assert list((tmp_path / "openvino").iterdir()) == []


def test_a_graph_with_other_vectors_is_not_kept(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph that does not compute what encode gives is refused and leaves nothing in the cache."""
    monkeypatch.setattr(Library, "compute", lambda self, texts, **_: Rows(-np.ones((len(texts), 32), np.float32)))
    with pytest.raises(ModelFailed, match="others than those of encode"):
        export(small, tmp_path)
    assert list((tmp_path / "openvino").iterdir()) == []


def test_another_process_may_be_first(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When two processes export the same model, the one that comes second uses the first one's graph."""
    first: list[Path] = []
    real = fidelity.difference

    def meanwhile(*arguments: Any) -> Any:
        monkeypatch.setattr(fidelity, "difference", real)
        first.append(export(small, tmp_path))
        return real(*arguments)

    monkeypatch.setattr(fidelity, "difference", meanwhile)
    assert export(small, tmp_path) == first[0]
    assert list((tmp_path / "openvino").iterdir()) == first


def test_a_full_disk_is_not_hidden(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph that cannot be put in its place is an error, not a silent miss."""

    def rename(*arguments: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(openvino_cache.os, "rename", rename)
    with pytest.raises(OSError, match="no space"):
        export(small, tmp_path)


@pytest.mark.usefixtures("openvino_driver")
@pytest.mark.parametrize("damage", ["zeros", "empty", "gone", "unsigned"])
def test_a_damaged_graph_is_made_anew(folder: Path, cache_dir: Path, tmp_path: Path, damage: str) -> None:
    """As a power cut leaves it: such a file may still load, and give vectors of zeros."""
    whole = graphs_of(folder, cache_dir)
    copied = tmp_path / "openvino" / whole.name
    shutil.copytree(whole, copied)
    assert graphs_of(folder, tmp_path) == copied
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
        (copied / openvino_cache.HASHES).unlink()
    with pytest.raises(Exporting):
        graphs_of(folder, tmp_path)
    assert not copied.exists()
