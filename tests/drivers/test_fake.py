"""The deterministic stand-in for a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedpool.config.spec import DriverSpec, FakeConfig, ModelSpec
from embedpool.drivers import make_driver, open_tokenizer
from embedpool.drivers.fake import END, START, FakeDriver, FakeTokenizer
from embedpool.tasks.driver import Folders
from tests.conftest import NOWHERE, open_here, run


def embed(*texts: str, **config: Any) -> np.ndarray:
    return run(FakeDriver(FakeConfig(**config)), texts, FakeTokenizer().encode(texts)).rows.values


def test_the_table_knows_it() -> None:
    """A spec of type fake gives this driver and this tokenizer."""
    spec = ModelSpec(model="m", driver=DriverSpec("fake", FakeConfig(dim=7)))
    driver = open_here(make_driver(spec, Folders(Path(), Path()), {}))
    assert run(driver, ["a"]).rows.values.shape == (1, 7)
    assert dict(driver.facts.description) == {"kind": "embed", "dim": 7}
    assert open_tokenizer(spec, NOWHERE).encode(["a b"]) == FakeTokenizer().encode(["a b"])


def test_equal_texts_give_equal_vectors_and_others_do_not() -> None:
    """A text has the same vector in every batch, process and instance, and another than any other text."""
    together, alone = embed("a", "b c", ""), [embed(t)[0] for t in ("a", "b c", "")]
    np.testing.assert_array_equal(together, alone)
    assert together.dtype == np.float32
    assert len({row.tobytes() for row in together}) == 3
    assert not np.allclose(np.linalg.norm(together, axis=1), 1)


def test_ids_decide() -> None:
    """Vectors follow the token ids, so that truncation shows in them; without ids the texts are tokenized."""
    tokenizer = FakeTokenizer()
    driver = FakeDriver(FakeConfig())
    np.testing.assert_array_equal(run(driver, ["a b"], tokenizer.encode(["a"])).rows.values, embed("a"))
    np.testing.assert_array_equal(run(driver, ["a b"]).rows.values, embed("a b"))


@pytest.mark.parametrize(
    ("limit", "side", "words"), [(4, "right", [11, 12]), (4, "left", [13, 14]), (2, "left", []), (2, "right", [])]
)
def test_cut_keeps_the_special_tokens(limit: int, side: str, words: list[int]) -> None:
    """The tokenizer counts a token a word and two special ones, and cuts on the asked side without losing those."""
    ids = [START, 11, 12, 13, 14, END]
    assert FakeTokenizer().cut(ids, limit, side) == [START, *words, END]
    assert [len(i) for i in FakeTokenizer().encode(["a b", ""])] == [4, 2]


def test_fault_raise_names_itself_and_spares_other_texts() -> None:
    """`fault: raise` with a text fails batches that contain it, and those alone; the driver itself is well."""
    driver = FakeDriver(FakeConfig(fault="raise", fault_text="bad"))
    open_here(driver)
    with pytest.raises(RuntimeError, match="fault: raise"):
        run(driver, ["good", "a bad one"])
    assert len(run(driver, ["good"]).rows.values) == 1
    driver.probe()


def test_fault_nan_and_short() -> None:
    """`nan` spoils the vectors of the texts at fault, `short` gives a vector too few."""
    vectors = embed("good", "bad", fault="nan", fault_text="bad")
    np.testing.assert_array_equal(np.isfinite(vectors).all(axis=1), [True, False])
    assert len(embed("good", "bad", fault="short", fault_text="bad")) == 1
    assert len(embed("good", "fine", fault="short", fault_text="bad")) == 2


@pytest.mark.parametrize("fault", ["load", "raise"])
def test_a_driver_at_fault_does_not_open(fault: str) -> None:
    """`load`, or a fault of no particular text, is the driver's own and shows when it opens."""
    with pytest.raises(RuntimeError, match=f"fault: {fault}"):
        open_here(FakeDriver(FakeConfig(fault=fault)))


def test_delays_are_slept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loads and batches take the time they are told to, batches also by text."""
    slept: list[float] = []
    monkeypatch.setattr("embedpool.drivers.fake.time.sleep", slept.append)
    driver = FakeDriver(FakeConfig(load_delay_ms=500, delay_ms=100, delay_ms_per_text=10))
    open_here(driver)
    run(driver, ["a", "b", "c"])
    assert slept == pytest.approx([0.5, 0.13])
