"""Waits for sockets with epoll or its like. A turn costs what happens in it, however many idle connections are open.

waitress asks every connection for its interest (input, output or both) on every turn. Here the system keeps a list of
interests, and a connection is asked again only when something has happened to it, or when the loop asks all.
"""

from __future__ import annotations

import collections
import selectors
import threading
from typing import Any

from typing_extensions import override

from embedpool.serve.connections import handle_input, handle_output, interest_of

READ, WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE


class OpenSockets(dict[int, Any]):
    """waitress's map of file descriptors to what it has open. `turn` and `ask_all` belong to the I/O thread."""

    # The I/O thread adds, asks and waits. A request thread may remove an entry, when it finds that its client has gone,
    # and closes the socket right after. `_lock` orders this with the I/O thread's registration: a descriptor is
    # registered only while its entry stands in the map, and unregistered before it can be closed and used again for
    # another connection. Whoever takes it may hold waitress's `requests_lock` and `outbuf_lock`, in this order; with it
    # nobody takes another lock. Reads go without it: a dict's are atomic, and `turn` looks at the entry again before it
    # calls a handler.

    def __init__(self) -> None:
        super().__init__()
        self._selector = selectors.DefaultSelector()
        self._lock = threading.Lock()
        self._awaited: dict[int, int] = {}
        self._to_ask: collections.deque[int] = collections.deque()

    @override
    def __setitem__(self, fd: int, dispatcher: Any) -> None:
        super().__setitem__(fd, dispatcher)
        self._to_ask.append(fd)

    @override
    def __delitem__(self, fd: int) -> None:
        with self._lock:
            super().__delitem__(fd)
            self._await(fd, 0)

    def ask(self, fd: int) -> None:
        """Let the next turn ask this one for its interest. Any thread may call this: a deque needs no lock."""
        self._to_ask.append(fd)

    def ask_all(self) -> None:
        """Let the next turn ask every one."""
        self._to_ask.extend(list(self))

    def awaits_input_alone(self, fd: int) -> bool:
        """Whether the system waits for its input and nothing else."""
        return self._awaited.get(fd) == READ

    def turn(self, longest_s: float) -> None:
        """Handle the input and output that is ready; wait up to `longest_s` for some."""
        while self._to_ask:
            self._follow(self._to_ask.popleft())
        for key, events in self._selector.select(longest_s):
            for event, handle in ((READ, handle_input), (WRITE, handle_output)):
                if events & event and self.get(key.fd) is key.data:
                    handle(key.data)
            self.ask(key.fd)

    def close(self) -> None:
        """Close every socket, and the selector."""
        for dispatcher in list(self.values()):
            dispatcher.close()
        self._selector.close()

    def _follow(self, fd: int) -> None:
        """Bring the system's list up to date with what it waits for."""
        # Its request thread may change its interest at any time, and wakes this thread only if the system's list then
        # says anything but "input" (see Channel.awaits_only_its_client). So after each change to the list this thread
        # asks once more: the request thread has seen the list before the change or after it, and one of both acts.
        while (dispatcher := self.get(fd)) is not None:
            reads, writes = interest_of(dispatcher)
            events = READ * reads | WRITE * writes
            if events == self._awaited.get(fd, 0):
                return
            with self._lock:
                if self.get(fd) is dispatcher:
                    self._await(fd, events, dispatcher)

    def _await(self, fd: int, events: int, dispatcher: Any = None) -> None:
        """Tell the system, with the lock held."""
        before = self._awaited.pop(fd, 0)
        if events:
            self._awaited[fd] = events
            (self._selector.modify if before else self._selector.register)(fd, events, dispatcher)
        elif before:
            self._selector.unregister(fd)
