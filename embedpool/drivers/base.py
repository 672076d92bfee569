"""What the pool asks of a driver and of a meter."""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

PROBE_TEXT = "The quick brown fox jumps over the lazy dog."

Ids = Sequence[int]


@dataclasses.dataclass(frozen=True, slots=True)
class Embeddings:
    """A driver's answer: float32 `vectors` of shape (texts, dim).

    A remote service also tells the `tokens` it counted and the indices of the texts it `truncated`.
    """

    vectors: NDArray[np.float32]
    tokens: int | None = None
    truncated: Sequence[int] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Cost:
    """What a call takes, in seconds: `fixed_s` + `token_s` · padded tokens."""

    fixed_s: float
    token_s: float

    def call_s(self, padded_tokens: float) -> float:
        """Seconds of a call with so many padded tokens."""
        return self.fixed_s + self.token_s * padded_tokens


class Token(NamedTuple):
    """A token of a text: `start` and `stop` count characters, None for a special token."""

    id: int
    text: str
    special: bool
    start: int | None
    stop: int | None


class Driver(abc.ABC):
    """Runs batches. `open` and `close` are called on one thread, `embed` by up to `parallel` threads."""

    parallel = 1  # batches at once that serve this driver well
    max_batch_texts: int | None = None  # None: the pool's setting
    cost: Cost | None = None  # fitted at warm-up, where padding costs
    dim: int | None = None  # size of its vectors, known once it is open
    description: Mapping[str, object] = {}  # what runs where, for /status
    memory: dict[str, Any]  # of all drivers of a served model, one after the other and at once; set before `open`
    lost: str | None = None  # why it can serve no more, though no text is known to be at fault: its process was killed

    _on_lost: Callable[[], None] | None = None

    @abc.abstractmethod
    def open(self) -> None:
        """Load what is needed and prove it by `probe`. Raises with the reason if it cannot serve."""

    @abc.abstractmethod
    def embed(self, texts: Sequence[str], ids: Sequence[Ids] | None, options: Mapping[str, Any]) -> Embeddings:
        """Vectors of the texts, in order. `ids` are the token ids of each, as its meter made them.

        `options` are those a remote service is to be given, the same for the whole batch.

        Raises UpstreamError for a remote's fault, UnsupportedOption, or anything else.
        """

    @abc.abstractmethod
    def probe(self) -> None:
        """Embed a fixed text. Raises if the driver itself is at fault."""

    def configure(self, config: Any) -> None:  # noqa: B027  (most drivers read nothing that may change)
        """Take over a driver.config in which nothing has changed that loads anew. Called on any thread."""

    def alone(self) -> AbstractContextManager[None]:
        """While it lasts the caller's batch is the only one: if the driver is lost then, it is by that batch."""
        return contextlib.nullcontext()

    def watch(self, on_lost: Callable[[], None]) -> None:
        """Have `on_lost` called, on any thread, when `lost` is set; at once if it is."""
        self._on_lost = on_lost
        if self.lost:
            on_lost()

    def _tell_lost(self) -> None:
        """For a driver that has set `lost`. Whoever begins to watch later sees it by itself."""
        if self._on_lost:
            self._on_lost()

    def close(self) -> None:  # noqa: B027  (most drivers hold nothing)
        """Give everything back."""


class Meter(abc.ABC):
    """Measures texts in the request's thread; a model need not be loaded for it. Thread-safe."""

    tokenizes = True  # False: a remote service does, and what it is told of truncation is its own business
    max_tokens: int | None = None  # the model's positions
    default_max_tokens: int | None = None  # the model's own max_seq_length
    special_tokens = 0  # added to each text
    prompts: Mapping[str, str] = {}  # the model's own
    default_prompt = ""  # used where the request names none

    @abc.abstractmethod
    def measure(self, texts: Sequence[str]) -> list[list[int]] | None:
        """Token ids of each text at full length, special tokens included; None if it does not tokenize."""

    def cut(self, ids: list[int], limit: int, side: str) -> list[int]:
        """Ids of at most `limit` tokens, special tokens kept; `side` says where the surplus goes: left or right."""
        raise NotImplementedError

    def tokens(self, texts: Sequence[str], *, special: bool) -> list[list[Token]]:
        """The tokens of each text, with or without the special ones, for a client to look at."""
        raise NotImplementedError

    def decode(self, ids: Sequence[Ids], *, skip_special: bool) -> list[str]:
        """The texts of token ids."""
        raise NotImplementedError

    @staticmethod
    def estimate(texts: Sequence[str]) -> list[int]:
        """About how many tokens each text has, for the queue's fair order where nothing better is known."""
        return [len(text) // 4 + 1 for text in texts]


def describe(**facts: Any) -> dict[str, object]:
    """The facts that are known."""
    return {key: value for key, value in facts.items() if value is not None}


def available_cores() -> int:
    """Cores this process may use, by affinity and by its cgroup's quota, never the host's count."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            cores = min(cores, math.ceil(int(quota) / int(period)))
    except (OSError, ValueError):
        pass
    return max(cores, 1)


def fastest_s(call: Callable[[], object], tries: int = 3) -> float:
    """The least time a call takes, in seconds, of some tries."""
    spent_s = []
    for _ in range(tries):
        started = time.perf_counter()
        call()
        spent_s.append(time.perf_counter() - started)
    return min(spent_s)


def cosine(a: NDArray[Any], b: NDArray[Any]) -> float:
    """The cosine of the angle between two vectors."""
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))
