"""A replica: opens its driver, serves, opens it anew when it breaks, leaves when it may."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Iterator

import pytest

from embedpool.config.spec import ModelSpec
from embedpool.errors import EmbedpoolError, InferenceFailed
from embedpool.pool import backoff
from embedpool.pool.model_queue import ModelQueue
from embedpool.pool.replica import Replica
from embedpool.pool.replica_set import ReplicaSet
from embedpool.pool.stats import ModelStats
from embedpool.tasks.driver import Loss
from tests.pool.scripted import PATIENCE_S, Asked, Gate, Opener, Scripted, broken_on, model_spec, settings_of


class Panic(BaseException):
    """As raised by libraries in Rust when they panic."""


class OneReplica(ReplicaSet):
    """A set of one replica, which remembers what became of it."""

    def __init__(self, opener: Opener, spec: ModelSpec, probe_idle_s: float | None) -> None:
        self.queue = ModelQueue(100)
        settings = settings_of(opener, max_batch_texts=4, max_batch_tokens=1000, probe_idle_s=probe_idle_s)
        super().__init__(spec, settings, self.queue, ModelStats())
        self.grown = 0
        self.states: list[str] = []
        self._changes = threading.Condition()
        self.start(1)
        (self.replica,) = self._replicas
        (self.lead,) = self.replica.threads[:1]

    def _grow(self) -> None:
        self.grown += 1

    def _replica_changed(self, replica: Replica) -> None:
        super()._replica_changed(replica)
        with self._changes:
            self.states.append(replica.state)
            self._changes.notify_all()

    def wait_for(self, *states: str) -> None:
        """Wait until the replica has been through exactly these states."""
        with self._changes:
            self._changes.wait_for(lambda: len(self.states) >= len(states), PATIENCE_S)
            assert self.states == list(states)

    def put(self, text: str) -> Asked:
        return Asked(text, timeout_s=1e12).admitted_to(self.queue)

    def tell_to_stop(self) -> None:
        """As `stop` does, without waiting."""
        self.replica.stopping.set()
        self.replica.leaving.set()
        self.queue.wake()

    def ended(self) -> bool:
        """Whether the replica's life ends."""
        self.lead.join(PATIENCE_S)
        return not self.lead.is_alive()


@pytest.fixture
def start() -> Iterator:
    """Start a replica; stopped at the end, when every place must have been closed."""
    started: list[tuple[OneReplica, Opener]] = []

    def begin(
        *script: object,
        probe_idle_s: float | None = None,
        inflight: int | None = None,
        needed: int = 1,
        idle_s: float = 30,
    ) -> tuple[Replica, OneReplica, Opener]:
        opener = Opener(*script)
        model = OneReplica(opener, model_spec(min=needed, idle_ttl_s=idle_s, inflight=inflight), probe_idle_s)
        started.append((model, opener))
        return model.replica, model, opener

    yield begin
    for model, opener in started:
        model.stop(PATIENCE_S)
        assert model.ended()
        assert model.replica.state == "closed"
        assert all(place.closed.is_set() for place in opener.opened)


def done(request: Asked) -> Exception | None:
    with contextlib.suppress(EmbedpoolError):
        request.wait(PATIENCE_S)
    return request.error


def test_it_loads_serves_and_closes(start) -> None:
    """A replica serves once its driver is open, and gives the driver back when it stops."""
    _replica, model, opener = start()
    assert done(model.put("a")) is None
    model.stop(PATIENCE_S)
    assert model.states == ["ready", "closed"]
    assert opener.opened[0].closed.is_set()
    assert model.grown == 1


def test_a_failed_load_is_tried_again(start) -> None:
    """A model that cannot be loaded is tried again with a growing delay, and serves what waited once it can."""
    replica, model, _opener = start(OSError("no file"), OSError("no file"), RuntimeError("no memory"))
    request = model.put("a")
    assert done(request) is None
    model.wait_for("failed", "failed", "failed", "ready")
    assert replica.last_error == "RuntimeError: no memory"


def test_it_goes_on_trying_for_days(start) -> None:
    """A remote that is down over a weekend is found again when it is back: thousands of failures end no replica."""
    gate = Gate()

    def down() -> Scripted:
        gate()
        raise OSError("down")

    replica, model, _opener = start(down)
    gate.arrived()
    replica.backoff.failures = 5000
    gate.open()
    model.wait_for("failed", "ready")


def test_a_broken_driver_is_opened_anew(start) -> None:
    """When the driver itself is at fault it is closed and opened again, and what waits is served then."""
    replica, model, opener = start(broken_on("bad"))
    assert isinstance(done(model.put("bad")), InferenceFailed)
    assert done(model.put("a")) is None
    assert model.states == ["ready", "failed", "ready"]
    assert opener.opened[0].closed.is_set()
    assert "out of order" in replica.last_error


def test_failures_in_a_row_count_until_a_batch_is_served(start) -> None:
    """Only batches earn trust: loading again after a break does not clear the count, a served batch does."""
    replica, model, _opener = start(broken_on("bad"), broken_on("bad"))
    for _ in range(2):
        assert isinstance(done(model.put("bad")), InferenceFailed)
    model.wait_for("ready", "failed", "ready", "failed", "ready")
    assert replica.backoff.failures == 2
    assert done(model.put("a")) is None
    model.stop(PATIENCE_S)
    assert replica.backoff.failures == 0


def test_a_round_that_only_dropped_work_earns_no_trust(start) -> None:
    """Work that was dropped because its client had gone says nothing about the driver's health."""
    replica, model, _opener = start(OSError("down"))
    request = Asked("a")
    request.abandoned = True
    request.admitted_to(model.queue)
    assert done(request) is not None
    model.stop(PATIENCE_S)
    assert replica.backoff.failures == 1


def test_several_batches_run_in_one_replica(start) -> None:
    """A driver that serves several batches at once gets them at once, from one load."""
    gate = Gate()
    _replica, model, opener = start(Scripted(gate), inflight=2)
    requests = [model.put("a")]
    gate.arrived()
    requests.append(model.put("b"))
    gate.arrived()
    gate.open()
    assert [done(request) for request in requests] == [None, None]
    assert len(opener.opened) == 1


def test_when_one_batch_finds_the_driver_broken_the_others_finish_first(start) -> None:
    """The driver is closed after the last batch that runs in it, and once."""
    gate = Gate()

    def on_run(texts: list[str]) -> None:
        if "slow" in texts:
            gate()
        if "bad" in texts:
            raise RuntimeError("out of order")

    def on_probe() -> None:
        raise RuntimeError("out of order")

    _replica, model, opener = start(Scripted(on_run, on_probe=on_probe), inflight=2)
    slow = model.put("slow")
    gate.arrived()
    assert isinstance(done(model.put("bad")), InferenceFailed)
    model.wait_for("ready", "failed")
    assert not opener.opened[0].closed.is_set()
    gate.open()
    assert done(slow) is None
    assert done(model.put("a")) is None
    assert len(opener.opened) == 2


def test_an_idle_replica_leaves_when_it_may(start) -> None:
    """A replica that is not needed closes its driver after its idle time."""
    _replica, model, _opener = start(idle_s=0.001, needed=0, inflight=2)
    assert model.ended()
    assert model.states == ["ready", "closed"]


def test_an_idle_replica_that_may_not_leave_stays(start) -> None:
    """A replica that is needed goes on serving whatever its idle time."""
    _replica, model, _opener = start(idle_s=0.001)
    for _ in range(3):
        assert done(model.put("a")) is None
    assert model.states == ["ready"]


def test_a_new_idle_time_is_never_missed(start, monkeypatch: pytest.MonkeyPatch) -> None:
    """A change of scaling that comes just before a replica begins to wait for work applies all the same."""
    timeout_of = OneReplica._idle_timeout_s

    def idle_timeout_s(self: OneReplica) -> float | None:
        before = timeout_of(self)
        if before is None:  # pool.yml changes in this very moment
            self.spec = model_spec(min=0, idle_ttl_s=0.001)
            self.queue.wake()
        return before

    monkeypatch.setattr(OneReplica, "_idle_timeout_s", idle_timeout_s)
    _, model, _ = start()
    assert model.ended()


def test_a_busy_replica_is_not_idle(start) -> None:
    """A batch that runs longer than the idle time keeps its replica."""
    gate, loading = Gate(), Gate()
    replica, model, _opener = start(lambda: loading() or Scripted(gate), idle_s=0.001, inflight=2, needed=0)
    request = model.put("a")
    loading.open()
    gate.arrived()
    assert replica.running
    assert model.states == ["ready"]
    gate.open()
    assert done(request) is None
    assert model.ended()


def test_a_stop_lets_the_batch_finish(start) -> None:
    """What runs when a replica is stopped still gets its vectors; what waits is left in the queue."""
    gate = Gate()
    _replica, model, _opener = start(Scripted(gate))
    running = model.put("a")
    gate.arrived()
    waiting = model.put("b")
    model.tell_to_stop()
    gate.open()
    assert done(running) is None
    assert model.ended()
    assert not waiting.is_done


def test_a_stop_during_the_back_off_does_not_wait_for_it(start, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that waits to be tried again can be stopped at once."""
    monkeypatch.setattr(backoff, "FIRST_S", 1000.0)
    monkeypatch.setattr(backoff, "LONGEST_S", 1000.0)
    _replica, model, _opener = start(OSError("down"))
    model.wait_for("failed")
    model.stop(PATIENCE_S)


def test_a_stop_during_the_load_closes_what_was_loaded(start) -> None:
    """A model stopped while it loads is given back when the load ends."""
    gate = Gate()

    def slow_load() -> Scripted:
        gate()
        return Scripted()

    _replica, model, opener = start(slow_load)
    gate.arrived()
    model.tell_to_stop()
    gate.open()
    assert model.ended()
    assert opener.opened[0].closed.is_set()


def test_a_driver_that_does_not_close_cleanly_ends_nothing(start, caplog) -> None:
    """An error while a broken driver is closed is logged, and the driver is opened anew all the same."""
    bad = broken_on("bad")
    bad.close = lambda: bad.closed.set() or 1 / 0
    _replica, model, _opener = start(bad)
    done(model.put("bad"))
    assert done(model.put("a")) is None
    assert "did not close cleanly" in caplog.text


@pytest.mark.parametrize("where", ["embed", "load"])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_panic_in_a_library_ends_no_replica(start, where: str) -> None:
    """What libraries in Rust raise when they panic is no Exception; the replica opens anew and serves all the same."""

    def panic(texts: list[str]) -> None:
        if "bad" in texts:
            raise Panic

    _replica, model, _opener = start(Scripted(panic) if where == "embed" else Panic())
    if where == "embed":
        assert isinstance(done(model.put("bad")), InferenceFailed)
    assert done(model.put("a")) is None


def test_a_driver_lost_while_nothing_runs_is_opened_anew_at_once(start) -> None:
    """Its state says so without a request, and the next request finds another."""
    replica, model, opener = start()
    model.wait_for("ready")
    opener.opened[0].lose("its process was ended by SIGKILL")
    model.wait_for("ready", "failed", "ready")
    assert replica.last_error == "its process was ended by SIGKILL"
    assert opener.opened[0].closed.is_set()
    assert done(model.put("a")) is None
    assert replica.backoff.failures == 0


def test_a_driver_lost_in_its_batches_is_opened_anew_and_serves_them(start) -> None:
    """All of its threads leave it; it has failed once, not once a thread; nobody gets an error."""
    gate = Gate()

    def on_run(texts: list[str]) -> None:
        gate()
        if driver.lost:
            raise ChildProcessError(driver.lost)

    driver = Scripted(on_run)
    _, model, opener = start(driver, inflight=2)
    requests = [model.put("a")]
    gate.arrived()
    requests.append(model.put("b"))
    gate.arrived()
    driver.lose("its process was ended by SIGKILL")
    gate.open()
    assert [done(request) for request in requests] == [None, None]
    assert model.states == ["ready", "failed", "ready"]
    assert driver.closed.is_set()
    assert len(opener.opened) == 2


def test_a_replica_without_work_is_tried_with_a_text(start) -> None:
    """A fault that no request has met shows all the same; and what works is left as it is."""
    probed = threading.Semaphore(0)
    driver = Scripted(on_probe=probed.release)
    _, model, _ = start(driver, probe_idle_s=0.005)
    for _ in range(3):
        assert probed.acquire(timeout=PATIENCE_S)
    assert model.states == ["ready"]

    def broken() -> None:
        raise RuntimeError("out of order")

    driver._on_probe = broken
    model.wait_for("ready", "failed", "ready")
    assert driver.closed.is_set()
    assert done(model.put("a")) is None


def test_a_probe_does_not_keep_an_idle_replica(start) -> None:
    """It is no work."""
    _replica, model, _ = start(probe_idle_s=0.001, idle_s=0.05, needed=0)
    assert model.ended()
    assert model.states == ["ready", "closed"]


def test_a_probe_that_hangs_is_seen(start) -> None:
    """A driver that never comes back from a probe is as stuck as one that never comes back from a batch."""
    gate = Gate()
    replica, _, _ = start(Scripted(on_probe=gate), probe_idle_s=0.001)
    gate.arrived()
    assert replica.running
    assert replica.stuck_s(0.0) > 0
    gate.open()


def test_a_replica_at_work_is_not_probed(start) -> None:
    """Its batches say how it is."""
    gate = Gate()
    driver = Scripted(gate, on_probe=lambda: pytest.fail("probed"))
    _replica, model, _ = start(driver, inflight=2)
    request = model.put("a")
    gate.arrived()
    model.settings = dataclasses.replace(model.settings, probe_idle_s=0.001)
    for _ in range(20):
        model.queue.wake()
    model.tell_to_stop()
    gate.open()
    model.stop(PATIENCE_S)
    assert done(request) is None
    assert driver.probes == 0


def test_a_batch_that_ends_driver_after_driver_is_no_failure_of_the_model(start) -> None:
    """Its texts are tried apart; meanwhile the model neither counts as failed nor waits before it is opened again."""

    def on_run(texts: list[str]) -> None:
        if "deadly" in texts:
            opener.opened[-1].lost = Loss("its process was ended by SIGSEGV")
            raise ChildProcessError("its process was ended by SIGSEGV")

    replica, model, opener = start(*[Scripted(on_run) for _ in range(8)])
    requests = [model.put(text) for text in ("a", "deadly", "b", "deadly", "c")]
    errors = [done(request) for request in requests]
    assert [type(error) for error in errors] == [type(None), InferenceFailed, type(None), InferenceFailed, type(None)]
    assert replica.backoff.failures == 0
