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
from embedpool.tasks.embed import limit_fault
from embedpool.tasks.item import Batch, Ids
from embedpool.tasks.rows import Answer, Rows
from embedpool.tasks.tokenizer import Token, Tokenizer

START, END = 1, 2  # its special tokens
POSITIONS = 512
GROWTH_BYTES = 50_000_000


class FakeTokenizer(Tokenizer):
    """A token a word, and two special ones."""

    max_tokens = POSITIONS
    default_max_tokens = POSITIONS
    special_tokens = 2

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


class FakeDriver(Driver):
    """Vectors drawn from a generator that the token ids seed; entries are about normal, vectors not normalised."""

    def __init__(self, config: FakeConfig, *, may_crash: bool = False) -> None:
        self._config = config
        self._may_crash = may_crash  # its process is its own
        self._tokenizer = FakeTokenizer()

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
        space = hashed("embed", "fake", str(self._config.dim))
        return Facts({"embed": self._config.dim}, space, description=describe(dim=self._config.dim))

    @override
    def run(self, batch: Batch) -> Answer:
        config, texts = self._config, batch.texts
        time.sleep((config.delay_ms + config.delay_ms_per_text * len(texts)) / 1000)
        vectors = np.stack([self._vector(ids) for ids in batch.ids or self._tokenizer.encode(texts)])
        at_fault = [i for i, text in enumerate(texts) if config.fault_text in text]
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

    def _vector(self, ids: Ids) -> NDArray[np.float32]:
        seed = zlib.crc32(np.asarray(ids, dtype=np.int32).tobytes())
        return np.random.default_rng(seed).standard_normal(self._config.dim, dtype=np.float32)


def make_driver(spec: ModelSpec, folders: Folders, shared: dict[str, Any]) -> Driver:
    """Called by the table of drivers, in drivers/__init__.py."""
    assert isinstance(spec.driver.config, FakeConfig)
    return FakeDriver(spec.driver.config, may_crash=spec.place == "process")


def open_tokenizer(spec: ModelSpec, folders: Folders, report: Report) -> Tokenizer:
    """Called by the table of drivers, in drivers/__init__.py."""
    return FakeTokenizer()
