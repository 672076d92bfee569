"""What commands share."""

from __future__ import annotations

from typing import Any

import pytest

from embedpool.cli.common import Arguments, UsageError, assignments


def read(*given: str) -> dict[str, Any]:
    arguments: Arguments = {"--set": list(given)}
    return assignments(arguments)


@pytest.mark.parametrize(
    ("given", "value"),
    [
        ("8", 8),
        ("0.5", 0.5),
        ("true", True),
        ("null", None),
        ("", None),
        ("query: ", "query: "),
        ("a: b: c", "a: b: c"),
        ("- dash", "- dash"),
        ("2026-11-29", "2026-11-29"),
        ("# no comment", "# no comment"),
        (" spaces ", " spaces "),
        ('"8"', "8"),
        ("{query: 'find: '}", {"query": "find: "}),
        ("[a, b]", ["a", "b"]),
        ("a=b", "a=b"),
    ],
)
def test_a_value_is_what_it_looks_like(given: str, value: Any) -> None:
    """A text is a text, whatever YAML would make of it; brackets and quotation marks are YAML's."""
    assert read(f"key={given}") == {"key": value}


@pytest.mark.parametrize("given", ["key", "key={a", "key=[a", 'key="a'])
def test_what_cannot_be_read_is_told(given: str) -> None:
    """Without an equals sign, or with a bracket that does not close."""
    with pytest.raises(UsageError, match="--set"):
        read(given)
