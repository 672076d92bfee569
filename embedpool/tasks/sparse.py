"""The sparse task: a text becomes values of a few tokens of the vocabulary, or of a few dimensions."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from typing_extensions import override

from embedpool.config.spec import DriverConfig
from embedpool.errors import EmbedpoolError, InvalidRequest
from embedpool.tasks.embed import Embed
from embedpool.tasks.rows import Rows
from embedpool.tasks.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Sparse(Embed):
    """Texts for a model that gives sparse rows: token ids in ascending order, and what each weighs."""

    name: ClassVar[str] = "sparse"
    of_others: ClassVar[Sequence[str]] = ("normalize", "dtype", "dimensions", "precision")

    @override
    def refusal(self, model: str, tokenizer: Tokenizer) -> EmbedpoolError | None:
        most = tokenizer.most_active
        if most is not None and (self.options.top_k or 0) > most:
            says = f"must be at most {most}, which is how many {model!r} gives"
            return InvalidRequest(f"options.top_k: {says}", fields={"options.top_k": says})
        return super().refusal(model, tokenizer)

    @override
    def finish(self, rows: Rows, config: DriverConfig, tokenizer: Tokenizer, errors: dict[int, EmbedpoolError]) -> Rows:
        top_k = self.options.top_k or tokenizer.default_top_k
        return rows if top_k is None or rows.splits is None else largest(rows, top_k)


def largest(rows: Rows, count: int) -> Rows:
    """Of each sparse row the values that are largest, whatever their sign; of equal ones those that come first."""
    assert rows.splits is not None
    assert rows.indices is not None
    kept = []
    for start, stop in zip(rows.splits[:-1].tolist(), rows.splits[1:].tolist(), strict=True):
        order = np.argsort(-np.abs(rows.values[start:stop]), kind="stable")[:count]
        kept.append(start + np.sort(order))
    places = np.concatenate(kept) if kept else np.zeros(0, np.int64)
    splits = np.cumsum([0, *map(len, kept)]).astype(np.int64)
    return Rows(rows.values[places], splits, rows.indices[places])
