"""A deterministic stand-in for a model: tests, demos, load tests of everything else. Needs no torch.

Equal token ids give equal rows; delays and faults are set in driver.config.
"""

from __future__ import annotations

import dataclasses
import re
import signal
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from typing import Any

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from embedpool.config.spec import FakeConfig, ModelSpec
from embedpool.drivers.space import hashed
from embedpool.errors import ModelFailed
from embedpool.tasks.driver import PROBE_TEXT, Driver, Facts, Folders, Progress, Report, describe
from embedpool.tasks.embed import Embed, limit_fault
from embedpool.tasks.hybrid import Hybrid
from embedpool.tasks.item import Batch, Ids
from embedpool.tasks.late_chunking import Tokens
from embedpool.tasks.multivector import MultiVector
from embedpool.tasks.rows import Answer, Rows
from embedpool.tasks.score import SIGMOID, SOFTMAX, Classify, Rerank
from embedpool.tasks.sparse import Sparse
from embedpool.tasks.tokenizer import Located, Template, Token, Tokenizer

EMBED = Embed.name

START, END, FILLER = 1, 2, 0  # its special tokens
QUERY_TOKENS = 8  # to which a multi-vector model fills up a query
POSITIONS = 512
MOST_LOGIT = 4.0  # of a document that has all words of the query
GROWTH_BYTES = 50_000_000


class FakeTokenizer(Tokenizer):
    """A token a word, and two special ones. A pair has one more between its parts."""

    template = Template(([START], [END]), ([START], [END], [END]))
    max_tokens = POSITIONS
    default_max_tokens = POSITIONS
    special_tokens = 2
    around = ([START], [END])

    def __init__(self, task: str = EMBED, labels: int = 1, route: str = "") -> None:
        self.tasks = TASKS.get(task, (task,))
        self.labels = [f"label {i}" for i in range(labels)] if task in (Rerank.name, Classify.name) else ()
        self.activation = SOFTMAX if task == Classify.name else SIGMOID
        if Tokens.name in self.tasks:
            self.no_late_chunking = None
        self.route = route
        self.expands = route == "query"
        if task == MultiVector.name and not route:
            of_queries, of_documents = (FakeTokenizer(task, labels, name) for name in ("query", "document"))
            self.routes = {"": of_documents, "document": of_documents, "query": of_queries}

    @override
    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [[START, *(_id_of(word) for word in text.split()), END] for text in texts]

    @override
    def expanded(self, ids: Ids) -> Ids:
        return [*ids, *[FILLER] * (QUERY_TOKENS - len(ids))]

    @override
    def located(self, text: str) -> Located:
        words = list(re.finditer(r"\S+", text))
        return Located([_id_of(word[0]) for word in words], [word.start() for word in words])

    @override
    def names(self, ids: Sequence[int]) -> list[str]:
        """Words are not remembered: their ids stand for them."""
        return [str(id_) for id_ in ids]

    @override
    def cut(self, ids: list[int], limit: int, side: str, prompt_tokens: int = 0) -> list[int]:
        room = max(limit - 2, 0)
        words = ids[1:-1]
        kept = min(max(prompt_tokens - 1, 0), room) if side == "left" else room
        return [START, *words[:kept], *words[max(len(words) - (room - kept), kept) :], END]

    @override
    def prompt_tokens(self, prompt: str) -> int:
        return 1 + len(prompt.split())

    @override
    def bare(self, texts: Sequence[str]) -> list[list[int]]:
        return [ids[1:-1] for ids in self.encode(texts)]

    @override
    def tokens(self, texts: Sequence[str], *, special: bool) -> list[list[Token]]:
        head = [Token(START, "<s>", True, None, None)] if special else []
        tail = [Token(END, "</s>", True, None, None)] if special else []
        words = [
            [Token(_id_of(word[0]), word[0], False, *word.span()) for word in re.finditer(r"\S+", t)] for t in texts
        ]
        return [[*head, *found, *tail] for found in words]

    @override
    def decode(self, ids: Sequence[Ids], *, skip_special: bool) -> list[str]:
        """Words are not remembered: their ids stand for them."""
        return [" ".join(str(i) for i in row if not (skip_special and i in (START, END))) for row in ids]


def _id_of(word: str) -> int:
    return zlib.crc32(word.encode()) % 30000 + 3


def _raise() -> None:
    raise RuntimeError("fault: raise")


def _hang() -> None:
    threading.Event().wait()


def _grow() -> None:
    _held.append(b"x" * GROWTH_BYTES)


def _crash() -> None:
    signal.raise_signal(signal.SIGSEGV)  # in this thread, at once


_held: list[bytes] = []
FAULTS = {"raise": _raise, "hang": _hang, "grow": _grow, "crash": _crash}


TASKS: Mapping[str, Sequence[str]] = {
    EMBED: (EMBED, Tokens.name),
    Hybrid.name: (EMBED, MultiVector.name, Sparse.name, Hybrid.name, Tokens.name),
}


def _width_of(config: FakeConfig) -> int:
    """Numbers of a row."""
    return {Rerank.name: 1, Classify.name: config.labels}.get(config.task, config.dim)


class FakeDriver(Driver):
    """Vectors drawn from a generator that the token ids seed; entries are about normal, vectors not normalised.

    As a reranker it counts the words of the query that a document has; as a classifier it draws.
    """

    def __init__(self, config: FakeConfig, *, may_crash: bool = False) -> None:
        self._config = config
        self._may_crash = may_crash  # its process is its own
        self._width = _width_of(config)
        self._tokenizer = FakeTokenizer(config.task, self._width)

    @override
    def open(self, on_lost: Callable[[str], None]) -> Facts:
        self.report(Progress("load"))
        time.sleep(self._config.load_delay_ms / 1000)
        if self._config.fault == "load":
            raise RuntimeError("fault: load")
        if fault := limit_fault(self._config.max_seq_length, self._tokenizer):
            raise ModelFailed(f"max_seq_length {fault}")
        if self._config.fault == "crash" and not self._may_crash:
            raise ModelFailed("fault: crash would end the server; it needs place: process")
        self.probe()
        task, width = self._config.task, self._width
        space = hashed(task, "fake", str(width))
        dim = width if task in (EMBED, MultiVector.name, Hybrid.name) else None
        widths = dict.fromkeys((Sparse.name, Hybrid.name, Tokens.name))
        tasks = {name: widths.get(name, width) for name in self._tokenizer.tasks}
        return Facts(tasks, space, description=describe(kind=task, dim=dim))

    @override
    def run(self, batch: Batch) -> Answer:
        config, texts = self._config, batch.texts
        time.sleep((config.delay_ms + config.delay_ms_per_text * len(texts)) / 1000)
        given = batch.ids or self._tokenizer.encode(texts)
        rows = self._rows(batch, given)
        at_fault = [i for i, item in enumerate(batch.items) if config.fault_text in "\n".join(item.parts)]
        if at_fault and config.fault in FAULTS:
            FAULTS[config.fault]()
        if at_fault and config.fault == "short":
            rows = Rows.gather([rows.row(i) for i in range(len(rows) - 1)])
        if at_fault and config.fault == "nan":
            rows.values[at_fault] = np.nan
        return Answer(rows)

    @override
    def probe(self) -> None:
        """A fault without `fault_text` is the driver's own."""
        if not self._config.fault_text and self._config.fault == "raise":
            _raise()
        self._vector(self._tokenizer.encode([PROBE_TEXT])[0])

    def _rows(self, batch: Batch, given: Sequence[Ids]) -> Rows:
        if batch.task == Hybrid.name:
            parts = {
                task: self._rows(dataclasses.replace(batch, task=task), given) for task in batch.options["outputs"]
            }
            return Rows(np.zeros((len(given), 0), np.float32), also=parts)
        if batch.task == Sparse.name:
            found = [np.unique([i for i in ids if i not in (START, END)], return_counts=True) for ids in given]
            values = np.concatenate([counts for _, counts in found]).astype(np.float32)
            indices = np.concatenate([own for own, _ in found]).astype(np.int32)
            return Rows(values, _splits(own for own, _ in found), indices)
        if batch.task in (MultiVector.name, Tokens.name):
            vectors = np.stack([self._vector([i]) for ids in given for i in ids])
            if batch.task == MultiVector.name:
                vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
            return Rows(vectors, _splits(given))
        return Rows(np.stack([self._row(ids, item.second) for ids, item in zip(given, batch.items, strict=True)]))

    def _row(self, ids: Ids, second: int | None) -> NDArray[np.float32]:
        drawn = self._vector(ids)
        if self._config.task != Rerank.name or second is None:
            return drawn
        query, document = set(ids[1 : second - 1]), set(ids[second:-1])
        found = len(query & document) / max(len(query), 1)
        return np.asarray(MOST_LOGIT * (2 * found - 1) + drawn / 100, np.float32)

    def _vector(self, ids: Ids) -> NDArray[np.float32]:
        seed = zlib.crc32(np.asarray(ids, dtype=np.int32).tobytes())
        return np.random.default_rng(seed).standard_normal(self._width, dtype=np.float32)


def _splits(rows: Iterable[Sized]) -> NDArray[np.int64]:
    return np.cumsum([0, *map(len, rows)]).astype(np.int64)


def make_driver(spec: ModelSpec, folders: Folders, shared: dict[str, Any]) -> Driver:
    """Called by the table of drivers, in drivers/__init__.py."""
    assert isinstance(spec.driver.config, FakeConfig)
    return FakeDriver(spec.driver.config, may_crash=spec.place != "thread")


def open_tokenizer(spec: ModelSpec, folders: Folders, report: Report) -> Tokenizer:
    """Called by the table of drivers, in drivers/__init__.py."""
    config = spec.driver.config
    assert isinstance(config, FakeConfig)
    return FakeTokenizer(config.task, _width_of(config))
