"""The only place where the parts meet: EmbedpoolApp joins them, `run` serves it under gunicorn or waitress.

Both servers run the same loop (serve/loop.py); under gunicorn it runs in the worker class of serve/gunicorn_worker.py.
"""

from __future__ import annotations

import functools
import ipaddress
import logging
import signal
import socket
import threading
from collections.abc import Callable, Mapping
from typing import Any

from flask import Flask

from embedpool import tracing
from embedpool.config import guard
from embedpool.config.files import folder_in_memory
from embedpool.config.keys import KeysFile
from embedpool.config.pool_yml import PoolFile
from embedpool.config.settings import Settings, find_config_yml, load_settings
from embedpool.config.spec import ModelSpec
from embedpool.config.watch import Watch
from embedpool.drivers import make_driver, open_meter
from embedpool.drivers.base import Driver, Meter
from embedpool.errors import ConfigError, PoolFileInvalid
from embedpool.logs import configure_logging
from embedpool.pool.pool import Pool
from embedpool.pool.replica_set import Engine
from embedpool.reconcile import Reconciler
from embedpool.serve.loop import LISTEN_BACKLOG, Loop
from embedpool.serve.process import PidFile, has_service_manager, tell_service_manager
from embedpool.web import metrics
from embedpool.web.app import create_app, refusal

logger = logging.getLogger(__name__)

SPANS_WAIT_S = 3.0  # for a collector that does not answer
STOP_MARGIN_S = 20  # beyond the grace period, for replicas to close before gunicorn kills the worker


class EmbedpoolApp:
    """A WSGI app with its pool and its watch. Threads start in `start`, so it is built and started after a fork."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        cache_dir = settings.file(settings.paths.cache_dir)

        def open_driver(spec: ModelSpec, memory: dict[str, Any]) -> Driver:
            guard.check(spec, settings)
            driver = make_driver(
                spec, cache_dir, functools.partial(configure_logging, settings), settings.defaults.request_timeout_s
            )
            driver.memory = memory
            driver.open()
            return driver

        def open_allowed_meter(spec: ModelSpec) -> Meter:
            guard.check(spec, settings)
            return open_meter(spec)

        self.metrics = metrics.Metrics()
        batching = settings.batching
        engine = Engine(
            open_driver,
            open_allowed_meter,
            request_timeout_s=settings.defaults.request_timeout_s,
            max_queue_per_model=settings.defaults.max_queue_per_model,
            max_batch_texts=batching.max_batch_texts,
            max_batch_tokens=batching.max_batch_tokens,
            max_batch_s=batching.max_batch_ms / 1000 or None,
            max_wait_s=batching.max_wait_ms / 1000,
            probe_idle_s=settings.defaults.probe_idle_s or None,
            observer=self.metrics,
        )
        self.pool = Pool(engine, max_inflight_global=settings.defaults.max_inflight_global)
        self.reconciler = Reconciler(PoolFile(settings.file(settings.paths.pool_yml)), self.pool)
        self.pool.catch_up = self.reconciler.catch_up
        self.flask: Flask = create_app(self.pool, self.reconciler, settings, self.metrics)
        self._spans = tracing.start() if settings.tracing.enabled else None
        self._watch: Watch | None = None
        if settings.hot_reload.enabled:
            self._watch = Watch(
                self.reconciler.pool_file.path,
                self.reconciler.on_file_change,
                observer=settings.hot_reload.observer,
                poll_interval_s=settings.hot_reload.poll_interval_s,
                debounce_ms=settings.hot_reload.debounce_ms,
            )

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        """WSGI."""
        return self.flask(environ, start_response)

    def start(self) -> None:
        """Begin to load the models and to watch pool.yml. A broken pool.yml is shown in /status; nothing is served."""
        try:
            self.reconciler.reload("start")
        except PoolFileInvalid:
            logger.error("started without models")
        if self._watch:
            self._watch.start()

    def beat(self) -> None:
        """See App. Tells the service manager, and the workers that may answer a scrape for this one."""
        try:
            if has_service_manager():
                tell_service_manager(f"WATCHDOG=1\nSTATUS={self._summary()}")
            if self.metrics.is_shared:
                self.metrics.refresh(self.pool, self.reconciler)
        except Exception:
            logger.exception("the state was not told")  # no reason to end the loop, which this runs in

    def refusal(self, method: str, path: str, headers: Mapping[str, str]) -> tuple[int, bytes] | None:
        """See App."""
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

    def begin_to_stop(self) -> None:
        """See App."""
        self.pool.draining = True
        if self._watch:
            self._watch.stop()
            self._watch = None

    def stop(self) -> int:
        """See App."""
        given_up = self.pool.stop()
        ending = threading.Thread(target=tracing.stop, args=(self._spans,), name="stop-tracing", daemon=True)
        ending.start()
        ending.join(SPANS_WAIT_S)
        return given_up


def wsgi() -> EmbedpoolApp:
    """The app of the config file that `EMBEDPOOL_CONFIG` names, started: for `gunicorn 'embedpool.server:wsgi()'`."""
    settings = load_settings(find_config_yml(None))
    configure_logging(settings)
    app = EmbedpoolApp(settings)
    app.start()
    return app


# --- running it


def run(settings: Settings, kind: str) -> None:
    """Serve in the foreground until SIGTERM or Ctrl-C, under gunicorn or waitress."""
    configure_logging(settings)
    if kind == "gunicorn":
        bind(settings).close()  # gunicorn itself would retry for seconds and say less
        run_gunicorn()
    else:
        run_waitress(settings)


def run_waitress(settings: Settings) -> None:
    """The loop in this process; works on every platform."""
    refuse_an_open_door(settings)
    listener = bind(settings)
    app = EmbedpoolApp(settings)
    loop = Loop(app, [listener])
    before = {s: signal.signal(s, lambda *_: loop.stop()) for s in (signal.SIGTERM, signal.SIGINT)}
    pid_file = PidFile(settings)
    try:
        app.start()
        pid_file.write(_address(listener))
        tell_service_manager("READY=1")  # gunicorn does so itself
        logger.info("serving on %s:%s (waitress)", *listener.getsockname()[:2])
        loop.run()
    finally:
        pid_file.remove()
        for number, handler in before.items():
            signal.signal(number, handler)


def run_gunicorn() -> None:
    """gunicorn's master in this process, embedpool in its workers; they read the file that `EMBEDPOOL_CONFIG` names."""
    from gunicorn.app.base import BaseApplication

    class Application(BaseApplication):  # type: ignore[misc]
        def load_config(self) -> None:
            for name, value in gunicorn_settings().items():
                self.cfg.set(name, value)

        def load(self) -> EmbedpoolApp:
            return wsgi()

    Application().run()


_last_good: Settings | None = None


def gunicorn_settings() -> dict[str, Any]:
    """gunicorn's settings from config.yml, for conf/gunicorn.conf.py and `pool start`.

    gunicorn reads them again on SIGHUP, where an error would end its master: a broken config.yml or keys.yml then
    leaves them as they were.
    """
    global _last_good  # noqa: PLW0603  (gunicorn executes its config file anew; only a module survives that)
    try:
        settings = load_settings(find_config_yml(None))
        refuse_an_open_door(settings)
        _last_good = settings
    except ConfigError as error:
        if _last_good is None:
            raise
        logger.error("the settings stay as they were: %s", error.message)
    settings = _last_good
    server = settings.server
    configure_logging(settings)
    pid_file = PidFile(settings)

    def begin(arbiter: Any) -> None:
        if arbiter.cfg.workers > 1:
            metrics.share()

    def end(arbiter: Any) -> None:
        metrics.unshare()
        pid_file.remove()

    return {
        "bind": f"{_shown(server.host)}:{server.port}",
        "worker_class": "embedpool.serve.gunicorn_worker.WaitressWorker",
        "workers": server.workers,
        "threads": settings.threads,
        "backlog": LISTEN_BACKLOG,
        "preload_app": False,  # threads do not survive fork: the app is built in the worker
        "timeout": 60,  # for the I/O loop's heartbeat; deadlines of requests are ours
        "graceful_timeout": server.graceful_timeout_s + STOP_MARGIN_S,
        "loglevel": settings.logging.level,
        "logger_class": "embedpool.serve.gunicorn_worker.GunicornLogger",
        "control_socket_disable": True,
        "worker_tmp_dir": folder_in_memory(),  # a heartbeat is a file: not on a disk that may be full
        "when_ready": lambda arbiter: pid_file.write(_address(arbiter.LISTENERS[0].sock)),
        "on_starting": begin,
        "child_exit": lambda arbiter, worker: metrics.forget_worker(worker.pid),
        "on_exit": end,
    }


def refuse_an_open_door(settings: Settings) -> None:
    """Raises ConfigError if other machines could reach a server that asks nobody for a key, or keys.yml is broken."""
    security = settings.security
    keys = KeysFile(settings.file(security.keys_file)).read()
    if security.insecure or _is_loopback(settings.server.host):
        return
    if not (security.admin_key_env or security.embed_key_env or keys):
        raise ConfigError(
            f"{settings.server.host} is reached from other machines and there is no key: make one with "
            "`embedpool key create`, or say --insecure"
        )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def bind(settings: Settings) -> socket.socket:
    """A listening socket. Raises ConfigError with the reason."""
    host, port = settings.server.host, settings.server.port
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=LISTEN_BACKLOG)
    except OSError as error:
        raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror or error}") from None


def _address(listener: socket.socket) -> str:
    """Where a program on this machine finds the server."""
    host, port = listener.getsockname()[:2]
    return f"http://{_shown({'0.0.0.0': '127.0.0.1', '::': '::1'}.get(host, host))}:{port}"  # noqa: S104


def _shown(host: str) -> str:
    return f"[{host}]" if ":" in host else host
