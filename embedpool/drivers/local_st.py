"""A local model: the driver that opens its folder, chooses what runs each of its routes, and runs batches.

The request's thread makes the token ids; here they are only padded, or packed, and sent through the model's own
modules: the same numbers as `SentenceTransformer.encode` without tokenising twice. At load they are compared with what
`encode` gives, which also serves models that cannot be fed ids.
"""

from __future__ import annotations

import functools
import gc
import importlib.metadata
import importlib.util
import logging
import os
import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from typing_extensions import override

from embedpool import __version__, bounds
from embedpool.config.spec import LocalStConfig, ModelSpec
from embedpool.drivers.body import TOKENS, shared_route, tasks_of, tokens_are_read
from embedpool.drivers.heads import heads_of
from embedpool.drivers.layout import SCORING, Layout, read_layout
from embedpool.drivers.measure import fastest_s, nearness, probe_batch
from embedpool.drivers.model_folder import commit_of, find_model_folder, keep_commit
from embedpool.drivers.space import of_files
from embedpool.drivers.static import is_static, static_pipeline
from embedpool.drivers.tokenizer import FolderTokenizer, tokenizer_of, tokenizers_of
from embedpool.errors import ModelFailed
from embedpool.places.cores import available_cores, limit_numpy
from embedpool.tasks.driver import PROBE_TEXT, Cost, Driver, Facts, Folders, Progress, Report, describe
from embedpool.tasks.embed import limit_fault
from embedpool.tasks.item import Batch
from embedpool.tasks.rows import Answer, Rows
from embedpool.tasks.task import OF_EMBEDDERS
from embedpool.tasks.tokenizer import Tokenizer

if TYPE_CHECKING:
    from embedpool.drivers.fidelity import Probe
    from embedpool.drivers.library import Library
    from embedpool.drivers.pipeline import Pipeline

logger = logging.getLogger(__name__)

# Loading two models at once races inside the exporters and doubles peak memory.
LOADING = threading.Lock()

WARM_UP_SHAPES = ((1, 8), (1, 64), (8, 16), (4, 128), (16, 64))  # texts, tokens each
SHORTEST_CALL_S = 1e-5
FAST_LEAST_GAIN = 1.1  # what `profile: fast` asks of a lossy dtype
FAST_LEAST_COSINE = 0.995


class LocalStDriver(Driver):
    """One model instance. It has one slot on torch, and cores ÷ replicas on OpenVINO, whose streams share weights."""

    def __init__(self, model: str, config: LocalStConfig, replicas: int, folders: Folders) -> None:
        self._model = model
        self._config = config
        self._cores = max(available_cores() // replicas, 1)
        self._folders = folders
        self._dtype = "float32" if config.compute_dtype == "auto" else config.compute_dtype
        self._slots = 1
        self._says: dict[str, object] = {}  # of the backend, for /status
        self._pipelines: Mapping[str, Pipeline] = {}  # by route

    @override
    def open(self, on_lost: Callable[[str], None]) -> Facts:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its pool is sized by the host
        limit_numpy()
        folder = find_model_folder(self._model, self._config, self._folders.state, self.report)
        self.report(Progress("load"))
        layout = read_layout(folder, self._config)
        tokenizers = tokenizers_of(layout)
        for tokenizer in tokenizers.values():
            if fault := limit_fault(self._config.max_seq_length, tokenizer):
                raise ModelFailed(f"{self._model!r}: max_seq_length {fault}")
        backend, why = self._load(layout, tokenizers)
        self.report(Progress("warm up"))
        self.probe()
        tasks = {task: self._width(task) for task in tasks_of(layout)}
        width = tasks[layout.kind]
        cost = self._fit_cost()
        description = describe(
            kind=layout.kind,
            assumed=layout.assumed,
            backend=backend,
            why=why,
            compute_dtype=self._dtype,
            device=self._config.device,
            threads=self._cores,
            fixed_ms=round(cost.fixed_s * 1000, 3) if cost else None,
            ms_per_1000_tokens=round(cost.token_s * 1e6, 3) if cost else None,
            **self._says,
            dim=min(layout.dimensions or width, width) if width and layout.kind not in SCORING else None,
            labels=list(tokenizer.labels) or None,
            routes=sorted(tokenizers) if len(tokenizers) > 1 else None,
            commit=commit_of(folder),
        )
        bounds.give_back_memory()  # what loading took
        keep_commit(self._model, self._config, self._folders.state, folder)
        logger.info("%s runs on %s (%s)", self._model, backend, why)
        return Facts(
            tasks,
            of_files(folder, layout.kind),
            slots=self._slots,
            cost=cost,
            pads=any(pipeline.pads for pipeline in self._pipelines.values()),
            runtime=_runtime(backend, self._config.device, self._dtype),
            cacheable=any(pipeline.computes for pipeline in self._pipelines.values()),
            description=description,
        )

    @override
    def run(self, batch: Batch) -> Answer:
        return Answer(self._pipelines[batch.options.get("route", "")].run(batch))

    @override
    def probe(self) -> None:
        for pipeline in self._pipelines.values():
            if not _probed(pipeline).finite().all():
                raise ModelFailed(f"{self._model!r} gives vectors that are not finite")

    def _width(self, task: str) -> int | None:
        """Numbers of a vector, if all routes have as many."""
        if task in OF_EMBEDDERS:
            return None
        widths = {_probed(pipeline, task).width for pipeline in self._pipelines.values()}
        return (widths.pop() or None) if len(widths) == 1 else None

    def _fit_cost(self) -> Cost | None:
        """That of the route that costs most; None where nothing is computed."""
        costs = [_cost_of(pipeline) for pipeline in self._pipelines.values() if pipeline.computes]
        return max(costs, key=lambda cost: cost.token_s, default=None)

    @override
    def close(self) -> None:
        self._pipelines = {}
        gc.collect()
        bounds.give_back_memory()

    # --- what runs it

    def _load(self, layout: Layout, tokenizers: Mapping[str, FolderTokenizer]) -> tuple[str, str]:
        """Make the pipelines; gives the backend and why it was chosen."""
        static = {
            route: static_pipeline(tokenizer, layout.routes[route])
            for route, tokenizer in tokenizers.items()
            if is_static(layout.routes[route])
        }
        rest = {route: tokenizer for route, tokenizer in tokenizers.items() if route not in static}
        self._pipelines = static
        if not rest:
            return "numpy", "a table of vectors needs no more"
        with LOADING:
            backend, why, found = self._computed(layout, rest)
        self._pipelines = {**static, **found}
        return backend, why

    def _computed(
        self, layout: Layout, tokenizers: Mapping[str, FolderTokenizer]
    ) -> tuple[str, str, Mapping[str, Pipeline]]:
        """As `_load`, for routes that compute, with their pipelines."""
        wanted = self._config.backend
        if wanted in ("auto", "openvino") and self._config.device == "cpu":
            try:
                found = self._on_openvino(layout, tokenizers)
            except Exception as error:
                if wanted == "openvino":
                    raise
                why = "openvino is not installed" if isinstance(error, ImportError) else f"openvino: {error}"
                return "torch", why, self._on_torch(layout, tokenizers, "torch")
            return "openvino", "asked for" if wanted == "openvino" else "installed and faster", found
        backend = "torch" if wanted == "auto" else wanted
        why = f"auto on device {self._config.device}" if wanted == "auto" else "asked for"
        return backend, why, self._on_torch(layout, tokenizers, backend)

    def _library(self, layout: Layout, backend: str, dtype: str) -> Library:
        from embedpool.drivers.library import Library

        return Library(layout, self._config, dtype, backend)

    def _on_openvino(self, layout: Layout, tokenizers: Mapping[str, FolderTokenizer]) -> Mapping[str, Pipeline]:
        if importlib.util.find_spec("openvino") is None:
            raise ImportError("openvino is not installed; `pip install embedpool[openvino]`")
        from embedpool.drivers import openvino_cache, openvino_graph

        on_export = functools.partial(self.report, Progress("export"))
        graphs = openvino_cache.exported(layout.folder, self._config, self._folders.cache, on_export)
        self.report(Progress("load"))

        def compiled(dtype: str) -> Mapping[str, openvino_graph.GraphPipeline]:
            graph_of = functools.partial(openvino_graph.graph_of, dtype=dtype, threads=self._cores)
            return {
                route: openvino_graph.pipeline_of(
                    layout, tokenizer, graph_of(openvino_graph.graph_file(graphs, shared_route(layout, route)))
                )
                for route, tokenizer in tokenizers.items()
            }

        pipelines = compiled(self._dtype)
        if self._config.profile == "fast" and self._config.compute_dtype == "auto":
            pipelines = self._faster(pipelines, compiled("bfloat16"))
        self._slots = self._cores
        self._says["cores_of_a_lone_batch"] = next(iter(pipelines.values())).cores_alone
        return pipelines

    def _faster(self, exact: Mapping[str, Any], lossy: Mapping[str, Any]) -> Mapping[str, Any]:
        """The lossy pipelines if they are faster here and close enough; what it costs is said in /status."""
        worst, gain = 1.0, float("inf")
        texts = [PROBE_TEXT[:end] for end in range(4, len(PROBE_TEXT), 4)] + [PROBE_TEXT * 10]
        for route, pipeline in exact.items():
            tokenizer = pipeline.tokenizer
            for ids in tokenizer.encode(texts):
                batch = probe_batch(ids=[ids], task=tokenizer.tasks[0])
                worst = min(worst, nearness(pipeline.run_beside(batch), lossy[route].run_beside(batch)))
            batch = _batch_of(tokenizer, 8, 32)
            exact_s, lossy_s = (_seconds(of_it, batch) for of_it in (pipeline, lossy[route]))
            gain = min(gain, exact_s / lossy_s)
        found = f"bfloat16 is {gain:.2f} times as fast here, at a cosine to float32 of {worst:.6f} or more"
        taken = gain >= FAST_LEAST_GAIN and worst >= FAST_LEAST_COSINE
        self._says["profile"] = f"fast: {found}" if taken else f"fast asked for, float32 kept: {found}"
        if taken:
            self._dtype = "bfloat16"
        return lossy if taken else exact

    def _on_torch(
        self, layout: Layout, tokenizers: Mapping[str, FolderTokenizer], backend: str
    ) -> Mapping[str, Pipeline]:
        import torch

        # On the replica's own thread, which is also the one that runs: OpenMP keeps the number by thread.
        torch.set_num_threads(self._cores)
        library = self._library(layout, backend, self._dtype)
        expected: dict[str, list[Probe]] = {}
        pipelines = {r: self._by_ids(library, tokenizer, expected) for r, tokenizer in tokenizers.items()}
        if backend == "torch" and all(pipeline.by_ids for pipeline in pipelines.values()):
            self._prepack(library, expected, pipelines)
        return pipelines

    def _by_ids(self, library: Library, tokenizer: FolderTokenizer, expected: dict[str, list[Probe]]) -> Pipeline:
        """A pipeline that takes token ids, if it gives what encode does, else one that is given texts.

        `expected` is told what its library gives, which is asked before its last layer is taken off.
        """
        from embedpool.drivers import fidelity, torch_run
        from embedpool.drivers.pipeline import EncodePipeline, PaddedPipeline

        layout, headless = library.layout, None
        try:
            probes = list(fidelity.probes(library, tokenizer))
            of_nothing = fidelity.vector_of_nothing(library, tokenizer)
            body, modules = library.body(tokenizer.route)
            run = functools.partial(torch_run.torch_run, device=library.device, constants=library.constants)
            if not body.vocabulary and layout.shares_first(tokenizer.route):
                raise ModelFailed("two of its routes share a module")  # the library needs what would be taken off
            if not body.vocabulary:
                headless = torch_run.Headless(modules[0].model)
            heads = heads_of(layout, tokenizer, headless.vocabulary if headless else None)
            tokens = None
            if tokens_are_read(layout, tokenizer.route):
                tokens = run(torch_run.up_to_pooling(modules), output=TOKENS)
            pipeline = PaddedPipeline(tokenizer, run(modules, output=body.output), heads, of_nothing, tokens=tokens)
            expected[tokenizer.route] = probes
            found = fidelity.difference(probes, pipeline, self._dtype)
        except ModelFailed as error:
            found = error.message
        except Exception as error:
            found = f"it cannot be fed token ids: {type(error).__name__}: {error}"
        if found is None:
            return pipeline
        if headless:
            headless.restore()
        logger.warning("%s is run by encode(), which tokenises anew: %s", self._model, found)
        self._says["by_encode"] = found
        return EncodePipeline(tokenizer, library)

    def _prepack(self, library: Library, expected: dict[str, list[Probe]], pipelines: dict[str, Pipeline]) -> None:
        """Lay the weights out for oneDNN where that gains; a model that does not bear it is loaded anew."""
        from embedpool.drivers import fidelity, torch_run

        gain = torch_run.prepacking_gain(list(library.model))
        if gain < torch_run.PREPACKED_LEAST_GAIN:
            return
        torch_run.prepack(list(library.model))
        try:
            faults = [fidelity.difference(expected[r], p, self._dtype) for r, p in pipelines.items()]
        except Exception as error:
            faults = [str(error)]
        if not any(faults):
            self._says["prepacked"] = f"{gain:.2f} times as fast"
            return
        library = self._library(library.layout, "torch", self._dtype)
        pipelines.update({r: self._by_ids(library, pipeline.tokenizer, expected) for r, pipeline in pipelines.items()})


def _batch_of(tokenizer: FolderTokenizer, texts: int, tokens: int) -> Batch:
    (ids,) = tokenizer.encode([PROBE_TEXT * 40])
    return probe_batch([PROBE_TEXT] * texts, [tokenizer.cut(ids, tokens, "right")] * texts, tokenizer.tasks[0])


def _probed(pipeline: Pipeline, task: str | None = None) -> Rows:
    """The rows of the known text."""
    tokenizer = pipeline.tokenizer
    return pipeline.run(probe_batch(ids=tokenizer.encode([PROBE_TEXT]), task=task or tokenizer.tasks[0]))


def _seconds(pipeline: Pipeline, batch: Batch) -> float:
    return fastest_s(lambda: pipeline.run_beside(batch))


def _cost_of(pipeline: Pipeline) -> Cost:
    """Least squares of relative errors over a few batches of equal texts, the better of two runs each."""
    padded, seconds = [], []
    most = pipeline.tokenizer.max_tokens or max(tokens for _, tokens in WARM_UP_SHAPES)
    for texts, tokens in WARM_UP_SHAPES:
        batch = _batch_of(pipeline.tokenizer, texts, min(tokens, most))
        padded.append(float(sum(map(len, batch.ids or ()))))
        seconds.append(_seconds(pipeline, batch))
    weights = [1 / s for s in seconds]
    token_s, fixed_s = np.polyfit(padded, seconds, 1, w=weights).tolist()
    return Cost(max(fixed_s, SHORTEST_CALL_S), max(token_s, SHORTEST_CALL_S / 1000))


def make_driver(spec: ModelSpec, folders: Folders, shared: dict[str, Any]) -> Driver:
    """Called by the table of drivers, in drivers/__init__.py."""
    assert isinstance(spec.driver.config, LocalStConfig)
    return LocalStDriver(spec.model, spec.driver.config, spec.scaling.max, folders)


def open_tokenizer(spec: ModelSpec, folders: Folders, report: Report) -> Tokenizer:
    """Called by the table of drivers, in drivers/__init__.py."""
    assert isinstance(spec.driver.config, LocalStConfig)
    folder = find_model_folder(spec.model, spec.driver.config, folders.state, report)
    return tokenizer_of(read_layout(folder, spec.driver.config))


def _runtime(backend: str, device: str, dtype: str) -> str:
    """What decides the last digits of the numbers."""
    package = {"onnx": "onnxruntime"}.get(backend, backend)
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        version = ""  # numpy's, of a table of vectors
    return f"embedpool {__version__}, {backend} {version}, {device}, {dtype}"
