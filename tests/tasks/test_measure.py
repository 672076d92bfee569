"""Before the queue: prompts, counts, truncation, keys."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import pytest

from embedpool.config.spec import DriverConfig, FakeConfig, HttpConfig
from embedpool.drivers.fake import FakeTokenizer
from embedpool.drivers.http import RemoteTokenizer
from embedpool.errors import InvalidRequest, TextTooLong, UnsupportedOption
from embedpool.tasks.embed import LOCAL, SLICE_CHARS, Embed, EmbedOptions
from embedpool.tasks.item import Group, Ids
from embedpool.tasks.tokenizer import Tokenizer

FIVE = "one two three four five"  # seven tokens


class Local(FakeTokenizer):
    prompts: ClassVar = {"query": "q: ", "document": "d: "}
    default_max_tokens = 64


class Prompted(Local):
    prompts: ClassVar = {**Local.prompts, "default": "p: "}
    default_prompt_name = "default"


class Named(FakeTokenizer):
    """Its default prompt is one that pool.yml replaces."""

    prompts: ClassVar = {"document": "d: "}
    default_prompt_name = "document"


HTTP = HttpConfig(base_url="http://remote/embed", prompts={"query": "rq: "})


class Found(NamedTuple):
    """What stands in the items of a request, item by item."""

    texts: list[str]
    ids: list[Ids | None]
    tokens: list[int]
    keys: list[bytes]
    group: Group
    truncated: list[int]


def measured(
    *texts: str, config: DriverConfig | None = None, tokenizer: Tokenizer | None = None, **options: object
) -> Found:
    config, tokenizer = config or FakeConfig(), tokenizer or Local()
    items, truncated, refused = Embed(texts, EmbedOptions(**options)).measure(config, tokenizer)
    assert not refused
    assert [item.index for item in items] == list(range(len(texts)))
    (group,) = {item.group for item in items}
    return Found(
        [item.parts[0] for item in items],
        [item.ids for item in items],
        [item.tokens for item in items],
        [item.key for item in items],
        group,
        truncated,
    )


def test_tokens_count_special_ones_too() -> None:
    """A request pays for, and is shown, every token the model sees."""
    found = measured(FIVE, "", "one")
    assert (found.tokens, found.truncated, found.group) == ([7, 2, 3], [], LOCAL)
    assert [len(i) for i in found.ids] == found.tokens


@pytest.mark.parametrize(("config", "asked", "kept"), [
    (None, 4, 4), (4, None, 4), (4, 6, 6), (6, 4, 4), (None, None, 7),
])  # fmt: skip
def test_a_text_is_cut_to_the_requests_limit_or_the_models(config: int | None, asked: int | None, kept: int) -> None:
    """A request's max_seq_length wins over the configured one, and what was cut is told by its index."""
    found = measured("one", FIVE, config=FakeConfig(max_seq_length=config), max_seq_length=asked)
    assert found.tokens == [3, kept]
    assert found.truncated == ([1] if kept < 7 else [])
    assert len(found.ids[1]) == kept


def test_without_any_setting_the_models_own_limit_holds() -> None:
    """A model's own max_seq_length cuts when nobody says otherwise."""
    assert measured("w " * 100).tokens == [64]


@pytest.mark.parametrize(("truncate", "kept"), [(None, "one two"), ("right", "one two"), ("left", "four five")])
def test_truncation_keeps_the_side_asked_for(truncate: str | None, kept: str) -> None:
    """`truncate` says which end of a long text goes; special tokens stay."""
    assert measured(FIVE, max_seq_length=4, truncate=truncate).ids == measured(kept).ids


def test_truncate_error_names_every_long_text() -> None:
    """With truncate: error nothing is embedded, and each long text is named."""
    with pytest.raises(TextTooLong, match=r"texts\[1\] has 7 tokens, the limit is 4") as caught:
        measured("one", FIVE, FIVE, max_seq_length=4, truncate="error")
    assert set(caught.value.fields) == {"texts[1]", "texts[2]"}
    assert measured("one", max_seq_length=4, truncate="error").tokens == [3]


def test_more_positions_than_the_model_has_are_refused() -> None:
    """max_seq_length beyond the model's positions is the caller's fault and names the field."""
    with pytest.raises(InvalidRequest, match="513 is more than the model's 512") as caught:
        measured("one", max_seq_length=513)
    assert set(caught.value.fields) == {"options.max_seq_length"}
    assert measured("w " * 600, max_seq_length=512).tokens == [512]


@pytest.mark.parametrize(("tokenizer", "options", "text"), [
    (Local, {}, "one"), (Local, {"prompt": "x "}, "x one"), (Local, {"prompt_name": "query"}, "q: one"),
    (Local, {"prompt_name": "own"}, "o: one"), (Local, {"prompt_name": "document"}, "D: one"),
    (Local, {"input_type": "search_query"}, "q: one"), (Local, {"input_type": "passage"}, "D: one"),
    (Local, {"input_type": "clustering"}, "one"), (Prompted, {"input_type": "clustering"}, "p: one"),
    (Local, {"input_type": "query", "prompt_name": "own"}, "o: one"),
    (Prompted, {"input_type": "separation"}, "p: one"), (Named, {"input_type": "query"}, "one"), (Named, {}, "D: one"),
    (Prompted, {}, "p: one"), (Prompted, {"prompt": ""}, "one"), (Prompted, {"prompt_name": "query"}, "q: one"),
])  # fmt: skip
def test_a_prompt_goes_before_each_text(tokenizer: type[Tokenizer], options: dict, text: str) -> None:
    """A prompt given, named (pool.yml's replace the model's), or the model's default, is part of what is measured."""
    config = FakeConfig(prompts={"own": "o: ", "document": "D: "})
    found = measured("one", config=config, tokenizer=tokenizer(), **options)
    assert (found.texts, found.ids) == ([text], measured(text).ids)


def test_an_unknown_prompt_lists_the_known_ones() -> None:
    """A wrong prompt_name is answered with the names there are."""
    with pytest.raises(InvalidRequest, match="known: document, query") as caught:
        measured("one", prompt_name="nope")
    assert set(caught.value.fields) == {"options.prompt_name"}
    with pytest.raises(InvalidRequest, match="this model has none"):
        measured("one", tokenizer=FakeTokenizer(), prompt_name="nope")


def test_an_unknown_option_of_a_local_model_is_refused() -> None:
    """An option nobody would honour is refused by name, not ignored."""
    with pytest.raises(UnsupportedOption, match="other, task") as caught:
        measured("one", extra={"task": 1, "other": 2})
    assert set(caught.value.fields) == {"options.task", "options.other"}


def test_a_remote_service_gets_the_options_that_are_its_business() -> None:
    """Truncation, its own prompt names and unknown options are passed on; only equal ones may share a call."""
    options = {"max_seq_length": 9999, "truncate": "left", "prompt_name": "theirs", "extra": {"task": "t"}}
    found = measured("one", "four" * 4, config=HTTP, tokenizer=RemoteTokenizer(), **options)
    assert json.loads(found.group.options) == {
        "max_seq_length": 9999,
        "truncate": "left",
        "prompt_name": "theirs",
        "task": "t",
    }
    assert (found.ids, found.tokens, found.texts) == ([None, None], [1, 5], ["one", "four" * 4])
    again = measured("two", config=HTTP, tokenizer=RemoteTokenizer(), **options)
    assert again.group == found.group
    assert measured("one", config=HTTP, tokenizer=RemoteTokenizer()).group == Group("embed")


def test_a_prompt_known_here_is_applied_here_for_a_remote_service_too() -> None:
    """A prompt of pool.yml is put before the text and not passed on."""
    for options in ({"prompt_name": "query"}, {"input_type": "search_query"}):
        found = measured("one", config=HTTP, tokenizer=RemoteTokenizer(), **options)
        assert (found.texts, found.group) == (["rq: one"], Group("embed"))
    assert json.loads(
        measured("one", config=HTTP, tokenizer=RemoteTokenizer(), input_type="document").group.options
    ) == {"input_type": "document"}


def test_equal_keys_mean_equal_rows() -> None:
    """A local model's row is decided by the ids: by the words behind the prompt, as far as they are kept."""
    keys = measured("a b", "a  b", "a b c").keys
    assert keys[0] == keys[1] != keys[2]
    assert measured("a b", prompt="q: ").keys == measured("q: a b").keys != measured("a b").keys
    assert measured("a b c d", max_seq_length=4).keys == measured("a b c d", max_seq_length=4, normalize=True).keys
    assert measured("a b c d", max_seq_length=4).keys != measured("a b c d", max_seq_length=4, truncate="left").keys
    assert measured("a b c d", max_seq_length=4).keys != measured("a b c e", max_seq_length=4).keys, "no text is given"


def test_a_remote_services_row_is_decided_by_the_text_and_what_is_asked_of_it() -> None:
    """Where the ids are not known the text stands for them, and so do the options that are passed on."""

    def keys(*texts: str, **options: object) -> list[bytes]:
        return measured(*texts, config=HTTP, tokenizer=RemoteTokenizer(), **options).keys

    assert len(set(keys("a b", "a  b", "", "é"))) == 4
    assert keys("a") == keys("a", dimensions=3) != keys("a", extra={"task": 1}) != keys("a", extra={"task": 2})


def test_texts_that_are_too_long_go_no_further_where_the_others_do() -> None:
    """A partial request loses them alone, and the others keep their places."""
    task = Embed(["one", FIVE, "two"], EmbedOptions(max_seq_length=4, truncate="error", on_error="partial"))
    items, truncated, refused = task.measure(FakeConfig(), Local())
    assert ([item.index for item in items], truncated) == ([0, 2], [])
    assert {i: error.message for i, error in refused.items()} == {1: "7 tokens, the limit is 4"}


def test_texts_are_tokenised_some_at_a_time() -> None:
    """Ids at full length take many times a text's memory; between the slices a request may be given up."""
    slices: list[int] = []
    asked: list[None] = []

    class Counting(FakeTokenizer):
        def encode(self, texts: Sequence[str]) -> list[list[int]]:
            slices.append(len(texts))
            return super().encode(texts)

    texts = ["word " * (SLICE_CHARS // 20)] * 10
    measured = Embed(texts).measure(FakeConfig(), Counting(), lambda: asked.append(None))
    assert slices == [4, 4, 2]
    assert len(asked) == 3
    assert [item.tokens for item in measured.items] == [512] * 10
    assert measured.truncated == list(range(10))
