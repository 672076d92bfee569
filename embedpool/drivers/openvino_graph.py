"""A route's whole pipeline as one OpenVINO graph: exported once, cached, run without the GIL or torch."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from embedpool.drivers import fidelity
from embedpool.drivers.layout import Layout
from embedpool.drivers.library import Array, Library
from embedpool.drivers.pipeline import PaddedPipeline
from embedpool.drivers.tokenizer import FolderTokenizer
from embedpool.errors import ModelFailed

logger = logging.getLogger(__name__)

FORM = 2  # of what is exported; graphs of another one are made anew
LIBRARIES = ("openvino", "torch", "transformers", "sentence-transformers")
PRECISION = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
INPUTS = ("input_ids", "attention_mask", "token_type_ids")
HASHES = "hashes.json"
UNUSED_S = 30 * 86400.0  # a graph that nobody has loaded for so long is deleted
UNFINISHED, UNFINISHED_S = "export-", 86400.0  # the same of an export that never ended
_CONVERTING = threading.Lock()
COMPILED_TWICE_BYTES = 256_000_000  # of weights; each compiled model holds its own copy


def exported(
    layout: Layout, tokenizers: Mapping[str, FolderTokenizer], cache: Path, load: Callable[[], Library]
) -> Path:
    """The folder with a graph for each route of the model, exported unless the cache has it.

    The key holds the model's files and the libraries' versions. New graphs are compared with `encode` before they
    are kept. Raises ModelFailed if one gives other vectors, or cannot be written.
    """
    folder = layout.folder
    graphs = cache / "openvino" / f"{folder.name}-{_key(folder)}"
    if graphs.exists() and is_whole(graphs):
        with contextlib.suppress(OSError):  # others may own the cache
            os.utime(graphs)  # see _prune
        return graphs
    if graphs.exists():
        logger.warning("the cached graph %s is damaged, or older than its check, and is made anew", graphs)
        shutil.rmtree(graphs, ignore_errors=True)
    logger.info("exporting %s to OpenVINO, once", folder)
    library = load()
    graphs.parent.mkdir(parents=True, exist_ok=True)
    _prune(graphs.parent)
    with tempfile.TemporaryDirectory(prefix=UNFINISHED, dir=graphs.parent) as temporary:
        new = Path(temporary) / "new"
        for route, tokenizer in tokenizers.items():
            _export(library, tokenizer, new, cache)
            pipeline = pipeline_of(new, tokenizer, "float32", threads=1)
            if found := fidelity.difference(fidelity.probes(library, tokenizer), pipeline, "float32"):
                raise ModelFailed(f"the exported graph{f' of route {route}' if route else ''}: {found}")
        _sign(new)
        try:
            os.rename(new, graphs)
        except OSError:
            if not graphs.exists():  # else another process was first
                raise
    return graphs


def _export(library: Library, tokenizer: FolderTokenizer, new: Path, cache: Path) -> None:
    """Write a route's graph, and the vector of a text without tokens."""
    graph = new / f"{_name(tokenizer.route)}.xml"
    converted = _convert(library.modules(tokenizer.route), tokenizer, library.output, library.constants)
    try:
        _openvino().save_model(converted, graph, compress_to_fp16=False)
    except RuntimeError as error:  # of a full disk it says no more than that a stream has failed
        raise ModelFailed(f"the graph cannot be written to {cache}: {error}") from None
    of_nothing = fidelity.vector_of_nothing(library, tokenizer)
    if of_nothing is not None:
        np.save(graph.with_suffix(".npy"), of_nothing, allow_pickle=False)


def pipeline_of(graphs: Path, tokenizer: FolderTokenizer, dtype: str, threads: int) -> GraphPipeline:
    """A route's graph, compiled to run in up to `threads` threads at once."""
    graph = graphs / f"{_name(tokenizer.route)}.xml"
    file = graph.with_suffix(".npy")
    return GraphPipeline(tokenizer, Graph(graph, dtype, threads), np.load(file) if file.exists() else None)


def _name(route: str) -> str:
    """Of its files; a route's name may hold anything."""
    return f"route-{quote(route, safe='')}" if route else "model"


class GraphPipeline(PaddedPipeline):
    """A route that runs as a graph."""

    def __init__(self, tokenizer: FolderTokenizer, graph: Graph, of_nothing: Array | None) -> None:
        super().__init__(tokenizer, graph, of_nothing, graph.beside_others)
        self.cores_alone = graph.cores_alone


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


class Graph:
    """A graph compiled to run in up to `threads` threads at once, on a core each; a batch that runs alone has them all.

    Large models are compiled once and a batch always has one core.
    """

    def __init__(self, graph: Path, dtype: str, threads: int) -> None:
        self.beside_others = compiled(graph, dtype, threads=threads, streams=threads)
        self._alone = self.beside_others
        if threads > 1 and graph.with_suffix(".bin").stat().st_size <= COMPILED_TWICE_BYTES:
            self._alone = compiled(graph, dtype, threads=threads, streams=1)
        self._running = 0
        self._lock = threading.Lock()

    @property
    def cores_alone(self) -> str:
        """How many cores a batch has that runs alone, for /status."""
        return "one" if self._alone is self.beside_others else "all"

    def __call__(self, inputs: dict[str, Any]) -> Any:
        """Padded inputs → float32 vectors (texts, dim)."""
        with self._lock:
            run = self.beside_others if self._running else self._alone
            self._running += 1
        try:
            return run(inputs)
        finally:
            with self._lock:
                self._running -= 1


def compiled(graph: Path, dtype: str, *, threads: int, streams: int) -> Callable[[dict[str, Any]], Any]:
    """A function from padded inputs to float32 vectors (texts, dim); up to `streams` threads may run it at once."""
    model = (
        _openvino()
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
    names = [port.get_any_name() for port in model.inputs]
    of_thread = threading.local()

    def run(inputs: dict[str, Any]) -> Any:
        request = getattr(of_thread, "request", None)
        if request is None:
            request = of_thread.request = model.create_infer_request()
        request.infer({name: inputs[name] for name in names}, share_inputs=True)
        return np.array(request.get_output_tensor(0).data, dtype=np.float32)

    return run


def _convert(modules: Sequence[Any], tokenizer: FolderTokenizer, output: str, constants: Mapping[str, Any]) -> Any:
    """A route as an OpenVINO model of named, dynamic inputs.

    Where the pooling leaves a prompt out, it reads a mask of its own, `pooled_mask`.
    """
    import torch

    names = [name for name in INPUTS if name in modules[0].tokenizer.model_input_names]
    if tokenizer.excludes_prompt:
        _require_a_mask_is_enough(modules)
        names.append("pooled_mask")

    class Steps(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.steps = torch.nn.ModuleList(modules)

        def forward(
            self, input_ids: Any, attention_mask: Any, token_type_ids: Any = None, pooled_mask: Any = None
        ) -> Any:
            given = {"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids}
            features = {**{k: v for k, v in given.items() if v is not None}, **constants}
            for step in self.steps:
                if pooled_mask is not None and type(step).__name__ == "Pooling":
                    features["attention_mask"] = pooled_mask
                features = step(features)
            return features[output]

    inside: list[Any] = [inner for module in modules if (inner := getattr(module, "model", None)) is not None]
    for inner in inside:
        if getattr(inner, "config", None) is not None:
            inner.config.use_cache = False  # of a generator: nothing is generated
    if tokenizer.pads_left:  # then the first places attend to nothing
        _mask_by_numbers(inside)
    steps = Steps().eval()
    example = dict.fromkeys(names, torch.ones((2, 8), dtype=torch.long))
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        try:
            return _converted(steps, example_input=example)
        except Exception as error:
            logger.info("the model cannot be traced, and is exported in another way: %s", error)
        _mask_by_numbers(inside)  # models whose masks are made by functions cannot be traced
        sizes = {name: {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO} for name in names}
        example = {name: torch.ones((3, 9), dtype=torch.long) for name in names}
        try:
            return _converted(torch.export.export(steps, (), example, dynamic_shapes=sizes, strict=False))
        except Exception as error:
            raise ModelFailed(f"the model cannot be exported: {_in_short(error)}") from None


def _mask_by_numbers(inside: Sequence[Any]) -> None:
    """Where a token attends to nothing, minus infinity for all would make it no number; the least number does not."""
    for inner in inside:
        if hasattr(inner, "set_attn_implementation"):
            inner.set_attn_implementation("eager")


def _converted(model: Any, **arguments: Any) -> Any:
    """OpenVINO's graph. It raises the level of all logging while it converts, and leaves it so where it fails."""
    root = logging.getLogger()
    with _CONVERTING:
        level, filters = root.level, [*root.filters]
        try:
            return _openvino().convert_model(model, **arguments)
        finally:
            root.setLevel(level)
            root.filters[:] = filters


def _in_short(error: Exception) -> str:
    """What OpenVINO says at the end of many lines, else the first line of an error."""
    lines = str(error).strip().splitlines()
    said = [line.removeprefix("-- ") for line in lines if line.startswith("-- ") and not line.endswith("a message:")]
    return "; ".join(said) or next(iter(lines), type(error).__name__)


def _require_a_mask_is_enough(modules: Sequence[Any]) -> None:
    """Raises ModelFailed for a pooling that weighs tokens by their places behind the prompt."""
    for module in modules:
        modes = getattr(module, "pooling_mode", ())
        if "weightedmean" in ((modes,) if isinstance(modes, str) else modes):
            raise ModelFailed("a weighted mean without the prompt is not exported")


def _openvino() -> Any:
    """OpenVINO without its telemetry, which would report each import over the network."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino

    return openvino


def _key(folder: Path) -> str:
    files = sorted(f for f in folder.rglob("*") if f.is_file() and "__pycache__" not in f.parts)
    facts = [f"{f.relative_to(folder)} {f.stat().st_size} {f.stat().st_mtime_ns}" for f in files]
    facts += [f"{name} {version(name)}" for name in LIBRARIES] + [f"form {FORM}"]
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:16]
