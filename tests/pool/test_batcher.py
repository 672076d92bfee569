"""Waiting jobs → batches."""

from __future__ import annotations

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from embedpool.pool.batcher import Batcher
from tests.pool.scripted import job_of

JOBS = st.lists(
    st.tuples(st.lists(st.integers(0, 40), min_size=1, max_size=8), st.sampled_from([None, "g", "h"])), max_size=12
)


@settings(max_examples=200, deadline=None, database=None)
@given(JOBS, st.integers(1, 9), st.integers(1, 120))
def test_every_row_is_in_one_batch_within_the_bounds(jobs, max_texts: int, max_tokens: int) -> None:
    """No text is lost or computed twice, no batch mixes groups, and none of two or more texts is over a bound."""
    made = [job_of(*("x" * n for n in lengths), group=group) for lengths, group in jobs]
    batches = Batcher(max_texts, max_tokens).plan(made)
    planned = Counter((id(row.job), row.at) for batch in batches for row in batch)
    assert planned == Counter((id(job), i) for job in made for i in range(len(job)))
    for batch in batches:
        assert 1 <= len(batch) <= max_texts
        assert len({row.job.group for row in batch}) == 1
        assert len(batch) == 1 or len(batch) * max(row.tokens for row in batch) <= max_tokens


def test_a_long_text_does_not_make_short_ones_pay() -> None:
    """Short texts of any request share a batch; a text that would pad them all travels alone."""
    jobs = [job_of("a" * 3, "b" * 100), job_of("c" * 2), job_of("d" * 4, "e" * 90)]
    batches = Batcher(64, 200).plan(jobs)
    assert [[row.tokens for row in batch] for batch in batches] == [[2, 3, 4], [90, 100]]


def test_nothing_to_plan() -> None:
    """No jobs, no batches."""
    assert Batcher(4, 100).plan([]) == []
