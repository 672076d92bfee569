"""Runs EmbedpoolApp, under gunicorn or with waitress's loop alone: signals, the pid file.

Both servers run the same loop (loop.py); under gunicorn it runs in the worker class of gunicorn_worker.py.
"""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable

from embedpool.config.keys import require_a_key
from embedpool.config.settings import Settings
from embedpool.logs import configure_logging
from embedpool.serve.address import address_of, bind
from embedpool.serve.gunicorn_settings import gunicorn_settings
from embedpool.serve.loop import Loop
from embedpool.serve.process import PidFile
from embedpool.serve.service_manager import tell_service_manager
from embedpool.server import EmbedpoolApp, wsgi

logger = logging.getLogger(__name__)


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
    require_a_key(settings, settings.server.host)
    listener = bind(settings)
    app = EmbedpoolApp(settings)
    loop = Loop(app, [listener])

    def stop(number: int, frame: object) -> None:
        loop.stop(delay=number == signal.SIGTERM)

    before = {s: signal.signal(s, stop) for s in (signal.SIGTERM, signal.SIGINT)}
    pid_file = PidFile(settings)
    try:
        app.start()
        pid_file.write(address_of([listener]))
        tell_service_manager("READY=1")  # gunicorn does so itself
        logger.info("serving on %s:%s (waitress)", *listener.getsockname()[:2])
        loop.run(_tell_of_hangups())
    finally:
        pid_file.remove()
        for number, handler in before.items():
            signal.signal(number, handler)


def _tell_of_hangups() -> Callable[[], bool]:
    """A heartbeat that says in the log that SIGHUP changes nothing here; by default it would end the process."""
    hangups: list[int] = []
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, lambda number, _: hangups.append(number))

    def heartbeat() -> bool:
        if hangups:
            hangups.clear()
            logger.warning("SIGHUP changes nothing under waitress: a restart takes over new settings")
        return True

    return heartbeat


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
