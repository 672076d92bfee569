"""The settings that a master process has checked. Its workers are forked from it and are born with them."""

from __future__ import annotations

import logging
from collections.abc import Callable

from embedpool.config.config_yml import find_config_yml, load_settings
from embedpool.config.settings import Settings
from embedpool.errors import ConfigError

logger = logging.getLogger(__name__)

_checked: Settings | None = None  # of this process, or of the one it was forked from


def settings() -> Settings | None:
    """Those that hold; None if none have been read yet."""
    return _checked


def read(check: Callable[[Settings], None]) -> Settings:
    """In the master: read config.yml; where it is broken now, or `check` raises ConfigError, the settings stay.

    Raises ConfigError if there have been none yet.
    """
    global _checked  # noqa: PLW0603  (gunicorn executes its config file anew; only a module survives that)
    try:
        found = load_settings(find_config_yml(None))
        check(found)
        _checked = found
    except ConfigError as error:
        if _checked is None:
            raise
        logger.error("the settings stay as they were: %s", error.message)
    return _checked


def at_birth(check: Callable[[Settings], None]) -> Settings:
    """In a worker: the master's settings. The file is only looked at, and what differs in it is logged.

    Without such a master, as `read`.
    """
    if _checked is None:
        return read(check)
    try:
        if load_settings(find_config_yml(None)) != _checked:
            logger.warning("config.yml has changed; SIGHUP to the server's parent process takes it over")
    except ConfigError as error:
        logger.warning("config.yml is broken, and the settings stay as they were: %s", error.message)
    return _checked
