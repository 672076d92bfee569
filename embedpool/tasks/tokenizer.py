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


class Located(NamedTuple):
    """Ids of a text without special ones, and the character at which each of them starts."""

    ids: list[int]
    starts: list[int]


class Template(NamedTuple):
    """The special tokens around a text, and around and between the parts of a pair."""

    single: tuple[list[int], list[int]]
    pair: tuple[list[int], list[int], list[int]]


class Whole(NamedTuple):
    """All ids of an input, special ones included, and which of them are those of its first part and of its last.

    What stands around them is the template's. `typed` says whether the last part has a token type of its own.
    """

    ids: list[int]
    first: slice
    last: slice
    typed: bool


class Tokenizer(abc.ABC):
    """Token ids of texts, and what a model's files say of prompts, limits and routes. Thread-safe.

    A model may treat texts by what they are for (query, document, …): `routes` then holds the tokenizer for each such
    word, at "" the one where nothing is said, if that is allowed. Each knows the name of its own `route`.
    """

    tasks: Sequence[str] = ("embed",)  # what the model can be asked for
    max_tokens: int | None = None  # the model's positions
    most_kept: int | None = None  # tokens of a text, whatever a request asks for
    default_max_tokens: int | None = None  # the model's own max_seq_length
    truncation_side = "right"  # where the surplus of a long text goes, unless a request says it
    special_tokens = 0  # added to each text
    prompts: Mapping[str, str] = {}  # the model's own
    default_prompt_name = ""  # of the one used where the request names none
    told: Sequence[str] = ()  # what the model must be told beside ids: its prompt, its limit, its side of truncation
    labels: Sequence[str] = ()  # of a model that scores
    activation = "sigmoid"  # what makes scores of its logits: sigmoid, softmax or identity
    template: Template | None = None  # by which pairs are joined; None where the tokenizer must be given them whole
    expands = False  # whether it adds tokens to a text that is short, see `expanded`
    averages_queries = False  # whether the score of a multi-vector model is a mean over the query's vectors, not a sum
    around: tuple[list[int], list[int]] = ([], [])  # the special tokens before and after a text
    no_late_chunking: str | None = "it gives no vectors of tokens"  # why, of a model that cannot
    normalizes = False  # whether its own vectors have length 1
    indices_are_tokens = True  # of its sparse rows, if it gives any
    most_active: int | None = None  # values of a sparse row, whatever a request asks for; None: any number
    default_top_k: int | None = None  # values of a sparse row, unless a request asks for others; None: all
    default_dimensions: int | None = None  # numbers of a vector given out unless a request asks for others; None: all
    route = ""
    routes: Mapping[str, Tokenizer] = {}

    @abc.abstractmethod
    def encode(self, texts: Sequence[str]) -> list[list[int]] | None:
        """Token ids of each text at full length, special tokens included; None where a remote service makes them."""

    def beginning(self, text: str, limit: int) -> list[int] | None:
        """More than `limit` ids, of which the first are those of the whole text; None if that must be read whole.

        `cut` at the right gives of them what it gives of the ids of the whole text, and a long text costs no more than
        what is kept of it.
        """
        return None

    def cut(self, ids: list[int], limit: int, side: str, prompt_tokens: int = 0) -> list[int]:
        """Ids of at most `limit` tokens, special tokens and the first `prompt_tokens` kept.

        `side` says where the surplus of the text goes: left or right.
        """
        raise NotImplementedError

    def expanded(self, ids: Ids) -> Ids:
        """With the tokens behind them that the model adds to such a text when it is short."""
        return ids

    def located(self, text: str) -> Located:
        """Where its tokens stand."""
        raise NotImplementedError

    def names(self, ids: Sequence[int]) -> list[str]:
        """Tokens as they stand in the vocabulary."""
        raise NotImplementedError

    def prompt_tokens(self, prompt: str) -> int:
        """How many of the first tokens of a text, special ones included, are those of the prompt before it."""
        raise NotImplementedError

    def bare(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text without special tokens, as a part of a pair."""
        raise NotImplementedError

    def whole(self, pairs: Sequence[tuple[str, ...]], prompt: str = "") -> list[Whole]:
        """Token ids of each pair or text at full length, special tokens included, by the tokenizer's own way.

        A prompt is given to a tokenizer that is `told` it; elsewhere it stands in the first parts already.
        """
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
