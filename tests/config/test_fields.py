from __future__ import annotations

import dataclasses
import math

import marshmallow as ma
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedpool.config.fields import describe_faults, dotted, explicit, faults, line_of, option, plain_value, schema_of


@dataclasses.dataclass(frozen=True)
class Inner:
    size: int = option(1, "a size", minimum=1, maximum=9)


@dataclasses.dataclass(frozen=True)
class Sample:
    name: str = option(dataclasses.MISSING, "its name", pattern=r"^[a-z]+\Z")
    flag: bool = option(False, "a switch")
    count: int | None = option(None, "a number", minimum=0)
    ratio: float = option(0.5, "a share")
    colour: str = option("red", "a colour", choices=("red", "green"))
    words: tuple[str, ...] = option((), "some words")
    table: dict[str, str] = option({}, "a table")
    inner: Inner = dataclasses.field(default_factory=Inner)


def load(**values: object) -> Sample:
    return schema_of(Sample)().load({"name": "a", **values})


def refused(**values: object) -> dict[str, str]:
    with pytest.raises(ma.ValidationError) as caught:
        load(**values)
    return {dotted(path): sentence for path, sentence in faults(caught.value.messages)}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("flag", v) for v in ("yes", "true", "", 0, 1, 1.0, [])),
        *(("count", v) for v in ("12", 12.7, 12.0, True, [1], math.inf)),
        *(("ratio", v) for v in ("0.5", True, math.nan, math.inf, -math.inf, {})),
        *(("name", v) for v in (5, 1.5, True, ["a"], {})),
        *(("words", v) for v in ("ab", {"a": 1}, [1], [None], 3)),
        *(("table", v) for v in ("ab", ["a"], {"a": 1}, {1: "a"}, 3)),
        *(("inner", v) for v in ("ab", 5, [1], {"size": "2"})),
    ],
)
def test_a_value_of_another_type_is_refused_and_never_converted(key: str, value: object) -> None:
    """ "12" is not a number, 12.7 not a whole one and "yes" not a boolean: the fault names the key."""
    assert all(path.split(".")[0].split("[")[0] == key for path in refused(**{key: value}))


def test_a_number_too_large_for_a_float_is_refused_like_any_other_bad_number() -> None:
    """A number with 400 digits is a fault of its key, not a crash."""
    assert list(refused(ratio=10**400)) == ["ratio"]


def test_right_types_are_taken_as_they_are() -> None:
    """A whole number is a number too, and a list of words becomes a tuple."""
    loaded = load(flag=True, count=3, ratio=2, colour="green", words=["x"], table={"a": "b"}, inner={"size": 4})
    assert loaded == Sample("a", True, 3, 2, "green", ("x",), {"a": "b"}, Inner(4))


@pytest.mark.parametrize("key", [f.name for f in dataclasses.fields(Sample) if f.name != "name"])
def test_null_means_absent(key: str) -> None:
    """A key given as null has its default."""
    assert load(**{key: None}) == Sample("a")


def test_null_does_not_fill_a_required_key() -> None:
    """null for a required key is the fault of leaving it out."""
    assert "Missing" in refused(name=None)["name"]


@pytest.mark.parametrize(
    ("values", "path", "says"),
    [
        ({"colr": "red"}, "colr", "did you mean colour"),
        ({"COUNT": 1}, "COUNT", "did you mean count"),
        ({"zzzzzz": 1}, "zzzzzz", "known: colour, count"),
        ({7: 1}, "7", "unknown key '7'"),
        ({"inner": {"sise": 1}}, "inner.sise", "did you mean size"),
        ({"colour": "blue"}, "colour", "must be one of red, green"),
        ({"name": "A"}, "name", "must match"),
        ({"count": -1}, "count", "0"),
        ({"inner": {"size": 10}}, "inner.size", "9"),
    ],
)
def test_a_refusal_says_where_and_what_would_do(values: dict[object, object], path: str, says: str) -> None:
    """An unknown key names the nearest known one; a bad value names its bounds or choices."""
    with pytest.raises(ma.ValidationError) as caught:
        schema_of(Sample)().load({"name": "a", **values})
    found = {dotted(p): sentence for p, sentence in faults(caught.value.messages)}
    assert list(found) == [path]
    assert says in found[path]


def test_a_document_that_is_no_mapping_is_refused() -> None:
    """A list or a word in place of a mapping is a fault of the whole."""
    for document in ([], "words", 5, None):
        with pytest.raises(ma.ValidationError):
            schema_of(Sample)().load(document)


def test_a_default_mapping_is_not_shared() -> None:
    """Two instances never share one dict."""
    assert Sample("a").table is not Sample("b").table


def test_a_declaration_without_a_schema_field_is_our_own_mistake() -> None:
    """A setting of a type nobody checks is found when the schema is built, not in production."""

    @dataclasses.dataclass(frozen=True)
    class Odd:
        when: bytes = option(b"", "bytes have no field")

    with pytest.raises(TypeError, match="when"):
        schema_of(Odd)


samples = st.builds(
    Sample,
    name=st.text("abc", min_size=1),
    flag=st.booleans(),
    count=st.none() | st.integers(0),
    ratio=st.floats(allow_nan=False, allow_infinity=False),
    colour=st.sampled_from(["red", "green"]),
    words=st.lists(st.text()).map(tuple),
    table=st.dictionaries(st.text(), st.text()),
    inner=st.builds(Inner, st.integers(1, 9)),
)


@given(samples)
def test_what_differs_from_the_defaults_is_enough_to_come_back(sample: Sample) -> None:
    """Writing only explicit values loses nothing."""
    assert schema_of(Sample)().load(explicit(sample)) == sample


def test_defaults_are_not_written() -> None:
    """A value equal to its default does not appear in a file."""
    assert explicit(Sample("a", inner=Inner(1))) == {"name": "a"}
    assert explicit(Sample("a", words=("x",), inner=Inner(2))) == {"name": "a", "words": ["x"], "inner": {"size": 2}}


def test_plain_values_are_lists_and_dicts() -> None:
    """What goes into a file or an answer is made of plain types."""
    assert plain_value(("a", "b")) == ["a", "b"]
    assert type(plain_value({"a": 1})) is dict
    assert plain_value(3) == 3


TEXT = """\
# a comment
version: 1
models:
  - model: a
    driver: {type: fake, config: {
      dim: 3}}
  -
    model: b
    'alias': c
"""


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ((), 1),
        (("version",), 2),
        (("models",), 3),
        (("models", 0), 4),
        (("models", 0, "driver"), 5),
        (("models", 0, "driver", "config", "dim"), 6),
        (("models", 0, "driver", "config", "nope"), 5),
        (("models", 1, "model"), 8),
        (("models", 1, "alias"), 9),
        (("models", 7), 3),
        (("nope", "deeper"), 1),
        (("version", "deeper"), 2),
    ],
)
def test_a_fault_is_shown_at_the_line_of_its_key(path: tuple[str | int, ...], line: int) -> None:
    """The line is that of the key, or of its nearest ancestor when the key is missing."""
    assert line_of(TEXT, path) == line


def test_faults_are_described_a_line_each() -> None:
    """Every fault has file, line, key and sentence, so all can be mended in one go."""
    messages = {"version": ["Bad."], "models": {1: {"alias": ["Wrong.", "Very."]}}, "_schema": ["All bad."]}
    assert describe_faults("pool.yml", TEXT, messages).splitlines() == [
        "pool.yml, line 2: version: Bad",
        "pool.yml, line 9: models[1].alias: Wrong Very",
        "pool.yml, line 1: the document: All bad",
    ]
