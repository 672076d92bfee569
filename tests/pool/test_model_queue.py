"""The queue of one model: bounded in texts, fair, never losing a job."""

from __future__ import annotations

import itertools
import queue
import threading
from collections import defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedpool.pool.job import Flow, Job, Row
from embedpool.pool.model_queue import JOINABLE_S, ModelQueue, QueueClosed
from tests.pool.scripted import A_WHILE_S, PATIENCE_S, flow_of, in_thread, job_of


def still(clock: float = 0.0):
    """A clock that stands, so that nothing waits for more than its turn."""
    return lambda: clock


def sized(texts: int, flow: Flow, tokens: int = 1) -> Job:
    """A job of so many texts, no two alike."""
    return Job(flow, [f"text {next(NUMBERS)}" for _ in range(texts)], None, [tokens] * texts)


NUMBERS = itertools.count()


def first(count: int):
    """A batcher that takes the first few."""
    return lambda window: range(min(count, len(window)))


def jobs_of(rows: list[Row]) -> list[Job]:
    return [row.job for row in rows]


STEP = st.one_of(
    st.tuples(st.sampled_from(["admit", "feed"]), st.integers(0, 3), st.integers(1, 6), st.integers(1, 50)),
    st.tuples(st.just("take"), st.integers(1, 12)),
    st.just(("take_all",)),
)


@settings(max_examples=300, deadline=None, database=None)
@given(
    st.integers(6, 20),
    st.lists(STEP, max_size=60),
    st.lists(st.sampled_from([0.5, 1, 4]), min_size=4, max_size=4),
    st.randoms(use_true_random=False),
)
def test_any_sequence_keeps_the_bound_and_every_text(bound: int, steps: list, weights: list[float], rng) -> None:
    """The queue never holds more texts than it may, says no only when it must, and gives each text out once; the one
    whose turn it is always goes, and turns keep the order of a request. Bulk work leaves half of the queue free."""
    waiting_queue = ModelQueue(bound, still())
    flows = [flow_of(weight=w) for w in weights]
    waiting: list[tuple[Job, int]] = []
    heads: dict[Flow, list[tuple[Job, int]]] = defaultdict(list)

    def choose(window: list[Row]) -> list[int]:
        own = [(row.job, row.at) for row in window if row.job.flow is window[0].job.flow]
        assert own == [text for text in waiting if text[0].flow is window[0].job.flow][: len(own)]
        return sorted({0, *rng.sample(range(len(window)), rng.randint(0, len(window) - 1))})

    def took(rows: list[Row]) -> None:
        for row in rows:
            waiting.remove((row.job, row.at))
            heads[row.job.flow].append((row.job, row.at))

    for step in steps:
        if step[0] in ("admit", "feed"):
            flow = flows[step[1]]
            job = sized(step[2], flow, step[3])
            has_waiting = any(j.flow is flow for j, _ in waiting)
            room = bound // 2 if step[0] == "feed" and has_waiting else bound
            try:
                waiting_queue.admit(job) if step[0] == "admit" else waiting_queue.feed(job, 0)
            except queue.Full:
                assert waiting
                assert len(waiting) + len(job) > room
            else:
                assert not waiting or len(waiting) + len(job) <= room
                waiting += [(job, at) for at in range(len(job))]
        elif step[0] == "take":
            expected = bool(waiting)
            rows = waiting_queue.take(choose, 0)
            assert bool(rows) == expected
            took(rows)
        else:
            took(waiting_queue.take_all())
            assert not waiting
        assert waiting_queue.qsize() == len(waiting) <= max(bound, 6)
        assert [f.waiting for f in flows] == [sum(j.flow is f for j, _ in waiting) for f in flows]
    took(waiting_queue.take_all())
    assert not waiting


@settings(max_examples=200, deadline=None, database=None)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 64), st.integers(1, 50)), min_size=1, max_size=20),
    st.integers(0, 40),
    st.integers(1, 16),
    st.lists(st.sampled_from([0.25, 1, 3]), min_size=4, max_size=4),
)
def test_a_query_waits_for_one_text_of_each_other_request_at_most(
    jobs, served: int, batch: int, weights: list[float]
) -> None:
    """However long the requests before it, and however far they are, a query's turn comes after one turn of each."""
    waiting_queue = ModelQueue(100_000, still())
    flows = [flow_of(weight=w) for w in weights]
    for flow, texts, tokens in jobs:
        waiting_queue.admit(sized(texts, flows[flow], tokens))
    for _ in range(served):
        waiting_queue.take(first(batch), 0)
    query = sized(1, flow_of())
    waiting_queue.admit(query)
    before: list[Flow] = []
    while (job := waiting_queue.take(first(1), 0)[0].job) is not query:
        before.append(job.flow)
    assert len(before) == len(set(before))


def test_equal_texts_leave_together() -> None:
    """Whoever waits for the same text gets it with the first of them, wherever in the queue it is."""
    waiting_queue = ModelQueue(100, still())
    same = [job_of("same") for _ in range(3)]
    other_option = Job(flow_of(), ["same"], None, [4], variant=("left",))
    waiting_queue.admit(same[0])
    waiting_queue.admit(sized(5, flow_of()))
    waiting_queue.admit(other_option)
    for job in same[1:]:
        waiting_queue.admit(job)
    (row,) = waiting_queue.take(first(1), 0)
    assert [row.job, *jobs_of(row.twins)] == same
    assert (waiting_queue.qsize(), [j.flow.waiting for j in same]) == (6, [0, 0, 0])
    assert other_option in jobs_of(waiting_queue.take_all())


def test_an_equal_text_joins_one_that_runs() -> None:
    """A text that is computed already does not wait to be computed again, for as long as that takes and no longer."""
    waiting_queue = ModelQueue(4, still())
    waiting_queue.admit(job_of("same", "other"))
    rows = waiting_queue.take(first(2), 0)
    late = job_of("same", "new")
    with waiting_queue.joinable(rows):
        waiting_queue.admit(late)
    (twin,) = next(row for row in rows if row.text == "same").twins
    assert (twin.job, twin.at) == (late, 0)
    assert [row.text for row in waiting_queue.take(first(4), 0)] == ["new"]
    waiting_queue.admit(job_of("same"))
    assert [row.text for row in waiting_queue.take(first(4), 0)] == ["same"]


def test_a_batch_that_hangs_gathers_nobody() -> None:
    """A text equal to one that runs for long is left to another replica, so that one hung batch harms no other."""
    now = 0.0
    waiting_queue = ModelQueue(4, lambda: now)
    waiting_queue.admit(job_of("same"))
    rows = waiting_queue.take(first(1), 0)
    with waiting_queue.joinable(rows):
        now = JOINABLE_S
        waiting_queue.admit(job_of("same"))
    assert rows[0].twins == []
    assert waiting_queue.qsize() == 1


def test_a_weight_buys_a_share() -> None:
    """Two busy callers share a model by their weights."""
    waiting_queue = ModelQueue(1000, still())
    light, heavy = flow_of(weight=1), flow_of(weight=3)
    for _ in range(40):
        waiting_queue.admit(sized(1, light, 10))
        waiting_queue.admit(sized(1, heavy, 10))
    served = [waiting_queue.take(first(1), 0)[0].job.flow for _ in range(40)]
    assert served.count(heavy) == 30


def test_a_job_of_any_size_is_taken() -> None:
    """Its texts leave in order."""
    waiting_queue = ModelQueue(10, still())
    job = sized(8, flow_of())
    waiting_queue.admit(job)
    assert jobs_of(waiting_queue.take(first(8), 0)) == [job] * 8


def test_feed_waits_for_room_and_gives_up_at_its_deadline() -> None:
    """The rest of a large request goes in as room appears, and not after its deadline."""
    waiting_queue = ModelQueue(4)
    flow = flow_of()
    waiting_queue.admit(sized(4, flow))
    with pytest.raises(queue.Full):
        waiting_queue.feed(sized(1, flow), 0.01)
    fed = in_thread(waiting_queue.feed, sized(2, flow), PATIENCE_S)
    assert len(waiting_queue.take(first(4), 0)) == 4
    fed.result(PATIENCE_S)
    assert waiting_queue.qsize() == 2


def test_bulk_work_gets_its_turn_in_a_queue_full_of_queries() -> None:
    """A request with nothing waiting may use any room that appears, so queries never starve it."""
    waiting_queue = ModelQueue(4, still())
    for _ in range(3):
        waiting_queue.admit(sized(1, flow_of()))
    bulk = flow_of()
    waiting_queue.feed(sized(1, bulk), 0)
    waiting_queue.take(first(1), 0)
    with pytest.raises(queue.Full):
        waiting_queue.feed(sized(1, bulk), 0)


def test_a_closed_queue_refuses_new_requests_and_goes_on_with_the_old() -> None:
    """A model that is replaced answers whom it has admitted, to the last text."""
    waiting_queue = ModelQueue(10, still())
    flow = flow_of()
    waiting_queue.admit(sized(1, flow))
    waiting_queue.close()
    with pytest.raises(QueueClosed):
        waiting_queue.admit(sized(1, flow_of()))
    waiting_queue.feed(sized(1, flow), 0)
    assert len(waiting_queue.take(first(10), 0)) == 2


def test_stop_ends_every_feed() -> None:
    """Nobody waits for room in a queue that is stopped, and nothing gets in any more."""
    waiting_queue = ModelQueue(2)
    flow = flow_of()
    waiting_queue.admit(sized(2, flow))
    fed = in_thread(waiting_queue.feed, sized(1, flow), PATIENCE_S)
    waiting_queue.stop()
    with pytest.raises(QueueClosed):
        fed.result(PATIENCE_S)
    waiting_queue.take_all()
    for put in (waiting_queue.admit, lambda job: waiting_queue.feed(job, 0)):
        with pytest.raises(QueueClosed):
            put(sized(1, flow))


@pytest.mark.parametrize("before", [True, False])
def test_a_waiting_take_gets_what_comes(before: bool) -> None:
    """Work reaches a worker that waits for it without limit."""
    waiting_queue = ModelQueue(2)
    job = sized(1, flow_of())
    if before:
        waiting_queue.admit(job)
    taken = in_thread(waiting_queue.take, first(4), None)
    if not before:
        waiting_queue.admit(job)
    assert jobs_of(taken.result(PATIENCE_S)) == [job]


def test_wake_lets_a_leaving_worker_go() -> None:
    """A worker that is to leave does so although no work comes, whether it waits already or is about to."""
    waiting_queue = ModelQueue(2)
    leaving = False
    taken = in_thread(waiting_queue.take, first(4), None, leaving=lambda: leaving)
    leaving = True
    waiting_queue.wake()
    assert taken.result(PATIENCE_S) == []
    assert waiting_queue.take(first(4), None, leaving=lambda: True) == []


def test_a_leaving_worker_takes_no_work() -> None:
    """Work that arrives while a worker is told to leave, because its driver broke, is left to the others."""
    waiting_queue = ModelQueue(2)
    asked = threading.Event()

    def leaving() -> bool:  # false when the worker begins to wait, true when it wakes
        before = asked.is_set()
        asked.set()
        return before

    taken = in_thread(waiting_queue.take, first(4), None, leaving=leaving)
    assert asked.wait(PATIENCE_S)
    job = sized(1, flow_of())
    waiting_queue.admit(job)
    assert taken.result(PATIENCE_S) == []
    assert jobs_of(waiting_queue.take(first(4), 0)) == [job]


def test_what_a_leaving_worker_leaves_reaches_another() -> None:
    """The wake-up of a job is never lost with the worker that is leaving: one who stays gets it."""
    waiting_queue = ModelQueue(2)
    leave = False
    leaver = in_thread(waiting_queue.take, first(4), PATIENCE_S, leaving=lambda: leave)
    stayer = in_thread(waiting_queue.take, first(4), PATIENCE_S)
    leave = True
    job = sized(1, flow_of())
    waiting_queue.admit(job)
    waiting_queue.wake()
    assert sorted([len(leaver.result(PATIENCE_S)), len(stayer.result(PATIENCE_S))]) == [0, 1]


def test_max_wait_gathers_what_follows_within_it() -> None:
    """With max_wait_ms a worker waits for company, but no longer than that, nor once its batch is full."""
    now = 0.0
    waiting_queue = ModelQueue(10, lambda: now)
    one, other = sized(1, flow_of()), sized(1, flow_of())
    waiting_queue.admit(one)
    taken = in_thread(waiting_queue.take, first(2), 0, enough_texts=2, max_wait_s=PATIENCE_S)
    waiting_queue.admit(other)  # full: goes at once, though the clock stands
    assert jobs_of(taken.result(PATIENCE_S)) == [one, other]
    waiting_queue.admit(one)
    taken = in_thread(waiting_queue.take, first(2), 0, enough_texts=2, max_wait_s=A_WHILE_S)
    now = PATIENCE_S
    waiting_queue.wake()
    assert jobs_of(taken.result(PATIENCE_S)) == [one]


def test_a_resize_lets_waiting_work_in() -> None:
    """A larger bound applies at once; a smaller one keeps what waits."""
    waiting_queue = ModelQueue(2)
    flow = flow_of()
    waiting_queue.admit(sized(2, flow))
    fed = in_thread(waiting_queue.feed, sized(2, flow), PATIENCE_S)
    waiting_queue.resize(8)
    fed.result(PATIENCE_S)
    waiting_queue.resize(1)
    with pytest.raises(queue.Full):
        waiting_queue.admit(sized(1, flow_of()))
    assert len(waiting_queue.take(first(10), 0)) == 4


def test_an_admitted_request_outlives_a_smaller_queue() -> None:
    """A request that was cut for a larger queue is still fed when the queue was made smaller than its jobs."""
    waiting_queue = ModelQueue(8, still())
    flow = flow_of()
    waiting_queue.admit(sized(4, flow))
    waiting_queue.resize(2)
    waiting_queue.take(first(8), 0)
    waiting_queue.feed(sized(4, flow), 0)


def test_what_is_put_back_goes_first_and_as_it_was() -> None:
    """A batch that comes back is taken again by itself, before what waits, however full the queue is by then; the next
    that came back is taken after a batch of what waits."""
    waiting_queue = ModelQueue(2)
    waiting_queue.admit(sized(2, flow_of()))
    lost = waiting_queue.take(first(2), 0)
    other = sized(2, flow_of())
    waiting_queue.admit(other)
    waiting_queue.put_back(lost[:1])
    waiting_queue.put_back(lost[1:])
    assert waiting_queue.qsize() == 4
    with pytest.raises(queue.Full):
        waiting_queue.admit(sized(1, flow_of()))
    assert waiting_queue.take(first(9), 0) == lost[:1]
    assert jobs_of(waiting_queue.take(first(9), 0)) == [other, other]
    assert waiting_queue.take(first(9), 0) == lost[1:]
    waiting_queue.put_back(lost[:1])
    assert waiting_queue.take(first(9), 0) == lost[:1]  # nothing else waits
    assert waiting_queue.take(first(9), 0) == []


def test_what_is_put_back_wakes_a_waiting_worker() -> None:
    """Another replica takes over at once, and a model that cannot serve gives all of it up."""
    waiting_queue = ModelQueue(2)
    waiting_queue.admit(sized(2, flow_of()))
    lost = waiting_queue.take(first(2), 0)
    taken = in_thread(waiting_queue.take, first(2), PATIENCE_S)
    waiting_queue.put_back(lost)
    assert taken.result(PATIENCE_S) == lost
    waiting_queue.put_back(lost)
    assert waiting_queue.take_all() == lost
    assert not waiting_queue.qsize()


def test_room_and_work_behind_what_was_put_back_are_noticed() -> None:
    """Taking such a batch makes room for a request that is fed, and the next worker is told of what is left."""
    waiting_queue = ModelQueue(4)
    flow = flow_of()
    waiting_queue.admit(sized(2, flow))
    lost = waiting_queue.take(first(2), 0)
    waiting_queue.put_back(lost[:1])
    waiting_queue.put_back(lost[1:])
    waiting_queue.admit(sized(1, flow))
    fed = in_thread(waiting_queue.feed, sized(2, flow), PATIENCE_S)
    workers = [in_thread(waiting_queue.take, first(9), PATIENCE_S) for _ in range(3)]
    taken = [row for worker in workers for row in worker.result(PATIENCE_S)]
    fed.result(PATIENCE_S)
    taken += waiting_queue.take(first(9), 0)
    assert len(taken) == 5
    assert not waiting_queue.qsize()
