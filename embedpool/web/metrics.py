"""The pool's counters in Prometheus' text format. A model label is only ever the name of a registered model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.registry import Collector

from embedpool.pool.pool import Pool

if TYPE_CHECKING:
    from embedpool.reconcile import Reconciler

COUNTERS = {
    "requests": "Requests that reached the model, answered or refused.",
    "texts": "Texts answered.",
    "tokens": "Tokens answered, special tokens included, after truncation.",
    "truncated": "Texts truncated.",
    "batches": "Driver calls.",
    "rows": "Texts in driver calls.",
    "batch_tokens": "Tokens in driver calls.",
    "padded_tokens": "Tokens in driver calls, padding included.",
    "compute_s": "Seconds spent in driver calls.",
}
RENAMED = {"compute_s": "compute_seconds"}
STATES = ("idle", "loading", "ready", "failed", "disabled", "draining")


class _PoolCollector(Collector):
    """Reads the pool's snapshot at each scrape; keeps nothing."""

    def __init__(self, pool: Pool, reconciler: Reconciler) -> None:
        self._pool = pool
        self._reconciler = reconciler

    def collect(self) -> Iterable[Metric]:
        models = self._pool.snapshot()
        for name, doc in COUNTERS.items():
            counter = CounterMetricFamily(f"embedpool_{RENAMED.get(name, name)}", doc, labels=["model"])
            for entry in models:
                counter.add_metric([entry["model"]], entry["counters"][name])
            yield counter
        errors = CounterMetricFamily("embedpool_errors", "Requests refused, by code.", labels=["model", "code"])
        state = GaugeMetricFamily("embedpool_model_state", "1 for the model's state.", labels=["model", "state"])
        waiting = GaugeMetricFamily("embedpool_queue_texts", "Texts waiting.", labels=["model"])
        replicas = GaugeMetricFamily("embedpool_replicas", "Replicas, by activity.", labels=["model", "activity"])
        for entry in models:
            model = entry["model"]
            for code, count in entry["counters"]["errors"].items():
                errors.add_metric([model, code], count)
            for name in STATES:
                state.add_metric([model, name], float(entry["state"] == name))
            waiting.add_metric([model], entry["queue_len"])
            idle, busy = entry["replicas_idle"], entry["replicas_busy"]
            for activity, count in (("idle", idle), ("busy", busy), ("other", entry["replicas"] - idle - busy)):
                replicas.add_metric([model, activity], count)
        yield from (errors, state, waiting, replicas)
        reloads = CounterMetricFamily("embedpool_reloads", "Reloads of pool.yml, by outcome.", labels=["outcome"])
        for outcome, count in self._reconciler.reloads.items():
            reloads.add_metric([outcome], count)
        yield reloads


def registry(pool: Pool, reconciler: Reconciler) -> CollectorRegistry:
    """A registry of this app alone, so that several apps in one process do not meet."""
    found = CollectorRegistry(auto_describe=False)
    found.register(_PoolCollector(pool, reconciler))
    return found


def render(found: CollectorRegistry) -> tuple[bytes, str]:
    """Body and content type of a scrape."""
    return generate_latest(found), CONTENT_TYPE_PLAIN_0_0_4
