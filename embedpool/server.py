"""The only place where the parts meet: EmbedpoolApp joins them. serve/run.py runs it under gunicorn or waitress."""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flask import Flask

from embedpool import tracing
from embedpool.config import checked, guard
from embedpool.config.config_yml import unknown_variables
from embedpool.config.keys import require_a_key
from embedpool.config.pool_yml import PoolFile
from embedpool.config.settings import Settings
from embedpool.config.spec import ModelSpec
from embedpool.config.watch import Watch
from embedpool.drivers import make_driver, open_tokenizer
from embedpool.jobs.batches import Runner
from embedpool.logs import configure_logging
from embedpool.places import open_place
from embedpool.pool.cache import Cache
from embedpool.pool.pool import Pool
from embedpool.pool.settings import PoolSettings
from embedpool.pool.stats import Observer
from embedpool.reconcile import LAST_POOL, Reconciler
from embedpool.serve.service_manager import has_service_manager, tell_service_manager
from embedpool.tasks.driver import Folders, Place, Report
from embedpool.tasks.tokenizer import Tokenizer
from embedpool.web import metrics
from embedpool.web.app import ACCESS, create_app, refusal
from embedpool.web.dialects import batches
from embedpool.web.history import HISTORY

logger = logging.getLogger(__name__)

CACHE_CLEARED = "cache_cleared"  # a file of state_dir, touched when the cache is cleared
SPANS_WAIT_S = 3.0  # for a collector that does not answer


def make_cache(settings: Settings) -> Cache:
    """Of rows that were computed before. Raises ConfigError."""
    of = settings.cache
    if not of.enabled:
        return Cache()
    disk = None
    if of.disk_mb:
        from embedpool.cache.disk import LmdbDisk

        disk = LmdbDisk(settings.file(of.path or f"{settings.paths.cache_dir}/rows"), of.disk_mb << 20)
    cleared_file = settings.file(settings.paths.state_dir) / CACHE_CLEARED
    return Cache(of.memory_mb << 20, disk, shared=of.share == "all", cleared_file=cleared_file)


def make_pool(settings: Settings, observer: Observer, cache: Cache) -> Pool:
    """A pool without a model, as the settings say; it opens what they allow."""
    folders = Folders(settings.file(settings.paths.cache_dir), settings.file(settings.paths.state_dir))

    def open_allowed_place(spec: ModelSpec, memory: dict[str, Any], report: Report) -> Place:
        guard.check(spec, settings)
        return open_place(
            spec,
            functools.partial(make_driver, spec, folders, memory),
            prepare_child=functools.partial(configure_logging, settings),
            longest_batch_s=settings.defaults.request_timeout_s,
            report=report,
            ray=settings.ray,
            state_dir=folders.state,
        )

    def open_allowed_tokenizer(spec: ModelSpec, report: Report) -> Tokenizer:
        guard.check(spec, settings)
        return open_tokenizer(spec, folders, report)

    batching = settings.batching
    pool_settings = PoolSettings(
        open_allowed_place,
        open_allowed_tokenizer,
        request_timeout_s=settings.defaults.request_timeout_s,
        max_queue_per_model=settings.defaults.max_queue_per_model,
        max_batch_texts=batching.max_batch_texts,
        max_batch_tokens=batching.max_batch_tokens,
        max_batch_s=batching.max_batch_ms / 1000 or None,
        max_wait_s=batching.max_wait_ms / 1000,
        probe_idle_s=settings.defaults.probe_idle_s or None,
        observer=observer,
        cache=cache,
    )
    return Pool(pool_settings, max_inflight_global=settings.defaults.max_inflight_global)


class EmbedpoolApp:
    """A WSGI app with its pool and its watch. Threads start in `start`, so it is built and started after a fork."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        for variable, near in unknown_variables().items():
            logger.warning("the environment variable %s is none of embedpool's; did you mean %s?", variable, near)
        self.metrics = metrics.Metrics()
        self.pool = make_pool(settings, self.metrics, make_cache(settings))
        self.reconciler = Reconciler(
            PoolFile(settings.file(settings.paths.pool_yml)),
            self.pool,
            PoolFile(settings.file(settings.paths.state_dir) / LAST_POOL),
        )
        if settings.hot_reload.enabled:
            self.pool.catch_up = self.reconciler.catch_up
        self.flask: Flask = create_app(self.pool, self.reconciler, settings, self.metrics)
        execute = functools.partial(batches.executed, self.flask)
        self._batches = Runner(self.flask.extensions[batches.STORE], execute, self.metrics)
        self._spans = tracing.start() if settings.tracing.enabled else None
        self._watch: Watch | None = None
        if settings.hot_reload.enabled:
            self._watch = Watch(
                self.reconciler.pool_file.path,
                self.reconciler.on_file_change,
                is_behind=self.reconciler.is_behind,
                observer=settings.hot_reload.observer,
                poll_interval_s=settings.hot_reload.poll_interval_s,
                debounce_ms=settings.hot_reload.debounce_ms,
            )

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        """WSGI."""
        return self.flask(environ, start_response)

    def start(self) -> None:
        """Begin to load the models and to watch pool.yml. Beside a broken one the pool that was last is served."""
        self.reconciler.begin()
        self._batches.start()
        if self._watch:
            self._watch.start()

    def listens_at(self, hosts: Sequence[str]) -> None:
        """Ask everybody for a key if other machines reach one of these addresses."""
        if not all(map(guard.is_loopback, hosts)):
            self.flask.extensions[ACCESS].serves_other_machines()

    @property
    def is_booted(self) -> bool:
        """Whether every enabled model has finished its first load or failed."""
        return self.pool.booted

    def beat(self) -> None:
        """Tell the service manager that the loop turns, share this worker's metrics, and take the page's sample."""
        try:
            if history := self.flask.extensions.get(HISTORY):
                history.sample_if_due()
            if has_service_manager():
                tell_service_manager(f"WATCHDOG=1\nSTATUS={self._summary()}")
            if self.metrics.is_shared:
                self.metrics.refresh(self.pool, self.reconciler)
        except Exception:
            logger.exception("the state was not told")  # no reason to end the loop, which this runs in

    def refusal(self, method: str, path: str, headers: Mapping[str, str]) -> tuple[int, bytes] | None:
        """Status and body of the answer to a caller who, by the head of this request, may not send its body."""
        try:
            return refusal(self.flask, method, path, {name.replace("_", "-"): value for name, value in headers.items()})
        except Exception:
            logger.exception("a request could not be judged by its head")  # then it is when it is whole
            return None

    def _summary(self) -> str:
        """In a line."""
        states = {served.spec.model: served.state for served in self.pool.models}
        failed = [model for model, state in states.items() if state == "failed"]
        serving = sum(served.is_serving for served in self.pool.models)
        return f"{serving} of {len(states)} models serve" + (f"; failed: {', '.join(failed)}" if failed else "")

    def begin_to_stop(self, *, replaced: bool = False) -> None:
        """Stop watching pool.yml, and let /ready fail unless another worker serves on. Requests are still served."""
        self.pool.draining = not replaced
        self._batches.begin_to_stop()
        if self._watch:
            self._watch.stop()
            self._watch = None

    def stop(self) -> int:
        """Close the models and export the last spans. Returns how many requests were given up."""
        given_up = self.pool.stop()
        self._batches.stop()
        ending = threading.Thread(target=tracing.stop, args=(self._spans,), name="stop-tracing", daemon=True)
        ending.start()
        ending.join(SPANS_WAIT_S)
        return given_up


def wsgi() -> EmbedpoolApp:
    """The app of the config file that `EMBEDPOOL_CONFIG` names, started: for `gunicorn 'embedpool.server:wsgi()'`.

    A worker is born with the settings that its master has checked, whatever config.yml holds by now.
    """
    settings = checked.at_birth(lambda read: require_a_key(read, read.server.host))
    configure_logging(settings)
    app = EmbedpoolApp(settings)
    app.start()
    return app


def __getattr__(name: str) -> Any:
    """`gunicorn_settings` has moved; copies of conf/gunicorn.conf.py may import it from here until 0.2."""
    if name == "gunicorn_settings":
        from embedpool.serve.gunicorn_settings import gunicorn_settings

        return gunicorn_settings
    raise AttributeError(f"module 'embedpool.server' has no attribute {name!r}")
