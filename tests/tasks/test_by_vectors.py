"""Pairs for models that give vectors: their items, what was cut, and the scores that vectors make."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from embedpool.config.spec import FakeConfig
from embedpool.drivers.fake import FakeTokenizer
from embedpool.errors import TextTooLong
from embedpool.tasks.by_vectors import ByVectors, Cosine, MaxSim
from embedpool.tasks.rows import Rows
from embedpool.tasks.score import ScoreOptions
from embedpool.tasks.task import Measured

LONG = "w " * 9
PAIRS = [("a", "b"), (LONG, "b"), ("a", LONG), ("c", "d")]
LIMIT = 8


def tokenizer_of(way: type[ByVectors]) -> FakeTokenizer:
    """Of a model that keeps few tokens of texts, and of queries."""
    found = FakeTokenizer(way.name)
    for one in (found, *found.routes.values()):
        one.default_max_tokens = LIMIT
    return found


def measured(way: type[ByVectors], **options: Any) -> Measured:
    return way(PAIRS, ScoreOptions(**options)).measure(FakeConfig(task=way.name), tokenizer_of(way))


@pytest.mark.parametrize("way", [MaxSim, Cosine])
def test_pairs_of_which_a_part_was_cut_are_named(way: type[ByVectors]) -> None:
    """Whichever part; and those that may not be cut are refused, alone if that is asked for."""
    found = measured(way)
    assert found.truncated == [1, 2]
    assert [(item.index, item.piece) for item in found.items] == [(i, piece) for i in range(4) for piece in (0, 1)]
    with pytest.raises(TextTooLong, match=r"documents\[1\] has \d+ tokens") as refused:
        measured(way, truncate="error")
    assert list(refused.value.inputs) == [1, 2]
    found = measured(way, truncate="error", on_error="partial")
    assert (list(found.refused), {item.index for item in found.items}) == ([1, 2], {0, 3})


@pytest.mark.parametrize("way", [MaxSim, Cosine])
def test_equal_parts_are_computed_once(way: type[ByVectors]) -> None:
    """They have equal keys, and the sides of a model that treats them alike do, too."""
    keys = [item.key for item in measured(way).items]
    assert keys[0] == keys[4]  # the query "a"
    assert keys[1] == keys[3]  # the document "b"
    assert len(set(keys)) == (6 if way is MaxSim else 5)  # the long text stands on both sides


def test_a_limit_is_that_of_the_documents() -> None:
    """For queries a multi-vector model has its own: one between the two is not cut."""
    query = MaxSim([("a b c", "b")], ScoreOptions(max_seq_length=4))
    assert query.measure(FakeConfig(task=MaxSim.name), tokenizer_of(MaxSim)).truncated == []
    found = measured(MaxSim, max_seq_length=4)
    assert [len(item.ids or ()) for item in found.items if item.index == 2] == [LIMIT, 4]  # a query is filled up
    assert [len(item.ids or ()) for item in found.items if item.index == 1] == [LIMIT, 3]


def test_the_cosine_is_of_as_many_dimensions_as_are_given_out() -> None:
    """Of vectors of any length, and 0 where there is none."""
    task, tokenizer = Cosine(PAIRS[:3]), tokenizer_of(Cosine)
    sides = [([3.0, 4.0, 9.0], [4.0, 3.0, 9.0]), ([1.0, 0.0, 0.0], [5.0, 0.0, 7.0]), ([0.0, 0.0, 0.0], [1.0, 0.0, 0.0])]
    rows = [task.merged(i, [Rows(np.float32([part])) for part in both]).values[0] for i, both in enumerate(sides)]
    tokenizer.default_dimensions = 2
    found = task.finish(Rows(np.array(rows)), FakeConfig(), tokenizer, {}).values
    np.testing.assert_allclose(found, [[0.96] * 2, [1, 1], [0, 0]], atol=1e-6)
