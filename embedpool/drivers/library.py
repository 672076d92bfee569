"""A model as its own library serves it: what everything that embedpool computes by itself is compared with."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedpool.config.spec import LocalStConfig
from embedpool.drivers.layout import EMBED, ROUTERS, TRUSTED, Layout
from embedpool.errors import ModelFailed

Array = NDArray[Any]


class Library:
    """A SentenceTransformer or a CrossEncoder. Vectors are whole, whatever `truncate_dim` says; scores are logits."""

    def __init__(self, layout: Layout, config: LocalStConfig, dtype: str, backend: str) -> None:
        self.layout = layout
        self.model = _loaded(layout, config, dtype, backend)
        self.output = "sentence_embedding" if layout.kind == EMBED else "scores"  # where its last step puts the rows
        # What its steps want to know beside the inputs.
        self.constants = {"modality": "message", "logits_to_keep": 1} if layout.is_causal else {}
        if layout.kind == EMBED:
            self.model.truncate_dim = None
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

    def compute(
        self,
        inputs: Sequence[tuple[str, ...]],
        *,
        prompt: str = "",
        route: str = "",
        limit: int | None = None,
        side: str = "right",
    ) -> Array:
        """float32 rows of shape (inputs, width), each of up to `limit` tokens, the model's own limit by default.

        An embedder's are vectors of texts, those of a model that scores logits of pairs, or of texts.
        """
        with self._limited(route, limit, side):
            if self.layout.kind != EMBED:
                return self._logits(inputs, prompt)
            task = {"task": route} if self._router is not None else {}
            texts = [parts[0] for parts in inputs]
            return _as_rows(self.model.encode(texts, prompt=prompt, show_progress_bar=False, **task))

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
        with self._lock:
            before = first.max_seq_length, tokenizer.truncation_side
            first.max_seq_length, tokenizer.truncation_side = limit, side
            try:
                yield
            finally:
                first.max_seq_length, tokenizer.truncation_side = before


def _as_rows(values: Any) -> Array:
    rows = np.asarray(values, np.float32)
    return rows if rows.ndim == 2 else rows[:, None]


def _loaded(layout: Layout, config: LocalStConfig, dtype: str, backend: str) -> Any:
    from sentence_transformers import CrossEncoder, SentenceTransformer
    from tqdm import tqdm
    from transformers.utils import logging as transformers_logging

    tqdm.set_lock(threading.RLock())  # its own would be a semaphore that outlives a killed child
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        model = (SentenceTransformer if layout.kind == EMBED else CrossEncoder)(
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
