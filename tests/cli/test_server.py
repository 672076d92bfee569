"""`embedpool pool start`, before it starts anything."""

from __future__ import annotations

import sys

import pytest

from embedpool.cli.common import UsageError
from embedpool.cli.server import start


def test_windows_is_refused_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by a traceback of what is missing there."""
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(UsageError, match="in WSL, in a container"):
        start({})
