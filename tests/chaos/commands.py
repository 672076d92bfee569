"""Changes of the pool in all their forms, so that what they did can be compared with what they mean."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import requests

from embedpool.config import edit
from embedpool.config.spec import PoolSpec
from embedpool.errors import EmbedpoolError, ModelNotFound
from tests.live.conftest import WAIT_S, Server

DONE, NOT_FOUND = "done", ModelNotFound.code
REFUSED = "refused"  # the command line's exit code tells no more
UNANSWERED = "unanswered"


@dataclass
class Command:
    """One change of the pool: as a function, as an HTTP request and as the words of a command line."""

    change: Callable[[PoolSpec], PoolSpec]
    http: tuple[str, str, dict[str, Any] | None]
    words: list[str]

    def applied_to(self, pool: PoolSpec) -> tuple[PoolSpec, str]:
        """The new pool and DONE, or the old one and the code of the error."""
        try:
            return self.change(pool), DONE
        except EmbedpoolError as error:
            return pool, error.code


def registration(name: str, dim: int, alias: str = "", load_delay_ms: int = 0) -> Command:
    config = {"dim": dim, "load_delay_ms": load_delay_ms}
    flat = {"model": name, "driver_type": "fake", "driver_config": config, **({"alias": alias} if alias else {})}
    words = ["register", "--model", name, "--type", "fake"]
    words += ["--set", f"dim={dim}", "--set", f"load_delay_ms={load_delay_ms}"]
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


def any_command(rng: random.Random, names: list[str], aliases: list[str], load_delay_ms: int = 0) -> Command:
    """On one of the models; aliases are given and taken away."""
    name, alias = rng.choice(names), rng.choice([*aliases, ""])
    return rng.choice(
        [
            lambda: registration(name, rng.choice((8, 16)), alias, load_delay_ms),
            lambda: unregistration(name),
            lambda: aliasing(name, alias),
            lambda: switching(name, rng.random() < 0.5),
        ]
    )()


def send(server: Server, command: Command) -> str:
    """Over HTTP: DONE, the code of the error, or UNANSWERED."""
    method, path, body = command.http
    try:
        answer = requests.request(method, server.url + path, json=body, timeout=WAIT_S)
    except requests.ConnectionError:
        return UNANSWERED
    return DONE if answer.status_code == 200 else str(answer.json()["error"]["code"])


def run(server: Server, command: Command) -> str:
    """By the command line, which edits the file itself if no server runs: DONE, NOT_FOUND, REFUSED or UNANSWERED."""
    ended = server.run(*command.words)
    assert ended.returncode in (0, 1, 4), ended.stderr
    if "no answer from" in ended.stderr:
        return UNANSWERED
    return {0: DONE, 1: REFUSED, 4: NOT_FOUND}[ended.returncode]
