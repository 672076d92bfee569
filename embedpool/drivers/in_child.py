"""What runs in the child: the model's own driver, answering batches over pipes until the parent closes them."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import numpy as np

from embedpool.drivers.base import Cost, Driver, Embeddings, Ids
from embedpool.errors import EmbedpoolError


class Call(NamedTuple):
    """A batch, as Driver.embed is given it; None in its place is a probe."""

    texts: Sequence[str]
    ids: Sequence[Ids] | None
    options: Mapping[str, Any]


class Opened(NamedTuple):
    """The first message: what the parent has to know of the driver."""

    parallel: int
    max_batch_texts: int | None
    cost: Cost | None
    dim: int | None
    description: Mapping[str, object]


class InBlock(NamedTuple):
    """Vectors of this shape lie in the lane's block."""

    shape: tuple[int, ...]
    tokens: int | None
    truncated: Sequence[int]


def serve(
    make: Callable[[], Driver],
    prepare: Callable[[], None] | None,
    connections: Sequence[Connection],
    blocks: Sequence[Any],
) -> None:
    """The child's life. A pipe and a block of shared memory make a lane, for one batch at a time."""
    for number in (signal.SIGINT, signal.SIGTERM):  # meant for the whole group; the parent decides when this one ends
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if prepare:
        prepare()
    driver = make()
    try:
        driver.open()
    except BaseException as error:
        connections[0].send(_portable(error))
        os._exit(1)
    facts = driver.parallel, driver.max_batch_texts, driver.cost, driver.dim, driver.description
    connections[0].send(Opened(*facts))
    for lane in list(zip(connections, blocks, strict=True))[1:]:
        threading.Thread(target=_run_lane, args=(driver, *lane), daemon=True).start()
    _run_lane(driver, connections[0], blocks[0])  # in the thread that opened the model, which matters to torch
    os._exit(0)  # nothing is left worth waiting for


def _run_lane(driver: Driver, connection: Connection, block: Any) -> None:
    """Answer calls until the parent closes its end."""
    view = np.frombuffer(block, dtype=np.float32)
    with contextlib.suppress(EOFError, OSError):
        while True:
            call = connection.recv()
            try:
                answer = driver.probe() if call is None else _into_block(driver.embed(*call), view)
            except BaseException as error:
                connection.send(_portable(error))
            else:
                connection.send(answer)


def _into_block(answer: Embeddings, view: Any) -> Embeddings | InBlock:
    vectors = np.asarray(answer.vectors, dtype=np.float32)
    if vectors.size > view.size:
        return answer
    view[: vectors.size] = vectors.ravel()
    return InBlock(vectors.shape, answer.tokens, answer.truncated)


def _portable(error: BaseException) -> Exception:
    """The error if the parent knows its class without the model's libraries, else one that says the same."""
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
