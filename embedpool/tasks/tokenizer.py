"""The contract of a model's tokenizer. It runs in the request's thread and needs no loaded model."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from embedpool.tasks.item import Ids


class Token(NamedTuple):
    """A token of a text: `start` and `stop` count characters, None for a special token."""

    id: int
    text: str
    special: bool
    start: int | None
    stop: int | None


class Tokenizer(abc.ABC):
    """Token ids of texts, and what a model's files say of prompts and limits. Thread-safe."""

    max_tokens: int | None = None  # the model's positions
    default_max_tokens: int | None = None  # the model's own max_seq_length
    special_tokens = 0  # added to each text
    prompts: Mapping[str, str] = {}  # the model's own
    default_prompt = ""  # used where the request names none

    @abc.abstractmethod
    def encode(self, texts: Sequence[str]) -> list[list[int]] | None:
        """Token ids of each text at full length, special tokens included; None where a remote service makes them."""

    def beginning(self, text: str, limit: int) -> list[int] | None:
        """More than `limit` ids, of which the first are those of the whole text; None if that must be read whole.

        `cut` at the right gives of them what it gives of the ids of the whole text, and a long text costs no more than
        what is kept of it.
        """
        return None

    def cut(self, ids: list[int], limit: int, side: str) -> list[int]:
        """Ids of at most `limit` tokens, special tokens kept; `side` says where the surplus goes: left or right."""
        raise NotImplementedError

    def tokens(self, texts: Sequence[str], *, special: bool) -> list[list[Token]]:
        """The tokens of each text, with or without the special ones, for a client to look at."""
        raise NotImplementedError

    def decode(self, ids: Sequence[Ids], *, skip_special: bool) -> list[str]:
        """The texts of token ids."""
        raise NotImplementedError


def estimated_tokens(text: str) -> int:
    """About how many tokens a text has, for the queue's fair order where nothing better is known."""
    return len(text) // 4 + 1
