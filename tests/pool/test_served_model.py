"""One model: admission, gathering, states, scaling, and leaving."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from embedpool.config.spec import DriverSpec, HttpConfig, ModelSpec
from embedpool.drivers.fake import FakeTokenizer
from embedpool.drivers.http import RemoteTokenizer
from embedpool.errors import (
    ClientGone,
    DeadlineExceeded,
    InferenceFailed,
    InvalidRequest,
    ModelDisabled,
    ModelFailed,
    ModelLoading,
    Overloaded,
    ShuttingDown,
)
from embedpool.pool.model_queue import QueueClosed
from embedpool.pool.planner import Planner
from embedpool.pool.replica_set import FAILURES_BEFORE_FAILED, ReplicaSet
from embedpool.pool.served_model import ServedModel
from embedpool.tasks.driver import Cost, Facts, Loss
from embedpool.tasks.rows import Answer, Rows
from tests.conftest import wait_until
from tests.pool.scripted import (
    A_WHILE_S,
    PATIENCE_S,
    Gate,
    Opener,
    Scripted,
    ask,
    assert_answers,
    broken_on,
    in_thread,
    model_spec,
    puts_of,
    settings_of,
    vectors_of,
)


@pytest.fixture
def serve() -> Iterator[Callable[..., tuple[ServedModel, Opener]]]:
    """A model whose loads follow the script; drained at the end, when every driver must have been closed."""
    made: list[tuple[ServedModel, Opener]] = []

    def begin(
        *script: Any,
        start: bool = True,
        prove: bool = False,
        settings: dict | None = None,
        on_ready: Any = None,
        **spec: Any,
    ) -> tuple[ServedModel, Opener]:
        opener = Opener(*script)
        served = ServedModel(
            model_spec(**spec), settings_of(opener, **(settings or {})), on_ready=on_ready or (lambda served: None)
        )
        made.append((served, opener))
        if start:
            served.start(prove=prove)
        return served, opener

    yield begin
    for served, opener in made:
        served.drain(0)
        for driver in opener.opened:
            assert driver.closed.wait(PATIENCE_S), "every driver is given back"


def settled(served: ServedModel) -> ServedModel:
    assert served.replicas.settled.wait(PATIENCE_S)
    return served


# --- the road of a request


def test_a_request_gets_its_vectors_and_their_story(serve) -> None:
    """The answer holds a vector for each text in order, tokens with special ones, and who computed it."""
    served, _ = serve()
    settled(served)
    result = ask(served, "one two", "", "three")
    assert_answers(result, "one two", "", "three")
    assert (result.model, result.width, result.tokens, result.truncated) == ("m", 8, 4 + 2 + 3, [])
    assert result.replicas == ["m#1"]
    assert result.queue_ms >= 0
    assert result.total_ms >= result.compute_ms >= 0
    assert served.stats.snapshot()["requests"] == 1


def test_a_large_request_is_split_and_gathered_in_order(serve) -> None:
    """A request larger than queue and batch comes back whole and in order, whichever batch each text travelled in."""
    served, opener = serve(settings={"max_batch_texts": 4}, max_size=6, inflight=2, max=3)
    settled(served)
    texts = ["w " * (i * 7 % 11) + str(i) for i in range(50)]
    result = ask(served, *texts)
    assert_answers(result, *texts)
    calls = [call for driver in opener.opened for call in driver.calls]
    assert max(map(len, calls)) <= 4
    assert sorted(text for call in calls for text in call) == sorted(texts)


def test_output_options_are_applied_after_the_model(serve) -> None:
    """dimensions, normalize and dtype shape the answer, not what the model computes."""
    served, _ = serve()
    settled(served)
    result = ask(served, "a", dimensions=3, normalize=True, dtype="float16")
    cut = vectors_of(["a"])[:, :3]
    np.testing.assert_allclose(result.vectors, cut / np.linalg.norm(cut), atol=1e-3)
    assert (result.width, result.vectors.shape, result.vectors.dtype) == (8, (1, 3), np.float16)
    with pytest.raises(InvalidRequest):
        ask(served, "a", dimensions=9)


def test_truncated_texts_are_told_by_their_place_in_the_request(serve) -> None:
    """`truncated` holds indices into the request's texts, over all its batches."""
    served, _ = serve(settings={"max_batch_texts": 2})
    settled(served)
    assert ask(served, "a", "b c d", "e", "f g h", max_seq_length=4).truncated == [1, 3]


def test_counts_of_a_remote_win_over_estimates(serve) -> None:
    """What a remote service counted is what the caller is told."""
    served, _ = serve(Scripted(lambda texts: Answer(Rows(vectors_of(texts)), tokens=11, truncated=[0])))
    settled(served)
    result = ask(served, "a", "b")
    assert (result.tokens, result.truncated) == (11, [0])


def test_a_full_queue_says_no_at_once_and_when_to_come_back(serve) -> None:
    """Overload is answered at the door with the time after which a retry makes sense, and hurts nobody inside."""
    gate = Gate()
    served, _ = serve(Scripted(gate), max_size=2)
    settled(served)
    puts = puts_of(served)
    inside = [in_thread(ask, served, "running")]
    gate.arrived()
    inside += [in_thread(ask, served, text) for text in ("w1", "w2")]
    for _ in range(3):
        assert puts.acquire(timeout=PATIENCE_S)
    with pytest.raises(Overloaded, match="2 texts") as caught:
        ask(served, "one too many")
    assert 1 <= caught.value.retry_after_s <= 60
    gate.open()
    for request, text in zip(inside, ("running", "w1", "w2"), strict=True):
        assert_answers(request.result(PATIENCE_S), text)
    assert served.stats.snapshot()["errors"] == {"overloaded": 1}


def test_retry_after_follows_the_measured_rate(serve) -> None:
    """The time to come back is what waits divided by the rate, within a second and a minute."""
    served, _ = serve(start=False)
    assert served.admission._overloaded().retry_after_s == 1
    served.stats.batch(10, 10, 10, 2.0)
    for waiting, expected in ((0, 1), (50, 10), (900, 60)):
        served.queue.qsize = lambda waiting=waiting: waiting
        assert served.admission._overloaded().retry_after_s == pytest.approx(expected)


def test_a_deadline_is_kept_while_the_batch_runs(serve) -> None:
    """A request is answered at its deadline although its batch still runs, and the batch disturbs nobody after."""
    gate = Gate()
    served, _ = serve(Scripted(gate))
    settled(served)
    with pytest.raises(DeadlineExceeded, match=r"0\.05 s"):
        ask(served, "a", timeout_s=0.05)
    gate.open()
    assert_answers(ask(served, "b"), "b")


def test_a_deadline_is_kept_while_the_rest_waits_for_room(serve) -> None:
    """A large request that cannot get all its texts into the queue in time is answered at its deadline."""
    gate = Gate()
    served, _ = serve(Scripted(gate), max_size=1, settings={"max_batch_texts": 1})
    settled(served)
    with pytest.raises(DeadlineExceeded):
        ask(served, "a", "b", "c", timeout_s=0.05)
    gate.open()


def test_a_client_that_left_costs_no_compute(serve) -> None:
    """Texts whose client has gone are dropped before they reach the model."""
    served, opener = serve()
    settled(served)
    with pytest.raises(ClientGone):
        ask(served, "a", call={"client_gone": lambda: True})
    assert opener.opened[0].calls == []


def test_an_error_names_the_text_by_its_place_in_the_request(serve) -> None:
    """However a request was split, the text at fault is named as the caller counts."""

    def on_run(texts: list[str]) -> None:
        if "bad" in texts:
            raise RuntimeError("cannot bear it")

    served, _ = serve(Scripted(on_run), settings={"max_batch_texts": 2})
    settled(served)
    with pytest.raises(InferenceFailed) as caught:
        ask(served, "a", "b", "c", "bad", "e")
    assert set(caught.value.fields) == {"texts[3]"}
    assert_answers(ask(served, "a"), "a")


# --- states


def test_the_first_load_at_start_is_not_waited_for(serve) -> None:
    """While a model loads for the first time, requests are told so; afterwards they are served."""
    gate = Gate()
    served, _ = serve(lambda: gate() or Scripted())
    gate.arrived()
    assert (served.state, served.settled, served.is_serving) == ("loading", False, False)
    with pytest.raises(ModelLoading) as caught:
        ask(served, "a")
    assert caught.value.retry_after_s > 0
    gate.open()
    settled(served)
    assert (served.state, served.is_serving) == ("ready", True)
    assert_answers(ask(served, "a"), "a")


def test_min_0_loads_on_first_use_and_the_request_waits(serve) -> None:
    """A model of min 0 holds nothing until it is asked; the first request waits for the load and is served."""
    gate = Gate()
    served, opener = serve(lambda: gate() or Scripted(), min=0)
    assert (served.state, served.settled, served.is_serving, opener.opened) == ("idle", True, True, [])
    requests = [in_thread(ask, served, str(i)) for i in range(3)]
    gate.arrived()
    assert served.state == "loading"
    gate.open()
    for i, request in enumerate(requests):
        assert_answers(request.result(PATIENCE_S), str(i))
    assert len(opener.specs) == 1


def test_min_0_unloads_when_idle_and_loads_again(serve) -> None:
    """An idle model of min 0 gives its memory back and still answers the next request."""
    served, opener = serve(min=0, idle_ttl_s=0.001)
    for turn in range(3):
        assert_answers(ask(served, "a"), "a")
        assert opener.opened[turn].closed.wait(PATIENCE_S)
        assert served.state == "idle"


def test_a_request_that_arrives_while_the_last_replica_leaves_is_served(serve, monkeypatch) -> None:
    """No moment is wrong for a request: one that comes as the idle model is being unloaded loads it again."""
    with monkeypatch.context() as patch:
        patch.setattr(ReplicaSet, "_start_thread", lambda *arguments: None)
        served, _ = serve(min=0, prove=True)  # its replica does nothing but what this test does for it
    (replica,) = served.replicas._replicas
    served.replicas.loads_first = False
    admit, qsize, puts = served.queue.admit, served.queue.qsize, puts_of(served)
    about_to_enter, may_enter = threading.Event(), threading.Event()

    def admit_when_told(items) -> int:
        about_to_enter.set()
        assert may_enter.wait(PATIENCE_S)
        return admit(items)

    def qsize_and_then_a_request() -> int:
        size = qsize()
        if not may_enter.is_set():
            may_enter.set()
            assert puts.acquire(timeout=PATIENCE_S)
            threading.Event().wait(A_WHILE_S)  # it looks for a replica; where there is a lock, it waits for us
        return size

    served.queue.admit, served.queue.qsize = admit_when_told, qsize_and_then_a_request
    request = in_thread(ask, served, "a", timeout_s=2)
    assert about_to_enter.wait(PATIENCE_S)
    if not served.replicas._retires(replica, is_idle=True):
        served.replicas._start_thread(replica, served.replicas._live, replica.name)
    assert_answers(request.result(PATIENCE_S), "a")


def test_a_first_load_that_fails_is_told_and_tried_again(serve) -> None:
    """A model that cannot be loaded says why; it is tried again by itself, and serves once it can."""
    again = Gate()
    served, _opener = serve(OSError("no such file"), lambda: again() or Scripted())
    settled(served)
    again.arrived()
    assert (served.state, served.replicas.last_error) == ("failed", "OSError: no such file")
    with pytest.raises(ModelFailed, match="no such file") as caught:
        ask(served, "a")
    assert caught.value.retry_after_s >= 1
    again.open()
    wait_until_ready(served)
    assert_answers(ask(served, "a"), "a")


def wait_until_ready(served: ServedModel) -> None:
    """A ready replica is announced through `on_ready`; this asks for one announcement more."""
    ready = threading.Event()
    served._on_ready = lambda model: ready.set()
    assert served.state == "ready" or ready.wait(PATIENCE_S)


def test_a_model_of_several_replicas_has_failed_when_all_have(serve) -> None:
    """The first load of a model is over when a replica is ready or none could be loaded, not before."""
    slow, again = Gate(), Gate()
    served, _ = serve(OSError("no memory"), lambda: slow() or Scripted(), lambda: again() or Scripted(), min=2, max=2)
    slow.arrived()
    again.arrived()  # so the first failure has been dealt with
    state = (served.state, served.settled)
    slow.open()
    again.open()
    assert state == ("loading", False)
    settled(served)


def test_slots_that_do_not_run_shorten_no_batch(serve) -> None:
    """A replica that loads has no slot that comes free, so the batches of the others are not cut for it."""
    slow = Gate()
    served, _ = serve(Scripted(facts=Facts(slots=3)), lambda: slow() or Scripted(), min=2, max=2)
    slow.arrived()
    settled(served)
    counted = served.replicas._slots.count
    slow.open()
    assert counted == 3


def test_the_slots_of_a_model_know_of_each_other(serve) -> None:
    """Also those of different replicas: what one runs, the next cuts its batch by."""
    gate = Gate()
    facts = Facts(slots=1, cost=Cost(1.0, 1.0))
    served, opener = serve(
        *[Scripted(gate, facts=facts) for _ in range(2)], min=2, max=2, settings={"max_batch_s": 8.0}
    )
    settled(served)
    for _ in range(2):
        opener.wait_for_load()
    asking = [in_thread(ask, served, "a b c")]
    gate.arrived()
    assert served.replicas._slots.busy_s() > 0
    served.update(model_spec(min=2, max=2, alias="other"))
    assert any(served.replicas._slots.count == 2 or threading.Event().wait(0.01) for _ in range(1000))
    asking.append(in_thread(ask, served, "d e f"))
    gate.arrived()
    gate.open()
    for future in asking:
        future.result(PATIENCE_S)


def test_requests_wait_while_a_replica_is_opened_anew(serve) -> None:
    """A model that broke and is being opened again lets requests wait, and serves them then."""
    again = Gate()
    served, opener = serve(broken_on("bad"), lambda: again() or Scripted())
    settled(served)
    with pytest.raises(InferenceFailed):
        ask(served, "bad")
    again.arrived()
    assert served.state == "loading"
    puts = puts_of(served)
    waiting = in_thread(ask, served, "a")
    assert puts.acquire(timeout=PATIENCE_S)
    again.open()
    assert_answers(waiting.result(PATIENCE_S), "a")
    assert opener.opened[0].closed.is_set()


def test_after_repeated_failures_requests_are_refused_and_waiting_ones_told(serve) -> None:
    """A model that keeps failing answers model_failed, also to those who wait; it recovers by itself."""
    gates = [Gate(), Gate(), Gate()]

    def fails(gate: Gate):
        def load() -> Scripted:
            gate()
            raise OSError("still down")

        return load

    served, _ = serve(broken_on("bad"), fails(gates[0]), fails(gates[1]), lambda: gates[2]() or Scripted())
    settled(served)
    with pytest.raises(InferenceFailed):
        ask(served, "bad")
    puts = puts_of(served)
    waiting = in_thread(ask, served, "a")
    assert puts.acquire(timeout=PATIENCE_S)
    for gate in gates[:2]:
        gate.arrived()
        assert (served.state, waiting.done()) == ("loading", False)
        gate.open()
    gates[2].arrived()
    assert served.state == "failed"
    for request in (waiting, in_thread(ask, served, "b")):
        with pytest.raises(ModelFailed, match="still down"):
            request.result(PATIENCE_S)
    gates[2].open()
    wait_until_ready(served)
    assert_answers(ask(served, "a"), "a")
    assert served.state == "ready"


def test_a_disabled_model_loads_nothing_and_says_so(serve) -> None:
    """A model that is switched off holds no memory, whatever else of it is changed."""
    served, opener = serve(enabled=False)
    assert (served.state, served.settled) == ("disabled", True)
    with pytest.raises(ModelDisabled):
        ask(served, "a")
    served.update(model_spec(enabled=False, alias="other", min=2, max=2))
    assert opener.loads.acquire(timeout=A_WHILE_S) is False
    assert served.snapshot()["replicas"] == 0


# --- scaling


def test_replicas_are_added_while_work_waits_up_to_max(serve) -> None:
    """Work that waits behind busy replicas brings further ones, up to max, and every request is answered."""
    first, others = Gate(), Gate()

    def on_run(texts: list[str]) -> None:
        (first if texts == ["0"] else others)()

    served, opener = serve(*[lambda: Scripted(on_run)] * 5, settings={"max_batch_texts": 1}, max=3)
    settled(served)
    puts = puts_of(served)
    requests = []
    for i in range(8):
        requests.append(in_thread(ask, served, str(i)))
        assert puts.acquire(timeout=PATIENCE_S)
        if i == 0:
            first.arrived()
    first.open()  # its next batch has work waiting behind it
    for _ in range(3):
        others.arrived()
    assert served.snapshot()["replicas_busy"] == 3
    others.open()
    for i, request in enumerate(requests):
        assert_answers(request.result(PATIENCE_S), str(i))
    assert len(opener.opened) == 3


def test_idle_replicas_above_min_leave(serve) -> None:
    """Replicas above min are given back after their idle time; those of min stay, and serve."""
    closed = threading.Semaphore(0)
    served, opener = serve(*[lambda: Scripted(on_close=closed.release)] * 2, min=2, max=2)
    settled(served)
    served.update(model_spec(min=1, max=2, idle_ttl_s=0.001))
    assert closed.acquire(timeout=PATIENCE_S)
    assert served.snapshot()["replicas"] == 1
    assert_answers(ask(served, "a"), "a")
    assert sum(driver.closed.is_set() for driver in opener.opened) == 1


def test_each_replica_tells_where_it_runs(serve) -> None:
    """They may be on different nodes, of which one entry for all would name the first alone."""
    facts = [Facts(description={"kind": "embed", "node": node, "node_ip": "10.0.0.5"}) for node in ("n1", "n2")]
    served, _ = serve(*[lambda found=found: Scripted(facts=found) for found in facts], min=2, max=2)
    settled(served)
    wait_until(lambda: served.snapshot()["replicas_idle"] == 2)
    told = served.snapshot()["replicas_on"]
    assert {one["node"] for one in told} == {"n1", "n2"}
    of_one = {"replica": "m#1", "state": "ready", "node_ip": "10.0.0.5", "node": told[0]["node"]}
    assert told[0] == of_one


def test_a_larger_min_loads_at_once(serve) -> None:
    """Raising min loads the further replicas without waiting for work."""
    served, opener = serve()
    settled(served)
    served.update(model_spec(min=3, max=3))
    for _ in range(3):
        opener.wait_for_load()
    assert served.snapshot()["replicas"] == 3


def test_more_batches_at_once_apply_at_once(serve) -> None:
    """max_inflight_per_replica is no load option: a larger one applies to the replicas that run."""
    gate = Gate()
    driver = Scripted(lambda texts: gate() if texts != ["before"] else None)
    served, opener = serve(driver, inflight=1, settings={"max_batch_texts": 1})
    settled(served)
    served.update(model_spec(inflight=2))
    assert_answers(ask(served, "before"), "before")
    requests = [in_thread(ask, served, "a"), in_thread(ask, served, "b")]
    try:
        gate.arrived()
        assert gate.entered.acquire(timeout=1), "the second batch runs beside the first"
    finally:
        gate.open()
        for request in requests:
            request.result(PATIENCE_S)
    assert len(opener.opened) == 1


def test_a_smaller_or_larger_queue_applies_at_once(serve) -> None:
    """The queue's bound follows pool.yml, and the server's default where pool.yml has none."""
    served, _ = serve(min=0, max_size=5, settings={"max_queue_per_model": 7})
    assert served.snapshot()["queue_max"] == 5
    served.update(model_spec(min=0))
    assert served.snapshot()["queue_max"] == 7


def test_a_tokenizer_that_cannot_be_had_leaks_no_driver(serve) -> None:
    """When the tokenizer of a model fails to load, the load is tried again and no loaded model stays behind."""
    failures = [OSError("no tokenizer")]

    def open_tokenizer(spec, report) -> FakeTokenizer:
        if failures:
            raise failures.pop()
        return FakeTokenizer()

    served, _opener = serve(settings={"open_tokenizer": open_tokenizer})
    settled(served)
    wait_until_ready(served)
    assert_answers(ask(served, "a"), "a")


@pytest.mark.parametrize("where", ["tokenizer", "driver"])
def test_a_model_loaded_on_demand_that_cannot_load_says_so(serve, where: str) -> None:
    """Its requests get the reason and a time to come back, it is failed until then, and then it is tried again."""
    now = [100.0]
    reasons: list[Exception] = [OSError("a broken file") for _ in range(2)]

    def open_tokenizer(spec, report) -> FakeTokenizer:
        if reasons and where == "tokenizer":
            raise reasons.pop()
        return FakeTokenizer()

    script = 2 * FAILURES_BEFORE_FAILED * reasons[:1] if where == "driver" else ()
    served, opener = serve(*script, min=0, settings={"open_tokenizer": open_tokenizer, "clock": lambda: now[0]})
    assert served.state == "idle"
    for _ in range(2):  # a load is tried three times at once
        with pytest.raises(ModelFailed, match="a broken file"):
            ask(served, "a")
        wait_until(lambda: served.state == "failed")
        assert not served.is_serving
        assert "a broken file" in served.snapshot()["last_error"]
        loads = len(opener.specs)
        with pytest.raises(ModelFailed, match="a broken file") as caught:
            ask(served, "a")
        assert (caught.value.retry_after_s or 0) >= 1
        assert len(opener.specs) == loads  # nothing was tried
        now[0] += 60
        assert served.state == "idle"
    assert_answers(ask(served, "a"), "a")
    assert served.state == "ready"


def test_who_waits_for_a_tokenizer_learns_that_it_failed(serve) -> None:
    """It is not opened once more for each of them."""
    opening, opened = threading.Event(), itertools.count()
    may_fail = threading.Event()

    def open_tokenizer(spec, report) -> FakeTokenizer:
        next(opened)
        opening.set()
        assert may_fail.wait(PATIENCE_S)
        raise OSError("a broken file")

    served, _ = serve(min=0, settings={"open_tokenizer": open_tokenizer})
    first = in_thread(ask, served, "a")
    assert opening.wait(PATIENCE_S)
    others = [in_thread(ask, served, "b") for _ in range(5)]
    wait_until(lambda: len(served.admission._inside) == 6)
    may_fail.set()
    for future in (first, *others):
        assert isinstance(future.exception(PATIENCE_S), ModelFailed)
    assert next(opened) == 1


def test_a_thread_that_cannot_be_started_wedges_nothing(serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the system has no thread to give, that request fails and the next one finds a model that can load."""

    def no_thread(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    served, _ = serve(min=0)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", no_thread)
        with pytest.raises(RuntimeError):
            ask(served, "a")
    assert_answers(ask(served, "b", timeout_s=1), "b")


# --- leaving


def test_a_drain_answers_those_inside_and_refuses_the_rest(serve) -> None:
    """A model that is replaced answers every request it has taken, the large one too, and takes no more."""
    gate = Gate()
    served, _ = serve(Scripted(gate), max_size=4, settings={"max_batch_texts": 2})
    settled(served)
    texts = [str(i) for i in range(20)]
    inside = in_thread(ask, served, *texts)
    gate.arrived()
    served.close()
    assert served.state == "draining"
    drained = in_thread(served.drain, PATIENCE_S)
    with pytest.raises(QueueClosed):
        ask(served, "late")
    gate.open()
    assert_answers(inside.result(PATIENCE_S), *texts)
    assert drained.result(PATIENCE_S) == 0
    assert served.stats.snapshot()["errors"] == {}


@pytest.mark.parametrize("where", ["just admitted", "between two items"])
def test_a_drain_loads_what_an_admitted_request_still_needs(serve, where: str) -> None:
    """A request that a model of min 0 has taken is answered although the model is replaced before it was loaded."""
    first = Scripted()
    served, _ = serve(first, min=0, idle_ttl_s=0.001, settings={"max_batch_texts": 1})
    drains = []
    admit, feed = served.queue.admit, served.queue.feed

    def drain() -> None:
        served.close()
        drains.append(in_thread(served.drain, PATIENCE_S))

    def admit_then_drain(items) -> int:
        put = admit(items[:1])
        if where == "just admitted":
            drain()
        return put

    def feed_late(items, timeout_s: float) -> int:
        if where == "between two items" and not drains:
            assert first.closed.wait(PATIENCE_S)  # unloaded: idle
            drain()
        return feed(items, timeout_s)

    served.queue.admit, served.queue.feed = admit_then_drain, feed_late
    result = in_thread(ask, served, "a", "b", timeout_s=2)
    assert_answers(result.result(PATIENCE_S), "a", "b")
    assert drains[0].result(PATIENCE_S) == 0


def test_what_is_left_at_the_end_of_a_drain_is_told_and_counted(serve) -> None:
    """When the time is up, those inside get 503 at once, running, waiting and not yet queued, and are counted."""
    gate = Gate()
    served, _ = serve(Scripted(gate), max_size=4, settings={"max_batch_texts": 1})
    settled(served)
    puts = puts_of(served)
    running = in_thread(ask, served, "running")
    gate.arrived()
    assert puts.acquire(timeout=PATIENCE_S)
    waiting = in_thread(ask, served, "waiting")
    assert puts.acquire(timeout=PATIENCE_S)
    feeding = in_thread(ask, served, *"abcdefgh")
    assert puts.acquire(timeout=PATIENCE_S)
    drained = in_thread(served.drain, 0)
    for request in (running, waiting, feeding):
        with pytest.raises(ShuttingDown):
            request.result(PATIENCE_S)
    gate.open()
    assert drained.result(PATIENCE_S) == 3


def test_a_drain_meets_a_replica_that_is_only_being_started(serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model may be stopped in the very moment its first request loads it."""
    served, _ = serve(min=0)
    start = ReplicaSet._start_thread
    drains = []

    def start_during_a_drain(*arguments: Any) -> None:
        drains.append(in_thread(served.drain, 0))
        threading.Event().wait(A_WHILE_S)  # it gets as far as it can
        start(*arguments)

    monkeypatch.setattr(ReplicaSet, "_start_thread", start_during_a_drain)
    with contextlib.suppress(ShuttingDown, QueueClosed):  # it may be answered, or told
        assert_answers(ask(served, "a"), "a")
    assert drains[0].result(PATIENCE_S) in (0, 1)


def test_a_drain_waits_for_replicas_that_are_leaving_already(serve) -> None:
    """After a drain no driver is open, not even one that was being closed because it was idle."""
    closing, may_close = threading.Event(), threading.Event()
    driver = Scripted(on_close=lambda: closing.set() or may_close.wait(PATIENCE_S))
    served, _ = serve(driver, min=0, idle_ttl_s=0.001, prove=True)
    assert closing.wait(PATIENCE_S)
    drained = in_thread(lambda: served.drain(0) or driver.closed.is_set())
    threading.Event().wait(A_WHILE_S)
    may_close.set()
    assert drained.result(PATIENCE_S), "drained while a driver was still open"


def test_the_snapshot_tells_what_an_operator_needs(serve) -> None:
    """/status shows state, replicas at work and idle, what waits, counters and the last error."""
    gate = Gate()
    served, _ = serve(Scripted(gate), alias="al", max_size=9)
    settled(served)
    puts = puts_of(served)
    requests = [in_thread(ask, served, "a")]
    gate.arrived()
    assert puts.acquire(timeout=PATIENCE_S)
    requests.append(in_thread(ask, served, "b"))
    assert puts.acquire(timeout=PATIENCE_S)
    seen = served.snapshot()
    gate.open()
    for request in requests:
        request.result(PATIENCE_S)
    expected = {
        "model": "m", "alias": "al", "enabled": True, "state": "ready", "driver_type": "fake", "replicas": 1,
        "replicas_busy": 1, "replicas_idle": 0, "queue_len": 1, "queue_max": 9, "last_error": None,
    }  # fmt: skip
    assert {key: seen[key] for key in expected} == expected
    assert served.snapshot()["counters"]["requests"] == 2


def test_a_tokenizer_that_opens_for_long_delays_nobody_else(serve) -> None:
    """While one request opens the tokenizer, others keep their deadlines and a change of the spec applies."""
    opening = Gate()

    def open_tokenizer(spec, report) -> FakeTokenizer:
        opening()
        return FakeTokenizer()

    served, _ = serve(min=0, settings={"open_tokenizer": open_tokenizer})
    first = in_thread(ask, served, "a")
    opening.arrived()
    with pytest.raises(DeadlineExceeded):
        ask(served, "b", timeout_s=0.01)
    served.update(model_spec(min=0, alias="other"))
    assert served.spec.alias == "other"
    opening.open()
    assert_answers(first.result(PATIENCE_S), "a")


def test_compute_time_counts_each_batch_once(serve) -> None:
    """`compute_ms` is the sum over a request's batches, however its texts were split."""
    served, _ = serve(settings={"max_batch_texts": 2, "clock": itertools.count().__next__, "request_timeout_s": 1e9})
    settled(served)
    answer = ask(served, "a", "b", "c", "d", "e", "f", timeout_s=1e6)
    assert answer.compute_ms == 1000 * served.stats.snapshot()["compute_s"]


def test_fewer_replicas_apply_under_load(serve) -> None:
    """A smaller `scaling.max` takes replicas away although work never ceases."""
    served, _ = serve(min=3, max=3)
    settled(served)
    served.update(model_spec(min=1, max=1))
    for number in range(1000):
        assert_answers(ask(served, f"text {number}"), f"text {number}")
        if len(served.replicas) == 1:
            break
    assert len(served.replicas) == 1


def test_an_error_in_being_told_of_readiness_opens_the_replica_anew(serve) -> None:
    """A take-over that the system has no thread for leaves no replica behind that requests would wait for."""
    failures = [RuntimeError("can't start new thread")]

    def on_ready(served: ServedModel) -> None:
        if failures:
            raise failures.pop()

    served, opener = serve(on_ready=on_ready)
    settled(served)
    assert_answers(ask(served, "a"), "a")
    assert len(opener.opened) == 2


def test_a_request_to_a_model_that_was_just_replaced_is_sent_on(serve) -> None:
    """Whatever state the old one is in, its caller looks the name up again."""
    served, _ = serve(OSError("no such file"), *[OSError("no such file")] * 10_000)
    settled(served)
    with pytest.raises(ModelFailed):
        ask(served, "a")
    served.close()
    with pytest.raises(QueueClosed):
        ask(served, "a")


def test_a_fault_of_our_own_opens_the_replica_anew(serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception outside the driver leaves no dead replica behind that requests would wait for."""
    failures = [RuntimeError("can't start new thread")]
    adjust = ReplicaSet._adjust

    def adjust_and_fail_once(self: ReplicaSet, replica: Any) -> None:
        if failures:
            raise failures.pop()
        adjust(self, replica)

    monkeypatch.setattr(ReplicaSet, "_adjust", adjust_and_fail_once)
    served, opener = serve()
    settled(served)
    assert_answers(ask(served, "a"), "a")
    assert len(opener.opened) == 2


def test_a_remote_services_new_batch_size_applies_at_once() -> None:
    """`max_batch_texts` is no load option, and the driver is given the rest of its configuration too."""
    place = Scripted()
    told: list[HttpConfig] = []
    place.configure = told.append
    spec = ModelSpec("m", DriverSpec("http", HttpConfig(base_url="http://x", normalize=False)))
    served = ServedModel(spec, settings_of(Opener(place), open_tokenizer=lambda spec, report: RemoteTokenizer()))
    served.start()
    try:
        settled(served)
        config = HttpConfig(base_url="http://x", normalize=False, max_batch_texts=1)
        served.update(dataclasses.replace(spec, driver=DriverSpec("http", config)))
        assert_answers(ask(served, "a", "b", "c"), "a", "b", "c")
        assert [len(call) for call in place.calls] == [1, 1, 1]
        assert told[-1] == config
    finally:
        served.drain(0)


def test_a_batch_is_planned_by_the_limits_that_hold_when_its_work_comes(serve) -> None:
    """A thread that waits for work when a limit changes does not go by the limit of before."""
    served, opener = serve(inflight=1)
    settled(served)
    (replica,) = served.replicas._replicas
    waiting = served.queue.not_empty._waiters  # type: ignore[attr-defined]
    assert any(waiting or threading.Event().wait(0.01) for _ in range(1000))
    replica.planner = Planner(1, 1000)  # as an update does, before it wakes the thread
    assert_answers(ask(served, "a", "b", "c"), "a", "b", "c")
    assert [len(call) for call in opener.opened[0].calls] == [1, 1, 1]


@pytest.mark.parametrize("inflight", [1, 2])
def test_a_model_that_is_stuck_says_so(serve, inflight: int) -> None:
    """When each of its threads is in a batch that has outlived any request, nobody waits for it; when they come back
    it serves again."""
    now = 1000.0
    gate = Gate()
    settings = {"clock": lambda: now, "request_timeout_s": 20, "max_batch_texts": 1}
    served, _ = serve(lambda: Scripted(gate), settings=settings, inflight=inflight)
    settled(served)
    asking = []
    for number in range(inflight):
        asking.append(in_thread(ask, served, f"text {number}"))
        gate.arrived()
        assert served.state == "ready"
    now += 19
    assert served.state == "ready"
    now += 2
    assert served.state == "failed"
    assert not served.is_serving
    assert "stuck" in served.snapshot()["last_error"]
    with pytest.raises(ModelFailed, match="stuck"):
        ask(served, "another")
    gate.open()
    for future in asking:
        with contextlib.suppress(DeadlineExceeded):
            future.result(PATIENCE_S)
    assert any(served.state == "ready" or threading.Event().wait(0.01) for _ in range(2000))  # its batch ends by itself
    assert served.snapshot()["last_error"] is None


def test_a_model_of_which_a_part_is_stuck_serves(serve) -> None:
    """One thread that is left is enough."""
    now = 1000.0
    gate = Gate()

    def hang(texts: list[str]) -> None:
        if texts == ["hang"]:
            gate()

    settings = {"clock": lambda: now, "request_timeout_s": 20, "max_batch_texts": 1}
    served, _ = serve(lambda: Scripted(hang), settings=settings, inflight=2)
    settled(served)
    hanging = in_thread(ask, served, "hang")
    gate.arrived()
    now += 100
    assert served.state == "ready"
    assert_answers(ask(served, "a"), "a")
    gate.open()
    with contextlib.suppress(DeadlineExceeded):
        hanging.result(PATIENCE_S)


def test_a_full_queue_that_will_be_waited_for_is_no_refusal(serve) -> None:
    """A caller that asks again has been refused nothing; any other has."""
    gate = Gate()
    served, _ = serve(lambda: Scripted(gate), settings={"max_batch_texts": 1}, max_size=1, inflight=1)
    settled(served)
    puts = puts_of(served)
    asking = [in_thread(ask, served, "runs")]
    gate.arrived()
    asking.append(in_thread(ask, served, "waits"))
    while served.queue.qsize() == 0:
        assert puts.acquire(timeout=PATIENCE_S)
    for is_patient, counted in ((True, {}), (False, {"overloaded": 1})):
        with pytest.raises(Overloaded):
            ask(served, "more", call={"is_patient": is_patient})
        assert served.stats.snapshot()["errors"] == counted
    gate.open()
    for future in asking:
        future.result(PATIENCE_S)


def test_a_changed_limit_gives_a_text_that_has_ended_processes_another_chance(serve) -> None:
    """What was too long or too large before may fit now."""

    class Mortal(Scripted):
        def run(self, batch):
            if "long" in batch.texts:
                self.lost = Loss("a batch took more than 1 s")
                raise ChildProcessError(self.lost.reason)
            return super().run(batch)

    served, opener = serve(*[Mortal() for _ in range(3)])
    settled(served)
    for _ in range(2):
        with pytest.raises(InferenceFailed, match="more than 1 s"):
            ask(served, "long")
    assert len(opener.opened) == 4
    served.update(model_spec(config={"batch_timeout_s": 100.0}))
    assert_answers(ask(served, "long"), "long")


@pytest.mark.parametrize("limit", [2, 513])
def test_a_limit_that_no_start_would_accept_is_not_followed(serve, limit: int) -> None:
    """An edit by hand meets what a registration and a restart meet: the model serves on as it was, and says why."""
    served, _ = serve()
    assert served.replicas.settled.wait(PATIENCE_S)
    served.update(model_spec(config={"max_seq_length": limit}))
    assert served.spec.driver.config.max_seq_length is None
    assert f"max_seq_length {limit}" in served.snapshot()["last_error"]
    served.update(model_spec(config={"max_seq_length": 8}))
    assert served.spec.driver.config.max_seq_length == 8
    assert served.snapshot()["last_error"] is None


def test_the_tokens_that_it_keeps_are_those_that_a_text_is_cut_to(serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the model's files promise more than it has positions, or than it keeps of any text, the least counts."""
    served, _ = serve()
    assert served.replicas.settled.wait(PATIENCE_S)
    for own, positions, most_kept, expected in ((1024, 512, None, 512), (64, 512, None, 64), (256, 512, 32, 32)):
        for name, value in (("default_max_tokens", own), ("max_tokens", positions), ("most_kept", most_kept)):
            monkeypatch.setattr(served.tokenizer(), name, value)
        assert served.known_max_tokens() == served.max_tokens() == expected


def test_a_replica_of_another_space_does_not_serve(serve) -> None:
    """Its files were replaced while the model was served: it says so, until the model is switched off and on."""
    first = Scripted(facts=Facts(space="a"))
    served, _ = serve(first, Scripted(facts=Facts(space="b")), Scripted(facts=Facts(space="a")))
    settled(served)
    assert ask(served, "x").space == served.snapshot()["space"] == "a"
    first.lose("killed")
    assert_answers(ask(served, "y"), "y")  # by the one that is as it was, after one that is not
    assert ask(served, "y").space == "a"
    assert "its files have changed" in str(served.replicas.last_error)
