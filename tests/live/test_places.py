"""Models in processes of their own: what ends one of them ends nothing else."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import psutil

from tests.live.conftest import MINILM, Server, fake, wait_until


def child_of(server: Server, model: str) -> psutil.Process:
    return psutil.Process(server.status(model)["runs_on"]["pid"])


def test_a_killed_model_costs_no_request(server: Server, kind: str) -> None:
    """Whatever its batches were doing when it was killed: every request gets the right vectors from the next child."""
    server.write_pool(
        fake("m", isolation="process", dim=8, delay_ms=5, scaling={"min": 2, "max": 2}), fake("other", dim=8)
    )
    server.start(kind)
    server.wait_ready()
    expected = {text: server.vectors("m", [text])[0] for text in map(str, range(16))}
    victims = {child_of(server, "m").pid}

    def client(number: int) -> bool:
        texts = [str((number + i) % 16) for i in range(3)]
        return server.vectors("m", texts) == [expected[text] for text in texts] and bool(server.vectors("other", ["x"]))

    with ThreadPoolExecutor(8) as clients:
        answers = [clients.submit(client, number) for number in range(200)]
        for done in range(40, 200, 40):
            wait_until(lambda done=done: sum(a.done() for a in answers) >= done)
            victim = next(c for c in server.process.children(recursive=True) if "spawn_main" in " ".join(c.cmdline()))
            victims.add(victim.pid)
            victim.kill()
        assert all(a.result() for a in answers)
    assert server.status("other")["counters"]["errors"] == {}
    assert server.status("m")["counters"]["errors"] == {}
    wait_until(lambda: server.status("m")["state"] == "ready")
    server.stop()
    assert not any(psutil.pid_exists(pid) for pid in victims)


def test_no_child_outlives_its_model_or_its_server(make_server: Callable[..., Server], kind: str) -> None:
    """It goes when the model is removed, and when the server is killed, also in the middle of a batch that hangs."""
    server = make_server()
    hangs = fake("hangs", isolation="process", fault="hang", fault_text="bad")
    server.write_pool(fake("m", isolation="process"), hangs)
    server.start(kind)
    server.wait_ready()
    removed, left = child_of(server, "m"), child_of(server, "hangs")
    server.cli("unregister", "--model", "m")
    wait_until(lambda: not removed.is_running())
    with ThreadPoolExecutor(1) as client:
        hung = client.submit(server.embed, "hangs", ["bad"])
        wait_until(lambda: server.status("hangs")["replicas_busy"])
        family = [server.process, *server.process.children()]
        for process in family:
            if process.pid != left.pid:
                os.kill(process.pid, signal.SIGKILL)
        assert hung.exception() is not None
    wait_until(lambda: not left.is_running())


def test_a_real_model_in_a_process_of_its_own_gives_its_vectors(server: Server) -> None:
    """The same ones, and the server's own process never holds the model."""
    server.start()
    common = ("register", "--model", MINILM, "--type", "local_st", "--max-seq-length", "384")
    server.cli(*common, "--alias", "minilm")
    texts = ["a query", "a somewhat longer passage of text " * 20]
    in_thread = np.array(server.vectors("minilm", texts))
    server.cli("unregister", "--model", MINILM)
    server.cli(*common, "--alias", "minilm", "--place", "process")
    apart = np.array(server.vectors("minilm", texts))
    assert (np.sum(in_thread * apart, axis=1) > 0.99999).all()
    child = child_of(server, "minilm")
    assert child.pid != server.pid
    server.cli("unregister", "--model", MINILM)
    wait_until(lambda: not child.is_running())
    server.stop()
