"""A disk that is full or not to be written: a change is refused in so many words, and nothing else happens."""

from __future__ import annotations

import json
import os
import resource
import subprocess
from pathlib import Path

import pytest

from tests.chaos.conftest import Figures, foreground
from tests.disks import fill, small_disk
from tests.live.conftest import Server, fake

# Root writes where nobody may; without these capabilities it does not.
AS_ANYBODY = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.geteuid() == 0 else []
REFUSALS_A_DISK = 5
MEGABYTE = 1 << 20


def test_a_full_disk_and_then_a_read_only_one(server: Server, tmp_path: Path, figures: Figures) -> None:
    """Every change is refused, requests are served, pool.yml keeps its bytes; changes go on when the disk is well.

    Large requests are served, too, though the disk is that of temporary files as well.
    """
    with small_disk(tmp_path / "disk") as disk:
        keep_pool_in(disk, server)
        server.environment["TMPDIR"] = str(disk)
        with foreground(server, "gunicorn"):
            server.wait_ready()
            serves_large_requests(server)
            fill(disk / "waste")
            refuses_changes(server)
            serves_large_requests(server)
            (disk / "waste").unlink()
            subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
            refuses_changes(server)
            serves_large_requests(server)
            subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
            accepts_changes(server)
            serves_large_requests(server)
        fill(disk / "waste")
        refuses_offline(server)
    figures("refusals", 2 * REFUSALS_A_DISK + 1)


def test_a_folder_of_another_and_then_a_limit_on_files(server: Server, tmp_path: Path, figures: Figures) -> None:
    """The same without a disk of one's own: the folder is not to be written; the server's log cannot grow either."""
    asked = subprocess.run([*AS_ANYBODY, "true"], capture_output=True, text=True, check=False)
    if asked.returncode:
        pytest.skip(f"root cannot give up its privilege here: {asked.stderr.strip()}")
    folder = tmp_path / "pool"
    keep_pool_in(folder, server)
    with foreground(server, "waitress", *AS_ANYBODY) as child:
        server.wait_ready()
        folder.chmod(0o555)
        refuses_changes(server)
        folder.chmod(0o755)
        unlimited = resource.prlimit(child.pid, resource.RLIMIT_FSIZE, (16, resource.RLIM_INFINITY))
        refuses_changes(server)
        resource.prlimit(child.pid, resource.RLIMIT_FSIZE, unlimited)
        accepts_changes(server)
    folder.chmod(0o555)
    refuses_offline(server)
    figures("refusals", 2 * REFUSALS_A_DISK + 1)


def keep_pool_in(folder: Path, server: Server) -> None:
    """A folder of its own: pid file and log stay where they can be written."""
    folder.mkdir(exist_ok=True)
    server.pool_yml = folder / "pool.yml"
    server.environment["EMBEDPOOL_PATHS__POOL_YML"] = str(server.pool_yml)
    server.write_pool(fake("m"))


def refuses_changes(server: Server) -> None:
    """Over HTTP and by the command line."""
    content, vectors = server.pool_yml.read_bytes(), server.vectors("m", ["x"])
    for path, body in (
        ("/models/register", {"model": "n", "driver_type": "fake"}),
        ("/models/alias", {"model": "m", "alias": "x"}),
        ("/models/enable", {"model": "m", "enabled": False}),
    ):
        answer = server.post(path, body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (507, "storage_error"), answer.text
        assert "pool.yml cannot be" in answer.json()["error"]["message"]
        assert server.vectors("m", ["x"]) == vectors
        assert server.pool_yml.read_bytes() == content
    for words in (("register", "--model", "n", "--type", "fake"), ("unregister", "--model", "m")):
        assert "pool.yml cannot be" in server.cli(*words, code=1)
        assert server.vectors("m", ["x"]) == vectors
        assert server.pool_yml.read_bytes() == content
    assert [model["model"] for model in server.get("/status").json()["models"]] == ["m"]


def serves_large_requests(server: Server) -> None:
    """An answer, a body, and a body of lines of more than a megabyte each."""
    texts = [f"text {i}" for i in range(400)]
    large = server.embed("m", texts)
    assert large.status_code == 200, large.text
    assert len(large.content) > MEGABYTE
    assert large.json()["vectors"][7] == server.vectors("m", texts[7:8])[0]
    long_texts = ["word " * 2500] * 100
    assert server.embed("m", long_texts).status_code == 200
    lines = "".join(json.dumps({"text": text}) + "\n" for text in long_texts)
    answer = server.post("/embed?model=m", data=lines, headers={"Content-Type": "application/x-ndjson"})
    assert answer.status_code == 200, answer.text
    assert answer.text.count("vector") == len(long_texts)


def refuses_offline(server: Server) -> None:
    """Without a server the command itself meets the disk."""
    content = server.pool_yml.read_bytes()
    done = server.run("unregister", "--model", "m", before=AS_ANYBODY)
    assert done.returncode == 1
    assert "pool.yml cannot be" in done.stderr
    assert "Traceback" not in done.stderr
    assert server.pool_yml.read_bytes() == content


def accepts_changes(server: Server) -> None:
    """With no start between, and with nothing left over from the refusals."""
    server.cli("set-alias", "--model", "m", "--alias", "x")
    assert server.vectors("x", ["x"]) == server.vectors("m", ["x"])
    assert {file.name for file in server.pool_yml.parent.iterdir()} == {"pool.yml", "pool.yml.lock"}
