"""gunicorn's settings, from config.yml: for conf/gunicorn.conf.py and for `embedpool pool start`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from embedpool.config import checked
from embedpool.config.files import folder_in_memory
from embedpool.config.keys import require_a_key
from embedpool.config.settings import Settings, shown
from embedpool.errors import ConfigError
from embedpool.logs import configure_logging
from embedpool.serve.address import address_of, bind, host_of
from embedpool.serve.connections import LISTEN_BACKLOG
from embedpool.serve.gunicorn_master import Master
from embedpool.serve.process import PidFile
from embedpool.web import metrics

WORKER_STOP_MARGIN_S = 20  # beyond the grace period, so that replicas can close before gunicorn kills the worker


def gunicorn_settings() -> dict[str, Any]:
    """The settings of config.yml as gunicorn's.

    gunicorn's master reads them again on SIGHUP, where an error would end it: so it keeps the settings it had if
    config.yml or keys.yml is broken by then, or if it could not listen at a new address.
    """
    settings = checked.read(_check)
    configure_logging(settings)
    server = settings.server
    return {
        "bind": f"{shown(server.host)}:{server.port}",
        "worker_class": "embedpool.serve.gunicorn_worker.WaitressWorker",
        "workers": server.workers,
        "threads": settings.threads,
        "backlog": LISTEN_BACKLOG,
        "preload_app": False,  # threads do not survive fork: the app is built in the worker
        "timeout": 60,  # for the I/O loop's heartbeat; deadlines of requests are ours
        "graceful_timeout": server.longest_stop_s + WORKER_STOP_MARGIN_S,
        "loglevel": settings.logging.level,
        "logger_class": "embedpool.serve.gunicorn_worker.GunicornLogger",
        "control_socket_disable": True,
        "worker_tmp_dir": folder_in_memory(),  # a heartbeat is a file: not on a disk that may be full
        **_hooks(settings),
    }


def _check(settings: Settings) -> None:
    """Raises ConfigError."""
    server, before = settings.server, checked.settings()
    require_a_key(settings, server.host)
    if before and (before.server.host, before.server.port) != (server.host, server.port):
        bind(settings).close()


def _hooks(settings: Settings) -> dict[str, Callable[..., None]]:
    """What gunicorn calls in its master, and `post_fork` in a worker."""
    pid_file = PidFile(settings)

    def begin(arbiter: Any) -> None:
        Master.adopt(arbiter)
        share_metrics(arbiter)

    def share_metrics(arbiter: Any) -> None:
        if arbiter.cfg.workers > 1:
            metrics.share()

    def listens(arbiter: Any) -> None:
        try:
            for listener in arbiter.LISTENERS:  # gunicorn may have been told another address than config.yml says
                require_a_key(settings, host_of(listener.sock))
        except ConfigError as error:
            raise RuntimeError(error.message) from None  # ends gunicorn with this sentence
        write_address(arbiter)

    def write_address(arbiter: Any) -> None:
        pid_file.write(address_of([listener.sock for listener in arbiter.LISTENERS]))

    def reloaded(arbiter: Any) -> None:
        arbiter.wait_for_nobody()
        share_metrics(arbiter)
        write_address(arbiter)

    def before_fork(arbiter: Any, worker: Any) -> None:
        worker.waits_for_models = arbiter.has_ready_worker

    def end(arbiter: Any) -> None:
        metrics.unshare()
        pid_file.remove()

    return {
        "on_starting": begin,
        "when_ready": listens,
        "on_reload": reloaded,
        "pre_fork": before_fork,
        "post_fork": lambda arbiter, worker: pid_file.leave_to_parent(),
        "child_exit": lambda arbiter, worker: metrics.forget_worker(worker.pid),
        "on_exit": end,
    }
