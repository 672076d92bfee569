"""`place: ray` on a real server, with the cluster that it starts for itself; and Ray Data with a model of pool.yml."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow
import pytest
from pyarrow import parquet

from tests.live.conftest import COMMAND, Server, fake, wait_until

pytestmark = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs ray")

DOCS = Path(__file__).parents[2] / "docs" / "ray.md"
ON_THIS_MACHINE = {  # what is another one here than in the docs, which use many machines
    "import ray\n": "import ray\nray.init(num_cpus=2, object_store_memory=200 << 20, include_dashboard=False)\n",
    "minilm-l6": "m",
    "batch_size=256": "batch_size=64",
    "num_cpus=2,\n    compute": "num_cpus=1,\n    compute",
    "max_size=8": "max_size=1",
}


def of_the_cluster(server: Server) -> list[psutil.Process]:
    """The cluster's own processes, by the folder of its session."""
    found = []
    for process in psutil.process_iter(["cmdline", "ppid"]):
        if any("embedpool-ray-" in word for word in process.info["cmdline"] or ()):
            found.append(process)
    return found


def test_a_cluster_of_its_own(server: Server) -> None:
    """Nobody else reaches it; what ends it does not end the server; it ends with the server."""
    server.write_pool({**fake("m", dim=8), "place": "ray"}, fake("here", dim=8))
    server.start()
    server.wait_ready()
    assert server.vectors("m", ["a"]) == server.vectors("here", ["a"])
    on = server.status("m")["runs_on"]
    assert (on["place"], on["node_ip"]) == ("ray", "127.0.0.1")
    cluster = of_the_cluster(server)
    listening = [one.laddr.ip for process in cluster for one in process.net_connections() if one.status == "LISTEN"]
    assert listening
    assert all(ip in ("127.0.0.1", "::1", "::ffff:127.0.0.1") for ip in listening), listening
    worker = server.process.children()[0]
    for process in cluster:
        if "raylet" in process.name() or "gcs_server" in process.name():
            process.kill()
    assert server.vectors("here", ["a"])
    wait_until(lambda: server.embed("m", ["a"]).status_code == 200)
    assert server.process.children()[0] == worker
    server.stop()
    wait_until(lambda: not of_the_cluster(server))


@pytest.mark.long
def test_it_ends_with_a_server_that_is_killed(server: Server) -> None:
    """Whoever watches it sees that."""
    server.write_pool({**fake("m"), "place": "ray"})
    server.start()
    server.wait_ready()
    assert of_the_cluster(server)
    for process in [server.process, *server.process.children()]:
        os.kill(process.pid, signal.SIGKILL)
    wait_until(lambda: not of_the_cluster(server))


@pytest.mark.long
def test_ray_data(server: Server) -> None:
    """The vectors are those of a server, and what has ended early goes on: each row once."""
    pool: dict[str, Any] = {**fake("m", dim=8, fault="raise", fault_text="text 777"), "place": "ray"}
    server.write_pool(pool)
    table = pyarrow.table({"id": list(range(1000)), "text": [f"text {i}" for i in range(1000)]})
    parquet.write_table(table, server.folder / "texts.parquet", row_group_size=100)
    assert recipe(server).returncode != 0
    server.write_pool(fake("m", dim=8))
    done = recipe(server)
    assert done.returncode == 0, done.stderr
    rows = parquet.read_table(server.folder / "vectors").to_pylist()
    assert sorted(row["id"] for row in rows) == list(range(1000))
    server.start()
    server.wait_ready()
    for at in range(0, 1000, 250):
        some = rows[at : at + 250]
        np.testing.assert_allclose(
            [row["vector"] for row in some], server.vectors("m", [row["text"] for row in some]), atol=1e-6
        )
    server.stop()


def recipe(server: Server) -> subprocess.CompletedProcess[str]:
    """The one of the docs."""
    (text,) = re.findall(r"```python\n(.*?)```", DOCS.read_text(), flags=re.DOTALL)
    for there, here in ON_THIS_MACHINE.items():
        assert there in text, there
        text = text.replace(there, here)
    python = COMMAND.with_name("python")
    home = {"HOME": str(server.folder)}  # where Ray keeps the token of a cluster that it starts
    environment = {**server.environment, **home, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    return subprocess.run(
        [str(python), "-c", text], cwd=server.folder, env=environment, capture_output=True, text=True, timeout=180,
        check=False,
    )  # fmt: skip
