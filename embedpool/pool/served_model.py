"""The life of one model: its first load, its state, its changes, its end. The road of a request is admission.py."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import threading
from collections.abc import Callable
from typing import Any

from embedpool.config.spec import ModelSpec
from embedpool.errors import (
    DeadlineExceeded,
    EmbedpoolError,
    InvalidRequest,
    ModelFailed,
    ShuttingDown,
    UnsupportedOption,
)
from embedpool.pool.admission import Admission
from embedpool.pool.cache import ModelCache
from embedpool.pool.model_queue import ModelQueue
from embedpool.pool.replica_set import ReplicaSet
from embedpool.pool.settings import PoolSettings
from embedpool.pool.stats import ModelStats
from embedpool.tasks.embed import limit_fault, limit_of
from embedpool.tasks.task import kinds_of
from embedpool.tasks.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


class ServedModel:
    """States: idle, loading, ready, failed, disabled, draining.

    `on_ready` is called on a replica's thread each time one has become ready.
    """

    def __init__(
        self,
        spec: ModelSpec,
        settings: PoolSettings,
        *,
        on_ready: Callable[[ServedModel], None] = lambda served: None,
    ) -> None:
        self.successor: ServedModel | None = None  # of another spec, while it loads; guarded by the pool's lock
        self.stats = ModelStats(spec.model, settings.observer)
        bound = spec.queue.max_size or settings.max_queue_per_model
        self.cache = ModelCache(settings.cache, self.stats.looked_up)
        self.cache.follow(spec.cache)
        self.queue = ModelQueue(bound, settings.clock, settings.max_batch_texts, settings.max_inflight_global)
        self._settings = settings
        self._on_ready = on_ready
        self._draining = False
        self._not_followed: str | None = None  # why a change was refused
        self._tokenizer: Tokenizer | None = None
        self._tokenizer_failed = -math.inf, ""  # when, on the clock, and why
        # Held while the tokenizer is being opened, which may take as long as a download. A request's thread waits for
        # it until its deadline, a replica's for as long as it takes. Inside it only the replica set's is taken.
        self._tokenizer_lock = threading.Lock()
        self.replicas = ReplicaSet(
            spec,
            settings,
            self.queue,
            self.stats,
            cache=self.cache,
            before_load=self._open_tokenizer,  # so that the first request does not pay for it
            on_ready=lambda: self._on_ready(self),
            on_failed=lambda reason: self.admission.fail_waiting(ModelFailed(f"{spec.model!r} failed: {reason}")),
        )
        self.admission = Admission(self.queue, self.replicas, self._open_tokenizer, self.stats, self.cache, settings)

    @property
    def spec(self) -> ModelSpec:
        """What is served now; its replicas follow the same."""
        return self.replicas.spec

    # --- its state

    @property
    def state(self) -> str:
        """The state that a request would meet."""
        if not self.spec.enabled:
            return "disabled"
        return "draining" if self._draining else self.replicas.state

    @property
    def settled(self) -> bool:
        """Whether the first load has ended."""
        return self.replicas.settled.is_set()

    @property
    def is_serving(self) -> bool:
        """Whether a request would be served now."""
        return self.state in ("ready", "idle")

    @property
    def takes_requests(self) -> bool:
        """Whether a request would be served or wait to be."""
        return self.is_serving or (self.state == "loading" and not self.replicas.loads_first)

    def snapshot(self) -> dict[str, Any]:
        """The model's entry in /status; `successor` while a changed model is being loaded."""
        found = {
            "model": self.spec.model,
            "alias": self.spec.alias,
            "enabled": self.spec.enabled,
            "state": self.state,
            "driver_type": self.spec.driver.type,
            "kinds": self.kinds,
            **self.replicas.counts(),
            "queue_len": self.queue.qsize(),
            "queue_max": self.queue.maxsize,
            "scaling": dataclasses.asdict(self.spec.scaling),
            "counters": self.stats.snapshot(),
            "cached": self.cache.is_on,
            "last_error": self.replicas.trouble or self._not_followed,
        }
        if successor := self.successor:
            found["successor"] = successor.outlook()
        return found

    def outlook(self) -> dict[str, Any]:
        """How far a model is that serves nobody yet."""
        replicas = self.replicas
        return {"state": self.state, "last_error": replicas.last_error, "progress": replicas.counts()["progress"]}

    # --- its tokenizer, which needs no loaded model

    def tokenizer(self) -> Tokenizer:
        """Raises UnsupportedOption for a remote model, and what a request to the model would meet."""
        if self.spec.driver.config.is_remote:
            raise UnsupportedOption(f"{self.spec.model!r} is remote: its tokens are known only there")
        self.admission.refuse_unless_serving()
        return self._open_tokenizer(self._settings.request_timeout_s)

    def load(self) -> dict[str, Any]:
        """How much waits, in the words of infinity's list of models."""
        waiting, most = self.queue.qsize(), self.queue.maxsize
        return {
            "queue_fraction": waiting / most,
            "queue_absolute": waiting,
            "results_pending": waiting,
            "batch_size": self.spec.driver.config.max_batch_texts or self._settings.max_batch_texts,
        }

    def preload(self) -> None:
        """Begin to load it if it is loaded on demand. Raises what a request would meet."""
        self.admission.refuse_unless_serving()
        self.replicas.need_one()

    @property
    def kinds(self) -> list[str]:
        """What it can do, in the words of its tasks; empty before that was known."""
        return kinds_of(sorted(self.replicas.widths) or (self._tokenizer.tasks if self._tokenizer else ()))

    def kinds_at_all(self) -> list[str]:
        """The same, found out if need be. Raises what a request would meet."""
        if self.kinds:
            return self.kinds
        config = self.spec.driver.config
        return [str(config.task)] if config.is_remote else kinds_of(self.tokenizer().tasks)

    def can(self, task: str) -> bool:
        """Whether it can do a task, found out if need be; false of a model that serves nobody."""
        if self.state == "failed":
            return task in self.kinds
        with contextlib.suppress(EmbedpoolError):
            return task in self.kinds_at_all()
        return False

    @property
    def width(self) -> int | None:
        """Numbers of a vector; None before it was loaded."""
        return self.replicas.widths.get("embed")

    @property
    def opened_tokenizer(self) -> Tokenizer | None:
        """Its tokenizer, if somebody has opened it already."""
        return self._tokenizer

    def known_max_tokens(self) -> int | None:
        """As `max_tokens`, as far as that is known without opening anything."""
        config = self.spec.driver.config
        return limit_of(None, config, self._tokenizer) if self._tokenizer else config.max_seq_length

    def max_tokens(self) -> int | None:
        """Tokens that it keeps of a text, as far as that is known."""
        return limit_of(None, self.spec.driver.config, self._open_tokenizer())

    def _open_tokenizer(self, timeout_s: float = -1) -> Tokenizer:
        if self._tokenizer is None:
            asked_at = self._settings.clock()
            if not self._tokenizer_lock.acquire(timeout=timeout_s):
                raise DeadlineExceeded("the deadline passed while the model's tokenizer was being opened")
            try:
                failed_at, says = self._tokenizer_failed
                if self._tokenizer is None and failed_at >= asked_at:
                    raise ModelFailed(says)  # as it did for whoever was before this one
                self._tokenizer = self._tokenizer or self._opened_tokenizer()
            finally:
                self._tokenizer_lock.release()
        return self._tokenizer

    def _opened_tokenizer(self) -> Tokenizer:
        try:
            return self._settings.open_tokenizer(self.spec, self.replicas.report)
        except Exception as error:
            says = error.message if isinstance(error, EmbedpoolError) else None
            if says is None:
                logger.exception("%s: its tokenizer cannot be opened", self.spec.model)
                says = f"its tokenizer cannot be opened: {type(error).__name__}: {error}"
            self._tokenizer_failed = self._settings.clock(), says
            self.replicas.failed_without_one(error, says)
            raise error if isinstance(error, EmbedpoolError) else ModelFailed(says) from None
        finally:
            self.replicas.report(None)

    # --- its life

    def start(self, *, prove: bool = False) -> ServedModel:
        """Itself, loading in the background; with `prove` also a model of min 0, so that its first load is seen."""
        wanted = max(self.spec.scaling.min, 1 if prove else 0)
        self.replicas.start(wanted if self.spec.enabled else 0)
        return self

    def require_loaded(self, timeout_s: float) -> None:
        """Wait for the first load. Raises ModelFailed with the reason unless it succeeded in time."""
        settled = self.replicas.settled.wait(timeout_s)
        if self.replicas.stopped:
            raise ShuttingDown(f"{self.spec.model!r} is stopping")
        if not settled or self.state == "failed":
            reason = self.replicas.last_error if settled else f"not ready within {timeout_s:g} s"
            raise ModelFailed(f"{self.spec.model!r} did not load: {reason}")

    def update(self, spec: ModelSpec) -> None:
        """Take over a spec of the same `load_key`: applies at once. A limit that no start would accept is refused."""
        self._not_followed = None
        limit = spec.driver.config.max_seq_length
        if self._tokenizer and (fault := limit_fault(limit, self._tokenizer)):
            self._not_followed = f"the changed driver.config is not followed: max_seq_length {fault}"
            logger.error("%s: %s", spec.model, self._not_followed)
            driver = dataclasses.replace(spec.driver, config=self.spec.driver.config)
            spec = dataclasses.replace(spec, driver=driver)
        self.queue.resize(spec.queue.max_size or self._settings.max_queue_per_model)
        self.cache.follow(spec.cache)
        self.replicas.update(spec)

    def check(self, spec: ModelSpec) -> None:
        """Raise InvalidRequest for a spec of the same `load_key` that this model cannot follow."""
        limit = spec.driver.config.max_seq_length
        if limit and (fault := limit_fault(limit, self._open_tokenizer())):
            path = "driver_config.max_seq_length"
            raise InvalidRequest(f"{path}: {fault}", fields={path: fault})

    def close(self) -> None:
        """Take no new request."""
        self._draining = True
        self.queue.close()

    def drain(self, timeout_s: float) -> int:
        """Close, wait for the requests inside, stop the replicas. Gives the number of requests given up."""
        self.close()
        given_up = self.admission.give_up(timeout_s)
        self.replicas.stop(timeout_s)
        return given_up
