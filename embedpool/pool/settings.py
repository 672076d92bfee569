"""Settings that all models of a pool share: how to open places and tokenizers, limits, the clock."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

from embedpool.config.spec import ModelSpec
from embedpool.pool.cache import Cache
from embedpool.pool.stats import Observer
from embedpool.tasks.driver import Place, Report
from embedpool.tasks.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class PoolSettings:
    """`open_place` is also given a dict that all drivers of a served model, one after the other and at once, share.

    Both openers report how far they are.
    """

    open_place: Callable[[ModelSpec, dict[str, Any], Report], Place]
    open_tokenizer: Callable[[ModelSpec, Report], Tokenizer]
    request_timeout_s: float = 120.0
    max_queue_per_model: int = 1000
    max_inflight_global: int = 256
    max_batch_texts: int = 64
    max_batch_tokens: int = 16384
    max_batch_s: float | None = None
    max_wait_s: float = 0.0
    probe_idle_s: float | None = None
    clock: Callable[[], float] = time.monotonic
    observer: Observer = Observer()
    cache: Cache = dataclasses.field(default_factory=Cache)
