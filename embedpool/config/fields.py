"""A setting is declared once, as a dataclass field with `option(...)`; its marshmallow schema is built from that.

The same declarations feed validation, the commented sample files, the environment overrides and the tables in docs/.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import reprlib
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

import marshmallow as ma
import yaml
from marshmallow import fields, validate

from embedpool.errors import LONGEST_NAME, near_names

LONGEST_SHOWN = 40  # characters of a value
MOST_UNKNOWN_KEYS = 10  # named in one answer
DUPLICATE_KEY = re.compile(r"found duplicate key (.+?) with value.*", re.DOTALL)


def option(
    default: Any,
    doc: str,
    *,
    choices: tuple[str, ...] = (),
    minimum: float | None = None,
    maximum: float | None = None,
    pattern: str | None = None,
    check: Callable[[Any], object] | None = None,
    schema: type[ma.Schema] | None = None,
    loads: bool = False,
) -> Any:
    """One documented setting. `loads` marks what makes a model load anew when it changes.

    `schema` is for a nested dataclass whose schema cannot be built from its fields alone.
    """
    metadata = {
        "doc": doc,
        "choices": choices,
        "minimum": minimum,
        "maximum": maximum,
        "pattern": pattern,
        "check": check,
        "schema": schema,
        "loads": loads,
    }
    if default is dataclasses.MISSING:
        return dataclasses.field(metadata=metadata)
    if isinstance(default, dict):
        return dataclasses.field(default_factory=lambda: dict(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def shown(value: Any) -> str:
    """A value in an error: its beginning, however large or deep it is."""
    return reprlib.repr(value)[:LONGEST_SHOWN]


# --- marshmallow takes "12", 12.7 and "yes" unless told otherwise; these do not


class StrictBoolean(fields.Boolean):
    """true or false, nothing that merely resembles them."""

    def _deserialize(self, value: Any, attr: str | None, data: Any, **kwargs: Any) -> bool:
        if not isinstance(value, bool):
            raise ma.ValidationError(f"must be true or false, not {shown(value)}")
        return value


class StrictInteger(fields.Integer):
    """A whole number, not a string and not a boolean."""

    def _deserialize(self, value: Any, attr: str | None, data: Any, **kwargs: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise ma.ValidationError(f"must be a whole number, not {shown(value)}")
        return value


class StrictFloat(fields.Float):
    """A finite number, not a string and not a boolean."""

    def _deserialize(self, value: Any, attr: str | None, data: Any, **kwargs: Any) -> float:
        try:
            if not isinstance(value, bool) and isinstance(value, int | float) and math.isfinite(float(value)):
                return value
        except OverflowError:
            pass
        raise ma.ValidationError(f"must be a finite number, not {shown(value)}")


class StrictText(fields.String):
    """A text; what YAML reads as a number, a date or true wants quotation marks."""

    def _deserialize(self, value: Any, attr: str | None, data: Any, **kwargs: Any) -> Any:
        if not isinstance(value, str):
            kinds: dict[type, str] = {list: "a list", dict: "a mapping"}
            given = kinds.get(type(value), shown(value))
            raise ma.ValidationError(f"must be a text, not {given}: put it in quotation marks")
        return super()._deserialize(value, attr, data, **kwargs)


class StrictSchema(ma.Schema):
    """null means absent, and an unknown key is an error that names the nearest known one."""

    @ma.pre_load
    def _drop_nulls_and_name_unknown_keys(self, data: Any, **kwargs: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        known = {f.data_key or name: f for name, f in self.load_fields.items()}
        unknown = [key for key in data if key not in known] if self.unknown == ma.RAISE else []
        if unknown:
            named = [str(key)[:LONGEST_NAME] for key in unknown[:MOST_UNKNOWN_KEYS]]
            raise ma.ValidationError({key: [unknown_key(key, known)] for key in named})
        return {key: value for key, value in data.items() if value is not None}


def unknown_key(key: str, known: typing.Iterable[str]) -> str:
    """The sentence about an unknown key, with the nearest known ones."""
    known = sorted(known)
    near = near_names(key, known)
    return f"unknown key {key!r}; " + (f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(known)}")


@functools.cache
def schema_of(cls: Any) -> type[StrictSchema]:
    """The marshmallow schema of a dataclass made of `option(...)` fields; loading gives an instance."""
    hints = typing.get_type_hints(cls)
    members: dict[str, Any] = {
        f.name: _field_of(f, hints[f.name]) for f in dataclasses.fields(cls) if f.name in hints and f.init
    }

    @ma.post_load
    def build(_: ma.Schema, data: dict[str, Any], **kwargs: Any) -> Any:
        return cls(**data)

    return type(f"{cls.__name__}Schema", (StrictSchema,), {**members, "build": build})


def _field_of(f: dataclasses.Field[Any], hint: Any) -> fields.Field[Any]:
    if isinstance(hint, types.UnionType):  # `X | None`: null is dropped before it gets here
        hint = next(arg for arg in typing.get_args(hint) if arg is not types.NoneType)
    required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    if f.metadata.get("schema"):
        return fields.Nested(f.metadata["schema"], required=required)
    if dataclasses.is_dataclass(hint):
        return fields.Nested(schema_of(typing.cast(type, hint)), required=required)
    rules = _rules_of(f.metadata)
    plain: dict[Any, type[fields.Field[Any]]] = {
        bool: StrictBoolean,
        int: StrictInteger,
        float: StrictFloat,
        str: StrictText,
    }
    if hint is str and f.metadata["choices"]:
        return _Choice(required=required, validate=rules, metadata={"choices": f.metadata["choices"]})
    if hint in plain:
        return plain[hint](required=required, validate=rules)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple:
        return _Tuple(plain[args[0]](), required=required, validate=rules)
    if origin is not None and issubclass(origin, Mapping):
        inner = fields.Raw(allow_none=True) if args[1] is Any else plain[args[1]]()
        return fields.Dict(keys=fields.String(), values=inner, required=required, validate=rules)
    raise TypeError(f"no schema field for {f.name}: {hint}")  # a mistake in our own declarations


class _Choice(StrictText):
    """One of some words in any case, among them perhaps `off`, which YAML reads as false."""

    def _deserialize(self, value: Any, attr: str | None, data: Any, **kwargs: Any) -> Any:
        found: str = super()._deserialize("off" if value is False else value, attr, data, **kwargs)
        return found.lower() if found.lower() in self.metadata["choices"] else found


class _Tuple(fields.List[Any]):
    def _deserialize(self, value: Any, attr: str | None, data: Any, **kwargs: Any) -> Any:
        return tuple(super()._deserialize(value, attr, data, **kwargs))


def _rules_of(metadata: Mapping[str, Any]) -> list[Callable[[Any], object]]:
    rules: list[Callable[[Any], object]] = []
    if metadata["choices"]:
        rules.append(validate.OneOf(metadata["choices"], error=f"must be one of {', '.join(metadata['choices'])}"))
    low, high = metadata["minimum"], metadata["maximum"]
    if low is not None or high is not None:
        rules.append(validate.Range(min=low, max=high))
    if metadata["pattern"]:
        rules.append(
            validate.Regexp(metadata["pattern"], error="must match " + re.sub(r"([{}])", r"\1\1", metadata["pattern"]))
        )
    if metadata["check"]:
        rules.append(metadata["check"])
    return rules


def json_schema_of(cls: Any) -> dict[str, Any]:
    """What JSON may hold of a dataclass made of `option(...)` fields, with what its settings say of themselves."""
    hints = typing.get_type_hints(cls)
    return {
        "type": "object",
        "properties": {
            f.name: _json_of(f, hints[f.name]) for f in dataclasses.fields(cls) if f.name in hints and f.init
        },
        "additionalProperties": False,
    }


def _json_of(f: dataclasses.Field[Any], hint: Any) -> dict[str, Any]:
    if isinstance(hint, types.UnionType):
        hint = next(arg for arg in typing.get_args(hint) if arg is not types.NoneType)
    names: dict[Any, str] = {bool: "boolean", int: "integer", float: "number", str: "string", tuple: "array"}
    found = {"type": names.get(typing.get_origin(hint) or hint, "object"), "description": f.metadata["doc"]}
    if f.default is not dataclasses.MISSING:
        found["default"] = list(f.default) if isinstance(f.default, tuple) else f.default
    for name, meaning in (("choices", "enum"), ("minimum", "minimum"), ("maximum", "maximum")):
        if f.metadata[name] not in (None, ()):
            found[meaning] = list(f.metadata[name]) if name == "choices" else f.metadata[name]
    return found


def faults(messages: Any, path: tuple[str | int, ...] = ()) -> list[tuple[tuple[str | int, ...], str]]:
    """marshmallow's nested messages as a flat list of (path, sentence)."""
    if isinstance(messages, Mapping):
        found = []
        for key, inner in messages.items():
            found += faults(inner, path if key == "_schema" else (*path, key))
        return found
    return [(path, " ".join(str(m).rstrip(".") for m in messages))]


def dotted(path: tuple[str | int, ...]) -> str:
    """('models', 0, 'alias') as models[0].alias."""
    return "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in path).lstrip(".")


def line_of(text: str, path: tuple[str | int, ...]) -> int:
    """The 1-based line of the key at `path` in a YAML text, or of its nearest ancestor."""
    try:
        node, line = yaml.compose(text, Loader=yaml.SafeLoader), 1
    except yaml.YAMLError as error:  # what one YAML library takes the other may not
        mark = getattr(error, "problem_mark", None)
        return mark.line + 1 if mark else 1
    for step in path:
        if isinstance(node, yaml.MappingNode):
            found = [(k, v) for k, v in node.value if getattr(k, "value", None) == str(step)]
            if not found:
                return line
            line, node = found[-1][0].start_mark.line + 1, found[-1][1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(step, int) and step < len(node.value):
            node = node.value[step]
            line = node.start_mark.line + 1
        else:
            return line
    return line


def describe_faults(file: str, text: str, messages: Any) -> str:
    """Describe a schema's errors, one a line: file, line, key, sentence."""
    return "\n".join(
        f"{file}, line {line_of(text, path)}: {dotted(path) or 'the document'}: {sentence}"
        for path, sentence in faults(messages)
    )


def yaml_fault(name: str, error: Exception) -> str:
    """Describe a YAML library's error in one line, with file and line."""
    mark = getattr(error, "problem_mark", None)
    where = f", line {mark.line + 1}" if mark else ""
    says = getattr(error, "problem", None) or str(error).splitlines()[0]
    says = DUPLICATE_KEY.sub(r"the key \1 stands here twice", says)
    return f"{name}{where}: {says}"


def explicit(instance: Any) -> dict[str, Any]:
    """The fields of a dataclass instance that differ from their defaults, nested, as plain values for a file."""
    found: dict[str, Any] = {}
    for f in dataclasses.fields(instance):
        value = getattr(instance, f.name)
        default = f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
        if value == default:
            continue
        found[f.name] = explicit(value) if dataclasses.is_dataclass(value) else plain_value(value)
    return found


def plain_value(value: Any) -> Any:
    """Tuples as lists and mappings as dicts, for a file or an answer."""
    if isinstance(value, tuple):
        return list(value)
    return dict(value) if isinstance(value, Mapping) else value
