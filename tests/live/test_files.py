"""`embedpool embed --in` against real servers, and without one; killed and resumed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import psutil
import pyarrow
import pytest
from pyarrow import parquet

from tests.live.conftest import COMMAND, Server, fake, wait_until

TEXTS = [f"text number {i} of many" for i in range(4000)]


def command(server: Server, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [str(COMMAND), "embed", *arguments], cwd=server.folder, env=server.environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509  (a background job ignores it)
    )  # fmt: skip


def write(server: Server) -> None:
    parquet.write_table(pyarrow.table({"n": list(range(len(TEXTS))), "body": TEXTS}), server.folder / "in.parquet")


def require_all(server: Server, out: Path) -> None:
    table = parquet.read_table(out)
    assert table["id"].to_pylist() == list(range(len(TEXTS)))
    vectors = np.array(table["vector"].to_pylist(), np.float32)
    expected = np.concatenate([server.vectors("m", TEXTS[at : at + 1000]) for at in range(0, len(TEXTS), 1000)])
    np.testing.assert_allclose(vectors, expected, atol=1e-6)


def test_killed_at_random(server: Server) -> None:
    """The command and the server by turns: complete, each vector once, and equal to a fresh one."""
    server.write_pool(fake("m", delay_ms_per_text=0.5))
    server.start()
    server.wait_ready()
    write(server)
    arguments = ("--model", "m", "--in", "in.parquet", "--column", "body", "--id-column", "n", "--out", "out.parquet")
    job = server.folder / "out.parquet.job"
    begun = command(server, *arguments)
    for turn in range(6):
        until_it_is_further(job, begun, rows_done(job) + random.Random(turn).randrange(1, 800))
        if turn % 2:
            family = [server.process, *server.process.children(recursive=True)]
            for process in family:
                process.kill()
            psutil.wait_procs(family, timeout=20)
            port = str(urlsplit(server.url).port)
            server.pid_file.unlink(missing_ok=True)
            server.cli("pool", "start", "--detach", "--port", port)
        else:
            begun.kill()
            begun.communicate()
            begun = command(server, *arguments, "--resume")
    said = begun.communicate(timeout=120)[1]
    assert begun.returncode == 0 or "its job is done" in said
    server.wait_ready()
    require_all(server, server.folder / "out.parquet")
    assert [path.name for path in server.folder.iterdir() if path.name.startswith("out")] == ["out.parquet"]
    server.stop()


def until_it_is_further(job: Path, begun: subprocess.Popen[str], rows: int) -> None:
    """Or at its end."""
    wait_until(lambda: rows_done(job) >= rows or begun.poll() is not None, 60)


def rows_done(job: Path) -> int:
    try:
        return int(json.loads(job.read_text())["progress"]["rows"])
    except (OSError, ValueError):
        return 0


def test_ctrl_c_and_what_is_refused(server: Server) -> None:
    """It says how to go on; a job is not begun over another, or over a file that is there."""
    server.write_pool(fake("m", delay_ms_per_text=1), fake("other"))
    server.start()
    server.wait_ready()
    write(server)
    arguments = ("--in", "in.parquet", "--column", "body", "--out", "v.jsonl")
    begun = command(server, "--model", "m", *arguments)
    wait_until(lambda: rows_done(server.folder / "v.jsonl.job") > 0, 60)
    begun.send_signal(signal.SIGINT)
    assert "--resume goes on" in begun.communicate(timeout=60)[1]
    assert begun.returncode == 1
    assert "--resume" in server.cli("embed", "--model", "m", *arguments, code=2)
    assert "is of another job: model" in server.cli("embed", "--model", "other", *arguments, "--resume", code=1)
    server.cli("embed", "--model", "m", *arguments, "--resume")
    lines = [json.loads(line) for line in (server.folder / "v.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == list(range(len(TEXTS)))
    assert "exists" in server.cli("embed", "--model", "m", *arguments, code=2)
    server.stop()


def test_texts_that_fail_are_told(server: Server) -> None:
    """In a file beside; the exit code is 1."""
    server.write_pool(fake("m", fault="raise", fault_text="bad"), fake("r", task="rerank"))
    server.start()
    server.wait_ready()
    (server.folder / "a.txt").write_text("good\nbad\nlast\n")
    said = server.cli("embed", "--model", "m", "--in", "a.txt", "--out", "a.npy", code=1)
    assert "1 failed, see a.npy.failed.jsonl" in said
    vectors, ids = np.load(server.folder / "a.npy"), (server.folder / "a.ids.jsonl").read_text().split()
    assert ids == ["0", "2"]
    np.testing.assert_allclose(vectors, server.vectors("m", ["good", "last"]), atol=1e-6)
    pairs = [{"query": "red fox", "document": text} for text in ("a red fox", "blue")]
    (server.folder / "p.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    server.cli("rerank", "--in", "p.jsonl", "--out", "p.scores.jsonl")
    scores = [json.loads(line)["score"] for line in (server.folder / "p.scores.jsonl").read_text().splitlines()]
    body = {"model": "r", "queries": ["red fox"], "documents": ["a red fox", "blue"]}
    assert scores == [entry["score"] for entry in server.post("/score", body).json()["data"]]
    server.stop()


@pytest.mark.parametrize("options", [(), ("--set", "dimensions=8")])
def test_without_a_server(server: Server, options: tuple[str, ...]) -> None:
    """The same numbers as on one; without --local it says what to do."""
    server.write_pool(fake("m", alias="a"))
    (server.folder / "a.txt").write_text("one\ntwo words\n")
    arguments = ("embed", "--model", "a", "--in", "a.txt", "--out", "a.npy", *options)
    assert "--local" in server.cli(*arguments, code=3)
    server.cli(*arguments, "--local")
    found = np.load(server.folder / "a.npy")
    server.start()
    server.wait_ready()
    wanted = {"dimensions": 8} if options else {}
    np.testing.assert_allclose(found, server.vectors("m", ["one", "two words"], **wanted), atol=1e-6)
    server.stop()


@pytest.mark.long
def test_memory_does_not_grow_with_the_file(server: Server) -> None:
    """Twenty times the texts: neither the command nor the server grows by as much as the vectors would take."""
    server.write_pool(fake("m", dim=384))
    server.start()
    server.wait_ready()
    peaks = []
    for count in (5_000, 100_000):
        (server.folder / f"{count}.txt").write_text("".join(f"text number {i}\n" for i in range(count)))
        program = "import resource, sys; from embedpool.cli import main; code = main(sys.argv[1:]); " \
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss); sys.exit(code)"  # fmt: skip
        done = subprocess.run(
            [os.fspath(COMMAND.with_name("python")), "-c", program, "embed", "--model", "m", "--in", f"{count}.txt",
             "--out", f"{count}.npy"],
            cwd=server.folder, env=server.environment, capture_output=True, text=True, timeout=180, check=True,
        )  # fmt: skip
        peaks.append(int(done.stdout.split()[-1]) / 1000)
    assert np.load(server.folder / "100000.npy", mmap_mode="r").shape == (100_000, 384)
    assert peaks[1] - peaks[0] < 60, peaks  # MB; the vectors are 154
    server.stop()
