"""Memory that is free goes back to the system: glibc keeps what many threads have freed, for as long as it likes."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable


def give_back() -> None:
    """Return free memory to the system, where its C library can."""
    if trim := _trim():
        trim(0)  # without the GIL


@functools.cache
def _trim() -> Callable[[int], int] | None:
    return getattr(ctypes.CDLL(None), "malloc_trim", None)
