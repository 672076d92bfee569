"""What a server said of many inputs, each for itself: one that fails takes no other with it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedpool.errors import EmbedpoolError, ModelChanged

INPUT = re.compile(r"\w+\[(\d+)\]$")  # names the input that is at fault
TOO_MUCH = (413, 504)  # for one call; half of it may do


@dataclasses.dataclass(frozen=True, slots=True)
class Each:
    """What came of each input: rows of `values`, an array or a list, or code and message of what failed, by index."""

    values: NDArray[Any] | list[Any]
    errors: dict[int, tuple[str, str]]
    space: str
    tokens: int
    truncated: list[int]


def asked_in_parts(inputs: Sequence[Any], ask: Callable[[Sequence[Any]], Each]) -> Each:
    """Of all inputs, without those that the server refuses by their place, and in halves where they are too much."""
    try:
        return ask(inputs)
    except EmbedpoolError as error:
        named = [INPUT.match(path) for path in error.fields or ()]
        refused = {int(found[1]) for found in named if found and int(found[1]) < len(inputs)}
        if refused:
            rest = [i for i in range(len(inputs)) if i not in refused]
            found = [(rest, asked_in_parts([inputs[i] for i in rest], ask))] if rest else []
            return _joined(found, len(inputs), dict.fromkeys(refused, (error.code, error.message)))
        if error.status in TOO_MUCH and len(inputs) > 1:
            halves = (range(len(inputs) // 2), range(len(inputs) // 2, len(inputs)))
            parts = [(half, asked_in_parts([inputs[i] for i in half], ask)) for half in halves]
            return _joined(parts, len(inputs), {})
        raise


def _joined(parts: Sequence[tuple[Sequence[int], Each]], count: int, errors: dict[int, tuple[str, str]]) -> Each:
    """The answers to some of so many inputs, each with the places of its own. Raises ModelChanged."""
    if len({each.space for _, each in parts}) > 1:
        raise ModelChanged("the model has become another one between two calls")
    values = _placed([(places, each.values) for places, each in parts], count)
    tokens, truncated = 0, []
    for places, each in parts:
        errors |= {places[i]: says for i, says in each.errors.items()}
        truncated += [places[i] for i in each.truncated]
        tokens += each.tokens
    return Each(values, errors, parts[0][1].space if parts else "", tokens, truncated)


def _placed(parts: Sequence[tuple[Sequence[int], NDArray[Any] | list[Any]]], count: int) -> NDArray[Any] | list[Any]:
    """Rows at their places among so many."""
    if any(isinstance(rows, list) for _, rows in parts):
        by_place = {place: row for places, rows in parts for place, row in zip(places, rows, strict=True)}
        return [by_place.get(place) for place in range(count)]
    arrays = [(list(places), rows) for places, rows in parts if isinstance(rows, np.ndarray) and rows.shape[1]]
    width, dtype = (arrays[0][1].shape[1], arrays[0][1].dtype) if arrays else (0, np.dtype(np.float32))
    values = np.zeros((count, width), dtype)
    for places, rows in arrays:
        values[places] = rows
    return values
