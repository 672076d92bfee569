"""Bounds what the bodies of all requests hold at once: a body and its texts, from being parsed until it is answered."""

from __future__ import annotations

import threading

from typing_extensions import override

from embedpool.bounds import Budget

INTAKE = "embedpool.intake"
FREE_BYTES = 1 << 16  # a body of up to so many bytes is not counted
LARGE_BYTES = 4 << 20  # of larger ones one is parsed at a time


class Intake(Budget):
    """Counts bytes of bodies. Thread-safe."""

    def __init__(self, most_bytes: int) -> None:
        super().__init__(most_bytes, "the bodies of other requests fill the memory for them")
        self.one_at_a_time = threading.Lock()  # while a large body is parsed

    @override
    def take(self, size: int) -> int:
        """Count a body; gives how much of it counts. Raises Overloaded, unless nothing else is held."""
        return super().take(size) if size > FREE_BYTES else 0
