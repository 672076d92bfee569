"""A task that is not ours travels the road: nothing between HTTP and the drivers knows what a row is."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest

from embedpool.config.spec import DriverConfig, DriverSpec, FakeConfig, ModelSpec, PoolSpec, QueueSpec, Scaling
from embedpool.drivers.fake import FakeDriver
from embedpool.errors import EmbedpoolError, InferenceFailed, UnsupportedTask
from embedpool.places import open_place
from embedpool.pool.pool import Pool
from embedpool.pool.request import Call, Result
from embedpool.pool.settings import PoolSettings
from embedpool.tasks.driver import Facts, Place, Report
from embedpool.tasks.embed import Embed
from embedpool.tasks.item import Batch, Group, Item, Keys
from embedpool.tasks.rows import Answer, Rows
from embedpool.tasks.task import Measured, Task
from embedpool.tasks.tokenizer import Tokenizer
from tests.conftest import open_fake_tokenizer, settle
from tests.pool.scripted import in_thread

DIM, WIDTH = 4, 3


@dataclass(frozen=True)
class Words(Task):
    """A vector for each token of each text."""

    name: ClassVar = "words"
    texts: Sequence[str]
    partial: bool = False

    def __len__(self) -> int:
        return len(self.texts)

    def where(self, index: int) -> str:
        return f"lines[{index}]"

    def measure(self, config: DriverConfig, tokenizer: Tokenizer, still_wanted: object = None) -> Measured:
        keys, encoded = Keys(Group(self.name)), tokenizer.encode(self.texts)
        assert encoded is not None
        items = [
            Item((text,), len(ids), ids, group=Group(self.name), key=keys.of(ids), index=i)
            for i, (text, ids) in enumerate(zip(self.texts, encoded, strict=True))
        ]
        return Measured(items, [], {})

    def finish(self, rows: Rows, config: DriverConfig, tokenizer: Tokenizer, errors: dict[int, EmbedpoolError]) -> Rows:
        return rows


class WordsDriver(FakeDriver):
    """The stand-in, which can do this too."""

    def open(self, on_lost: Callable[[str], None]) -> Facts:
        facts = super().open(on_lost)
        return Facts({**facts.tasks, "words": WIDTH}, 2, description=facts.description)

    def run(self, batch: Batch) -> Answer:
        if batch.task == "embed":
            return super().run(batch)
        ids = batch.ids or []
        values = [[float(i), float(len(row)), 0.5] for row in ids for i in row]
        if any("bad" in text for text in batch.texts):
            raise RuntimeError("cannot bear it")
        return Answer(Rows(np.array(values, np.float32), np.cumsum([0, *map(len, ids)]).astype(np.int64)))


def make_words(config: FakeConfig) -> WordsDriver:
    return WordsDriver(config)


def words_place(spec: ModelSpec, memory: dict[str, Any], report: Report) -> Place:
    assert isinstance(spec.driver.config, FakeConfig)
    return open_place(spec, functools.partial(make_words, spec.driver.config))


def words_tokenizer(spec: ModelSpec, report: Report) -> Tokenizer:
    tokenizer = open_fake_tokenizer(spec)
    tokenizer.tasks = ("embed", "words")
    return tokenizer


@pytest.fixture(params=["thread", "process"])
def pool(request: pytest.FixtureRequest) -> Iterator[Pool]:
    made = Pool(PoolSettings(words_place, words_tokenizer, request_timeout_s=20, max_batch_texts=4))
    driver = DriverSpec("fake", FakeConfig(dim=DIM))
    queue, scaling = QueueSpec(max_size=20, max_inflight_per_replica=2), Scaling(max=2)
    made.apply(PoolSpec((ModelSpec("m", driver, place=request.param, queue=queue, scaling=scaling),)))
    settle(made)
    yield made
    made.stop()


def ask(pool: Pool, task: Task) -> Result:
    return pool.submit("m", task, Call(pool.clock(), 20))


def assert_words(result: Result, texts: Sequence[str]) -> None:
    assert len(result.rows) == len(texts)
    assert result.rows.splits is not None
    for i, text in enumerate(texts):
        row = result.rows.values[result.rows.splits[i] : result.rows.splits[i + 1]]
        assert row.shape == (len(text.split()) + 2, WIDTH)
        assert set(row[:, 1].tolist()) == {len(text.split()) + 2}


def test_ragged_rows_come_back_each_to_its_input(pool: Pool) -> None:
    """Through small batches, a small queue, duplicates, and other requests and tasks beside."""
    texts = [" ".join("word" for _ in range(i % 5)) for i in range(30)]
    beside = [in_thread(ask, pool, Words(texts[i:])) for i in range(4)]
    dense = [in_thread(ask, pool, Embed(texts)) for _ in range(2)]
    assert_words(ask(pool, Words(texts)), texts)
    for i, future in enumerate(beside):
        assert_words(future.result(20), texts[i:])
    for future in dense:
        assert future.result(20).vectors.shape == (30, DIM)


def test_an_input_that_fails_is_named_as_its_task_names_it(pool: Pool) -> None:
    """Where the request goes on without it, its row is empty."""
    with pytest.raises(InferenceFailed) as caught:
        ask(pool, Words(["fine", "a bad one"]))
    assert set(caught.value.fields) == {"lines[1]"}
    result = ask(pool, Words(["fine", "a bad one", "good"], partial=True))
    assert set(result.errors) == {1}
    assert result.rows.splits is not None
    assert result.rows.splits.tolist() == [0, 3, 3, 6]


def test_a_model_that_cannot_do_it_says_so(pool_settings: PoolSettings) -> None:
    """The stand-in alone only embeds."""
    pool = Pool(pool_settings)
    try:
        pool.apply(PoolSpec((ModelSpec("m", DriverSpec("fake", FakeConfig(dim=DIM))),)))
        settle(pool)
        with pytest.raises(UnsupportedTask, match="cannot words; it can embed"):
            ask(pool, Words(["a"]))
        assert len(ask(pool, Embed(["a"])).rows) == 1
    finally:
        pool.stop()
