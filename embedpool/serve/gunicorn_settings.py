"""gunicorn's settings, from config.yml: for conf/gunicorn.conf.py and for `embedpool pool start`."""

from __future__ import annotations

import logging
from typing import Any

from embedpool.config.files import folder_in_memory
from embedpool.config.settings import Settings, find_config_yml, load_settings
from embedpool.errors import ConfigError
from embedpool.logs import configure_logging
from embedpool.serve.address import address_of, require_a_key, shown
from embedpool.serve.connections import LISTEN_BACKLOG
from embedpool.serve.process import PidFile
from embedpool.web import metrics

logger = logging.getLogger(__name__)

WORKER_STOP_MARGIN_S = 20  # beyond the grace period, so that replicas can close before gunicorn kills the worker

_last_good: Settings | None = None


def gunicorn_settings() -> dict[str, Any]:
    """The settings of config.yml as gunicorn's.

    gunicorn's master reads them again on SIGHUP, where an error would end it: so it keeps the settings it had if
    config.yml or keys.yml is broken by then.
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
        "bind": f"{shown(server.host)}:{server.port}",
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
        "when_ready": lambda arbiter: pid_file.write(address_of(arbiter.LISTENERS[0].sock)),
        "on_starting": begin,
        "child_exit": lambda arbiter, worker: metrics.forget_worker(worker.pid),
        "on_exit": end,
    }
