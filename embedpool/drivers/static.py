"""A static model: its tokens' vectors or weights, looked up in a table. numpy alone, no torch, no padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from embedpool.drivers.heads import sparse_rows
from embedpool.drivers.layout import SPARSE_STATIC, STATIC, Module
from embedpool.drivers.model_files import idf_file, is_model2vec, read_json, tensors_of
from embedpool.drivers.pipeline import Pipeline
from embedpool.drivers.tokenizer import FolderTokenizer
from embedpool.errors import ModelFailed
from embedpool.tasks.item import Batch
from embedpool.tasks.rows import Rows

Array = NDArray[Any]


def is_static(steps: Sequence[Module]) -> bool:
    """Whether a route is a table of vectors, at most made to length 1, or one of weights."""
    first, *others = steps
    if first.kind == SPARSE_STATIC:
        return not others
    return first.kind == STATIC and all(step.kind == "Normalize" for step in others)


def static_pipeline(tokenizer: FolderTokenizer, steps: Sequence[Module]) -> Pipeline:
    """That of a static route."""
    kind = WeightsPipeline if steps[0].kind == SPARSE_STATIC else StaticPipeline
    return kind(tokenizer, steps)


class WeightsPipeline(Pipeline):
    """Each token that a text has weighs what the table says, however often it occurs: SparseStaticEmbedding."""

    pads = computes = False

    def __init__(self, tokenizer: FolderTokenizer, steps: Sequence[Module]) -> None:
        super().__init__(tokenizer)
        folder = steps[0].folder
        if file := idf_file(folder):
            self._weights = np.zeros(tokenizer.vocabulary_size, np.float32)
            for token, weight in read_json(file).items():
                self._weights[tokenizer.ids_of([token])] = weight
        else:
            self._weights = tensors_of(folder / "model.safetensors")["weight"].astype(np.float32, copy=False)
        if len(self._weights) < tokenizer.vocabulary_size:
            says = f"{len(self._weights)} weights for the {tokenizer.vocabulary_size} tokens of its tokenizer"
            raise ModelFailed(f"its table has {says}")

    @override
    def run(self, batch: Batch) -> Rows:
        found = [np.unique(np.asarray(row, np.int64)) for row in self._ids(batch)]
        entries = np.concatenate(found)
        owners = np.repeat(np.arange(len(found)), [len(row) for row in found])
        values = self._weights[entries]
        some = values != 0
        return sparse_rows(len(found), owners[some], entries[some], values[some])


class StaticPipeline(Pipeline):
    """As StaticEmbedding computes, or as model2vec does where the table is in its form: told by the weights' names.

    model2vec's tables may be quantised: `mapping` gives the row of a token, `weights` a factor. It leaves out tokens
    that stand for what is in no vocabulary. It also cuts texts at 512 tokens; here they are cut where the folder says.
    """

    pads = computes = False

    def __init__(self, tokenizer: FolderTokenizer, steps: Sequence[Module]) -> None:
        super().__init__(tokenizer)
        folder = steps[0].folder
        tensors = tensors_of(folder / "model.safetensors")
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
    def run(self, batch: Batch) -> Rows:
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
        return Rows(means)

    def _vectors(self, tokens: Array) -> Array:
        """float32 of shape (tokens, width)."""
        vectors = self._table[tokens if self._rows is None else self._rows[tokens]].astype(np.float32, copy=False)
        return vectors if self._factors is None else vectors * self._factors[tokens, None].astype(np.float32)
