"""A deterministic stand-in for a model: tests, demos, load tests of everything else. Needs no torch.

Equal token ids give equal vectors; delays and faults are set in driver.config.
"""

from __future__ import annotations

import re
import signal
import threading
import time
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from embedpool.config.spec import FakeConfig, ModelSpec
from embedpool.drivers.space import hashed
from embedpool.errors import ModelFailed
from embedpool.tasks.driver import PROBE_TEXT, Driver, Facts, Folders, Progress, Report, describe
from embedpool.tasks.embed import Embed, limit_fault
from embedpool.tasks.item import Batch, Ids
from embedpool.tasks.rows import Answer, Rows
from embedpool.tasks.score import SIGMOID, SOFTMAX, Classify, Rerank
from embedpool.tasks.tokenizer import Template, Token, Tokenizer

EMBED = Embed.name

START, END = 1, 2  # its special tokens
POSITIONS = 512
MOST_LOGIT = 4.0  # of a document that has all words of the query
GROWTH_BYTES = 50_000_000


class FakeTokenizer(Tokenizer):
    """A token a word, and two special ones. A pair has one more between its parts."""

    template = Template(([START], [END]), ([START], [END], [END]))
    max_tokens = POSITIONS
    default_max_tokens = POSITIONS
    special_tokens = 2

    def __init__(self, task: str = EMBED, labels: int = 1) -> None:
        self.tasks = (task,)
        self.labels = () if task == EMBED else [f"label {i}" for i in range(labels)]
        self.activation = SOFTMAX if task == Classify.name else SIGMOID

    @override
    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [[START, *(_id_of(word) for word in text.split()), END] for text in texts]

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


def _width_of(config: FakeConfig) -> int:
    """Numbers of a row."""
    return {EMBED: config.dim, Rerank.name: 1, Classify.name: config.labels}[config.task]


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
        dim = width if task == EMBED else None
        return Facts({task: width}, space, description=describe(kind=task, dim=dim))

    @override
    def run(self, batch: Batch) -> Answer:
        config, texts = self._config, batch.texts
        time.sleep((config.delay_ms + config.delay_ms_per_text * len(texts)) / 1000)
        given = batch.ids or self._tokenizer.encode(texts)
        vectors = np.stack([self._row(ids, item.second) for ids, item in zip(given, batch.items, strict=True)])
        at_fault = [i for i, item in enumerate(batch.items) if config.fault_text in "\n".join(item.parts)]
        if at_fault and config.fault in FAULTS:
            FAULTS[config.fault]()
        if at_fault and config.fault == "short":
            vectors = vectors[:-1]
        if at_fault and config.fault == "nan":
            vectors[at_fault] = np.nan
        return Answer(Rows(vectors))

    @override
    def probe(self) -> None:
        """A fault without `fault_text` is the driver's own."""
        if not self._config.fault_text and self._config.fault == "raise":
            _raise()
        self._vector(self._tokenizer.encode([PROBE_TEXT])[0])

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


def make_driver(spec: ModelSpec, folders: Folders, shared: dict[str, Any]) -> Driver:
    """Called by the table of drivers, in drivers/__init__.py."""
    assert isinstance(spec.driver.config, FakeConfig)
    return FakeDriver(spec.driver.config, may_crash=spec.place != "thread")


def open_tokenizer(spec: ModelSpec, folders: Folders, report: Report) -> Tokenizer:
    """Called by the table of drivers, in drivers/__init__.py."""
    config = spec.driver.config
    assert isinstance(config, FakeConfig)
    return FakeTokenizer(config.task, _width_of(config))
