"""The only place where the parts meet: `build` makes the app, `run` serves it under gunicorn or waitress.

Both servers run the same loop: waitress's, whose one I/O thread gives a request thread only whole requests, so slow and
idle clients hold none. Under gunicorn it runs in the worker class of gunicorn_worker.py, with gunicorn as supervisor.
"""

from __future__ import annotations

import logging
import select
import signal
import socket
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

import orjson
from flask import Flask
from waitress import wasyncore
from waitress.channel import HTTPChannel
from waitress.server import BaseWSGIServer, create_server
from waitress.task import ErrorTask, WSGITask

from embedpool.config.pool_yml import PoolFile
from embedpool.config.settings import Settings, find_config_yml, load_settings
from embedpool.config.spec import ModelSpec
from embedpool.config.watch import Watch
from embedpool.drivers import make_driver, open_meter
from embedpool.drivers.base import Driver
from embedpool.errors import BadRequest, BodyTooLarge, ConfigError, EmbedpoolError, PoolFileInvalid, as_document
from embedpool.pool.pool import Pool
from embedpool.pool.served_model import Engine
from embedpool.process import PidFile
from embedpool.reconcile import Reconciler
from embedpool.web.app import create_app

logger = logging.getLogger(__name__)

STOP_MARGIN_S = 5  # beyond the grace period, for replicas to close before gunicorn kills the worker
LISTEN_BACKLOG = 2048


class EmbedpoolApp:
    """A WSGI app with its pool and its watch. Threads start in `start`, so it is built and started after a fork."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        cache_dir = settings.file(settings.paths.cache_dir)

        def open_driver(spec: ModelSpec) -> Driver:
            driver = make_driver(spec, cache_dir)
            driver.open()
            return driver

        batching = settings.batching
        engine = Engine(
            open_driver,
            open_meter,
            request_timeout_s=settings.defaults.request_timeout_s,
            max_queue_per_model=settings.defaults.max_queue_per_model,
            max_batch_texts=batching.max_batch_texts,
            max_batch_tokens=batching.max_batch_tokens,
            max_wait_s=batching.max_wait_ms / 1000,
        )
        self.pool = Pool(engine, max_inflight_global=settings.defaults.max_inflight_global)
        self.reconciler = Reconciler(PoolFile(settings.file(settings.paths.pool_yml)), self.pool)
        self.flask: Flask = create_app(self.pool, self.reconciler, settings)
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

    def stop_watching(self) -> None:
        """The first step of a stop: nothing changes the pool any more, and /ready says so."""
        self.pool.draining = True
        if self._watch:
            self._watch.stop()
            self._watch = None


def wsgi() -> EmbedpoolApp:
    """The app of the config file that `EMBEDPOOL_CONFIG` names, started: for `gunicorn 'embedpool.server:wsgi()'`."""
    settings = load_settings(find_config_yml(None))
    configure_logging(settings)
    app = EmbedpoolApp(settings)
    app.start()
    return app


def configure_logging(settings: Settings) -> None:
    """To standard error, once."""
    logging.basicConfig(
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        level=settings.logging.level.upper(),
        stream=sys.stderr,
    )
    logging.getLogger("waitress.queue").setLevel(logging.ERROR)  # admission is ours; its queue is only a hand-over
    logging.getLogger("sentence_transformers").setLevel(logging.WARNING)
    logging.getLogger("httpx").setLevel(logging.WARNING)


# --- the loop


class _Task(WSGITask):  # type: ignore[misc]
    """While the server stops, each answer closes its connection."""

    def build_response_header(self) -> bytes:
        if getattr(self.channel.server, "is_stopping", False):
            self.set_close_on_finish()
        header: bytes = super().build_response_header()
        return header


class _ErrorTask(ErrorTask):  # type: ignore[misc]
    """What is not even HTTP gets an error in our shape, too."""

    def execute(self) -> None:
        reason = self.request.error
        error: EmbedpoolError = (
            BodyTooLarge(f"the body is over the limit of {self.channel.adj.max_request_body_size} bytes")
            if reason.code == 413
            else BadRequest(f"{reason.reason}: {reason.body}")
        )
        error.status = reason.code
        body = orjson.dumps(as_document(error, uuid.uuid4().hex))
        self.status = f"{reason.code} {reason.reason}"
        self.response_headers.append(("Content-Type", "application/json"))
        self.set_close_on_finish()
        self.content_length = len(body)
        self.write(body)


class _Channel(HTTPChannel):  # type: ignore[misc]
    task_class = _Task
    error_task_class = _ErrorTask

    @property
    def is_idle(self) -> bool:
        """No request begun, running or half answered."""
        return not (self.requests or self.request or self.total_outbufs_len)


class Loop:
    """waitress's loop over given listening sockets, and its orderly end."""

    def __init__(self, app: EmbedpoolApp, sockets: Sequence[socket.socket]) -> None:
        settings = app.settings
        self._app = app
        self._stopping = False
        self._map: dict[int, Any] = {}
        create_server(
            app,
            map=self._map,
            sockets=list(sockets),
            threads=settings.threads,
            connection_limit=settings.server.connection_limit,
            channel_timeout=settings.server.idle_connection_s,
            cleanup_interval=min(settings.server.idle_connection_s, 30),
            max_request_body_size=settings.limits.max_body_bytes,
            channel_request_lookahead=1,  # else a client that goes away is not noticed
            clear_untrusted_proxy_headers=False,  # management looks at them
            backlog=LISTEN_BACKLOG,
            ident="embedpool",
        )
        self._listeners = [d for d in self._map.values() if isinstance(d, BaseWSGIServer)]
        for listener in self._listeners:
            listener.channel_class = _Channel
        self._poll = wasyncore.poll2 if hasattr(select, "poll") else wasyncore.poll  # select ends at 1,024 files

    def stop(self) -> None:
        """Let `run` drain and return. Safe in a signal handler."""
        self._stopping = True
        self._listeners[0].pull_trigger()

    def run(self, heartbeat: Callable[[], bool] = lambda: True) -> None:
        """Serve until `stop`, or until `heartbeat`, called at least once a second, says False; then drain."""
        while not self._stopping and heartbeat():
            self._poll(1.0, self._map)
        self._drain(heartbeat)

    def _drain(self, heartbeat: Callable[[], bool]) -> None:
        """Watch → listener → drain → pool → threads, in this order and in bounded time."""
        grace_s = self._app.settings.server.graceful_timeout_s
        self._app.stop_watching()
        for listener in self._listeners:
            listener.is_stopping = True
        self._close_listeners()
        self._serve_what_is_left(grace_s, heartbeat)
        given_up = self._app.pool.stop()
        self._serve_what_is_left(2.0, heartbeat)  # the answers of what was given up
        cut = len(self._channels())
        self._listeners[0].task_dispatcher.shutdown(timeout=1)
        for dispatcher in list(self._map.values()):
            dispatcher.close()
        log = logger.warning if given_up or cut else logger.info
        log("stopped: %d requests got 503 after %s s, %d connections were cut", given_up, grace_s, cut)

    def _close_listeners(self) -> None:
        """What the system has accepted already is served; later connections are refused, not parked."""
        for listener in self._listeners:
            accepted = -1
            while accepted != len(self._map):
                accepted = len(self._map)
                listener.handle_accept()
            listener.accepting = False
            listener.del_channel()
            listener.socket.close()

    def _serve_what_is_left(self, longest_s: float, heartbeat: Callable[[], bool]) -> None:
        """Go on until every connection is closed. One is closed when nothing has arrived on it and nothing is owed."""
        deadline = time.monotonic() + longest_s
        while True:
            heartbeat()
            self._poll(0.05, self._map)
            for channel in self._channels():
                if channel.is_idle:
                    channel.will_close = True
            self._poll(0.0, self._map)
            if not self._channels() or time.monotonic() >= deadline:
                return

    def _channels(self) -> list[_Channel]:
        return [d for d in list(self._map.values()) if isinstance(d, _Channel)]


# --- running it


def run(settings: Settings, kind: str) -> None:
    """Serve in the foreground until SIGTERM or Ctrl-C, under gunicorn or waitress."""
    configure_logging(settings)
    if kind == "gunicorn":
        run_gunicorn()
    else:
        run_waitress(settings)


def run_waitress(settings: Settings) -> None:
    """The loop in this process; works on every platform."""
    listener = bind(settings)
    app = EmbedpoolApp(settings)
    loop = Loop(app, [listener])
    before = {s: signal.signal(s, lambda *_: loop.stop()) for s in (signal.SIGTERM, signal.SIGINT)}
    pid_file = PidFile(settings)
    try:
        app.start()
        host, port = listener.getsockname()[:2]
        pid_file.write(f"http://{_shown(host)}:{port}")
        logger.info("serving on %s:%s (waitress)", host, port)
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

    gunicorn reads them again on SIGHUP, where an error would end its master: a broken config.yml then leaves them as
    they were.
    """
    global _last_good  # noqa: PLW0603  (gunicorn executes its config file anew; only a module survives that)
    try:
        _last_good = load_settings(find_config_yml(None))
    except ConfigError as error:
        if _last_good is None:
            raise
        logger.error("config.yml is not followed: %s", error.message)
    settings = _last_good
    server = settings.server
    pid_file = PidFile(settings)
    return {
        "bind": f"{_shown(server.host)}:{server.port}",
        "worker_class": "embedpool.gunicorn_worker.WaitressWorker",
        "workers": server.workers,
        "threads": settings.threads,
        "backlog": LISTEN_BACKLOG,
        "preload_app": False,  # threads do not survive fork: the app is built in the worker
        "timeout": 60,  # for the I/O loop's heartbeat; deadlines of requests are ours
        "graceful_timeout": server.graceful_timeout_s + STOP_MARGIN_S,
        "loglevel": settings.logging.level,
        "control_socket_disable": True,
        "when_ready": lambda arbiter: pid_file.write(_address_of(arbiter.LISTENERS[0])),
        "on_exit": lambda arbiter: pid_file.remove(),
    }


def bind(settings: Settings) -> socket.socket:
    """A listening socket. Raises ConfigError with the reason."""
    host, port = settings.server.host, settings.server.port
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=LISTEN_BACKLOG)
    except OSError as error:
        raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror or error}") from None


def _address_of(listener: Any) -> str:
    host, port = listener.sock.getsockname()[:2]
    return f"http://{_shown(host)}:{port}"


def _shown(host: str) -> str:
    return f"[{host}]" if ":" in host else host
