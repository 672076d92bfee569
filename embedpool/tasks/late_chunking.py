"""Late chunking: a document is read as a whole, and each of its chunks becomes the mean of its tokens' vectors.

The driver's task is `tokens`: a vector for each token, as the model has them before it pools. A document longer than
what the model reads at once goes through it in windows that overlap; of each token the vector counts that is farther
from a window's edge.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
from array import array
from collections.abc import Callable, Sequence
from typing import ClassVar, NamedTuple

import numpy as np
from typing_extensions import override

from embedpool.config.spec import DriverConfig
from embedpool.errors import EmbedpoolError, InvalidRequest, TooManyTexts, UnsupportedOption
from embedpool.tasks.embed import Embed, EmbedOptions, group_of, limit_of, prompt_of, routed
from embedpool.tasks.item import Item, Keys
from embedpool.tasks.rows import Rows
from embedpool.tasks.task import Measured, Task
from embedpool.tasks.tokenizer import Tokenizer

OVERLAP = 4  # of a window's tokens this part is the next one's, too


@dataclasses.dataclass(frozen=True)
class Tokens(Embed):
    """Texts whose tokens' vectors are wanted, special ones' too, as the model has them before it pools."""

    name: ClassVar[str] = "tokens"
    of_others: ClassVar[Sequence[str]] = ("top_k", "normalize", "dtype", "dimensions", "precision")

    @property
    @override
    def of_tokens(self) -> str:
        return self.name

    @override
    def finish(self, rows: Rows, config: DriverConfig, tokenizer: Tokenizer, errors: dict[int, EmbedpoolError]) -> Rows:
        return rows


class Chunking(NamedTuple):
    """How a text is split where its chunks are not given: into so many tokens each; some are the next one's, too."""

    tokens: int
    overlap: int = 0


class Plan(NamedTuple):
    """Of a document: `chunks` and `windows` are spans of its tokens; in a window `lead` others stand before them."""

    chunks: list[tuple[int, int]]
    windows: list[tuple[int, int]]
    lead: int
    texts: Sequence[str]  # of the chunks


@dataclasses.dataclass(frozen=True)
class LateChunking(Task):
    """Documents, each given as its chunks in order, or as one text that is split by `chunking`.

    `finish` gives dense rows: one for each chunk of the first document, then of the second, and so on. `path` is what
    the caller calls the documents; `input` is the list of the chunks of the only one.
    """

    name: ClassVar[str] = Tokens.name
    documents: Sequence[Sequence[str]]
    options: EmbedOptions = EmbedOptions()
    chunking: Chunking | None = None
    path: str = "inputs"
    most_chunks: int | None = None
    plans: list[Plan] = dataclasses.field(default_factory=list)  # once they are measured

    def __len__(self) -> int:
        return len(self.documents)

    @property
    @override
    def of_tokens(self) -> str:
        return self.name

    @override
    def where(self, index: int) -> str:
        return self.path if self.path == "input" else f"{self.path}[{index}]"

    @override
    def refusal(self, model: str, tokenizer: Tokenizer) -> EmbedpoolError | None:
        why = tokenizer.no_late_chunking or routed(self.options, tokenizer).no_late_chunking
        if why is None:
            return None
        says = f"{model!r} cannot embed chunks late: {why}"
        return UnsupportedOption(f"late_chunking: {says}", fields={"late_chunking": says})

    @override
    def measure(
        self, config: DriverConfig, tokenizer: Tokenizer, still_wanted: Callable[[], None] = lambda: None
    ) -> Measured:
        self.broken(itertools.chain.from_iterable(self.documents), self.path)
        prompt, _ = prompt_of(self.options, config, tokenizer)
        tokenizer = routed(self.options, tokenizer)
        limit = limit_of(self.options.max_seq_length, config, tokenizer)
        head, tail = tokenizer.around
        group = group_of(self.name, tokenizer)  # what is told of prompts and limits is for what comes behind tokens
        keys = Keys(group)
        items: list[Item] = []
        self.plans.clear()
        count = 0
        for index, chunks in enumerate(self.documents):
            still_wanted()
            text, begins = joined(chunks)
            ids, starts = tokenizer.located(prompt + text)
            own = bisect.bisect_left(starts, len(prompt))
            lead = [*head, *ids[:own]]
            ids, starts = ids[own:], [start - len(prompt) for start in starts[own:]]
            room = len(ids) if limit is None else limit - len(lead) - len(tail)
            if room < 1 and ids:
                raise InvalidRequest("options.prompt: it leaves no room for the text")
            spans = self._spans(index, begins, starts)
            count += len(spans)
            if self.most_chunks and count > self.most_chunks:
                raise TooManyTexts(f"{self.path}: more than {self.most_chunks} chunks, the limit of a request")
            windows = windows_of(len(ids), room)
            self.plans.append(Plan(spans, windows, len(lead), _parts(text, starts, spans) if self.chunking else chunks))
            for piece, (a, b) in enumerate(windows):
                read = array("I", [*lead, *ids[a:b], *tail])
                items.append(Item((text,), len(read), read, group=group, key=keys.of(read), index=index, piece=piece))
        return Measured(items, [], {})

    def _spans(self, index: int, begins: Sequence[int], starts: Sequence[int]) -> list[tuple[int, int]]:
        """Which tokens each chunk has. Raises InvalidRequest for one that has none."""
        if self.chunking is None:
            at = [bisect.bisect_left(starts, begin) for begin in begins]
            spans = list(itertools.pairwise([*at, len(starts)]))
        else:
            step = self.chunking.tokens - self.chunking.overlap
            last = max(len(starts) - self.chunking.overlap, 1)
            spans = [(a, min(a + self.chunking.tokens, len(starts))) for a in range(0, last, step)]
        for chunk, (a, b) in enumerate(spans):
            if a == b:
                given = f"[{chunk}]" if self.chunking is None else ""
                where = f"{self.where(index)}{given}"
                raise InvalidRequest(f"{where}: has no token", fields={where: "has no token"})
        return spans

    @override
    def merged(self, index: int, rows: Sequence[Rows]) -> Rows:
        """The vectors of a document's tokens, each from the window in which it is farther from an edge."""
        plan = self.plans[index]
        ends = [(after + b) // 2 for (_, b), (after, _) in itertools.pairwise(plan.windows)]
        ends.append(plan.windows[-1][1])
        begins = [0, *ends[:-1]]
        parts = [
            row.values[plan.lead + begin - a : plan.lead + end - a]
            for row, (a, _), begin, end in zip(rows, plan.windows, begins, ends, strict=True)
        ]
        return Rows(np.concatenate(parts), np.array([0, ends[-1]], np.int64))

    @override
    def finish(self, rows: Rows, config: DriverConfig, tokenizer: Tokenizer, errors: dict[int, EmbedpoolError]) -> Rows:
        assert rows.splits is not None
        tokenizer = routed(self.options, tokenizer)
        means = []
        for plan, start, stop in zip(self.plans, rows.splits[:-1], rows.splits[1:], strict=True):
            lead = plan.lead if len(plan.windows) == 1 else 0
            tokens = rows.values[start + lead : stop]
            means += [tokens[a:b].mean(axis=0) for a, b in plan.chunks]
        vectors = np.stack(means)
        if tokenizer.normalizes:
            vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        return Embed((), self.options).finish(Rows(vectors), config, tokenizer, errors)


def _parts(text: str, starts: Sequence[int], spans: Sequence[tuple[int, int]]) -> list[str]:
    """The characters of these tokens, whose places `starts` tells; what stands before the first belongs to it."""
    return [text[starts[a] if a else 0 : starts[b] if b < len(starts) else None] for a, b in spans]


def joined(chunks: Sequence[str]) -> tuple[str, list[int]]:
    """The text of which these are the parts, and the character at which each begins.

    A blank stands between two where neither has one: whoever split a text into sentences has mostly dropped it.
    """
    text, begins = "", []
    for chunk in chunks:
        if text and chunk and not text[-1].isspace() and not chunk[0].isspace():
            text += " "
        begins.append(len(text))
        text += chunk
    return text, begins


def windows_of(tokens: int, room: int) -> list[tuple[int, int]]:
    """Spans of up to `room` tokens that cover so many, each of which begins before the one before it ends."""
    if tokens <= room:
        return [(0, tokens)]
    overlap = room // OVERLAP
    step = room - overlap
    count = -(-(tokens - overlap) // step)
    begins = [min(number * step, tokens - room) for number in range(count)]
    return [(begin, begin + room) for begin in begins]
