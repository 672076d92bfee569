"""A Ray cluster of several nodes on this machine, in a program of its own: Ray leaves threads and open files behind.

It reads a command a line from its standard input, as JSON: ["add", name, arguments], ["remove", name] or
["end", what], which ends the head's "gcs" (what keeps the cluster's tables) or "raylet" at once; and answers each with
a line.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

ANSWER = "ANSWER "
STORE_BYTES = 80 << 20
QUICK = {  # it notices soon what has gone
    "RAY_health_check_initial_delay_ms": "500", "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "500", "RAY_health_check_failure_threshold": "2",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "5", "RAY_USAGE_STATS_ENABLED": "0",
}  # fmt: skip


class Nodes:
    """The hand on such a program."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.address = self._answer()

    def add(self, name: str, **arguments: Any) -> None:
        """A node with so many `num_cpus` and such `resources`."""
        self._command("add", name, arguments)

    def remove(self, name: str) -> None:
        """As if its machine had gone."""
        self._command("remove", name)

    def end(self, what: str) -> None:
        """Kill the head's `gcs` or its `raylet`."""
        self._command("end", what)

    def _command(self, *words: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(words) + "\n")
        self._process.stdin.flush()
        self._answer()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(ANSWER):
                return line.removeprefix(ANSWER).strip()
        raise AssertionError("the cluster's program has ended")


@contextlib.contextmanager
def running(head_cpus: int = 0, port: str = "0") -> Iterator[Nodes]:
    """The program, until it is left."""
    command = [sys.executable, __file__, str(head_cpus), port]
    with subprocess.Popen(
        command, env={**os.environ, **QUICK}, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, text=True,
    ) as process:  # fmt: skip
        try:
            yield Nodes(process)
        finally:
            assert process.stdin is not None
            process.stdin.close()
            process.wait(60)


def main(head_cpus: int, port: int) -> None:
    """The program."""
    from ray.cluster_utils import Cluster

    head = {
        "num_cpus": head_cpus,
        "include_dashboard": False,
        "object_store_memory": STORE_BYTES,
        "gcs_server_port": port,
    }
    cluster = Cluster(initialize_head=True, head_node_args=head)
    nodes: dict[str, Any] = {}
    _say(cluster.address)
    for line in sys.stdin:
        word, *rest = json.loads(line)
        if word == "add":
            name, arguments = rest
            nodes[name] = cluster.add_node(object_store_memory=STORE_BYTES, **arguments)
        elif word == "remove":
            cluster.remove_node(nodes.pop(rest[0]), allow_graceful=False)
        elif rest == ["gcs"]:
            cluster.head_node.kill_gcs_server()
        else:
            cluster.head_node.kill_raylet()
        _say("done")
    cluster.shutdown()


def _say(answer: str) -> None:
    sys.stdout.write(f"{ANSWER}{answer}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
