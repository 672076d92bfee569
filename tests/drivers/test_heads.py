"""What makes rows of a body's output: in pieces that are bounded, and the same as all at once."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedpool.drivers import heads
from embedpool.drivers.heads import Counted, Splade, Vocabulary
from embedpool.tasks.item import Batch
from embedpool.tasks.rows import Rows

MOST_BYTES = 64e6  # of a batch of 32 texts of 512 tokens
NO_BATCH = Batch("sparse", ())


def dense(rows: Rows, width: int) -> Any:
    """Sparse rows as what they stand for."""
    assert rows.splits is not None
    assert rows.indices is not None
    found = np.zeros((len(rows), width), np.float32)
    found[np.repeat(np.arange(len(rows)), np.diff(rows.splits)), rows.indices] = rows.values
    return found


@pytest.mark.parametrize(
    ("entries", "sums"),
    [(30_000, False), (30_000, True), (250_000, False), pytest.param(250_000, True, marks=pytest.mark.long)],
)
def test_a_large_batch_costs_little_whatever_the_vocabulary(entries: int, sums: bool) -> None:
    """Beside the model's weights and its states: all at once would be 2 and 16 GB."""
    random = np.random.default_rng(0)
    texts, tokens, width = 32, 512, 8
    states = random.standard_normal((texts, tokens, width), dtype=np.float32)
    weight = random.standard_normal((entries, width), dtype=np.float32)
    bias = np.full(entries, -12.0, np.float32)  # so that some hundred of a text are above zero
    head = Splade(Vocabulary(weight, bias), sums=sums, log_twice=False)
    tracemalloc.start()
    try:
        rows = head.rows(states, [range(tokens)] * texts, NO_BATCH)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(rows.values) > texts
    assert peak < MOST_BYTES


@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=8),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.integers(1, 40),
    st.integers(1, 2000),
)
def test_pieces_give_what_all_at_once_gives(
    lengths: list[int], sums: bool, log_twice: bool, has_bias: bool, group: int, piece_bytes: int
) -> None:
    """However the texts are grouped and the vocabulary is cut, and whatever stands in the padding."""
    random = np.random.default_rng(len(lengths))
    states = random.standard_normal((len(lengths), 9, 5), dtype=np.float32)
    weight = random.standard_normal((37, 5), dtype=np.float32)
    bias = random.standard_normal(37, dtype=np.float32) if has_bias else None
    wanted = []
    for text, length in enumerate(lengths):
        values = states[text, :length] @ weight.T + (0 if bias is None else bias)
        values = np.log1p(np.maximum(values, 0))
        values = np.log1p(values) if log_twice else values
        wanted.append(values.sum(axis=0) if sums else values.max(axis=0, initial=0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(heads, "GROUP_TOKENS", group)
        patch.setattr(heads, "PIECE_BYTES", piece_bytes)
        patch.setattr(heads, "SMALLEST_SLICE", 1)
        head = Splade(Vocabulary(weight, bias), sums=sums, log_twice=log_twice)
        rows = head.rows(states, [range(length) for length in lengths], NO_BATCH)
    np.testing.assert_allclose(dense(rows, 37), np.stack(wanted), atol=1e-5)
    for start, stop in zip(rows.splits[:-1], rows.splits[1:], strict=True):  # type: ignore[index]
        assert (np.diff(rows.indices[start:stop]) > 0).all()  # type: ignore[index]


def test_tokens_that_do_not_count_have_no_vector() -> None:
    """Skipped ones, and all but some where these alone are wanted; a text may be left without any."""
    states = np.arange(12, dtype=np.float32).reshape(2, 3, 2)
    found = Counted(skipped={7}).rows(states, [[5, 7, 5], [7]], NO_BATCH)
    assert found.splits is not None
    assert (found.splits.tolist(), found.values.tolist()) == ([0, 2, 2], [[0.0, 1.0], [4.0, 5.0]])
    found = Counted(only={7}).rows(states, [[5, 7, 5], [7]], NO_BATCH)
    assert found.values.tolist() == [[2.0, 3.0], [6.0, 7.0]]
