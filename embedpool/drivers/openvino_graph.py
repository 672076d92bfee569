"""A route's whole pipeline as an OpenVINO graph, compiled and run without the GIL or torch."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
import mmap
import sys
import threading
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from typing_extensions import override

from embedpool import bounds
from embedpool.drivers.heads import Head, Vocabulary, heads_of
from embedpool.drivers.layout import Layout
from embedpool.drivers.packing import pack
from embedpool.drivers.pipeline import Array, PaddedPipeline, Read, Run, copied
from embedpool.drivers.tokenizer import FolderTokenizer
from embedpool.tasks.item import Batch, Ids

logger = logging.getLogger(__name__)

PRECISION = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
COMPILED_TWICE_BYTES = 256_000_000  # of weights, of all graphs that are; each compiled one has a copy of its own
LONG_ROW_STEP = {"float32": 4, "bfloat16": 16, "float16": 16}  # see packing.py; matrix units take 16 rows at once
REST_S = 10.0  # for which what a batch of many tokens took is kept for the next one
MANY_TOKENS = 1024
LONE_BATCHES = 32  # so many that ran alone are worth a second copy of the weights
LONE_REST_S = 600.0  # for which that is kept without any
OF_NOTHING, WEIGHT, BIAS = ".npy", ".vocabulary.npy", ".vocabulary-bias.npy"  # files beside a graph


def pipeline_of(layout: Layout, tokenizer: FolderTokenizer, graph: Graph) -> GraphPipeline:
    """A route that runs as this graph."""
    vector = graph.file.with_suffix(OF_NOTHING)
    of_nothing = np.load(vector) if vector.exists() else None
    heads = heads_of(layout, tokenizer, _vocabulary(graph.file))
    kind = PackedPipeline if "text_ids" in graph.beside_others.inputs else GraphPipeline
    return kind(tokenizer, graph, heads, of_nothing)


def keep_beside(graph: Path, of_nothing: Array | None, vocabulary: Vocabulary | None) -> None:
    """Write what `pipeline_of` reads beside a graph: a vector of a text without tokens, the layer it ends before."""
    weight, bias = (vocabulary.weight, vocabulary.bias) if vocabulary else (None, None)
    for suffix, array in ((OF_NOTHING, of_nothing), (WEIGHT, weight), (BIAS, bias)):
        if array is not None:
            np.save(graph.with_suffix(suffix), array, allow_pickle=False)


def _vocabulary(graph: Path) -> Vocabulary | None:
    """Mapped, so that the system may drop what is not being read."""
    weight, bias = graph.with_suffix(WEIGHT), graph.with_suffix(BIAS)
    if not weight.exists():
        return None
    return Vocabulary(np.load(weight, mmap_mode="r"), np.load(bias) if bias.exists() else None)


def graph_file(graphs: Path, route: str) -> Path:
    """Where a route's graph is kept; a route's name may hold anything."""
    return graphs / (f"route-{quote(route, safe='')}.xml" if route else "model.xml")


class GraphPipeline(PaddedPipeline):
    """A route that runs as a graph."""

    def __init__(
        self, tokenizer: FolderTokenizer, graph: Graph, heads: Mapping[str, Head], of_nothing: Array | None
    ) -> None:
        super().__init__(tokenizer, graph, heads, of_nothing, beside_others=graph.beside_others, tokens=graph.tokens)
        self.cores_alone = graph.cores_alone


class PackedPipeline(GraphPipeline):
    """The same of a model whose texts may share rows.

    In float32 a call costs so little beside its tokens that batches of about equal texts are better even so, for their
    attention is shorter: then they are planned as if they were padded.
    """

    def __init__(
        self, tokenizer: FolderTokenizer, graph: Graph, heads: Mapping[str, Head], of_nothing: Array | None
    ) -> None:
        super().__init__(tokenizer, graph, heads, of_nothing)
        self._step = LONG_ROW_STEP[graph.dtype]
        self.pads = graph.dtype == "float32"

    @override
    def _inputs(self, ids: Sequence[Ids], batch: Batch, which: Sequence[int]) -> dict[str, Array]:
        inputs = pack(ids, self.tokenizer.pad_id, self._step)
        if self.tokenizer.excludes_prompt:
            inputs["pooled_mask"] = self._pooled_mask(inputs["token_places"] >= 0, ids, batch)
        return inputs


_GRAPHS: weakref.WeakValueDictionary[tuple[Path, str, int], Graph] = weakref.WeakValueDictionary()
_OPENING = threading.Lock()


def graph_of(file: Path, dtype: str, threads: int) -> Graph:
    """The graph as it is compiled already, by another model with the same files, or compiled now."""
    with _OPENING:
        found = _GRAPHS.get((file, dtype, threads))
        if found is None:
            # A model may be compiled in two types while it is tried which is faster: one of them stays.
            others = {each.file: each.twice_bytes for each in _GRAPHS.values() if each.file != file}
            room = COMPILED_TWICE_BYTES - sum(others.values())
            found = _GRAPHS[file, dtype, threads] = Graph(file, dtype, threads, room)
            _start_to_tend()
        return found


class Graph:
    """A graph compiled to run in up to `threads` threads at once, on a core each.

    Where batches often run alone it is compiled again, so that such a one has all cores. That takes a second copy of
    the weights, so only graphs of up to `most_twice_bytes` have it, and only while they are asked so. The vectors of
    tokens, its second output if it has one, have a copy once they are asked for.
    """

    def __init__(self, file: Path, dtype: str, threads: int, most_twice_bytes: int = COMPILED_TWICE_BYTES) -> None:
        self.file, self.dtype = file, dtype
        self._threads = threads
        self._weights = file.with_suffix(".bin")
        self.beside_others = Compiled(file, dtype, threads=threads, streams=threads)
        size_bytes = self._weights.stat().st_size
        self.twice_bytes = size_bytes if threads > 1 and size_bytes <= most_twice_bytes else 0  # what it may have twice
        self._alone: Compiled | None = None
        self._lone_batches = 0  # that ran without `_alone`
        self._lone_at = 0.0  # when one ran last, on the monotonic clock
        _drop_mapped(self._weights)
        self._running = 0
        self._ran_at: float | None = None  # when a batch ran last, on the monotonic clock; None after a rest
        self._large_at: float | None = None  # likewise one of many tokens
        self._lock = threading.Lock()
        self._tokens: Compiled | None = None
        self._opens_tokens = threading.Lock()

    @property
    def tokens(self) -> Run | None:
        """What gives the vectors of tokens; None where the graph has none."""
        return self._run_tokens if self.beside_others.outputs > 1 else None

    def _run_tokens(self, inputs: dict[str, Any], read: Read) -> Any:
        with self._opens_tokens:
            if self._tokens is None:
                self._tokens = Compiled(self.file, self.dtype, threads=self._threads, streams=self._threads, output=1)
                _drop_mapped(self._weights)
        with self._noted(inputs):
            return self._tokens(inputs, read)

    @property
    def cores_alone(self) -> str:
        """How many cores a batch has that runs alone, where many do, for /status."""
        return "all" if self.twice_bytes else "one"

    def __call__(self, inputs: dict[str, Any], read: Read = copied) -> Any:
        """Inputs of one batch → what is read of its output."""
        with self._noted(inputs) as others:
            if others:
                return self.beside_others(inputs, read)
            self._lone_at = time.monotonic()
            if self._alone:
                return self._alone(inputs, read)
            self._lone_batches += 1  # by one thread at a time, since none runs beside it
            if self._lone_batches == LONE_BATCHES and self.twice_bytes:
                _TENDS_NOW.set()
            return self.beside_others(inputs, read)

    @contextlib.contextmanager
    def _noted(self, inputs: dict[str, Any]) -> Iterator[int]:
        """While a batch runs it counts as running; gives how many others do."""
        with self._lock:
            others = self._running
            self._running += 1
        try:
            yield others
        finally:
            with self._lock:
                self._running -= 1
                self._ran_at = time.monotonic()
                if inputs["input_ids"].size >= MANY_TOKENS:
                    self._large_at = self._ran_at

    def copy_for_lone_batches(self, now_s: float) -> bool:
        """Have the second copy if it is worth it, and let go of it after a long rest. Gives whether memory is free.

        No two threads call it at once.
        """
        if self._alone is None:
            if self._lone_batches < LONE_BATCHES or not self.twice_bytes:
                return False
            self._lone_batches = 0  # if this fails it is tried again after as many
            self._alone = Compiled(self.file, self.dtype, threads=self._threads, streams=1)
            _drop_mapped(self._weights)
            return True
        with self._lock:
            if self._running or now_s - self._lone_at < LONE_REST_S:
                return False
            self._alone = None
        return True

    def give_back(self, now_s: float) -> bool:
        """After a rest let go of the weights' file, and after one from large batches of what those took, if none runs.

        Gives whether there was any of the latter.
        """
        with self._lock:
            if self._has_rested(self._ran_at, now_s):
                self._ran_at = None
                _drop_mapped(self._weights)
            if self._running or not self._has_rested(self._large_at, now_s):
                return False
            self._large_at = None
            for each in (self._alone, self.beside_others, self._tokens):
                if each is not None:
                    each.give_back()
        return True

    @staticmethod
    def _has_rested(last_s: float | None, now_s: float) -> bool:
        return last_s is not None and now_s - last_s >= REST_S


class Compiled:
    """One output of a graph, compiled so that up to `streams` threads may run it at once."""

    def __init__(self, graph: Path, dtype: str, *, threads: int, streams: int, output: int = 0) -> None:
        core = import_openvino().Core()
        model = core.read_model(str(graph))
        results = model.get_results()
        self.outputs = len(results)
        for number, result in enumerate(results):
            if number != output:
                model.remove_result(result)
        self._model = core.compile_model(
            model,
            "CPU",
            {
                "INFERENCE_PRECISION_HINT": PRECISION[dtype],  # on some CPUs it would choose bfloat16 by itself
                "NUM_STREAMS": streams,
                "INFERENCE_NUM_THREADS": threads,
                "ENABLE_CPU_PINNING": False,  # two models in one process were pinned to the same core
            },
        )
        self.inputs = [port.get_any_name() for port in self._model.inputs]
        self._of_thread = threading.local()

    def __call__(self, inputs: dict[str, Any], read: Read = copied) -> Any:
        """Inputs of one batch → what is read of the output."""
        request = getattr(self._of_thread, "request", None)
        if request is None:
            request = self._of_thread.request = self._model.create_infer_request()
        request.infer({name: inputs[name] for name in self.inputs}, share_inputs=True, share_outputs=True)
        return read(request.get_output_tensor(0).data)

    def give_back(self) -> None:
        """Give back the memory of intermediate results, while nothing runs."""
        self._model.release_memory()


_TENDS_NOW = threading.Event()


@functools.cache
def _start_to_tend() -> None:
    """Begin to look, for as long as this process lives, what graphs need and what they do not."""
    threading.Thread(target=_tend, name="tend-graphs", daemon=True).start()


def _tend() -> None:
    while True:
        _TENDS_NOW.wait(REST_S / 2)
        _TENDS_NOW.clear()
        freed = [_tended(graph) for graph in list(_GRAPHS.values())]
        if any(freed):
            bounds.give_back_memory()


def _tended(graph: Graph) -> bool:
    """Whether memory is free now."""
    try:
        now_s = time.monotonic()
        return graph.copy_for_lone_batches(now_s) | graph.give_back(now_s)
    except Exception:  # the thread serves all graphs for as long as the process lives
        logger.exception("%s cannot be copied, or does not give back memory", graph.file)
        return False


def _drop_mapped(file: Path) -> None:
    """Let go of a mapped file's pages, which compiling has read; those that are needed come back one by one."""
    with contextlib.suppress(OSError):  # a system without /proc keeps them
        mapped = str(file.resolve())
        for line in Path("/proc/self/maps").read_text().splitlines():
            fields = line.split(maxsplit=5)
            if fields[-1] == mapped and fields[1].startswith("r-"):  # nobody can have written to them
                begin, end = (int(address, 16) for address in fields[0].split("-"))
                ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), mmap.MADV_DONTNEED)


def import_openvino() -> Any:
    """OpenVINO without its telemetry, which would report each import over the network."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino

    return openvino
