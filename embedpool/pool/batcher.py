"""Waiting rows → the batch that one driver call serves best now. Pure: owns no thread and no clock."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Sequence

from embedpool.pool.job import Row

SHORT_BATCH_S = 0.05  # what an arriving query waits for the running batch, where the operator says nothing
LEAST_FIXED_COSTS = 10  # but not shorter than so many fixed costs: they would take more of the machine
UNKNOWN_FIXED_TOKENS = 150.0  # where a driver's cost is not known: a call costs as much as so many padded tokens


def cut(lengths: Sequence[int], fixed_tokens: float, max_tokens: int, max_texts: int) -> list[int]:
    """Where to cut texts of ascending `lengths` (tokens) into batches: the end of each batch, the last is len(lengths).

    Minimises the sum of `fixed_tokens` + padded tokens over the batches, then divides evenly those over `max_tokens`
    padded tokens or `max_texts`. In linear time: with the lengths ascending, the best last cut is the lower envelope of
    lines (convex hull trick), since batch (i, j] costs fixed + (j - i)·lengths[j-1].
    """
    best = [0.0]
    last_cut = [0]
    hull: deque[int] = deque()  # candidates i; line i is best[i] - i·x, of falling slope
    for j, length in enumerate(lengths, start=1):
        i = j - 1
        while len(hull) > 1 and _is_above(best, hull[-2], hull[-1], i):
            hull.pop()
        hull.append(i)
        while len(hull) > 1 and best[hull[1]] - hull[1] * length <= best[hull[0]] - hull[0] * length:
            hull.popleft()
        start = hull[0]
        best.append(best[start] + fixed_tokens + (j - start) * length)
        last_cut.append(start)
    ends: list[int] = []
    end = len(lengths)
    while end:
        start = last_cut[end]
        ends += _divided(start, end, min(max_texts, max(max_tokens // max(lengths[end - 1], 1), 1)))
        end = start
    return sorted(ends)


def _is_above(best: Sequence[float], a: int, b: int, c: int) -> bool:
    """Whether line b is nowhere the lowest of a, b, c, whose slopes fall in this order."""
    return (best[c] - best[a]) * (b - a) <= (best[b] - best[a]) * (c - a)


def _divided(start: int, end: int, largest: int) -> list[int]:
    """The ends of equal parts of (start, end], none over `largest`."""
    parts = -(-(end - start) // largest)
    return [start + (end - start) * part // parts for part in range(1, parts + 1)]


@dataclasses.dataclass(frozen=True)
class Batcher:
    """Limits of a batch and the cost of a driver call, in seconds: `fixed_s` + `token_s` · padded tokens.

    A batch is never planned to run longer than `max_s`, because a running one cannot be interrupted: that bounds
    what an arriving query waits for it. Without `max_s` the bound is 50 ms, or ten fixed costs where these are more.
    """

    max_texts: int
    max_tokens: int
    max_s: float | None = None
    fixed_s: float | None = None
    token_s: float | None = None

    @property
    def fixed_tokens(self) -> float:
        """What a call costs beside its tokens, in padded tokens."""
        if not self.token_s or self.fixed_s is None:
            return UNKNOWN_FIXED_TOKENS
        return self.fixed_s / self.token_s

    @property
    def largest_tokens(self) -> int:
        """Padded tokens of the longest batch."""
        if not self.token_s or self.fixed_s is None:
            return self.max_tokens
        longest_s = self.max_s or max(SHORT_BATCH_S, LEAST_FIXED_COSTS * self.fixed_s)
        return max(min(self.max_tokens, int((longest_s - self.fixed_s) / self.token_s)), 1)

    def choose(self, window: Sequence[Row]) -> list[int]:
        """Which rows of the window, which is in the order of service, make the next batch: places in it, ascending.

        It is the planned batch that holds the first row, so nobody's turn is passed over; the others in it are those of
        about its length. Rows of different groups never share a batch.
        """
        group = window[0].job.group
        order = sorted((row.tokens, place) for place, row in enumerate(window) if row.job.group == group)
        longest = order[-1][0]
        total = sum(tokens for tokens, _ in order)
        most = self.largest_tokens
        if len(order) <= self.max_texts and len(order) * longest <= min(most, total + self.fixed_tokens):
            return sorted(place for _, place in order)  # padding all of them costs less than a second call
        first = next(i for i, (_, place) in enumerate(order) if place == 0)
        start = 0
        for end in cut([tokens for tokens, _ in order], self.fixed_tokens, most, self.max_texts):
            if first < end:
                return sorted(place for _, place in order[start:end])
            start = end
        raise AssertionError("a plan covers every row")
