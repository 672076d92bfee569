"""What APIs of other servers have in common: they take more than ours does, and hide nothing of it.

A body's fields that are not known are ignored, as the originals do, and named in the answer. But for one that may be a
slip of an option that changes numbers: nobody would notice.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any

import marshmallow as ma
from flask import has_request_context
from marshmallow import fields

from embedpool.config.fields import StrictSchema, shown
from embedpool.errors import LONGEST_NAME
from embedpool.pool.pool import Pool
from embedpool.pool.served_model import ServedModel
from embedpool.web.http_request import here

IGNORED_HEADER = "X-Embedpool-Ignored"
MOST_UNKNOWN = 100  # keys of an object
MOST_IGNORED, LONGEST_IGNORED = 20, 60  # named, and characters of each
LIKENESS_OF_A_SLIP = 0.85
LATEST = ":latest"
WORDS = {"true": True, "false": False}


class YesOrNo(fields.Boolean):
    """true or false, also as a word."""

    def _deserialize(self, value: Any, attr: str | None, data: Any, **kwargs: Any) -> bool:
        found = WORDS.get(value.lower(), value) if isinstance(value, str) else value
        if not isinstance(found, bool):
            raise ma.ValidationError(f"must be true or false, not {shown(value)}")
        return found


class CompatSchema(StrictSchema):
    """The body of a request in the API of another server."""

    @ma.pre_load
    def _drop_nulls_and_name_unknown_keys(self, data: Any, **kwargs: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        known = {f.data_key or name: f for name, f in self.load_fields.items()}
        if unknown := [str(key)[:LONGEST_NAME] for key in data if key not in known]:
            absent = [name for name, f in known.items() if f.required and data.get(name) is None]
            _require_no_slip(unknown, absent + [name for name, f in known.items() if f.metadata.get("options")])
            if has_request_context():
                here().ignored += unknown
        return {key: value for key, value in data.items() if key in known and value is not None}


def _require_no_slip(unknown: list[str], meant: list[str]) -> None:
    """Raises ValidationError if an unknown key resembles one of those, or if there are too many to look."""
    if len(unknown) > MOST_UNKNOWN:
        raise ma.ValidationError(f"{len(unknown)} unknown keys; at most {MOST_UNKNOWN} are ignored")
    near = {name: get_close_matches(name.lower(), meant, 1, LIKENESS_OF_A_SLIP) for name in unknown}
    if slips := {name: found[0] for name, found in near.items() if found}:
        raise ma.ValidationError({name: [f"unknown key; did you mean {found}?"] for name, found in slips.items()})


def named(ignored: list[str]) -> str:
    """The value of the header: names that a header can hold."""
    names = [name.encode("ascii", "backslashreplace").decode() for name in list(dict.fromkeys(ignored))[:MOST_IGNORED]]
    return ", ".join("".join(c if c.isprintable() else "?" for c in name)[:LONGEST_IGNORED] for name in names)


def known(pool: Pool, name: str) -> str:
    """The name as the pool knows it: Ollama's tag `latest` and none are one, and a slash behind it is the client's."""
    for given in dict.fromkeys((name, name.rstrip("/"))):
        other = given.removesuffix(LATEST) if given.endswith(LATEST) else given + LATEST
        for found in (given, other):
            if pool.knows(found):
                return found
    return name


def names_able(models: Iterable[ServedModel], task: str) -> list[str]:
    """Those that are known to be able; if there is none, those that turn out to be when they are looked at."""
    models = list(models)
    able = [served.spec.model for served in models if task in served.kinds]
    return able or [served.spec.model for served in models if not served.kinds and served.can(task)]
