"""What travels to a model."""

from __future__ import annotations

import pickle

from embedpool.tasks.item import Batch, Group, Item, Keys


def test_an_item_takes_to_another_process_what_a_driver_needs() -> None:
    """Not the request it belongs to, nor what the pool keeps about it."""
    item = Item(("query", "document"), 5, [1, 2, 3, 4, 5], 2, group=Group("score"), key=b"k", index=3)
    item.request = lambda: None  # cannot be pickled
    item.losses, item.duplicates = 1, [item]
    (there,) = pickle.loads(pickle.dumps(Batch("score", [item], {"a": 1}))).items
    assert (there.parts, there.tokens, there.ids, there.second) == (("query", "document"), 5, [1, 2, 3, 4, 5], 2)
    assert (there.request, there.losses, there.duplicates) == (None, 0, [])


def test_a_batch_is_fed_by_ids_or_by_texts() -> None:
    """By ids only where every item has them."""
    items = [Item(("a", "b"), 1, [1]), Item(("c",), 1, [2, 3])]
    assert (Batch("t", items).texts, Batch("t", items).ids) == (["a", "c"], [[1], [2, 3]])
    assert Batch("t", [*items, Item(("d",), 1)]).ids is None


def test_keys_tell_apart_what_could_run_together() -> None:
    """Texts of several parts, ids and groups: no two different inputs have one key."""
    keys, others = Keys(Group("t")), Keys(Group("u"))
    found = [
        keys.of(None, "ab"), keys.of(None, "a", "b"), keys.of(None, "", "ab"), keys.of([1, 2]), keys.of([12]),
        keys.of([1, 2], "a"), others.of([1, 2]), Keys(Group("t", "{}")).of([1, 2]), keys.of([]), keys.of(None, ""),
    ]  # fmt: skip
    assert len(set(found[:-2])) == len(found) - 2
    assert keys.of([1, 2]) == found[3]
