"""Pairs become items: joined by the template, cut at the document, in parts where that is asked for."""

from __future__ import annotations

from typing import Any

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from embedpool.config.spec import FakeConfig, HttpConfig
from embedpool.drivers.fake import END, START, FakeTokenizer
from embedpool.drivers.http import RemoteTokenizer
from embedpool.errors import InvalidRequest, TextTooLong, UnsupportedOption
from embedpool.tasks.item import Item
from embedpool.tasks.rows import Rows
from embedpool.tasks.score import IDENTITY, SIGMOID, SOFTMAX, Classify, Parts, Rerank, ScoreOptions, activated
from embedpool.tasks.task import Measured
from embedpool.tasks.tokenizer import Tokenizer, Whole

TOKENIZER = FakeTokenizer("rerank")
SPECIALS = 3


class Joins(FakeTokenizer):
    """Must be given pairs whole."""

    template = None

    def whole(self, pairs: Any, prompt: str = "") -> list[Whole]:
        return [self._whole(*self.bare(pair)) for pair in pairs]

    def _whole(self, query: list[int], document: list[int]) -> Whole:
        middle = 1 + len(query)
        ids = [START, *query, *document, END, END]
        return Whole(ids, slice(1, middle), slice(middle, len(ids) - 2), typed=False)


def measured(*parts: Parts, tokenizer: Tokenizer = TOKENIZER, config: Any = None, **options: Any) -> Measured:
    return Rerank(parts, ScoreOptions(**options)).measure(config or FakeConfig(task="rerank"), tokenizer)


def bare(text: str) -> list[int]:
    return TOKENIZER.bare([text])[0]


def test_a_pair_is_joined_by_the_template() -> None:
    """Query and document with special tokens around and between them; where the second begins is told."""
    (item,) = measured(("a b", "c")).items
    assert list(item.ids) == [START, *bare("a b"), END, *bare("c"), END]
    assert (item.second, item.tokens, item.parts) == (4, 6, ("a b", "c"))


def test_the_query_is_tokenised_once() -> None:
    """However many documents it has."""
    asked: list[str] = []

    class Counting(FakeTokenizer):
        def bare(self, texts: Any) -> list[list[int]]:
            asked.extend(texts)
            return super().bare(texts)

    measured(*(("query", f"document {i}") for i in range(100)), tokenizer=Counting("rerank"))
    assert asked.count("query") == 1
    assert len(asked) == 101


def test_equal_pairs_have_equal_keys() -> None:
    """And pairs that only read alike have not: where the second part begins counts."""
    keys = [item.key for item in measured(("a b", "c"), ("a b", "c"), ("a", "b c"), ("c", "a b")).items]
    assert keys[0] == keys[1]
    assert len(set(keys)) == 3


words = st.lists(st.sampled_from(["a", "b", "c", "d"]), max_size=12).map(" ".join)


@hypothesis.given(query=words, document=words, limit=st.integers(4, 20), side=st.sampled_from(["right", "left"]))
def test_the_document_is_cut_and_never_the_query_first(query: str, document: str, limit: int, side: str) -> None:
    """A pair has no more tokens than the limit; the query keeps half of them, or what the document leaves."""
    found = measured((query, document), max_seq_length=limit, truncate=side)
    (item,) = found.items
    ids = list(item.ids)
    q, d, room = bare(query), bare(document), limit - SPECIALS
    assert len(ids) <= limit
    assert found.truncated == ([0] if len(q) + len(d) > room else [])
    kept_q, kept_d = ids[1 : item.second - 1], ids[item.second : -1]
    assert kept_q == q[: len(kept_q)]
    assert kept_d == (d[: len(kept_d)] if side == "right" else d[len(d) - len(kept_d) :])
    if len(q) + len(d) > room:
        assert len(kept_q) + len(kept_d) == room
        half = (room + (len(q) > len(d))) // 2  # of an odd number the longer part has one more, as tokenizers cut
        assert len(kept_q) == min(len(q), max(half, room - len(d)))


@hypothesis.given(document=words.filter(bool), limit=st.integers(6, 12))
def test_parts_cover_the_document(document: str, limit: int) -> None:
    """`long_documents: chunk` loses nothing, and no part is over the limit."""
    found = measured(("a", document), max_seq_length=limit, long_documents="chunk")
    assert [i for item in found.items for i in list(item.ids)[item.second : -1]] == bare(document)
    assert all(len(item.ids) <= limit and item.index == 0 for item in found.items)
    assert found.truncated == []


@pytest.mark.parametrize("limit", [2, 513])
def test_a_limit_that_cannot_be_kept_is_refused(limit: int) -> None:
    """Less than the special tokens, or more than the model's positions, as where texts are embedded."""
    with pytest.raises(InvalidRequest, match="max_seq_length"):
        measured(("a", "b"), max_seq_length=limit)


def test_the_best_part_counts() -> None:
    """By its logit."""
    task = Rerank([("a", "b")])
    low, high = Rows(np.float32([[-1.0]])), Rows(np.float32([[2.0]]))
    assert task.merged(0, [low, high]) is task.merged(0, [high, low]) is high


def test_a_document_may_be_bounded_by_itself() -> None:
    """`max_tokens_per_doc` counts its own tokens, and is reported."""
    found = measured(("a b c", "d e f g"), ("a", "b"), max_tokens_per_doc=2)
    assert [len(item.ids) for item in found.items] == [SPECIALS + 5, SPECIALS + 2]
    assert found.truncated == [0]


@pytest.mark.parametrize("option", [{"truncate": "error"}, {"long_documents": "error"}])
def test_what_may_not_be_cut_is_refused(option: dict[str, str]) -> None:
    """Named as the caller names it; in a partial request alone."""
    with pytest.raises(TextTooLong, match=r"documents\[1\] has 8 tokens, the limit is 6") as caught:
        measured(("a", "b"), ("a", "b c d e"), max_seq_length=6, **option)
    assert list(caught.value.inputs) == [1]
    found = measured(("a", "b"), ("a", "b c d e"), max_seq_length=6, on_error="partial", **option)
    assert [item.index for item in found.items] == [0]
    assert "8 tokens" in found.refused[1].message


def test_all_that_may_not_be_cut_are_named() -> None:
    """Each with what it was held against."""
    pairs = [("a", "b"), ("a", "b c d e"), ("a", "b c d")]
    with pytest.raises(TextTooLong, match=r"documents\[1\] has 8 tokens, the limit is 6") as caught:
        measured(*pairs, max_seq_length=6, truncate="error")
    assert list(caught.value.inputs) == [1, 2]
    assert list(caught.value.fields or ()) == ["documents[1]", "documents[2]"]
    with pytest.raises(TextTooLong, match=r"documents\[1\] has 4 tokens, max_tokens_per_doc is 3"):
        measured(*pairs, max_tokens_per_doc=3, truncate="error")


def test_an_instruction_goes_before_the_query() -> None:
    """In the place of the model's default prompt; pool.yml may replace that."""

    class Prompted(FakeTokenizer):
        prompts = {"web": "find: "}  # noqa: RUF012
        default_prompt_name = "web"

    for options, query in (({}, "find: a"), ({"instruction": "is: "}, "is: a"), ({"instruction": ""}, "a")):
        (item,) = measured(("a", "b"), tokenizer=Prompted("rerank"), **options).items
        assert item.parts == (query, "b")
    config = FakeConfig(task="rerank", prompts={"web": "new: "})
    assert measured(("a", "b"), tokenizer=Prompted("rerank"), config=config).items[0].parts == ("new: a", "b")
    config = FakeConfig(task="rerank", prompts={"other": "else: "})
    named = measured(("a", "b"), tokenizer=Prompted("rerank"), config=config, prompt_name="other")
    assert named.items[0].parts == ("else: a", "b")
    with pytest.raises(InvalidRequest, match="no prompt 'none'; known: other, web"):
        measured(("a", "b"), tokenizer=Prompted("rerank"), config=config, prompt_name="none")


def test_pairs_that_must_be_given_whole() -> None:
    """Are cut in the document, as others are, and the query only where it would take more than half."""

    def cut(query: str, document: str, **options: Any) -> list[list[int]]:
        found = measured((query, document), tokenizer=Joins("rerank"), **options)
        assert found.truncated == ([] if options.get("long_documents") == "chunk" else [0])
        assert {item.second for item in found.items} == {None}
        return [list(item.ids) for item in found.items]

    def joined(*texts: str) -> list[list[int]]:
        return [[START, *bare(text), END, END] for text in texts]

    assert cut("a", "b c d e", max_seq_length=6) == joined("a b c")
    assert cut("a", "b c d e", max_seq_length=6, truncate="left") == joined("a d e")
    assert cut("a", "b c d e", max_seq_length=6, long_documents="chunk") == joined("a b c", "a d e")
    assert cut("a", "b c d e", max_tokens_per_doc=3) == joined("a b c d")
    assert cut("a b c d e", "f g h", max_seq_length=7) == joined("a b f g")


@pytest.mark.parametrize("kind", [FakeTokenizer, Joins])
def test_a_library_that_would_cut_in_another_way_is_not_asked(kind: type[FakeTokenizer]) -> None:
    """Items that must be run by their ids are of a group of their own, which says so."""
    tokenizer = kind("rerank")

    def by_ids(query: str, document: str, **options: Any) -> set[bool]:
        items = measured((query, document), tokenizer=tokenizer, **options).items
        return {"by_ids" in item.group.options for item in items}

    limit = {"max_seq_length": 7}
    assert by_ids("a", "b") == by_ids("a", "b c d e f g h", **limit) == {False}
    assert by_ids("a", "b", truncate="left") == by_ids("a", "b", long_documents="chunk") == {False}
    for options in ({"truncate": "left"}, {"long_documents": "chunk"}, {"max_tokens_per_doc": 2}):
        assert by_ids("a", "b c d e f g h", **limit, **options) == {True}
    assert by_ids("a b c d e f", "g h i j k l", **limit) == {False}  # tokenizers cut so, too
    assert by_ids("a b c d e f", "", **limit) == {True}
    tokenizer.told = ("prompt", "limit", "side")  # type: ignore[misc]
    assert by_ids("a", "b c d e f g h", **limit) == {False}
    assert by_ids("a b c d e f", "g h i j k l", **limit) == {True}  # what is told is cut at the end of it all


def test_an_instruction_that_leaves_no_room_is_refused() -> None:
    """The system's message of a causal reranker is not cut; nor is any other text around pairs."""

    class Told(Joins):
        told = ("prompt", "limit", "side")

        def whole(self, pairs: Any, prompt: str = "") -> list[Whole]:
            before = self.bare([prompt])[0]
            return [
                Whole([*before, *ids], moved(first, len(before)), moved(last, len(before)), typed)
                for ids, first, last, typed in super().whole(pairs)
            ]

    def moved(part: slice, by: int) -> slice:
        return slice(part.start + by, part.stop + by)

    found = measured(("a", "b c d e f"), tokenizer=Told("rerank"), max_seq_length=9, instruction="find it")
    assert [len(item.ids or ()) for item in found.items] == [9]
    with pytest.raises(InvalidRequest, match="5 tokens stand around a pair, the limit of all is 5") as refused:
        measured(("a", "b"), tokenizer=Told("rerank"), max_seq_length=5, instruction="find it")
    assert list(refused.value.fields) == ["options.instruction"]


def test_half_a_character_is_named() -> None:
    """In the query or the document; others go on without it if that is asked for."""
    with pytest.raises(InvalidRequest, match=r"documents\[1\]"):
        measured(("a", "b"), ("a", "b\ud83d"))
    found = measured(("a", "b"), ("a\ud83d", "b"), on_error="partial")
    assert [item.index for item in found.items] == [0]
    assert list(found.refused) == [1]


def test_a_remote_service_gets_the_pairs() -> None:
    """Those of one query in a call; what it cannot be told is refused."""
    config = HttpConfig(base_url="http://remote/rerank", task="rerank")
    asked = [("a", "b"), ("a", "c"), ("b", "b")]
    items = measured(*asked, tokenizer=RemoteTokenizer("rerank"), config=config).items
    assert [(item.parts, item.ids) for item in items] == [(parts, None) for parts in asked]
    assert [item.group for item in items] == [
        ("rerank", '{"query": "a"}'), ("rerank", '{"query": "a"}'), ("rerank", '{"query": "b"}'),
    ]  # fmt: skip
    (left,) = measured(("a", "b"), tokenizer=RemoteTokenizer("rerank"), config=config, truncate="left").items
    assert left.group == ("rerank", '{"query": "a", "truncate": "left"}')
    told = {"truncate": "error", "instruction": "is: "}
    (other,) = measured(("a", "b"), tokenizer=RemoteTokenizer("rerank"), config=config, **told).items
    assert other.group == ("rerank", '{"instruction": "is: ", "query": "a", "truncate": "error"}')
    (bounded,) = measured(("a", "b"), tokenizer=RemoteTokenizer("rerank"), config=config, max_tokens_per_doc=3).items
    assert bounded.group == ("rerank", '{"max_tokens_per_doc": 3, "query": "a"}')
    for option in ({"long_documents": "chunk"}, {"max_seq_length": 9}):
        with pytest.raises(UnsupportedOption, match=next(iter(option))):
            measured(("a", "b"), tokenizer=RemoteTokenizer("rerank"), config=config, **option)


def test_scores_are_made_once_and_stay_finite() -> None:
    """One sigmoid, or one softmax, in float32, of logits of any size."""
    logits = np.float32([[-1000.0, 0.0, 1000.0]])
    np.testing.assert_allclose(activated(logits, SIGMOID), [[0, 0.5, 1]], atol=1e-6)
    np.testing.assert_allclose(activated(logits, SOFTMAX), [[0, 0, 1]], atol=1e-6)
    assert activated(logits, IDENTITY) is logits
    tokenizer = FakeTokenizer("classify", 3)
    rows = Classify([("a",)]).finish(Rows(logits), FakeConfig(task="classify"), tokenizer, {})
    np.testing.assert_allclose(rows.values, [[0, 0, 1, -1000, 0, 1000]], atol=1e-6)


def test_an_item_of_two_parts_is_pickled_for_a_child() -> None:
    """With where the second begins."""
    import pickle

    (item,) = measured(("a b", "c")).items
    again: Item = pickle.loads(pickle.dumps(item))
    assert (again.parts, list(again.ids or ()), again.second) == (item.parts, list(item.ids or ()), item.second)
