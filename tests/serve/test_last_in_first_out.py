"""A condition that wakes the thread which has waited for the shortest time."""

from __future__ import annotations

import threading

from embedpool.serve.last_in_first_out import LastInFirstOut


def test_the_request_thread_that_waited_least_goes_first() -> None:
    """The memory of the others stays cold; a wake-up of all of them wakes all."""
    condition = LastInFirstOut(threading.Lock())
    woken: list[str] = []

    def wait(name: str, started: threading.Event) -> None:
        with condition:
            started.set()
            condition.wait()
            woken.append(name)

    threads = {}
    for name in "abcd":
        threads[name] = threading.Thread(target=wait, args=(name, started := threading.Event()))
        threads[name].start()
        assert started.wait(20)
    with condition:  # which the last has given up, so it waits
        condition.notify()
    threads["d"].join(20)
    assert woken == ["d"]
    with condition:
        condition.notify()
    threads["c"].join(20)
    assert woken == ["d", "c"]
    with condition:
        condition.notify_all()
    for thread in threads.values():
        thread.join(20)
    assert sorted(woken) == ["a", "b", "c", "d"]
