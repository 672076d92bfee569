"""Texts that share rows; that their vectors are the library's is in test_zoo.py."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from embedpool.drivers.packing import SHORT_STEP, pack, rows_of

LENGTHS = st.lists(st.integers(1, 300), min_size=1, max_size=40)
STEPS = st.sampled_from([4, 16])


@given(LENGTHS, STEPS)
def test_every_token_has_a_place_of_its_own(lengths: list[int], step: int) -> None:
    """In one row with those of its text, in their order, counted from 0; nothing else is in the rows but padding."""
    ids = [list(range(1000 * number, 1000 * number + length)) for number, length in enumerate(lengths, start=1)]
    packed = pack(ids, 7, step)
    places = packed["token_places"]
    assert places.shape == (len(ids), max(lengths))
    width = packed["input_ids"].shape[1]
    taken = []
    for number, text in enumerate(ids):
        own = places[number, : len(text)]
        assert (places[number, len(text) :] == -1).all()
        assert packed["input_ids"].ravel()[own].tolist() == text
        assert packed["position_ids"].ravel()[own].tolist() == list(range(len(text)))
        assert len({*packed["text_ids"].ravel()[own].tolist(), 0}) == 2
        assert own[0] // width == own[-1] // width
        taken += own.tolist()
    assert len(set(taken)) == len(taken)
    padding = np.setdiff1d(np.arange(packed["input_ids"].size), taken)
    assert (packed["input_ids"].ravel()[padding] == 7).all()
    assert (packed["text_ids"].ravel()[padding] == 0).all()
    tellable = {tuple(np.unique(packed["text_ids"].ravel()[places[n, : len(t)]])) for n, t in enumerate(ids)}
    assert len(tellable) == len(ids)


@given(LENGTHS, STEPS)
def test_rows_are_of_few_lengths(lengths: list[int], step: int) -> None:
    """A runtime compiles each shape anew: so their lengths are multiples of a step, and cover the longest row."""
    rows, width = rows_of(lengths, step)
    assert sorted(text for row in rows for text in row) == list(range(len(lengths)))
    longest = max(sum(lengths[text] for text in row) for row in rows)
    assert width % SHORT_STEP == 0
    assert longest <= width < longest + step


def test_little_is_padded() -> None:
    """Neither among texts of one length, nor among short ones beside a long one."""
    for lengths in ([12] * 16, [120, 125, 130, 118], [250, 9, 12, 8, 30, 60, 100, 16, 8, 8, 9, 40], [65] * 9, [255]):
        rows, width = rows_of(lengths)
        assert len(rows) * width <= 1.15 * sum(lengths)
