"""What is shown while a model is fetched, exported and loaded: a bar on a terminal, a line for each step elsewhere."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tqdm import tqdm

LOOK_EVERY_S = 0.25
LINE_EVERY_S = 10.0
MB = 1_000_000
OF_BYTES = "{desc} {percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} {rate_fmt}"
OF_A_STEP = "{desc} {elapsed}"


class Display:
    """Shows the progress of one model. Called on one thread at a time."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._step = ""
        self._bar: tqdm[Any] | None = None
        self._said_at = 0.0
        self._is_terminal = sys.stderr.isatty()

    def show(self, step: str, done_bytes: int | None, total_bytes: int | None) -> None:
        """The step it is in, and how many bytes of it are done."""
        if step != self._step:
            self.close()
            self._step = step
            says = f"{self._model}: {step}"
            if self._is_terminal:
                from tqdm import tqdm

                form = OF_BYTES if total_bytes else OF_A_STEP
                self._bar = tqdm(desc=says, unit="B", unit_scale=True, bar_format=form, leave=False, file=sys.stderr)
            else:
                print(says, file=sys.stderr, flush=True)
                self._said_at = time.monotonic()
        if self._bar is None:
            if total_bytes and time.monotonic() - self._said_at >= LINE_EVERY_S:
                print(
                    f"{self._model}: {step}, {(done_bytes or 0) / MB:.0f} of {total_bytes / MB:.0f} MB", file=sys.stderr
                )
                self._said_at = time.monotonic()
        else:
            self._bar.total, self._bar.n = total_bytes, done_bytes or 0
            self._bar.refresh()

    def close(self) -> None:
        """Nothing is left on a terminal."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


@contextlib.contextmanager
def watched(model: str, look: Callable[[], Mapping[str, Any] | None]) -> Iterator[None]:
    """While it lasts, what `look` finds now and then is shown; it may fail, and finds nothing then."""
    display, done = Display(model), threading.Event()

    def watch() -> None:
        while not done.wait(LOOK_EVERY_S):
            with contextlib.suppress(Exception):
                if found := look():
                    display.show(found["step"], found["done_bytes"], found["total_bytes"])

    thread = threading.Thread(target=watch, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        display.close()
