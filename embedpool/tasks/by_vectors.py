"""Pairs for models that give vectors: each part is embedded by itself, and the vectors of both make the score."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import ClassVar

import numpy as np
from typing_extensions import override

from embedpool.config.spec import DriverConfig
from embedpool.errors import EmbedpoolError
from embedpool.tasks.embed import Embed, EmbedOptions, final_form
from embedpool.tasks.item import Item
from embedpool.tasks.multivector import MultiVector
from embedpool.tasks.rows import Rows
from embedpool.tasks.score import Score, require_none_but
from embedpool.tasks.task import Measured
from embedpool.tasks.tokenizer import Tokenizer

OPTIONS = ("truncate", "max_seq_length", "on_error")


@dataclasses.dataclass(frozen=True)
class ByVectors(Score):
    """Each pair has two items, of which equal ones are computed once, as `embeds` makes them.

    `scoring` names what the score is.
    """

    embeds: ClassVar[type[Embed]]
    scoring: ClassVar[str]

    @override
    def measure(
        self, config: DriverConfig, tokenizer: Tokenizer, still_wanted: Callable[[], None] = lambda: None
    ) -> Measured:
        require_none_but(OPTIONS, self.options, "is not for a model that gives vectors")
        broken = self.broken(map("\n".join, self.parts), self.path)
        there = [i for i in range(len(self)) if i not in broken]
        queries = {query: number for number, query in enumerate(dict.fromkeys(self.parts[i][0] for i in there))}
        sides = (list(queries), [self.parts[i][-1] for i in there])
        asked, found = (
            self.embeds(texts, self._options(side)).measure(config, tokenizer, still_wanted)
            for side, texts in enumerate(sides)
        )
        by_query = {item.index: item for item in asked.items}
        by_document = {item.index: item for item in found.items}
        cut_queries, cut_documents = set(asked.truncated), set(found.truncated)
        items: list[Item] = []
        truncated: list[int] = []
        too_long: dict[int, str] = {}
        for number, i in enumerate(there):
            of_query = queries[self.parts[i][0]]
            if error := asked.refused.get(of_query) or found.refused.get(number):
                too_long[i] = error.message
                continue
            if of_query in cut_queries or number in cut_documents:
                truncated.append(i)
            query, document = by_query[of_query], by_document[number]
            document.index, document.piece = i, 1
            items += [
                Item(query.parts, query.tokens, query.ids, query.second, group=query.group, key=query.key, index=i),
                document,
            ]
        return Measured(items, truncated, {**broken, **self.too_long(too_long)})

    def _options(self, side: int) -> EmbedOptions:
        """For the queries, at 0, or the documents. What is too long is refused in the words of pairs."""
        cut, limit = self.options.truncate, self.options.max_seq_length
        return EmbedOptions(truncate=cut, max_seq_length=limit, on_error="partial")


@dataclasses.dataclass(frozen=True)
class MaxSim(ByVectors):
    """For each vector of the query that of the document that is nearest, summed up."""

    name: ClassVar[str] = MultiVector.name
    embeds = MultiVector
    scoring = "maxsim"

    @override
    def _options(self, side: int) -> EmbedOptions:
        """A query has a limit of its own, which the model's files name."""
        options = dataclasses.replace(super()._options(side), input_type=("query", "document")[side])
        return options if side else dataclasses.replace(options, max_seq_length=None)

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


@dataclasses.dataclass(frozen=True)
class Cosine(ByVectors):
    """The cosine of both vectors, in as many dimensions as the model gives."""

    name: ClassVar[str] = Embed.name
    embeds = Embed
    scoring = "cosine"

    @override
    def merged(self, index: int, rows: Sequence[Rows]) -> Rows:
        return Rows(np.concatenate([row.values for row in rows], axis=1))

    @override
    def finish(self, rows: Rows, config: DriverConfig, tokenizer: Tokenizer, errors: dict[int, EmbedpoolError]) -> Rows:
        if not rows.width:
            return rows
        sides = (side[:, : tokenizer.default_dimensions] for side in np.split(rows.values, 2, axis=1))
        query, document = (final_form(side, EmbedOptions(), normalize=True, dtype="float32") for side in sides)
        scores = (query * document).sum(axis=1, keepdims=True)
        return Rows(np.concatenate([scores, scores], axis=1))
