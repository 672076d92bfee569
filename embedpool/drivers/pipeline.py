"""A route of a local model, from the items of a batch to float32 rows: by token ids, or by the library's encode."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from embedpool.drivers.heads import AllTokens, Head
from embedpool.drivers.library import Library
from embedpool.drivers.padding import pad
from embedpool.drivers.tokenizer import FolderTokenizer
from embedpool.errors import UnsupportedOption, UnsupportedTask
from embedpool.tasks.item import Batch, Ids
from embedpool.tasks.late_chunking import Tokens
from embedpool.tasks.rows import Rows

Array = NDArray[Any]
Read = Callable[[Array], Any]  # makes something of float32 values, which are there for as long as it works
Run = Callable[[dict[str, Array], Read], Any]  # padded inputs of shape (texts, tokens) → what is read of the output


def copied(values: Array) -> Array:
    """A `Read` that keeps all of it."""
    return np.array(values, dtype=np.float32)


class Pipeline(abc.ABC):
    """Computes the batches of one route."""

    pads = True  # whether a batch costs what its longest text times their number costs, else what its tokens cost
    computes = True  # whether tokens cost anything to speak of
    by_ids = True  # what it is given; if not, it reads texts

    def __init__(self, tokenizer: FolderTokenizer) -> None:
        self.tokenizer = tokenizer

    @abc.abstractmethod
    def run(self, batch: Batch) -> Rows:
        """A row for each item."""

    def run_beside(self, batch: Batch) -> Rows:
        """As `run` works while other batches run: what costs are fitted to."""
        return self.run(batch)

    def _ids(self, batch: Batch) -> Sequence[Ids]:
        return batch.ids or self.tokenizer.encode(batch.texts)


class PaddedPipeline(Pipeline):
    """Pads token ids and gives them to `run`, of whose output a head makes rows, where the task has one.

    `of_nothing` is the vector of a text without any token; `tokens` runs the model up to where it pools.
    """

    def __init__(
        self,
        tokenizer: FolderTokenizer,
        run: Run,
        heads: Mapping[str, Head],
        of_nothing: Array | None = None,
        *,
        beside_others: Run | None = None,
        tokens: Run | None = None,
    ) -> None:
        super().__init__(tokenizer)
        self._run = run
        self._beside_others = beside_others or run
        self._tokens = tokens
        self._heads = heads
        self._of_nothing = of_nothing

    @override
    def run(self, batch: Batch) -> Rows:
        return self._rows(self._run, batch)

    @override
    def run_beside(self, batch: Batch) -> Rows:
        return self._rows(self._beside_others, batch)

    def _rows(self, run: Run, batch: Batch) -> Rows:
        ids = self._ids(batch)
        head = self._heads.get(batch.task)
        if head is None and batch.task == Tokens.name:
            if self._tokens is None:
                raise UnsupportedTask("this model gives no vectors of tokens")
            run, head = self._tokens, AllTokens()
        some = [i for i, row in enumerate(ids) if len(row)]
        if head is None:
            return Rows(self._vectors(run, ids, batch, some))
        if not some:
            raise ValueError("the model gives nothing for a text without tokens")
        kept = [ids[i] for i in some]
        found: Rows = run(self._inputs(kept, batch, some), lambda given: head.rows(given, kept, batch))
        if len(some) == len(ids):
            return found
        place = {text: number for number, text in enumerate(some)}
        return Rows.gather([found.row(place[i]) if i in place else None for i in range(len(ids))])

    def _vectors(self, run: Run, ids: Sequence[Ids], batch: Batch, some: Sequence[int]) -> Array:
        if not some:
            if self._of_nothing is None:
                raise ValueError("the model gives no vector for a text without tokens")
            return np.tile(self._of_nothing, (len(ids), 1))
        found: Array = run(self._inputs([ids[i] for i in some], batch, some), copied)
        if len(some) == len(ids):
            return found
        vectors = np.empty((len(ids), found.shape[1]), np.float32)
        vectors[:] = np.float32(np.nan) if self._of_nothing is None else self._of_nothing
        vectors[some] = found
        return vectors

    def _inputs(self, ids: Sequence[Ids], batch: Batch, which: Sequence[int]) -> dict[str, Array]:
        """The inputs of these items, whose numbers in the batch are `which`."""
        seconds = [batch.items[i].second for i in which] if self.tokenizer.second_type else ()
        inputs = pad(ids, self.tokenizer.pad_id, seconds, left=self.tokenizer.pads_left)
        if self.tokenizer.excludes_prompt:
            inputs["pooled_mask"] = self._pooled_mask(inputs["attention_mask"], ids, batch)
        if self.tokenizer.hides_expansion:
            for mask, item in zip(inputs["attention_mask"], (batch.items[i] for i in which), strict=True):
                if item.second is not None:
                    mask[item.second :] = 0
        return inputs

    def _pooled_mask(self, mask: Array, ids: Sequence[Ids], batch: Batch) -> Array:
        """The mask for a pooling that leaves the prompt out, of one with a row of each text's tokens."""
        pooled = mask.astype(np.int64)
        if prompt := batch.options.get("prompt"):
            shortest = min(map(len, ids)) - self.tokenizer.ends_specially  # that of a text cut within its prompt
            pooled[:, : min(self.tokenizer.prompt_tokens(prompt), shortest)] = 0
        return pooled


class EncodePipeline(Pipeline):
    """Gives texts to the library's encode: for models that make more of a text than token ids."""

    by_ids = False

    def __init__(self, tokenizer: FolderTokenizer, library: Library) -> None:
        super().__init__(tokenizer)
        self._library = library

    @override
    def run(self, batch: Batch) -> Rows:
        if batch.task not in self.tokenizer.tasks[:1]:
            raise UnsupportedTask("this model is run by its library's encode, which gives nothing else")
        options = batch.options
        if options.get("by_ids"):
            raise UnsupportedOption("this model is run by its library, which cuts pairs in a way of its own")
        prompt = options.get("prompt", "")
        texts = [(item.parts[0].removeprefix(prompt), *item.parts[1:]) for item in batch.items]
        cuts: list[tuple[int, str] | None] = [None] * len(texts)
        if "limit" in options:
            cuts = [(options["limit"], options["side"])] * len(texts)
        elif ids := batch.ids:
            cuts = [self._cut(item.parts, of_it) for item, of_it in zip(batch.items, ids, strict=True)]
        rows: list[Rows | None] = [None] * len(texts)
        for cut in set(cuts):
            those = [i for i, found in enumerate(cuts) if found == cut]
            limit, side = cut or (None, "right")
            found = self._library.compute(
                [texts[i] for i in those], prompt=prompt, route=self.tokenizer.route, limit=limit, side=side
            )
            for number, i in enumerate(those):
                rows[i] = found.row(number)
        return Rows.gather(rows)

    def _cut(self, parts: tuple[str, ...], ids: Ids) -> tuple[int, str] | None:
        """How many tokens are kept of an input, and on which side it was cut; None if it was not."""
        if len(parts) > 1:
            (pair,) = self.tokenizer.whole([parts])
            return (len(ids), "right") if len(ids) < len(pair.ids) else None
        (whole,) = self.tokenizer.encode(parts)
        if len(ids) >= len(whole):
            return None
        kept = list(ids)
        side = "right" if kept == self.tokenizer.cut(whole, len(kept), "right") else "left"
        return len(kept), side
