"""waitress is what serve/connections.py takes it for. An upgrade that breaks the server fails here, with the name."""

from __future__ import annotations

import inspect
import io
import socket
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from waitress import wasyncore
from waitress.buffers import OverflowableBuffer
from waitress.channel import HTTPChannel
from waitress.parser import HTTPRequestParser
from waitress.server import BaseWSGIServer, create_server
from waitress.task import ErrorTask, WSGITask
from waitress.utilities import Error

HEAD = b"POST /path HTTP/1.1\r\nContent-Type: x\r\nContent-Length: 5\r\n\r\n"


class Waitress(SimpleNamespace):
    """One of each of waitress's parts, as they are made while it serves."""

    def __init__(self) -> None:
        opened: dict[int, Any] = {}
        create_server(
            lambda environ, start_response: [],
            map=opened,
            sockets=[socket.create_server(("127.0.0.1", 0))],
            threads=1,
            connection_limit=100,
            max_request_body_size=1000,
            outbuf_overflow=1000,
            channel_request_lookahead=1,
            clear_untrusted_proxy_headers=False,
            backlog=10,
            ident="x",
        )
        (server,) = [each for each in opened.values() if isinstance(each, BaseWSGIServer)]
        ours, theirs = socket.socketpair()
        channel = HTTPChannel(server, ours, ("client", 0), server.adj, map=opened)
        request = HTTPRequestParser(server.adj)
        request.received(HEAD)
        super().__init__(
            opened=opened,
            server=server,
            adj=server.adj,
            dispatcher=server.task_dispatcher,
            channel=channel,
            request=request,
            body=request.body_rcv,
            task=WSGITask(channel, request),
            error_task=ErrorTask(channel, request),
            buffer=OverflowableBuffer(1000),
            error=Error("why"),
            theirs=theirs,
        )


@pytest.fixture
def waitress() -> Iterator[Waitress]:
    made = Waitress()
    yield made
    made.dispatcher.shutdown(timeout=20)
    made.request.close()
    for each in list(made.opened.values()):
        each.close()
    made.theirs.close()


ATTRIBUTES: dict[str, dict[str, Any]] = {
    "server": {
        "_fileno": int,
        "accepting": True,
        "active_channels": dict,
        "adj": object,
        "application": object,
        "channel_class": HTTPChannel,
        "effective_port": str,
        "next_channel_cleanup": 0,
        "server_name": str,
        "socket": socket.socket,
        "task_dispatcher": object,
    },
    "adj": {"max_request_body_size": 1000, "recv_bytes": int},
    "dispatcher": {"lock": object, "queue_cv": threading.Condition},
    "channel": {
        "_fileno": int,
        "_map": dict,
        "accepting": False,
        "addr": tuple,
        "close_when_flushed": False,
        "connected": True,
        "current_outbuf_count": 0,
        "error_task_class": ErrorTask,
        "last_activity": float,
        "outbufs": list,
        "parser_class": HTTPRequestParser,
        "request": None,
        "requests": [],
        "server": BaseWSGIServer,
        "socket": socket.socket,
        "task_class": WSGITask,
        "total_outbufs_len": 0,
        "will_close": False,
    },
    "request": {
        "adj": object,
        "body_bytes_received": 0,
        "chunked": False,
        "command": "POST",
        "completed": False,
        "connection_close": False,
        "content_length": 5,
        "error": None,
        "expect_continue": False,
        "headers": {"CONTENT_TYPE": "x", "CONTENT_LENGTH": "5"},
        "path": "/path",
        "version": "1.1",
    },
    "body": {"buf": OverflowableBuffer},
    "task": {
        "channel": HTTPChannel,
        "close_on_finish": False,
        "complete": False,
        "content_bytes_written": 0,
        "content_length": None,
        "has_body": True,
        "request": HTTPRequestParser,
        "response_headers": [],
        "status": "200 OK",
        "wrote_header": False,
    },
    "error_task": {"complete": True, "request": HTTPRequestParser},
    "buffer": {"buf": None, "overflow": 1000},
    "error": {"body": "why", "code": int, "reason": str},
}
METHODS: dict[str, dict[str, list[str]]] = {
    "server": {
        "add_task": ["task"],
        "close": [],
        "del_channel": ["map"],
        "handle_accept": [],
        "pull_trigger": [],
        "readable": [],
        "writable": [],
    },
    "dispatcher": {"add_task": ["task"], "set_thread_count": ["count"], "shutdown": ["cancel_pending", "timeout"]},
    "channel": {
        "_flush_some": ["do_close"],
        "check_client_disconnected": [],
        "close": [],
        "handle_close": [],
        "handle_read": [],
        "handle_write": [],
        "readable": [],
        "received": ["data"],
        "writable": [],
        "write_soon": ["data"],
    },
    "request": {"close": [], "parse_header": ["header_plus"], "received": ["data"]},
    "task": {
        "build_response_header": [],
        "execute": [],
        "get_environment": [],
        "set_close_on_finish": [],
        "write": ["data"],
    },
    "error_task": {"execute": [], "set_close_on_finish": [], "write": ["data"]},
    "buffer": {"_set_large_buffer": [], "close": [], "getfile": []},
}


@pytest.mark.parametrize(("part", "name"), [(part, name) for part, names in ATTRIBUTES.items() for name in names])
def test_an_attribute_that_is_used_is_what_it_was(waitress: Waitress, part: str, name: str) -> None:
    """Of the type, or with the value, that connections.py reads or replaces."""
    expected, found = ATTRIBUTES[part][name], getattr(getattr(waitress, part), name)
    if isinstance(expected, type) and not isinstance(found, type):
        assert isinstance(found, expected)
    else:
        assert found == expected


@pytest.mark.parametrize(("part", "name"), [(part, name) for part, names in METHODS.items() for name in names])
def test_a_method_that_is_called_or_replaced_takes_what_it_took(waitress: Waitress, part: str, name: str) -> None:
    """By the names of its arguments."""
    assert list(inspect.signature(getattr(getattr(waitress, part), name)).parameters) == METHODS[part][name]


def test_a_channel_sends_through_the_method_that_is_replaced(waitress: Waitress) -> None:
    """On both threads, and `outbuf_lock` may be held already: it belongs to a thread, not to a call."""
    flushed: list[threading.Thread] = []
    channel, flush = waitress.channel, waitress.channel._flush_some

    def counting(do_close: bool = True) -> bool:
        with channel.outbuf_lock, channel.outbuf_lock:
            flushed.append(threading.current_thread())
            return bool(flush(do_close))

    channel._flush_some = counting
    channel.write_soon(b"answer")
    assert (waitress.theirs.recv(100), channel.total_outbufs_len) == (b"answer", 0)
    channel.outbufs[-1].append(b"more")
    channel.total_outbufs_len = 4
    channel.handle_write()
    assert (waitress.theirs.recv(100), channel.total_outbufs_len) == (b"more", 0)
    assert len(flushed) == 2


def test_a_channel_that_is_to_close_does_when_all_is_sent(waitress: Waitress) -> None:
    """handle_write is where, so a lingering close can begin there; its entry in the map goes with it."""
    channel, fd = waitress.channel, waitress.channel._fileno
    channel.close_when_flushed = True
    assert channel.writable()
    channel.handle_write()
    assert not channel.connected
    assert channel._fileno is None
    assert fd not in waitress.opened


def test_a_request_joins_its_channel_and_asks_for_a_thread(waitress: Waitress) -> None:
    """A part of one stands in `request`; whole, it is in `requests`, where its task finds it."""
    channel = waitress.channel
    asked: list[HTTPChannel] = []
    channel.server = SimpleNamespace(add_task=asked.append, active_channels={}, pull_trigger=lambda: None)
    assert channel.received(HEAD)
    assert isinstance(channel.request, HTTPRequestParser)
    assert (channel.requests, asked) == ([], [])
    channel.received(b"12345")
    assert (channel.request, len(channel.requests), asked) == (None, 1, [channel])
    channel.requests.pop().close()


@pytest.mark.parametrize(("event", "handle"), [("read", wasyncore.read), ("write", wasyncore.write)])
def test_an_event_reaches_its_handler_and_an_error_its_own(event: str, handle: Callable[[Any], None]) -> None:
    """The loop lives on whatever a handler raises."""
    told: list[str] = []

    def failing() -> None:
        told.append("handled")
        raise ValueError

    handle(SimpleNamespace(**{f"handle_{event}_event": failing, "handle_error": lambda: told.append("error")}))
    assert told == ["handled", "error"]


def test_the_server_counts_its_map_against_the_connection_limit(waitress: Waitress) -> None:
    """So what it needs itself counts, too; and it closes idle connections when it is asked, unless that is put off."""
    waitress.server.next_channel_cleanup = float("inf")
    waitress.channel.last_activity = 0
    assert waitress.server.readable()
    assert not waitress.channel.will_close
    waitress.adj.connection_limit = len(waitress.opened)
    assert not waitress.server.readable()


def test_a_buffer_goes_to_a_file_above_its_overflow_and_only_then(
    waitress: Waitress, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the method that is replaced; what it holds stays in `buf` when that fails."""
    buffer, moved = waitress.buffer, []
    monkeypatch.setattr(buffer, "_set_large_buffer", lambda: moved.append(buffer.buf.getfile()))
    buffer.append(bytes(900))
    assert (buffer.buf, moved) == (None, [])
    buffer.append(bytes(99_100))
    assert isinstance(moved[-1], io.BytesIO)
    assert len(buffer) == 100_000
    buffer.close()


def test_a_body_is_written_to_the_buffer_that_the_head_left(waitress: Waitress) -> None:
    """Whichever that is by then."""
    waitress.body.buf.close()
    waitress.body.buf = OverflowableBuffer(1000)
    assert waitress.request.received(b"12345") == 5
    assert waitress.request.completed
    assert waitress.request.get_body_stream().read() == b"12345"


def test_a_header_that_is_built_closes_the_connection_if_it_is_told_to(waitress: Waitress) -> None:
    """Before the header is written."""
    waitress.task.content_length = 0
    waitress.task.set_close_on_finish()
    assert b"\r\nConnection: close\r\n" in waitress.task.build_response_header()
    assert waitress.task.close_on_finish
