"""A local SentenceTransformer model.

The request's thread makes the token ids; here they are only padded and sent through the model's own modules: the same
numbers as `SentenceTransformer.encode` without tokenising twice. At load they are compared with what `encode` gives,
which also serves models that cannot be fed ids.
"""

from __future__ import annotations

import functools
import gc
import importlib.util
import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from typing_extensions import override

from embedpool import bounds
from embedpool.config.spec import LocalStConfig, ModelSpec
from embedpool.drivers.measure import cosine, fastest_s, probe_batch
from embedpool.drivers.model_folder import commit_of, find_model_folder, keep_commit
from embedpool.drivers.space import of_files
from embedpool.drivers.tokenizer import FolderTokenizer, pad
from embedpool.errors import ModelFailed
from embedpool.places.cores import available_cores
from embedpool.tasks.driver import PROBE_TEXT, Cost, Driver, Facts, Folders, describe
from embedpool.tasks.embed import limit_fault
from embedpool.tasks.item import Batch
from embedpool.tasks.rows import Answer, Rows
from embedpool.tasks.tokenizer import Tokenizer

if TYPE_CHECKING:
    from embedpool.drivers.openvino_graph import Pipeline

logger = logging.getLogger(__name__)

Array = np.ndarray[Any, np.dtype[Any]]
Run = Callable[[dict[str, Array]], Array]  # padded inputs of shape (texts, tokens) → float32 (texts, dim)

# Loading two models at once races inside the exporters and doubles peak memory.
LOADING = threading.Lock()

WARM_UP_SHAPES = ((1, 8), (1, 64), (8, 16), (4, 128), (16, 64))  # texts, tokens each
SHORTEST_CALL_S = 1e-5
FAST_LEAST_GAIN = 1.1  # what `profile: fast` asks of a lossy dtype

SAME_VECTOR_COSINE = {"float32": 0.9999, "bfloat16": 0.995, "float16": 0.995}


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
        self._run: Run | None = None
        self._run_beside: Run | None = None  # as `_run` works while other batches run: what costs are fitted to
        self._encode: Callable[[list[str]], Array] | None = None

    @override
    def open(self, on_lost: Callable[[str], None]) -> Facts:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its pool is sized by the host
        folder = find_model_folder(self._model, self._config, self._folders.state)
        self._tokenizer = FolderTokenizer(folder)
        if fault := limit_fault(self._config.max_seq_length, self._tokenizer):
            raise ModelFailed(f"{self._model!r}: max_seq_length {fault}")
        with LOADING:
            backend, why = self._load(folder)
        self.probe()
        cost = self._fit_cost()
        width = self.run(self._probe_batch()).rows.width
        description = describe(
            backend=backend,
            why=why,
            compute_dtype=self._dtype,
            device=self._config.device,
            threads=self._cores,
            fixed_ms=round(cost.fixed_s * 1000, 3),
            ms_per_1000_tokens=round(cost.token_s * 1e6, 3),
            **self._says,
            dim=width,
            commit=commit_of(folder),
        )
        keep_commit(self._model, self._config, self._folders.state, folder)
        logger.info("%s runs on %s (%s)", self._model, backend, why)
        return Facts({"embed": width}, of_files(folder, "embed"), slots=self._slots, cost=cost, description=description)

    @override
    def run(self, batch: Batch) -> Answer:
        if self._run is not None:
            ids = batch.ids or self._tokenizer.encode(batch.texts)
            return Answer(Rows(self._run(pad(ids, self._tokenizer.pad_id))))
        assert self._encode is not None
        return Answer(Rows(self._encode(batch.texts)))

    @override
    def probe(self) -> None:
        if not self.run(self._probe_batch()).rows.finite().all():
            raise ModelFailed(f"{self._model!r} gives vectors that are not finite")

    def _probe_batch(self) -> Batch:
        return probe_batch(ids=self._tokenizer.encode([PROBE_TEXT]))

    def _fit_cost(self) -> Cost:
        """Least squares of relative errors over a few padded batches, the better of two runs each."""
        ids = self._tokenizer.encode([PROBE_TEXT * 40])[0]
        padded, seconds = [], []
        for texts, tokens in WARM_UP_SHAPES:
            batch = [self._tokenizer.cut(ids, tokens, "right")] * texts
            padded.append(float(sum(map(len, batch))))
            seconds.append(self._seconds(self._run_beside or self._run, batch))
        weights = [1 / s for s in seconds]
        token_s, fixed_s = np.polyfit(padded, seconds, 1, w=weights).tolist()
        return Cost(max(fixed_s, SHORTEST_CALL_S), max(token_s, SHORTEST_CALL_S / 1000))

    def _seconds(self, run: Run | None, ids: list[list[int]]) -> float:
        """The cost of a call; without `run` of a call of encode()."""
        if run is None:
            return fastest_s(lambda: self.run(probe_batch([PROBE_TEXT] * len(ids), ids)))
        return fastest_s(lambda: run(pad(ids, self._tokenizer.pad_id)))

    @override
    def close(self) -> None:
        self._run = self._run_beside = self._encode = None
        gc.collect()
        bounds.give_back_memory()

    def _load(self, folder: Path) -> tuple[str, str]:
        """Make `_run` or `_encode`; gives the backend and why it was chosen."""
        wanted = self._config.backend
        if wanted in ("auto", "openvino") and self._config.device == "cpu":
            try:
                self._load_openvino(folder)
            except Exception as error:
                if wanted == "openvino":
                    raise
                why = "openvino is not installed" if isinstance(error, ImportError) else f"openvino: {error}"
                self._load_torch(folder, "torch")
                return "torch", why
            return "openvino", "asked for" if wanted == "openvino" else "installed and faster"
        backend = "torch" if wanted == "auto" else wanted
        self._load_torch(folder, backend)
        return backend, f"auto on device {self._config.device}" if wanted == "auto" else "asked for"

    def _load_openvino(self, folder: Path) -> None:
        if importlib.util.find_spec("openvino") is None:
            raise ImportError("openvino is not installed; `pip install embedpool[openvino]`")
        from embedpool.drivers import openvino_graph

        graph = openvino_graph.exported(
            folder, self._folders.cache, lambda: self._sentence_transformer(folder, "torch")
        )
        gc.collect()  # an export leaves a torch model behind
        pipeline = openvino_graph.Pipeline(graph, self._dtype, self._cores)
        if self._config.profile == "fast" and self._config.compute_dtype == "auto":
            pipeline = self._faster(pipeline, openvino_graph.Pipeline(graph, "bfloat16", self._cores))
        self._slots = self._cores
        self._run, self._run_beside = pipeline, pipeline.beside_others
        self._says["cores_of_a_lone_batch"] = pipeline.cores_alone

    def _faster(self, exact: Pipeline, lossy: Pipeline) -> Pipeline:
        """The lossy pipeline if it is faster here and close enough; what it costs is said in /status."""
        texts = [PROBE_TEXT[:end] for end in range(4, len(PROBE_TEXT), 4)] + [PROBE_TEXT * 10]
        inputs = [pad([ids], self._tokenizer.pad_id) for ids in self._tokenizer.encode(texts)]
        worst = min(cosine(exact(i)[0], lossy(i)[0]) for i in inputs)
        batch = [self._tokenizer.cut(self._tokenizer.encode([PROBE_TEXT * 10])[0], 32, "right")] * 8
        gain = self._seconds(exact.beside_others, batch) / self._seconds(lossy.beside_others, batch)
        found = f"bfloat16 is {gain:.2f} times as fast here, at a cosine to float32 of {worst:.6f} or more"
        taken = gain >= FAST_LEAST_GAIN and worst >= SAME_VECTOR_COSINE["bfloat16"]
        self._says["profile"] = f"fast: {found}" if taken else f"fast asked for, float32 kept: {found}"
        if taken:
            self._dtype = "bfloat16"
        return lossy if taken else exact

    def _load_torch(self, folder: Path, backend: str) -> None:
        import torch

        from embedpool.drivers import torch_pipeline

        # On the replica's own thread, which is also the one that runs: OpenMP keeps the number by thread.
        torch.set_num_threads(self._cores)
        model = self._sentence_transformer(folder, backend)
        self._encode = functools.partial(_encode, model)
        expected = self._encode([PROBE_TEXT])[0]
        self._run = self._by_ids(torch_pipeline.torch_run(model), expected)
        if self._run is None or backend != "torch":
            return
        gain = torch_pipeline.prepacking_gain(model)
        if gain < torch_pipeline.PREPACKED_LEAST_GAIN:
            return
        torch_pipeline.prepack(model)
        self._run = self._by_ids(torch_pipeline.torch_run(model), expected)
        if self._run is not None:
            self._says["prepacked"] = f"{gain:.2f} times as fast"
            return
        model = self._sentence_transformer(folder, backend)  # it does not bear it
        self._encode, self._run = functools.partial(_encode, model), torch_pipeline.torch_run(model)

    def _by_ids(self, run: Run, expected: Array) -> Run | None:
        """`run` if the model takes token ids and gives encode's vector of the probe text for them, else None."""
        try:
            by_ids = run(pad(self._tokenizer.encode([PROBE_TEXT]), self._tokenizer.pad_id))[0]
        except Exception as error:
            logger.info("%s cannot be fed token ids this way: %s", self._model, error)
            return None
        if cosine(by_ids, expected) >= SAME_VECTOR_COSINE[self._dtype]:
            return run
        logger.warning("%s gives other vectors for token ids than encode()", self._model)
        return None

    def _sentence_transformer(self, folder: Path, backend: str) -> Any:
        from sentence_transformers import SentenceTransformer
        from tqdm import tqdm
        from transformers.utils import logging as transformers_logging

        tqdm.set_lock(threading.RLock())  # its own would be a semaphore that outlives a killed child
        transformers_logging.disable_progress_bar()
        transformers_logging.set_verbosity_error()
        model = SentenceTransformer(
            str(folder),
            device=self._config.device,
            trust_remote_code=self._config.trust_remote_code,
            local_files_only=True,
            backend=backend,
            model_kwargs={"use_safetensors": True, "dtype": self._dtype} if backend == "torch" else {},
        )
        limit = self._config.max_seq_length or self._tokenizer.default_max_tokens
        if limit:
            model.max_seq_length = limit
        return model.eval()


def _encode(model: Any, texts: list[str]) -> Array:
    return np.asarray(model.encode(texts, prompt="", show_progress_bar=False), np.float32)


def make_driver(spec: ModelSpec, folders: Folders, shared: dict[str, Any]) -> Driver:
    """Called by the table of drivers, in drivers/__init__.py."""
    assert isinstance(spec.driver.config, LocalStConfig)
    return LocalStDriver(spec.model, spec.driver.config, spec.scaling.max, folders)


def open_tokenizer(spec: ModelSpec, folders: Folders) -> Tokenizer:
    """Called by the table of drivers, in drivers/__init__.py."""
    assert isinstance(spec.driver.config, LocalStConfig)
    return FolderTokenizer(find_model_folder(spec.model, spec.driver.config, folders.state))
