"""pool.yml: read it, and change it under a lock, atomically, keeping the comments of whoever wrote it by hand."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import marshmallow as ma
import yaml
from filelock import FileLock, Timeout
from marshmallow import fields
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap
from ruamel.yaml.error import YAMLError

from embedpool.config.fields import StrictInteger, StrictSchema, describe_faults, explicit, schema_of
from embedpool.config.settings import yaml_fault
from embedpool.config.spec import ModelSpec, PoolSpec, diff
from embedpool.errors import PoolFileInvalid, StorageError

LOCK_TIMEOUT_S = 30

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
        owner: dict[str, int] = {}
        for index, model in enumerate(data["models"]):
            for key, name in (("model", model.model), ("alias", model.alias)):
                if name is None or (key == "alias" and name == model.model):
                    continue
                if name in owner:
                    raise ma.ValidationError(
                        {"models": {index: {key: [f"{name!r} is already used by models[{owner[name]}]"]}}}
                    )
                owner[name] = index


def parse(text: str, name: str = "pool.yml") -> PoolSpec:
    """The PoolSpec of a pool.yml's text. Raises PoolFileInvalid with file, line and key."""
    try:
        document = YAML(typ="safe", pure=True).load(text)  # plain values; the round-trip ones are only for edits
    except YAMLError as error:
        raise PoolFileInvalid(yaml_fault(name, error)) from None  # type: ignore[arg-type]
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
            raise PoolFileInvalid(f"{self.path} does not exist; `embedpool init` writes it") from None
        except (OSError, UnicodeDecodeError) as error:
            raise PoolFileInvalid(f"{self.path} cannot be read: {error}") from None

    def read(self) -> PoolSpec:
        """What the file says now. Raises PoolFileInvalid."""
        return parse(self.content(), str(self.path))

    def edit(self, change: Callable[[PoolSpec], PoolSpec]) -> PoolSpec:
        """Apply a pure change under the file lock and give the new state.

        Raises what `change` raises, PoolFileInvalid if the file is broken (it is then left alone) and StorageError if
        it cannot be written (nothing is changed).
        """
        with self._locked():
            text = self.content()
            old = parse(text, str(self.path))
            new = change(old)
            if new != old:
                self._write(edited(text, old, new))
            return new

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        target = self._target()
        try:
            lock = FileLock(f"{target}.lock", timeout=LOCK_TIMEOUT_S)
            lock.acquire()
        except Timeout:
            raise StorageError(f"{target} is locked by another process for over {LOCK_TIMEOUT_S} s") from None
        except OSError as error:
            raise StorageError(f"{target} cannot be locked: {error}") from None
        try:
            yield
        finally:
            lock.release()

    def _target(self) -> Path:
        """The file behind a symlink: replacing the link itself would cut it off from where it points."""
        return Path(os.path.realpath(self.path))

    def _write(self, text: str) -> None:
        target = self._target()
        temporary: str | None = None
        try:
            mode = target.stat().st_mode
            handle, temporary = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, mode & 0o7777)
            os.replace(temporary, target)
        except OSError as error:
            if temporary:
                with contextlib.suppress(OSError):
                    os.unlink(temporary)
            raise StorageError(f"{target} cannot be written: {error}; nothing was changed") from None


# --- text surgery: pool.yml goes through ruamel both ways, so that comments and order survive


def edited(text: str, old: PoolSpec, new: PoolSpec) -> str:
    """The text of a pool.yml that says `old`, changed to say `new` and otherwise left as it is."""
    change = diff(old, new)
    document = _yaml(text).load(text)
    entries = {str(entry["model"]): entry for entry in document["models"]}
    before = {m.model: m for m in old.models}
    for spec in change.changed:
        _update(entries[spec.model], explicit(before[spec.model]), explicit(spec))
    if change.added and not document["models"]:
        document["models"] = []  # the block style of a file written by hand, instead of `[]`
    for spec in change.added:
        document["models"].append(_as_entry(spec))
    if change.added or change.changed:
        text = _dump(document, text)
    text = _without(text, set(change.removed))
    if parse(text) != new:
        raise PoolFileInvalid(
            "this change cannot be written into pool.yml as it is written (an anchor that other entries use?); "
            "edit the file by hand"
        )
    return text


def _as_entry(spec: ModelSpec) -> CommentedMap:
    values = explicit(spec)
    ordered = {"model": spec.model, "alias": spec.alias, "enabled": spec.enabled}
    entry = CommentedMap({k: v for k, v in ordered.items() if v is not None})
    entry["driver"] = {"type": spec.driver.type, "config": values["driver"].get("config", {})}
    for key in ("scaling", "queue"):
        if key in values:
            entry[key] = values[key]
    return entry


def _update(node: Any, before: dict[str, Any], after: dict[str, Any]) -> None:
    """Write into `node` what differs between two explicit forms, touching nothing else."""
    for key in before.keys() - after.keys():
        node.pop(key, None)
    for key, value in after.items():
        if key in before and before[key] == value:
            continue
        if isinstance(value, dict) and isinstance(node.get(key), dict):
            _update(node[key], before.get(key, {}), value)
        elif key == "alias" and key not in node:
            node.insert(list(node).index("model") + 1, key, value)
        else:
            node[key] = value


def _without(text: str, names: set[str]) -> str:
    """The text without the lines of these models; comments around them stay."""
    if not names:
        return text
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    assert isinstance(root, yaml.MappingNode)  # it was parsed before
    sequence = next(v for k, v in root.value if k.value == "models")
    doomed = [item for item in sequence.value if _name_in(item) in names]
    if sequence.flow_style:
        document = _yaml().load(text)
        document["models"] = [e for e in document["models"] if str(e["model"]) not in names]
        return _dump(document, text)
    lines = text.splitlines(keepends=True)
    for item in reversed(doomed):
        del lines[item.start_mark.line : _last_line(item) + 1]
    text = "".join(lines)
    if len(doomed) == len(sequence.value):
        text = re.sub(r"(?m)^(models\s*:)", r"\1 []", text, count=1)
    return text


def _name_in(item: yaml.MappingNode) -> str:
    return next(str(v.value) for k, v in item.value if k.value == "model")


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
    offset = 0 if re.search(r"(?m)^- ", text) else 2  # whether list items stand below their key or indented
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
        config["base_url"] = re.sub(r"//[^/@]*@", "//***@", config["base_url"])
    return document
