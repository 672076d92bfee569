"""pool.yml: read it, and change it under a lock, atomically, keeping hand-written comments."""

from __future__ import annotations

import dataclasses
import io
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import marshmallow as ma
import yaml
from marshmallow import fields
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap
from ruamel.yaml.error import YAMLError
from ruamel.yaml.scalarstring import DoubleQuotedScalarString

from embedpool.config import files
from embedpool.config.fields import StrictInteger, StrictSchema, describe_faults, explicit, schema_of, yaml_fault
from embedpool.config.spec import ModelSpec, PoolSpec, diff
from embedpool.errors import PoolFileInvalid

NEXT_LINE = "\x85"
EMPTY_POOL_YML = """\
# The models of this pool. Edit by hand or with `embedpool register`; a running server follows within a moment.
version: 1
models: []
"""


class PoolSchema(StrictSchema):
    """The document of pool.yml. `models` is required: an empty file is a fault, never an empty pool."""

    version = StrictInteger(load_default=1, validate=ma.validate.Equal(1))
    models = fields.List(fields.Nested(schema_of(ModelSpec)), required=True)

    @ma.validates_schema(skip_on_field_errors=True)
    def _names_are_unique(self, data: dict[str, Any], **kwargs: Any) -> None:
        used_by: dict[str, int] = {}
        for index, model in enumerate(data["models"]):
            for key, name in (("model", model.model), ("alias", model.alias)):
                if name is None or (key == "alias" and name == model.model):
                    continue
                if name in used_by:
                    raise ma.ValidationError(
                        {"models": {index: {key: [f"{name!r} is already used by models[{used_by[name]}]"]}}}
                    )
                used_by[name] = index


def parse(text: str, name: str = "pool.yml") -> PoolSpec:
    """The PoolSpec of a pool.yml's text. Raises PoolFileInvalid with file, line and key."""
    try:
        document = YAML(typ="safe", pure=True).load(text)  # plain values; the round-trip ones are only for edits
    except Exception as error:
        raise PoolFileInvalid(yaml_fault(name, error)) from None
    if document is None:
        raise PoolFileInvalid(f"{name}: the file is empty; a pool without models is written `models: []`")
    try:
        data = PoolSchema().load(document)
    except ma.ValidationError as error:
        raise PoolFileInvalid(describe_faults(name, text, error.messages)) from None
    return PoolSpec(tuple(data["models"]))


class PoolFile:
    """The file that is the state of the pool. Safe to use from several threads and processes."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def content(self) -> str:
        """The text as it stands. Raises PoolFileInvalid if there is none."""
        try:
            return self.path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise PoolFileInvalid(
                f"{self.path} does not exist; restore it, or start with an empty pool: `embedpool init` writes one"
            ) from None
        except (OSError, UnicodeDecodeError) as error:
            raise PoolFileInvalid(f"{self.path} cannot be read: {error}") from None

    def read(self) -> PoolSpec:
        """Read the file. Raises PoolFileInvalid."""
        return parse(self.content(), str(self.path))

    def edit(self, change: Callable[[PoolSpec], PoolSpec]) -> PoolSpec:
        """Apply a pure change under the file lock and give the new state.

        Raises what `change` raises, PoolFileInvalid if the file is broken (it is then left alone) and StorageError if
        it cannot be written (nothing is changed).
        """
        with files.locked(self.path):
            text = self.content()
            old = parse(text, str(self.path))
            new = change(old)
            if new != old:
                files.replace(self.path, edited(text, old, new))
            return new


# --- text surgery, so that comments and order survive: what goes is cut out as lines, the rest goes through ruamel


def edited(text: str, old: PoolSpec, new: PoolSpec) -> str:
    """The text of a pool.yml that says `old`, changed to say `new` and otherwise left as it is."""
    head, body = _split_head(text)
    change = diff(old, new)
    before = {m.model: m for m in old.models}
    try:
        for spec in change.changed:
            obsolete = [*_obsolete_keys(explicit(before[spec.model]), explicit(spec))]
            if before[spec.model].place != spec.place:
                obsolete.append(("driver", "config", "isolation"))  # its older spelling
            for path in obsolete:
                body = _cut(body, spec.model, path)
        document = _yaml(body).load(body)
        entries = {str(entry["model"]): entry for entry in document["models"]}
        for spec in change.changed:
            _update(entries[spec.model], _quoted(explicit(before[spec.model])), _quoted(explicit(spec)))
        if change.added and re.search(r"(?m)^models\s*:\s*\[\s*\]", body):
            document["models"] = []  # the block style of a file written by hand, instead of `[]`
        for spec in change.added:
            document["models"].append(_as_entry(spec))
        if change.added or change.changed:
            body = _dump(document, body)
        for name in change.removed:
            body = _cut(body, name)
        if parse(head + body) == new:
            return head + body
    except (PoolFileInvalid, YAMLError, yaml.YAMLError):
        pass
    raise PoolFileInvalid(
        "this change cannot be written into pool.yml as it is written (an anchor that other entries use?); "
        "edit the file by hand"
    )


def _split_head(text: str) -> tuple[str, str]:
    """What stands up to a document marker, which ruamel would drop, and the rest."""
    marker = re.search(r"(?m)^---[ \t]*\n", text)
    return (text[: marker.end()], text[marker.end() :]) if marker else ("", text)


def _as_entry(spec: ModelSpec) -> CommentedMap:
    values = _quoted(explicit(spec))
    ordered = {"model": spec.model, "alias": spec.alias, "place": values.get("place"), "enabled": spec.enabled}
    entry = CommentedMap({k: v for k, v in ordered.items() if v is not None})
    entry["driver"] = {"type": spec.driver.type, "config": values["driver"].get("config", {})}
    for key in ("resources", "scaling", "queue"):
        if key in values:
            entry[key] = values[key]
    return entry


def _quoted(value: Any) -> Any:
    """The same to be written, with quotes in which a next-line character is escaped: elsewhere it reads as a space."""
    if isinstance(value, dict):
        return {_quoted(key): _quoted(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_quoted(inner) for inner in value]
    return DoubleQuotedScalarString(value) if isinstance(value, str) and NEXT_LINE in value else value


def _obsolete_keys(before: dict[str, Any], after: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """Paths of keys whose value has gone back to its default."""
    for key, value in before.items():
        if key not in after:
            yield (key,)
        elif isinstance(value, dict) and isinstance(after[key], dict):
            yield from ((key, *path) for path in _obsolete_keys(value, after[key]))


def _update(node: Any, before: dict[str, Any], after: dict[str, Any]) -> None:
    """Write into `node` what differs between two explicit forms, touching nothing else.

    A new key goes behind the first one, or before the only one: the comment behind a mapping's last key is about what
    comes next.
    """
    for key, value in after.items():
        if key in before and before[key] == value:
            continue
        if isinstance(value, dict) and isinstance(node.get(key), dict):
            _update(node[key], before.get(key, {}), value)
        elif key in node:
            node[key] = value
        else:
            node.insert(1 if len(node) > 1 else 0, key, value)


def _cut(text: str, model: str, path: tuple[str, ...] = ()) -> str:
    """The text without a model, or without one key of it; comments around it stay."""
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    assert isinstance(root, yaml.MappingNode)  # it was parsed before
    sequence = _value(root, "models")
    item = next(entry for entry in sequence.value if _value(entry, "model").value == model)
    parent, first, last = sequence, item, item
    for step in path:
        found = [(key, value) for key, value in last.value if key.value == step]
        if not found:  # it stands in a merged mapping; the entry itself gets the new value
            return text
        parent, (first, last) = last, found[0]
    start, end = first.start_mark, last.end_mark
    if parent.flow_style:
        return _cut_span(text, start.index, end.index)
    lines = text.splitlines(keepends=True)
    number = start.line
    while not path and not lines[number].lstrip().startswith("-"):  # the dash may stand alone above its entry
        number -= 1
    if path and lines[number][: start.column].strip():  # the first key, beside its dash, which stays
        lines[number] = lines[number][: start.column] + "\n"
        number += 1
    behind = _last_line(last) + 1
    kept = [line for line in lines[number:behind] if path and line.lstrip().startswith("#")]
    text = "".join(lines[:number] + kept + lines[behind:])
    return text if path or len(sequence.value) > 1 else _without_models(text)


def _cut_span(text: str, start: int, end: int) -> str:
    """The text of a flow list or mapping without one member and one comma."""
    behind = re.match(r"\s*,", text[end:])
    if behind:
        return text[:start] + text[end + behind.end() :].lstrip(" ")
    before = re.search(r",[ \t]*((?:\s*(?:#.*)?\n)*\s*)\Z", text[:start])
    return (text[: before.start()] + before[1] if before else text[:start]) + text[end:]


def _without_models(text: str) -> str:
    """`models:` without an entry → `models: []`."""
    root: Any = yaml.compose(text, Loader=yaml.SafeLoader)
    key = next(k for k, _ in root.value if k.value == "models")
    colon = text.index(":", key.end_mark.index) + 1
    return f"{text[:colon]} []{text[colon:]}"


def _value(node: yaml.Node, key: str) -> Any:
    return next(value for k, value in node.value if k.value == key)


def _last_line(node: yaml.Node) -> int:
    """The last line with content: a block node's own end mark lies behind the comments that follow it."""
    if isinstance(node, yaml.ScalarNode) or getattr(node, "flow_style", False) or not node.value:
        end = node.end_mark
        return end.line if end.column or not isinstance(node, yaml.ScalarNode) else end.line - 1
    children = [n for pair in node.value for n in pair] if isinstance(node, yaml.MappingNode) else node.value
    return max(_last_line(child) for child in children)


def _yaml(text: str = "") -> YAML:
    parser = YAML()
    parser.preserve_quotes = True
    parser.width = 4096
    offset = 0 if re.search(r"(?m)^-\s", text) else 2  # whether list items stand below their key or indented
    parser.indent(mapping=2, sequence=offset + 2, offset=offset)
    return parser


def _dump(document: Any, text: str) -> str:
    stream = io.StringIO()
    _yaml(text).dump(document, stream)
    return stream.getvalue()


def as_document(spec: ModelSpec) -> dict[str, Any]:
    """A model's spec as /models shows it: every key, defaults included; a base URL without its credentials."""
    document: dict[str, Any] = dataclasses.asdict(spec)
    config = document["driver"]["config"]
    if config.get("base_url"):
        config["base_url"] = without_credentials(config["base_url"])
        config["base_urls"] = [without_credentials(url) for url in config["base_urls"]]
    return document


def without_credentials(url: str) -> str:
    """A URL that may be shown."""
    parts = urlsplit(url)
    _, at, host = parts.netloc.rpartition("@")
    return urlunsplit(parts._replace(netloc=f"***@{host}")) if at else url
