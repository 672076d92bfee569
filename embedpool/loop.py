"""waitress's loop over our sockets, and its orderly end. gunicorn's worker and the waitress server both run it.

One I/O thread reads every connection and gives a request thread only whole requests, so slow and idle clients
hold none.
"""

from __future__ import annotations

import copy
import logging
import select
import socket
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from http import HTTPStatus
from typing import Any, Protocol

import orjson
from waitress import wasyncore
from waitress.channel import HTTPChannel
from waitress.parser import HTTPRequestParser
from waitress.server import BaseWSGIServer, create_server
from waitress.task import ErrorTask, ThreadedTaskDispatcher, WSGITask
from waitress.utilities import Error

from embedpool.config.settings import Settings
from embedpool.errors import BadRequest, BodyTooLarge, EmbedpoolError, as_document

logger = logging.getLogger(__name__)

BEAT_S = 1.0
LISTEN_BACKLOG = 2048
LINES_PATH, LINES_TYPE = "/embed", "application/x-ndjson"
LARGEST_JOINED_BYTES = 1 << 16  # above it copying costs more than a second packet
LARGEST_READ_UNSEEN_BYTES = 1 << 16  # of a body, before its sender is asked for a key


class _Task(WSGITask):  # type: ignore[misc]
    """While the server stops, each answer closes its connection."""

    wrote_header: bool

    def build_response_header(self) -> bytes:
        if getattr(self.channel.server, "is_stopping", False):
            self.set_close_on_finish()
        header: bytes = super().build_response_header()
        return header

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
    """What is not even HTTP gets an error in our shape, too."""

    def execute(self) -> None:
        reason = self.request.error
        if isinstance(reason, _Refused):
            self._answer(f"{reason.code} {reason.reason}", reason.body)
            return
        error: EmbedpoolError = (
            BodyTooLarge(f"the body is over the limit of {self.request.adj.max_request_body_size} bytes")
            if reason.code == 413
            else BadRequest(f"{reason.reason}: {reason.body}")
        )
        error.status = reason.code
        self._answer(f"{reason.code} {reason.reason}", orjson.dumps(as_document(error, uuid.uuid4().hex)))

    def _answer(self, status: str, body: bytes) -> None:
        self.status = status
        self.response_headers.append(("Content-Type", "application/json"))
        self.set_close_on_finish()
        self.content_length = len(body)
        self.write(body)


class _Refused(Error):  # type: ignore[misc]
    """The app's answer to a request that it has seen the head of."""

    def __init__(self, status: int, body: bytes) -> None:
        super().__init__(body)
        self.code, self.reason = status, HTTPStatus(status).phrase


class _Parser(HTTPRequestParser):  # type: ignore[misc]
    """A body of lines, which is answered line by line, has a limit of its own.

    A large body is not read from somebody who may not send it.
    """

    adj: Any
    path = ""  # waitress logs it when a client leaves, also of what has none because it is not even HTTP

    def parse_header(self, header_plus: bytes) -> None:
        super().parse_header(header_plus)
        if self.path.rstrip("/") == LINES_PATH and self.headers.get("CONTENT_TYPE", "").startswith(LINES_TYPE):
            self.adj = self.adj.for_lines
        if (self.chunked or self.content_length > LARGEST_READ_UNSEEN_BYTES) and (
            refusal := self.adj.refusal(self.command, self.path, self.headers)
        ):
            self.error = _Refused(*refusal)
            self.completed = self.connection_close = True
            self.expect_continue = False


class _Channel(HTTPChannel):  # type: ignore[misc]
    parser_class = _Parser
    task_class = _Task
    error_task_class = _ErrorTask

    def __init__(self, server: Any, *arguments: Any, **named: Any) -> None:
        super().__init__(_Quiet(server, self), *arguments, **named)

    @property
    def is_idle(self) -> bool:
        """No request begun, running or half answered."""
        return not (self.requests or self.request or self.total_outbufs_len)

    def _flush_some(self, do_close: bool = True) -> bool:
        """Under the lock always: a request's thread may send `100 Continue` while the I/O thread, which takes no lock
        where no request runs, would send the same bytes again."""
        with self.outbuf_lock:
            sent: bool = super()._flush_some(do_close)
        return sent


class _Quiet:
    """The server as a channel sees it: the I/O thread is woken only where there is something to do for it.

    With a lookahead it reads from a channel while its request runs, so an answer that has left whole needs no wake-up.
    """

    def __init__(self, server: Any, channel: _Channel) -> None:
        self._server, self._channel = server, channel

    def __getattr__(self, name: str) -> Any:
        return getattr(self._server, name)

    def pull_trigger(self) -> None:
        """From a request's thread, when its answer is written."""
        channel = self._channel
        is_left = channel.is_idle and channel.connected and not channel.will_close and not channel.close_when_flushed
        if not is_left or self._server.is_stopping:
            self._server.pull_trigger()


class _LastInFirstOut:
    """A condition that wakes the thread which has waited for the shortest time."""

    def __init__(self, lock: threading.Lock) -> None:
        self._lock = lock
        self._waiting: list[threading.Lock] = []

    def wait(self) -> None:
        """With the lock held; it is let go meanwhile."""
        alarm = threading.Lock()
        alarm.acquire()
        self._waiting.append(alarm)
        self._lock.release()
        alarm.acquire()
        self._lock.acquire()

    def notify(self) -> None:
        """With the lock held."""
        if self._waiting:
            self._waiting.pop().release()

    def notify_all(self) -> None:
        """With the lock held."""
        while self._waiting:
            self.notify()


class _Dispatcher(ThreadedTaskDispatcher):  # type: ignore[misc]
    """As few request threads are kept busy as the load needs.

    In turns all of them would be, and each keeps memory of its own: its stack, and what malloc holds back for it.
    """

    def __init__(self, threads: int) -> None:
        super().__init__()
        self.queue_cv = _LastInFirstOut(self.lock)
        self.set_thread_count(threads)


class App(Protocol):
    """What the loop asks of the WSGI app it serves."""

    settings: Settings

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        """WSGI."""

    def beat(self) -> None:
        """The loop lives; called once a second."""

    def refusal(self, method: str, path: str, headers: Mapping[str, str]) -> tuple[int, bytes] | None:
        """Status and body of the answer to a caller who may not send this; headers as CONTENT_TYPE."""

    def begin_to_stop(self) -> None:
        """Nothing changes the pool any more, and /ready says so; requests are still served."""

    def stop(self) -> int:
        """Give up what is still being served; how many requests that were."""


class Loop:
    """waitress's loop over given listening sockets, and its orderly end."""

    def __init__(self, app: App, sockets: Sequence[socket.socket]) -> None:
        settings = app.settings
        self._app = app
        self._stopping = False
        self._next_beat = 0.0
        self._look_every_s = min(settings.server.idle_connection_s, 30) / 2
        self._map: dict[int, Any] = {}
        create_server(
            app,
            map=self._map,
            sockets=list(sockets),
            _dispatcher=_Dispatcher(settings.threads),
            connection_limit=settings.server.connection_limit,
            channel_timeout=settings.server.idle_connection_s,
            cleanup_interval=min(settings.server.idle_connection_s, 30),
            max_request_body_size=settings.limits.max_body_bytes,
            channel_request_lookahead=1,  # else a client that goes away is not noticed
            clear_untrusted_proxy_headers=False,  # management looks at them
            backlog=LISTEN_BACKLOG,
            ident="embedpool",
        )
        self._listeners = [d for d in self._map.values() if isinstance(d, BaseWSGIServer)]
        for listener in self._listeners:
            listener.channel_class = _Channel
            listener.adj.refusal = app.refusal
            listener.adj.for_lines = copy.copy(listener.adj)
            listener.adj.for_lines.max_request_body_size = settings.limits.max_stream_body_bytes
            listener.is_stopping = False
        self._poll = wasyncore.poll2 if hasattr(select, "poll") else wasyncore.poll  # select ends at 1,024 files

    def stop(self) -> None:
        """Let `run` drain and return. Safe in a signal handler."""
        self._stopping = True
        self._listeners[0].pull_trigger()

    def run(self, heartbeat: Callable[[], bool] = lambda: True) -> None:
        """Serve until `stop`, or until `heartbeat`, called at least once a second, says False; then drain."""
        next_look = 0.0
        while not self._stopping and heartbeat():
            self._turn(BEAT_S)
            if time.monotonic() >= next_look:
                next_look = time.monotonic() + self._look_every_s
                self._close_stalled()
        self._drain(heartbeat)

    def _turn(self, longest_s: float) -> None:
        """What has come and what can leave; waits up to `longest_s` for it."""
        self._poll(longest_s, self._map)
        if time.monotonic() >= self._next_beat:
            self._next_beat = time.monotonic() + BEAT_S
            self._app.beat()

    def _close_stalled(self) -> None:
        """A client that does not read its answer holds a thread; waitress itself would wait for it for ever."""
        longest_s = self._app.settings.server.idle_connection_s
        for channel in self._channels():
            if channel.total_outbufs_len and time.time() - channel.last_activity > longest_s:
                logger.info("a client that read nothing of its answer for %d s is cut off", longest_s)
                channel.handle_close()

    def _drain(self, heartbeat: Callable[[], bool]) -> None:
        """Watch → listener → drain → pool → threads, in this order and in bounded time."""
        grace_s = self._app.settings.server.graceful_timeout_s
        self._app.begin_to_stop()
        for listener in self._listeners:
            listener.is_stopping = True
        self._close_listeners()
        self._serve_what_is_left(grace_s, heartbeat)
        given_up = self._give_up(heartbeat)
        cut = len(self._channels())
        self._listeners[0].task_dispatcher.shutdown(timeout=1)
        for dispatcher in list(self._map.values()):
            dispatcher.close()
        log = logger.warning if given_up or cut else logger.info
        log("stopped: %d requests got 503 shutting_down, %d connections were cut", given_up, cut)

    def _give_up(self, heartbeat: Callable[[], bool]) -> int:
        """Stop the app, which may wait for a hung batch, while the 503s it has made already leave."""
        counts: list[int] = []
        stopping = threading.Thread(target=lambda: counts.append(self._app.stop()), name="stop-app")
        stopping.start()
        while stopping.is_alive():
            self._serve_what_is_left(0.0, heartbeat)
        self._serve_what_is_left(2.0, heartbeat)
        return sum(counts)

    def _close_listeners(self) -> None:
        """What the system has accepted already is served; later connections are refused, not parked."""
        for listener in self._listeners:
            accepted = -1
            while accepted != len(self._map):
                accepted = len(self._map)
                listener.handle_accept()
            listener.accepting = False
            listener.del_channel()
            listener.socket.close()

    def _serve_what_is_left(self, longest_s: float, heartbeat: Callable[[], bool]) -> None:
        """Go on until every connection is closed. One is closed when nothing has arrived on it and nothing is owed."""
        deadline = time.monotonic() + longest_s
        while True:
            heartbeat()
            self._turn(0.05)
            for channel in self._channels():
                if channel.is_idle:
                    channel.will_close = True
            self._poll(0.0, self._map)
            if not self._channels() or time.monotonic() >= deadline:
                return

    def _channels(self) -> list[_Channel]:
        return [d for d in list(self._map.values()) if isinstance(d, _Channel)]
