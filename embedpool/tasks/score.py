"""The score tasks: pairs of a query and a document get a score, texts or pairs get one for each label of a model.

A query's ids are made once a request, and joined to those of each document by the tokenizer's own template.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from array import array
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from embedpool.config.spec import DriverConfig
from embedpool.errors import EmbedpoolError, InvalidRequest, UnsupportedOption
from embedpool.tasks.embed import EmbedOptions, group_of, limit_of, prompt_of, slices
from embedpool.tasks.item import Group, Item, Keys
from embedpool.tasks.rows import Rows
from embedpool.tasks.task import Measured, Task
from embedpool.tasks.tokenizer import Tokenizer, estimated_tokens

Array = NDArray[Any]
Parts = tuple[str, ...]  # a query and a document, or one text

OF_REMOTE_MODELS = ("truncate", "max_tokens_per_doc", "instruction", "on_error")
SIGMOID, SOFTMAX, IDENTITY = "sigmoid", "softmax", "identity"


@dataclasses.dataclass(frozen=True, slots=True)
class ScoreOptions:
    """Options of one request; None means the model's own setting.

    `truncate` says where a document that is too long is cut: right, left, or error; pairs by themselves are cut at
    the right. With `long_documents: chunk` every part of it is scored, and the best counts. `instruction`, or
    the model's prompt of this name, goes before the query.
    """

    truncate: str | None = None
    long_documents: str = "truncate"
    max_tokens_per_doc: int | None = None
    max_seq_length: int | None = None
    instruction: str | None = None
    prompt_name: str | None = None
    on_error: str = "fail"


def require_none_but(kept: Collection[str], options: ScoreOptions, says: str) -> None:
    """Raises UnsupportedOption for other options than these; `says` tells why."""
    names = [field.name for field in dataclasses.fields(ScoreOptions) if field.name not in kept]
    if odd := [name for name in names if getattr(options, name) != getattr(ScoreOptions(), name)]:
        fields = {f"options.{name}": says for name in odd}
        raise UnsupportedOption("; ".join(f"{path} {says}" for path in fields), fields=fields)


@dataclasses.dataclass(frozen=True)
class Score(Task):
    """Pairs, or texts alone, for a model that scores them; `path` is what the caller calls the documents.

    `finish` gives dense rows of twice as many numbers as the model has labels: the scores, then the logits behind them.
    """

    parts: Sequence[Parts]
    options: ScoreOptions = ScoreOptions()
    path: str = "documents"

    def __len__(self) -> int:
        return len(self.parts)

    @property
    @override
    def partial(self) -> bool:
        return self.options.on_error == "partial"

    @override
    def where(self, index: int) -> str:
        return f"{self.path}[{index}]"

    @override
    def measure(
        self, config: DriverConfig, tokenizer: Tokenizer, still_wanted: Callable[[], None] = lambda: None
    ) -> Measured:
        broken = self.broken(map("\n".join, self.parts), self.path)
        if config.is_remote:
            return Measured([item for item in self._for_a_remote() if item.index not in broken], [], broken)
        prompt = self._prompt(config, tokenizer)
        limit = limit_of(self.options.max_seq_length, config, tokenizer)
        apart = prompt if "prompt" in tokenizer.told else ""
        joiner = _Joiner(tokenizer, limit, self.options, apart)
        told = functools.partial(group_of, self.name, tokenizer, prompt=apart, limit=limit, side="right")
        plain, as_ids = Keys(told()), Keys(told(by_ids=True))
        items: list[Item] = []
        truncated: list[int] = []
        refuses = "error" in (self.options.truncate, self.options.long_documents)
        too_long: dict[int, str] = {}
        for at_once in slices(sum(map(len, parts)) for parts in self.parts):
            still_wanted()
            inside = [i for i in range(len(self))[at_once] if i not in broken]
            given = [self.parts[i] if apart else _prompted(prompt, self.parts[i]) for i in inside]
            for i, parts, joined in zip(inside, given, joiner.join(given), strict=True):
                if joined.too_long and refuses:
                    too_long[i] = joined.too_long
                    continue
                if joined.too_long:
                    truncated.append(i)
                keys = as_ids if joined.by_ids else plain
                for piece, found in enumerate(joined.rows):
                    ids = array("I", found)
                    key, group = keys.of(ids, str(joined.second)), keys.group
                    items.append(Item(parts, len(ids), ids, joined.second, group=group, key=key, index=i, piece=piece))
        return Measured(items, truncated, {**broken, **self.too_long(too_long)})

    @override
    def merged(self, index: int, rows: Sequence[Rows]) -> Rows:
        """Of the parts of a document the one with the greatest logit."""
        return max(rows, key=lambda row: row.values[0, 0])

    @override
    def finish(self, rows: Rows, config: DriverConfig, tokenizer: Tokenizer, errors: dict[int, EmbedpoolError]) -> Rows:
        if not rows.width:
            return rows
        logits = rows.values.astype(np.float32, copy=False)
        scores = logits if config.is_remote else activated(logits, tokenizer.activation)
        return Rows(np.concatenate([scores, logits], axis=1))

    def _prompt(self, config: DriverConfig, tokenizer: Tokenizer) -> str:
        """What goes before the first part: the instruction, else the prompt that is named, or the default one."""
        named = EmbedOptions(prompt=self.options.instruction, prompt_name=self.options.prompt_name)
        return prompt_of(named, config, tokenizer)[0]

    def _for_a_remote(self) -> list[Item]:
        """A call has one query, so the pairs of each are a group of their own."""
        require_none_but(OF_REMOTE_MODELS, self.options, "is not for a remote model")
        items = []
        for i, parts in enumerate(self.parts):
            told: dict[str, Any] = {"query": parts[0]}
            if self.options.instruction is not None:
                told["instruction"] = self.options.instruction
            if self.options.truncate not in (None, "right"):
                told["truncate"] = self.options.truncate
            if self.options.max_tokens_per_doc is not None:
                told["max_tokens_per_doc"] = self.options.max_tokens_per_doc
            group = Group(self.name, json.dumps(told, sort_keys=True))
            key = Keys(group).of(None, *parts)
            items.append(Item(parts, sum(map(estimated_tokens, parts)), group=group, key=key, index=i))
        return items


@dataclasses.dataclass(frozen=True)
class Rerank(Score):
    """How relevant documents are to queries: a number for each pair."""

    name: ClassVar = "rerank"


@dataclasses.dataclass(frozen=True)
class Classify(Score):
    """How well labels fit texts: a number for each label. The parts of a text could have labels of their own."""

    name: ClassVar = "classify"

    @override
    def measure(
        self, config: DriverConfig, tokenizer: Tokenizer, still_wanted: Callable[[], None] = lambda: None
    ) -> Measured:
        if self.options.long_documents == "chunk":
            message = "chunk is for rerankers: no part of a text has all labels"
            raise UnsupportedOption(f"options.long_documents: {message}", fields={"options.long_documents": message})
        return super().measure(config, tokenizer, still_wanted)


SCORES: Mapping[str, type[Score]] = {task.name: task for task in (Rerank, Classify)}


def _prompted(prompt: str, parts: Parts) -> Parts:
    return (prompt + parts[0], *parts[1:]) if prompt else parts


def activated(logits: Array, activation: str) -> Array:
    """Scores of float32 logits of shape (n, labels): sigmoid of each, softmax over all, or as they are."""
    if activation == IDENTITY:
        return logits
    if activation == SIGMOID:
        return np.asarray(1 / (1 + np.exp(-np.clip(logits, -80, 80))), np.float32)
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=1, keepdims=True), np.float32)


def scores_of(rows: Array, *, raw: bool) -> Array:
    """Of what `finish` gives the scores, or the logits behind them; of shape (n, labels)."""
    labels = rows.shape[1] // 2
    return rows[:, labels:] if raw else rows[:, :labels]


def best_first(scores: Array) -> list[int]:
    """The places of scores of shape (n,), equal ones in their order."""
    order: list[int] = np.argsort(-scores, kind="stable").tolist()
    return order


# --- ids of pairs


@dataclasses.dataclass(frozen=True, slots=True)
class Joined:
    """The ids of one input, or of each part of its document; from `second` on they are of the second token type.

    `too_long` says what was cut, if anything. `by_ids`: a library that is given texts would cut them in another way.
    """

    rows: Sequence[list[int]]
    second: int | None
    too_long: str = ""
    by_ids: bool = False


class _Joiner:
    """Joins the ids of a request's parts, and cuts what is too long: the document, never the query first."""

    def __init__(self, tokenizer: Tokenizer, limit: int | None, options: ScoreOptions, prompt: str) -> None:
        self._tokenizer = tokenizer
        self._prompt = prompt
        self._limit = limit
        self._options = options
        self._firsts: dict[str, list[int]] = {}  # ids of first parts, which are often the same

    def join(self, given: Sequence[Parts]) -> list[Joined]:
        if not given:
            return []
        template = self._tokenizer.template
        if template is None:
            return [
                self._joined(
                    found.ids[: found.first.start],
                    found.ids[found.first],
                    found.ids[found.first.stop : found.last.start],
                    found.ids[found.last],
                    found.ids[found.last.stop :],
                    typed=found.typed,
                )
                for found in self._tokenizer.whole(given, self._prompt)
            ]
        new = list(dict.fromkeys(parts[0] for parts in given if len(parts) > 1 and parts[0] not in self._firsts))
        lasts = [parts[-1] for parts in given]
        ids = self._tokenizer.bare([*new, *lasts])
        self._firsts |= dict(zip(new, ids[: len(new)], strict=True))
        (before, after), (head, middle, tail) = template
        return [
            self._joined(head, self._firsts[parts[0]], middle, last, tail, typed=True)
            if len(parts) > 1
            else self._joined(before, [], [], last, after, typed=False)
            for parts, last in zip(given, ids[len(new) :], strict=True)
        ]

    def _joined(
        self, head: list[int], first: list[int], middle: list[int], last: list[int], tail: list[int], *, typed: bool
    ) -> Joined:
        specials = len(head) + len(middle) + len(tail)
        if self._limit is not None and specials >= self._limit:
            path = f"options.{'instruction' if self._prompt else 'max_seq_length'}"
            says = f"{specials} tokens stand around a pair, the limit of all is {self._limit}"
            raise InvalidRequest(f"{path}: {says}", fields={path: says})
        full = specials + len(first) + len(last)
        query = first
        kept = self._cut(last, self._options.max_tokens_per_doc)
        room = None if self._limit is None else self._limit - specials
        if room is not None and len(query) + len(kept) > room:
            half = (room + (len(query) > len(kept))) // 2  # the longer part has the odd one, as tokenizers do it
            query = query[: max(half, room - len(kept))]
            parts = self._parts_of(kept, max(room - len(query), 0))
        else:
            parts = [kept]
        begin = [*head, *query, *middle]
        second = len(begin) if typed else None
        rows = [[*begin, *part, *tail] for part in parts]
        is_query_whole = len(query) == len(first)
        if is_query_whole and sum(map(len, parts)) == len(last):
            return Joined(rows, second, by_ids=len(parts) > 1)
        says = f"{full} tokens, the limit is {self._limit}"
        if self._limit is None or full <= self._limit:
            says = f"{len(last)} tokens, max_tokens_per_doc is {self._options.max_tokens_per_doc}"
        # A library cuts by the limit alone, at the right; of what it is told the end, of a pair the longer part.
        cuts_query = is_query_whole or (bool(last) and not self._tokenizer.told)
        cuts_document = len(kept) == len(last) and parts == [last[: len(parts[0])]]
        return Joined(rows, second, says, by_ids=not (cuts_query and cuts_document))

    def _parts_of(self, ids: list[int], room: int) -> list[list[int]]:
        if self._options.long_documents != "chunk" or not room:
            return [self._cut(ids, room)]
        return [ids[at : at + room] for at in range(0, len(ids), room)]

    def _cut(self, ids: list[int], limit: int | None) -> list[int]:
        if limit is None or len(ids) <= limit:
            return ids
        return ids[len(ids) - limit :] if self._options.truncate == "left" else ids[:limit]
