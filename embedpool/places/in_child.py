"""The child's side of a process place: it runs the model's driver and answers batches over pipes until they close."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from embedpool.errors import EmbedpoolError
from embedpool.tasks.driver import Driver, Loss, Lost
from embedpool.tasks.rows import Answer, Rows

ALIGNED_TO_BYTES = 64


class InBlock(NamedTuple):
    """An answer whose rows lie in the slot's block of shared memory: where each array begins, its type and shape."""

    arrays: dict[str, tuple[int, str, tuple[int, ...]]]
    tokens: int | None
    truncated: Sequence[int]


def into_block(answer: Answer, block: NDArray[np.uint8]) -> Answer | InBlock:
    """Put the rows of an answer into a block of shared memory, if it has room for them."""
    arrays = {name: np.ascontiguousarray(array) for name, array in answer.rows.arrays().items()}
    places: dict[str, tuple[int, str, tuple[int, ...]]] = {}
    at = 0
    for name, array in arrays.items():
        places[name] = at, array.dtype.str, array.shape
        at += -(-array.nbytes // ALIGNED_TO_BYTES) * ALIGNED_TO_BYTES
    if at > block.size:
        return answer
    for name, array in arrays.items():
        block[places[name][0] :][: array.nbytes] = array.reshape(-1).view(np.uint8)
    return InBlock(places, answer.tokens, answer.truncated)


def from_block(answer: InBlock, block: NDArray[np.uint8]) -> Answer:
    """The answer with a copy of the rows that lie in the block."""
    arrays: dict[str, NDArray[Any]] = {
        name: np.frombuffer(block, dtype, int(np.prod(shape)), at).reshape(shape).copy()
        for name, (at, dtype, shape) in answer.arrays.items()
    }
    return Answer(Rows.of_arrays(arrays), answer.tokens, answer.truncated)


def serve(
    make: Callable[[], Driver],
    prepare: Callable[[], None] | None,
    connections: Sequence[Connection],
    blocks: Sequence[Any],
    last_words: Connection,
) -> None:
    """The child's life. A pipe and a block of shared memory make a slot, for one batch at a time."""

    def lose(loss: Loss) -> None:
        last_words.send(loss)
        os._exit(1)  # the parent sees that this process is gone

    for number in (signal.SIGINT, signal.SIGTERM):  # meant for the whole group; the parent decides when this one ends
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if prepare:
        prepare()
    driver = make()
    driver.report = connections[0].send
    try:
        facts = driver.open(lambda reason: lose(Loss(reason, innocent=True)))
    except BaseException as error:
        connections[0].send(portable(error))
        os._exit(1)
    connections[0].send(facts)
    for connection, block in list(zip(connections, blocks, strict=True))[1:]:
        threading.Thread(target=_run_slot, args=(driver, connection, block, lose), daemon=True).start()
    _run_slot(driver, connections[0], blocks[0], lose)  # in the thread that opened the model, which matters to torch
    os._exit(0)  # nothing is left worth waiting for


def _run_slot(driver: Driver, connection: Connection, block: Any, lose: Callable[[Loss], None]) -> None:
    """Answer batches, and probes, which are None, until the parent closes its end."""
    view = np.frombuffer(block, dtype=np.uint8)
    with contextlib.suppress(EOFError, OSError):
        while True:
            batch = connection.recv()
            try:
                answer = driver.probe() if batch is None else into_block(driver.run(batch), view)
            except Lost as error:
                lose(error.loss)
            except BaseException as error:
                connection.send(portable(error))
            else:
                connection.send(answer)


def portable(error: BaseException) -> Exception:
    """The error if the parent can unpickle it without the model's libraries, else a RuntimeError that says the same."""
    if isinstance(error, EmbedpoolError) or (isinstance(error, Exception) and type(error).__module__ == "builtins"):
        with contextlib.suppress(Exception):
            again = pickle.loads(pickle.dumps(error))  # noqa: S301  (our own bytes)
            assert isinstance(again, Exception)
            return again
    return RuntimeError(f"{type(error).__name__}: {error}")


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
