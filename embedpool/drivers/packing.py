"""Several texts share a row of a batch, where the model lets them: nothing is padded but the ends of the rows.

A text attends to its own tokens alone, counts its places from its own beginning, and is taken out of its row again
before it is pooled. So its vector is what it would be alone, and a batch of texts of any lengths costs its tokens.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from embedpool.tasks.item import Ids

ROW_TOKENS = 48  # about as long as rows are where no text is longer
ATTENTION_TOKENS = 2300.0  # in rows of so many tokens attention costs as much as all else (six times the width, 384)
SHORT_ROW_TOKENS, SHORT_STEP = 64, 4  # lengths of rows are multiples of a step, so that few shapes occur

Inputs = dict[str, NDArray[np.int64]]


def rows_of(lengths: Sequence[int], step: int = SHORT_STEP) -> tuple[list[list[int]], int]:
    """Which texts share a row, by their numbers, and how long rows are: of a few ways the one that costs least."""
    longest, total, texts = max(lengths), sum(lengths), len(lengths)
    row = max(ROW_TOKENS, longest)
    each = max(round(row * texts / total), 1)  # texts in a row, on the average
    counts = {max(round(total / row), 1), -(-texts // each), -(-texts // (row // longest))}
    order = sorted(range(texts), key=lambda text: -lengths[text])
    found = [_dealt(order, lengths, count, step) for count in sorted(counts)]
    return min(found, key=lambda way: len(way[0]) * way[1] * (1 + way[1] / ATTENTION_TOKENS))


def _dealt(order: Sequence[int], lengths: Sequence[int], count: int, step: int) -> tuple[list[list[int]], int]:
    """The longest text first, each into the row that holds least (Graham's LPT rule)."""
    rows: list[list[int]] = [[] for _ in range(count)]
    held = [(0, number) for number in range(count)]
    for text in order:
        tokens, number = held[0]
        rows[number].append(text)
        heapq.heapreplace(held, (tokens + lengths[text], number))
    longest = max(tokens for tokens, _ in held)
    step = step if longest > SHORT_ROW_TOKENS else SHORT_STEP
    return rows, -(-longest // step) * step


def pack(ids: Sequence[Ids], pad_id: int, step: int = SHORT_STEP) -> Inputs:
    """int64 arrays of shape (rows, tokens), but for the last, which has a row for each text: (texts, longest).

    input_ids; position_ids, from 0 for each text; text_ids, which tell a row's texts apart and are 0 behind the last;
    token_places, where a text's tokens stand in the rows laid end to end, and -1 behind its last.
    """
    lengths = [len(each) for each in ids]
    rows, width = rows_of(lengths, step)
    begins = np.empty((len(ids), 1), np.int64)
    for number, row in enumerate(rows):
        at = number * width
        for text in row:
            begins[text] = at
            at += lengths[text]
    counts = np.asarray(lengths)[:, None]
    positions = np.arange(max(lengths))
    token_places = np.where(positions < counts, begins + positions, -1)
    is_token = token_places >= 0
    stands = token_places[is_token]

    def rows_with(values: NDArray[np.int64], behind: int) -> NDArray[np.int64]:
        """What each token has, in its row."""
        filled = np.full(len(rows) * width, behind, np.int64)
        filled[stands] = values
        return filled.reshape(len(rows), width)

    return {
        "input_ids": rows_with(np.concatenate([np.asarray(each, np.int64) for each in ids]), pad_id),
        "position_ids": rows_with(np.broadcast_to(positions, is_token.shape)[is_token], 0),
        "text_ids": rows_with(np.repeat(np.arange(1, len(ids) + 1), lengths), 0),
        "token_places": token_places,
    }
