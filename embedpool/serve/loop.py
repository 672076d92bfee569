"""The event loop that serves HTTP, and its graceful shutdown. gunicorn's worker and run.py's waitress server run it.

One I/O thread reads every connection and hands only whole requests to the request threads, so slow and idle clients
hold no thread. They do not keep others out either: at the connection limit the loop evicts them.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
from collections.abc import Callable, Sequence

from embedpool.serve.address import host_of
from embedpool.serve.app import App
from embedpool.serve.connections import Channel, listen
from embedpool.serve.readiness import OpenSockets

logger = logging.getLogger(__name__)

BEAT_S = 1.0
MOST_ACCEPTED_AT_ONCE = 16  # connections in a turn; 1 where other processes accept from the same socket
FILES_BESIDE = 256  # files open beside the connections: models, pipes to children, logs, pool.yml
MOST_ON_WINDOWS = 500  # a few less than the sockets that its `select` takes
LEAST_WAIT_S = 2.0  # a connection that has waited less long for a whole request is not evicted
LONGEST_LINGER_S = 10.0  # of a lingering close
LINGER_AT_STOP_S = 1.0  # the same while the server stops
LOOK_FOR_ROOM_EVERY_S = 0.1  # at the limit, while no connection may be evicted


def connections_that_fit(wanted: int, threads: int) -> int:
    """How many connections may be open, at most `wanted`, so that enough open files remain for all else.

    A request thread may need one for a remote service, a connection a second one for a large body. The process raises
    its soft limit (ulimit -n) as far as that takes. Where the hard limit forbids it, large bodies have to be few.
    """
    try:
        import resource
    except ImportError:
        return min(wanted, MOST_ON_WINDOWS)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = 2 * wanted + threads + FILES_BESIDE
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return wanted
    with contextlib.suppress(ValueError, OSError):  # some systems let nobody have what they call the hard limit
        raised = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))
        soft = raised
    fit = soft - min(threads + FILES_BESIDE, soft // 2)
    if fit < wanted:
        logger.warning("connection_limit is %d, not %d: %d files may be open (ulimit -n)", fit, wanted, soft)
    return min(fit, wanted)


class Loop:
    """Serves an app on listening sockets until `stop`, then shuts down gracefully."""

    def __init__(self, app: App, sockets: Sequence[socket.socket], *, shared: bool = False) -> None:
        """`shared`: other processes accept connections from the same sockets."""
        settings = app.settings
        self._app = app
        self._stopping = False
        self._delay_s = 0
        self._replaced = False
        self._next_beat = 0.0
        self._look_every_s = min(settings.server.idle_connection_s, 30) / 2
        self._most = connections_that_fit(settings.server.connection_limit, settings.threads)
        self._gave_way = 0
        self._next_room = 0.0
        self._open = OpenSockets()
        app.listens_at([host_of(each) for each in sockets])
        self._listeners = listen(
            app,
            sockets,
            self._open,
            most=self._most,
            accepted_at_once=1 if shared else MOST_ACCEPTED_AT_ONCE,
        )

    def stop(self, *, delay: bool = False, replaced: bool = False) -> None:
        """Let `run` drain and return; with a delay it goes on accepting for a while, and says that it is not ready.

        `replaced`: another process serves on at the same sockets, so that who asks is still told that it is ready.
        """
        # A signal handler calls this, in the middle of whatever the main thread does: it takes no lock. It sets a flag
        # that `run` reads after each turn, and writes a byte to the pipe that ends the turn at once.
        self._delay_s = self._app.settings.server.drain_delay_s if delay else 0
        self._replaced = replaced
        self._stopping = True
        self._listeners[0].wake()

    def run(self, heartbeat: Callable[[], bool] = lambda: True) -> None:
        """Serve until `stop`, or until `heartbeat`, called at least once a second, says False; then drain."""
        next_look = 0.0
        while not self._stopping and heartbeat():
            self._turn(BEAT_S)
            if time.monotonic() >= next_look:
                next_look = time.monotonic() + self._look_every_s
                self._close_idle()
                self._close_stalled()
                self._tell_who_gave_way()
        self._drain(heartbeat)

    def _turn(self, longest_s: float) -> None:
        """Accept, read and send whatever is ready; wait up to `longest_s` for it."""
        self._make_room()
        for listener in self._listeners:
            self._open.ask(listener.fd)  # a connection may have closed: it may accept again
        self._open.turn(longest_s)
        if time.monotonic() >= self._next_beat:
            self._next_beat = time.monotonic() + BEAT_S
            self._open.ask_all()  # in case one changed its interest and did not say so
            self._app.beat()

    def _make_room(self) -> None:
        """At the connection limit, evict the connection that has waited longest for a whole request.

        One slot stays free for a client that connects next.
        """
        now = time.monotonic()
        if len(self._open) < self._most - 1 or now < self._next_room or self._stopping:
            return
        waiting = [c for c in self._channels() if c.waits_for_a_request and now - c.waits_since >= LEAST_WAIT_S]
        for channel in sorted(waiting, key=lambda channel: channel.waits_since):
            if not channel.may_bring_a_request:
                channel.cut()
                self._gave_way += 1
                return
        self._next_room = now + LOOK_FOR_ROOM_EVERY_S

    def _tell_who_gave_way(self) -> None:
        if self._gave_way:
            logger.warning("%d idle or slow connections gave way: %d may be open", self._gave_way, self._most)
            self._gave_way = 0

    def _close_idle(self) -> None:
        """Close idle connections, and end lingering closes.

        Here and now: waitress would wait until the client can be written to, which may be never.
        """
        longest_s = self._app.settings.server.idle_connection_s
        for channel in self._channels():
            is_idle = channel.waits_for_a_request and channel.quiet_s > longest_s and not channel.may_bring_a_request
            if is_idle or (channel.lingers and not channel.lingers_within(LONGEST_LINGER_S)):
                channel.cut()

    def _close_stalled(self) -> None:
        """Cut off clients that do not read their answers: back-pressure holds a request thread for as long.

        waitress itself would wait for ever.
        """
        longest_s = self._app.settings.server.idle_connection_s
        for channel in self._channels():
            if channel.unsent_bytes and channel.quiet_s > longest_s:
                logger.info("a client that read nothing of its answer for %d s is cut off", longest_s)
                channel.cut()

    def _drain(self, heartbeat: Callable[[], bool]) -> None:
        """Stop the watch, the listeners, the requests, the pool and the threads, in this order and in bounded time."""
        grace_s = self._app.settings.server.graceful_timeout_s
        self._app.begin_to_stop(replaced=self._replaced)
        began_at = time.monotonic()
        while (rest_s := began_at + self._delay_s - time.monotonic()) > 0:  # another signal may end it
            heartbeat()
            self._turn(min(rest_s, BEAT_S))
        for listener in self._listeners:
            listener.end_keep_alive()
        for listener in self._listeners:
            listener.close()
        self._serve_what_is_left(grace_s, heartbeat)
        given_up = self._give_up(heartbeat)
        cut = len(self._channels())
        self._listeners[0].end_threads(1)
        self._open.close()
        log = logger.warning if given_up or cut else logger.info
        log("stopped: %d requests got 503 shutting_down, %d connections were cut", given_up, cut)

    def _give_up(self, heartbeat: Callable[[], bool]) -> int:
        """Stop the app, and meanwhile send the 503s that it gives to the requests it gives up."""
        # `stop` may wait for a hung batch, so it has a thread of its own and this one goes on sending. The count comes
        # back through the list, which this thread reads only once the other has ended: no lock is needed.
        counts: list[int] = []
        stopping = threading.Thread(target=lambda: counts.append(self._app.stop()), name="stop-app")
        stopping.start()
        while stopping.is_alive():
            self._serve_what_is_left(0.0, heartbeat)
        self._serve_what_is_left(2.0, heartbeat)
        return sum(counts)

    def _serve_what_is_left(self, longest_s: float, heartbeat: Callable[[], bool]) -> None:
        """Turn until every connection is closed, for up to `longest_s`.

        A connection is closed once its requests are answered and no other has arrived on it. A lingering close is given
        a moment, so that the client can read its answer.
        """
        deadline = time.monotonic() + longest_s
        while True:
            heartbeat()
            self._turn(0.05)
            for channel in self._channels():
                is_needed = channel.lingers_within(LINGER_AT_STOP_S) or channel.may_bring_a_request
                if channel.is_idle and not is_needed:
                    channel.cut()
            if not self._channels() or time.monotonic() >= deadline:
                return

    def _channels(self) -> list[Channel]:
        return [each for each in list(self._open.values()) if isinstance(each, Channel)]
