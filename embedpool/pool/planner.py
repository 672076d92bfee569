"""Waiting items → the batch that one driver call serves best now."""

from __future__ import annotations

import dataclasses
import logging
import math
import threading
from collections.abc import Callable, Sequence

from embedpool.tasks.driver import Cost, call_tokens
from embedpool.tasks.item import Item

logger = logging.getLogger(__name__)

SHORT_BATCH_S = 0.05  # how long a query waits for the running batch, where the operator says nothing
LEAST_FIXED_COSTS = 10  # but no batch is cut shorter than so many fixed costs: they would take more of the machine
BESIDE_QUERIES = 0.5  # of both, while queries wait beside other work
QUERYS_TURN = 0.25  # likewise for a query's batch where work rides along that nobody waits for: it delays the query
QUERIES_ABOUT_S = 2.0  # so long after one did the next is expected
FIXED_COSTS_BETWEEN_OTHERS = 2  # likewise for a batch that is cut to end between the others
REACH_BATCHES = 12  # see Planner._reach
UNKNOWN_FIXED_TOKENS = 150.0  # where a driver's cost is not known: a call costs as much as so many padded tokens


def cuts(lengths: Sequence[int], fixed_tokens: float, max_tokens: int, max_items: int) -> list[int]:
    """Where to cut items of ascending `lengths` (tokens) into batches: the end of each batch, the last is len(lengths).

    Minimises the sum of `fixed_tokens` + padded tokens over batches of at most `max_items` items and `max_tokens`
    padded tokens; a single item may be longer. Exact: the best plan of the first j items ends in a batch (i, j], whose
    longest item is the last, after the best plan of the first i.
    """
    best = [0.0]
    last_cut = [0]
    for j, length in enumerate(lengths, start=1):
        most = min(max_items, max(max_tokens // length, 1)) if length else max_items
        low = max(j - most, 0)
        cheapest, at = best[j - 1] - (j - 1) * length, j - 1
        for i in range(j - 2, low - 1, -1):  # of equal plans the one with the fuller batches first
            cost = best[i] - i * length
            if cost < cheapest:
                cheapest, at = cost, i
        best.append(cheapest + fixed_tokens + j * length)
        last_cut.append(at)
    ends: list[int] = []
    end = len(lengths)
    while end:
        ends.append(end)
        end = last_cut[end]
    return ends[::-1]


def _is_query(item: Item) -> bool:
    """Whether it is of a request with one input that somebody waits for, which is to pass others."""
    return len(item.request.task) == 1 and not item.request.call.is_bulk


def _share(window: Sequence[Item]) -> float:
    """Of the longest batch, while queries are about."""
    rides_with_bulk = _is_query(window[0]) and any(item.request.call.is_bulk for item in window)
    return QUERYS_TURN if rides_with_bulk else BESIDE_QUERIES


class Slots:
    """The batches that run for one model, one in each slot (a thread of a replica), and when each should have ended.

    Its lock guards the table alone. A thread takes it inside the queue's lock when it plans, and by itself when its
    batch has ended; it takes no lock while it holds this one.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self.count = 1  # how many of them may run at once
        self._clock = clock
        self._lock = threading.Lock()
        self._ends: dict[int, float] = {}  # by thread, on the clock
        self._queries_at = -math.inf  # when a query waited beside other work, on the clock

    def busy_s(self) -> float:
        """How long until the last of them has ended."""
        with self._lock:
            return max([end - self._clock() for end in self._ends.values()] + [0.0])

    def others_busy_s(self) -> float:
        """How long until one of the others has ended; 0 where one has no batch, or there is none."""
        with self._lock:
            if len(self._ends) < self.count - 1:
                return 0.0
            return max(min((end - self._clock() for end in self._ends.values()), default=0.0), 0.0)

    def queries_are_about(self, window: Sequence[Item]) -> bool:
        """Whether a query waits beside other work, or did lately."""
        if len(set(map(_is_query, window))) > 1:
            self._queries_at = self._clock()
        return self._clock() - self._queries_at < QUERIES_ABOUT_S

    def begin(self, seconds: float) -> None:
        """In this thread a batch begins that should take so long."""
        with self._lock:
            self._ends[threading.get_ident()] = self._clock() + seconds

    def end(self) -> None:
        """In this thread none runs any more."""
        with self._lock:
            self._ends.pop(threading.get_ident(), None)


@dataclasses.dataclass(frozen=True)
class Planner:
    """Limits of a batch and the cost of a driver call, where it is known. Pure.

    A batch is never planned to run longer than `max_s`, because a running one cannot be interrupted: that bounds how
    long an arriving query waits for it. Without `max_s` the bound is 50 ms, or ten fixed costs where these are more,
    and a `share` of that while queries are about.

    With several `slots`, which run a batch each at once, a batch is sized to end at most bound ÷ slots after the last
    running one, where possible: so a query that finds all slots busy waits no longer than that until one is free.
    """

    max_items: int
    max_tokens: int
    max_s: float | None = None
    cost: Cost | None = None
    pads: bool = True
    max_chars: int | None = None  # where nothing pads

    @property
    def fixed_tokens(self) -> float:
        """The fixed cost of a call, in padded tokens."""
        return self.cost.fixed_s / self.cost.token_s if self.cost else UNKNOWN_FIXED_TOKENS

    def largest_tokens(self, busy_s: float = 0.0, slots: int = 1, share: float = 1.0) -> int:
        """Padded tokens of the longest batch that begins now, while other slots are busy for `busy_s` more seconds.

        It may run for this `share` of what a batch may at most; all of `max_s`, where that is set.
        """
        if not self.cost:
            return self.max_tokens
        fixed_s = self.cost.fixed_s
        longest_s = self._longest_s(self.cost, share)
        within_s = min(longest_s, busy_s + max(longest_s / slots, FIXED_COSTS_BETWEEN_OTHERS * fixed_s))
        return max(min(self.max_tokens, int((within_s - fixed_s) / self.cost.token_s)), 1)

    def _longest_s(self, cost: Cost, share: float) -> float:
        return self.max_s or share * max(SHORT_BATCH_S, LEAST_FIXED_COSTS * cost.fixed_s)

    def predicted_s(self, lengths: Sequence[int]) -> float:
        """Run time of a batch of items of these lengths, in seconds; 0 if the driver's cost is not known."""
        return self.cost.call_s(call_tokens(lengths, pads=self.pads)) if self.cost else 0.0

    def choose(self, window: Sequence[Item], busy_s: float = 0.0, slots: int = 1, share: float = 1.0) -> list[int]:
        """Which items of the window, which is in the order of service, make the next batch: places in it, ascending.

        Where nothing pads, it is filled in the order of service. Else it is the planned batch that holds the first
        item, so nobody's turn is passed over; the others in it are those of about its length. Items of different
        groups never share a batch.
        """
        group = window[0].group
        most = self.largest_tokens(busy_s, slots, share)
        if not self.pads:
            places = [place for place, item in enumerate(window) if item.group == group]
            return self._filled(places, window, most if self.cost else math.inf)
        window = window[: self._reach(window)]
        order = sorted((item.tokens, place) for place, item in enumerate(window) if item.group == group)
        longest = order[-1][0]
        total = sum(tokens for tokens, _ in order)
        if len(order) <= self.max_items and len(order) * longest <= min(most, total + self.fixed_tokens):
            return sorted(place for _, place in order)  # padding all of them costs less than a second call
        first = next(i for i, (_, place) in enumerate(order) if place == 0)
        start = 0
        for end in cuts([tokens for tokens, _ in order], self.fixed_tokens, most, self.max_items):
            if first < end:
                return sorted(place for _, place in order[start:end])
            start = end
        raise AssertionError("a plan covers every item")

    def _filled(self, places: Sequence[int], window: Sequence[Item], max_tokens: float) -> list[int]:
        """As many of the first of these places as a call may hold, and one at least."""
        max_chars = math.inf if self.max_chars is None else self.max_chars
        taken: list[int] = []
        chars = tokens = 0
        for place in places[: self.max_items]:
            chars += sum(map(len, window[place].parts))
            tokens += window[place].tokens
            if taken and (tokens > max_tokens or chars > max_chars):
                break
            taken.append(place)
        return taken

    def _reach(self, window: Sequence[Item]) -> int:
        """How many items from the first on may share its batch.

        What rides along from further behind is time that the requests before it lose. So no batch takes anything from
        behind more work than REACH_BATCHES of the longest batches are.
        """
        most = REACH_BATCHES * self.largest_tokens()
        tokens = 0
        for place, item in enumerate(window):
            tokens += item.tokens
            if tokens > most and place:
                return place
        return len(window)

    def _start(self, window: Sequence[Item], slots: Slots) -> int:
        """From where on it is planned while queries are about: bulk work leaves them a slot.

        A bulk item that takes longer than a batch may waits while all other slots are busy for as long; then it is its
        turn again. Where nothing else is there to do, the shortest goes.
        """
        if not self.cost or slots.others_busy_s() <= (longest_s := self._longest_s(self.cost, BESIDE_QUERIES)):
            return 0
        for place, item in enumerate(window):
            if not item.request.call.is_bulk or self.predicted_s([item.tokens]) <= longest_s:
                return place
        return min(range(len(window)), key=lambda place: window[place].tokens)

    def plan_under_lock(self, window: Sequence[Item], slots: Slots) -> Sequence[int]:
        """Choose a batch that begins now, in this thread; whatever fails, the next item can go alone.

        Called with the queue's lock held: what is chosen for one slot decides what is left for the next.
        """
        try:
            queries = slots.queries_are_about(window)
            start = self._start(window, slots) if queries else 0
            share = _share(window[start:]) if queries else 1.0
            found = self.choose(window[start:], slots.busy_s(), slots.count, share)
            places = [start + place for place in found]
            slots.begin(self.predicted_s([window[place].tokens for place in places]))
            return places
        except Exception:
            logger.exception("the planner failed; the next item goes alone")
            return [0]
