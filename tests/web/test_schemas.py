"""What may come in."""

from __future__ import annotations

from typing import Any

import pytest

from embedpool.config.settings import Limits
from embedpool.errors import EmptyInput, InvalidRequest, TooManyTexts
from embedpool.tasks.embed import EmbedOptions
from embedpool.web.schemas import (
    AliasSchema,
    EmbedSchema,
    EnableSchema,
    OptionsSchema,
    RegisterSchema,
    check_texts,
    embed_options,
    load,
)

ALL_OPTIONS = {
    "normalize": False,
    "max_seq_length": 5,
    "dtype": "float16",
    "dimensions": 3,
    "prompt": "",
    "prompt_name": "query",
    "truncate": "left",
    "precision": "int8",
}


def test_every_option_reaches_the_pool() -> None:
    """Each option of the contract arrives as it was given; `encoding` is the answer's own business."""
    options = embed_options(load(OptionsSchema, {**ALL_OPTIONS, "encoding": "base64"}))
    assert options == EmbedOptions(**ALL_OPTIONS)


def test_no_options_are_the_models_own_settings() -> None:
    """Nothing given, or null throughout, is the same as no options."""
    for given in ({}, dict.fromkeys([*ALL_OPTIONS, "encoding", "other"])):
        assert embed_options(load(OptionsSchema, given)) == EmbedOptions()


def test_unknown_options_are_kept_for_remote_services() -> None:
    """What is not ours is passed on with its value untouched."""
    loaded = load(OptionsSchema, {"instruction": {"a": [1, None]}, "dtype": "float16"})
    assert embed_options(loaded) == EmbedOptions(dtype="float16", extra={"instruction": {"a": [1, None]}})


@pytest.mark.parametrize(
    ("schema", "document", "path"),
    [
        (EmbedSchema, {"texts": ["a"]}, "model"),
        (EmbedSchema, {"model": "m"}, "texts"),
        (EmbedSchema, {"model": "m", "texts": [], "options": "x"}, "options"),
        (EmbedSchema, {"model": "m", "texts": [], "options": {"normalize": "no"}}, "options.normalize"),
        (AliasSchema, {"alias": "a"}, "model"),
        (EnableSchema, {"model": "m", "enabled": 1}, "enabled"),
        (RegisterSchema, {"model": "m"}, "driver_type"),
        (RegisterSchema, {"model": "m", "driver_type": "fake", "driver_config": "x"}, "driver_config"),
    ],
)
def test_a_fault_is_named_by_its_path(schema: Any, document: dict[str, Any], path: str) -> None:
    """The path of a bad field is in `fields` and in the message."""
    with pytest.raises(InvalidRequest) as caught:
        load(schema, document)
    assert list(caught.value.fields) == [path]
    assert path in caught.value.message


def test_texts_within_the_limits_are_given_back() -> None:
    """A list of strings, empty ones among them, passes."""
    assert check_texts(["a", ""], Limits(max_texts_per_request=2, max_chars_per_text=1)) == ["a", ""]


@pytest.mark.parametrize(
    ("texts", "error", "fields"),
    [
        ([], EmptyInput, []),
        (["a"] * 4, TooManyTexts, []),
        ("a", InvalidRequest, ["inputs"]),
        (None, InvalidRequest, ["inputs"]),
        (["a", 1], InvalidRequest, ["inputs[1]"]),
        (["a", "abcdef"], InvalidRequest, ["inputs[1]"]),
    ],
)
def test_texts_outside_the_limits_are_refused(texts: Any, error: type[Exception], fields: list[str]) -> None:
    """Each limit has its error, and a bad text is named by its place under the caller's own field name."""
    with pytest.raises(error) as caught:
        check_texts(texts, Limits(max_texts_per_request=3, max_chars_per_text=5), "inputs")
    assert list(caught.value.fields) == fields  # type: ignore[attr-defined]
