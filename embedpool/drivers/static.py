"""A static model: the mean of its tokens' vectors, looked up in a table. numpy alone, no torch, no padding."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from typing_extensions import override

from embedpool.drivers.layout import STATIC, Module
from embedpool.drivers.model_files import is_model2vec, read_json
from embedpool.drivers.pipeline import Pipeline
from embedpool.drivers.tokenizer import FolderTokenizer
from embedpool.errors import ModelFailed
from embedpool.tasks.item import Batch

Array = NDArray[Any]


def is_static(steps: Sequence[Module]) -> bool:
    """Whether a route is a table of vectors, and at most made to length 1."""
    first, *others = steps
    return first.kind == STATIC and all(step.kind == "Normalize" for step in others)


class StaticPipeline(Pipeline):
    """As StaticEmbedding computes, or as model2vec does where the table is in its form: told by the weights' names.

    model2vec's tables may be quantised: `mapping` gives the row of a token, `weights` a factor. It leaves out tokens
    that stand for what is in no vocabulary. It also cuts texts at 512 tokens; here they are cut where the folder says.
    """

    pads = computes = False

    def __init__(self, tokenizer: FolderTokenizer, steps: Sequence[Module]) -> None:
        super().__init__(tokenizer)
        folder = steps[0].folder
        tensors = _tensors(folder / "model.safetensors")
        is_of_model2vec = is_model2vec(folder)
        self._table = tensors["embeddings" if is_of_model2vec else "embedding.weight"]
        self._rows = tensors.get("mapping") if is_of_model2vec else None
        self._factors = tensors.get("weights") if is_of_model2vec else None
        self._left_out = tokenizer.unknown_id() if is_of_model2vec else None
        normalizes = is_of_model2vec and read_json(folder / "config.json").get("normalize")
        self._normalizes = bool(normalizes) or len(steps) > 1
        self._require_a_row_for_each_token()

    def _require_a_row_for_each_token(self) -> None:
        tokens = self.tokenizer.vocabulary_size
        for what, array in (("rows", self._table if self._rows is None else self._rows), ("weights", self._factors)):
            if array is not None and len(array) < tokens:
                raise ModelFailed(f"its table has {len(array)} {what} for the {tokens} tokens of its tokenizer")

    @override
    def run(self, batch: Batch) -> Array:
        ids = self._ids(batch)
        lengths = np.fromiter(map(len, ids), dtype=np.int64, count=len(ids))
        sums = np.zeros((len(ids), self._table.shape[1]), dtype=np.float32)
        if lengths.any():
            tokens = np.concatenate([np.asarray(row, dtype=np.int64) for row in ids if len(row)])
            if self._left_out is not None:
                kept = tokens != self._left_out
                counted = np.concatenate([[0], np.cumsum(kept)])
                ends = np.cumsum(lengths)
                lengths = counted[ends] - counted[ends - lengths]
                tokens = tokens[kept]
            some = lengths > 0
            if some.any():
                starts = np.cumsum(lengths) - lengths
                sums[some] = np.add.reduceat(self._vectors(tokens), starts[some], axis=0)
        means = sums / np.maximum(lengths, 1)[:, None].astype(np.float32)
        if self._normalizes:
            means /= np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-12)
        return means

    def _vectors(self, tokens: Array) -> Array:
        """float32 of shape (tokens, width)."""
        vectors = self._table[tokens if self._rows is None else self._rows[tokens]].astype(np.float32, copy=False)
        return vectors if self._factors is None else vectors * self._factors[tokens, None].astype(np.float32)


def _tensors(file: Path) -> dict[str, Array]:
    try:
        with safe_open(str(file), framework="np") as weights:
            return {name: weights.get_tensor(name) for name in weights.keys()}  # noqa: SIM118  (it is no dict)
    except TypeError as error:  # a type that numpy has not, such as bfloat16
        raise ModelFailed(f"{file}: {error}") from None
