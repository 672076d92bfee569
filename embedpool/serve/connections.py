"""waitress, adapted. Only this file and bodies.py import it: every name of waitress's that we rely on stands there.

It accepts and closes connections, has their requests parsed, and sends the answers. The loop over them is loop.py, and
readiness.py waits for their sockets. tests/serve/test_waitress.py says what each of those names is and does.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import math
import socket
import sys
import time
import weakref
from collections.abc import Sequence
from typing import Any

from typing_extensions import override
from waitress import wasyncore
from waitress.channel import HTTPChannel
from waitress.server import BaseWSGIServer, create_server
from waitress.task import ErrorTask, ThreadedTaskDispatcher, WSGITask

from embedpool.bounds import Budget
from embedpool.config.settings import FORM_BYTES
from embedpool.errors import BadRequest, BodyTooLarge
from embedpool.serve.app import App
from embedpool.serve.bodies import Parser, Refused, Spool, document
from embedpool.serve.last_in_first_out import LastInFirstOut
from embedpool.serve.nonblocking import Socket, is_gone

logger = logging.getLogger(__name__)

BEGAN_AT = "embedpool.began_at"  # in the environment: when the first byte of the request came, by time.monotonic()
ALWAYS_ANSWERED = ("/health", "/ready")  # by threads of their own, whatever all others wait for
THREADS_FOR_THESE = 2
LISTEN_BACKLOG = 2048
LARGEST_JOINED_BYTES = 1 << 16  # above it copying costs more than a second packet
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
NEEDED_OF_A_SERVER = ("adj", "application", "effective_port", "server_name")


class _Task(WSGITask):  # type: ignore[misc]
    """Answers a request, on a request thread. While the server stops, each answer closes its connection."""

    wrote_header: bool

    @override
    def get_environment(self) -> dict[str, Any]:
        environ: dict[str, Any] = super().get_environment()
        environ[BEGAN_AT] = self.request.began_at
        return environ

    @override
    def build_response_header(self) -> bytes:
        if self.channel.begins_to_answer() or getattr(self.channel.server, "is_stopping", False):
            self.set_close_on_finish()
        header: bytes = super().build_response_header()
        return header

    @override
    def write(self, data: bytes) -> None:
        """As waitress does, but a small answer leaves together with its header: one call, one packet."""
        whole = self.complete and not self.wrote_header and self.content_length == len(data) <= LARGEST_JOINED_BYTES
        if not whole or not self.has_body:
            super().write(data)
            return
        self.wrote_header = True
        self.content_bytes_written = len(data)
        self.channel.write_soon(self.build_response_header() + data)


class _ErrorTask(ErrorTask):  # type: ignore[misc]
    """Answers a request that is not HTTP, or that its head rules out, with an error in our shape."""

    @override
    def execute(self) -> None:
        # The I/O thread reads this flag in Channel.handle_write, once `close_when_flushed` is set. waitress sets that
        # after this task has ended, so the order alone hands the flag over.
        self.channel.may_be_sending = True
        self.channel.begins_to_answer()
        reason = self.request.error
        if isinstance(reason, Refused):
            body = reason.body
            self.response_headers.extend(reason.headers)
        elif reason.code == 413:
            limit = self.request.adj.max_request_body_size
            body = document(BodyTooLarge(f"the body is over the limit of {limit} bytes"))
        else:
            body = document(BadRequest(f"{reason.reason}: {reason.body}"))
        self.status = f"{reason.code} {reason.reason}"
        self.response_headers.append(("Content-Type", "application/json"))
        self.set_close_on_finish()
        self.content_length = len(body)
        self.write(body)


class Channel(HTTPChannel):  # type: ignore[misc]
    """A client's connection."""

    # The I/O thread reads, parses, closes and sends what was left unsent; the thread of the running request sends its
    # answer. waitress has two locks for that. `requests_lock` guards `requests` and the hand-over of a whole request;
    # `outbuf_lock` guards the buffers of the answer and the socket's sends. Whoever needs both takes `requests_lock`
    # first. Closing then takes the lock of OpenSockets, last of all.

    parser_class = Parser
    task_class = _Task
    error_task_class = _ErrorTask

    close_when_flushed: bool  # waitress's own, and so is the next
    request: Parser | None
    has_begun = False  # to answer the first of its requests
    takes_answers_alone = False  # the client has shut its sending side

    def __init__(self, server: Any, client: socket.socket, *arguments: Any, **named: Any) -> None:
        super().__init__(_ServerOfChannel(server, self), Socket(client), *arguments, **named)
        self.outbufs = [Spool()]
        self.waits_since = time.monotonic()  # for a whole request, when none is served
        self.moved_at = self.waits_since  # anything was received or sent
        self.may_be_sending = False  # the rest of a request that was refused
        self.lingers = False

    @property
    def is_idle(self) -> bool:
        """Whether no request has begun, runs or is half answered."""
        return not (self.requests or self.request or self.unsent_bytes)

    @property
    def waits_for_a_request(self) -> bool:
        """Whether no request runs or is half answered; part of one may have arrived."""
        return not (self.requests or self.unsent_bytes)

    @property
    def unsent_bytes(self) -> int:
        """How much of its answers the client has not taken yet."""
        return int(self.total_outbufs_len)

    @property
    def quiet_s(self) -> float:
        """How long ago anything was received or sent."""
        return time.monotonic() - self.moved_at

    @property
    def may_bring_a_request(self) -> bool:
        """Whether the system holds input, after the last request, that the I/O thread has not read yet."""
        if self.request is not None or self.lingers:
            return False
        try:
            return bool(self.socket.recv(1, socket.MSG_PEEK))
        except OSError:  # nothing, or nobody
            return False

    @property
    def awaits_only_its_client(self) -> bool:
        """Whether the I/O thread has nothing to do until the client sends something, and is waiting for that."""
        # A request thread asks this without a lock, when its request has left `requests` and its answer `outbufs`. If
        # the client has sent more meanwhile, the I/O thread has that in hand, and is at worst woken for nothing. If the
        # I/O thread is just changing the system's list for this connection, see OpenSockets._follow.
        ends = self.will_close or self.close_when_flushed or not self.connected
        return self.is_idle and not ends and self._map.awaits_input_alone(self._fileno)

    def lingers_within(self, longest_s: float) -> bool:
        """Whether its lingering close (see handle_write) has lasted no longer than this."""
        return self.lingers and time.monotonic() - self.waits_since <= longest_s

    def cut(self) -> None:
        """Close it here and now, on the I/O thread, even if an answer is unsent."""
        self.handle_close()

    # --- a client that shuts its sending side while it waits for an answer

    @override
    def handle_read(self) -> None:
        """As waitress does, but the end of the input is no end of the connection while an answer is due.

        Whoever has gone altogether looks the same. So he is sent what any client passes over, and his system says that
        nobody is there.
        """
        if self.waits_for_a_request or not self._input_has_ended():
            self.moved_at = time.monotonic()
            super().handle_read()
            return
        with self.outbuf_lock:
            self.takes_answers_alone = True
            if self.requests and not self.has_begun and self.requests[0].version == "1.1":
                self.outbufs[-1].append(CONTINUE)
                self.total_outbufs_len += len(CONTINUE)
                self._flush_some()

    def _input_has_ended(self) -> bool:
        try:
            return not self.socket.recv(1, socket.MSG_PEEK)
        except OSError:
            return False

    def begins_to_answer(self) -> bool:
        """Note, on the request's thread, that its answer begins; whether it is the last on this connection."""
        with self.outbuf_lock:
            self.has_begun = True
        return self.takes_answers_alone

    @override
    def check_client_disconnected(self) -> bool:
        """Whether nobody waits for the answer. From any thread, which finds the socket open under the lock."""
        if not self.takes_answers_alone or not self.connected:
            return not self.connected
        with self.outbuf_lock:
            return not self.connected or is_gone(self.socket)

    @override
    def readable(self) -> bool:
        return not self.takes_answers_alone and bool(super().readable())

    @override
    def writable(self) -> bool:
        return bool(super().writable()) or (self.takes_answers_alone and self.is_idle)

    # --- the end of a connection

    @override
    def handle_write(self) -> None:
        """As waitress does, but with a lingering close where the client may still be sending.

        After the answer the server shuts down its side, and goes on to read and discard what arrives. Closed at once,
        with input unread, the connection would be reset, and the client might never see its answer.
        """
        if self.takes_answers_alone and self.is_idle:
            self.will_close = True
        ends = self.close_when_flushed and self.may_be_sending
        if ends:
            self.close_when_flushed = False
        super().handle_write()
        if ends and self.total_outbufs_len:
            self.close_when_flushed = True
        elif ends and self.connected:
            self.lingers = True
            self.waits_since = time.monotonic()
            if self.request is not None:  # came together with the refused head, and was parsed as a request of its own
                self.request.close()
                self.request = None
            with contextlib.suppress(OSError):  # the client has gone
                self.socket.shutdown(socket.SHUT_WR)

    @override
    def received(self, data: bytes) -> bool:
        """Parse input, and discard it in a lingering close."""
        return not self.lingers and bool(super().received(data))

    def ask(self) -> None:
        """Have the I/O thread ask it for its interest."""
        self._map.ask(self._fileno)

    @override
    def _flush_some(self, do_close: bool = True) -> bool:
        """Send what the socket takes, under `outbuf_lock` always."""
        # waitress's I/O thread takes no lock here while no request runs. But a request thread that is about to end may
        # then send `100 Continue` for the next request, and both would send the same bytes. A caller may hold the lock
        # already: it belongs to a thread. handle_close clears `connected` under it before it closes the socket, so
        # nobody sends to a descriptor that may be another connection's by now.
        with self.outbuf_lock:
            if not self.connected:
                return False
            sent: bool = super()._flush_some(do_close)
            if sent:
                self.waits_since = self.moved_at = time.monotonic()
                if self.connected and not self.total_outbufs_len:
                    last = self.outbufs[-1]
                    if last.buf is not None or not isinstance(last, Spool):  # such a buffer keeps what it has sent
                        last.close()
                        self.outbufs = [Spool()]
                    self.current_outbuf_count = 0
        return sent


class _ServerOfChannel:
    """The server as a channel sees it: it wakes the I/O thread only where that has something to do.

    The I/O thread reads from a channel while its request runs (the lookahead), so after an answer that has left whole
    there is nothing to do. It holds the channel by a proxy, since a cycle would keep the memory of a closed one.
    """

    def __init__(self, server: Any, channel: Channel) -> None:
        self._server, self._channel = server, weakref.proxy(channel)
        for name in NEEDED_OF_A_SERVER:  # every request needs these; __getattr__ takes longer
            setattr(self, name, getattr(server, name))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._server, name)

    def add_task(self, channel: Channel) -> None:
        """Have a request thread serve the first request of the channel."""
        channel.has_begun = False
        threads = self._server.for_health if channel.requests[0].path in ALWAYS_ANSWERED else self._server
        threads.add_task(channel)

    def pull_trigger(self) -> None:
        """Wake the I/O thread: an answer is written, or its buffers are full and back-pressure holds its thread."""
        # A request thread hands its channel over here. It queues the channel first and wakes the I/O thread then, whose
        # next turn begins with the queue: the other way round that turn might come too early. While the server stops
        # each answer wakes it, since it may be the last that the stop waits for.
        if self._server.is_stopping or not self._channel.awaits_only_its_client:
            self._channel.ask()
            self._server.pull_trigger()


class Listener:
    """A listening socket, with waitress's server for it. All but `wake` belong to the I/O thread."""

    def __init__(self, app: App, server: Any, opened: dict[int, Any], accepted_at_once: int) -> None:
        """`accepted_at_once` bounds the connections that one turn of the loop accepts."""
        self._server, self._opened, self._accepted_at_once = server, opened, accepted_at_once
        self.fd: int = server._fileno
        server.channel_class = Channel
        server.handle_accept = self._accept_some
        server.adj.refusal = app.refusal
        server.adj.for_lines = copy.copy(server.adj)
        server.adj.for_lines.max_request_body_size = app.settings.limits.max_stream_body_bytes
        server.adj.for_files = copy.copy(server.adj)
        server.adj.for_files.max_request_body_size = app.settings.limits.max_file_bytes + FORM_BYTES
        server.is_stopping = False
        server.next_channel_cleanup = math.inf  # the loop closes idle connections itself

    def wake(self) -> None:
        """End the turn of the loop that waits. Safe on any thread and in a signal handler."""
        self._server.pull_trigger()

    def end_keep_alive(self) -> None:
        """From now on each answer closes its connection."""
        self._server.is_stopping = True

    def close(self) -> None:
        """Accept what the system holds already, then close. It refuses later connections instead of parking them."""
        while self._accept():
            pass
        self._server.accepting = False
        self._server.del_channel()
        self._server.socket.close()

    def end_threads(self, longest_s: float) -> None:
        """End the request threads, which all listeners share; wait up to `longest_s` for them."""
        self._server.task_dispatcher.shutdown(timeout=longest_s)
        self._server.for_health.shutdown(timeout=longest_s)

    def _accept_some(self) -> None:
        """Accept connections that wait, as long as there are slots for them."""
        for _ in range(self._accepted_at_once):
            if not (self._server.readable() and self._accept()):
                return

    def _accept(self) -> bool:
        """Accept a connection; False if none waits."""
        before = len(self._opened)
        BaseWSGIServer.handle_accept(self._server)
        return len(self._opened) > before


def listen(
    app: App, sockets: Sequence[socket.socket], opened: dict[int, Any], *, most: int, accepted_at_once: int
) -> list[Listener]:
    """Have waitress serve the app on these sockets. `most` bounds `opened`: connections and the server's own."""
    dispatcher = ThreadedTaskDispatcher()
    dispatcher.queue_cv = LastInFirstOut(dispatcher.lock)  # few threads run: each that has run holds memory of its own
    dispatcher.set_thread_count(app.settings.threads)
    create_server(
        app,
        map=opened,
        sockets=list(sockets),
        _dispatcher=dispatcher,
        connection_limit=most,
        max_request_body_size=app.settings.limits.max_body_bytes,
        outbuf_overflow=sys.maxsize,  # a channel begins with a Spool; after 16 MB waitress adds others, in memory
        channel_request_lookahead=1,  # else a client that goes away is not noticed
        clear_untrusted_proxy_headers=False,  # the app reads them to tell a proxy
        backlog=LISTEN_BACKLOG,
        ident="embedpool",
    )
    servers = [opened_one for opened_one in opened.values() if isinstance(opened_one, BaseWSGIServer)]
    for_health = ThreadedTaskDispatcher()
    for_health.set_thread_count(THREADS_FOR_THESE)
    spooled = Budget(app.settings.limits.max_spooled_bytes, "the large bodies of other requests fill the room for them")
    for server in servers:
        server.for_health, server.adj.spooled = for_health, spooled
    return [Listener(app, server, opened, accepted_at_once) for server in servers]


# What readiness.py asks of anything that waitress has open: a socket that listens, a client's, the one that wakes the
# loop. These two close it if its handler raises.
handle_input, handle_output = wasyncore.read, wasyncore.write


def interest_of(opened_one: Any) -> tuple[bool, bool]:
    """Whether it waits for input, and whether it waits to be written to."""
    return bool(opened_one.readable()), bool(opened_one.writable()) and not opened_one.accepting
