"""Many management commands at once: as if they had come one after the other."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from embedpool.config import pool_yml
from embedpool.config.spec import ModelSpec, PoolSpec
from tests.chaos.commands import DONE, NOT_FOUND, REFUSED, Command, any_command, run, send
from tests.chaos.conftest import Figures
from tests.live.conftest import Server, fake, wait_until

GROUPS, COMMANDS_A_GROUP = 5, 10


@dataclass
class Entry:
    """One line of the history: what was asked, between which moments, and what was said to it."""

    command: Command
    began: float
    ended: float
    said: str


def test_concurrent_commands_end_in_a_serial_order(
    server: Server, kind: str, rng: random.Random, length: Callable[..., int], figures: Figures
) -> None:
    """50 at once over HTTP and by the command line, on models that contend for aliases.

    What each was told and what pool.yml says in the end is what some order of them gives, in which a command that had
    ended comes before one that began later. The live pool is that of the file.
    """
    rounds, by_command_line = length(short=1, long=20), length(short=0.1, long=0.4)
    server.write_pool(*(fake(f"{group}a", dim=8, alias=f"{group}x", load_delay_ms=20) for group in range(GROUPS)))
    server.start(kind)
    server.wait_ready()
    refused = total = 0
    for _ in range(rounds):
        before = pool_yml.parse(server.pool_yml.read_text())
        histories = at_once(server, rng, by_command_line)
        after = pool_yml.parse(server.pool_yml.read_text())
        for group, history in enumerate(histories):
            assert has_serial_order(history, of_group(before, group), of_group(after, group)), [
                (e.command.words, e.began, e.ended, e.said) for e in sorted(history, key=lambda e: e.began)
            ]
            refused += sum(entry.said != DONE for entry in history)
            total += len(history)
        wait_until(lambda after=after: live(server) == listed(after))
    server.stop()
    figures("rounds", rounds)
    figures("commands", total)
    figures("of them refused", refused)


def at_once(server: Server, rng: random.Random, by_command_line: float) -> list[list[Entry]]:
    """The history of each group of models; groups have nothing to do with each other."""
    histories: list[list[Entry]] = [[] for _ in range(GROUPS)]

    def one(group: int, command: Command, do: Callable[[Server, Command], str], wait_s: float) -> None:
        time.sleep(wait_s)
        began = time.monotonic()
        said = do(server, command)
        histories[group].append(Entry(command, began, time.monotonic(), said))

    threads = []
    for group in [*range(GROUPS)] * COMMANDS_A_GROUP:
        command = any_command(rng, [f"{group}a", f"{group}b"], [f"{group}x", f"{group}y"], load_delay_ms=20)
        do = run if rng.random() < by_command_line else send
        threads.append(threading.Thread(target=one, args=(group, command, do, rng.uniform(0, 0.5))))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return histories


def of_group(pool: PoolSpec, group: int) -> PoolSpec:
    return PoolSpec(tuple(m for m in pool.models if m.model.startswith(str(group))))


def has_serial_order(history: list[Entry], before: PoolSpec, after: PoolSpec) -> bool:
    """Whether the entries, in an order that their moments allow, lead from one pool to the other and were told so."""
    seen = set()

    def leads_on(pool: PoolSpec, left: frozenset[int]) -> bool:
        if not left:
            return pool == after
        if (state := (str(pool), left)) in seen:
            return False
        seen.add(state)
        first_end = min(history[i].ended for i in left)
        for i in left:
            entry = history[i]
            changed, code = entry.command.applied_to(pool)
            fits = entry.said == code or (entry.said == REFUSED and code not in (DONE, NOT_FOUND))
            if entry.began <= first_end and fits and leads_on(changed, left - {i}):
                return True
        return False

    return leads_on(before, frozenset(range(len(history))))


def listed(pool: PoolSpec) -> list[tuple[object, ...]]:
    return [entry_of(model) for model in pool.models]


def entry_of(model: ModelSpec) -> tuple[object, ...]:
    return model.model, model.alias, model.enabled, "ready" if model.enabled else "disabled", model.driver.config.dim


def live(server: Server) -> list[tuple[object, ...]]:
    """What /status and /models say, which must be the same."""
    status = [(m["model"], m["alias"], m["enabled"], m["state"]) for m in server.get("/status").json()["models"]]
    models = server.get("/models").json()["data"]
    specs = {m["spec"]["model"]: m["spec"] for m in models}
    names = {name for model, alias, *_ in status for name in (model, alias) if name}
    if names != {m["id"] for m in models}:
        return []
    return [(*entry, specs[entry[0]]["driver"]["config"]["dim"]) for entry in status]
