"""Waiting for sockets. A turn costs what has happened in it, however many connections are open beside.

waitress asks every connection at every turn what it waits for. Here the system keeps the answers, and a connection is
asked anew when something has happened to it; all of them are when the owner says so.
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
    """waitress's map of file descriptors to dispatchers. `turn` and `ask_all` belong to one thread, the rest to any."""

    def __init__(self) -> None:
        super().__init__()
        self._selector = selectors.DefaultSelector()
        self._lock = threading.Lock()  # what is registered is in the map, and so is still open
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
        """Something has happened that may change what it waits for. The next turn asks it."""
        self._to_ask.append(fd)

    def ask_all(self) -> None:
        """The next turn asks everyone."""
        self._to_ask.extend(list(self))

    def awaits_input_alone(self, fd: int) -> bool:
        """Whether the system waits for input of it, and for nothing else."""
        return self._awaited.get(fd) == READ

    def turn(self, longest_s: float) -> None:
        """Handle what has come and what can leave; wait up to `longest_s` for it."""
        while self._to_ask:
            self._follow(self._to_ask.popleft())
        for key, events in self._selector.select(longest_s):
            for event, handle in ((READ, handle_input), (WRITE, handle_output)):
                if events & event and self.get(key.fd) is key.data:
                    handle(key.data)
            self.ask(key.fd)

    def close(self) -> None:
        """Close every socket, and give back what waiting for them takes."""
        for dispatcher in list(self.values()):
            dispatcher.close()
        self._selector.close()

    def _follow(self, fd: int) -> None:
        """Until the system waits for what the dispatcher waits for: it may change its mind on another thread."""
        while (dispatcher := self.get(fd)) is not None:
            reads, writes = interest_of(dispatcher)
            events = READ * reads | WRITE * writes
            if events == self._awaited.get(fd, 0):
                return
            with self._lock:
                if self.get(fd) is dispatcher:
                    self._await(fd, events, dispatcher)

    def _await(self, fd: int, events: int, dispatcher: Any = None) -> None:
        """With the lock held."""
        before = self._awaited.pop(fd, 0)
        if events:
            self._awaited[fd] = events
            (self._selector.modify if before else self._selector.register)(fd, events, dispatcher)
        elif before:
            self._selector.unregister(fd)
