"""A SentenceTransformer's whole pipeline as one OpenVINO graph: exported once, cached, run without the GIL or torch."""

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
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from embedpool.drivers.measure import cosine
from embedpool.drivers.tokenizer import pad
from embedpool.errors import ModelFailed
from embedpool.tasks.driver import PROBE_TEXT

logger = logging.getLogger(__name__)

LIBRARIES = ("openvino", "torch", "transformers", "sentence-transformers")
PRECISION = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
LEAST_COSINE = 0.9999
HASHES = "hashes.json"
UNUSED_S = 30 * 86400.0  # a graph that nobody has loaded for so long is deleted
UNFINISHED, UNFINISHED_S = "export-", 86400.0  # the same of an export that never ended
COMPILED_TWICE_BYTES = 256_000_000  # of weights; each compiled model holds its own copy


def exported(folder: Path, cache_dir: Path, load_model: Callable[[], Any]) -> Path:
    """The graph file of the model in `folder`, exported unless the cache has it.

    The key holds the model's files and the libraries' versions. A new graph is compared with `encode` before it
    is kept. Raises ModelFailed if it gives other vectors, or cannot be written.
    """
    graph = cache_dir / "openvino" / f"{folder.name}-{_key(folder)}" / "model.xml"
    if graph.exists() and is_whole(graph):
        with contextlib.suppress(OSError):  # others may own the cache
            os.utime(graph.parent)  # see _prune
        return graph
    if graph.parent.exists():
        logger.warning("the cached graph %s is damaged, or older than its check, and is made anew", graph.parent)
        shutil.rmtree(graph.parent, ignore_errors=True)
    logger.info("exporting %s to OpenVINO, once", folder)
    openvino = _openvino()
    model = load_model()
    converted = _convert(model)
    graph.parent.parent.mkdir(parents=True, exist_ok=True)
    _prune(graph.parent.parent)
    with tempfile.TemporaryDirectory(prefix=UNFINISHED, dir=graph.parent.parent) as temporary:
        new = Path(temporary) / "new"
        try:
            openvino.save_model(converted, new / "model.xml", compress_to_fp16=False)
        except RuntimeError as error:  # of a full disk it says no more than that a stream has failed
            raise ModelFailed(f"the graph cannot be written to {cache_dir}: {error}") from None
        _compare(compiled(new / "model.xml", "float32", threads=1, streams=1), model)
        _sign(new)
        try:
            os.rename(new, graph.parent)
        except OSError:
            if not graph.exists():  # else another process was first
                raise
    return graph


def _prune(graphs: Path) -> None:
    """Delete what nobody has loaded for long: graphs of older models and libraries, and exports that were cut off."""
    now = time.time()
    for folder in graphs.iterdir():
        longest_s = UNFINISHED_S if folder.name.startswith(UNFINISHED) else UNUSED_S
        with contextlib.suppress(OSError):
            if now - folder.stat().st_mtime > longest_s:
                logger.info("the cached graph %s is deleted: nobody has used it for long", folder)
                shutil.rmtree(folder)


def is_whole(graph: Path) -> bool:
    """Whether the files of a graph are those that were compared with `encode`, byte for byte."""
    try:
        expected = json.loads((graph.parent / HASHES).read_text())
        return bool(expected) and all(_sha256(graph.parent / name) == found for name, found in expected.items())
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


class Pipeline:
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


def _convert(model: Any) -> Any:
    """The pipeline as an OpenVINO model of named, dynamic inputs."""
    import torch

    class Pipeline(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Any, attention_mask: Any, token_type_ids: Any = None) -> Any:
            features = {"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids}
            return self.model({k: v for k, v in features.items() if v is not None})["sentence_embedding"]

    example = torch.ones((2, 8), dtype=torch.long)
    names = set(model.tokenizer.model_input_names) & {"input_ids", "attention_mask", "token_type_ids"}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        return _openvino().convert_model(Pipeline().eval(), example_input=dict.fromkeys(names, example))


def _compare(run: Callable[[dict[str, Any]], Any], model: Any) -> None:
    texts = [PROBE_TEXT, "Another text, rather longer than the first, so that one of them is padded. " * 3]
    ids = [model.tokenizer(text)["input_ids"] for text in texts]
    vectors = run(pad(ids, model.tokenizer.pad_token_id or 0))
    worst = min(
        cosine(a, b) for a, b in zip(vectors, model.encode(texts, prompt="", show_progress_bar=False), strict=True)
    )
    if worst < LEAST_COSINE:
        raise ModelFailed(f"the exported graph gives other vectors than encode (cosine {worst:.6f})")


def _openvino() -> Any:
    """OpenVINO without its telemetry, which would report each import over the network."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino

    return openvino


def _key(folder: Path) -> str:
    files = sorted(f for f in folder.rglob("*") if f.is_file() and "__pycache__" not in f.parts)
    facts = [f"{f.relative_to(folder)} {f.stat().st_size} {f.stat().st_mtime_ns}" for f in files]
    facts += [f"{name} {version(name)}" for name in LIBRARIES]
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:16]
