"""Marshmallow schemas of the requests; also the source of the API's documentation.

Texts are checked by hand: thousands of strings need one pass, not a field each.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import marshmallow as ma
from flask import Request
from marshmallow import fields, validate

from embedpool.config.fields import StrictBoolean, StrictInteger, StrictSchema, dotted, faults, shown
from embedpool.config.settings import Limits
from embedpool.config.spec import DRIVER_CONFIGS, PLACES
from embedpool.errors import EmptyInput, InvalidRequest, TooManyTexts
from embedpool.tasks.embed import INPUT_TYPES, EmbedOptions
from embedpool.tasks.hybrid import OUTPUTS
from embedpool.web.http_request import environ_key

TIMEOUT_HEADER = "X-Request-Timeout-Ms"
TIMEOUT = environ_key(TIMEOUT_HEADER)
LONGEST_TIMEOUT_DIGITS = 12


# For the API's document: fields that are checked by hand
TEXTS = {"type": "array", "items": {"type": "string"}, "minItems": 1}
TEXT_OR_TEXTS = {"oneOf": [{"type": "string"}, TEXTS]}


class Outputs(fields.Raw):
    """One output or several: a name, names with commas between them, or a list."""

    def _deserialize(self, value: Any, attr: str | None, data: Any, **kwargs: Any) -> tuple[str, ...]:
        names = value.split(",") if isinstance(value, str) else value
        if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
            raise ma.ValidationError("must be the name of an output, or a list of them")
        if odd := [name for name in names if name not in OUTPUTS]:
            raise ma.ValidationError(f"must be of {', '.join(OUTPUTS)}, not {shown(odd[0])}")
        return tuple(dict.fromkeys(names))


OUTPUT = {"enum": list(OUTPUTS)}


class OptionsSchema(StrictSchema):
    """`options` of POST /embed. Unknown ones are kept: remote services get them, local models refuse them."""

    class Meta:
        """marshmallow's settings."""

        unknown = ma.INCLUDE

    normalize = StrictBoolean()
    max_seq_length = StrictInteger(validate=validate.Range(min=1))
    dtype = fields.String(validate=validate.OneOf(("float32", "float16")))
    dimensions = StrictInteger(validate=validate.Range(min=1))
    prompt = fields.String()
    prompt_name = fields.String()
    input_type = fields.String(validate=validate.OneOf(INPUT_TYPES))
    truncate = fields.String(validate=validate.OneOf(("error", "left", "right")))
    precision = fields.String(validate=validate.OneOf(("float32", "int8", "uint8", "binary", "ubinary")))
    encoding = fields.String(validate=validate.OneOf(("float", "base64")), load_default="float")
    on_error = fields.String(validate=validate.OneOf(("fail", "partial")))
    output = Outputs(metadata={"oneOf": [OUTPUT, {"type": "array", "items": OUTPUT, "minItems": 1}]})
    top_k = StrictInteger(validate=validate.Range(min=1))
    tokens = StrictBoolean()


class EmbedSchema(StrictSchema):
    """Body of POST /embed."""

    model = fields.String(required=True)
    texts = fields.Raw(required=True, metadata=TEXTS)
    options = fields.Nested(OptionsSchema, load_default=dict)


class AliasSchema(StrictSchema):
    """Body of POST /models/alias; null or "" clears the alias."""

    model = fields.String(required=True)
    alias = fields.String()


class EnableSchema(StrictSchema):
    """Body of POST /models/enable."""

    model = fields.String(required=True)
    enabled = StrictBoolean(required=True)


class ReloadSchema(StrictSchema):
    """Body of POST /reload."""

    reason = fields.String(load_default="asked over HTTP")


class ClearCacheSchema(StrictSchema):
    """Body of POST /cache/clear; without a model all is forgotten."""

    model = fields.String()


class RegisterSchema(StrictSchema):
    """Body of POST /models/register; edit.parse_registration checks the values, with the schemas of pool.yml."""

    model = fields.Raw(required=True, metadata={"type": "string"})
    alias = fields.Raw(metadata={"type": "string"})
    place = fields.Raw(metadata={"type": "string", "enum": list(PLACES)})
    resources = fields.Raw(metadata={"type": "object"})
    enabled = fields.Raw(metadata={"type": "boolean"})
    driver_type = fields.Raw(required=True, metadata={"type": "string", "enum": list(DRIVER_CONFIGS)})
    driver_config = fields.Dict()
    min = fields.Raw(metadata={"type": "integer", "minimum": 0})
    max = fields.Raw(metadata={"type": "integer", "minimum": 1})
    idle_ttl_s = fields.Raw(metadata={"type": "number", "minimum": 0})
    queue_max_size = fields.Raw(metadata={"type": "integer", "minimum": 1})
    max_inflight_per_replica = fields.Raw(metadata={"type": "integer", "minimum": 1})


def load(schema: type[StrictSchema], document: Mapping[str, Any]) -> dict[str, Any]:
    """A document through a schema. Raises InvalidRequest with the path of each bad field."""
    try:
        loaded: dict[str, Any] = _instance(schema).load(document)
    except ma.ValidationError as error:
        found = {dotted(path): sentence for path, sentence in faults(error.messages)}
        raise InvalidRequest("; ".join(f"{path}: {says}" for path, says in found.items()), fields=found) from None
    return loaded


@functools.cache
def _instance(schema: type[StrictSchema]) -> StrictSchema:
    """One of each: making a schema costs more than a small request's whole validation."""
    return schema()


def check_texts(texts: Any, limits: Limits, path: str = "texts") -> list[str]:
    """A list of strings within the limits. Raises EmptyInput, TooManyTexts, InvalidRequest."""
    if not isinstance(texts, list):
        raise InvalidRequest(f"{path}: must be a list of strings", fields={path: "must be a list of strings"})
    if not texts:
        raise EmptyInput(f"{path}: the list is empty")
    if len(texts) > limits.max_texts_per_request:
        raise TooManyTexts(f"{path}: {len(texts)} texts, the limit of a request is {limits.max_texts_per_request}")
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            where = f"{path}[{i}]"
            raise InvalidRequest(f"{where}: must be a string", fields={where: "must be a string"})
        if len(text) > limits.max_chars_per_text:
            where, says = f"{path}[{i}]", f"{len(text)} characters, the limit is {limits.max_chars_per_text}"
            raise InvalidRequest(f"{where}: {says}", fields={where: says})
    return texts


def embed_options(loaded: Mapping[str, Any]) -> EmbedOptions:
    """The pool's options from loaded ones; some are the answer's business, unknown ones become `extra`."""
    known = {k: v for k, v in loaded.items() if k in _POOL_OPTIONS}
    extra = {k: v for k, v in loaded.items() if k not in OptionsSchema._declared_fields}
    return EmbedOptions(**known, extra=extra)


_POOL_OPTIONS = set(OptionsSchema._declared_fields) - {"encoding", "output", "tokens"}


def timeout_s(of: Request) -> float | None:
    """The deadline the client asks for, in seconds. Raises InvalidRequest."""
    given = of.environ.get(TIMEOUT)
    if given is None:
        return None
    if not given.isascii() or not given.isdigit() or len(given) > LONGEST_TIMEOUT_DIGITS or int(given) == 0:
        says = f"must be a positive whole number of milliseconds, of at most {LONGEST_TIMEOUT_DIGITS} digits"
        raise InvalidRequest(f"{TIMEOUT_HEADER}: {says}", fields={TIMEOUT_HEADER: says})
    return int(given) / 1000
