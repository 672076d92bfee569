"""A request: it is done once, with a row or an error for each of its items."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedpool.errors import InferenceFailed
from embedpool.pool.request import Call, Request
from embedpool.tasks.embed import Embed, EmbedOptions
from embedpool.tasks.item import Item
from embedpool.tasks.rows import Rows
from embedpool.tasks.task import Measured
from tests.pool.scripted import PATIENCE_S, Asked, in_thread, vectors_of


def fill(request: Asked, *indices: int) -> None:
    """As a batch of these would."""
    rows = Rows(vectors_of([request.texts[i] for i in indices]))
    for row, index in enumerate(indices):
        request.fill(item(index), rows.row(row))


def item(index: int, piece: int = 0) -> Item:
    """Of the input at this index."""
    return Item(("",), 1, index=index, piece=piece)


def test_a_request_is_done_when_its_last_row_is_there() -> None:
    """Rows may come in any order; the request is answered when all are there, each in its place."""
    request = Asked("a", "b", "c")
    fill(request, 1)
    assert not request.is_done
    fill(request, 2, 0)
    assert request.is_done
    request.wait(0)
    np.testing.assert_array_equal(request.gather().values, vectors_of(["a", "b", "c"]))


def test_a_request_without_an_item_is_done() -> None:
    """Each of its inputs was refused before the queue."""
    request = Asked("a", options=EmbedOptions(on_error="partial"))
    assert not request.is_done
    request.expect(Measured([], [], {0: InferenceFailed("no")}))
    request.wait(0)


def test_the_first_outcome_stands() -> None:
    """A request gets one answer: an error after the rows, or rows after an error, change nothing."""
    done, failed = Asked("a"), Asked("a")
    fill(done, 0)
    done.fail(InferenceFailed("late"))
    done.wait(0)
    failed.fail(InferenceFailed("first"))
    failed.fail(InferenceFailed("second"))
    fill(failed, 0)
    with pytest.raises(InferenceFailed, match="first"):
        failed.wait(0)


def test_a_wait_ends_with_its_time() -> None:
    """Nobody waits longer than the deadline."""
    with pytest.raises(TimeoutError):
        Asked("a").wait(0.001)


def test_two_threads_may_end_a_request_at_once() -> None:
    """A stop that gives a request up in the moment its batch ends disturbs neither thread, nor the one that waits."""
    for _ in range(200):
        request, error, start = Asked("a"), InferenceFailed("given up"), threading.Barrier(3)

        def at_once(call: Callable[..., None], *arguments: Any, start: threading.Barrier = start) -> None:
            start.wait(PATIENCE_S)
            call(*arguments)

        ends = [in_thread(at_once, request.fail, error), in_thread(at_once, fill, request, 0)]
        waits = in_thread(at_once, request.wait, PATIENCE_S)
        assert [end.exception(PATIENCE_S) for end in ends] == [None, None]
        assert waits.exception(PATIENCE_S) is request.error
        assert request.is_done
        assert request.error in (None, error)


def test_several_replicas_may_fill_a_request_at_once() -> None:
    """Items of one request travel in different batches; the answer is complete when the last one arrives, once."""
    texts = [f"text {i}" for i in range(200)]
    request = Asked(*texts)
    for filler in [in_thread(fill, request, *range(start, 200, 4)) for start in range(4)]:
        filler.result(PATIENCE_S)
    request.wait(0)
    np.testing.assert_array_equal(request.gather().values, vectors_of(texts))


@settings(max_examples=100, deadline=None, database=None)
@given(st.lists(st.booleans(), min_size=1, max_size=8), st.randoms(use_true_random=False))
def test_a_request_that_goes_on_without_items_is_done_when_each_is_filled_or_lost(
    fates: list[bool], random: Any
) -> None:
    """In any order; an item that is said to be lost twice is lost once."""
    request = Asked(*(f"text {i}" for i in range(len(fates))), options=EmbedOptions(on_error="partial"))
    items = list(enumerate(fates))
    random.shuffle(items)
    for index, is_lost in items:
        assert not request.is_done
        if is_lost:
            request.fail_input(index, InferenceFailed("no"))
            request.fail_input(index, InferenceFailed("no"))
        else:
            fill(request, index)
    request.wait(0)
    assert set(request.errors) == {index for index, is_lost in items if is_lost}


def test_counts_of_a_remote_service_add_up() -> None:
    """Whichever threads say them."""
    request = Asked(*"abcdefgh")
    for told in [in_thread(request.note, i, 0.5, is_truncated=i % 3 == 0) for i in range(8)]:
        told.result(PATIENCE_S)
    assert (request.counted, sorted(request.truncated)) == (4, [0, 3, 6])


def test_nothing_keeps_a_request_that_is_done() -> None:
    """No cycle that only the garbage collector would end: vectors of requests long answered would stay in memory."""
    task = Embed(["a", "b"])
    request = Request(task, Call(0.0, 1.0))
    request.expect(Measured([Item((text,), 1, index=i) for i, text in enumerate(task.texts)], [], {}))
    gc.disable()
    try:
        rows = Rows(vectors_of(["a", "b"]))
        kept = [weakref.ref(rows.values), weakref.ref(task)]
        for index in range(2):
            request.fill(item(index), rows.row(index))
        request.gather()
        del task, request, rows
        assert [ref() is None for ref in kept] == [True, True]
    finally:
        gc.enable()


def test_a_request_keeps_nothing_of_the_batches_of_others() -> None:
    """A row is a copy: one that is kept does not keep the batch in which it came."""
    batch = np.zeros((64, 8), dtype=np.float32)
    rows, kept = Rows(batch), weakref.ref(batch)
    request = Asked("a", "b")
    request.fill(item(0), rows.row(5))
    del batch, rows
    assert kept() is None
