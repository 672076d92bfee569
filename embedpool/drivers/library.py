"""A model as its own library serves it: what everything that embedpool computes by itself is compared with."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedpool.config.spec import LocalStConfig
from embedpool.drivers.body import AUTO_ENCODER, Body, body_of
from embedpool.drivers.heads import sparse_of
from embedpool.drivers.late_interaction import QUERY
from embedpool.drivers.layout import EMBED, MULTIVECTOR, ROUTERS, SCORING, SPARSE, TRUSTED, Layout
from embedpool.errors import ModelFailed
from embedpool.tasks.rows import Rows

Array = NDArray[Any]


class Library:
    """A model of sentence-transformers. Rows are whole, whatever `truncate_dim` says; scores are logits."""

    def __init__(self, layout: Layout, config: LocalStConfig, dtype: str, backend: str) -> None:
        self.layout = layout
        self.model = _loaded(layout, config, dtype, backend)
        # What its steps want to know beside the inputs.
        self.constants = {"modality": "message", "logits_to_keep": 1} if layout.is_causal else {}
        if layout.kind == EMBED:
            self.model.truncate_dim = None
        if layout.kind == SPARSE and type(self.model[-1]).__name__ != AUTO_ENCODER:
            self.model.max_active_dims = None
        first = self.model[0]
        self._router = first if type(first).__name__ in ROUTERS else None
        self._lock = threading.Lock()  # of the limit, which is the model's and not the call's

    @property
    def device(self) -> Any:
        """Where its weights are."""
        return self.model.device

    def modules(self, route: str) -> list[Any]:
        """The steps of a route, in order."""
        if self._router is None:
            return list(self.model)
        return [*self._router.sub_modules[route], *list(self.model)[1:]]

    def body(self, route: str) -> tuple[Body, list[Any]]:
        """The body of a route, and its steps. Raises ModelFailed for one that only the library can compute."""
        body = body_of(self.layout, route)
        if body is None:
            raise ModelFailed(f"its modules are none that embedpool computes: {self._kinds(route)}")
        return body, [module for module in self.modules(route) if type(module).__name__ not in body.left_out]

    def _kinds(self, route: str) -> str:
        return ", ".join(type(module).__name__ for module in self.modules(route))

    def compute(
        self,
        inputs: Sequence[tuple[str, ...]],
        *,
        prompt: str = "",
        route: str = "",
        limit: int | None = None,
        side: str = "right",
    ) -> Rows:
        """Rows of inputs, each of up to `limit` tokens, the model's own limit by default.

        Those of a model that scores are logits of pairs, or of texts.
        """
        with self._limited(route, limit, side):
            if self.layout.kind in SCORING:
                return Rows(self._logits(inputs, prompt))
            texts = [parts[0] for parts in inputs]
            task = {"task": route} if route else {}
            encode = functools.partial(self.model.encode, texts, prompt=prompt, show_progress_bar=False, **task)
            if self.layout.kind == EMBED:
                return Rows(_as_rows(encode()))
            if self.layout.kind == SPARSE:  # a text at a time: its rows are as wide as the vocabulary, and dense
                return sparse_of(encode(convert_to_sparse_tensor=False, batch_size=1).float().cpu().numpy())
            found = [np.asarray(row, np.float32) for row in encode(convert_to_numpy=True)]
            return Rows(np.concatenate(found), np.cumsum([0, *map(len, found)]).astype(np.int64))

    def _logits(self, inputs: Sequence[tuple[str, ...]], prompt: str) -> Array:
        import torch

        if all(len(parts) > 1 for parts in inputs):
            identity = torch.nn.Identity()
            pairs = [list(parts) for parts in inputs]
            return _as_rows(self.model.predict(pairs, activation_fn=identity, prompt=prompt, show_progress_bar=False))
        first = self.model[0]
        texts = [prompt + parts[0] for parts in inputs]
        with torch.inference_mode():
            given = first.tokenizer(
                texts, padding=True, truncation=True, max_length=first.max_seq_length, return_tensors="pt"
            )
            return _as_rows(first.auto_model(**given.to(self.model.device)).logits.float().cpu().numpy())

    @contextlib.contextmanager
    def _limited(self, route: str, limit: int | None, side: str) -> Iterator[None]:
        first = self.modules(route)[0]
        tokenizer: Any = getattr(first, "tokenizer", None)
        if limit is None or not hasattr(tokenizer, "truncation_side"):
            yield
            return
        name = "max_seq_length"
        if self.layout.kind == MULTIVECTOR:
            name = "query_length" if route == QUERY else "document_length"
        with self._lock:
            before = getattr(first, name), tokenizer.truncation_side
            setattr(first, name, limit)
            tokenizer.truncation_side = side
            try:
                yield
            finally:
                setattr(first, name, before[0])
                tokenizer.truncation_side = before[1]


def _as_rows(values: Any) -> Array:
    rows = np.asarray(values, np.float32)
    return rows if rows.ndim == 2 else rows[:, None]


def _class_for(kind: str) -> Any:
    """The library's class for models of this kind. Raises ModelFailed where its version has none."""
    import sentence_transformers

    name = {EMBED: "SentenceTransformer", SPARSE: "SparseEncoder", MULTIVECTOR: "MultiVectorEncoder"}.get(
        kind, "CrossEncoder"
    )
    found = getattr(sentence_transformers, name, None)
    if found is None:
        raise ModelFailed(f"sentence-transformers {sentence_transformers.__version__} has no {name}: a newer one has")
    return found


def _loaded(layout: Layout, config: LocalStConfig, dtype: str, backend: str) -> Any:
    from tqdm import tqdm
    from transformers.utils import logging as transformers_logging

    tqdm.set_lock(threading.RLock())  # its own would be a semaphore that outlives a killed child
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        model = _class_for(layout.kind)(
            str(layout.folder),
            device=config.device,
            trust_remote_code=config.trust_remote_code,
            local_files_only=True,
            backend=backend,
            model_kwargs={"use_safetensors": True, "dtype": dtype} if backend == "torch" else {},
        )
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise ModelFailed(f"it needs code that comes with the model: {TRUSTED}") from None
        raise
    return model.eval()
