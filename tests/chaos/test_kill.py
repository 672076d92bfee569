"""kill -9 at any moment: pool.yml is whole, says what was or what was asked, and the next start works."""

from __future__ import annotations

import random
import subprocess
import threading
import time
from collections.abc import Callable

from embedpool.config import pool_yml
from embedpool.config.spec import PoolSpec
from tests.chaos.commands import DONE, UNANSWERED, Command, any_command, registration, run, send
from tests.chaos.conftest import Figures, foreground, kill
from tests.live.conftest import COMMAND, Server, fake

LASTING = {"config.yml", "pool.yml", "pool.yml.lock", "state", "logs", "logs/embedpool.log", "cache"}
LASTING |= {
    f"state/{name}" for name in ("pool.pid", "pool.pid.lock", "last-pool.yml", "last-pool.yml.lock", "runner.lock")
}
MOST_LEFTOVERS = 1


def some_change(rng: random.Random, pool: PoolSpec) -> Command:
    """One that this pool does not refuse and that makes a difference to it."""
    while True:
        command = any_command(rng, ["a", "b", "c"], ["x", "y"])
        if command.applied_to(pool)[0] != pool:
            return command


def leftovers(server: Server) -> set[str]:
    """Files that no running server of this folder needs."""
    root = server.pool_yml.parent
    return {str(file.relative_to(root)) for file in root.rglob("*")} - LASTING


def test_a_killed_server_leaves_pool_yml_as_before_or_after_the_edit(
    server: Server, kind: str, rng: random.Random, length: Callable[..., int], figures: Figures
) -> None:
    """At a random moment of a stream of edits, over HTTP or, in one round of five, by the command line.

    The next start serves what the file lists, and no waste piles up.
    """
    rounds = length(short=2, long=250)
    server.write_pool(fake("steady"))
    before = pool_yml.parse(server.pool_yml.read_text())
    done = 0
    outcomes = {"before": 0, "after": 0}
    for number in range(rounds):
        edit_by, longest_s = (run, 0.8) if number % 5 == 1 else (send, 0.3)
        with foreground(server, kind) as child:
            server.wait_ready()
            assert server.embed("steady", ["x"]).status_code == 200
            listed = {m["model"]: m["state"] for m in server.get("/status").json()["models"]}
            assert listed == {m.model: "ready" if m.enabled else "disabled" for m in before.models}
            after = before
            killing = threading.Timer(rng.uniform(0, longest_s), kill, (child,))
            killing.start()
            while killing.is_alive():
                command = some_change(rng, before)
                after, _ = command.applied_to(before)
                said = edit_by(server, command)
                assert said in (DONE, UNANSWERED)
                if said == UNANSWERED:
                    break
                before, done = after, done + 1
            killing.join()
        found = pool_yml.parse(server.pool_yml.read_text())
        assert found in (before, after)
        outcomes["after" if found == after else "before"] += 1
        before = found
        assert len(leftovers(server)) <= MOST_LEFTOVERS
    with foreground(server, kind):
        server.wait_ready()
        assert server.embed("steady", ["x"]).status_code == 200
    figures("kills", rounds)
    figures("edits done", done)
    figures("found as before the edit", outcomes["before"])
    figures("as after it", outcomes["after"])


def test_a_killed_command_leaves_pool_yml_as_before_or_after_its_edit(
    server: Server, rng: random.Random, length: Callable[..., int], figures: Figures
) -> None:
    """Without a server the command edits the file itself; killed, it blocks no later one."""
    rounds = length(short=3, long=100)
    began = time.monotonic()
    assert run(server, registration("a", 8)) == DONE
    usual_s = time.monotonic() - began
    before = pool_yml.parse(server.pool_yml.read_text())
    killed = 0
    for _ in range(rounds):
        command = some_change(rng, before)
        with subprocess.Popen(
            [str(COMMAND), *command.words],
            cwd=server.folder,
            env=server.environment,
            stdout=subprocess.DEVNULL,
        ) as child:
            time.sleep(rng.uniform(0, 1.2 * usual_s))
            child.kill()
        killed += child.returncode != 0
        after, _ = command.applied_to(before)
        found = pool_yml.parse(server.pool_yml.read_text())
        assert found in ((before, after) if child.returncode else (after,))
        before = found
        assert len(leftovers(server)) <= MOST_LEFTOVERS
    figures("commands", rounds)
    figures("killed before their end", killed)
