"""Changes of the pool as pure functions, PoolSpec → PoolSpec: the management routes and the offline CLI share them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import marshmallow as ma

from embedpool.config.fields import dotted, faults, schema_of
from embedpool.config.spec import ModelSpec, PoolSpec
from embedpool.errors import AliasConflict, InvalidRequest, ModelExistsDifferently, ModelNotFound

# A registration is flat; this is where each of its keys lives in an entry of pool.yml.
REGISTRATION_KEYS: dict[str, tuple[str, ...]] = {
    "model": ("model",),
    "alias": ("alias",),
    "place": ("place",),
    "resources": ("resources",),
    "enabled": ("enabled",),
    "driver_type": ("driver", "type"),
    "driver_config": ("driver", "config"),
    "min": ("scaling", "min"),
    "max": ("scaling", "max"),
    "idle_ttl_s": ("scaling", "idle_ttl_s"),
    "queue_max_size": ("queue", "max_size"),
    "max_inflight_per_replica": ("queue", "max_inflight_per_replica"),
}


def parse_registration(flat: Mapping[str, Any]) -> ModelSpec:
    """The spec of a flat registration. Raises InvalidRequest with the path of each bad field."""
    document: dict[str, Any] = {"driver": {}}
    for key, path in REGISTRATION_KEYS.items():
        if flat.get(key) is None or (key == "alias" and flat[key] == ""):
            continue
        node = document
        for step in path[:-1]:
            node = node.setdefault(step, {})
        node[path[-1]] = flat[key]
    try:
        spec: ModelSpec = schema_of(ModelSpec)().load(document)
    except ma.ValidationError as error:
        found = {dotted(_flat(path)): sentence for path, sentence in faults(error.messages)}
        raise InvalidRequest(
            "invalid registration: " + "; ".join(f"{path}: {says}" for path, says in found.items()),
            fields=found,
        ) from None
    return spec


def _flat(path: tuple[str | int, ...]) -> tuple[str | int, ...]:
    for key, inner in REGISTRATION_KEYS.items():
        if path[: len(inner)] == inner:
            return (key, *path[len(inner) :])
    return path


def register(pool: PoolSpec, spec: ModelSpec, *, replace: bool = False) -> PoolSpec:
    """Add a model; the same spec again is no change.

    Raises ModelExistsDifferently if the name has a different spec and `replace` is not set, AliasConflict.
    """
    known = next((m for m in pool.models if m.model == spec.model), None)
    if known == spec:
        return pool
    if known and not replace:
        raise ModelExistsDifferently(
            f"{spec.model!r} is registered with a different spec; replace it with --replace (HTTP: ?replace=true)"
        )
    _refuse_taken(pool, spec.model, *spec.names)
    if known:
        return _with(pool, spec)
    return PoolSpec((*pool.models, spec))


def set_alias(pool: PoolSpec, name: str, alias: str | None) -> PoolSpec:
    """Give a model an alias, or with None or "" take it away. Raises ModelNotFound, AliasConflict, InvalidRequest."""
    spec = find(pool, name)
    alias = alias or None
    if alias:
        errors = schema_of(ModelSpec)(only=("alias",)).validate({"alias": alias})
        if errors:
            raise InvalidRequest("invalid alias", fields={"alias": " ".join(errors["alias"])})
        _refuse_taken(pool, spec.model, alias)
    return _with(pool, dataclasses.replace(spec, alias=alias))


def set_enabled(pool: PoolSpec, name: str, enabled: bool) -> PoolSpec:
    """Switch a model on or off. Raises ModelNotFound."""
    return _with(pool, dataclasses.replace(find(pool, name), enabled=enabled))


def unregister(pool: PoolSpec, name: str) -> PoolSpec:
    """Remove a model. Raises ModelNotFound."""
    spec = find(pool, name)
    return PoolSpec(tuple(m for m in pool.models if m.model != spec.model))


def find(pool: PoolSpec, name: str) -> ModelSpec:
    """The model of this name or alias. Raises ModelNotFound, which lists near names."""
    spec = pool.find(name)
    if spec is None:
        raise ModelNotFound(name, pool.names)
    return spec


def _with(pool: PoolSpec, spec: ModelSpec) -> PoolSpec:
    return PoolSpec(tuple(spec if m.model == spec.model else m for m in pool.models))


def _refuse_taken(pool: PoolSpec, model: str, *names: str) -> None:
    for other in pool.models:
        if other.model != model and (taken := set(names) & set(other.names)):
            raise AliasConflict(f"{taken.pop()!r} is already a name or alias of {other.model!r}")
