from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from embedpool.config.edit import parse_registration
from embedpool.config.pool_yml import PoolFile
from embedpool.config.spec import ModelSpec, PoolSpec
from embedpool.config.watch import Watch
from embedpool.errors import (
    AliasConflict,
    EmbedpoolError,
    ModelDisabled,
    ModelExistsDifferently,
    ModelFailed,
    ModelNotFound,
    PoolFileInvalid,
    StorageError,
)
from embedpool.pool.pool import Pool
from embedpool.pool.settings import PoolSettings
from embedpool.reconcile import Reconciler
from embedpool.tasks.driver import Report
from tests.conftest import ask, fake_pool_yml, open_fake, settle

WAIT_S = 20


class Gate:
    """Holds the loading of models whose dim is `held` until it is opened."""

    def __init__(self) -> None:
        self.held: set[int] = set()
        self.entered = threading.Event()
        self.opened = threading.Event()
        self.loads: list[str] = []

    def open_place(self, spec: ModelSpec, memory: dict[str, Any], report: Report) -> Any:
        self.loads.append(spec.model)
        if spec.driver.config.dim in self.held:
            self.entered.set()
            assert self.opened.wait(WAIT_S)
        return open_fake(spec)


@pytest.fixture
def gate() -> Iterator[Gate]:
    made = Gate()
    yield made
    made.opened.set()


@pytest.fixture
def pool_settings(pool_settings: PoolSettings, gate: Gate) -> PoolSettings:
    return PoolSettings(gate.open_place, pool_settings.open_tokenizer, request_timeout_s=WAIT_S)


@pytest.fixture
def reconciler(tmp_path: Path, pool: Pool, gate: Gate) -> Reconciler:
    """A pool of one ready model `a`, of 8 dimensions."""
    file = PoolFile(tmp_path / "pool.yml")
    file.path.write_text("# by hand\n" + fake_pool_yml("model: a, driver: {type: fake, config: {dim: 8}}"))
    made = Reconciler(file, pool, load_timeout_s=WAIT_S)
    made.reload("start")
    settle(pool)
    return made


def spec(name: str, **more: Any) -> ModelSpec:
    return parse_registration({"model": name, "driver_type": "fake", **more})


def register(reconciler: Reconciler, made: ModelSpec, *, replace: bool = False, wait: bool = True) -> str:
    return reconciler.register(made, replace=replace, wait=wait)


def states(pool: Pool) -> dict[str, str]:
    return {served.spec.model: served.state for served in pool.models}


def dim(pool: Pool, name: str) -> int:
    return ask(pool, name, "text").width


def unchanged(
    reconciler: Reconciler, pool: Pool, action: Callable[[], object], error: type[EmbedpoolError]
) -> EmbedpoolError:
    """The action fails, and file and pool are as they were."""
    before = reconciler.pool_file.path.read_bytes(), states(pool), [s.spec for s in pool.models], pool.models
    with pytest.raises(error) as caught:
        action()
    assert (reconciler.pool_file.path.read_bytes(), states(pool), [s.spec for s in pool.models], pool.models) == before
    return caught.value


# --- following the file


def test_the_live_pool_becomes_what_the_file_says(reconciler: Reconciler, pool: Pool) -> None:
    """Models are added, changed and removed as the file was edited; the outcome is noted."""
    text = fake_pool_yml(
        "model: a, alias: x, driver: {type: fake, config: {dim: 8}}", "model: b", "model: c, enabled: false"
    )
    reconciler.pool_file.path.write_text(text)
    reconciler.on_file_change()
    settle(pool)
    assert states(pool) == {"a": "ready", "b": "ready", "c": "disabled"}
    assert dim(pool, "x") == 8
    reconciler.pool_file.path.write_text(fake_pool_yml("model: b"))
    assert reconciler.reload("by request").names == ["b"]
    with pytest.raises(ModelNotFound):
        dim(pool, "a")
    assert reconciler.last_reload is not None
    assert {k: reconciler.last_reload[k] for k in ("reason", "ok", "error")} == {
        "reason": "by request",
        "ok": True,
        "error": None,
    }
    assert reconciler.reloads == {"ok": 3}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "empty"),
        (b"version: 1\n", "models"),
        (b"models:\n  - model: a\n    drivr: {type: fake}\n", "line 3: models[0].drivr"),
        (b"models: [\n", "line 2"),
        (b"\xff", "cannot be read"),
        (b"models:\n  - {model: a, alias: 2024-13-45, driver: {type: fake}}\n", "pool.yml"),
        (None, "does not exist"),
    ],
)
def test_a_broken_file_keeps_the_old_pool_and_is_logged_once(
    reconciler: Reconciler, pool: Pool, caplog: pytest.LogCaptureFixture, content: bytes | None, says: str
) -> None:
    """The pool goes on; the fault is logged once however often it is met, and shown until the file is mended."""
    path = reconciler.pool_file.path
    good, before = path.read_bytes(), pool.models
    path.unlink() if content is None else path.write_bytes(content)
    for _ in range(3):
        reconciler.on_file_change()
    with pytest.raises(PoolFileInvalid):
        reconciler.reload("by request")
    assert pool.models == before
    assert dim(pool, "a") == 8
    assert reconciler.last_reload is not None
    assert not reconciler.last_reload["ok"]
    assert says in reconciler.last_reload["error"]
    assert caplog.text.count("pool.yml is not followed") == 1
    path.write_bytes(good)
    reconciler.on_file_change()
    assert (reconciler.last_reload["ok"], reconciler.last_reload["error"]) == (True, None)
    assert reconciler.reloads == {"ok": 2, "failed": 4}


def test_another_fault_is_logged_anew(reconciler: Reconciler, caplog: pytest.LogCaptureFixture) -> None:
    """Half-mended is a new fault, and the same fault after a good file is one too."""
    path = reconciler.pool_file.path
    good = path.read_text()
    for text in ("models: [\n", "models: {}\n", good, "models: {}\n"):
        path.write_text(text)
        reconciler.on_file_change()
    assert caplog.text.count("pool.yml is not followed") == 3


def test_a_changed_model_serves_until_its_successor_is_loaded(reconciler: Reconciler, pool: Pool, gate: Gate) -> None:
    """A hand edit that loads a model anew is followed without a gap, and following it does not wait for the load."""
    gate.held.add(16)
    text = reconciler.pool_file.content()
    reconciler.pool_file.path.write_text(text.replace("dim: 8", "dim: 16"))
    reconciler.on_file_change()
    assert gate.entered.wait(WAIT_S)
    assert dim(pool, "a") == 8
    reconciler.pool_file.path.write_text(text)  # thought better of it
    reconciler.on_file_change()
    gate.opened.set()
    assert dim(pool, "a") == 8


# --- registering


@pytest.mark.parametrize("minimum", [0, 1])
def test_a_registration_loads_before_it_writes(reconciler: Reconciler, pool: Pool, gate: Gate, minimum: int) -> None:
    """While the model loads the file does not name it and the lock is free; then it is written, adopted and ready."""
    gate.held.add(16)
    with ThreadPoolExecutor(1) as other:
        made = spec("z", alias="zz", min=minimum, driver_config={"dim": 16})
        registering = other.submit(register, reconciler, made)
        assert gate.entered.wait(WAIT_S)
        assert reconciler.pool_file.read().names == ["a"]
        assert states(pool) == {"a": "ready"}
        reconciler.set_alias("a", "x")  # another change passes meanwhile
        gate.opened.set()
        assert registering.result(WAIT_S) == "z"
    assert reconciler.pool_file.read().names == ["a", "x", "z", "zz"]
    assert states(pool) == {"a": "ready", "z": "ready"}
    assert dim(pool, "zz") == 16
    assert gate.loads == ["a", "z"]
    assert reconciler.pool_file.content().startswith("# by hand\n")


def test_a_registration_of_what_is_there_outlives_its_removal(reconciler: Reconciler, pool: Pool, gate: Gate) -> None:
    """It waits for a load that another command ends by removing the model: it was registered, so it succeeds."""
    gate.held.add(16)
    reconciler.register(made := spec("z", driver_config={"dim": 16}), replace=False, wait=False)
    assert gate.entered.wait(WAIT_S)
    waits = pool.find("z").require_loaded
    waiting = threading.Event()
    pool.find("z").require_loaded = lambda timeout_s: waiting.set() or waits(timeout_s)  # type: ignore[method-assign]
    with ThreadPoolExecutor(1) as other:
        registering = other.submit(register, reconciler, made)
        assert waiting.wait(WAIT_S)
        reconciler.unregister("z")
        gate.opened.set()
        assert registering.result(WAIT_S) == "z"
    assert states(pool) == {"a": "ready"}


@pytest.mark.parametrize("name", ["z", "a"])
def test_a_model_that_does_not_load_changes_nothing(reconciler: Reconciler, pool: Pool, name: str) -> None:
    """The reason is told; file and pool are as before, also when a model was to be replaced."""
    bad = spec(name, driver_config={"fault": "load"})
    error = unchanged(reconciler, pool, lambda: register(reconciler, bad, replace=True), ModelFailed)
    assert "fault: load" in error.message
    assert dim(pool, "a") == 8


def test_a_model_that_loads_too_long_changes_nothing(reconciler: Reconciler, pool: Pool, gate: Gate) -> None:
    """After the time-out the registration fails and says so."""
    gate.held.add(16)
    impatient = Reconciler(reconciler.pool_file, pool, load_timeout_s=0.01)
    made = spec("z", driver_config={"dim": 16})
    error = unchanged(reconciler, pool, lambda: register(impatient, made), ModelFailed)
    gate.opened.set()
    assert "not ready within" in error.message


@pytest.mark.parametrize(
    ("made", "error"),
    [
        (spec("a"), ModelExistsDifferently),
        (spec("z", alias="a"), AliasConflict),
    ],
)
def test_what_cannot_be_registered_is_refused_before_it_is_loaded(
    reconciler: Reconciler, pool: Pool, gate: Gate, made: ModelSpec, error: type[EmbedpoolError]
) -> None:
    """A conflict costs no load."""
    unchanged(reconciler, pool, lambda: register(reconciler, made), error)
    assert gate.loads == ["a"]


def test_the_same_registration_again_is_a_success_without_a_load(
    reconciler: Reconciler, pool: Pool, gate: Gate
) -> None:
    """Twice the same changes nothing."""
    before = reconciler.pool_file.path.read_bytes(), pool.models
    assert register(reconciler, spec("a", driver_config={"dim": 8})) == "a"
    assert (reconciler.pool_file.path.read_bytes(), pool.models) == before
    assert gate.loads == ["a"]


def test_a_replacement_keeps_serving_until_the_new_one_is_ready(reconciler: Reconciler, pool: Pool, gate: Gate) -> None:
    """No request fails or waits because a model is replaced."""
    gate.held.add(16)
    with ThreadPoolExecutor(1) as other:
        replacing = other.submit(register, reconciler, spec("a", driver_config={"dim": 16}), replace=True)
        assert gate.entered.wait(WAIT_S)
        assert dim(pool, "a") == 8
        gate.opened.set()
        replacing.result(WAIT_S)
    assert dim(pool, "a") == 16
    assert states(pool) == {"a": "ready"}


def test_a_replacement_that_loads_nothing_applies_at_once(reconciler: Reconciler, pool: Pool, gate: Gate) -> None:
    """A change beside what is loaded keeps the loaded model."""
    before = pool.models
    register(reconciler, spec("a", alias="x", queue_max_size=3, driver_config={"dim": 8}), replace=True)
    assert pool.models == before
    assert (pool.find("x").queue.maxsize, gate.loads) == (3, ["a"])


def test_without_waiting_the_model_is_written_and_loads_later(reconciler: Reconciler, pool: Pool, gate: Gate) -> None:
    """`wait=false` answers while the model loads."""
    gate.held.add(16)
    register(reconciler, spec("z", driver_config={"dim": 16}), wait=False)
    assert states(pool) == {"a": "ready", "z": "loading"}
    assert reconciler.pool_file.read().names == ["a", "z"]
    gate.opened.set()
    settle(pool)
    assert states(pool)["z"] == "ready"


def test_a_registration_that_waits_ends_with_a_ready_model_also_the_second_time(
    reconciler: Reconciler, pool: Pool, gate: Gate
) -> None:
    """Registering again what is still being loaded waits for that load: 200 means ready."""
    gate.held.add(16)
    made = spec("z", driver_config={"dim": 16})
    register(reconciler, made, wait=False)
    assert gate.entered.wait(WAIT_S)
    impatient = Reconciler(reconciler.pool_file, pool, load_timeout_s=0.01)
    with pytest.raises(ModelFailed, match="not ready within"):
        register(impatient, made)
    gate.opened.set()
    register(reconciler, made)
    assert states(pool)["z"] == "ready"


def test_a_disabled_model_is_registered_without_a_load(reconciler: Reconciler, pool: Pool, gate: Gate) -> None:
    """What is not served need not prove itself."""
    register(reconciler, spec("z", enabled=False, driver_config={"fault": "load"}))
    assert states(pool) == {"a": "ready", "z": "disabled"}
    assert gate.loads == ["a"]


def test_a_full_disk_leaves_the_pool_as_it_was(
    reconciler: Reconciler, pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What cannot be written is not served either, although it was loaded already."""

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    for action in (
        lambda: register(reconciler, spec("z")),
        lambda: reconciler.set_enabled("a", False),
        lambda: reconciler.set_alias("a", "x"),
        lambda: reconciler.unregister("a"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr("os.replace", full)
            unchanged(reconciler, pool, action, StorageError)
    assert dim(pool, "a") == 8


def test_a_change_is_refused_while_the_file_is_broken(reconciler: Reconciler, pool: Pool, gate: Gate) -> None:
    """A hand edit in progress is never overwritten; nothing is loaded for it."""
    reconciler.pool_file.path.write_text("models:\n  - model: half\n")
    for action in (
        lambda: register(reconciler, spec("z")),
        lambda: reconciler.set_enabled("a", False),
        lambda: reconciler.set_alias("a", "x"),
        lambda: reconciler.unregister("a"),
    ):
        unchanged(reconciler, pool, action, PoolFileInvalid)
    assert gate.loads == ["a"]


# --- the other changes


def test_a_model_is_switched_off_and_on(reconciler: Reconciler, pool: Pool) -> None:
    """By name or alias; `enable` ends with a ready model."""
    reconciler.set_alias("a", "x")
    assert reconciler.set_enabled("x", False) == "a"
    assert states(pool) == {"a": "disabled"}
    with pytest.raises(ModelDisabled):
        dim(pool, "a")
    assert reconciler.set_enabled("x", True) == "a"
    assert states(pool) == {"a": "ready"}
    assert dim(pool, "x") == 8


def test_a_model_that_cannot_be_loaded_stays_off(reconciler: Reconciler, pool: Pool) -> None:
    """`enable` fails with the reason and the file still says disabled."""
    register(reconciler, spec("z", enabled=False, driver_config={"fault": "load"}))
    error = unchanged(reconciler, pool, lambda: reconciler.set_enabled("z", True), ModelFailed)
    assert "fault: load" in error.message


def test_an_alias_works_at_once_and_leaves_at_once(reconciler: Reconciler, pool: Pool, gate: Gate) -> None:
    """Routes follow the file without a load."""
    assert reconciler.set_alias("a", "x") == "a"
    assert dim(pool, "x") == 8
    assert reconciler.set_alias("x", "y") == "a"
    with pytest.raises(ModelNotFound):
        dim(pool, "x")
    assert reconciler.set_alias("y", "") == "a"
    assert reconciler.pool_file.read().names == ["a"]
    assert gate.loads == ["a"]


def test_a_model_is_removed_by_either_name(reconciler: Reconciler, pool: Pool) -> None:
    """The answer is its name; afterwards file and pool know it no more."""
    reconciler.set_alias("a", "x")
    assert reconciler.unregister("x") == "a"
    assert states(pool) == {}
    assert reconciler.pool_file.read().names == []
    unchanged(reconciler, pool, lambda: reconciler.unregister("a"), ModelNotFound)


# --- many at once


def test_concurrent_registrations_all_end_ready(reconciler: Reconciler, pool: Pool, gate: Gate) -> None:
    """Each is loaded once, written, and served."""
    names = [f"m{i}" for i in range(8)]
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(lambda n: register(reconciler, spec(n, alias=f"{n}-x")), names)) == names
    assert states(pool) == dict.fromkeys(["a", *names], "ready")
    assert sorted(m.model for m in reconciler.pool_file.read().models) == sorted(["a", *names])
    assert sorted(gate.loads) == sorted(["a", *names])
    assert all(dim(pool, f"{n}-x") == 384 for n in names)


def test_the_same_registration_from_many_clients_is_one_model(reconciler: Reconciler, pool: Pool) -> None:
    """All succeed, one entry is written, and what was loaded in vain is dropped."""
    with ThreadPoolExecutor(6) as threads:
        assert list(threads.map(lambda _: register(reconciler, spec("z")), range(6))) == ["z"] * 6
    assert reconciler.pool_file.read().names == ["a", "z"]
    assert states(pool) == {"a": "ready", "z": "ready"}
    assert dim(pool, "z") == 384


def test_of_different_registrations_of_one_name_one_wins(reconciler: Reconciler, pool: Pool, gate: Gate) -> None:
    """The others are told so; file and pool agree on the winner."""
    gate.held.update(range(20, 24))  # so that none is written before all are under way

    def attempt(size: int) -> int | None:
        try:
            register(reconciler, spec("z", driver_config={"dim": size}))
        except ModelExistsDifferently:
            return None
        return size

    with ThreadPoolExecutor(4) as threads:
        attempts = [threads.submit(attempt, size) for size in range(20, 24)]
        assert gate.entered.wait(WAIT_S)
        gate.opened.set()
        won = [size for a in attempts if (size := a.result(WAIT_S))]
    assert len(won) == 1
    assert dim(pool, "z") == won[0]
    assert reconciler.pool_file.read().models[1] == spec("z", driver_config={"dim": won[0]})


def test_requests_never_fail_while_the_pool_is_changed(reconciler: Reconciler, pool: Pool) -> None:
    """A model that stays is served through every change of itself and of others."""
    stop = threading.Event()

    def ask() -> int:
        count = 0
        while not stop.is_set():
            assert dim(pool, "a") in (8, 9)
            count += 1
        return count

    with ThreadPoolExecutor(2) as threads:
        asking = [threads.submit(ask) for _ in range(2)]
        try:
            for size in (9, 8, 9):
                register(reconciler, spec("a", driver_config={"dim": size}), replace=True)
                register(reconciler, spec("z"))
                reconciler.set_alias("a", "x")
                reconciler.unregister("z")
        finally:
            stop.set()
        assert all(a.result(WAIT_S) for a in asking)


def test_a_file_that_is_put_back_right_after_a_change_is_followed(reconciler: Reconciler, pool: Pool) -> None:
    """The watch saw neither the change, which the server made itself, nor that it went."""
    path = reconciler.pool_file.path
    watch = Watch(path, reconciler.on_file_change, is_behind=reconciler.is_behind)
    backup = path.read_bytes()
    reconciler.register(parse_registration({"model": "new", "driver_type": "fake"}), replace=False, wait=True)
    assert pool.knows("new")
    path.write_bytes(backup)
    assert watch.check_once()
    assert not pool.knows("new")
    assert not watch.check_once()


def test_a_name_is_known_as_soon_as_the_file_has_it(reconciler: Reconciler, pool: Pool) -> None:
    """Another process has registered it and said so: a request here does not get 404 until the watch wakes up."""
    pool.catch_up = reconciler.catch_up
    reconciler.reload("start")
    with pytest.raises(ModelNotFound):
        pool.find("new")
    reconciler.pool_file.path.write_text(fake_pool_yml("model: new"))
    assert pool.find("new").replicas.settled.wait(WAIT_S)
    assert pool.find("new").state == "ready"


def test_an_unknown_name_changes_nothing(reconciler: Reconciler, pool: Pool) -> None:
    """Whatever the file has become: it is followed when it has come to rest, not because somebody asks for a name."""
    pool.catch_up = reconciler.catch_up
    reconciler.pool_file.path.write_text(fake_pool_yml("model: a"))
    reconciler.reload("start")
    for text in (fake_pool_yml("model: b"), "models: [", None):
        if text is None:
            reconciler.pool_file.path.unlink()
        else:
            reconciler.pool_file.path.write_text(text)
        with pytest.raises(ModelNotFound):
            pool.find("never")
        assert pool.find("a")
    assert reconciler.last_reload["reason"] == "start"


@pytest.mark.parametrize("text", ["nonsense: 1", "", None])
def test_a_process_born_beside_a_broken_file_serves_the_last_pool(
    reconciler: Reconciler, pool: Pool, tmp_path: Path, text: str | None
) -> None:
    """The copy of what was followed last; without one nothing could ever be applied."""
    last = PoolFile(tmp_path / "state" / "last.yml")
    path = reconciler.pool_file.path
    path.write_text(fake_pool_yml("model: a"))
    Reconciler(PoolFile(path), pool, last).begin()
    if text is None:
        path.unlink()
    else:
        path.write_text(text)
    pool.apply(PoolSpec())
    born = Reconciler(PoolFile(path), pool, last)
    born.begin()
    assert born.has_applied
    assert pool.find("a").spec.model == "a"
    assert born.last_reload is not None
    assert not born.last_reload["ok"]
    last.path.unlink()
    empty = Reconciler(PoolFile(path), pool, last)
    empty.begin()
    assert not empty.has_applied
