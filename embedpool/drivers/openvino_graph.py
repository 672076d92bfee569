"""A route's whole pipeline as an OpenVINO graph, compiled and run without the GIL or torch."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import mmap
import sys
import threading
import time
import weakref
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from embedpool import bounds
from embedpool.drivers.packing import PackedPipeline
from embedpool.drivers.pipeline import Array, PaddedPipeline
from embedpool.drivers.tokenizer import FolderTokenizer

PRECISION = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
COMPILED_TWICE_BYTES = 256_000_000  # of weights, of all graphs that are; each compiled one has a copy of its own
LONG_ROW_STEP = {"float32": 4, "bfloat16": 16, "float16": 16}  # see packing.py; matrix units take 16 rows at once
REST_S = 10.0  # for which what a batch of many tokens took is kept for the next one
MANY_TOKENS = 1024


def pipeline_of(graphs: Path, tokenizer: FolderTokenizer, dtype: str, threads: int) -> GraphPipeline:
    """A route's graph, compiled to run in up to `threads` threads at once."""
    graph = graphs / f"{name_of_route(tokenizer.route)}.xml"
    file = graph.with_suffix(".npy")
    of_nothing = np.load(file) if file.exists() else None
    compiled = graph_of(graph, dtype, threads)
    kind = PackedGraphPipeline if "text_ids" in compiled.inputs else GraphPipeline
    return kind(tokenizer, compiled, of_nothing)


def name_of_route(route: str) -> str:
    """Of its files; a route's name may hold anything."""
    return f"route-{quote(route, safe='')}" if route else "model"


class GraphPipeline(PaddedPipeline):
    """A route that runs as a graph."""

    def __init__(self, tokenizer: FolderTokenizer, graph: Graph, of_nothing: Array | None) -> None:
        super().__init__(tokenizer, graph, of_nothing, graph.beside_others)
        self.cores_alone = graph.cores_alone


class PackedGraphPipeline(PackedPipeline, GraphPipeline):
    """The same of a model whose texts may share rows."""

    def __init__(self, tokenizer: FolderTokenizer, graph: Graph, of_nothing: Array | None) -> None:
        super().__init__(tokenizer, graph, of_nothing)
        self.step = LONG_ROW_STEP[graph.dtype]


_GRAPHS: weakref.WeakValueDictionary[tuple[Path, str, int], Graph] = weakref.WeakValueDictionary()
_OPENING = threading.Lock()


def graph_of(graph: Path, dtype: str, threads: int) -> Graph:
    """The graph as it is compiled already, by another model with the same files, or compiled now."""
    with _OPENING:
        found = _GRAPHS.get((graph, dtype, threads))
        if found is None:
            twice_bytes = sum(each.twice_bytes for each in _GRAPHS.values())
            found = _GRAPHS[graph, dtype, threads] = Graph(graph, dtype, threads, COMPILED_TWICE_BYTES - twice_bytes)
            _start_to_give_back()
        return found


class Graph:
    """A graph compiled to run in up to `threads` threads at once, on a core each; a batch that runs alone has them all.

    That takes a second copy of the weights, so only graphs of up to `most_twice_bytes` have it; a batch of the others
    always has one core.
    """

    def __init__(self, graph: Path, dtype: str, threads: int, most_twice_bytes: int = COMPILED_TWICE_BYTES) -> None:
        self.dtype = dtype
        self._weights = graph.with_suffix(".bin")
        self.beside_others = Compiled(graph, dtype, threads=threads, streams=threads)
        self._alone = self.beside_others
        self.twice_bytes = 0  # of weights that it has twice
        size_bytes = self._weights.stat().st_size
        if threads > 1 and size_bytes <= most_twice_bytes:
            self._alone = Compiled(graph, dtype, threads=threads, streams=1)
            self.twice_bytes = size_bytes
        self.inputs = self.beside_others.inputs
        _drop_mapped(self._weights)
        self._running = 0
        self._large_at: float | None = None  # when a batch of many tokens ran, on the monotonic clock
        self._lock = threading.Lock()

    @property
    def cores_alone(self) -> str:
        """How many cores a batch has that runs alone, for /status."""
        return "one" if self._alone is self.beside_others else "all"

    def __call__(self, inputs: dict[str, Any]) -> Any:
        """Inputs of one batch → float32 vectors (texts, dim)."""
        with self._lock:
            run = self.beside_others if self._running else self._alone
            self._running += 1
        try:
            return run(inputs)
        finally:
            with self._lock:
                self._running -= 1
                if inputs["input_ids"].size >= MANY_TOKENS:
                    self._large_at = time.monotonic()

    def give_back(self, now_s: float) -> bool:
        """Give back what large batches have taken, if none runs and none has run for a while; whether there was any."""
        with self._lock:
            if self._running or self._large_at is None or now_s - self._large_at < REST_S:
                return False
            self._large_at = None
            for each in {self._alone, self.beside_others}:
                each.give_back()
        _drop_mapped(self._weights)
        return True


class Compiled:
    """A compiled graph, which up to `streams` threads may run at once."""

    def __init__(self, graph: Path, dtype: str, *, threads: int, streams: int) -> None:
        self._model = (
            import_openvino()
            .Core()
            .compile_model(
                str(graph),
                "CPU",
                {
                    "INFERENCE_PRECISION_HINT": PRECISION[dtype],  # on some CPUs it would choose bfloat16 by itself
                    "NUM_STREAMS": streams,
                    "INFERENCE_NUM_THREADS": threads,
                    "ENABLE_CPU_PINNING": False,  # two models in one process were pinned to the same core
                },
            )
        )
        self.inputs = [port.get_any_name() for port in self._model.inputs]
        self._of_thread = threading.local()

    def __call__(self, inputs: dict[str, Any]) -> Any:
        """Inputs of one batch → float32 vectors (texts, dim)."""
        request = getattr(self._of_thread, "request", None)
        if request is None:
            request = self._of_thread.request = self._model.create_infer_request()
        request.infer({name: inputs[name] for name in self.inputs}, share_inputs=True)
        return np.array(request.get_output_tensor(0).data, dtype=np.float32)

    def give_back(self) -> None:
        """Give back the memory of intermediate results, while nothing runs."""
        self._model.release_memory()


@functools.cache
def _start_to_give_back() -> None:
    """Begin to look, for as long as this process lives, whether graphs rest."""
    threading.Thread(target=_give_back, name="give-back-memory", daemon=True).start()


def _give_back() -> None:
    while True:
        time.sleep(REST_S / 2)
        gave = [graph.give_back(time.monotonic()) for graph in list(_GRAPHS.values())]
        if any(gave):
            bounds.give_back_memory()


def _drop_mapped(file: Path) -> None:
    """Let go of a mapped file's pages, which compiling has read; those that are needed come back one by one."""
    with contextlib.suppress(OSError):  # a system without /proc keeps them
        for line in Path("/proc/self/maps").read_text().splitlines():
            fields = line.split(maxsplit=5)
            if fields[-1] == str(file) and fields[1].startswith("r-"):  # nobody can have written to them
                begin, end = (int(address, 16) for address in fields[0].split("-"))
                ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), mmap.MADV_DONTNEED)


def import_openvino() -> Any:
    """OpenVINO without its telemetry, which would report each import over the network."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino

    return openvino
