"""Prometheus metrics of the pool. A model label is always the name of a registered model.

With several gunicorn workers each keeps its numbers in files that all of them read, so any of them answers for all.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import shutil
import tempfile
import threading
from collections import Counter as Counts
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, values
from prometheus_client.core import Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead
from prometheus_client.registry import Collector
from typing_extensions import override

from embedpool.config.files import folder_in_memory
from embedpool.jobs import batches
from embedpool.pool.pool import Pool
from embedpool.pool.request import Result
from embedpool.pool.stats import SECONDS, Observer
from embedpool.reconcile import Reconciler

SHARED_DIR = "PROMETHEUS_MULTIPROC_DIR"  # prometheus-client's own
SHARED_PREFIX, OWNER = "embedpool-metrics-", "owner"
UNTIL_0_2 = {  # older names of metrics, under which they are shown too
    "embedpool_items": "embedpool_texts",
    "embedpool_batch_items": "embedpool_batch_texts",
    "embedpool_queue_items": "embedpool_queue_texts",
    "embedpool_queue_max_items": "embedpool_queue_bound_texts",
}
STATES = ("idle", "loading", "ready", "failed", "disabled", "draining")
BATCH_STATES = ("validating", "in_progress", "paused", "finalizing")
CACHE_SAYS = {  # gauges of each of the cache's layers
    "bytes": "What the cache's rows take there.",
    "max_bytes": "What they may take.",
    "entries": "Rows there.",
    "oldest_seconds": "Age of the row that leaves next.",
}
ITEMS = (1, 2, 4, 8, 16, 32, 64, 128, 256)

prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]


class Metrics(Observer, batches.Observer):
    """The series of one app. Counters and histograms follow the pool's events, gauges are read at each `refresh`."""

    def __init__(self) -> None:
        values.ValueClass = values.get_value_class()  # type: ignore[no-untyped-call]  # files or memory, as the environment says by now
        self._series = functools.cache(lambda metric, *labels: metric.labels(*labels))  # found faster than by labels()
        self._lock = threading.Lock()
        self._counted: Counts[str] = Counts()  # reloads, and evictions by layer
        self._own = registry = CollectorRegistry(auto_describe=False)

        def counter(name: str, doc: str, *labels: str) -> Counter:
            return Counter(f"embedpool_{name}", doc, labels, registry=registry)

        def gauge(name: str, doc: str, *labels: str) -> Gauge:
            return Gauge(f"embedpool_{name}", doc, labels, registry=registry, multiprocess_mode="livesum")

        def histogram(name: str, doc: str, buckets: Iterable[float], *labels: str) -> Histogram:
            return Histogram(f"embedpool_{name}", doc, labels, registry=registry, buckets=tuple(buckets))

        self.http_requests = counter(
            "http_requests", "Answers, by route and status; the code of an error.", "route", "status", "code"
        )
        self.ignored_fields = counter(
            "ignored_fields", "Fields of bodies that were ignored, as in other servers' APIs, by route.", "route"
        )
        asked = ("model", "task")
        self.requests = counter("requests", "Requests that reached the model, answered or refused.", *asked)
        self.items = counter("items", "Inputs of requests answered: texts, or pairs of texts.", *asked)
        self.tokens = counter("tokens", "Tokens answered, special tokens included, after truncation.", *asked)
        self.truncated = counter("truncated", "Texts truncated.", *asked)
        self.errors = counter("errors", "Requests to the model refused, or texts of them, by code.", *asked, "code")
        self.batch_tokens = counter("batch_tokens", "Tokens in driver calls.", "model")
        self.padded_tokens = counter("padded_tokens", "Tokens in driver calls, padding included.", "model")
        self.cache_hits = counter("cache_hits", "Items whose rows had been computed before.", "model")
        self.cache_misses = counter("cache_misses", "Items whose rows had not.", "model")
        self.reloads = counter("reloads", "Reloads of pool.yml, by outcome.", "outcome")
        self.request_seconds = histogram("request_seconds", "From a request's arrival to its numbers.", SECONDS, *asked)
        self.queue_seconds = histogram("queue_seconds", "Wait of a request until its first batch.", SECONDS, "model")
        self.batch_seconds = histogram("batch_seconds", "Compute time of a driver call.", SECONDS, "model")
        self.batch_items = histogram("batch_items", "Items in a driver call.", ITEMS, "model")
        self.state = gauge("model_state", "1 for the model's state, a worker.", "model", "state")
        self.queue_items = gauge("queue_items", "Items waiting.", "model")
        self.queue_max_items = gauge("queue_max_items", "Items that may wait.", "model")
        self.replicas = gauge("replicas", "Replicas, by state.", "model", "state")
        self.workers = gauge("worker", "1 for each process that serves and is counted here, by its pid.", "process")
        self.job_requests = counter("batch_job_requests", "Requests of batches that ran, by outcome.", "outcome")
        self.jobs_ended = counter("batch_jobs_ended", "Batches that are over, by status.", "status")
        self.jobs = gauge("batch_jobs", "Batches that are not over, by status.", "status")
        self.files_bytes = gauge("files_bytes", "What uploaded files and the results of batches take.")
        self.files_max_bytes = gauge("files_max_bytes", "What they may take.")
        self.cache_evictions = counter("cache_evictions", "Rows that left the cache for want of room.", "layer")
        self.cache: dict[str, dict[str, Gauge]] = {}
        for layer in ("memory", "disk"):
            self.cache[layer] = {
                name: Gauge(
                    f"embedpool_cache_{layer}_{name}",
                    doc,
                    registry=registry,
                    multiprocess_mode="livesum" if layer == "memory" else "livemax",  # all workers share the disk's
                )
                for name, doc in CACHE_SAYS.items()
            }
        self._per_task = (self.requests, self.items, self.tokens, self.truncated, self.request_seconds)
        self._per_model = (
            self.batch_tokens, self.padded_tokens, self.queue_seconds, self.batch_seconds, self.batch_items,
            self.cache_hits, self.cache_misses,
        )  # fmt: skip

    def http_answer(self, route: str, status: int, code: str) -> None:
        """One has left; the code is that of an error."""
        self._series(self.http_requests, route, status, code).inc()

    def ignored(self, route: str, count: int) -> None:
        """So many fields of a body were ignored."""
        if count:
            self._series(self.ignored_fields, route).inc(count)

    # --- what the pool tells

    @override
    def answered(self, model: str, task: str, result: Result) -> None:
        self._series(self.requests, model, task).inc()
        self._series(self.items, model, task).inc(len(result.rows) - len(result.errors))
        self._series(self.tokens, model, task).inc(result.tokens)
        self._series(self.truncated, model, task).inc(len(result.truncated))
        for error in result.errors.values():
            self._series(self.errors, model, task, error.code).inc()
        self._series(self.request_seconds, model, task).observe(result.total_ms / 1000)
        self._series(self.queue_seconds, model).observe(result.queue_ms / 1000)

    @override
    def refused(self, model: str, task: str, code: str) -> None:
        self._series(self.requests, model, task).inc()
        self._series(self.errors, model, task, code).inc()

    @override
    def batch(self, model: str, items: int, tokens: int, padded_tokens: int, compute_s: float) -> None:
        self._series(self.batch_tokens, model).inc(tokens)
        self._series(self.padded_tokens, model).inc(padded_tokens)
        self._series(self.batch_seconds, model).observe(compute_s)
        self._series(self.batch_items, model).observe(items)

    @override
    def looked_up(self, model: str, hits: int, misses: int) -> None:
        if hits:
            self._series(self.cache_hits, model).inc(hits)
        if misses:
            self._series(self.cache_misses, model).inc(misses)

    # --- what the runner of batches tells, in one of the processes

    @override
    def lines_ran(self, completed: int, failed: int) -> None:
        for outcome, count in (("completed", completed), ("failed", failed)):
            self._series(self.job_requests, outcome).inc(count)

    @override
    def batch_ended(self, status: str) -> None:
        self._series(self.jobs_ended, status).inc()

    @override
    def batches_seen(self, unfinished: Mapping[str, int], used_bytes: int, most_bytes: int) -> None:
        for status in BATCH_STATES:
            self._series(self.jobs, status).set(unfinished.get(status, 0))
        self.files_bytes.set(used_bytes)
        self.files_max_bytes.set(most_bytes)

    # --- a scrape

    @property
    def is_shared(self) -> bool:
        """Whether other processes show these numbers, too."""
        return SHARED_DIR in os.environ

    def refresh(self, pool: Pool, reconciler: Reconciler) -> None:
        """Set the gauges: states, queues, replicas. Every known model gets every series."""
        with self._lock:
            self._series(self.workers, os.getpid()).set(1)
            for entry in (served.snapshot() for served in pool.models):
                model = entry["model"]
                for metric in self._per_model:
                    self._series(metric, model)
                for task in entry["kinds"]:
                    for metric in self._per_task:
                        self._series(metric, model, task)
                for name in STATES:
                    self._series(self.state, model, name).set(entry["state"] == name)
                self._series(self.queue_items, model).set(entry["queue_len"])
                self._series(self.queue_max_items, model).set(entry["queue_max"])
                idle, busy = entry["replicas_idle"], entry["replicas_busy"]
                not_ready = entry["replicas"] - idle - busy
                for state, count in (("idle", idle), ("busy", busy), ("not_ready", not_ready)):
                    self._series(self.replicas, model, state).set(count)
            for layer, found in pool.cache.state().items():
                now = found or {}
                for name, series in self.cache[layer].items():
                    series.set(now.get(name, 0))
                evicted = now.get("evicted", 0)
                self._series(self.cache_evictions, layer).inc(evicted - self._counted[layer])
                self._counted[layer] = evicted
            for outcome, count in dict(reconciler.reloads).items():
                self._series(self.reloads, outcome).inc(count - self._counted[outcome])
                self._counted[outcome] = count

    def render(self, pool: Pool, reconciler: Reconciler) -> tuple[bytes, str]:
        """Body and content type of a scrape."""
        self.refresh(pool, reconciler)
        source: CollectorRegistry | MultiProcessCollector = self._own
        if self.is_shared and os.path.isdir(os.environ[SHARED_DIR]):  # else the system has cleared it away
            source = MultiProcessCollector(None)  # type: ignore[no-untyped-call]
        known = CollectorRegistry(auto_describe=False)
        known.register(_Known(source, {served.spec.model for served in pool.models}))
        return generate_latest(known), CONTENT_TYPE_PLAIN_0_0_4


class _Known(Collector):
    """Leaves out the series of models that are registered no more."""

    def __init__(self, source: CollectorRegistry | MultiProcessCollector, models: set[str]) -> None:
        self._source = source
        self._models = models

    def collect(self) -> Iterable[Metric]:
        for metric in self._source.collect():
            metric.samples = [s for s in metric.samples if s.labels.get("model") in {None, *self._models}]
            yield metric
            if older := UNTIL_0_2.get(metric.name):
                again = Metric(older, f"Until 0.2: the older name of {metric.name}.", metric.type, metric.unit)
                again.samples = [s._replace(name=older + s.name.removeprefix(metric.name)) for s in metric.samples]
                yield again


# --- several workers; called in gunicorn's master


_owned: tuple[Path, IO[str]] | None = None  # the folder, and the file in it that is locked while it is in use


def share() -> None:
    """Let workers keep their numbers in files, in memory where the system has such; those born from now on do so."""
    import fcntl  # gunicorn runs only where there is one

    global _owned  # noqa: PLW0603  (gunicorn's master is the process)
    if _owned:
        return
    parent = Path(folder_in_memory() or tempfile.gettempdir())
    _remove_abandoned(parent)
    while True:
        folder = Path(tempfile.mkdtemp(prefix=SHARED_PREFIX, dir=parent))
        owner = (folder / OWNER).open("w")
        fcntl.flock(owner, fcntl.LOCK_EX)  # held as long as this process or a worker of it lives
        if folder.exists():  # not taken for abandoned just before
            break
        owner.close()
    _owned = folder, owner
    os.environ[SHARED_DIR] = str(folder)


def _remove_abandoned(parent: Path) -> None:
    """The folders of servers that were killed."""
    import fcntl

    for folder in parent.glob(f"{SHARED_PREFIX}*"):
        with contextlib.suppress(OSError), (folder / OWNER).open("r+") as owner:
            fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder)


def without_other_models(page: bytes, models: set[str]) -> bytes:
    """A page of metrics without the series of models that are none of these."""

    def is_shown(line: bytes) -> bool:
        named = re.search(rb'[{,]model="([^"]*)"', line)
        return named is None or named[1].decode() in models

    return b"".join(line for line in page.splitlines(keepends=True) if is_shown(line))


def unshare() -> None:
    """After the last worker. A folder that others have named is theirs."""
    global _owned  # noqa: PLW0603
    if _owned:
        folder, owner = _owned
        os.environ.pop(SHARED_DIR, None)
        shutil.rmtree(folder, ignore_errors=True)
        owner.close()
        _owned = None


def forget_worker(pid: int) -> None:
    """A worker is gone: what it counted stays, what it held does not."""
    if SHARED_DIR in os.environ:
        mark_process_dead(pid)  # type: ignore[no-untyped-call]
