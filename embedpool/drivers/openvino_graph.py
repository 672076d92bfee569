"""A route's whole pipeline as one OpenVINO graph: exported once, cached, run without the GIL or torch."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import json
import logging
import mmap
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from embedpool import bounds
from embedpool.config.spec import LocalStConfig
from embedpool.drivers.packing import PackedPipeline
from embedpool.drivers.pipeline import Array, PaddedPipeline
from embedpool.drivers.tokenizer import FolderTokenizer
from embedpool.errors import ModelFailed

logger = logging.getLogger(__name__)

FORM = 3  # of what is exported; graphs of another one are made anew
LIBRARIES = ("openvino", "torch", "transformers", "sentence-transformers")
PRECISION = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
HASHES = "hashes.json"
UNUSED_S = 30 * 86400.0  # a graph that nobody has loaded for so long is deleted
UNFINISHED, UNFINISHED_S = "export-", 86400.0  # the same of an export that never ended
COMPILED_TWICE_BYTES = 256_000_000  # of weights, of all graphs that are; each compiled one has a copy of its own
LONG_ROW_STEP = {"float32": 4, "bfloat16": 16, "float16": 16}  # see packing.py; matrix units take 16 rows at once
REST_S = 10.0  # for which what a batch of many tokens took is kept for the next one
MANY_TOKENS = 1024


# --- the cache


def exported(folder: Path, config: LocalStConfig, cache: Path, on_export: Callable[[], None]) -> Path:
    """The folder with a graph for each route of the model, exported unless the cache has it.

    The key holds the model's files and the libraries' versions. `on_export` is called before an export. Raises
    ModelFailed if a graph gives other vectors than the model's library, or cannot be written.
    """
    graphs = cache / "openvino" / f"{folder.name}-{_key(folder)}"
    if graphs.exists() and is_whole(graphs):
        with contextlib.suppress(OSError):  # others may own the cache
            os.utime(graphs)  # see _prune
        return graphs
    if graphs.exists():
        logger.warning("the cached graph %s is damaged, or older than its check, and is made anew", graphs)
        shutil.rmtree(graphs, ignore_errors=True)
    logger.info("exporting %s to OpenVINO, once", folder)
    on_export()
    graphs.parent.mkdir(parents=True, exist_ok=True)
    _prune(graphs.parent)
    with tempfile.TemporaryDirectory(prefix=UNFINISHED, dir=graphs.parent) as temporary:
        new = Path(temporary) / "new"
        export(folder, config, new)
        _sign(new)
        try:
            os.rename(new, graphs)
        except OSError:
            if not graphs.exists():  # else another process was first
                raise
    return graphs


def export(folder: Path, config: LocalStConfig, new: Path) -> None:
    """Have openvino_export.py write the graphs into the folder `new`, in a process of its own. Raises ModelFailed.

    That one loads torch, and ends with this one.
    """
    command = [sys.executable, "-P", "-m", "embedpool.drivers.openvino_export"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with (
        tempfile.TemporaryFile() as said,
        subprocess.Popen(  # noqa: S603  (of this program's own words)
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, env=environment
        ) as process,
    ):
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(OSError):  # it has ended: told below
            pickle.dump((folder, config, new), process.stdin)
            process.stdin.flush()
        answer = process.stdout.read()
        exit_code = process.wait()
        said.seek(0)
        last_words = said.read().decode(errors="replace").strip().rpartition("\n")[2]
    if exit_code:
        raise ModelFailed(f"the process that exports it ended with exit code {exit_code}: {last_words[:500]}")
    if fault := json.loads(answer)["fault"]:
        raise ModelFailed(fault)


def _prune(graphs: Path) -> None:
    """Delete what nobody has loaded for long: graphs of older models and libraries, and exports that were cut off."""
    now = time.time()
    for folder in graphs.iterdir():
        longest_s = UNFINISHED_S if folder.name.startswith(UNFINISHED) else UNUSED_S
        with contextlib.suppress(OSError):
            if now - folder.stat().st_mtime > longest_s:
                logger.info("the cached graph %s is deleted: nobody has used it for long", folder)
                shutil.rmtree(folder)


def is_whole(graphs: Path) -> bool:
    """Whether its files are those that were compared with `encode`, byte for byte."""
    try:
        expected = json.loads((graphs / HASHES).read_text())
        return bool(expected) and all(_sha256(graphs / name) == found for name, found in expected.items())
    except (OSError, ValueError, AttributeError):
        return False


def _sign(folder: Path) -> None:
    """Write the hashes of a graph's files beside them, and all of it to the disk."""
    files = sorted(file for file in folder.iterdir() if file.is_file())
    (folder / HASHES).write_text(json.dumps({file.name: _sha256(file) for file in files}))
    for file in (*files, folder / HASHES):
        with file.open("rb") as stream:
            os.fsync(stream.fileno())


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _key(folder: Path) -> str:
    files = sorted(f for f in folder.rglob("*") if f.is_file() and "__pycache__" not in f.parts)
    facts = [f"{f.relative_to(folder)} {f.stat().st_size} {f.stat().st_mtime_ns}" for f in files]
    facts += [f"{name} {version(name)}" for name in LIBRARIES] + [f"form {FORM}"]
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:16]


# --- what runs


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
