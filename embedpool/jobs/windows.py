"""The engine of all work that is too large for one request: windows of inputs, two of which are on their way at a time.

So the model does not wait while one is read or answered, and memory does not grow with the work.
"""

from __future__ import annotations

import collections
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import TypeVar

AT_ONCE = 2

Input = TypeVar("Input")
Window = TypeVar("Window")
Answer = TypeVar("Answer")


def in_windows(
    inputs: Iterable[Input], size_of: Callable[[Input], int], *, most: int, most_size: int
) -> Iterator[list[Input]]:
    """The inputs, some at a time: bounded in number and in size. One that is larger goes alone."""
    window: list[Input] = []
    size = 0
    for one in inputs:
        if window and (len(window) == most or size + size_of(one) > most_size):
            yield window
            window, size = [], 0
        window.append(one)
        size += size_of(one)
    if window:
        yield window


def answered(
    windows: Iterable[Window],
    compute: Callable[[Window], Answer],
    over: threading.Event,
    *,
    in_order: bool = True,
    name: str = "windows",
) -> Generator[Answer, None, None]:
    """What `compute`, called in threads of its own, makes of each window: in their order, or as they are done.

    The first window goes alone, so that what is wrong with all of them shows before anything is handed on. `over` is
    set when nobody reads on, or a window has failed; windows that are under way then are waited for.
    """
    under_way: collections.deque[Future[Answer]] = collections.deque()

    def next_answer() -> Answer:
        if in_order:
            return under_way.popleft().result()
        found = next(iter(wait(under_way, return_when=FIRST_COMPLETED).done))
        under_way.remove(found)
        return found.result()

    at_once = 1
    with ThreadPoolExecutor(AT_ONCE, name) as threads:
        try:
            for window in windows:
                under_way.append(threads.submit(compute, window))
                if len(under_way) >= at_once:
                    yield next_answer()
                    at_once = AT_ONCE
            while under_way:
                yield next_answer()
        finally:
            over.set()
