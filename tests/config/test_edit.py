from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedpool.config import edit
from embedpool.config.spec import ModelSpec, PoolSpec, QueueSpec, Resources, Scaling
from embedpool.errors import AliasConflict, EmbedpoolError, InvalidRequest, ModelExistsDifferently, ModelNotFound


def spec(model: str, **more: Any) -> ModelSpec:
    return edit.parse_registration({"model": model, "driver_type": "fake", **more})


POOL = PoolSpec((spec("org/a", alias="a"), spec("org/b"), spec("c", enabled=False)))


# --- a registration is flat


def test_a_flat_registration_lands_in_the_right_places() -> None:
    """Every key of a registration has its place in an entry of pool.yml."""
    flat = {
        "model": "m",
        "alias": "x",
        "place": "ray",
        "resources": {"num_cpus": 2, "custom": {"fast": 1}},
        "enabled": False,
        "driver_type": "fake",
        "driver_config": {"dim": 3},
        "min": 0,
        "max": 2,
        "idle_ttl_s": 5,
        "queue_max_size": 7,
        "max_inflight_per_replica": 4,
    }
    assert set(flat) == set(edit.REGISTRATION_KEYS)
    made: Any = edit.parse_registration(flat)
    assert (made.model, made.alias, made.enabled, made.driver.type, made.driver.config.dim) == (
        "m",
        "x",
        False,
        "fake",
        3,
    )
    assert (made.place, made.resources) == ("ray", Resources(2, custom={"fast": 1}))
    assert made.scaling == Scaling(0, 2, 5)
    assert made.queue == QueueSpec(7, 4)


@pytest.mark.parametrize("key", sorted(set(edit.REGISTRATION_KEYS) - {"model", "driver_type"}))
def test_null_in_a_registration_means_absent(key: str) -> None:
    """Clients send null for what they leave open."""
    assert spec("m", **{key: None}) == spec("m")


@pytest.mark.parametrize("alias", ["", None, "m"])
def test_an_empty_alias_or_the_own_name_is_no_alias(alias: str | None) -> None:
    """A model needs no second name that is its first."""
    assert spec("m", alias=alias).alias is None


@pytest.mark.parametrize(
    ("flat", "paths"),
    [
        ({}, {"model", "driver_type"}),
        ({"model": "m", "driver_type": "nope"}, {"driver_type"}),
        ({"model": "m", "driver_type": "fake", "min": "1"}, {"min"}),
        ({"model": "m", "driver_type": "fake", "max": 0, "idle_ttl_s": -1}, {"max", "idle_ttl_s"}),
        ({"model": "m", "driver_type": "fake", "queue_max_size": True}, {"queue_max_size"}),
        ({"model": "m", "driver_type": "fake", "max_inflight_per_replica": 1.5}, {"max_inflight_per_replica"}),
        ({"model": "m", "driver_type": "fake", "driver_config": "x"}, {"driver_config"}),
        ({"model": "m", "driver_type": "fake", "driver_config": {"dimm": 3}}, {"driver_config.dimm"}),
        ({"model": "m m", "driver_type": "fake", "enabled": "yes"}, {"model", "enabled"}),
    ],
)
def test_a_bad_registration_names_the_keys_the_client_sent(flat: dict[str, Any], paths: set[str]) -> None:
    """Paths of errors are those of the flat request, not of the file it becomes."""
    with pytest.raises(InvalidRequest) as caught:
        edit.parse_registration(flat)
    assert set(caught.value.fields) == paths
    assert all(path in caught.value.message for path in paths)


# --- each change is a function


def test_a_new_model_comes_last_and_the_old_pool_is_untouched() -> None:
    """A change gives a new pool and leaves the one it was given as it was."""
    before = POOL.models
    assert edit.register(POOL, spec("z")).models == (*before, spec("z"))
    assert POOL.models is before


def test_the_same_registration_again_is_a_success() -> None:
    """Registering the same thing twice changes nothing, also with `replace`."""
    for replace in (False, True):
        assert edit.register(POOL, spec("org/a", alias="a"), replace=replace) == POOL


def test_a_different_spec_under_a_known_name_needs_replace() -> None:
    """Nothing is overwritten by mistake; the error says how to mean it. A replaced model keeps its place."""
    new = spec("org/a", max=3)
    with pytest.raises(ModelExistsDifferently, match="replace"):
        edit.register(POOL, new)
    assert edit.register(POOL, new, replace=True).models == (new, *POOL.models[1:])


@pytest.mark.parametrize(
    "taken",
    [
        lambda: edit.register(POOL, spec("a")),
        lambda: edit.register(POOL, spec("z", alias="a")),
        lambda: edit.register(POOL, spec("z", alias="org/b")),
        lambda: edit.register(POOL, spec("org/b", alias="a"), replace=True),
        lambda: edit.set_alias(POOL, "org/b", "a"),
        lambda: edit.set_alias(POOL, "org/b", "c"),
    ],
)
def test_a_name_belongs_to_one_model(taken: Any) -> None:
    """Names and aliases are unique together; the error names the owner."""
    with pytest.raises(AliasConflict, match=r"org/a|org/b|'c'"):
        taken()


def test_an_alias_can_be_given_moved_and_taken_away() -> None:
    """By name or by alias; null, "" and the own name clear it; the same alias again is no change."""
    assert edit.set_alias(POOL, "org/b", "b").find("b") == spec("org/b", alias="b")
    assert edit.set_alias(POOL, "a", "a") == POOL
    assert edit.set_alias(POOL, "a", "x").names == ["org/a", "x", "org/b", "c"]
    for nothing in (None, "", "org/a"):
        assert edit.set_alias(POOL, "a", nothing).models[0].alias is None


@pytest.mark.parametrize("alias", ["-x", "a b", "x" * 201, "x\n"])
def test_a_bad_alias_is_refused(alias: str) -> None:
    """An alias follows the rule of names."""
    with pytest.raises(InvalidRequest) as caught:
        edit.set_alias(POOL, "org/b", alias)
    assert list(caught.value.fields) == ["alias"]


def test_enable_and_disable_change_only_that() -> None:
    """Switching goes by name or alias and is idempotent."""
    off = edit.set_enabled(POOL, "a", False)
    assert off.models == (spec("org/a", alias="a", enabled=False), *POOL.models[1:])
    assert edit.set_enabled(off, "org/a", True) == POOL
    assert edit.set_enabled(POOL, "c", False) == POOL


def test_unregister_removes_one_model() -> None:
    """By name or alias; its names are free afterwards."""
    assert edit.unregister(POOL, "a").names == ["org/b", "c"]
    assert edit.unregister(POOL, "org/a") == edit.unregister(POOL, "a")
    assert edit.register(edit.unregister(POOL, "a"), spec("a")).names == ["org/b", "c", "a"]


@pytest.mark.parametrize(
    "change",
    [
        lambda name: edit.find(POOL, name),
        lambda name: edit.set_alias(POOL, name, "x"),
        lambda name: edit.set_enabled(POOL, name, True),
        lambda name: edit.unregister(POOL, name),
    ],
)
def test_an_unknown_name_lists_near_ones(change: Any) -> None:
    """No such model: the message offers the names that resemble it."""
    with pytest.raises(ModelNotFound, match="did you mean org/b"):
        change("org/bb")


names = st.sampled_from(["a", "b", "c", "org/a"])
changes = st.one_of(
    st.builds(
        lambda m, a, on, r: lambda p: edit.register(p, spec(m, alias=a, enabled=on), replace=r),
        names,
        st.none() | names,
        st.booleans(),
        st.booleans(),
    ),
    st.builds(lambda m, a: lambda p: edit.set_alias(p, m, a), names, st.none() | names),
    st.builds(lambda m, on: lambda p: edit.set_enabled(p, m, on), names, st.booleans()),
    st.builds(lambda m: lambda p: edit.unregister(p, m), names),
)


@given(st.lists(changes, max_size=12))
def test_names_stay_unique_under_any_changes(steps: list[Any]) -> None:
    """After any sequence of changes a name or alias leads to exactly one model; a refused change changes nothing."""
    pool = PoolSpec()
    for step in steps:
        before = pool
        try:
            pool = step(pool)
        except EmbedpoolError:
            assert pool == before
        assert len(set(pool.names)) == len(pool.names)
        assert all(name in m.names for m in pool.models for name in m.names if pool.find(name) is m)
        assert all(pool.find(name) is m for m in pool.models for name in m.names)
