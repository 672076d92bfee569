"""Runs EmbedpoolApp, under gunicorn or with waitress's loop alone: addresses, keys, signals, the pid file.

Both servers run the same loop (loop.py); under gunicorn it runs in the worker class of gunicorn_worker.py.
"""

from __future__ import annotations

import ipaddress
import logging
import signal
import socket
from typing import Any

from embedpool.config.files import folder_in_memory
from embedpool.config.keys import KeysFile
from embedpool.config.settings import Settings, find_config_yml, load_settings
from embedpool.errors import ConfigError
from embedpool.logs import configure_logging
from embedpool.serve.connections import LISTEN_BACKLOG
from embedpool.serve.loop import Loop
from embedpool.serve.process import PidFile
from embedpool.serve.service_manager import tell_service_manager
from embedpool.server import EmbedpoolApp, wsgi
from embedpool.web import metrics

logger = logging.getLogger(__name__)

WORKER_STOP_MARGIN_S = 20  # beyond the grace period, so that replicas can close before gunicorn kills the worker


def run(settings: Settings, kind: str) -> None:
    """Serve in the foreground until SIGTERM or Ctrl-C, under gunicorn or waitress."""
    configure_logging(settings)
    if kind == "gunicorn":
        bind(settings).close()  # gunicorn itself would retry for seconds and say less
        run_gunicorn()
    else:
        run_waitress(settings)


def run_waitress(settings: Settings) -> None:
    """Run the loop in this process, on any platform."""
    require_a_key(settings)
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
    """Run gunicorn's master in this process. Its workers serve, by the file that `EMBEDPOOL_CONFIG` names."""
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

    gunicorn reads them again on SIGHUP, when an error would end its master: so a config.yml or keys.yml that is broken
    then leaves the settings as they were.
    """
    global _last_good  # noqa: PLW0603  (gunicorn executes its config file anew; only a module survives that)
    try:
        settings = load_settings(find_config_yml(None))
        require_a_key(settings)
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
        "graceful_timeout": server.graceful_timeout_s + WORKER_STOP_MARGIN_S,
        "loglevel": settings.logging.level,
        "logger_class": "embedpool.serve.gunicorn_worker.GunicornLogger",
        "control_socket_disable": True,
        "worker_tmp_dir": folder_in_memory(),  # a heartbeat is a file: not on a disk that may be full
        "when_ready": lambda arbiter: pid_file.write(_address(arbiter.LISTENERS[0].sock)),
        "on_starting": begin,
        "child_exit": lambda arbiter, worker: metrics.forget_worker(worker.pid),
        "on_exit": end,
    }


def require_a_key(settings: Settings) -> None:
    """Raises ConfigError if other machines can reach a server that has no key, or if keys.yml is broken."""
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
    """Open the listening socket. Raises ConfigError with the reason."""
    host, port = settings.server.host, settings.server.port
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=LISTEN_BACKLOG)
    except OSError as error:
        raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror or error}") from None


def _address(listener: socket.socket) -> str:
    """The URL at which a program on this machine reaches the server."""
    host, port = listener.getsockname()[:2]
    return f"http://{_shown({'0.0.0.0': '127.0.0.1', '::': '::1'}.get(host, host))}:{port}"  # noqa: S104


def _shown(host: str) -> str:
    return f"[{host}]" if ":" in host else host
