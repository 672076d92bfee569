"""APIs of other servers. Each dialect translates its requests to the pool's, and the pool's answers and errors back.

A field of a dialect's schema that stands for an option of POST /embed says so in its metadata; the table in
docs/clients.md is generated from it. `SHAPES` says below which paths errors have the format of a dialect, also for
unknown paths and methods.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import marshmallow as ma
from marshmallow import fields, validate

from embedpool.config.fields import StrictInteger, shown
from embedpool.config.settings import Limits
from embedpool.errors import EmbedpoolError, InvalidRequest
from embedpool.tasks.embed import INPUT_TYPES
from embedpool.web.compat import CompatSchema, YesOrNo
from embedpool.web.http_request import here
from embedpool.web.schemas import check_texts

POLICIES = {True: "right", False: "error"}  # where truncation is a yes or no
NIM = {"NONE": "error", "START": "left", "END": "right"}  # Cohere's and NVIDIA's words for it


def means(option: str, values: Mapping[Any, Any] | None = None) -> dict[str, Any]:
    """Metadata of a field that stands for `option`; `values` maps a client's words to ours."""
    return {"options": (option,), "read": lambda said: {option: values[said] if values else said}}


def chooses(values: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Metadata of a field each value of which says which option it stands for."""
    return {
        "options": tuple({option: None for meant in values.values() for option in meant}),
        "read": values.__getitem__,
    }


def part_of(*options: str) -> dict[str, Any]:
    """Metadata of a field that has to do with `options` in a way that its dialect reads itself."""
    return {"options": options, "read": lambda said: {}}


def options_of(schema: type[ma.Schema], body: Mapping[str, Any]) -> dict[str, Any]:
    """The options that the fields of a loaded body stand for. Raises InvalidRequest where two contradict each other."""
    found: dict[str, Any] = {}
    said_by: dict[str, str] = {}
    for name, field in schema._declared_fields.items():
        if name not in body or "read" not in field.metadata:
            continue
        for option, value in field.metadata["read"](body[name]).items():
            if found.setdefault(option, value) != value:
                message = f"contradicts {said_by[option]}"
                raise InvalidRequest(f"{name}: {message}", fields={name: message})
            said_by[option] = name
    here().words |= {f"options.{option}": name for option, name in said_by.items()}
    return found


def texts_of(given: Any, limits: Limits, path: str) -> list[str]:
    """A string is a list of one; an entry may be an object with a text, as Jina has it. Raises as check_texts does."""
    here().words["texts"] = path
    rows = [given] if isinstance(given, str | dict) else given
    if isinstance(rows, list):
        rows = [row["text"] if isinstance(row, dict) and set(row) == {"text"} else row for row in rows]
    return check_texts(rows, limits, path)


class Truncate(fields.Raw):
    """A yes or no, also as a word, or where to cut in Cohere's and NVIDIA's words."""

    def _deserialize(self, value: Any, attr: str | None, data: Any, **kwargs: Any) -> str:
        if isinstance(value, str) and value.upper() in NIM:
            return NIM[value.upper()]
        try:
            return POLICIES[YesOrNo().deserialize(value)]
        except ma.ValidationError:
            raise ma.ValidationError(f"must be true, false, {', '.join(NIM)}, not {shown(value)}") from None


def only(value: Any, says: str) -> Callable[[Any], None]:
    """A check of a field that other servers have: its other values ask for what this one cannot do."""

    def check(given: Any) -> None:
        if given != value:
            raise ma.ValidationError(says)

    return check


def status_with_400(error: EmbedpoolError) -> int:
    """For APIs in which whatever is wrong with a body is 400."""
    return 400 if error.status in (413, 415, 422) else error.status


# vLLM's number of tokens to keep; -1 is the model's own.
UNLESS_NEGATIVE = {"options": ("max_seq_length",), "read": lambda said: {"max_seq_length": said} if said > 0 else {}}
# infinity's own client sends 0 for "all of them".
UNLESS_0 = {"options": ("dimensions",), "read": lambda said: {"dimensions": said} if said else {}}


class CommonOptions(CompatSchema):
    """Options in the words of all these APIs: whichever a client uses means the same everywhere."""

    dimensions = StrictInteger(validate=validate.Range(min=0), metadata=UNLESS_0)
    output_dimension = StrictInteger(validate=validate.Range(min=1), metadata=means("dimensions"))  # Voyage, Cohere
    input_type = fields.String(validate=validate.OneOf(INPUT_TYPES), metadata=means("input_type"))
    task = fields.String(validate=validate.OneOf(INPUT_TYPES), metadata=means("input_type"))  # Jina
    prompt_name = fields.String(metadata=means("prompt_name"))
    normalize = YesOrNo(metadata=means("normalize"))
    normalized = YesOrNo(metadata=means("normalize"))  # Jina
    truncate = Truncate(metadata=means("truncate"))
    truncation = YesOrNo(metadata=means("truncate", POLICIES))  # Voyage
    truncate_prompt_tokens = StrictInteger(  # vLLM
        validate=[validate.Range(min=-1), validate.NoneOf([0], error="must be a number of tokens, or -1")],
        metadata=UNLESS_NEGATIVE,
    )
    add_special_tokens = YesOrNo(validate=only(True, "texts are embedded with their special tokens"))  # vLLM
    late_chunking = YesOrNo(validate=only(False, "ask /v1/embeddings or /v1/contextualizedembeddings for it"))
    return_multivector = YesOrNo(validate=only(False, "ask /v1/embeddings or /v1/multi-vector for it"))
