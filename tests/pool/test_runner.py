"""One step of a replica's thread: every request is answered on every path."""

from __future__ import annotations

import contextlib
import json
import logging
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedpool.errors import (
    ClientGone,
    DeadlineExceeded,
    EmbedpoolError,
    InferenceFailed,
    Overloaded,
    UnsupportedOption,
    UnsupportedTask,
    UpstreamError,
)
from embedpool.pool.model_queue import ModelQueue
from embedpool.pool.planner import Planner, Slots
from embedpool.pool.quarantine import MOST_REMEMBERED, QUARANTINE_S, Quarantine
from embedpool.pool.runner import LOSSES_SPARED, SEARCH_RESERVE, DriverBroken, Runner
from embedpool.pool.stats import ModelStats
from embedpool.tasks.driver import Cost, Facts, Loss
from embedpool.tasks.item import Group
from embedpool.tasks.rows import Answer, Rows
from tests.pool.scripted import Asked, Scripted, vectors_of


class Bench:
    """A runner and its queue, stepped on the test's own thread; the clock stands at 100."""

    def __init__(self, place: Scripted, max_items: int = 64, planner: Planner | None = None) -> None:
        self.queue = ModelQueue(1000)
        self.stats = ModelStats()
        self.now = 100.0
        self.place = place
        self.slots = Slots(lambda: self.now)
        self.planner = planner or Planner(max_items, 100_000)
        quarantine = Quarantine(lambda: self.now)
        self.runner = Runner("m#1", place, self.queue, quarantine, self.stats, lambda: self.now)

    def step(self, on_work: Callable[[], None] = lambda: None) -> bool:
        """Serve one batch; whether there was one."""
        items = self.queue.take(partial(self.planner.plan_under_lock, slots=self.slots), 0)
        try:
            if items:
                self.runner.run(items, on_work)
        finally:
            self.slots.end()
        return bool(items)

    def serve(self, *requests: Asked) -> None:
        for request in requests:
            request.admitted_to(self.queue)
        try:
            while self.step():
                pass
        finally:
            assert all(request.is_done for request in requests)


def assert_served(*requests: Asked) -> None:
    for request in requests:
        request.wait(0)
        np.testing.assert_array_equal(request.gather().values, vectors_of(request.texts))


def error_of(request: Asked) -> EmbedpoolError:
    assert request.is_done
    assert request.error is not None
    return request.error


def failing(*bad: str, error: Exception | None = None):
    """A model that cannot bear some texts."""

    def on_run(texts: list[str]) -> None:
        if any(text in bad for text in texts):
            raise error or RuntimeError("cannot bear it")

    return on_run


def nan_for(bad: str):
    def on_run(texts: list[str]) -> np.ndarray:
        vectors = vectors_of(texts)
        vectors[[i for i, text in enumerate(texts) if text == bad], 3] = np.nan
        return vectors

    return on_run


def short_for(bad: str):
    def on_run(texts: list[str]) -> np.ndarray:
        vectors = vectors_of(texts)
        return vectors[:-1] if bad in texts else vectors

    return on_run


def test_requests_share_a_batch_and_each_gets_its_own() -> None:
    """Requests that wait together travel together, and each gets its vectors in its order."""
    bench = Bench(Scripted())
    requests = [Asked("ccc", "a"), Asked("bb"), Asked("dddd", "ee")]
    bench.serve(*requests)
    assert_served(*requests)
    assert len(bench.place.calls) == 1
    assert [request.replicas for request in requests] == [{"m#1"}] * 3
    assert bench.stats.snapshot()["rows"] == 5
    assert bench.stats.snapshot()["padded_tokens"] == 20


def test_where_nothing_pads_no_padding_is_counted() -> None:
    """Neither for a remote service nor for texts that share rows."""
    bench = Bench(Scripted(facts=Facts(pads=False)))
    bench.serve(Asked("ccc", "a"), Asked("bb"))
    assert bench.stats.snapshot()["padded_tokens"] == 6


def test_no_work_no_call() -> None:
    """A step without work says so and touches nothing; one with work says so before it runs."""
    bench = Bench(Scripted())
    assert not bench.step()
    Asked("a").admitted_to(bench.queue)
    seen: list[int] = []
    assert bench.step(on_work=lambda: seen.append(len(bench.place.calls)))
    assert seen == [0]


def test_a_fault_of_our_own_before_a_batch_runs_costs_nobody_an_answer(caplog) -> None:
    """Whoever waits is told."""
    caplog.set_level(logging.CRITICAL)

    def fail() -> None:
        raise OSError("out of threads")

    bench = Bench(Scripted())
    request = Asked("a").admitted_to(bench.queue)
    bench.step(on_work=fail)
    assert isinstance(error_of(request), InferenceFailed)


@pytest.mark.parametrize("on_run", [failing("bad"), nan_for("bad"), short_for("bad")], ids=["raise", "nan", "short"])
@pytest.mark.parametrize("max_texts", [1, 3, 64])
def test_one_bad_text_hurts_nobody_else(on_run, max_texts: int, caplog) -> None:
    """Only the request with the bad text fails, and its error names the text by its place in the request."""
    caplog.set_level(logging.CRITICAL)
    bench = Bench(Scripted(on_run), max_texts)
    good = [Asked("a", "bb"), Asked("ccc"), Asked("d", "ee", "ffff")]
    culprit = Asked("g", "bad", "hhh")
    bench.serve(good[0], culprit, *good[1:])
    assert_served(*good)
    error = error_of(culprit)
    assert isinstance(error, InferenceFailed)
    assert set(error.fields) == {"texts[1]"}
    assert "texts[1]" in error.message


@settings(max_examples=60, deadline=None, database=None)
@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=5), min_size=1, max_size=8), st.integers(1, 16))
def test_any_number_of_bad_texts_hurts_only_their_requests(fates: list[list[bool]], max_texts: int) -> None:
    """Whichever texts are bad, in whatever batches: their requests fail, naming a bad text, and all others succeed."""
    requests = [Asked(*(f"{'bad' if bad else 'good'}{i}" for i, bad in enumerate(fate))) for fate in fates]
    bads = {text for request in requests for text in request.texts if text.startswith("bad")}
    Bench(Scripted(failing(*bads)), max_texts).serve(*requests)
    for request, fate in zip(requests, fates, strict=True):
        if any(fate):
            named = next(iter(error_of(request).fields))
            assert named in {f"texts[{i}]" for i, bad in enumerate(fate) if bad}
        else:
            assert_served(request)


@pytest.mark.parametrize("remote_status", [400, 413, 422])
def test_a_remotes_complaint_about_content_is_bisected(remote_status: int) -> None:
    """A remote that refuses a batch for its content costs only the request that holds the content."""
    driver = Scripted(failing("bad", error=UpstreamError("refused", remote_status=remote_status)))
    good, culprit = Asked("a", "b"), Asked("c", "bad")
    Bench(driver).serve(good, culprit)
    assert_served(good)
    assert error_of(culprit).status == remote_status
    assert driver.probes == 0


@pytest.mark.parametrize("error", [
    UpstreamError("lost"), UpstreamError("no", remote_status=401), UnsupportedOption("no such option"),
    Overloaded("full"),
], ids=lambda e: f"{type(e).__name__}-{e.status}")  # fmt: skip
def test_a_fault_that_content_cannot_cause_is_not_bisected(error: Exception) -> None:
    """401 and the driver's own errors reach every request of the batch after one call."""
    driver = Scripted(failing("a", error=error))
    requests = [Asked("a"), Asked("b", "c")]
    Bench(driver).serve(*requests)
    assert [error_of(request) for request in requests] == [error, error]
    assert len(driver.calls) == 1


@pytest.mark.parametrize(
    "vectors", [np.ones(2), np.ones((1, 8)), np.ones((3, 8)), np.ones((2, 2, 2)), None, "nonsense"]
)
def test_an_answer_of_the_wrong_shape_is_never_given_out(vectors) -> None:
    """A driver that gives something other than a vector for each text costs its requests an error, not a wrong one."""
    requests = [Asked("a"), Asked("b")]
    bench = Bench(Scripted(lambda texts: Answer(Rows(vectors if len(texts) == 2 else np.ones((7, 7))))))
    bench.serve(*requests)
    assert all(isinstance(error_of(request), InferenceFailed) for request in requests)


def test_vectors_of_another_size_are_never_given_out() -> None:
    """A driver that changes its mind about the dimension costs its requests an error."""
    driver = Scripted(lambda texts: np.ones((len(texts), 7 if "odd" in texts else 8)), facts=Facts({"embed": 8}))
    good, odd = Asked("a"), Asked("odd")
    Bench(driver).serve(good, odd)
    assert good.gather().values.shape == (1, 8)
    assert isinstance(error_of(odd), InferenceFailed)


@pytest.mark.parametrize(("call", "error"), [
    ({"timeout_s": 100.0}, DeadlineExceeded), ({"timeout_s": 99.0}, DeadlineExceeded),
    ({"client_gone": lambda: True}, ClientGone),
])  # fmt: skip
def test_what_nobody_waits_for_is_dropped_before_it_costs_compute(call: dict, error: type[Exception]) -> None:
    """A text past its deadline, or without a client, never reaches the model; those beside it do."""
    bench = Bench(Scripted())
    dropped, wanted = Asked("a", **call), Asked("b")
    bench.serve(dropped, wanted)
    assert isinstance(error_of(dropped), error)
    assert_served(wanted)
    assert bench.place.calls == [["b"]]


def test_an_abandoned_request_costs_nothing_more() -> None:
    """What is left of a request that was given up is dropped."""
    bench = Bench(Scripted())
    request = Asked("a")
    request.abandoned = True
    bench.serve(request)
    assert bench.place.calls == []


def test_a_deadline_that_passes_between_batches_saves_the_later_one() -> None:
    """The deadline is looked at before each batch, not only when work is taken."""
    bench = Bench(Scripted(lambda texts: setattr(bench, "now", bench.now + 10)), planner=Planner(64, 8))
    first, second = Asked("a", timeout_s=105), Asked("b" * 8, timeout_s=105)
    bench.serve(first, second)
    assert_served(first)
    assert isinstance(error_of(second), DeadlineExceeded)


def test_a_failed_request_costs_no_further_batch() -> None:
    """Once a text of a request has failed, its other batches are not computed."""
    bench = Bench(Scripted(failing("a")), planner=Planner(1, 100))
    bench.serve(Asked("a", "bb", "ccc"))
    assert bench.place.calls == [["a"]]


@pytest.mark.parametrize("broken_from", [1, 2])
def test_a_broken_driver_is_told_and_everybody_gets_an_answer(broken_from: int, caplog) -> None:
    """When the model fails on a known good text too, it is to be opened anew, and no request is left waiting."""
    caplog.set_level(logging.CRITICAL)

    def probe() -> None:
        if driver.probes >= broken_from:
            raise RuntimeError("broken")

    driver = Scripted(failing("a", "b", "c"), on_probe=probe)
    bench = Bench(driver, planner=Planner(3, 100, max_s=10, cost=Cost(1, 1)))
    failed, waiting = [Asked("a", "b"), Asked("c")], Asked("d" * 50)
    for request in (*failed, waiting):
        request.admitted_to(bench.queue)
    with pytest.raises(DriverBroken, match="broken"):
        bench.step()
    assert all(isinstance(error_of(request), InferenceFailed) for request in failed)
    assert bench.queue.qsize() == 1, "what was not taken waits for the driver to be opened anew"


def test_a_batch_is_cut_to_end_between_the_others() -> None:
    """What another slot still has to run decides how much this one takes; while it runs the others know of it."""
    busy_s = []
    bench = Bench(
        Scripted(lambda texts: busy_s.append(bench.slots.busy_s())),
        planner=Planner(64, 1000, max_s=8, cost=Cost(2, 1)),
    )
    bench.slots.count = 2
    with ThreadPoolExecutor(1) as other_slot:
        other_slot.submit(bench.slots.begin, 1.0).result()
        bench.serve(Asked(*"abcdef"))
    assert [len(texts) for texts in bench.place.calls] == [3, 3]
    assert busy_s == [5.0, 5.0]
    assert bench.slots.busy_s() == 1.0


def test_a_slot_is_free_after_a_batch_that_failed() -> None:
    """Whatever becomes of it."""

    def on_probe() -> None:
        raise RuntimeError("broken")

    driver = Scripted(failing("a"), on_probe=on_probe)
    bench = Bench(driver, planner=Planner(64, 1000, max_s=8, cost=Cost(2, 1)))
    with pytest.raises(DriverBroken):
        bench.serve(Asked("a"))
    assert bench.slots.busy_s() == 0.0


def test_a_planner_that_fails_costs_nobody_an_answer(caplog) -> None:
    """A fault of our own is logged, texts travel alone, and the worker goes on."""

    class Faulty(Planner):
        def choose(self, window, busy_s, slots, share):
            raise ZeroDivisionError

    bench = Bench(Scripted(), planner=Faulty(4, 8))
    requests = [Asked("a", "b"), Asked("c")]
    bench.serve(*requests)
    assert_served(*requests)
    assert sorted(bench.place.calls) == [["a"], ["b"], ["c"]]
    assert "ZeroDivisionError" in caplog.text


def test_a_client_check_that_fails_hurts_nobody_else(caplog) -> None:
    """A fault in asking whether one client is still there costs the others nothing."""
    caplog.set_level(logging.CRITICAL)

    def gone() -> bool:
        raise OSError("bad socket")

    bench = Bench(Scripted())
    odd, other = Asked("a", client_gone=gone), Asked("b")
    bench.serve(odd, other)
    assert_served(other)


def test_groups_get_their_own_calls_and_options() -> None:
    """Requests with different options for a remote service never share a call."""
    bench = Bench(Scripted())
    requests = [
        Asked("a", group=Group("embed", json.dumps({"task": 1}))),
        Asked("b"),
        Asked("c", group=Group("embed", json.dumps({"task": 1}))),
    ]
    bench.serve(*requests)
    assert_served(*requests)
    assert sorted(zip(bench.place.calls, bench.place.options, strict=True), key=str) == [
        (["a", "c"], {"task": 1}),
        (["b"], {}),
    ]


def test_what_a_remote_counted_and_cut_reaches_the_request() -> None:
    """Tokens counted by a remote are shared out among its requests, and what it cut is told by each one's own index."""

    def on_run(texts: list[str]) -> Answer:
        return Answer(Rows(vectors_of(texts)), tokens=30, truncated=[texts.index("long")])

    bench = Bench(Scripted(on_run))
    one, two = Asked("xx"), Asked("yyyy", "long")
    bench.serve(one, two)
    assert (one.counted, two.counted) == pytest.approx((6, 24))
    assert (one.truncated, two.truncated) == ([], [1])


def test_times_are_of_the_workers_clock() -> None:
    """A request is told when its first batch began and how long its batches took together."""
    bench = Bench(Scripted(lambda texts: setattr(bench, "now", bench.now + 2)), planner=Planner(1, 100))
    request = Asked("a", "bb")
    bench.serve(request)
    assert (request.started_at, request.compute_s) == (100, 4)
    assert bench.stats.snapshot()["compute_s"] == 4


def test_identical_texts_that_wait_together_are_computed_once() -> None:
    """Equal work once: the same text of two requests costs the model one row, and both get its vector."""
    bench = Bench(Scripted())
    requests = [Asked("same", "a"), Asked("same"), Asked("b", "same")]
    bench.serve(*requests)
    assert_served(*requests)
    assert sorted(text for call in bench.place.calls for text in call) == ["a", "b", "same"]


@pytest.mark.parametrize("bad", [(), ("same",)], ids=["served", "failed"])
def test_a_text_that_arrives_while_its_equal_runs_shares_what_comes_of_it(bad: tuple[str, ...]) -> None:
    """Equal work once, also when it has begun: the late one gets the vector, or the error by its own index."""
    fail, late = failing(*bad), Asked("b", "same")

    def on_run(texts: list[str]) -> None:
        if texts == ["same"]:
            late.admitted_to(bench.queue)
        fail(texts)

    bench = Bench(Scripted(on_run))
    bench.serve(Asked("same"))
    assert [text for call in bench.place.calls for text in call].count("same") == 1
    if bad:
        assert isinstance(error_of(late), InferenceFailed)
        assert "texts[1]" in str(error_of(late))
    else:
        assert_served(late)


class Mortal(Scripted):
    """A driver whose process some texts end, or the node of it; `revive` is what opening it anew does."""

    def __init__(self, *deadly: str, loss: Loss = Loss("its process was ended by SIGSEGV")) -> None:  # noqa: B008
        super().__init__(self._die_of)
        self.deadly = deadly
        self.loss = loss
        self.deaths = 0

    def _die_of(self, texts: list[str]) -> None:
        if any(text in self.deadly for text in texts):
            self.deaths += 1
            self.lost = self.loss
            raise ChildProcessError(self.lost.reason)

    def revive(self) -> None:
        self.lost = None


def serve_reviving(bench: Bench, driver: Mortal, *requests: Asked) -> None:
    for request in requests:
        request.admitted_to(bench.queue)
    served = True
    while served:
        try:
            served = bench.step()
        except DriverBroken:
            driver.revive()


@settings(max_examples=60, deadline=None, database=None)
@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=5), min_size=1, max_size=6), st.integers(1, 8))
def test_a_text_that_ends_the_process_hurts_only_its_request(fates: list[list[bool]], max_texts: int) -> None:
    """What was in a batch with it is run again apart from it, until it is alone; and then it has another chance."""
    driver = Mortal("deadly")
    bench = Bench(driver, max_texts)
    requests = [
        Asked(*("deadly" if is_deadly else f"text {n}.{i}" for i, is_deadly in enumerate(fate)))
        for n, fate in enumerate(fates)
    ]
    serve_reviving(bench, driver, *requests)
    for request, fate in zip(requests, fates, strict=True):
        if any(fate):
            assert isinstance(error_of(request), InferenceFailed)
            assert "SIGSEGV" in str(error_of(request))
        else:
            assert_served(request)


def test_what_waited_to_be_alone_while_the_driver_was_lost_is_no_suspect_for_it() -> None:
    """It has not run, so it is run again as if nothing had been, and never refused."""

    class Slotted(Mortal):
        @contextlib.contextmanager
        def alone(self):
            if self.deaths < 5:  # one slot's batch ends the process while another's waits here
                self.deaths += 1
                self.lost = Loss("its process was ended by SIGSEGV")
            yield

    driver = Slotted()
    bench = Bench(driver)
    request = Asked("innocent")
    request.items[0].losses = 1
    bench.queue.put_back(request.items)
    serve_reviving(bench, driver)
    assert driver.deaths == 5
    assert_served(request)
    assert driver.calls == [["innocent"]]


def test_a_text_that_has_ended_the_process_does_not_end_the_next() -> None:
    """A client that sends it again gets the error at once, what is beside it is served; after a while it is tried."""
    driver = Mortal("deadly")
    bench = Bench(driver)
    serve_reviving(bench, driver, Asked("deadly"))
    deaths = driver.deaths
    again, beside = Asked("fine", "deadly"), Asked("good")
    serve_reviving(bench, driver, again, beside)
    assert "texts[1]" in str(error_of(again))
    assert "SIGSEGV" in str(error_of(again))
    assert_served(beside)
    assert driver.deaths == deaths
    driver.deadly = ()
    bench.now += QUARANTINE_S
    healed = Asked("deadly")
    serve_reviving(bench, driver, healed)
    assert_served(healed)


def test_the_quarantine_is_bounded() -> None:
    """The latest are kept."""
    quarantine = Quarantine(lambda: 0.0)
    items = [Asked(f"text {i}").items[0] for i in range(MOST_REMEMBERED + 2)]
    quarantine.add(items[0], "first")
    for item in items:
        quarantine.add(item, "again")
    assert [quarantine.reason(item) for item in items[:3]] == [None, None, "again"]
    assert quarantine.reason(items[-1]) == "again"


@pytest.mark.parametrize(("count", "deaths"), [(1, 3), (4, 3), (1, 5), (4, 9)])
def test_an_innocent_loss_is_counted_against_no_text(count: int, deaths: int) -> None:
    """An operator ends the process, or a node dies: the batch runs again as it was. After three times in a row it is
    believed no longer, and the batch is taken apart as after any loss; none of its texts fails all the same."""
    driver = Mortal()
    batch = [f"text {i}" for i in range(count)]

    def on_run(texts: list[str]) -> None:
        if driver.deaths < deaths:
            driver.deaths += 1
            driver.lost = Loss("its process was ended by SIGKILL", innocent=True)
            raise ChildProcessError("its process was ended by SIGKILL")

    driver._on_run = on_run
    bench = Bench(driver)
    request = Asked(*batch)
    serve_reviving(bench, driver, request)
    assert_served(request)
    assert driver.calls[: LOSSES_SPARED + 1] == [batch] * (LOSSES_SPARED + 1)
    assert any(item.losses for item in request.items) == (deaths > LOSSES_SPARED)


def test_a_text_that_ends_whole_nodes_is_found_all_the_same() -> None:
    """Each time its loss looks innocent; it costs three nodes more than one that ends a process, and nobody else."""
    driver = Mortal("deadly", loss=Loss("its node is gone", innocent=True))
    requests = [Asked("deadly"), Asked("a", "b")]
    serve_reviving(Bench(driver), driver, *requests)
    assert "its node is gone" in str(error_of(requests[0]))
    assert_served(requests[1])
    plain = Mortal("deadly")
    serve_reviving(Bench(plain), plain, Asked("deadly"), Asked("a", "b"))
    assert driver.deaths == plain.deaths + LOSSES_SPARED


def test_an_announced_loss_is_never_counted() -> None:
    """A provider takes its nodes back, one after the other: the batch stays whole, until it is served."""
    driver = Mortal()
    deaths = 5 * LOSSES_SPARED

    def on_run(texts: list[str]) -> None:
        if driver.deaths < deaths:
            driver.deaths += 1
            driver.lost = Loss("its node was taken away", innocent=True, announced=True)
            raise ChildProcessError("its node was taken away")

    driver._on_run = on_run
    bench = Bench(driver)
    request = Asked("a", "b")
    serve_reviving(bench, driver, request)
    assert_served(request)
    assert driver.calls == [["a", "b"]] * (deaths + 1)
    assert not any(item.losses or item.spared for item in request.items)


def test_a_model_is_not_asked_for_what_it_cannot_do() -> None:
    """Its driver says which tasks it has; another one costs it no call, and the requests beside it nothing."""
    bench = Bench(Scripted())
    odd, other = Asked("a", group=Group("score")), Asked("b")
    bench.serve(odd, other)
    assert isinstance(error_of(odd), UnsupportedTask)
    assert "cannot score; it can embed" in error_of(odd).message
    assert_served(other)


def test_a_batch_whose_process_is_killed_from_outside_is_served_by_the_next() -> None:
    """No text is at fault, so none fails, also one that was alone in its batch."""
    for texts in (["a"], ["a", "b", "c"]):
        driver = Mortal("a")
        bench = Bench(driver)
        request = Asked(*texts)
        request.admitted_to(bench.queue)
        with pytest.raises(DriverBroken):
            bench.step()
        assert not request.is_done
        driver.revive()
        driver.deadly = ()
        bench.serve()
        assert_served(request)


def test_the_other_half_of_a_bisected_batch_is_no_suspect() -> None:
    """A batch fails on a text, and in its first half the process ends: the second half is run again as it was."""
    driver = Mortal()

    def on_run(texts: list[str]) -> None:
        if len(texts) == 4:
            raise RuntimeError("cannot bear it")
        if driver.deaths == 0:
            driver.deaths += 1
            driver.lost = Loss("its process was ended by SIGSEGV")
            raise ChildProcessError(driver.lost.reason)

    driver._on_run = on_run
    bench = Bench(driver)
    request = Asked("a", "b", "c", "d")
    serve_reviving(bench, driver, request)
    assert_served(request)
    assert driver.calls == [["a", "b", "c", "d"], ["a", "b"], ["a"], ["b"], ["c", "d"]]


def test_a_process_that_ends_when_it_is_probed_costs_no_request() -> None:
    """A batch fails, and before the driver could be asked about it it is gone: the batch is run again."""
    driver = Mortal()

    def on_probe() -> None:
        driver.lost = Loss("its process was ended by SIGKILL")
        raise ChildProcessError(driver.lost.reason)

    driver._on_run = lambda texts: (_ for _ in ()).throw(RuntimeError("x")) if len(driver.calls) == 1 else None
    driver._on_probe = on_probe
    bench = Bench(driver)
    request = Asked("a", "b")
    request.admitted_to(bench.queue)
    with pytest.raises(DriverBroken, match="SIGKILL"):
        bench.step()
    driver.revive()
    bench.serve()
    assert_served(request)


def test_only_a_batch_that_was_alone_is_at_fault() -> None:
    """A place of several slots is lost with all of them: what ran beside the one at fault is not taken for it, and
    what is suspected runs as the only batch."""
    together: list[bool] = []

    class Slotted(Mortal):
        @contextlib.contextmanager
        def alone(self):
            together.append(True)
            yield

    driver = Slotted("deadly")
    bench = Bench(driver, 1)
    innocent = Asked("innocent")
    innocent.admitted_to(bench.queue)
    driver.deadly = ("innocent",)  # its neighbour kills it
    with pytest.raises(DriverBroken):
        bench.step()
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
        def lost(self) -> Loss | None:
            self.looks += 1
            return None if self.looks == 1 else Loss("its process was ended by SIGKILL")

        @lost.setter
        def lost(self, loss: Loss | None) -> None:
            pass

    bench = Bench(Fickle(failing("a")))
    request = Asked("a")
    request.admitted_to(bench.queue)
    with pytest.raises(DriverBroken):
        bench.step()
    assert request.is_done != bool(bench.queue.qsize())


@pytest.mark.parametrize("status", [500, 422, 503])
def test_a_services_words_are_for_whom_alone_it_was_called(status: int) -> None:
    """They may quote any text of the call."""

    def quoting(texts: list[str]) -> None:
        raise UpstreamError("the remote service refuses", said=f"cannot embed {texts}", remote_status=status)

    bench = Bench(Scripted(quoting))
    one, other = Asked("secret of one"), Asked("secret of another")
    bench.serve(one, other)
    assert {error_of(request).message for request in (one, other)} == {"the remote service refuses"}
    alone = Asked("secret", "of", "mine")
    bench.serve(alone)
    assert "cannot embed ['secret'" in error_of(alone).message
    assert error_of(alone).for_the_log == "the remote service refuses"


def poisoned(*bad: str, status: int | None = 500, everything: bool = False):
    """A remote service that fails for some texts, or for all, whatever they are."""

    def on_run(texts: list[str]) -> None:
        if everything or any(text in bad for text in texts):
            raise UpstreamError("it fails", remote_status=status, content_may_cause=status is None)

    return on_run


@pytest.mark.parametrize("status", [400, 403, 404, 406, 413, 422, 424, 451, 500, 502, 503, 504, None])
@pytest.mark.parametrize("count", [2, 7, 64])
def test_a_text_that_a_service_cannot_bear_fails_alone(count: int, status: int | None) -> None:
    """Whatever it says to it, for a few further calls."""
    requests = [Asked(f"text {i}") for i in range(count)]
    bench = Bench(Scripted(poisoned("text 1", status=status)))
    bench.serve(*requests)
    assert [i for i, request in enumerate(requests) if request.error] == [1]
    assert_served(requests[0], *requests[2:])
    assert len(bench.place.calls) - 1 <= 2 * (math.ceil(math.log2(count)) + 1)


@pytest.mark.parametrize("status", [401, 402, 407])
def test_what_no_text_causes_is_looked_for_in_none(status: int) -> None:
    """The batch fails as one."""
    requests = [Asked(f"text {i}") for i in range(8)]
    bench = Bench(Scripted(poisoned(everything=True, status=status)))
    bench.serve(*requests)
    assert len(bench.place.calls) == 1
    assert all(request.error for request in requests)


@pytest.mark.parametrize("status", [422, 500])
def test_what_options_or_the_service_itself_cause_costs_one_call_more(status: int) -> None:
    """A known text with the same options fails, too."""
    requests = [Asked(f"text {i}", group=Group("embed", '{"encoding": "odd"}')) for i in range(64)]
    bench = Bench(Scripted(poisoned(everything=True, status=status)))
    bench.serve(*requests)
    assert [len(call) for call in bench.place.calls] == [64, 1]
    assert bench.place.options == [{"encoding": "odd"}] * 2
    assert all(request.error for request in requests)


def test_a_search_has_its_bound() -> None:
    """Beyond it the rest of the batch fails as one; calls that are made otherwise earn further ones."""
    every_second = [f"text {i}" for i in range(0, 64, 2)]
    bench = Bench(Scripted(poisoned(*every_second)))
    for _ in range(4):
        requests = [Asked(f"text {i}") for i in range(64)]
        bench.serve(*requests)
        assert all(request.error for request in requests[::2])
    in_vain = [call for call in bench.place.calls if any(text in every_second for text in call)]
    assert len(in_vain) <= SEARCH_RESERVE + 4 * 3  # those that served texts were due
    served = [Asked(f"fine {i}") for i in range(100)]
    for request in served:
        bench.serve(request)
    found = [Asked("text 0"), Asked("fine")]
    bench.serve(*found)
    assert_served(found[1])


def test_a_limit_of_the_service_on_a_call_costs_no_budget() -> None:
    """Each batch that was too large is served as two, however many there are."""

    def at_most_32(texts: list[str]) -> None:
        if len(texts) > 32:
            raise UpstreamError("too large", remote_status=413)

    bench = Bench(Scripted(at_most_32))
    for number in range(300):
        requests = [Asked(f"text {number} {i}") for i in range(64)]
        bench.serve(*requests)
        assert_served(*requests)


# --- a service that asks for a pause


def test_a_text_that_is_always_refused_as_too_much_fails_in_the_end() -> None:
    """While the service answers others; those are all served, for a few calls."""
    requests = [Asked(f"text {i}") for i in range(16)]

    def refusing(texts: list[str]) -> None:
        if "text 5" in texts:
            raise UpstreamError("slow down", remote_status=429)

    bench = Bench(Scripted(refusing))
    for request in requests:
        request.admitted_to(bench.queue)
    for number in range(40):  # others come all the time
        Asked(f"another {number}").admitted_to(bench.queue)
        for _ in range(3):
            bench.step()
    assert [i for i, request in enumerate(requests) if request.error] == [5]
    assert_served(*requests[:5], *requests[6:])
    assert error_of(requests[5]).status == 429
    assert sum("text 5" in call for call in bench.place.calls) < 40


def test_a_service_that_is_busy_for_all_blames_none() -> None:
    """However often it says so."""
    refusals = iter(range(50))

    def refusing(texts: list[str]) -> None:
        if next(refusals, None) is not None:
            raise UpstreamError("slow down", remote_status=429)

    requests = [Asked("a"), Asked("b")]
    Bench(Scripted(refusing)).serve(*requests)
    assert_served(*requests)


def test_nothing_is_kept_for_requests_that_cannot_wait() -> None:
    """The queue has room for those who can."""

    def refusing(texts: list[str]) -> None:
        raise UpstreamError("slow down", remote_status=429)

    bench = Bench(Scripted(refusing, rest_s=lambda: 50.0))
    hasty, patient = Asked("a", "b", timeout_s=110.0), Asked("c", timeout_s=1000.0)
    for request in (hasty, patient):
        request.admitted_to(bench.queue)
    bench.step()
    assert error_of(hasty).retry_after_s == 50.0
    assert not patient.is_done
    assert bench.queue.qsize() == 1
    bench.queue.withdraw(patient)
    assert bench.queue.qsize() == 0
