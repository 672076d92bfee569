"""One round of a worker: every job is done on every path."""

from __future__ import annotations

import contextlib
import json
import logging
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedpool.drivers.base import Cost, Embeddings
from embedpool.errors import (
    ClientGone,
    DeadlineExceeded,
    InferenceFailed,
    Overloaded,
    UnsupportedOption,
    UpstreamError,
)
from embedpool.pool.batcher import Batcher
from embedpool.pool.culprits import MOST_REMEMBERED, REMEMBERED_S, Culprits
from embedpool.pool.job import Job, Row
from embedpool.pool.lanes import Lanes
from embedpool.pool.model_queue import ModelQueue
from embedpool.pool.stats import ModelStats
from embedpool.pool.worker import DriverBroken, Worker
from tests.pool.scripted import Scripted, flow_of, job_of, vectors_of


class Bench:
    """A worker on its queue, stepped on the test's own thread; the clock stands at 100."""

    def __init__(self, driver: Scripted, max_texts: int = 64, batcher: Batcher | None = None) -> None:
        self.queue = ModelQueue(1000)
        self.stats = ModelStats()
        self.now = 100.0
        self.driver = driver
        self.lanes = Lanes(lambda: self.now)
        self.worker = Worker(
            "m#1",
            driver,
            self.queue,
            batcher or Batcher(max_texts, 100_000),
            self.stats,
            culprits=Culprits(lambda: self.now),
            lanes=self.lanes,
            clock=lambda: self.now,
        )

    def serve(self, *jobs: Job) -> None:
        for job in jobs:
            self.queue.admit(job)
        try:
            while self.worker.step():
                pass
        finally:
            assert all(job.is_done for job in jobs)


def assert_served(*jobs: Job) -> None:
    for job in jobs:
        job.wait(0)
        np.testing.assert_array_equal(job.vectors, vectors_of(job.texts))


def error_of(job: Job) -> Exception:
    assert job.is_done
    assert job.error is not None
    return job.error


def failing(*bad: str, error: Exception | None = None):
    """A model that cannot bear some texts."""

    def on_embed(texts: list[str]) -> None:
        if any(text in bad for text in texts):
            raise error or RuntimeError("cannot bear it")

    return on_embed


def nan_for(bad: str):
    def on_embed(texts: list[str]) -> np.ndarray:
        vectors = vectors_of(texts)
        vectors[[i for i, text in enumerate(texts) if text == bad], 3] = np.nan
        return vectors

    return on_embed


def short_for(bad: str):
    def on_embed(texts: list[str]) -> np.ndarray:
        vectors = vectors_of(texts)
        return vectors[:-1] if bad in texts else vectors

    return on_embed


def test_requests_share_a_batch_and_each_gets_its_own() -> None:
    """Requests that wait together travel together, and each gets its vectors in its order."""
    bench = Bench(Scripted())
    jobs = [job_of("ccc", "a"), job_of("bb"), job_of("dddd", "ee")]
    bench.serve(*jobs)
    assert_served(*jobs)
    assert len(bench.driver.calls) == 1
    assert [job.flow.replicas for job in jobs] == [{"m#1"}] * 3
    assert bench.stats.snapshot()["rows"] == 5
    assert bench.stats.snapshot()["padded_tokens"] == 20


def test_no_work_no_call() -> None:
    """A round without work says so and touches nothing; one with work says so before it runs."""
    bench = Bench(Scripted())
    assert bench.worker.step() is False
    bench.queue.admit(job_of("a"))
    seen: list[int] = []
    assert bench.worker.step(on_work=lambda: seen.append(len(bench.driver.calls)), leaving=lambda: False)
    assert seen == [0]
    bench.queue.admit(job_of("a"))
    assert bench.worker.step(leaving=lambda: True) is False
    assert bench.queue.qsize() == 1


@pytest.mark.parametrize("on_embed", [failing("bad"), nan_for("bad"), short_for("bad")], ids=["raise", "nan", "short"])
@pytest.mark.parametrize("max_texts", [1, 3, 64])
def test_one_bad_text_hurts_nobody_else(on_embed, max_texts: int, caplog) -> None:
    """Only the request with the bad text fails, and its error names the text by its place in the request."""
    caplog.set_level(logging.CRITICAL)
    bench = Bench(Scripted(on_embed), max_texts)
    good = [job_of("a", "bb"), job_of("ccc"), job_of("d", "ee", "ffff")]
    culprit = job_of("g", "bad", "hhh", offset=10)
    bench.serve(good[0], culprit, *good[1:])
    assert_served(*good)
    error = error_of(culprit)
    assert isinstance(error, InferenceFailed)
    assert set(error.fields) == {"texts[11]"}
    assert "texts[11]" in error.message


@settings(max_examples=60, deadline=None, database=None)
@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=5), min_size=1, max_size=8), st.integers(1, 16))
def test_any_number_of_bad_texts_hurts_only_their_requests(requests: list[list[bool]], max_texts: int) -> None:
    """Whichever texts are bad, in whatever batches: their requests fail, naming a bad text, and all others succeed."""
    jobs = [job_of(*(f"{'bad' if bad else 'good'}{i}" for i, bad in enumerate(request))) for request in requests]
    bads = {text for job in jobs for text in job.texts if text.startswith("bad")}
    Bench(Scripted(failing(*bads)), max_texts).serve(*jobs)
    for job, request in zip(jobs, requests, strict=True):
        if any(request):
            named = next(iter(error_of(job).fields))
            assert named in {f"texts[{i}]" for i, bad in enumerate(request) if bad}
        else:
            assert_served(job)


@pytest.mark.parametrize("remote_status", [400, 413, 422])
def test_a_remotes_complaint_about_content_is_bisected(remote_status: int) -> None:
    """A remote that refuses a batch for its content costs only the request that holds the content."""
    driver = Scripted(failing("bad", error=UpstreamError("refused", remote_status=remote_status)))
    good, culprit = job_of("a", "b"), job_of("c", "bad")
    Bench(driver).serve(good, culprit)
    assert_served(good)
    assert error_of(culprit).status == remote_status
    assert driver.probes == 0


@pytest.mark.parametrize("error", [
    UpstreamError("down"), UpstreamError("slow down", remote_status=429, retry_after_s=3),
    UpstreamError("no", remote_status=401), UnsupportedOption("no such option"), Overloaded("full"),
], ids=lambda e: f"{type(e).__name__}-{e.status}")  # fmt: skip
def test_a_fault_that_content_cannot_cause_is_not_bisected(error: Exception) -> None:
    """Transport, 5xx, 401, 429 and the driver's own errors reach every request of the batch after one call."""
    driver = Scripted(failing("a", error=error))
    jobs = [job_of("a"), job_of("b", "c")]
    Bench(driver).serve(*jobs)
    assert [error_of(job) for job in jobs] == [error, error]
    assert len(driver.calls) == 1


@pytest.mark.parametrize(
    "vectors", [np.ones(2), np.ones((1, 8)), np.ones((3, 8)), np.ones((2, 2, 2)), None, "nonsense"]
)
def test_an_answer_of_the_wrong_shape_is_never_given_out(vectors) -> None:
    """A driver that gives something other than a vector for each text costs its requests an error, not a wrong one."""
    jobs = [job_of("a"), job_of("b")]
    bench = Bench(Scripted(lambda texts: Embeddings(vectors if len(texts) == 2 else np.ones((7, 7)))))
    bench.serve(*jobs)
    assert all(isinstance(error_of(job), InferenceFailed) for job in jobs)


def test_vectors_of_another_size_are_never_given_out() -> None:
    """A driver that changes its mind about the dimension costs its requests an error."""
    driver = Scripted(lambda texts: np.ones((len(texts), 7 if "odd" in texts else 8)))
    driver.dim = 8
    good, odd = job_of("a"), job_of("odd")
    Bench(driver).serve(good, odd)
    assert good.vectors.shape == (1, 8)
    assert isinstance(error_of(odd), InferenceFailed)


@pytest.mark.parametrize(("flow", "error"), [
    (flow_of(deadline=100.0), DeadlineExceeded), (flow_of(deadline=99), DeadlineExceeded),
    (flow_of(client_gone=lambda: True), ClientGone),
])  # fmt: skip
def test_what_nobody_waits_for_is_dropped_before_it_costs_compute(flow, error: type[Exception]) -> None:
    """A text past its deadline, or without a client, never reaches the model; those beside it do."""
    bench = Bench(Scripted())
    dropped, wanted = job_of("a", flow=flow), job_of("b")
    bench.serve(dropped, wanted)
    assert isinstance(error_of(dropped), error)
    assert_served(wanted)
    assert bench.driver.calls == [["b"]]


def test_an_abandoned_request_costs_nothing_more() -> None:
    """What is left of a request that was given up is dropped."""
    bench = Bench(Scripted())
    job = job_of("a")
    job.flow.abandoned = True
    bench.serve(job)
    assert bench.driver.calls == []


def test_a_deadline_that_passes_between_batches_saves_the_later_one() -> None:
    """The deadline is looked at before each batch, not only when work is taken."""
    bench = Bench(Scripted(lambda texts: setattr(bench, "now", bench.now + 10)), batcher=Batcher(64, 8))
    first, second = job_of("a", flow=flow_of(deadline=105)), job_of("b" * 8, flow=flow_of(deadline=105))
    bench.serve(first, second)
    assert_served(first)
    assert isinstance(error_of(second), DeadlineExceeded)


def test_a_failed_request_costs_no_further_batch() -> None:
    """Once a text of a request has failed, its other batches are not computed."""
    bench = Bench(Scripted(failing("a")), batcher=Batcher(1, 100))
    bench.serve(job_of("a", "bb", "ccc"))
    assert bench.driver.calls == [["a"]]


@pytest.mark.parametrize("broken_from", [1, 2])
def test_a_broken_driver_is_told_and_everybody_gets_an_answer(broken_from: int, caplog) -> None:
    """When the model fails on a known good text too, it is to be opened anew, and no request is left waiting."""
    caplog.set_level(logging.CRITICAL)

    def probe() -> None:
        if driver.probes >= broken_from:
            raise RuntimeError("broken")

    driver = Scripted(failing("a", "b", "c"), on_probe=probe)
    bench = Bench(driver, batcher=Batcher(3, 100, cost=Cost(1, 1)))
    failed, waiting = [job_of("a", "b"), job_of("c")], job_of("d" * 50)
    for job in (*failed, waiting):
        bench.queue.admit(job)
    with pytest.raises(DriverBroken, match="broken"):
        bench.worker.step()
    assert all(isinstance(error_of(job), InferenceFailed) for job in failed)
    assert bench.queue.qsize() == 1, "what was not taken waits for the driver to be opened anew"


def test_a_batch_is_cut_to_end_between_the_others() -> None:
    """What another lane still has to run decides how much this one takes; while it runs the others know of it."""
    busy_s = []
    bench = Bench(
        Scripted(lambda texts: busy_s.append(bench.lanes.busy_s())),
        batcher=Batcher(64, 1000, max_s=8, cost=Cost(2, 1), lanes=2),
    )
    with ThreadPoolExecutor(1) as other_lane:
        other_lane.submit(bench.lanes.begin, 1.0).result()
        bench.serve(job_of(*"abcdef"))
    assert [len(texts) for texts in bench.driver.calls] == [3, 3]
    assert busy_s == [5.0, 5.0]
    assert bench.lanes.busy_s() == 1.0


def test_a_lane_is_free_after_a_batch_that_failed() -> None:
    """Whatever becomes of it."""

    def on_probe() -> None:
        raise RuntimeError("broken")

    driver = Scripted(failing("a"), on_probe=on_probe)
    bench = Bench(driver, batcher=Batcher(64, 1000, max_s=8, cost=Cost(2, 1)))
    with pytest.raises(DriverBroken):
        bench.serve(job_of("a"))
    assert bench.lanes.busy_s() == 0.0


def test_a_planner_that_fails_costs_nobody_an_answer(caplog) -> None:
    """A fault of our own is logged, texts travel alone, and the worker goes on."""

    class Faulty(Batcher):
        def choose(self, window, busy_s):
            raise ZeroDivisionError

    bench = Bench(Scripted(), batcher=Faulty(4, 8))
    jobs = [job_of("a", "b"), job_of("c")]
    bench.serve(*jobs)
    assert_served(*jobs)
    assert sorted(bench.driver.calls) == [["a"], ["b"], ["c"]]
    assert "ZeroDivisionError" in caplog.text


def test_a_client_check_that_fails_hurts_nobody_else(caplog) -> None:
    """A fault in asking whether one client is still there costs the others nothing."""
    caplog.set_level(logging.CRITICAL)

    def gone() -> bool:
        raise OSError("bad socket")

    bench = Bench(Scripted())
    odd, other = job_of("a", flow=flow_of(client_gone=gone)), job_of("b")
    bench.serve(odd, other)
    assert_served(other)


def test_groups_get_their_own_calls_and_options() -> None:
    """Requests with different options for a remote service never share a call."""
    bench = Bench(Scripted())
    jobs = [job_of("a", group=json.dumps({"task": 1})), job_of("b"), job_of("c", group=json.dumps({"task": 1}))]
    bench.serve(*jobs)
    assert_served(*jobs)
    assert sorted(zip(bench.driver.calls, bench.driver.options, strict=True), key=str) == [
        (["a", "c"], {"task": 1}),
        (["b"], {}),
    ]


def test_what_a_remote_counted_and_cut_reaches_the_request() -> None:
    """Tokens counted by a remote are shared out among its requests, and what it cut is told by each one's own index."""

    def on_embed(texts: list[str]) -> Embeddings:
        return Embeddings(vectors_of(texts), tokens=30, truncated=[texts.index("long")])

    bench = Bench(Scripted(on_embed))
    one, two = job_of("xx"), job_of("yyyy", "long")
    bench.serve(one, two)
    assert (one.counted, two.counted) == pytest.approx((6, 24))
    assert (one.truncated, two.truncated) == ([], [1])


def test_times_are_of_the_workers_clock() -> None:
    """A request is told when its first batch began and how long its batches took together."""
    bench = Bench(Scripted(lambda texts: setattr(bench, "now", bench.now + 2)), batcher=Batcher(1, 100))
    job = job_of("a", "bb")
    bench.serve(job)
    assert (job.flow.started_at, job.flow.compute_s) == (100, 4)
    assert bench.stats.snapshot()["compute_s"] == 4


def test_identical_texts_that_wait_together_are_computed_once() -> None:
    """Equal work once: the same text of two requests costs the model one row, and both get its vector."""
    bench = Bench(Scripted())
    jobs = [job_of("same", "a"), job_of("same"), job_of("b", "same")]
    bench.serve(*jobs)
    assert_served(*jobs)
    assert sorted(text for call in bench.driver.calls for text in call) == ["a", "b", "same"]


@pytest.mark.parametrize("bad", [(), ("same",)], ids=["served", "failed"])
def test_a_text_that_arrives_while_its_equal_runs_shares_what_comes_of_it(bad: tuple[str, ...]) -> None:
    """Equal work once, also when it has begun: the late one gets the vector, or the error by its own index."""
    fail, late = failing(*bad), job_of("b", "same")

    def on_embed(texts: list[str]) -> None:
        if texts == ["same"]:
            bench.queue.admit(late)
        fail(texts)

    bench = Bench(Scripted(on_embed))
    bench.serve(job_of("same"))
    assert [text for call in bench.driver.calls for text in call].count("same") == 1
    if bad:
        assert isinstance(error_of(late), InferenceFailed)
        assert "texts[1]" in str(error_of(late))
    else:
        assert_served(late)


class Mortal(Scripted):
    """A driver whose process some texts end; `revive` is what opening it anew does."""

    def __init__(self, *deadly: str) -> None:
        super().__init__(self._die_of)
        self.deadly = deadly
        self.deaths = 0

    def _die_of(self, texts: list[str]) -> None:
        if any(text in self.deadly for text in texts):
            self.deaths += 1
            self.lost = "its process was ended by SIGSEGV"
            raise ChildProcessError(self.lost)

    def revive(self) -> None:
        self.lost = None


def serve_reviving(bench: Bench, driver: Mortal, *jobs: Job) -> None:
    for job in jobs:
        bench.queue.admit(job)
    served = True
    while served:
        try:
            served = bench.worker.step()
        except DriverBroken:
            driver.revive()


@settings(max_examples=60, deadline=None, database=None)
@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=5), min_size=1, max_size=6), st.integers(1, 8))
def test_a_text_that_ends_the_process_hurts_only_its_request(requests: list[list[bool]], max_texts: int) -> None:
    """What was in a batch with it is run again apart from it, until it is alone; and then it has another chance."""
    driver = Mortal("deadly")
    bench = Bench(driver, max_texts)
    jobs = [
        job_of(*("deadly" if is_deadly else f"text {n}.{i}" for i, is_deadly in enumerate(request)))
        for n, request in enumerate(requests)
    ]
    serve_reviving(bench, driver, *jobs)
    for job, request in zip(jobs, requests, strict=True):
        if any(request):
            assert isinstance(error_of(job), InferenceFailed)
            assert "SIGSEGV" in str(error_of(job))
        else:
            assert_served(job)


def test_what_waited_to_be_alone_while_the_driver_was_lost_is_no_suspect_for_it() -> None:
    """It has not run, so it is run again as if nothing had been, and never refused."""

    class Lanes(Mortal):
        @contextlib.contextmanager
        def alone(self):
            if self.deaths < 5:  # one lane's batch ends the process while another's waits here
                self.deaths += 1
                self.lost = "its process was ended by SIGSEGV"
            yield

    driver = Lanes()
    bench = Bench(driver)
    row = Row(job_of("innocent"), 0)
    row.losses = 1
    bench.queue.put_back([row])
    serve_reviving(bench, driver)
    assert driver.deaths == 5
    assert_served(row.job)
    assert driver.calls == [["innocent"]]


def test_a_text_that_has_ended_the_process_does_not_end_the_next() -> None:
    """A client that sends it again gets the error at once, what is beside it is served; after a while it is tried."""
    driver = Mortal("deadly")
    bench = Bench(driver)
    serve_reviving(bench, driver, job_of("deadly"))
    deaths = driver.deaths
    again, beside = job_of("fine", "deadly"), job_of("good")
    serve_reviving(bench, driver, again, beside)
    assert "texts[1]" in str(error_of(again))
    assert "SIGSEGV" in str(error_of(again))
    assert_served(beside)
    assert driver.deaths == deaths
    driver.deadly = ()
    bench.now += REMEMBERED_S
    healed = job_of("deadly")
    serve_reviving(bench, driver, healed)
    assert_served(healed)


def test_what_is_remembered_of_texts_that_ended_a_process_is_bounded() -> None:
    """The latest are kept."""
    culprits = Culprits(lambda: 0.0)
    rows = [Row(job_of(f"text {i}"), 0) for i in range(MOST_REMEMBERED + 2)]
    culprits.add(rows[0], "first")
    for row in rows:
        culprits.add(row, "again")
    assert [culprits.reason(row) for row in rows[:3]] == [None, None, "again"]
    assert culprits.reason(rows[-1]) == "again"


def test_a_batch_whose_process_is_killed_from_outside_is_served_by_the_next() -> None:
    """No text is at fault, so none fails, also one that was alone in its batch."""
    for texts in (["a"], ["a", "b", "c"]):
        driver = Mortal("a")
        bench = Bench(driver)
        job = job_of(*texts)
        bench.queue.admit(job)
        with pytest.raises(DriverBroken):
            bench.worker.step()
        assert not job.is_done
        driver.revive()
        driver.deadly = ()
        bench.serve()
        assert_served(job)


def test_the_other_half_of_a_bisected_batch_is_no_suspect() -> None:
    """A batch fails on a text, and in its first half the process ends: the second half is run again as it was."""
    driver = Mortal()

    def on_embed(texts: list[str]) -> None:
        if len(texts) == 4:
            raise RuntimeError("cannot bear it")
        if driver.deaths == 0:
            driver.deaths += 1
            driver.lost = "its process was ended by SIGSEGV"
            raise ChildProcessError(driver.lost)

    driver._on_embed = on_embed
    bench = Bench(driver)
    job = job_of("a", "b", "c", "d")
    serve_reviving(bench, driver, job)
    assert_served(job)
    assert driver.calls == [["a", "b", "c", "d"], ["a", "b"], ["a"], ["b"], ["c", "d"]]


def test_a_process_that_ends_when_it_is_probed_costs_no_request() -> None:
    """A batch fails, and before the driver could be asked about it it is gone: the batch is run again."""
    driver = Mortal()

    def on_probe() -> None:
        driver.lost = "its process was ended by SIGKILL"
        raise ChildProcessError(driver.lost)

    driver._on_embed = lambda texts: (_ for _ in ()).throw(RuntimeError("x")) if len(driver.calls) == 1 else None
    driver._on_probe = on_probe
    bench = Bench(driver)
    job = job_of("a", "b")
    bench.queue.admit(job)
    with pytest.raises(DriverBroken, match="SIGKILL"):
        bench.worker.step()
    driver.revive()
    bench.serve()
    assert_served(job)


def test_only_a_batch_that_was_alone_is_at_fault() -> None:
    """A driver of several lanes is lost with all of them: what ran beside the culprit is not taken for it, and what is
    suspected runs as the only batch."""
    together: list[bool] = []

    class Lanes(Mortal):
        @contextlib.contextmanager
        def alone(self):
            together.append(True)
            yield

    driver = Lanes("deadly")
    bench = Bench(driver, 1)
    innocent = job_of("innocent")
    bench.queue.admit(innocent)
    driver.deadly = ("innocent",)  # its neighbour kills it
    with pytest.raises(DriverBroken):
        bench.worker.step()
    assert together == []
    driver.revive()
    driver.deadly = ()
    bench.serve()
    assert together == [True]
    assert_served(innocent)


def test_a_driver_lost_by_its_neighbour_between_two_looks_is_asked_once() -> None:
    """A batch fails by itself, its driver is fine when asked, and lost the next moment: each text has one fate."""

    class Fickle(Scripted):
        looks = 0

        @property
        def lost(self) -> str | None:
            self.looks += 1
            return None if self.looks == 1 else "its process was ended by SIGKILL"

    bench = Bench(Fickle(failing("a")))
    job = job_of("a")
    bench.queue.admit(job)
    with pytest.raises(DriverBroken):
        bench.worker.step()
    assert job.is_done != bool(bench.queue.qsize())
