"""The queue of one model: bounded, fair, never losing an item."""

from __future__ import annotations

import itertools
import queue
import threading
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedpool.pool.model_queue import JOINABLE_S, ModelQueue, QueueClosed
from embedpool.pool.request import Request
from embedpool.tasks.item import Group, Item
from tests.pool.scripted import A_WHILE_S, PATIENCE_S, Asked, in_thread, texts_of


def still(clock: float = 0.0):
    """A clock that stands, so that nothing waits for more than its turn."""
    return lambda: clock


def sized(texts: int, tokens: int = 1, **call: Any) -> Asked:
    """A request of so many texts, no two alike."""
    request = Asked(*(f"text {next(NUMBERS)}" for _ in range(texts)), **call)
    for item in request.items:
        item.tokens = tokens
    return request


NUMBERS = itertools.count()
BURST = 4


def first(count: int):
    """A plan that takes the first few."""
    return lambda window: range(min(count, len(window)))


def requests_of(items: list[Item]) -> list[Request]:
    return [item.request for item in items]


STEP = st.one_of(
    st.tuples(st.sampled_from(["admit", "feed"]), st.integers(0, 3), st.integers(1, 6), st.integers(1, 50)),
    st.tuples(st.just("take"), st.integers(1, 12)),
    st.just(("take_all",)),
)


@settings(max_examples=300, deadline=None, database=None)
@given(
    st.integers(1, 20),
    st.lists(STEP, max_size=60),
    st.lists(st.sampled_from([0.5, 1, 4]), min_size=4, max_size=4),
    st.randoms(use_true_random=False),
)
def test_any_sequence_keeps_the_bound_and_every_item(bound: int, steps: list, weights: list[float], rng) -> None:
    """The queue never holds more items than it may, says no only when it must, takes as many of a request as it has
    room for in a burst, and gives each out once; the one whose turn it is always goes, and turns keep the order of a
    request. What is not the first of a request leaves half of the queue free."""
    waiting_queue = ModelQueue(bound, still(), BURST)
    requests = [sized(1, weight=w) for w in weights]
    waiting: list[Item] = []

    def choose(window: list[Item]) -> list[int]:
        own = [item for item in window if item.request is window[0].request]
        assert own == [item for item in waiting if item.request is window[0].request][: len(own)]
        return sorted({0, *rng.sample(range(len(window)), rng.randint(0, len(window) - 1))})

    def took(items: list[Item]) -> None:
        for item in items:
            waiting.remove(item)

    for step in steps:
        if step[0] in ("admit", "feed"):
            request = requests[step[1]]
            items = sized(step[2], step[3]).items
            for item in items:
                item.request = request
            is_fresh = not any(item.request is request for item in waiting)
            free = bound - bound // 2 - len(waiting)
            room = max(min(free, len(items), BURST), int(is_fresh and len(waiting) < bound))
            try:
                put = waiting_queue.admit(items) if step[0] == "admit" else waiting_queue.feed(items, 0)
            except queue.Full:
                assert room <= 0
            else:
                assert put == room > 0
                waiting += items[:put]
        elif step[0] == "take":
            expected = bool(waiting)
            items = waiting_queue.take(choose, 0)
            assert bool(items) == expected
            took(items)
        else:
            took(waiting_queue.take_all())
            assert not waiting
        assert waiting_queue.qsize() == len(waiting) <= bound
        assert [r.waiting for r in requests] == [sum(item.request is r for item in waiting) for r in requests]
    took(waiting_queue.take_all())
    assert not waiting


def test_equal_items_leave_together() -> None:
    """Whoever waits for the same text gets its row with the first of them, wherever in the queue it is."""
    waiting_queue = ModelQueue(100, still())
    same = [Asked("same") for _ in range(3)]
    other_option = Asked("same", group=Group("embed", "{}"))
    same[0].admitted_to(waiting_queue)
    sized(5).admitted_to(waiting_queue)
    for request in (other_option, *same[1:]):
        request.admitted_to(waiting_queue)
    (item,) = waiting_queue.take(first(1), 0)
    assert requests_of([item, *item.duplicates]) == same
    assert (waiting_queue.qsize(), [request.waiting for request in same]) == (6, [0, 0, 0])
    assert other_option in requests_of(waiting_queue.take_all())


def test_an_equal_item_joins_one_that_runs() -> None:
    """What is computed already does not wait to be computed again, for as long as that takes and no longer."""
    waiting_queue = ModelQueue(4, still())
    Asked("same", "other").admitted_to(waiting_queue)
    items = waiting_queue.take(first(2), 0)
    late = Asked("same", "new")
    with waiting_queue.joinable(items):
        late.admitted_to(waiting_queue)
    (duplicate,) = next(item for item in items if item.parts == ("same",)).duplicates
    assert duplicate is late.items[0]
    assert texts_of(waiting_queue.take(first(4), 0)) == ["new"]
    Asked("same").admitted_to(waiting_queue)
    assert texts_of(waiting_queue.take(first(4), 0)) == ["same"]


def test_a_batch_that_hangs_gathers_nobody() -> None:
    """An item equal to one that runs for long is left to another replica, so that one hung batch harms no other."""
    now = 0.0
    waiting_queue = ModelQueue(4, lambda: now)
    Asked("same").admitted_to(waiting_queue)
    items = waiting_queue.take(first(1), 0)
    with waiting_queue.joinable(items):
        now = JOINABLE_S
        Asked("same").admitted_to(waiting_queue)
    assert items[0].duplicates == []
    assert waiting_queue.qsize() == 1


def test_a_weight_buys_a_share() -> None:
    """Two callers that are always busy share a model by their weights, however many requests each has at once."""
    waiting_queue = ModelQueue(1000, still())
    callers = {"light": {"caller": "light"}, "heavy": {"caller": "heavy", "weight": 3}}
    for name in ["light"] * 12 + ["heavy"] * 4:
        sized(1, 10, **callers[name]).admitted_to(waiting_queue)
    served = []
    for _ in range(400):
        (item,) = waiting_queue.take(first(1), 0)
        served.append(item.request.call.caller)
        sized(1, 10, **callers[served[-1]]).admitted_to(waiting_queue)
    assert 290 <= served.count("heavy") <= 310


@pytest.mark.parametrize("of", ["mine", "another's"])
def test_bulk_work_has_a_weight_of_its_own(of: str) -> None:
    """Beside its key's other requests as beside those of others, however many there are of it, and however alike."""
    waiting_queue = ModelQueue(1000, still())
    kinds = {"bulk": {"caller": "mine", "is_bulk": True, "weight": 0.25}, "other": {"caller": of}}
    for name in ["bulk"] * 16 + ["other"] * 4:
        sized(2, 5, **kinds[name]).admitted_to(waiting_queue)
    served = []
    for _ in range(1000):
        request = requests_of(waiting_queue.take(first(2), 0))[0]
        served.append("bulk" if request.call.is_bulk else "other")
        sized(2, 5, **kinds[served[-1]]).admitted_to(waiting_queue)
    assert 180 <= served.count("bulk") <= 210


def test_many_requests_of_one_caller_take_no_more_than_one_of_another() -> None:
    """A key's share is its own, not each request's."""
    waiting_queue = ModelQueue(1000, still())
    for _ in range(10):
        sized(20, caller="many").admitted_to(waiting_queue)
    few = sized(20, caller="few").admitted_to(waiting_queue)
    served = [waiting_queue.take(first(1), 0)[0].request for _ in range(60)]
    assert served.count(few) == 20


def test_what_nobody_waits_for_makes_room() -> None:
    """A request that was given up holds no place, nor does it lose others that wait for the same."""
    waiting_queue = ModelQueue(4, still())
    gone, stays = Asked("a", "b").admitted_to(waiting_queue), Asked("b", "c")
    waiting_queue.admit(stays.items[:1])
    waiting_queue.withdraw(gone)
    assert waiting_queue.qsize() == 1
    assert waiting_queue.take(first(4), 0) == stays.items[:1]
    waiting_queue.withdraw(stays)
    assert not waiting_queue.qsize()


def test_the_items_of_a_request_leave_in_order() -> None:
    """In one batch or in several."""
    waiting_queue = ModelQueue(100, still())
    request = sized(8).admitted_to(waiting_queue)
    assert waiting_queue.take(first(5), 0) + waiting_queue.take(first(5), 0) == request.items


def test_a_request_is_admitted_while_there_is_room_for_one_of_its_items() -> None:
    """However large it is; the rest of it is fed, and only a queue without any room says no."""
    waiting_queue = ModelQueue(8, still())
    assert [waiting_queue.admit(sized(100).items) for _ in range(5)] == [4, 1, 1, 1, 1]
    with pytest.raises(queue.Full):
        waiting_queue.admit(sized(1).items)


def test_feed_waits_for_room_and_gives_up_at_its_deadline() -> None:
    """The rest of a large request goes in as room appears, and not after its deadline."""
    waiting_queue = ModelQueue(4)
    request = sized(4)
    assert waiting_queue.admit(request.items) == 2
    with pytest.raises(queue.Full):
        waiting_queue.feed(request.items[2:], 0.01)
    fed = in_thread(waiting_queue.feed, request.items[2:], PATIENCE_S)
    assert len(waiting_queue.take(first(4), 0)) == 2
    assert fed.result(PATIENCE_S) == waiting_queue.qsize() == 2


def test_a_small_request_gets_in_whole_beside_bulk_work() -> None:
    """A place is kept for as many requests as may be served at once, and no more; and bulk work puts no more than a
    burst when room appears."""
    waiting_queue = ModelQueue(40, still(), BURST, most_requests=8)
    bulk = sized(100)
    put = waiting_queue.admit(bulk.items)
    while waiting_queue.qsize() < 28:
        put += waiting_queue.feed(bulk.items[put:], 0)
    assert waiting_queue.admit(sized(BURST).items) == BURST
    assert [waiting_queue.admit(sized(BURST).items) for _ in range(8)] == [1] * 8
    waiting_queue.take(first(25), 0)
    assert waiting_queue.feed(bulk.items[put:], 0) == BURST


def test_bulk_work_gets_its_turn_in_a_queue_full_of_queries() -> None:
    """A request with nothing waiting may use any room that appears, so queries never starve it."""
    waiting_queue = ModelQueue(4, still())
    for _ in range(3):
        sized(1).admitted_to(waiting_queue)
    bulk = sized(2)
    assert waiting_queue.feed(bulk.items, 0) == 1
    waiting_queue.take(first(1), 0)
    with pytest.raises(queue.Full):
        waiting_queue.feed(bulk.items[1:], 0)


def test_a_closed_queue_refuses_new_requests_and_goes_on_with_the_old() -> None:
    """A model that is replaced answers whom it has admitted, to the last item."""
    waiting_queue = ModelQueue(10, still())
    request = sized(2)
    waiting_queue.admit(request.items[:1])
    waiting_queue.close()
    with pytest.raises(QueueClosed):
        waiting_queue.admit(sized(1).items)
    waiting_queue.feed(request.items[1:], 0)
    assert waiting_queue.take(first(10), 0) == request.items


def test_stop_ends_every_feed() -> None:
    """Nobody waits for room in a queue that is stopped, and nothing gets in any more."""
    waiting_queue = ModelQueue(2)
    request = sized(3)
    assert waiting_queue.admit(request.items) == 1
    fed = in_thread(waiting_queue.feed, request.items[1:], PATIENCE_S)
    waiting_queue.stop()
    with pytest.raises(QueueClosed):
        fed.result(PATIENCE_S)
    waiting_queue.take_all()
    for put in (waiting_queue.admit, lambda items: waiting_queue.feed(items, 0)):
        with pytest.raises(QueueClosed):
            put(sized(1).items)


@pytest.mark.parametrize("before", [True, False])
def test_a_waiting_take_gets_what_comes(before: bool) -> None:
    """Work reaches a thread that waits for it without limit."""
    waiting_queue = ModelQueue(2)
    request = sized(1)
    if before:
        request.admitted_to(waiting_queue)
    taken = in_thread(waiting_queue.take, first(4), None)
    if not before:
        request.admitted_to(waiting_queue)
    assert taken.result(PATIENCE_S) == request.items


def test_wake_lets_a_leaving_thread_go() -> None:
    """A thread that is to leave does so although no work comes, whether it waits already or is about to."""
    waiting_queue = ModelQueue(2)
    leaving = False
    taken = in_thread(waiting_queue.take, first(4), None, leaving=lambda: leaving)
    leaving = True
    waiting_queue.wake()
    assert taken.result(PATIENCE_S) == []
    assert waiting_queue.take(first(4), None, leaving=lambda: True) == []


def test_a_leaving_thread_takes_no_work() -> None:
    """Work that arrives while a thread is told to leave, because its driver broke, is left to the others."""
    waiting_queue = ModelQueue(2)
    asked = threading.Event()

    def leaving() -> bool:  # false when the thread begins to wait, true when it wakes
        before = asked.is_set()
        asked.set()
        return before

    taken = in_thread(waiting_queue.take, first(4), None, leaving=leaving)
    assert asked.wait(PATIENCE_S)
    request = sized(1).admitted_to(waiting_queue)
    assert taken.result(PATIENCE_S) == []
    assert waiting_queue.take(first(4), 0) == request.items


def test_what_a_leaving_thread_leaves_reaches_another() -> None:
    """The wake-up of an item is never lost with the thread that is leaving: one that stays gets it."""
    waiting_queue = ModelQueue(2)
    leave = False
    leaver = in_thread(waiting_queue.take, first(4), PATIENCE_S, leaving=lambda: leave)
    stayer = in_thread(waiting_queue.take, first(4), PATIENCE_S)
    leave = True
    sized(1).admitted_to(waiting_queue)
    waiting_queue.wake()
    assert sorted([len(leaver.result(PATIENCE_S)), len(stayer.result(PATIENCE_S))]) == [0, 1]


def test_max_wait_gathers_what_follows_within_it() -> None:
    """With max_wait_ms a thread waits for company, but no longer than that, nor once its batch is full."""
    now = 0.0
    waiting_queue = ModelQueue(10, lambda: now)
    one, other = sized(1).admitted_to(waiting_queue), sized(1)
    taken = in_thread(waiting_queue.take, first(2), 0, enough=2, max_wait_s=PATIENCE_S)
    other.admitted_to(waiting_queue)  # full: goes at once, though the clock stands
    assert requests_of(taken.result(PATIENCE_S)) == [one, other]
    one.admitted_to(waiting_queue)
    taken = in_thread(waiting_queue.take, first(2), 0, enough=2, max_wait_s=A_WHILE_S)
    now = PATIENCE_S
    waiting_queue.wake()
    assert requests_of(taken.result(PATIENCE_S)) == [one]


def test_a_resize_lets_waiting_work_in() -> None:
    """A larger bound applies at once; a smaller one keeps what waits."""
    waiting_queue = ModelQueue(2)
    request = sized(4)
    assert waiting_queue.admit(request.items) == 1
    fed = in_thread(waiting_queue.feed, request.items[1:], PATIENCE_S)
    waiting_queue.resize(8)
    assert fed.result(PATIENCE_S) == 3
    waiting_queue.resize(1)
    with pytest.raises(queue.Full):
        waiting_queue.admit(sized(1).items)
    assert len(waiting_queue.take(first(10), 0)) == 4


def test_an_admitted_request_outlives_a_smaller_queue() -> None:
    """A request that was admitted to a larger queue is fed, however small that has been made."""
    waiting_queue = ModelQueue(8, still())
    request = sized(8)
    assert waiting_queue.admit(request.items) == 4
    waiting_queue.resize(1)
    waiting_queue.take(first(8), 0)
    assert waiting_queue.feed(request.items[4:], 0) == 1


def test_what_is_put_back_goes_first_and_as_it_was() -> None:
    """A batch that comes back is taken again by itself, before what waits, however full the queue is by then; the next
    that came back is taken after a batch of what waits."""
    waiting_queue = ModelQueue(4)
    sized(2).admitted_to(waiting_queue)
    lost = waiting_queue.take(first(2), 0)
    others = [sized(1).admitted_to(waiting_queue) for _ in range(4)]
    waiting_queue.put_back(lost[:1])
    waiting_queue.put_back(lost[1:])
    assert waiting_queue.qsize() == 6
    with pytest.raises(queue.Full):
        waiting_queue.admit(sized(1).items)
    assert waiting_queue.take(first(9), 0) == lost[:1]
    assert requests_of(waiting_queue.take(first(9), 0)) == others
    assert waiting_queue.take(first(9), 0) == lost[1:]
    waiting_queue.put_back(lost[:1])
    assert waiting_queue.take(first(9), 0) == lost[:1]  # nothing else waits
    assert waiting_queue.take(first(9), 0) == []


def test_what_is_put_back_wakes_a_waiting_thread() -> None:
    """Another replica takes over at once, and a model that cannot serve gives all of it up."""
    waiting_queue = ModelQueue(4)
    lost = sized(2).admitted_to(waiting_queue).items
    assert waiting_queue.take(first(2), 0) == lost
    taken = in_thread(waiting_queue.take, first(2), PATIENCE_S)
    waiting_queue.put_back(lost)
    assert taken.result(PATIENCE_S) == lost
    waiting_queue.put_back(lost)
    assert waiting_queue.take_all() == lost
    assert not waiting_queue.qsize()


def test_room_and_work_behind_what_was_put_back_are_noticed() -> None:
    """Taking such a batch makes room for a request that is fed, and the next thread is told of what is left."""
    waiting_queue = ModelQueue(4)
    sized(2).admitted_to(waiting_queue)
    lost = waiting_queue.take(first(2), 0)
    waiting_queue.put_back(lost[:1])
    waiting_queue.put_back(lost[1:])
    request = sized(2)
    assert waiting_queue.admit(request.items) == 1
    fed = in_thread(waiting_queue.feed, request.items[1:], PATIENCE_S)
    threads = [in_thread(waiting_queue.take, first(9), PATIENCE_S) for _ in range(3)]
    taken = [item for thread in threads for item in thread.result(PATIENCE_S)]
    fed.result(PATIENCE_S)
    taken += waiting_queue.take(first(9), 0)
    assert len(taken) == 4
    assert not waiting_queue.qsize()
