"""What a connection sends, it sends once."""

from __future__ import annotations

import threading

from waitress.buffers import OverflowableBuffer

from embedpool.loop import _Channel


def test_two_threads_cannot_send_the_same_bytes() -> None:
    """The I/O thread sends what is left; a request's thread that has just ended may be sending, too."""
    channel = _Channel.__new__(_Channel)
    channel.outbuf_lock = threading.Condition()
    channel.outbufs = [OverflowableBuffer(1000)]
    channel.requests, channel.total_outbufs_len, channel.sendbuf_len = [], 0, 1000
    channel.will_close = channel.close_when_flushed = False
    channel.outbufs[0].append(b"HTTP/1.1 100 Continue\r\n\r\n")
    channel.total_outbufs_len = len(channel.outbufs[0])
    others_may_send: list[bool] = []

    def send(data: bytes, do_close: bool = True) -> int:
        other = threading.Thread(target=lambda: others_may_send.append(channel.outbuf_lock.acquire(blocking=False)))
        other.start()
        other.join()
        return len(data)

    channel.send = send
    channel.handle_write()
    assert others_may_send == [False]
    assert channel.total_outbufs_len == 0
