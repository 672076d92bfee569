"""A model as its own library serves it: what everything that embedpool computes by itself is compared with."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedpool.config.spec import LocalStConfig
from embedpool.drivers.layout import ROUTERS, TRUSTED, Layout
from embedpool.errors import ModelFailed

Array = NDArray[Any]


class Library:
    """A SentenceTransformer, loaded from a layout. Its vectors are whole, whatever `truncate_dim` says."""

    def __init__(self, layout: Layout, config: LocalStConfig, dtype: str, backend: str) -> None:
        self.layout = layout
        self.model = _loaded(layout, config, dtype, backend)
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

    def encode(
        self, texts: Sequence[str], *, prompt: str = "", route: str = "", limit: int | None = None, side: str = "right"
    ) -> Array:
        """float32 vectors of shape (texts, width), each of up to `limit` tokens, the model's own limit by default."""
        task = {"task": route} if self._router is not None else {}
        with self._limited(route, limit, side):
            vectors = self.model.encode(list(texts), prompt=prompt, show_progress_bar=False, **task)
        return np.asarray(vectors, np.float32)

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


def _loaded(layout: Layout, config: LocalStConfig, dtype: str, backend: str) -> Any:
    from sentence_transformers import SentenceTransformer
    from tqdm import tqdm
    from transformers.utils import logging as transformers_logging

    tqdm.set_lock(threading.RLock())  # its own would be a semaphore that outlives a killed child
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        model = SentenceTransformer(
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
