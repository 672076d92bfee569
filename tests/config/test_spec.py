from __future__ import annotations

import dataclasses
from datetime import date
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedpool.config.edit import parse_registration
from embedpool.config.spec import LocalStConfig, ModelSpec, PoolSpec, diff
from embedpool.errors import InvalidRequest


def spec(
    model: str = "m", driver_type: str = "fake", driver_config: dict[str, Any] | None = None, **more: Any
) -> ModelSpec:
    return parse_registration({"model": model, "driver_type": driver_type, "driver_config": driver_config, **more})


def refusal(**flat: Any) -> dict[str, str]:
    with pytest.raises(InvalidRequest) as caught:
        parse_registration({"model": "m", "driver_type": "fake", **flat})
    return caught.value.fields


# --- difference

pools = st.dictionaries(st.sampled_from("abcdef"), st.tuples(st.booleans(), st.integers(1, 3)), max_size=6).map(
    lambda d: PoolSpec(tuple(spec(name, enabled=on, max=top) for name, (on, top) in d.items()))
)


@given(pools, pools)
def test_applying_a_difference_to_the_old_gives_the_new(old: PoolSpec, new: PoolSpec) -> None:
    """added, changed and removed say all that is needed and nothing more."""
    change = diff(old, new)
    live = {m.model: m for m in old.models}
    for name in change.removed:
        del live[name]
    for m in change.added:
        assert m.model not in live
        live[m.model] = m
    for m in change.changed:
        assert live[m.model] != m
        live[m.model] = m
    assert live == {m.model: m for m in new.models}
    assert diff(old.models, new) == change
    assert any(dataclasses.astuple(change)) == (live != {m.model: m for m in old.models})


# --- names


def test_a_name_is_looked_up_before_an_alias() -> None:
    """Both find the model; an unknown name finds none."""
    pool = PoolSpec((spec("a", alias="x"), spec("b")))
    assert pool.find("a") is pool.find("x") is pool.models[0]
    assert pool.find("b") is pool.models[1]
    assert pool.find("nope") is None
    assert pool.names == ["a", "x", "b"]


@pytest.mark.parametrize("name", ["a", "0", "org/Model-1.5_x:y@z", "a" * 200, "12:30", "off"])
def test_a_good_name_is_taken(name: str) -> None:
    """Letters, digits and . _ : @ / - make a name of up to 200 characters; it is the same rule for an alias."""
    assert spec(name).model == name
    assert spec("other", alias=name).alias == name


@pytest.mark.parametrize("name", ["-a", ".a", "/a", "a b", "a\n", "a" * 201, "é", "a#b", "a?b", " a", 5, True])
def test_a_bad_name_is_refused(name: object) -> None:
    """Anything else is refused, for a name and for an alias."""
    assert list(refusal(model=name)) == ["model"]
    assert list(refusal(alias=name)) == ["alias"]


# --- what loads a model anew

OTHER_LOCAL: dict[str, Any] = {
    "max_seq_length": 7,
    "normalize": False,
    "dtype": "float16",
    "prompts": {"query": "q: "},
    "path": "/models/m",
    "revision": "main",
    "backend": "torch",
    "compute_dtype": "bfloat16",
    "profile": "fast",
    "device": "cuda",
    "trust_remote_code": True,
    "task": "embed",
    "isolation": "process",
    "max_rss_mb": 900,
    "batch_timeout_s": 5.0,
}
LOADS = {"path", "revision", "backend", "compute_dtype", "profile", "device", "trust_remote_code", "task", "isolation"}


@pytest.mark.parametrize("key", [f.name for f in dataclasses.fields(LocalStConfig)])
def test_only_the_listed_keys_of_a_local_model_load_it_anew(key: str) -> None:
    """A change of what the weights or their runtime are loads the model; every other change applies at once."""
    before = spec(driver_type="local_st")
    config = dataclasses.replace(before.driver.config, **{key: OTHER_LOCAL[key]})
    after = dataclasses.replace(before, driver=dataclasses.replace(before.driver, config=config))  # isolation: place
    assert after != before
    assert (after.load_key != before.load_key) == (key in LOADS)
    assert hash(after.load_key) is not None


def test_a_place_is_named_beside_the_driver_or_in_its_older_spelling() -> None:
    """Both mean the same and load the model anew; where nothing is said it is a thread."""
    assert [spec(**given).place for given in ({}, {"place": "thread"}, {"place": "process"})] == [
        "thread", "thread", "process",
    ]  # fmt: skip
    older = spec(driver_config={"isolation": "process"})
    assert older == spec(place="process") == spec(place="process", driver_config={"isolation": "process"})
    assert older.load_key != spec().load_key
    assert spec(place="thread") == spec() == spec(driver_config={"isolation": "thread"})


def test_a_place_that_cannot_be_is_refused() -> None:
    """One that contradicts the older spelling, one that there is not, and any for a remote service."""
    assert "contradicts" in refusal(place="process", driver_config={"isolation": "thread"})["place"]
    assert "must be one of thread, process" in refusal(place="moon")["place"]
    remote = refusal(place="process", driver_type="http", driver_config={"base_url": "http://h/embed"})
    assert "for local models" in remote["place"]


@pytest.mark.parametrize(
    "change",
    [
        {"alias": "x"},
        {"min": 0},
        {"max": 2},
        {"idle_ttl_s": 1.5},
        {"queue_max_size": 5},
        {"max_inflight_per_replica": 3},
        *({"driver_config": c} for c in ({"normalize": False}, {"dtype": "float16"}, {"prompts": {"a": "b"}})),
    ],
    ids=str,
)
def test_a_change_beside_the_driver_never_loads_anew(change: dict[str, Any]) -> None:
    """Alias, scaling, queue and the form of the output apply at once, whatever the driver."""
    assert spec(**change).load_key == spec().load_key
    remote = {"base_url": "http://h/embed"}
    changed = {**change, "driver_config": {**remote, **change.get("driver_config", {})}}
    assert spec(driver_type="http", **changed).load_key == spec(driver_type="http", driver_config=remote).load_key


@pytest.mark.parametrize("other", [spec("n"), spec(driver_type="local_st"), spec(driver_config={"dim": 3})])
def test_another_model_or_driver_is_loaded_anew(other: ModelSpec) -> None:
    """Name and driver type decide what is loaded."""
    assert other.load_key != spec().load_key


# --- what a driver's config may hold


TEMPLATE = {"protocol": "template", "request": {"q": "{texts}"}, "vectors": "data[].embedding"}


@pytest.mark.parametrize("further", [
    {}, {"vectors": "[]"}, {"vectors": "a.b-c[].d[].e"}, {"request": {"a": [{"b": "{text}"}]}},
    {"request": {"a": {"b": ["{text}"]}}}, {"request": {"q": "{text}"}, "max_batch_texts": 1},
    {"request": {"a": ["query: {text}"], "b": None}},
], ids=str)  # fmt: skip
def test_a_service_may_be_described(further: dict[str, Any]) -> None:
    """A body with a place for the texts, and where the vectors stand; another body loads the model anew."""
    described = spec(driver_type="http", driver_config={"base_url": "http://h", **TEMPLATE, **further})
    other = {"base_url": "http://h", **TEMPLATE, **further, "request": {"r": "{texts}"}}
    assert described.load_key != spec(driver_type="http", driver_config=other).load_key


@pytest.mark.parametrize(
    ("driver_type", "config", "path"),
    [
        ("http", {}, "base_url"),
        ("http", {"base_url": "localhost:5000"}, "base_url"),
        ("http", {"base_url": "ftp://h"}, "base_url"),
        ("http", {"base_url": "http://"}, "base_url"),
        ("http", {"base_url": "http://h", "protocol": "soap"}, "protocol"),
        ("http", {"base_url": "http://h", "proxy": "proxy:3128"}, "proxy"),
        ("http", {"base_url": "http://h", "proxy": "http://user:password@proxy"}, "proxy"),
        ("http", {"base_url": "http://h", "timeout_s": 0}, "timeout_s"),
        ("http", {"base_url": "http://h", "max_batch_chars": 0}, "max_batch_chars"),
        ("http", {"base_url": "http://h", "request": {"q": "{texts}"}}, "request"),
        ("http", {"base_url": "http://h", "vectors": "data"}, "vectors"),
        ("http", {"base_url": "http://h", "protocol": "template", "vectors": "[]"}, "request"),
        ("http", {"base_url": "http://h", "protocol": "template", "request": {"q": "{texts}"}}, "vectors"),
        ("http", {"base_url": "http://h", **TEMPLATE, "request": {"q": "{text}"}}, "request"),
        ("http", {"base_url": "http://h", **TEMPLATE, "request": {"q": ["{text}", "b"]}}, "request"),
        ("http", {"base_url": "http://h", **TEMPLATE, "vectors": "$.data[*]"}, "vectors"),
        ("http", {"base_url": "http://h", **TEMPLATE, "request": {"q": [{"{text}": 1}]}}, "request"),
        ("http", {"base_url": "http://h", **TEMPLATE, "request": {"q": "a"}, "max_batch_texts": 1}, "request"),
        ("http", {"base_url": "http://h", **TEMPLATE, "request": {"q": "{texts}", "d": date(2024, 1, 1)}}, "request"),
        ("http", {"base_url": "http://h", **TEMPLATE, "request": {"q": "{texts}", "d": {1: 2, "a": 3}}}, "request"),
        ("http", {"base_url": "http://h", **TEMPLATE, "request": {"q": "{texts}", "d": float("nan")}}, "request"),
        ("http", {"base_url": "http://h", "retries": -1}, "retries"),
        ("http", {"base_url": "http://h", "api_key": "sk-123"}, "api_key"),
        ("http", {"base_url": "http://h", "api_key": "HOME"}, "api_key"),
        ("http", {"base_url": "http://h", "headers": {"X-Key": "sk-123"}}, "headers"),
        ("local_st", {"path": "models/m"}, "path"),
        ("local_st", {"backend": "tensorflow"}, "backend"),
        ("local_st", {"dtype": "float64"}, "dtype"),
        ("local_st", {"max_seq_length": 0}, "max_seq_length"),
        ("local_st", {"trust_remote_code": "yes"}, "trust_remote_code"),
        ("local_st", {"prompts": {"query": 1}}, "prompts.query.value"),
        ("local_st", {"base_url": "http://h"}, "base_url"),
        ("fake", {"fault": "all"}, "fault"),
    ],
)
def test_a_bad_driver_config_names_its_key(driver_type: str, config: dict[str, Any], path: str) -> None:
    """Each driver type has its own keys; secrets are given by the name of an EMBEDPOOL_SECRET_ variable only."""
    assert list(refusal(driver_type=driver_type, driver_config=config)) == [f"driver_config.{path}"]


def test_a_refused_secret_is_not_repeated() -> None:
    """Whoever put the key itself into the file does not find it in the log as well."""
    found = refusal(
        driver_type="http", driver_config={"base_url": "http://h", "api_key": "sk-1234", "headers": {"X": "sk-1234"}}
    )
    assert len(found) == 2
    assert "sk-1234" not in str(found)


def test_secrets_are_taken_by_name() -> None:
    """The variable's name is what the spec holds."""
    config: Any = spec(
        driver_type="http",
        driver_config={
            "base_url": "https://h/v1",
            "api_key": "EMBEDPOOL_SECRET_A",
            "headers": {"X-Key": "EMBEDPOOL_SECRET_B"},
        },
    ).driver.config
    assert (config.api_key, config.headers) == ("EMBEDPOOL_SECRET_A", {"X-Key": "EMBEDPOOL_SECRET_B"})


@pytest.mark.parametrize("flat", [{"min": 4}, {"min": 3, "max": 2}])
def test_more_replicas_are_never_kept_than_there_may_be(flat: dict[str, int]) -> None:
    """`min` above `max` is refused, or raises `max` where that was left to its default."""
    try:
        scaling = spec(**flat).scaling
    except InvalidRequest:
        return
    assert scaling.min == flat["min"] <= scaling.max
