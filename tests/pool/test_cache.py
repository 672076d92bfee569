"""A row that comes from the cache is the row that would be computed, whatever has changed since."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from embedpool import tracing
from embedpool.config.spec import DriverSpec, FakeConfig, ModelSpec, PoolSpec
from embedpool.drivers.fake import FakeTokenizer
from embedpool.errors import InferenceFailed
from embedpool.pool.cache import ENTRY_BYTES, Cache, scope_of
from embedpool.pool.pool import Pool
from embedpool.pool.request import Call, Known, Result
from embedpool.tasks.driver import Facts
from embedpool.tasks.embed import Embed
from embedpool.tasks.item import KEY_BYTES, Batch, Item
from embedpool.tasks.rows import Answer, Rows
from embedpool.tasks.score import Classify, Rerank, ScoreOptions
from embedpool.tasks.task import Task
from tests.conftest import settle, wait_until
from tests.pool.scripted import PATIENCE_S, Gate, Opener, Scripted, ask, in_thread, model_spec, settings_of, vectors_of

DIM = 4
TASKS = ("embed", "rerank", "classify")
MEMORY = 1_000_000


class Seeded(Scripted):
    """Rows that are decided by a seed, the task, the options and the ids, as a real model's are."""

    def __init__(self, seed: object, facts: Facts, fails: Callable[[], bool] = lambda: False) -> None:
        super().__init__(facts=facts)
        self.seed, self._fails = seed, fails
        self.computed = 0

    def run(self, batch: Batch) -> Answer:
        if self._fails():
            raise RuntimeError("cannot bear it")
        self.computed += len(batch.items)
        rows = [row_of(self.seed, batch, item) for item in batch.items]
        return Answer(Rows(np.stack(rows)))


def row_of(seed: object, batch: Batch, item: Item) -> np.ndarray:
    facts = (seed, batch.task, sorted(batch.options.items()), list(item.ids or ()), item.second)
    drawn = np.random.default_rng(list(repr(facts).encode()))
    return drawn.standard_normal(DIM, dtype=np.float32)


def facts_of(space: str, runtime: str = "numpy 2", **more: Any) -> Facts:
    return Facts(dict.fromkeys(TASKS, DIM), space, runtime=runtime, cacheable=True, **more)


def seeded(space: str, runtime: str = "numpy 2", **more: Any) -> Seeded:
    return Seeded((space, runtime), facts_of(space, runtime), **more)


class Versatile(FakeTokenizer):
    """Of a model that can do everything."""

    def __init__(self) -> None:
        super().__init__()
        self.tasks = TASKS


def pool_of(*script: Any, cache: Cache | None = None, **given: Any) -> tuple[Pool, Opener]:
    opener = Opener(*script)
    made = Pool(
        settings_of(
            opener, cache=Cache(MEMORY) if cache is None else cache, open_tokenizer=lambda s, r: Versatile(), **given
        )
    )
    return made, opener


@pytest.fixture
def cached() -> Iterator[tuple[Pool, Seeded]]:
    """A pool whose one model, m, is cached."""
    place = seeded("a")
    pool, _ = pool_of(place)
    pool.apply(PoolSpec((model_spec(),)))
    settle(pool)
    yield pool, place
    pool.stop()


def test_a_text_is_computed_once(cached: tuple[Pool, Seeded]) -> None:
    """The second answer is equal in everything but time."""
    pool, place = cached
    first = ask(pool, "a", "b b", "a")
    second = ask(pool, "b b", "c", "a")
    assert place.computed == 3
    assert (first.cached, second.cached) == (0, 2)
    assert second.vectors[[2, 0]].tobytes() == first.vectors[[0, 1]].tobytes()
    assert (first.tokens, second.tokens) == (3 + 4 + 3, 4 + 3 + 3)
    assert (second.space, second.width, second.truncated) == (first.space, first.width, first.truncated)
    counters = pool.models[0].snapshot()["counters"]
    assert (counters["cache_hits"], counters["cache_misses"], counters["texts"], counters["tokens"]) == (2, 4, 6, 20)


def test_a_hit_waits_for_no_replica() -> None:
    """Not even for one that must be loaded first."""
    pool, _ = pool_of(seeded("a"), seeded("a"))
    pool.apply(PoolSpec((model_spec(min=0, idle_ttl_s=0.02),)))
    before = ask(pool, "a")
    served = pool.models[0]
    settle(pool)
    wait_until(lambda: served.state == "idle")
    assert ask(pool, "a").vectors.tobytes() == before.vectors.tobytes()
    assert served.state == "idle"
    pool.stop()


FORMS: list[dict[str, Any]] = [{}, {"normalize": True}, {"dimensions": 2}, {"precision": "int8"}, {"dtype": "float16"}]


@pytest.mark.parametrize("form", FORMS)
def test_one_entry_serves_every_form(cached: tuple[Pool, Seeded], form: dict[str, Any]) -> None:
    """Whatever is made of the row afterwards: an entry is the row before that."""
    pool, place = cached
    ask(pool, "a", dimensions=3, normalize=True)
    found = ask(pool, "a", **form)
    assert (found.cached, place.computed) == (1, 1)
    assert found.vectors.tobytes() == ask(pool, "a", **form, call={"reads_cache": False}).vectors.tobytes()


# What decides a row, each with two requests that differ in nothing else. Each must fail if the key leaves it out.
DIFFERENT: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "prompt": ({}, {"prompt": "x "}),
    "limit": ({}, {"max_seq_length": 4}),
    "side": ({"max_seq_length": 4}, {"max_seq_length": 4, "truncate": "left"}),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_what_decides_a_row_decides_its_key(cached: tuple[Pool, Seeded], name: str) -> None:
    pool, _ = cached
    one, other = DIFFERENT[name]
    text = "a b c d e f"
    first, second = ask(pool, text, **one), ask(pool, text, **other)
    assert (second.cached, np.array_equal(first.vectors, second.vectors)) == (0, False)
    fresh = ask(pool, text, **other, call={"reads_cache": False})
    assert second.vectors.tobytes() == fresh.vectors.tobytes()


def test_the_task_decides(cached: tuple[Pool, Seeded]) -> None:
    """A pair that was reranked has not been classified."""
    pool, place = cached

    def hits(task: Task) -> int:
        return pool.submit("m", task, Call(pool.clock(), PATIENCE_S)).cached

    pair, options = [("a", "b")], ScoreOptions()
    assert [hits(Rerank(pair, options)), hits(Classify(pair, options)), place.computed] == [0, 0, 2]
    assert [hits(Rerank(pair, options)), hits(Classify(pair, options)), place.computed] == [1, 1, 2]


@pytest.mark.parametrize("change", ["space", "runtime"])
def test_a_changed_model_finds_nothing_of_the_old_one(change: str) -> None:
    """Other files under the same name, or the same files on another runtime or in another type."""
    after = seeded("b") if change == "space" else seeded("a", "numpy 3")
    pool, _ = pool_of(seeded("a"), after)
    pool.apply(PoolSpec((model_spec(config={"labels": 2}),)))
    settle(pool)
    before = ask(pool, "a")
    pool.apply(PoolSpec((model_spec(config={"labels": 3}),)))  # loads anew
    served = pool.models[0]
    wait_until(lambda: pool.models[0] is not served)
    found = ask(pool, "a")
    assert (found.cached, after.computed) == (0, 1)
    assert found.vectors.tobytes() != before.vectors.tobytes()
    pool.stop()


def test_two_names_of_the_same_files_share_entries_and_two_models_do_not() -> None:
    places = {"one": seeded("a"), "same": seeded("a"), "other": seeded("b")}
    pool, _ = pool_of(cache=Cache(MEMORY))
    pool._settings = dataclasses.replace(pool._settings, open_place=lambda spec, memory, report: places[spec.model])
    pool.apply(PoolSpec(tuple(map(model_spec, places))))
    settle(pool)
    assert [ask(pool, "a", model=name).cached for name in ("one", "same", "other")] == [0, 1, 0]
    pool.stop()


def test_entries_of_what_no_model_is_any_more_go() -> None:
    cache = Cache(MEMORY)
    pool, _ = pool_of(seeded("a"), seeded("b"), cache=cache)
    pool.apply(PoolSpec((model_spec("one"), model_spec("other"))))
    settle(pool)
    ask(pool, "a", model="one")
    ask(pool, "a", model="other")
    pool.apply(PoolSpec((model_spec("other"),)))
    assert cache.state()["memory"]["entries"] == 1
    assert ask(pool, "a", model="other").cached == 1
    pool.stop()


@pytest.mark.parametrize(
    ("first", "second", "hits"),
    [
        ({}, {"reads_cache": False}, 0),  # no-cache
        ({"reads_cache": False}, {}, 1),
        ({"reads_cache": False, "writes_cache": False}, {}, 0),  # no-store
        ({}, {"reads_cache": False, "writes_cache": False}, 0),
        ({"caller": "k1"}, {"caller": "k2"}, 0),
        ({"caller": "k1"}, {}, 0),
        ({"caller": "k1"}, {"caller": "k1"}, 1),
    ],
)
def test_what_a_caller_finds(
    cached: tuple[Pool, Seeded], first: dict[str, Any], second: dict[str, Any], hits: int
) -> None:
    """What it does not want to find or to leave, and what belongs to another key."""
    pool, place = cached
    ask(pool, "a", call=first)
    assert ask(pool, "a", call=second).cached == hits
    assert place.computed == 2 - hits


def test_where_callers_share_each_finds_what_another_made() -> None:
    pool, _ = pool_of(seeded("a"), cache=Cache(MEMORY, shared=True))
    pool.apply(PoolSpec((model_spec(),)))
    settle(pool)
    ask(pool, "a", call={"caller": "k1"})
    assert ask(pool, "a", call={"caller": "k2"}).cached == 1
    pool.stop()


def test_a_row_that_several_callers_waited_for_is_kept_for_each() -> None:
    """But for the one who wants nothing kept."""
    gate = Gate()
    place = Scripted(gate, facts=Facts({"embed": 8}, "a", cacheable=True))
    pool, _ = pool_of(place)
    pool.apply(PoolSpec((model_spec(),)))
    settle(pool)
    calls = [{"caller": "k1"}, {"caller": "k2"}, {"caller": "k3", "writes_cache": False}]
    asked = [in_thread(functools.partial(ask, pool, "a", call=call)) for call in calls[:1]]
    gate.arrived()
    asked += [in_thread(functools.partial(ask, pool, "a", call=call)) for call in calls[1:]]
    served = pool.models[0]
    wait_until(lambda: len(served.admission._inside) == 3 and not served.queue.qsize())
    gate.open()
    for future in asked:
        future.result(PATIENCE_S)
    assert place.calls == [["a"]]
    assert [ask(pool, "a", call={"caller": key}).cached for key in ("k1", "k2", "k3")] == [1, 1, 0]
    pool.stop()


@pytest.mark.parametrize("writes", [True, False])
def test_what_is_not_to_be_kept_here_is_not_to_be_kept_elsewhere(writes: bool) -> None:
    """A remote service is told."""
    told: list[str | None] = []
    pool, _ = pool_of(Scripted(lambda texts: told.append(tracing.outgoing().get("Cache-Control"))))
    pool.apply(PoolSpec((model_spec(),)))
    settle(pool)
    ask(pool, "a", call={"writes_cache": writes})
    assert told == [None if writes else "no-store"]
    pool.stop()


def test_an_error_is_not_kept() -> None:
    fails = [True]
    place = seeded("a", fails=lambda: bool(fails))
    pool, _ = pool_of(place)
    pool.apply(PoolSpec((model_spec(),)))
    settle(pool)
    with pytest.raises(InferenceFailed):
        ask(pool, "a")
    fails.clear()
    assert ask(pool, "a").cached == 0
    assert ask(pool, "a").cached == 1
    pool.stop()


def test_what_a_remote_service_said_is_told_again() -> None:
    """Tokens and truncation count as if the text had been computed, also beside one that is."""

    def answer(texts: list[str]) -> Answer:
        return Answer(Rows(vectors_of(texts)), 10 * len(texts), [i for i, text in enumerate(texts) if len(text) > 3])

    pool, _ = pool_of(Scripted(answer, facts=Facts({"embed": 8}, "a")))
    pool.apply(PoolSpec((dataclasses.replace(model_spec(), cache="on"),)))
    settle(pool)
    assert [(r.tokens, r.truncated, r.cached) for r in (ask(pool, "long", "b"), ask(pool, "c", "long"))] == [
        (20, [0], 0),
        (20, [1], 1),
    ]
    pool.stop()


@pytest.mark.parametrize(
    ("wanted", "cacheable", "hits"), [("auto", True, 1), ("auto", False, 0), ("on", False, 1), ("off", True, 0)]
)
def test_a_model_is_cached_as_its_spec_says(wanted: str, cacheable: bool, hits: int) -> None:
    """Else if its driver computes here. A changed spec applies at once."""
    place = Seeded("a", Facts({"embed": DIM}, "a", cacheable=cacheable))
    pool, opener = pool_of(place)
    spec = dataclasses.replace(model_spec(), cache=wanted)
    pool.apply(PoolSpec((spec,)))
    settle(pool)
    ask(pool, "a")
    assert ask(pool, "a").cached == hits
    pool.apply(PoolSpec((dataclasses.replace(spec, cache="off"),)))
    assert ask(pool, "a").cached == 0
    assert len(opener.specs) == 1
    pool.stop()


def test_many_rows_of_which_some_are_known_stay_in_order(cached: tuple[Pool, Seeded]) -> None:
    """As a request that is larger than the queue's window, with duplicates."""
    pool, _ = cached
    texts = [f"{i % 700}" for i in range(900)]
    ask(pool, *texts[::3])
    found, fresh = ask(pool, *texts), ask(pool, *texts, call={"reads_cache": False})
    assert found.cached >= 300
    assert found.vectors.tobytes() == fresh.vectors.tobytes()


def test_clearing(cached: tuple[Pool, Seeded]) -> None:
    """Of one model, and of all; a model that is not known is not found."""
    pool, place = cached
    ask(pool, "a")
    pool.clear_cache("m")
    assert ask(pool, "a").cached == 0
    pool.clear_cache()
    assert ask(pool, "a").cached == 0
    assert place.computed == 3


# --- the layer in memory


def key_of(number: int) -> bytes:
    return number.to_bytes(3 * KEY_BYTES, "big")


def row(*values: float) -> Known:
    return Known(Rows(np.array([values], np.float32)))


def test_the_least_recently_used_entries_leave() -> None:
    """The bound is in bytes. One that is larger than all of it is not kept."""
    cache = Cache(3 * (ENTRY_BYTES + 8))
    for number in range(3):
        cache.put([(key_of(number), row(number, 0))])
    assert set(cache.get([key_of(0)])) == {key_of(0)}
    cache.put([(key_of(3), row(3, 0))])
    assert set(cache.get([key_of(i) for i in range(4)])) == {key_of(0), key_of(2), key_of(3)}
    cache.put([(key_of(4), Known(Rows(np.zeros((1, 1000), np.float32))))])
    state = cache.state()["memory"]
    assert (state["entries"], state["bytes"], state["evicted"]) == (3, 3 * (ENTRY_BYTES + 8), 1)
    cache.put([(key_of(3), row(7, 7))])  # again
    assert cache.state()["memory"]["bytes"] == state["bytes"]


def test_a_worker_hears_that_another_has_cleared_the_cache(tmp_path: Path) -> None:
    """Within a second."""
    now = [0.0]
    one, other = (Cache(MEMORY, cleared_file=tmp_path / "state" / "cleared", clock=lambda: now[0]) for _ in range(2))
    for cache in (one, other):
        cache.put([(key_of(1), row(1))])
    one.clear()
    now[0] += 2
    assert not other.get([key_of(1)])
    other.put([(key_of(1), row(1))])
    now[0] += 2
    assert other.get([key_of(1)])


def test_scopes_are_of_whose_numbers_and_what_computed_them() -> None:
    """Two of their facts are never joined to the same."""
    scopes = [scope_of(facts_of(*of)) for of in (("a", "b"), ("ab", ""), ("", "ab"), ("a", "c"), ("b", "b"))]
    assert len(set(scopes)) == len(scopes)
    assert scope_of(facts_of("a", "b", description={"x": 1})) == scopes[0]


# --- whatever happens, against a pool that knows nothing from before

TEXTS = st.lists(st.sampled_from(["", "a", "b", "a b", "b a", "a b c d e", "é", "a  b"]), min_size=1, max_size=6)
OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "prompt": st.sampled_from(["", "a ", "b"]),
        "max_seq_length": st.sampled_from([3, 4, 6]),
        "truncate": st.sampled_from(["left", "right"]),
        "normalize": st.booleans(),
        "dimensions": st.sampled_from([1, 3]),
    },
)
CALLS = st.fixed_dictionaries(
    {}, optional={"caller": st.sampled_from(["k1", "k2"]), "reads_cache": st.booleans(), "writes_cache": st.booleans()}
)


class AgainstNone(RuleBasedStateMachine):
    """Requests, model exchanges, reloads, clears and crashes: never another row than the one computed now."""

    @initialize(memory=st.sampled_from([1500, MEMORY]), shared=st.booleans())
    def begin(self, memory: int, shared: bool) -> None:
        self.places: list[Seeded] = []

        def open_place(spec: ModelSpec, held: Mapping[str, Any], report: object) -> Scripted:
            config = spec.driver.config
            assert isinstance(config, FakeConfig)
            self.places.append(seeded(f"files {config.labels}"))
            return self.places[-1]

        self.pool = Pool(
            settings_of(open_place, cache=Cache(memory, shared=shared), open_tokenizer=lambda spec, report: Versatile())
        )
        self.files = dict.fromkeys(["m", "n"], 2)
        self._apply()

    def _apply(self) -> None:
        self.pool.apply(
            PoolSpec(
                tuple(
                    ModelSpec(name, DriverSpec("fake", FakeConfig(labels=files, normalize=False)))
                    for name, files in self.files.items()
                )
            )
        )
        wait_until(
            lambda: all(
                served.state == "ready"
                and not served.successor
                and served.spec.driver.config.labels == self.files[name]  # type: ignore[union-attr]
                for name, served in self.pool._served.items()
            )
        )

    @rule(name=st.sampled_from(["m", "n"]), files=st.integers(2, 4))
    def exchange(self, name: str, files: int) -> None:
        self.files[name] = files
        self._apply()

    @rule(name=st.sampled_from(["m", "n"]))
    def leave_and_come_back(self, name: str) -> None:
        files = self.files.pop(name)
        self._apply()
        self.files[name] = files
        self._apply()

    @rule()
    def crash(self) -> None:
        for place in self.places:
            if not place.lost and not place.closed.is_set():
                place.lose("it has crashed", innocent=True)

    @rule()
    def clear(self) -> None:
        self.pool.clear_cache()

    @rule(name=st.sampled_from(["m", "n"]), texts=TEXTS, options=OPTIONS, call=CALLS)
    def request(self, name: str, texts: list[str], options: dict[str, Any], call: dict[str, Any]) -> None:
        found: Result = ask(self.pool, *texts, model=name, call=call, **options)
        right = self._computed(name, texts, options)
        assert found.vectors.tobytes() == right.tobytes()

    def _computed(self, name: str, texts: list[str], options: dict[str, Any]) -> np.ndarray:
        """By the task and the driver alone."""
        config, tokenizer = FakeConfig(labels=self.files[name], normalize=False), Versatile()
        task = Embed(texts, dataclasses.replace(Embed([]).options, **options))
        items = task.measure(config, tokenizer).items
        rows = [row_of((f"files {self.files[name]}", "numpy 2"), Batch("embed", [item]), item) for item in items]
        return np.asarray(task.finish(Rows(np.stack(rows)), config, tokenizer, {}).values)

    @invariant()
    def it_keeps_to_its_bound(self) -> None:
        if hasattr(self, "pool"):
            memory = self.pool.cache.state()["memory"]
            assert memory["bytes"] <= memory["max_bytes"]

    def teardown(self) -> None:
        if hasattr(self, "pool"):
            self.pool.stop()


TestAgainstNone = AgainstNone.TestCase
TestAgainstNone.settings = hypothesis_settings(max_examples=25, stateful_step_count=20, deadline=None)
