"""The score tasks: pairs of a query and a document get a score, texts or pairs get one for each label of a model.

A query's ids are made once a request, and joined to those of each document by the tokenizer's own template.
"""

from __future__ import annotations

import dataclasses
import json
from array import array
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from embedpool.config.spec import DriverConfig
from embedpool.errors import EmbedpoolError, UnsupportedOption
from embedpool.tasks.embed import group_of, limit_of, slices
from embedpool.tasks.item import Group, Item, Keys
from embedpool.tasks.rows import Rows
from embedpool.tasks.task import Measured, Task
from embedpool.tasks.tokenizer import Tokenizer, Whole, estimated_tokens

Array = NDArray[Any]
Parts = tuple[str, ...]  # a query and a document, or one text

OF_LOCAL_MODELS = ("long_documents", "max_seq_length")
SIGMOID, SOFTMAX, IDENTITY = "sigmoid", "softmax", "identity"


@dataclasses.dataclass(frozen=True, slots=True)
class ScoreOptions:
    """Options of one request; None means the model's own setting.

    `truncate` says where a document that is too long is cut: right, left, or error. With `long_documents: chunk` every
    part of it is scored, and the best counts. `instruction` goes before the query.
    """

    truncate: str = "right"
    long_documents: str = "truncate"
    max_tokens_per_doc: int | None = None
    max_seq_length: int | None = None
    instruction: str | None = None
    on_error: str = "fail"


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
        group = group_of(self.name, tokenizer, prompt=apart, limit=limit, side="right")
        keys = Keys(group)
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
                for piece, found in enumerate(joined.rows):
                    ids = array("I", found.ids)
                    key = keys.of(ids, str(found.second))
                    items.append(Item(parts, len(ids), ids, found.second, group=group, key=key, index=i, piece=piece))
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
        """What goes before the first part: the instruction, else the model's default prompt."""
        if self.options.instruction is not None:
            return self.options.instruction
        return {**tokenizer.prompts, **config.prompts}.get(tokenizer.default_prompt_name, "")

    def _for_a_remote(self) -> list[Item]:
        """A call has one query, so the pairs of each are a group of their own."""
        asked = {name: getattr(self.options, name) for name in OF_LOCAL_MODELS}
        if odd := [name for name, value in asked.items() if value != getattr(ScoreOptions(), name)]:
            fields = {f"options.{name}": "not an option of remote models" for name in odd}
            raise UnsupportedOption(f"for local models alone: {', '.join(odd)}", fields=fields)
        instruction = self.options.instruction or ""
        items = []
        for i, parts in enumerate(self.parts):
            told: dict[str, Any] = {"query": instruction + parts[0]}
            if self.options.truncate != "right":
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
    """How well labels fit texts: a number for each label."""

    name: ClassVar = "classify"


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
    """The rows of one input: one, or one for each part of its document. `too_long` says what was cut, if anything."""

    rows: Sequence[Whole]
    too_long: str = ""


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
            self._require_no_ids_of_documents()
            return [self._whole(found) for found in self._tokenizer.whole(given, self._prompt)]
        new = list(dict.fromkeys(parts[0] for parts in given if len(parts) > 1 and parts[0] not in self._firsts))
        lasts = [parts[-1] for parts in given]
        ids = self._tokenizer.bare([*new, *lasts])
        self._firsts |= dict(zip(new, ids[: len(new)], strict=True))
        return [
            self._joined(self._firsts[parts[0]] if len(parts) > 1 else None, last)
            for parts, last in zip(given, ids[len(new) :], strict=True)
        ]

    def _require_no_ids_of_documents(self) -> None:
        """Raises UnsupportedOption for what cannot be done to a pair that the tokenizer has joined."""
        options = self._options
        asked = {
            "long_documents": options.long_documents == "chunk",
            "truncate": options.truncate == "left",
            "max_tokens_per_doc": options.max_tokens_per_doc is not None,
        }
        if fields := {f"options.{name}": "this model is given pairs whole" for name in asked if asked[name]}:
            raise UnsupportedOption("; ".join(f"{name}: {says}" for name, says in fields.items()), fields=fields)

    def _joined(self, first: list[int] | None, last: list[int]) -> Joined:
        template = self._tokenizer.template
        assert template is not None
        head, middle, tail = template.pair if first is not None else (template.single[0], [], template.single[1])
        query = first or []
        specials = len(head) + len(middle) + len(tail)
        full = specials + len(query) + len(last)
        kept = self._cut(last, self._options.max_tokens_per_doc)
        room = None if self._limit is None else max(self._limit - specials, 0)
        if room is not None and len(query) + len(kept) > room:
            query = query[: max(room // 2, room - len(kept))]
            parts = self._parts_of(kept, max(room - len(query), 0))
        else:
            parts = [kept]
        begin = [*head, *query, *middle]
        second = len(begin) if first is not None else None
        rows = [Whole([*begin, *part, *tail], second, len(tail)) for part in parts]
        if len(query) == len(first or ()) and sum(map(len, parts)) == len(last):
            return Joined(rows)
        if room is None or full <= room + specials:
            return Joined(rows, f"{len(last)} tokens, max_tokens_per_doc is {self._options.max_tokens_per_doc}")
        return Joined(rows, self._says(full))

    def _parts_of(self, ids: list[int], room: int) -> list[list[int]]:
        if self._options.long_documents != "chunk" or not room:
            return [self._cut(ids, room)]
        return [ids[at : at + room] for at in range(0, len(ids), room)]

    def _cut(self, ids: list[int], limit: int | None) -> list[int]:
        if limit is None or len(ids) <= limit:
            return ids
        return ids[len(ids) - limit :] if self._options.truncate == "left" else ids[:limit]

    def _whole(self, found: Whole) -> Joined:
        """Pairs that the tokenizer has joined end with the document and what follows every document."""
        limit = self._limit
        if limit is None or len(found.ids) <= limit:
            return Joined([found])
        tail = found.ids[len(found.ids) - found.tail :]
        cut = Whole([*found.ids[: limit - len(tail)], *tail], found.second, found.tail)
        return Joined([cut], self._says(len(found.ids)))

    def _says(self, tokens: int) -> str:
        return f"{tokens} tokens, the limit is {self._limit}"
