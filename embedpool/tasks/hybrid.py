"""The hybrid task: several outputs of one pass of a model. And which task stands for what a request asks for."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import ClassVar

from typing_extensions import override

from embedpool.config.spec import DriverConfig
from embedpool.errors import EmbedpoolError
from embedpool.tasks.embed import Embed, EmbedOptions
from embedpool.tasks.multivector import MultiVector
from embedpool.tasks.rows import Rows
from embedpool.tasks.sparse import Sparse
from embedpool.tasks.tokenizer import Tokenizer

# What a request calls an output → the task that gives it.
OUTPUTS: Mapping[str, type[Embed]] = {"dense": Embed, "sparse": Sparse, "multivector": MultiVector}
TASK_OF_OUTPUT: Mapping[str, str] = {name: task.name for name, task in OUTPUTS.items()}
OF_TASK: Mapping[str, type[Embed]] = {task.name: task for task in OUTPUTS.values()}


@dataclasses.dataclass(frozen=True)
class Hybrid(Embed):
    """Texts for a model that gives several outputs. The rows stand in `also`, by task; the row itself is empty."""

    name: ClassVar[str] = "hybrid"
    of_others: ClassVar[Sequence[str]] = ()
    wanted: Sequence[str] = ()

    @property
    @override
    def outputs(self) -> Sequence[str]:
        return sorted(TASK_OF_OUTPUT[name] for name in self.wanted)

    @property
    @override
    def of_tokens(self) -> str | None:
        return MultiVector.name if MultiVector.name in self.outputs else None

    @override
    def finish(self, rows: Rows, config: DriverConfig, tokenizer: Tokenizer, errors: dict[int, EmbedpoolError]) -> Rows:
        """Each output as it would be alone: of the options those count that are for it."""
        also = {}
        for name in self.outputs:
            task = OF_TASK[name]
            others = {each: getattr(EmbedOptions(), each) for each in task.of_others}
            options = dataclasses.replace(self.options, **others)
            found = rows.also.get(name, rows)  # where all texts failed there are none
            also[name] = task(self.texts, options).finish(found, config, tokenizer, errors)
        return Rows(rows.values, also=also)


def output_of(kinds: Collection[str]) -> str:
    """What a model of these kinds gives where a request does not say: dense vectors, if it has any."""
    return next((name for name, task in TASK_OF_OUTPUT.items() if task in kinds), "dense")


def task_for(wanted: Sequence[str], texts: Sequence[str], options: EmbedOptions) -> Embed:
    """The task that gives these outputs."""
    if len(wanted) > 1:
        return Hybrid(texts, options, wanted)
    return OUTPUTS[wanted[0]](texts, options)
