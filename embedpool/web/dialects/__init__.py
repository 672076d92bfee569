"""What existing clients speak, each a translation: its request → the pool's, the pool's answer and errors → its own.

A field of a dialect's schema that stands for an option of POST /embed says so in its metadata; README's table of what
each dialect can express is made from that.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import marshmallow as ma

from embedpool.errors import InvalidRequest

POLICIES = {True: "right", False: "error"}  # where truncation is a yes or no


def means(option: str, values: Mapping[Any, Any] | None = None) -> dict[str, Any]:
    """Metadata of a field that stands for `option`; `values` maps what is said to what it means."""
    return {"option": option, "values": values}


def options_of(schema: type[ma.Schema], body: Mapping[str, Any]) -> dict[str, Any]:
    """The options that the fields of a loaded body stand for. Raises InvalidRequest where two contradict each other."""
    found: dict[str, Any] = {}
    said_by: dict[str, str] = {}
    for name, field in schema._declared_fields.items():
        option = field.metadata.get("option")
        if option is None or name not in body:
            continue
        values = field.metadata["values"]
        value = values[body[name]] if values else body[name]
        if found.setdefault(option, value) != value:
            message = f"contradicts {said_by[option]}"
            raise InvalidRequest(f"{name}: {message}", fields={name: message})
        said_by[option] = name
    return found
