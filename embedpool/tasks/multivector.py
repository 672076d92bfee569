"""The multivector task: a vector for each token of a text that counts.

A query and a document are treated differently, so a text's `input_type` decides; without one it is a document.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from typing_extensions import override

from embedpool.config.spec import DriverConfig
from embedpool.errors import EmbedpoolError
from embedpool.tasks.embed import Embed, final_form
from embedpool.tasks.rows import Rows
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
