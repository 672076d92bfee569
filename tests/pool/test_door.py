"""At the door: prompts, counts, truncation."""

from __future__ import annotations

import json
from typing import ClassVar

import pytest

from embedpool.config.spec import DriverConfig, FakeConfig, HttpConfig
from embedpool.drivers.base import Meter
from embedpool.drivers.fake import FakeMeter
from embedpool.errors import InvalidRequest, TextTooLong, UnsupportedOption
from embedpool.pool.door import Measured, measure
from tests.pool.scripted import request_of

FIVE = "one two three four five"  # seven tokens


class Local(FakeMeter):
    prompts: ClassVar = {"query": "q: ", "document": "d: "}
    default_max_tokens = 64


class Remote(Meter):
    tokenizes = False

    def measure(self, texts):
        return None


class Prompted(Local):
    default_prompt = "p: "


HTTP = HttpConfig(base_url="http://remote/embed", prompts={"query": "rq: "})


def measured(*texts: str, config: DriverConfig | None = None, meter: Meter | None = None, **options) -> Measured:
    return measure(request_of(*texts, **options), config or FakeConfig(), meter or Local())


def test_tokens_count_special_ones_too() -> None:
    """A request pays for, and is shown, every token the model sees."""
    found = measured(FIVE, "", "one")
    assert (found.tokens, found.truncated, found.group) == ([7, 2, 3], [], None)
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


@pytest.mark.parametrize(("meter", "options", "text"), [
    (Local, {}, "one"), (Local, {"prompt": "x "}, "x one"), (Local, {"prompt_name": "query"}, "q: one"),
    (Local, {"prompt_name": "own"}, "o: one"), (Local, {"prompt_name": "document"}, "D: one"),
    (Local, {"input_type": "search_query"}, "q: one"), (Local, {"input_type": "passage"}, "D: one"),
    (Local, {"input_type": "clustering"}, "one"), (Prompted, {"input_type": "clustering"}, "p: one"),
    (Local, {"input_type": "query", "prompt_name": "own"}, "o: one"),
    (Prompted, {}, "p: one"), (Prompted, {"prompt": ""}, "one"), (Prompted, {"prompt_name": "query"}, "q: one"),
])  # fmt: skip
def test_a_prompt_goes_before_each_text(meter: type[Meter], options: dict, text: str) -> None:
    """A prompt given, named (pool.yml's replace the model's), or the model's default, is part of what is measured."""
    config = FakeConfig(prompts={"own": "o: ", "document": "D: "})
    found = measured("one", config=config, meter=meter(), **options)
    assert (list(found.texts), found.ids) == ([text], measured(text).ids)


def test_an_unknown_prompt_lists_the_known_ones() -> None:
    """A wrong prompt_name is answered with the names there are."""
    with pytest.raises(InvalidRequest, match="known: document, query") as caught:
        measured("one", prompt_name="nope")
    assert set(caught.value.fields) == {"options.prompt_name"}
    with pytest.raises(InvalidRequest, match="this model has none"):
        measured("one", meter=FakeMeter(), prompt_name="nope")


def test_an_unknown_option_of_a_local_model_is_refused() -> None:
    """An option nobody would honour is refused by name, not ignored."""
    with pytest.raises(UnsupportedOption, match="other, task") as caught:
        measured("one", extra={"task": 1, "other": 2})
    assert set(caught.value.fields) == {"options.task", "options.other"}


def test_a_remote_service_gets_the_options_that_are_its_business() -> None:
    """Truncation, its own prompt names and unknown options are passed on; only equal ones may share a call."""
    options = {"max_seq_length": 9999, "truncate": "left", "prompt_name": "theirs", "extra": {"task": "t"}}
    found = measured("one", "four" * 4, config=HTTP, meter=Remote(), **options)
    assert json.loads(found.group) == {"max_seq_length": 9999, "truncate": "left", "prompt_name": "theirs", "task": "t"}
    assert (found.ids, found.tokens, list(found.texts)) == (None, [1, 5], ["one", "four" * 4])
    again = measured("two", config=HTTP, meter=Remote(), **options)
    assert again.group == found.group
    assert measured("one", config=HTTP, meter=Remote()).group is None


def test_a_prompt_known_here_is_applied_here_for_a_remote_service_too() -> None:
    """A prompt of pool.yml is put before the text and not passed on."""
    for options in ({"prompt_name": "query"}, {"input_type": "search_query"}):
        found = measured("one", config=HTTP, meter=Remote(), **options)
        assert (list(found.texts), found.group) == (["rq: one"], None)
    assert json.loads(measured("one", config=HTTP, meter=Remote(), input_type="document").group) == {
        "input_type": "document"
    }
