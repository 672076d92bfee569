"""`pool stop`, as another process sees the server."""

from __future__ import annotations

import subprocess

import psutil

from embedpool.serve.process import Running, stop


def test_a_server_that_nobody_reaps_has_ended() -> None:
    """In a container without an init it stays in the table of processes; that is no reason to wait, or to kill it."""
    script = "sleep 300 & echo $!; exec sleep 300"  # the second one is the parent, and never asks for the first
    with subprocess.Popen(["sh", "-c", script], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        process = psutil.Process(int(parent.stdout.readline()))
        try:
            assert stop(Running(process.pid, "", process), 20)
            assert process.status() == psutil.STATUS_ZOMBIE
        finally:
            parent.kill()
