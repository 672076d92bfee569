"""What makes rows of the vectors that a model's body gives: sparse ones, ragged ones, or several of one pass.

A body is a route's modules up to where a row would be as wide as the vocabulary, or as long as its text. The rest is
done here, in numpy and for all runtimes alike, in pieces that are bounded in bytes.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from embedpool.drivers.body import has_three, most_active
from embedpool.drivers.late_interaction import QUERY
from embedpool.drivers.layout import EMBED, MULTIVECTOR, MULTIVECTOR_LAYER, SPARSE, SPARSE_LAYER, Layout, Module
from embedpool.drivers.model_files import read_json, tensors_of
from embedpool.drivers.tokenizer import FolderTokenizer
from embedpool.tasks.hybrid import Hybrid
from embedpool.tasks.item import Batch, Ids
from embedpool.tasks.late_chunking import Tokens
from embedpool.tasks.rows import Rows

Array = NDArray[Any]

PIECE_BYTES = 16 << 20  # of values for the vocabulary that are there at once
GROUP_TOKENS = 4096  # whose values are made together, so that the vocabulary's weights are read once for all of them
SMALLEST_SLICE = 64  # entries of the vocabulary


class Head(abc.ABC):
    """The last step of a route."""

    @abc.abstractmethod
    def rows(self, given: Array, ids: Sequence[Ids], batch: Batch) -> Rows:
        """Rows of texts that have these ids. `given` is float32, of shape (texts, longest, width) or (texts, width).

        Not kept: it may be overwritten later.
        """


def sparse_rows(texts: int, owners: Array, indices: Array, values: Array) -> Rows:
    """Entries, each of the text whose number is in `owners`; those of a text come in ascending order."""
    order = np.lexsort((indices, owners))
    splits = np.concatenate([[0], np.cumsum(np.bincount(owners, minlength=texts))]).astype(np.int64)
    return Rows(values[order].astype(np.float32, copy=False), splits, indices[order].astype(np.int32))


def sparse_of(dense: Array) -> Rows:
    """What is not zero in float32 of shape (texts, width)."""
    owners, indices = np.nonzero(dense)
    return sparse_rows(len(dense), owners, indices, dense[owners, indices])


def of_tokens(given: Array, kept: Sequence[Array]) -> Rows:
    """The vectors of the tokens at these places of each text."""
    parts = [given[text][places] for text, places in enumerate(kept)]
    splits = np.concatenate([[0], np.cumsum([len(part) for part in parts])]).astype(np.int64)
    return Rows(np.concatenate(parts).astype(np.float32, copy=False), splits)


def normalized(vectors: Array) -> Array:
    """Of length 1, as torch does it."""
    return np.asarray(vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12), np.float32)


class AllTokens(Head):
    """A vector for each token, as the body gives it."""

    @override
    def rows(self, given: Array, ids: Sequence[Ids], batch: Batch) -> Rows:
        return of_tokens(given, [np.arange(len(row)) for row in ids])


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """The last layer of a masked language model: weights of shape (entries, width), and what is added, if anything."""

    weight: Array
    bias: Array | None


@dataclasses.dataclass(frozen=True)
class Splade(Head):
    """Of each entry of the vocabulary the greatest value among a text's tokens, or their sum; then its logarithm.

    As SpladePooling computes, but never for more tokens and entries at once than PIECE_BYTES hold.
    """

    vocabulary: Vocabulary
    sums: bool
    log_twice: bool

    @override
    def rows(self, given: Array, ids: Sequence[Ids], batch: Batch) -> Rows:
        lengths = np.fromiter(map(len, ids), np.int64, len(ids))
        found: list[tuple[Array, Array, Array]] = []
        for texts in _groups(lengths):
            tokens = np.concatenate([given[text, : lengths[text]] for text in texts])
            ends = np.cumsum(lengths[texts]).tolist()
            found += [(texts[owners], entries, values) for owners, entries, values in self._entries(tokens, ends)]
        if not found:
            return sparse_rows(len(ids), *(np.zeros(0, dtype) for dtype in (np.int64, np.int64, np.float32)))
        return sparse_rows(len(ids), *(np.concatenate(parts) for parts in zip(*found, strict=True)))

    def _entries(self, tokens: Array, ends: Sequence[int]) -> Iterator[tuple[Array, Array, Array]]:
        """Of texts that end at these tokens: a part of the vocabulary at a time."""
        weight, bias = self.vocabulary.weight, self.vocabulary.bias
        step = max(PIECE_BYTES // (4 * len(tokens)), SMALLEST_SLICE)
        for start in range(0, len(weight), step):
            part = slice(start, start + step)
            reduced = self._reduced(tokens @ weight[part].T, 0.0 if bias is None else bias[part], ends)
            owners, entries = np.nonzero(reduced)
            yield owners, entries + start, reduced[owners, entries]

    def _reduced(self, values: Array, bias: Array | float, ends: Sequence[int]) -> Array:
        """The logarithm rises with its argument: of the greatest value it is the greatest logarithm."""
        reduce = np.add.reduce if self.sums else np.maximum.reduce
        if self.sums:
            values += bias
            self._logarithm(values)
        found = np.empty((len(ends), values.shape[1]), np.float32)
        for text, (begin, end) in enumerate(zip([0, *ends], ends, strict=False)):  # many times as fast as reduceat
            reduce(values[begin:end], axis=0, out=found[text])
        return found if self.sums else self._logarithm(found + bias)

    def _logarithm(self, values: Array) -> Array:
        np.maximum(values, 0, out=values)
        np.log1p(values, out=values)
        if self.log_twice:
            np.log1p(values, out=values)
        return values


def _groups(lengths: Array) -> Iterator[Array]:
    """Texts that have tokens, some at a time, by their numbers."""
    group: list[int] = []
    for text in np.flatnonzero(lengths).tolist():
        if group and lengths[group].sum() + lengths[text] > GROUP_TOKENS:
            yield np.asarray(group)
            group = []
        group.append(text)
    if group:
        yield np.asarray(group)


@dataclasses.dataclass(frozen=True)
class AutoEncoder(Head):
    """The largest values of a layer that is wider than a vector, as SparseAutoEncoder computes them."""

    weight: Array
    before: Array
    after: Array
    count: int
    normalizes: bool

    @override
    def rows(self, given: Array, ids: Sequence[Ids], batch: Batch) -> Rows:
        x = np.asarray(given, np.float32)
        if self.normalizes:
            x = x - x.mean(axis=-1, keepdims=True)
            x = x / (x.std(axis=-1, ddof=1, keepdims=True) + np.float32(1e-5))
        values = (x - self.before) @ self.weight.T + self.after
        kept = np.argpartition(-values, min(self.count, values.shape[1]) - 1, axis=1)[:, : self.count]
        found = np.zeros_like(values)
        np.put_along_axis(found, kept, np.maximum(np.take_along_axis(values, kept, axis=1), 0), axis=1)
        return sparse_of(found)


@dataclasses.dataclass(frozen=True)
class Counted(Head):
    """A vector for each token that counts: not for those of `skipped`, and if `only` has any for those alone."""

    skipped: Collection[int] = ()
    only: Collection[int] = ()

    @override
    def rows(self, given: Array, ids: Sequence[Ids], batch: Batch) -> Rows:
        return of_tokens(given, [self._places(np.asarray(row, np.int64)) for row in ids])

    def _places(self, ids: Array) -> Array:
        counts = ~np.isin(ids, list(self.skipped))
        if self.only:
            counts &= np.isin(ids, list(self.only))
        return np.flatnonzero(counts)


@dataclasses.dataclass(frozen=True)
class Linear:
    """A layer: weights of shape (width out, width in), and what is added."""

    weight: Array
    bias: Array

    def __call__(self, vectors: Array) -> Array:
        """float32 of shape (vectors, width out)."""
        return np.asarray(vectors @ self.weight.T + self.bias, np.float32)


@dataclasses.dataclass(frozen=True)
class ThreeOutputs(Head):
    """Dense, sparse and multi-vector rows of one pass, as FlagEmbedding makes them of BGE-M3.

    The first token's vector is the text's. A token weighs what `sparse` makes of its vector, one that occurs several
    times as much as its greatest; the ids of `unused` weigh nothing. All but the first token have a vector each.
    """

    sparse: Linear
    multivector: Linear
    unused: Collection[int]

    @override
    def rows(self, given: Array, ids: Sequence[Ids], batch: Batch) -> Rows:
        makers = {"embed": self._dense, "sparse": self._sparse, "multivector": self._vectors}
        if batch.task in makers:
            return makers[batch.task](given, ids)
        also: Mapping[str, Rows] = {task: makers[task](given, ids) for task in batch.options["outputs"]}
        return Rows(np.zeros((len(ids), 0), np.float32), also=also)

    def _dense(self, given: Array, ids: Sequence[Ids]) -> Rows:
        return Rows(normalized(given[:, 0]))

    def _sparse(self, given: Array, ids: Sequence[Ids]) -> Rows:
        owners = np.repeat(np.arange(len(ids)), [len(row) for row in ids])
        entries = np.concatenate([np.asarray(row, np.int64) for row in ids])
        weights = np.concatenate([self.sparse(given[text, : len(row)])[:, 0] for text, row in enumerate(ids)])
        counts = (weights > 0) & ~np.isin(entries, list(self.unused))
        owners, entries, weights = owners[counts], entries[counts], weights[counts]
        order = np.lexsort((-weights, entries, owners))  # the greatest of each first
        owners, entries, weights = owners[order], entries[order], weights[order]
        first = np.ones(len(order), bool)
        first[1:] = (owners[1:] != owners[:-1]) | (entries[1:] != entries[:-1])
        return sparse_rows(len(ids), owners[first], entries[first], weights[first])

    def _vectors(self, given: Array, ids: Sequence[Ids]) -> Rows:
        rows = of_tokens(given, [np.arange(1, len(row)) for row in ids])
        return Rows(normalized(self.multivector(rows.values)), rows.splits)


def heads_of(layout: Layout, tokenizer: FolderTokenizer, vocabulary: Vocabulary | None) -> Mapping[str, Head]:
    """The head of a route by the task it is for; none where the body gives the rows. `vocabulary` is that of Splade."""
    steps = layout.routes[tokenizer.route]
    if has_three(layout):
        layers = (tensors_of(layout.folder / name) for name in (SPARSE_LAYER, MULTIVECTOR_LAYER))
        sparse, multivector = (Linear(layer["weight"], layer["bias"]) for layer in layers)
        three = ThreeOutputs(sparse, multivector, tokenizer.unused_ids())
        return {**dict.fromkeys((EMBED, SPARSE, MULTIVECTOR, Hybrid.name), three), Tokens.name: AllTokens()}
    if layout.kind == MULTIVECTOR:
        assert layout.interaction is not None
        found = layout.interaction
        skipped = tokenizer.ids_of(found.skipped) if tokenizer.route in found.skips else []
        return {MULTIVECTOR: Counted(skipped, () if tokenizer.route == QUERY else found.only)}
    if layout.kind == SPARSE and vocabulary is not None:
        config = read_json(steps[-1].folder / "config.json")
        sums = config.get("pooling_strategy", "max") == "sum"
        log_twice = config.get("activation_function", "relu") == "log1p_relu"
        return {SPARSE: Splade(vocabulary, sums, log_twice)}
    if layout.kind == SPARSE:
        return {SPARSE: _auto_encoder(steps[-1], layout.most_active)}
    return {}


def _auto_encoder(module: Module, of_model: int | None) -> AutoEncoder:
    config = read_json(module.folder / "config.json")
    weights = tensors_of(module.folder / "model.safetensors")
    return AutoEncoder(
        weights["encoder.weight" if "encoder.weight" in weights else "decoder.linear.weight"],  # they are one
        weights["pre_bias"],
        weights["latent_bias"],
        most_active(module, of_model),
        bool(config.get("normalize")),
    )
