"""Names → models, permits, and the live pool following its spec."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from embedpool.config.spec import ModelSpec, PoolSpec
from embedpool.errors import (
    EmbedpoolError,
    ModelDisabled,
    ModelFailed,
    ModelLoading,
    ModelNotFound,
    Overloaded,
    ShuttingDown,
)
from embedpool.pool.pool import Pool
from embedpool.pool.served_model import ServedModel
from tests.pool.scripted import (
    A_WHILE_S,
    PATIENCE_S,
    Gate,
    Opener,
    Scripted,
    ask,
    assert_answers,
    in_thread,
    model_spec,
    puts_of,
    settings_of,
)


@pytest.fixture
def run() -> Iterator[Callable[..., tuple[Pool, Opener]]]:
    """A pool whose loads follow the script; stopped at the end, when every driver must have been closed."""
    made: list[tuple[Pool, Opener]] = []

    def begin(*script: Any, models: tuple[ModelSpec, ...] = (), settings: dict | None = None, **limits: Any):
        opener = Opener(*script)
        pool = Pool(settings_of(opener, **(settings or {})), **limits)
        made.append((pool, opener))
        if models:
            apply(pool, *models)
            for served in pool.models:
                assert served.replicas.settled.wait(PATIENCE_S)
        return pool, opener

    yield begin
    for pool, opener in made:
        pool.stop()
        for driver in opener.opened:
            assert driver.closed.wait(PATIENCE_S), "every driver is given back"


def snapshots(pool: Pool) -> list[dict[str, Any]]:
    return [served.snapshot() for served in pool.models]


def apply(pool: Pool, *models: ModelSpec) -> None:
    pool.apply(PoolSpec(models))


def changed(**spec: Any) -> ModelSpec:
    """The model `m` so that it must be loaded anew."""
    return model_spec(config={"delay_ms": 0.001}, **spec)


class Promotions:
    """Released each time a changed model has taken over."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._done = threading.Semaphore(0)
        promote = Pool._promote

        def promoted(pool: Pool, successor: ServedModel) -> None:
            promote(pool, successor)
            self._done.release()

        monkeypatch.setattr(Pool, "_promote", promoted)

    def wait(self) -> None:
        assert self._done.acquire(timeout=PATIENCE_S)


@pytest.fixture
def promotions(monkeypatch: pytest.MonkeyPatch) -> Promotions:
    return Promotions(monkeypatch)


# --- names and permits


def test_an_alias_moves_when_its_new_model_serves(run) -> None:
    """The old model answers under it until then, and is given back only then, although the file lists it no more."""
    loading = Gate()
    pool, opener = run(Scripted, lambda: loading() or Scripted(), models=(model_spec("a", alias="prod"),))
    apply(pool, model_spec("b", alias="prod"))
    loading.arrived()
    assert pool.find("prod").spec.model == "a"
    assert_answers(ask(pool, "x", model="prod"), "x")
    with pytest.raises(ModelNotFound):
        pool.find("a")
    assert not opener.opened[0].closed.is_set()
    loading.open()
    assert pool.find("b").replicas.settled.wait(PATIENCE_S)
    assert opener.opened[0].closed.wait(PATIENCE_S)
    assert pool.find("prod").spec.model == "b"


def test_an_alias_that_is_taken_back_leaves_its_new_model_waiting_for_nothing(run) -> None:
    """The old model is listed no more and nobody waits for it: it is given back."""
    loading = Gate()
    pool, opener = run(Scripted, lambda: loading() or Scripted(), models=(model_spec("a", alias="prod"),))
    apply(pool, model_spec("b", alias="prod"))
    loading.arrived()
    apply(pool, model_spec("b"))
    assert opener.opened[0].closed.wait(PATIENCE_S)
    with pytest.raises(ModelNotFound):
        pool.find("prod")
    loading.open()


def test_a_model_answers_to_its_name_and_its_alias(run) -> None:
    """Both names lead to the same model, and the answer carries the full name."""
    pool, _ = run(models=(model_spec(alias="short"), model_spec("org/other")))
    for name in ("m", "short"):
        result = ask(pool, "a", model=name)
        assert_answers(result, "a")
        assert result.model == "m"
    assert [served.spec.model for served in pool.models] == ["m", "org/other"]
    assert [entry["model"] for entry in snapshots(pool)] == ["m", "org/other"]


@pytest.mark.parametrize(("name", "hint"), [
    ("org/minilm-l7", "org/minilm-l6"), ("minilm-l6", "org/minilm-l6"), ("shrot", "short"), ("zzz", "known:"),
])  # fmt: skip
def test_an_unknown_name_lists_near_ones(run, name: str, hint: str) -> None:
    """A mistyped name is answered with the names it may have meant."""
    pool, _ = run(models=(model_spec("org/minilm-l6", alias="short", min=0),))
    with pytest.raises(ModelNotFound, match=hint):
        ask(pool, "a", model=name)


def test_an_empty_pool_says_so(run) -> None:
    """Without any model the answer says that none is registered."""
    pool, _ = run()
    with pytest.raises(ModelNotFound, match="no model is registered"):
        ask(pool, "a")
    assert pool.booted


def test_more_requests_than_permits_are_refused_at_once(run) -> None:
    """Requests beyond max_inflight_global are told to come back, and a permit is given back on every path."""
    gate = Gate()
    pool, _ = run(Scripted(gate), models=(model_spec(),), max_inflight_global=2)
    for _ in range(3):
        with pytest.raises(ModelNotFound):
            ask(pool, "a", model="nope")
    inside = [in_thread(ask, pool, "a")]
    gate.arrived()
    served = pool.find("m")
    puts = puts_of(served)
    inside.append(in_thread(ask, pool, "b"))
    assert puts.acquire(timeout=PATIENCE_S)
    with pytest.raises(Overloaded) as caught:
        ask(pool, "c")
    assert caught.value.retry_after_s > 0
    gate.open()
    for request in inside:
        request.result(PATIENCE_S)
    assert_answers(ask(pool, "c"), "c")


# --- following the spec


def test_a_new_model_is_loading_and_then_ready(run) -> None:
    """A model added while the server runs is routed at once and booted when its first load has ended."""
    gate = Gate()
    pool, _ = run(lambda: gate() or Scripted())
    apply(pool, model_spec())
    gate.arrived()
    assert not pool.booted
    with pytest.raises(ModelLoading):
        ask(pool, "a")
    gate.open()
    assert pool.find("m").replicas.settled.wait(PATIENCE_S)
    assert pool.booted
    assert_answers(ask(pool, "a"), "a")


def test_a_failed_first_load_boots_too(run) -> None:
    """One model that cannot be loaded keeps neither the others nor readiness waiting."""
    again = Gate()

    def fails() -> None:
        again()
        raise OSError("no such file")

    pool, _ = run(OSError("no such file"), fails, models=(model_spec(),))
    again.arrived()
    assert pool.booted
    with pytest.raises(ModelFailed, match="no such file"):
        ask(pool, "a")
    again.open()


def test_a_removed_model_answers_those_inside_and_is_closed(run) -> None:
    """Removing a model fails no request it has taken, and gives its memory back."""
    gate = Gate()
    driver = Scripted(gate)
    pool, _ = run(driver, models=(model_spec(),))
    inside = in_thread(ask, pool, "a")
    gate.arrived()
    apply(pool)
    with pytest.raises(ModelNotFound):
        ask(pool, "b")
    gate.open()
    assert_answers(inside.result(PATIENCE_S), "a")
    assert driver.closed.wait(PATIENCE_S)


def test_an_alias_moves_without_a_load(run) -> None:
    """Setting, moving and clearing an alias applies at once and loads nothing."""
    pool, opener = run(models=(model_spec(alias="x"), model_spec("other")))
    apply(pool, model_spec(), model_spec("other", alias="x"))
    assert ask(pool, "a", model="x").model == "other"
    apply(pool, model_spec(alias="y"), model_spec("other"))
    assert ask(pool, "a", model="y").model == "m"
    with pytest.raises(ModelNotFound):
        pool.find("x")
    assert len(opener.specs) == 2


def test_disabling_and_enabling(run) -> None:
    """A disabled model is known but switched off and holds no memory; enabled again it loads and serves."""
    pool, opener = run(models=(model_spec(),))
    apply(pool, model_spec(enabled=False))
    with pytest.raises(ModelDisabled):
        ask(pool, "a")
    assert opener.opened[0].closed.wait(PATIENCE_S)
    assert pool.booted
    apply(pool, model_spec())
    assert pool.find("m").replicas.settled.wait(PATIENCE_S)
    assert_answers(ask(pool, "a"), "a")


def test_a_changed_model_goes_on_until_its_successor_is_ready(run, promotions) -> None:
    """While a changed model loads, the old one answers, under a new alias too; then the new one takes over."""
    loading = Gate()
    pool, opener = run(Scripted, lambda: loading() or Scripted(), models=(model_spec(alias="x"),))
    old = pool.find("m")
    apply(pool, changed(alias="y"))
    loading.arrived()
    assert_answers(ask(pool, "a", model="y"), "a")
    assert snapshots(pool)[0]["successor"]["state"] == "loading"
    loading.open()
    promotions.wait()
    assert_answers(ask(pool, "b", model="y"), "b")
    assert [driver.calls for driver in opener.opened] == [[["a"]], [["b"]]]
    assert opener.opened[0].closed.wait(PATIENCE_S)
    assert pool.find("m") is not old
    assert "successor" not in snapshots(pool)[0]


@pytest.mark.parametrize("min_replicas", [0, 1])
def test_a_failing_successor_never_disturbs_and_is_tried_again(run, promotions, min_replicas: int) -> None:
    """A change that cannot be loaded leaves the old model serving and says why; once it can be, it takes over."""
    again = Gate()
    pool, _opener = run(
        Scripted, OSError("no such revision"), lambda: again() or Scripted(), models=(model_spec(min=1),)
    )
    apply(pool, changed(min=min_replicas))
    again.arrived()
    assert_answers(ask(pool, "a"), "a")
    assert snapshots(pool)[0]["state"] == "ready"
    assert "no such revision" in snapshots(pool)[0]["successor"]["last_error"]
    again.open()
    promotions.wait()
    assert pool.find("m").spec == changed(min=min_replicas)


def test_a_change_taken_back_keeps_the_old_model(run) -> None:
    """Taking a change back while it loads drops the successor; the model that serves never stops."""
    loading = Gate()
    successor = Scripted()
    pool, _ = run(Scripted, lambda: loading() or successor, models=(model_spec(),))
    old = pool.find("m")
    apply(pool, changed())
    loading.arrived()
    apply(pool, model_spec())
    loading.open()
    assert pool.find("m") is old
    assert_answers(ask(pool, "a"), "a")
    assert successor.closed.wait(PATIENCE_S)
    assert pool.find("m") is old


def test_a_request_inside_the_old_model_is_answered_by_it(run, promotions) -> None:
    """A large request that began before a change is answered whole by the model that took it."""
    gate = Gate()
    pool, opener = run(Scripted(gate), models=(model_spec(max_size=4),), settings={"max_batch_texts": 2})
    texts = [str(i) for i in range(20)]
    inside = in_thread(ask, pool, *texts)
    gate.arrived()
    apply(pool, changed())
    promotions.wait()
    gate.open()
    assert_answers(inside.result(PATIENCE_S), *texts)
    assert opener.opened[1].calls == []


def test_a_request_that_meets_a_closed_door_goes_to_the_successor(run, promotions) -> None:
    """A request that looked its model up just before a change is answered by the successor, not refused."""
    pool, opener = run(models=(model_spec(),))
    old = pool.find("m")
    admit = old.queue.admit

    def admit_after_the_change(items) -> int:
        old.queue.admit = admit
        apply(pool, changed())
        promotions.wait()
        while old.state != "draining":
            threading.Event().wait(0.001)
        return admit(items)

    old.queue.admit = admit_after_the_change
    assert_answers(ask(pool, "a"), "a")
    assert [driver.calls for driver in opener.opened] == [[], [["a"]]]


def test_a_change_while_the_model_is_opened_anew_refuses_nobody(run, promotions) -> None:
    """A model that is being reopened lets requests wait, also when its spec is changed just then."""
    reopening = Gate()

    def on_run(texts: list[str]) -> None:
        raise RuntimeError("out of order")

    broken = Scripted(on_run, on_probe=lambda: on_run([]))
    pool, _ = run(broken, *[lambda: reopening() or Scripted()] * 2, models=(model_spec(),))
    with pytest.raises(EmbedpoolError):
        ask(pool, "bad")
    reopening.arrived()
    apply(pool, changed())
    request = in_thread(ask, pool, "a")
    threading.Event().wait(A_WHILE_S)
    reopening.open()
    assert_answers(request.result(PATIENCE_S), "a")


# --- registration


def test_a_prepared_model_is_adopted_without_a_second_load(run) -> None:
    """A registration loads its model unrouted; once it is in the spec it serves at once."""
    pool, opener = run(models=(model_spec("other"),))
    with pool.prepared(model_spec(), PATIENCE_S):
        with pytest.raises(ModelNotFound):
            ask(pool, "a")
        apply(pool, model_spec("other"), model_spec(alias="x"))
        assert_answers(ask(pool, "a", model="x"), "a")
    assert_answers(ask(pool, "a"), "a")
    assert len(opener.specs) == 2


def test_a_prepared_change_replaces_the_old_model_at_once(run) -> None:
    """A replacement that is loaded already takes over when the spec says so, and the old one is closed."""
    pool, opener = run(models=(model_spec(),))
    with pool.prepared(changed(), PATIENCE_S):
        assert ask(pool, "a").model == "m"
        apply(pool, changed())
    assert_answers(ask(pool, "b"), "b")
    assert [driver.calls for driver in opener.opened] == [[["a"]], [["b"]]]
    assert opener.opened[0].closed.wait(PATIENCE_S)


@pytest.mark.parametrize("then", ["nothing", "other spec", "raise"])
def test_a_prepared_model_that_is_not_adopted_is_closed(run, then: str) -> None:
    """A registration that came to nothing leaves no model in memory and the pool as it was."""
    driver = Scripted()
    pool, _ = run(driver)
    try:
        with pool.prepared(model_spec(), PATIENCE_S):
            if then == "other spec":
                apply(pool, model_spec("other", min=0))
            if then == "raise":
                raise LookupError
    except LookupError:
        assert then == "raise"
    assert driver.closed.wait(PATIENCE_S)
    with pytest.raises(ModelNotFound):
        pool.find("m")


def test_an_adopted_model_that_is_removed_at_once_is_closed_once(run) -> None:
    """A registration followed at once by a removal leaves nothing behind."""
    driver = Scripted()
    pool, _ = run(driver)
    with pool.prepared(model_spec(), PATIENCE_S):
        apply(pool, model_spec())
        apply(pool)
    assert driver.closed.wait(PATIENCE_S)


@pytest.mark.parametrize("min_replicas", [0, 1])
def test_a_model_that_does_not_load_is_not_prepared(run, monkeypatch, min_replicas: int) -> None:
    """A registration of a model that cannot be loaded fails with the reason, also for a model of min 0."""
    require_loaded = ServedModel.require_loaded

    def require_a_little_later(self: ServedModel, timeout_s: float) -> None:
        replicas = self.replicas._replicas
        self.replicas.settled.wait(timeout_s)
        for replica in replicas:
            replica.threads[0].join(A_WHILE_S)  # so that a replica that would leave has left
        require_loaded(self, timeout_s)

    monkeypatch.setattr(ServedModel, "require_loaded", require_a_little_later)
    pool, _ = run(*[OSError("no such file")] * 10_000)
    with pytest.raises(ModelFailed, match="no such file"):
        with pool.prepared(model_spec(min=min_replicas), PATIENCE_S):
            pytest.fail("it was held to be loaded")


def test_a_model_of_which_one_replica_loads_is_prepared(run) -> None:
    """A registration waits until its model can serve, although its first replica failed."""
    slow = Gate()
    pool, _ = run(OSError("no memory"), *[lambda: slow() or Scripted()] * 2)
    states = []

    def register() -> None:
        with pool.prepared(model_spec(min=2, max=2), PATIENCE_S):
            states.extend(c.state for c in pool._candidates)

    registered = in_thread(register)
    slow.arrived()
    slow.arrived()
    threading.Event().wait(A_WHILE_S)
    slow.open()
    registered.result(PATIENCE_S)
    assert states == ["ready"]


def test_a_model_that_is_not_ready_in_time_is_not_prepared(run) -> None:
    """A registration gives up after its time and closes what is loaded later."""
    gate = Gate()
    pool, _opener = run(lambda: gate() or Scripted())
    with pytest.raises(ModelFailed, match="not ready within"):
        with pool.prepared(model_spec(), 0.01):
            pytest.fail("it was held to be loaded")
    gate.open()


# --- stop


def test_stop_answers_those_inside_within_its_grace(run) -> None:
    """Requests that end within the grace get their vectors; new ones are refused meanwhile."""
    gate = Gate()
    pool, opener = run(Scripted(gate), models=(model_spec(),))
    inside = in_thread(ask, pool, "a")
    gate.arrived()
    served = pool.find("m")
    stopped = in_thread(pool.stop, PATIENCE_S)
    while served.state != "draining":
        threading.Event().wait(0.001)
    with pytest.raises(ShuttingDown):
        ask(pool, "b")
    gate.open()
    assert_answers(inside.result(PATIENCE_S), "a")
    assert stopped.result(PATIENCE_S) == 0
    assert opener.opened[0].closed.is_set()


def test_stop_gives_the_rest_503_and_counts_it(run) -> None:
    """When the grace is over, those inside are told at once that the server stops, and are counted."""
    gate = Gate()
    pool, _ = run(Scripted(gate), models=(model_spec(),))
    inside = in_thread(ask, pool, "a")
    gate.arrived()
    stopped = in_thread(pool.stop)
    with pytest.raises(ShuttingDown):
        inside.result(PATIENCE_S)
    gate.open()
    assert stopped.result(PATIENCE_S) == 1
    apply(pool, model_spec())
    assert pool.models == []
    with pytest.raises(ShuttingDown):
        ask(pool, "a")
    assert pool.stop() == 0


def test_stop_counts_requests_inside_a_model_that_was_replaced(run, promotions) -> None:
    """A request inside the old model of a change gets 503 within the grace too, and is counted."""
    gate = Gate()
    pool, _ = run(Scripted(gate), models=(model_spec(),))
    inside = in_thread(ask, pool, "a")
    gate.arrived()
    apply(pool, changed())
    promotions.wait()
    stopped = in_thread(pool.stop)
    try:
        with pytest.raises(ShuttingDown):
            inside.result(3)
    finally:
        gate.open()
    assert stopped.result(2 * PATIENCE_S) == 1


def test_stop_ends_a_successor_that_is_loading(run) -> None:
    """A server may stop while a changed model loads; what is loaded then is closed."""
    loading = Gate()
    pool, opener = run(Scripted, lambda: loading() or Scripted(), models=(model_spec(),))
    apply(pool, changed())
    loading.arrived()
    stopped = in_thread(pool.stop)
    loading.open()
    assert stopped.result(PATIENCE_S) == 0
    assert all(driver.closed.is_set() for driver in opener.opened)


def test_stop_and_a_take_over_at_once_leave_nothing(run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stop in the very moment a successor takes over leaves no driver open."""
    stops = []
    drain = Pool._drain_in_background

    def drain_during_a_stop(self: Pool, served: ServedModel) -> None:
        if not stops:
            stops.append(in_thread(lambda: self.stop() or all(d.closed.is_set() for d in opener.opened)))
            threading.Event().wait(A_WHILE_S)  # it gets as far as it can
        drain(self, served)

    pool, opener = run(models=(model_spec(),))
    gate = Gate()
    opener.opened[0]._on_close = gate
    monkeypatch.setattr(Pool, "_drain_in_background", drain_during_a_stop)
    apply(pool, changed())
    gate.arrived()
    threading.Event().wait(A_WHILE_S)
    gate.open()
    assert stops[0].result(PATIENCE_S), "stopped while a driver was still open"


# --- any sequence

CONFIGS = st.sampled_from([{}, {"delay_ms": 0.01}, {"load_delay_ms": 1}])


def specs_of(name: str, aliases: list[str | None], enabled: st.SearchStrategy[bool], mins: list[int]):
    return st.builds(
        model_spec,
        name=st.just(name),
        alias=st.sampled_from(aliases),
        enabled=enabled,
        max_size=st.sampled_from([None, 50]),
        config=CONFIGS,
        min=st.sampled_from(mins),
        max=st.just(2),
        idle_ttl_s=st.sampled_from([0.001, 30]),
    )


KEPT = specs_of("m", [None, "x"], st.just(True), [1, 2])
OTHERS = st.lists(
    st.one_of(specs_of(name, [None, f"alias-of-{name}"], st.booleans(), [0, 1]) for name in ("b", "c")),
    max_size=2,
    unique_by=lambda spec: spec.model,
)
POOLS = st.lists(st.tuples(KEPT, OTHERS), min_size=1, max_size=6)
REFUSALS = (ModelNotFound, ModelLoading, ModelDisabled)


@settings(max_examples=25, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(first=KEPT, sequence=POOLS)
def test_any_sequence_of_specs_keeps_every_promise(first: ModelSpec, sequence) -> None:
    """Whatever changes follow each other: names lead where the last spec says, a model that stays answers every
    request rightly throughout, the others answer rightly or say why not, and nothing is left at the end."""
    opener = Opener()
    pool = Pool(settings_of(opener))
    over = threading.Event()

    def keep_asking(model: str) -> int:
        count = 0
        while not over.is_set():
            count += 1
            try:
                assert_answers(ask(pool, f"text {count}", "b", model=model), f"text {count}", "b")
            except REFUSALS:
                assert model != "m"
        return count

    try:
        apply(pool, first)
        assert pool.find("m").replicas.settled.wait(PATIENCE_S)
        asking = [in_thread(keep_asking, model) for model in ("m", "m", "b")]
        try:
            for kept, others in sequence:
                apply(pool, kept, *others)
                names = {name for spec in (kept, *others) for name in spec.names}
                assert set(pool._routes) == names
                assert {pool.find(name).spec.model for name in names} == {s.model for s in (kept, *others)}
                assert [served.spec.model for served in pool.models] == [kept.model, *(s.model for s in others)]
                assert_answers(ask(pool, "here"), "here")
        finally:
            over.set()
        assert all(request.result(PATIENCE_S) for request in asking)
    finally:
        over.set()
        assert pool.stop(PATIENCE_S) == 0
    assert all(driver.closed.wait(PATIENCE_S) for driver in opener.opened)
