"""APIs of other servers. Each dialect translates its requests to the pool's, and the pool's answers and errors back.

A field of a dialect's schema that stands for an option of POST /embed says so in its metadata; the table in
docs/clients.md is generated from it. `SHAPES` says below which paths errors have the format of a dialect, also for
unknown paths and methods.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import marshmallow as ma

from embedpool.config.settings import Limits
from embedpool.errors import EmbedpoolError, InvalidRequest
from embedpool.web.schemas import check_texts

POLICIES = {True: "right", False: "error"}  # where truncation is a yes or no


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
    return found


def texts_of(given: Any, limits: Limits, path: str) -> list[str]:
    """A string is a list of one. Raises as check_texts does."""
    return check_texts([given] if isinstance(given, str) else given, limits, path)


def status_with_400(error: EmbedpoolError) -> int:
    """For APIs in which whatever is wrong with a body is 400."""
    return 400 if error.status in (413, 415, 422) else error.status
