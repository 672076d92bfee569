"""Token ids at OpenAI's endpoint: those of cl100k_base, as OpenAI's own contract has it, back into text.

Ids mean something to the tokenizer alone that made them. Those of another one are refused, as far as that shows.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Sequence
from typing import Any

from embedpool.errors import InvalidRequest

ENCODING = "cl100k_base"
AT_AN_END = 4  # ids that may differ where a text was split between the bytes of a character
KNOWN_ENDS = {(101, 102), (0, 2), (1, 2)}  # of BERT's family, RoBERTa's and DeBERTa's
LONGEST_SHIFT = 48  # ids that those few may become: each byte one that stands for no character, of up to three ids
HINT = (
    "they are another tokenizer's. Send strings; with LangChain's OpenAIEmbeddings set check_embedding_ctx_length=False"
)
REFUSED = f"token ids are refused: {HINT}"

_LOADING = threading.Lock()


def are_token_ids(given: Any) -> bool:
    """Whether an `input` is token ids of one text, or of several."""
    first = given[0] if isinstance(given, list) and given else None
    if isinstance(first, list) and first:
        first = first[0]
    return isinstance(first, int) and not isinstance(first, bool)


def rows_of(given: list[Any]) -> list[list[Any]]:
    """The ids of each text."""
    return given if isinstance(given[0], list) else [given]


def decoded(
    rows: Sequence[Any], special: Sequence[int] = (), most_bytes: float = math.inf, most_in_all: float = math.inf
) -> list[str]:
    """The texts of these ids; `special` are those that the model's own tokenizer puts around a text.

    Raises InvalidRequest for ids of another tokenizer, and for a text, or all of them, of more bytes than these.
    """
    texts: list[str] = []
    left = most_in_all
    for i, row in enumerate(rows):
        size = _size_of(row)
        left -= size or 0
        says = f"these are no token ids of {ENCODING}: {HINT}"
        if size is not None and (size > most_bytes or left < 0):
            text, says = None, "the text that these ids stand for is too long"
        else:
            text = None if size is None else _text_of(row, special)
        if text is None:
            where = f"input[{i}]"
            raise InvalidRequest(f"{where}: {says}", fields={where: says}, inputs=[i])
        texts.append(text)
    return texts


def _size_of(row: Any) -> int | None:
    """Bytes of the text; None for what are no ids."""
    if not isinstance(row, list) or not all(type(i) is int and i >= 0 for i in row):
        return None
    try:
        return len(_encoding().decode_bytes(row))
    except (KeyError, OverflowError):
        return None


def _text_of(ids: list[int], special: Sequence[int]) -> str | None:
    ends = {*KNOWN_ENDS, (special[0], special[-1])} if len(special) > 1 else KNOWN_ENDS
    if len(ids) > 1 and (ids[0], ids[-1]) in ends:
        return None
    encoding = _encoding()
    text: str = encoding.decode(ids)  # what is no character becomes U+FFFD
    try:
        is_own = _agree(ids, encoding.encode_ordinary(text)) or _agree(
            ids, encoding.encode(text, allowed_special="all")
        )
    except BaseException as error:  # its regular expressions end in a panic at a million blanks
        if type(error).__name__ != "PanicException":
            raise
        return None
    return text if is_own else None


def _agree(ids: list[int], again: list[int]) -> bool:
    """Whether the ids and those of their text differ at the ends alone."""
    middle = ids[AT_AN_END:-AT_AN_END]
    beside = len(again) - len(middle)  # before it and behind it
    shifts = range(max(beside - LONGEST_SHIFT, 0), min(beside, LONGEST_SHIFT) + 1)
    return any(again[shift : shift + len(middle)] == middle for shift in shifts)


@functools.cache
def _loaded() -> Any:
    import tiktoken

    return tiktoken.get_encoding(f"{ENCODING}_offline")


def _encoding() -> Any:
    """Loaded when the first ids come: it takes 50 MB."""
    with _LOADING:
        return _loaded()
