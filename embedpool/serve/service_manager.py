"""Tells systemd, or another service manager that sets NOTIFY_SOCKET, how the server is (sd_notify)."""

from __future__ import annotations

import logging
import os

logger = logging.getLogger(__name__)


def has_service_manager() -> bool:
    """Whether a service manager listens."""
    return "NOTIFY_SOCKET" in os.environ


def tell_service_manager(state: str) -> None:
    """Send lines of VARIABLE=value; without a service manager do nothing."""
    if has_service_manager():
        from gunicorn.systemd import sd_notify

        sd_notify(state, logger)
