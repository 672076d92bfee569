"""The order of service: that in which an ideal server, which all requests share at every moment, would finish them.

Callers share the ideal server by their weights, and the requests of a caller share equally what the caller gets. The
real one serves one batch after the other, whole requests in the order of their ideal ends (the fair sojourn protocol):
so none ends later than under sharing, but for a batch that runs already; equal ones are first come, first served; a
short one passes the rest of a long one; and none starves. Requests that are about equal take each other's places, so
that these, too, are first come, first served.
"""

from __future__ import annotations

import bisect
import dataclasses
import heapq
import itertools
from collections.abc import Hashable, Iterator
from typing import Any


@dataclasses.dataclass(eq=False, slots=True)
class _Share:
    """A request in the ideal server. It ends there when its caller's `time` passes `tag`."""

    key: Any
    caller: _Caller
    tag: float
    share: float
    number: int
    alike: Hashable  # None where no other is


class _Caller:
    """Its requests that the ideal server works on, in the order of their ends. `time` is work done for each share."""

    __slots__ = ("active", "name", "shares", "time", "weight")

    def __init__(self, name: Hashable) -> None:
        self.name, self.weight, self.time, self.shares = name, 1.0, 0.0, 0.0
        self.active: list[tuple[float, int, _Share]] = []

    @property
    def next_end(self) -> float:
        """How far the ideal server's time is from the end of the first of them."""
        return (self.active[0][0] - self.time) * self.shares / self.weight

    def remove(self, place: int) -> _Share:
        """Take one out."""
        share = self.active.pop(place)[2]
        self.shares = self.shares - share.share if self.active else 0.0
        return share


class FairOrder:
    """Not thread-safe. Work is in tokens. What the real server does the ideal one does too, in its own order."""

    # `_time` grows by work ÷ the sum of the weights of callers that are active in the ideal server. Counting those that
    # are active in the real one instead would break the order: a caller whose queries are served at once would count as
    # idle, and lose what it had earned.

    def __init__(self) -> None:
        self._time = 0.0
        self._callers: dict[Hashable, _Caller] = {}  # active in the ideal server
        self._known: dict[Any, _Share] = {}  # requests that have not left the real one
        self._overdue: dict[Any, _Share] = {}  # of these, those that have ended in the ideal one, in that order
        self._alike: dict[Hashable, dict[Any, None]] = {}  # those that are about equal, in the order of their arrival
        self._numbers = itertools.count()

    def __contains__(self, key: Any) -> bool:
        return key in self._known

    def enter(
        self, key: Any, caller: Hashable, weight: float, share: float, work: float, *, alike: Hashable = None
    ) -> None:
        """A request comes, with so much work; of its caller's requests it has a `share` of 1, or less of one.

        Requests of a caller with the same `alike`, but None, are about equal.
        """
        if not self._known:
            self._callers.clear()  # what rounding has left
            self._time = 0.0
        found = self._callers.get(caller)
        if found is None:
            found = self._callers[caller] = _Caller(caller)
        found.weight = weight
        group = None if alike is None else (caller, alike)
        entered = _Share(key, found, found.time + work / share, share, next(self._numbers), group)
        if group is not None:
            self._alike.setdefault(group, {})[key] = None
        bisect.insort(found.active, (entered.tag, entered.number, entered))
        found.shares += share
        self._known[key] = entered

    def serve(self, work: float) -> None:
        """The real server does so much work."""
        while work > 0 and self._callers:
            callers = list(self._callers.values())
            weights = sum(caller.weight for caller in callers)
            ending = min(callers, key=lambda caller: caller.next_end)
            step = max(ending.next_end, 0.0)
            ends = step * weights <= work
            if not ends:
                step = work / weights
            work = work - step * weights if ends else 0.0
            self._time += step
            for caller in callers:
                caller.time += step * caller.weight / caller.shares
            if ends:
                share = ending.remove(0)
                if not ending.active:
                    del self._callers[ending.name]
                if self._known.get(share.key) is share:  # it may have left, and have come again
                    self._overdue[share.key] = share

    def leave(self, key: Any) -> None:
        """The real server has done all of its work; the ideal one goes on with it."""
        share = self._known.pop(key, None)
        self._overdue.pop(key, None)
        if share is not None and share.alike is not None:
            group = self._alike[share.alike]
            del group[key]
            if not group:
                del self._alike[share.alike]

    def withdraw(self, key: Any) -> None:
        """Nobody wants it any more."""
        share = self._known.get(key)
        self.leave(key)
        if share is not None:
            caller = share.caller
            place = bisect.bisect_left(caller.active, (share.tag, share.number))
            if place < len(caller.active) and caller.active[place][2] is share:
                caller.remove(place)
                if not caller.active:
                    del self._callers[caller.name]

    def __iter__(self) -> Iterator[Any]:
        """The requests in the order of service. Nothing may enter or leave meanwhile."""
        arrivals = {group: iter(keys) for group, keys in self._alike.items()}
        for share in self._by_ideal_end():
            yield share.key if share.alike is None else next(arrivals[share.alike])

    def _by_ideal_end(self) -> Iterator[_Share]:
        yield from self._overdue.values()
        ends = [self._ends(caller) for caller in self._callers.values()]
        for _, _, share in ends[0] if len(ends) == 1 else heapq.merge(*ends):
            if self._known.get(share.key) is share:
                yield share

    def _ends(self, caller: _Caller) -> Iterator[tuple[float, int, _Share]]:
        """When the ideal server would end a caller's requests if no other came: its time does not depend on others."""
        end, at, shares = self._time, caller.time, caller.shares
        for tag, number, share in caller.active:
            end += (tag - at) * shares / caller.weight
            at = tag
            shares -= share.share
            yield end, number, share
