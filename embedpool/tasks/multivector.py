"""The multivector task: a vector for each token of a text that counts, and what a query and a document score by them.

A query and a document are treated differently, so a text's `input_type` decides; without one it is a document.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import ClassVar

import numpy as np
from typing_extensions import override

from embedpool.config.spec import DriverConfig
from embedpool.errors import EmbedpoolError, UnsupportedOption
from embedpool.tasks.embed import Embed, EmbedOptions, final_form
from embedpool.tasks.item import Item
from embedpool.tasks.rows import Rows
from embedpool.tasks.score import Score, ScoreOptions
from embedpool.tasks.task import Measured
from embedpool.tasks.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class MultiVector(Embed):
    """Texts for a model that gives a vector for each token. The rows are ragged."""

    name: ClassVar[str] = "multivector"

    @property
    @override
    def of_tokens(self) -> str:
        return self.name

    @override
    def finish(self, rows: Rows, config: DriverConfig, tokenizer: Tokenizer, errors: dict[int, EmbedpoolError]) -> Rows:
        """The model's own vectors have the length that it gives them; fewer dimensions make them shorter."""
        if not rows.width:
            return rows
        normalize = self.options.normalize is None and self.options.dimensions is not None
        return Rows(final_form(rows.values, self.options, normalize=normalize, dtype=config.dtype), rows.splits)


@dataclasses.dataclass(frozen=True)
class MaxSim(Score):
    """Pairs for a multi-vector model: for each vector of the query that of the document that is nearest, summed up.

    Each pair has two items, of which equal ones are computed once.
    """

    name: ClassVar[str] = MultiVector.name

    @override
    def measure(
        self, config: DriverConfig, tokenizer: Tokenizer, still_wanted: Callable[[], None] = lambda: None
    ) -> Measured:
        self._require_its_options()
        broken = self.broken(map("\n".join, self.parts), self.path)
        there = [i for i in range(len(self)) if i not in broken]
        queries = list(dict.fromkeys(self.parts[i][0] for i in there))
        of_queries = MultiVector(queries, EmbedOptions(input_type="query"))
        options = EmbedOptions(
            input_type="document",
            truncate=self.options.truncate if self.options.truncate != "right" or not config.is_remote else None,
            max_seq_length=self.options.max_seq_length,
            on_error=self.options.on_error,
        )
        of_documents = MultiVector([self.parts[i][-1] for i in there], options)
        by_query = dict(zip(queries, of_queries.measure(config, tokenizer, still_wanted).items, strict=True))
        found = of_documents.measure(config, tokenizer, still_wanted)
        items: list[Item] = []
        for document in found.items:
            document.index, document.piece = there[document.index], 1
            query = by_query[self.parts[document.index][0]]
            items += [
                Item(
                    query.parts, query.tokens, query.ids, query.second,
                    group=query.group, key=query.key, index=document.index,
                ),
                document,
            ]  # fmt: skip
        refused = {there[i]: error for i, error in found.refused.items()}
        return Measured(items, [there[i] for i in found.truncated], {**broken, **refused})

    def _require_its_options(self) -> None:
        """Raises UnsupportedOption for what pairs that are read together alone can have."""
        kept = ("truncate", "max_seq_length", "on_error")
        names = [field.name for field in dataclasses.fields(ScoreOptions) if field.name not in kept]
        odd = [name for name in names if getattr(self.options, name) != getattr(ScoreOptions(), name)]
        if odd:
            fields = {f"options.{name}": "is not for a multi-vector model" for name in odd}
            raise UnsupportedOption("; ".join(f"{path} {says}" for path, says in fields.items()), fields=fields)

    @override
    def merged(self, index: int, rows: Sequence[Rows]) -> Rows:
        """The sum of the greatest products, and of how many vectors of the query it is."""
        query, document = (row.values for row in rows)
        score = float((query @ document.T).max(axis=1).sum()) if len(query) and len(document) else 0.0
        return Rows(np.array([[score, len(query)]], np.float32))

    @override
    def finish(self, rows: Rows, config: DriverConfig, tokenizer: Tokenizer, errors: dict[int, EmbedpoolError]) -> Rows:
        if not rows.width:
            return rows
        scores = rows.values[:, :1]
        if tokenizer.averages_queries:
            scores = scores / np.maximum(rows.values[:, 1:], 1)
        return Rows(np.concatenate([scores, scores], axis=1))
