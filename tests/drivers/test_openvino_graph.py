"""How graphs run; what a real one computes is in test_local_st."""

from __future__ import annotations

import importlib.util
import mmap
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedpool.drivers import openvino_graph
from embedpool.drivers.openvino_graph import Graph, graph_of
from embedpool.drivers.pipeline import copied

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("openvino") is None,  # not importorskip: a bare import starts OpenVINO's telemetry
    reason="openvino is not installed",
)


def test_openvino_reports_nothing_over_the_network() -> None:
    """OpenVINO's telemetry, which would report each import, is never loaded; its converter works without it."""
    code = (
        "import sys; from embedpool.drivers import openvino_graph as graph; graph.import_openvino().convert_model;"
        " sys.exit(sys.modules.get('openvino_telemetry') is not None)"
    )
    assert subprocess.run([sys.executable, "-c", code], env=dict(os.environ), check=False).returncode == 0


class FakeCompiled:
    """In the place of Compiled: gives the cores of a batch, and calls what is to happen meanwhile."""

    def __init__(self, graph: Path, dtype: str, *, threads: int, streams: int, output: int = 0) -> None:
        self.cores = threads // streams
        self.inputs = ["input_ids"]
        self.gave_back = 0
        self.outputs = 2

    def __call__(self, inputs: dict[str, Any], read: Any) -> int:
        if "meanwhile" in inputs:
            inputs["meanwhile"]()
        return self.cores

    def give_back(self) -> None:
        self.gave_back += 1


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The graph of five bytes of weights, which FakeCompiled runs."""
    monkeypatch.setattr(openvino_graph, "Compiled", FakeCompiled)
    graph = tmp_path / "model.xml"
    graph.with_suffix(".bin").write_bytes(b"12345")
    return graph


def batch_of(tokens: int, **more: Any) -> dict[str, Any]:
    return {"input_ids": np.ones((1, tokens)), **more}


def cores_of_lone_batches(graph: Graph) -> list[int]:
    """Of enough of them for a second copy."""
    return [graph(batch_of(1)) for _ in range(openvino_graph.LONE_BATCHES)]


def test_where_batches_often_run_alone_they_have_all_cores(weights: Path) -> None:
    """One beside it has its own. Of a large model, whose copy costs, each has its own."""
    graph = Graph(weights, "float32", 4)
    assert set(cores_of_lone_batches(graph)) == {1}
    assert graph.copy_for_lone_batches(time.monotonic())
    beside: list[int] = []
    assert graph(batch_of(1, meanwhile=lambda: beside.append(graph(batch_of(1))))) == 4
    assert (beside, graph(batch_of(1)), graph.cores_alone) == ([1], 4, "all")
    large = Graph(weights, "float32", 4, most_twice_bytes=4)
    cores_of_lone_batches(large)
    assert not large.copy_for_lone_batches(time.monotonic())
    assert (large(batch_of(1)), large.cores_alone) == (1, "one")


def test_a_copy_waits_for_lone_batches_and_goes_when_there_are_none(weights: Path) -> None:
    """Batches that run beside others are not worth one; and it does not go while one runs."""
    graph = Graph(weights, "float32", 4)
    graph(batch_of(1, meanwhile=lambda: cores_of_lone_batches(graph)))
    assert not graph.copy_for_lone_batches(time.monotonic())
    cores_of_lone_batches(graph)
    assert graph.copy_for_lone_batches(time.monotonic())
    assert not graph.copy_for_lone_batches(time.monotonic())
    later_s = time.monotonic() + 2 * openvino_graph.LONE_REST_S
    early: list[bool] = []
    assert graph(batch_of(1, meanwhile=lambda: early.append(graph.copy_for_lone_batches(later_s)))) == 4
    assert early == [False]
    assert graph.copy_for_lone_batches(later_s)
    assert graph(batch_of(1)) == 1
    assert not graph.copy_for_lone_batches(later_s)


def test_a_copy_is_made_at_once(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What tends the graphs is told, and need not look first."""
    told: list[Path] = []
    monkeypatch.setattr(openvino_graph._TENDS_NOW, "set", lambda: told.append(weights))
    cores_of_lone_batches(Graph(weights, "float32", 4, most_twice_bytes=4))
    assert told == []
    cores_of_lone_batches(Graph(weights, "float32", 4))
    assert told == [weights]


def test_a_copy_that_fails_is_tried_again(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After as many lone batches; meanwhile they run as before."""
    graph = Graph(weights, "float32", 4)
    cores_of_lone_batches(graph)

    def fails(*_: Any, **__: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(openvino_graph, "Compiled", fails)
    assert not openvino_graph._tended(graph)
    monkeypatch.setattr(openvino_graph, "Compiled", FakeCompiled)
    assert not openvino_graph._tended(graph)
    assert set(cores_of_lone_batches(graph)) == {1}
    assert openvino_graph._tended(graph)
    assert graph(batch_of(1)) == 4


def test_what_is_compiled_twice_is_bounded_in_all(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second of two models of five bytes finds no room for its copy, until the first is gone.

    A model in another type takes the place of the first: while it is tried which is faster, there are both.
    """
    others = {each.file: each.twice_bytes for each in openvino_graph._GRAPHS.values()}
    monkeypatch.setattr(openvino_graph, "COMPILED_TWICE_BYTES", sum(others.values()) + 9)
    another = weights.with_name("another.xml")
    another.with_suffix(".bin").write_bytes(b"12345")
    first, lossy = graph_of(weights, "float32", 2), graph_of(weights, "bfloat16", 2)
    second = graph_of(another, "float32", 2)
    assert [first.cores_alone, lossy.cores_alone, second.cores_alone] == ["all", "all", "one"]
    del first, lossy, second
    assert graph_of(another, "float32", 2).cores_alone == "all"


@pytest.mark.skipif(sys.platform != "linux", reason="no /proc")
def test_a_mapped_file_is_let_go_of(tmp_path: Path) -> None:
    """Its pages no longer count as this process's, also where its folder is a link; they can be read as before."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    file = tmp_path / "real" / "model.bin"
    file.write_bytes(b"x" * 1_000_000)
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        assert mapped.read().count(b"x") == 1_000_000
        assert resident_kb(file) > 900
        openvino_graph._drop_mapped(tmp_path / "link" / "model.bin")
        assert resident_kb(file) == 0
        mapped.seek(0)
        assert mapped.read().count(b"x") == 1_000_000


@pytest.mark.skipif(sys.platform != "linux", reason="no /proc")
def test_the_mapped_file_is_let_go_of_after_a_rest(weights: Path) -> None:
    """What batches of any size have read of it again."""
    file = weights.with_suffix(".bin")
    file.write_bytes(b"x" * 1_000_000)
    graph = Graph(weights, "float32", 2)
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        graph(batch_of(1, meanwhile=mapped.read))
        graph.give_back(time.monotonic())
        assert resident_kb(file) > 900
        graph.give_back(time.monotonic() + openvino_graph.REST_S)
        assert resident_kb(file) == 0


def resident_kb(file: Path) -> int:
    """How much of a mapped file counts as this process's."""
    of_file = Path("/proc/self/smaps").read_text().partition(f" {file.resolve()}\n")[2]
    return int(of_file.partition("\nRss:")[2].split()[0])


def test_models_of_one_folder_share_what_is_compiled(weights: Path) -> None:
    """In the same type and on as many cores."""
    graph = graph_of(weights, "float32", 2)
    assert graph_of(weights, "float32", 2) is graph
    assert graph_of(weights, "bfloat16", 2) is not graph
    assert graph_of(weights, "float32", 1) is not graph


def test_what_a_burst_took_is_given_back_after_it(weights: Path) -> None:
    """Once no batch of many tokens has run for a while, and not while one runs."""
    graph = Graph(weights, "float32", 2)
    graph(batch_of(10))
    later_s = time.monotonic() + 2 * openvino_graph.REST_S
    assert not graph.give_back(later_s)
    graph(batch_of(openvino_graph.MANY_TOKENS))
    assert not graph.give_back(time.monotonic())
    early: list[bool] = []
    graph(batch_of(1, meanwhile=lambda: early.append(graph.give_back(later_s))))
    assert early == [False]
    assert graph.give_back(later_s)
    assert graph.beside_others.gave_back == 1
    assert not graph.give_back(later_s)


def test_vectors_of_tokens_are_a_batch_like_others(weights: Path) -> None:
    """Nothing is given back while they are made, what they took is given back after a rest."""
    graph = Graph(weights, "float32", 2)
    assert graph.tokens is not None
    later_s = time.monotonic() + 2 * openvino_graph.REST_S
    graph(batch_of(openvino_graph.MANY_TOKENS))
    early: list[bool] = []
    graph.tokens(batch_of(1, meanwhile=lambda: early.append(graph.give_back(later_s))), copied)
    assert early == [False]
    assert graph.give_back(later_s)
    graph.tokens(batch_of(openvino_graph.MANY_TOKENS), copied)
    assert graph.give_back(later_s)


def test_a_fault_does_not_end_what_tends_graphs(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread serves all graphs for as long as the process lives; the others have their turn."""
    broken, sound = Graph(weights, "float32", 2), Graph(weights, "float32", 2)
    looked: list[Graph] = []

    def looks(graph: Graph, now_s: float) -> bool:
        looked.append(graph)
        if len(looked) == 4:
            raise SystemExit
        raise RuntimeError("busy")

    monkeypatch.setattr(openvino_graph, "REST_S", 0.0)
    monkeypatch.setattr(openvino_graph, "_GRAPHS", {"first": broken, "second": sound})
    monkeypatch.setattr(Graph, "give_back", looks)
    with pytest.raises(SystemExit):
        openvino_graph._tend()
    assert looked == [broken, sound] * 2
