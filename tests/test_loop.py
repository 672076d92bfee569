"""The loop: nobody is waited for without end."""

from __future__ import annotations

import time
from types import SimpleNamespace

from embedpool.config.settings import Server, Settings
from embedpool.connections import Channel
from embedpool.loop import Loop


def test_a_client_that_reads_nothing_is_cut_off() -> None:
    """Its answer holds a thread; one that reads slowly, or waits for an answer, is left alone."""

    class Silent(Channel):
        closed = False

        def __init__(self, unsent: int, silent_s: float) -> None:
            self.total_outbufs_len, self.last_activity = unsent, time.time() - silent_s

        def handle_close(self) -> None:
            self.closed = True

    loop = Loop.__new__(Loop)
    loop._app = SimpleNamespace(settings=Settings(server=Server(idle_connection_s=100)))
    channels = [Silent(5, 200), Silent(5, 50), Silent(0, 200)]
    loop._open = dict(enumerate(channels))
    loop._close_stalled()
    assert [channel.closed for channel in channels] == [True, False, False]
