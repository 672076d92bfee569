"""A deterministic stand-in for a model: tests, demos, load tests of everything else. Needs no torch.

Equal token ids give equal vectors; delays and faults are set in driver.config.
"""

from __future__ import annotations

import re
import signal
import threading
import time
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from embedpool.config.spec import FakeConfig, ModelSpec
from embedpool.drivers.base import PROBE_TEXT, Driver, Embeddings, Ids, Meter, Token, describe
from embedpool.errors import ModelFailed

START, END = 1, 2  # its special tokens
POSITIONS = 512
GROWTH_BYTES = 50_000_000


class FakeMeter(Meter):
    """A token a word, and two special ones."""

    max_tokens = POSITIONS
    default_max_tokens = POSITIONS
    special_tokens = 2

    def measure(self, texts: Sequence[str]) -> list[list[int]]:
        """See Meter."""
        return [[START, *(_id_of(word) for word in text.split()), END] for text in texts]

    def cut(self, ids: list[int], limit: int, side: str) -> list[int]:
        """See Meter."""
        room = max(limit - 2, 0)
        words = ids[1:-1]
        return [START, *(words[:room] if side == "right" else words[len(words) - room :]), END]

    def tokens(self, texts: Sequence[str], *, special: bool) -> list[list[Token]]:
        """See Meter."""
        head = [Token(START, "<s>", True, None, None)] if special else []
        tail = [Token(END, "</s>", True, None, None)] if special else []
        words = [
            [Token(_id_of(word[0]), word[0], False, *word.span()) for word in re.finditer(r"\S+", t)] for t in texts
        ]
        return [[*head, *found, *tail] for found in words]

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

    def __init__(self, config: FakeConfig) -> None:
        self._config = config
        self._meter = FakeMeter()
        self.dim = config.dim
        self.description = describe(dim=self.dim)

    def open(self) -> None:
        """See Driver."""
        time.sleep(self._config.load_delay_ms / 1000)
        if self._config.fault == "load":
            raise RuntimeError("fault: load")
        if self._config.fault == "crash" and self._config.isolation != "process":
            raise ModelFailed("fault: crash would end the server; it needs isolation: process")
        self.probe()

    def embed(self, texts: Sequence[str], ids: Sequence[Ids] | None, options: Mapping[str, Any]) -> Embeddings:
        """See Driver."""
        config = self._config
        time.sleep((config.delay_ms + config.delay_ms_per_text * len(texts)) / 1000)
        vectors = np.stack([self._vector(i) for i in ids or self._meter.measure(texts)])
        at_fault = [i for i, text in enumerate(texts) if config.fault_text in text]
        if at_fault and config.fault in FAULTS:
            FAULTS[config.fault]()
        if at_fault and config.fault == "short":
            vectors = vectors[:-1]
        if at_fault and config.fault == "nan":
            vectors[at_fault] = np.nan
        return Embeddings(vectors)

    def probe(self) -> None:
        """See Driver. A fault without `fault_text` is the driver's own."""
        if not self._config.fault_text and self._config.fault == "raise":
            _raise()
        self._vector(self._meter.measure([PROBE_TEXT])[0])

    def _vector(self, ids: Ids) -> np.ndarray[Any, np.dtype[np.float32]]:
        seed = zlib.crc32(np.asarray(ids, dtype=np.int32).tobytes())
        return np.random.default_rng(seed).standard_normal(self._config.dim, dtype=np.float32)


def make_driver(spec: ModelSpec, cache_dir: Path) -> Driver:
    """See embedpool.drivers."""
    assert isinstance(spec.driver.config, FakeConfig)
    return FakeDriver(spec.driver.config)


def open_meter(spec: ModelSpec) -> Meter:
    """See embedpool.drivers."""
    return FakeMeter()
