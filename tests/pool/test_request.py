"""Jobs: how a request is cut, and how its parts are done."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedpool.errors import InferenceFailed
from embedpool.pool.job import Flow, Row, split
from tests.pool.scripted import PATIENCE_S, flow_of, in_thread, job_of, vector_of


@settings(max_examples=200, deadline=None, database=None)
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=60),
    st.integers(1, 9),
    st.integers(1, 80),
    st.booleans(),
)
def test_a_request_is_cut_into_runs_that_fit(tokens: list[int], max_texts: int, max_tokens: int, has_ids: bool) -> None:
    """Every text is in one job, in order and with its own ids; no job of two or more texts is over a bound."""
    texts = [f"t{i}" for i in range(len(tokens))]
    ids = [[i] * n for i, n in enumerate(tokens)] if has_ids else None
    flow = flow_of()
    jobs = list(split(flow, texts, ids, tokens, group="g", max_texts=max_texts, max_tokens=max_tokens))
    assert [t for job in jobs for t in job.texts] == texts
    assert [n for job in jobs for n in job.tokens] == tokens
    assert [i for job in jobs for i in job.ids or []] == (ids or [])
    assert [job.offset for job in jobs] == [texts.index(job.texts[0]) for job in jobs]
    for job, following in zip(jobs, [*jobs[1:], None], strict=True):
        assert job.flow is flow
        assert job.group == "g"
        assert 1 <= len(job) <= max_texts
        assert len(job) == 1 or sum(job.tokens) <= max_tokens
        if following:  # nothing is cut without need
            assert len(job) == max_texts or sum(job.tokens) + following.tokens[0] > max_tokens


def test_a_job_is_done_when_its_last_vector_is_there() -> None:
    """Vectors may come in any order; the request is answered when all are there, each in its place."""
    job = job_of("a", "b")
    job.fill(1, vector_of("b"))
    assert not job.is_done
    job.fill(0, vector_of("a"))
    assert job.is_done
    np.testing.assert_array_equal(job.vectors, [vector_of("a"), vector_of("b")])


def test_the_first_outcome_stands() -> None:
    """A request gets one answer: an error after the vectors, or vectors after an error, change nothing."""
    done, failed = job_of("a"), job_of("a")
    done.fill(0, vector_of("a"))
    done.fail(InferenceFailed("late"))
    done.wait(0)
    failed.fail(InferenceFailed("first"))
    failed.fail(InferenceFailed("second"))
    failed.fill(0, vector_of("a"))
    with pytest.raises(InferenceFailed, match="first"):
        failed.wait(0)


def test_two_threads_may_end_a_job_at_once() -> None:
    """A stop that gives a job up in the very moment its batch ends disturbs neither thread, nor the one that waits."""
    for _ in range(200):
        job, error, start = job_of("a"), InferenceFailed("given up"), threading.Barrier(3)

        def at_once(call: Callable[..., None], *arguments: Any, start: threading.Barrier = start) -> None:
            start.wait(PATIENCE_S)
            call(*arguments)

        ends = [in_thread(at_once, job.fail, error), in_thread(at_once, job.fill, 0, vector_of("a"))]
        waits = in_thread(at_once, job.wait, PATIENCE_S)
        assert [end.exception(PATIENCE_S) for end in ends] == [None, None]
        assert waits.exception(PATIENCE_S) is job.error
        assert job.is_done
        assert job.error is job.flow.error
        assert job.error in (None, error)


def test_a_row_is_one_text_of_its_job() -> None:
    """It knows its text, its tokens, and what its vector depends on."""
    job = job_of("abc", "de")
    row = Row(job, 1)
    assert (row.text, row.tokens, len(job)) == ("de", 2, 2)
    assert row.same_as == Row(job_of("de"), 0).same_as
    assert row.same_as != Row(job_of("de", group="{}"), 0).same_as


def test_several_workers_may_fill_a_job_at_once() -> None:
    """Rows of one request travel in different batches; the answer is complete when the last one arrives, once."""
    texts = [f"text {i}" for i in range(200)]
    job = job_of(*texts)
    fillers = [in_thread(lambda rows=rows: [job.fill(i, vector_of(texts[i])) for i in rows]) for rows in
               (range(0, 200, 4), range(1, 200, 4), range(2, 200, 4), range(3, 200, 4))]  # fmt: skip
    for filler in fillers:
        filler.result(PATIENCE_S)
    assert np.array_equal(job.vectors, [vector_of(text) for text in texts])


@settings(max_examples=100, deadline=None, database=None)
@given(st.lists(st.booleans(), min_size=1, max_size=8), st.randoms(use_true_random=False))
def test_a_job_that_goes_on_without_texts_is_done_when_each_is_filled_or_lost(fates: list[bool], random: Any) -> None:
    """In any order; a text that is said to be lost twice is lost once."""
    flow = Flow(1e9, 1.0, lambda: False, partial=True)
    (job,) = split(flow, ["t"] * len(fates), None, [1] * len(fates), group=None, max_texts=9, max_tokens=99)
    rows = list(enumerate(fates))
    random.shuffle(rows)
    for row, is_lost in rows:
        assert not job.is_done
        if is_lost:
            job.lose(row, InferenceFailed("no"))
            job.lose(row, InferenceFailed("no"))
        else:
            job.fill(row, np.ones(2, dtype=np.float32))
    assert job.is_done
    assert set(job.lost) == {row for row, is_lost in rows if is_lost}
    assert flow.error is None
