"""kill -9 at any moment: pool.yml is whole, says what was or what was asked, and the next start works."""

from __future__ import annotations

import random
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import requests

from embedpool.config import edit, pool_yml
from embedpool.config.spec import PoolSpec
from embedpool.errors import EmbedpoolError
from tests.chaos.conftest import Figures, foreground, kill
from tests.live.conftest import COMMAND, WAIT_S, Server, fake

NAMES = ("a", "b", "c")
ALIASES = ("x", "y", "")
LASTING = {"config.yml", "pool.yml", "pool.yml.lock", "state", "state/pool.pid", "logs", "logs/embedpool.log", "cache"}
MOST_LEFTOVERS = 1


@dataclass
class Command:
    """One change of the pool, in its three forms: a function, an HTTP request and the words of the command line."""

    change: Callable[[PoolSpec], PoolSpec]
    http: tuple[str, str, dict[str, Any] | None]
    words: list[str]

    def applied_to(self, pool: PoolSpec) -> PoolSpec | None:
        """None if the change is refused."""
        try:
            return self.change(pool)
        except EmbedpoolError:
            return None


def registration(name: str, dim: int, alias: str = "") -> Command:
    flat = {"model": name, "driver_type": "fake", "driver_config": {"dim": dim}, **({"alias": alias} if alias else {})}
    words = ["register", "--model", name, "--type", "fake", "--set", f"dim={dim}"]
    return Command(
        lambda pool: edit.register(pool, edit.parse_registration({**flat, "enabled": True})),
        ("POST", "/models/register", flat),
        [*words, "--alias", alias] if alias else words,
    )


def unregistration(name: str) -> Command:
    return Command(
        lambda pool: edit.unregister(pool, name),
        ("DELETE", f"/models/{name}", None),
        ["unregister", "--model", name],
    )


def aliasing(name: str, alias: str) -> Command:
    return Command(
        lambda pool: edit.set_alias(pool, name, alias),
        ("POST", "/models/alias", {"model": name, "alias": alias}),
        ["set-alias", "--model", name, "--alias", alias],
    )


def switching(name: str, enabled: bool) -> Command:
    return Command(
        lambda pool: edit.set_enabled(pool, name, enabled),
        ("POST", "/models/enable", {"model": name, "enabled": enabled}),
        ["enable" if enabled else "disable", "--model", name],
    )


def any_command(rng: random.Random, names: tuple[str, ...] = NAMES, aliases: tuple[str, ...] = ALIASES) -> Command:
    name = rng.choice(names)
    return rng.choice(
        [
            lambda: registration(name, rng.choice((8, 16)), rng.choice(aliases)),
            lambda: unregistration(name),
            lambda: aliasing(name, rng.choice(aliases)),
            lambda: switching(name, rng.random() < 0.5),
        ]
    )()


def some_change(rng: random.Random, pool: PoolSpec) -> Command:
    """One that this pool does not refuse and that makes a difference to it."""
    while True:
        command = any_command(rng)
        if command.applied_to(pool) not in (None, pool):
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
                after = command.applied_to(before)
                if not edit_by(server, command):
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


def send(server: Server, command: Command) -> bool:
    """Whether the change was acknowledged; it was asked for because it is possible."""
    method, path, body = command.http
    try:
        answer = requests.request(method, server.url + path, json=body, timeout=WAIT_S)
    except requests.RequestException:
        return False
    assert answer.status_code == 200, answer.text
    return True


def run(server: Server, command: Command) -> bool:
    """The same by the command line, which edits the file itself when it finds no server."""
    done = subprocess.run(
        [str(COMMAND), *command.words],
        cwd=server.folder,
        env=server.environment,
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        check=False,
    )
    assert done.returncode in (0, 1), done.stderr
    assert done.returncode == 0 or "no answer from" in done.stderr
    return done.returncode == 0


def test_a_killed_command_leaves_pool_yml_as_before_or_after_its_edit(
    server: Server, rng: random.Random, length: Callable[..., int], figures: Figures
) -> None:
    """Without a server the command edits the file itself; killed, it blocks no later one."""
    rounds = length(short=3, long=100)
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
            time.sleep(rng.uniform(0.1, 0.6))
            child.kill()
        killed += child.returncode != 0
        after = command.applied_to(before)
        found = pool_yml.parse(server.pool_yml.read_text())
        assert found in ((before, after) if child.returncode else (after,))
        before = found
        assert len(leftovers(server)) <= MOST_LEFTOVERS
    figures("commands", rounds)
    figures("killed before their end", killed)
