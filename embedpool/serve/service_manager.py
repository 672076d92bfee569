"""What systemd, or another service manager, is told of the server."""

from __future__ import annotations

import logging
import os

logger = logging.getLogger(__name__)


def has_service_manager() -> bool:
    """Whether systemd, or whoever else, has set NOTIFY_SOCKET."""
    return "NOTIFY_SOCKET" in os.environ


def tell_service_manager(state: str) -> None:
    """sd_notify, a line a variable; nothing without a service manager."""
    if has_service_manager():
        from gunicorn.systemd import sd_notify

        sd_notify(state, logger)
