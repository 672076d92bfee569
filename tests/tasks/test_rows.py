"""Rows of each kind: dense, ragged, sparse. What holds for one holds for all."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedpool.places.in_child import InBlock, from_block, into_block
from embedpool.tasks.rows import Answer, Rows

KINDS = ("dense", "ragged", "sparse")
WIDTH = 3


def made(kind: str, lengths: list[int], *, seed: int = 0) -> Rows:
    """Rows of so many vectors each, or entries; dense ones have one."""
    rng = np.random.default_rng(seed)
    if kind == "dense":
        return Rows(rng.standard_normal((len(lengths), WIDTH), dtype=np.float32))
    splits = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    if kind == "ragged":
        return Rows(rng.standard_normal((int(splits[-1]), WIDTH), dtype=np.float32), splits)
    values = rng.standard_normal(int(splits[-1]), dtype=np.float32)
    return Rows(values, splits, rng.integers(0, 99, len(values), dtype=np.int32))


def row_of(rows: Rows, i: int) -> tuple[Any, ...]:
    """The numbers of one row, however they are kept."""
    if rows.splits is None:
        return (rows.values[i].tolist(),)
    span = slice(rows.splits[i], rows.splits[i + 1])
    return rows.values[span].tolist(), None if rows.indices is None else rows.indices[span].tolist()


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=100, deadline=None, database=None)
@given(st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=6), min_size=1, max_size=4), st.data())
def test_rows_of_several_batches_are_gathered_in_order(kind: str, batches: list[list[int]], data: Any) -> None:
    """Whichever batch each came in; where one is missing there are zeros, or nothing."""
    sources = [made(kind, lengths, seed=i) for i, lengths in enumerate(batches)]
    every = [(rows, i) for rows in sources for i in range(len(rows))]
    picks = data.draw(st.lists(st.sampled_from([None, *range(len(every))]), min_size=1, max_size=9))
    gathered = Rows.gather([None if pick is None else every[pick][0].row(every[pick][1]) for pick in picks])
    assert len(gathered) == len(picks)
    if all(pick is None for pick in picks):
        assert gathered.width == 0
        return
    assert gathered.fault(len(picks), WIDTH) is None
    for i, pick in enumerate(picks):
        if pick is not None:
            assert row_of(gathered, i) == row_of(*every[pick])
        else:
            assert not np.any(row_of(gathered, i)[0])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize(("kind", "lengths"), [("dense", [1] * 4), ("ragged", [2, 0, 3, 1]), ("sparse", [2, 0, 3, 1])])
def test_a_value_that_is_not_finite_is_its_rows_alone(kind: str, lengths: list[int], bad: float) -> None:
    """A row without values is finite."""
    rows = made(kind, lengths)
    assert rows.finite().tolist() == [True] * 4
    rows.values[2 if kind == "dense" else 4] = bad
    assert rows.finite().tolist() == [True, True, False, True]


@pytest.mark.parametrize("kind", KINDS)
def test_rows_go_through_a_file_and_through_shared_memory(kind: str) -> None:
    """By the same arrays; what has no room in the block goes as it is."""
    rows = made(kind, [2, 0, 3, 1])
    file = io.BytesIO()
    np.savez(file, **rows.arrays())
    file.seek(0)
    block = np.zeros(1000, dtype=np.uint8)
    laid = into_block(Answer(rows, 5, [1]), block)
    assert isinstance(laid, InBlock)
    read = from_block(laid, block)
    block[:] = 255  # the next batch
    assert (read.tokens, read.truncated) == (5, [1])
    for again in (Rows(**np.load(file)), read.rows):
        assert {n: a.dtype for n, a in again.arrays().items()} == {n: a.dtype for n, a in rows.arrays().items()}
        assert [row_of(again, i) for i in range(4)] == [row_of(rows, i) for i in range(4)]
    answer = Answer(rows)
    assert into_block(answer, np.zeros(10, dtype=np.uint8)) is answer


SPLITS = np.array([0, 1, 3], dtype=np.int64)


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        (Rows(np.ones(2)), "shape"),
        (Rows(np.ones((2, 2, 2))), "shape"),
        (Rows(np.ones((3, WIDTH))), "3 rows for 2 items"),
        (Rows(np.ones((2, 7))), "vectors of 7 numbers, not 3"),
        (Rows(np.ones((3, 7)), SPLITS), "vectors of 7 numbers, not 3"),
        (Rows(np.ones((4, WIDTH)), SPLITS), "do not cover"),
        (Rows(np.ones((3, WIDTH)), np.array([0, 5, 3])), "do not cover"),
        (Rows(np.ones((3, WIDTH)), np.array([1, 2, 3])), "do not cover"),
        (Rows(np.ones((3, WIDTH)), SPLITS, np.ones(3, np.int32)), "shape"),
        (Rows(np.ones(3), None, np.ones(3, np.int32)), "shape"),
        (Rows(np.ones(3), SPLITS, np.ones(2, np.int32)), "2 indices for 3 values"),
        (Rows(np.ones((2, WIDTH))), None),
        (Rows(np.ones((3, WIDTH)), SPLITS), None),
        (Rows(np.ones(3), SPLITS, np.ones(3, np.int32)), None),
    ],
)
def test_what_is_no_row_for_each_item_is_told(rows: Rows, says: str | None) -> None:
    """Too few, too many, of another width, or arrays that do not fit together."""
    fault = rows.fault(2, WIDTH)
    assert fault is None if says is None else says in (fault or "")
