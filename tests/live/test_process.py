"""Starting, stopping, and what is left when things go wrong."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import requests

from tests.live.conftest import COMMAND, MINILM, WAIT_S, Server, fake, wait_until

ROOT = Path(__file__).parents[2]


def test_help_costs_under_a_third_of_a_second_of_cpu() -> None:
    """The command line answers at once: it loads neither torch nor flask."""
    before = os.times()
    subprocess.run([str(COMMAND), "--help"], check=True, capture_output=True)
    after = os.times()
    spent = after.children_user + after.children_system - before.children_user - before.children_system
    assert spent < 0.3


def test_health_answers_before_models_have_loaded(server: Server, kind: str) -> None:
    """/ready turns 200 when they have."""
    server.write_pool(fake("m", load_delay_ms=1500))
    server.start(kind)
    assert server.get("/health").json() == {"ok": True, "booted": False, "models": 1}
    assert server.get("/ready").status_code == 503
    assert server.get("/ready/m").status_code == 503
    server.wait_ready()
    assert server.get("/health").json()["booted"]
    assert server.get("/ready/m").status_code == 200


def test_a_stop_loses_no_accepted_request(server: Server, kind: str) -> None:
    """Every request sent before SIGTERM is answered; a later connection is refused, not parked."""
    server.write_pool(fake("m", delay_ms=100))
    server.start(kind)
    server.wait_ready()
    url, pid, process = server.url, server.pid, server.process
    sent = threading.Barrier(25)

    def client(number: int) -> int:
        with requests.Session() as session:
            session.get(f"{url}/health", timeout=WAIT_S)  # connected before the stop
            sent.wait()
            answer = session.post(f"{url}/embed", json={"model": "m", "texts": [str(number)] * 10}, timeout=WAIT_S)
            return answer.status_code

    with ThreadPoolExecutor(24) as clients:
        answers = [clients.submit(client, i) for i in range(24)]
        sent.wait()
        wait_until(lambda: server.status("m")["queue_len"] + server.status("m")["replicas_busy"] > 0)
        os.kill(pid, signal.SIGTERM)
        assert [a.result() for a in answers] == [200] * 24
    assert process.wait(WAIT_S) in (0, None)
    with pytest.raises(requests.ConnectionError):
        requests.get(f"{url}/health", timeout=WAIT_S)
    assert not server.pid_file.exists()
    assert "0 requests got 503" in server.log.read_text()


def test_balancers_are_given_time_to_turn_away(server: Server, kind: str) -> None:
    """Until the delay is over a server that stops answers who asks it, also on a new connection, and is not ready."""
    server.write_pool(fake("m"))
    server.start(kind, EMBEDPOOL_SERVER__DRAIN_DELAY_S="4")
    server.wait_ready()
    process = server.process
    if kind == "gunicorn":  # a reload delays nothing, and tells no balancer to turn away
        workers = process.children()
        os.kill(server.pid, signal.SIGHUP)
        while any(worker.is_running() for worker in workers):
            assert server.get("/ready").status_code == 200
    url = server.url
    os.kill(server.pid, signal.SIGTERM)
    wait_until(lambda: requests.get(f"{url}/ready", timeout=WAIT_S).status_code == 503)
    answer = requests.post(f"{url}/embed", json={"model": "m", "texts": ["a"]}, timeout=WAIT_S)
    assert answer.status_code == 200
    assert process.wait(WAIT_S) in (0, None)


def test_ctrl_c_drains_too(server: Server, kind: str) -> None:
    """In a terminal Ctrl-C reaches every process of the group; requests are finished all the same."""
    server.write_pool(fake("m", delay_ms=500))
    server.start(kind)
    server.wait_ready()
    process = server.process
    with ThreadPoolExecutor(1) as client:
        answer = client.submit(server.embed, "m", ["x"])
        wait_until(lambda: server.status("m")["replicas_busy"])
        os.killpg(server.pid, signal.SIGINT)
        assert answer.result().status_code == 200
    process.wait(WAIT_S)


def test_the_foreground_serves_until_interrupted(server: Server, kind: str) -> None:
    """`pool start` without --detach."""
    arguments = [str(COMMAND), "pool", "start", "--server", kind, "--port", "0"]
    with subprocess.Popen(arguments, cwd=server.folder, env=server.environment, stderr=subprocess.PIPE) as process:
        wait_until(server.pid_file.exists)
        assert server.pid == process.pid
        assert server.get("/health").status_code == 200
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=WAIT_S)
    assert not server.pid_file.exists()


def test_a_second_start_says_what_runs(server: Server) -> None:
    """And starts nothing."""
    server.start()
    assert f"already running: pid {server.pid}" in server.cli("pool", "start", "--detach")


def test_a_failed_detached_start_shows_the_end_of_the_log(server: Server) -> None:
    """The port is taken: exit code 1 and the reason, not a traceback."""
    server.start()
    port = server.url.rsplit(":", 1)[1]
    (server.folder / "b").mkdir()
    other = Server(server.folder / "b", {})
    other.cli("init")
    said = other.cli("pool", "start", "--detach", "--port", port, code=1)
    assert "Address already in use" in said
    assert "Traceback" not in said


def test_a_stale_pid_file_is_recognised(server: Server) -> None:
    """A server that was killed leaves its file behind; the next start and stop are not misled by it."""
    server.start()
    family = [server.process, *server.process.children(recursive=True)]
    for process in family:
        process.kill()
    psutil.wait_procs(family, timeout=WAIT_S)
    assert "not running" in server.cli("pool", "stop", code=3)
    server.start()
    assert server.get("/health").status_code == 200


def test_a_pid_of_another_program_is_never_signalled(server: Server) -> None:
    """Pids are used again; the start time tells."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        server.pid_file.write_text(f"{other.pid}\nhttp://127.0.0.1:1\n12345.00\n")
        server.cli("pool", "stop", code=3)
        assert other.poll() is None
        other.communicate(b"\n", timeout=WAIT_S)


def test_gunicorn_with_its_own_config_file(server: Server) -> None:
    """The production way, `gunicorn -c conf/gunicorn.conf.py`; SIGHUP with a bad config.yml is survived."""
    server.write_pool(fake("m"))
    environment = {**server.environment, "EMBEDPOOL_SERVER__PORT": "0"}
    command = [str(COMMAND.with_name("gunicorn")), "-c", str(ROOT / "conf" / "gunicorn.conf.py")]
    with subprocess.Popen(
        [*command, "embedpool.server:wsgi()"], cwd=server.folder, env=environment, stderr=subprocess.DEVNULL
    ) as master:
        wait_until(server.pid_file.exists)
        server.wait_ready()
        assert server.pid == master.pid
        worker = server.get("/status").json()["pid"]
        assert worker != master.pid
        config = server.folder / ".config" / "config.yml"
        text = config.read_text()
        config.write_text(text + "\nnonsense: 1\n")
        master.send_signal(signal.SIGHUP)
        config.write_text(text)
        wait_until(lambda: not psutil.pid_exists(worker), 30)
        wait_until(lambda: _answers(server))
        master.terminate()
        master.wait(WAIT_S)


def _answers(server: Server) -> bool:
    try:
        return server.embed("m", ["x"]).status_code == 200
    except requests.ConnectionError:
        return False


def test_a_failed_registration_changes_nothing(server: Server) -> None:
    """Exit code 1, the reason, and pool.yml as it was; a second spec under a name needs --replace."""
    server.start()
    before = server.pool_yml.read_bytes()
    said = server.cli("register", "--model", "m", "--type", "fake", "--set", "fault=load", code=1)
    assert "fault: load" in said
    assert server.pool_yml.read_bytes() == before
    said = server.cli("register", "--model", "no/such-model", "--type", "local_st", code=1)
    assert "no/such-model" in said
    assert server.pool_yml.read_bytes() == before
    server.cli("register", "--model", "m", "--type", "fake")
    server.cli("register", "--model", "m", "--type", "fake")
    server.cli("register", "--model", "m", "--type", "fake", "--set", "dim=8", code=1)
    server.cli("register", "--model", "m", "--type", "fake", "--set", "dim=8", "--replace")
    assert server.embed("m", ["x"]).json()["dim"] == 8


def test_the_command_works_without_a_server(server: Server) -> None:
    """Management then edits pool.yml by the same rules and says so."""
    said = server.cli("register", "--model", "m", "--type", "fake", "--alias", "a", "--disabled")
    assert "the server is not running" in said
    server.cli("register", "--model", "n", "--type", "fake", "--alias", "a", code=1)
    server.cli("set-alias", "--model", "m", "--alias", "b")
    server.cli("enable", "--model", "b")
    server.cli("enable", "--model", "a", code=4)
    assert "b" in server.cli("pool", "status", code=3)
    assert "not running" in server.cli("pool", "health", code=3)
    server.start()
    server.wait_ready()
    assert server.embed("b", ["x"]).status_code == 200
    assert server.cli("pool", "health").startswith("ok")


def test_wrong_usage_is_told_in_a_sentence(server: Server) -> None:
    """Exit code 2, for docopt's own errors too."""
    assert "needs --base-url" in server.cli("register", "--model", "m", "--type", "http", code=2)
    assert "must be one of" in server.cli("register", "--model", "m", "--type", "torch", code=2)
    assert "not for fake" in server.cli("register", "--model", "m", "--type", "fake", "--protocol", "tei", code=2)
    assert "did you mean register" in server.cli("rgister", code=2)
    assert "needs --type" in server.cli("register", "--model", "m", code=2)
    assert "did you mean --json" in server.cli("pool", "status", "--jsn", code=2)
    assert "must be a number" in server.cli("register", "--model", "m", "--type", "fake", "--min", "x", code=2)
    assert "gunicorn or waitress" in server.cli("pool", "start", "--server", "tornado", code=2)


def test_an_unloaded_model_gives_its_memory_back(make_server: Callable[..., Server]) -> None:
    """scaling.min 0 and idle: less than half of what the model took is still held."""
    server = make_server()
    server.write_pool(fake("m"))
    server.start("waitress")
    server.wait_ready()
    config = {"backend": "torch"}
    entry = {
        "model": MINILM, "driver": {"type": "local_st", "config": config}, "scaling": {"min": 0, "idle_ttl_s": 0.5},
    }  # fmt: skip

    def rss() -> int:
        return int(server.process.memory_info().rss)

    def load() -> int:
        server.vectors(MINILM, ["some text " * 50] * 32)
        return rss()

    def unloaded() -> bool:
        return bool(server.status(MINILM)["state"] == "idle")

    server.write_pool(fake("m"), entry)
    wait_until(lambda: server.get(f"/ready/{MINILM}").status_code == 200)
    load()
    wait_until(unloaded)
    empty = rss()  # libraries stay once imported
    loaded = load()
    wait_until(unloaded)
    wait_until(lambda: rss() - empty < (loaded - empty) / 2)


def test_the_second_start_loads_no_torch(make_server: Callable[..., Server]) -> None:
    """Once its graph is in the cache, a model is served by OpenVINO and the tokenizer alone."""
    for name in ("first", "second"):  # the first exports, unless another test has
        server = make_server(name)
        server.write_pool({"model": MINILM, "driver": {"type": "local_st", "config": {"backend": "openvino"}}})
        server.start("waitress")
        server.wait_ready()
        assert len(server.vectors(MINILM, ["a text"])[0]) == 384
        libraries = {Path(mapped.path).name for mapped in server.process.memory_maps()}
        server.stop()
    assert any("openvino" in name for name in libraries)
    assert not any("torch" in name for name in libraries)


def test_the_service_manager_is_told(make_server: Callable[..., Server], kind: str, tmp_path: Path) -> None:
    """That it is ready, every second that its loop lives, and in a line how the models are."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        address = tmp_path / "notify"
        manager.bind(str(address))
        manager.settimeout(WAIT_S)
        server = make_server(NOTIFY_SOCKET=str(address))
        server.write_pool(fake("m"), fake("broken", fault="load"))
        server.start(kind)
        said: list[str] = []
        while not said or said[-1] != "WATCHDOG=1\nSTATUS=1 of 2 models serve; failed: broken":
            said.append(manager.recv(1000).decode())
        assert any(line.startswith("READY=1") for line in said)
        beats = [manager.recv(1000) for _ in range(2)]
        assert all(beat.startswith(b"WATCHDOG=1") for beat in beats)
        server.stop()
