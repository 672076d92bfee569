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

from benchmarks.texts import mixed, model_folder
from tests.live.conftest import COMMAND, MINILM, Server, fake, wait_until

AT_MOST_AGAIN = 1000  # texts that a kill costs
MOST_GROWTH_MB = 300
FROM_PARQUET = (
    "--model", "m", "--in", "in.parquet", "--column", "body", "--id-column", "n", "--out", "out.parquet",
)  # fmt: skip


def texts_of(count: int) -> list[str]:
    return [f"text number {i} of many" for i in range(count)]


TEXTS = texts_of(4000)


def command(server: Server, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [str(COMMAND), "embed", *arguments], cwd=server.folder, env=server.environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509  (a background job ignores it)
    )  # fmt: skip


def write(server: Server, texts: list[str]) -> None:
    parquet.write_table(pyarrow.table({"n": list(range(len(texts))), "body": texts}), server.folder / "in.parquet")


def require_all(server: Server, texts: list[str], out: Path) -> None:
    table = parquet.read_table(out)
    assert table["id"].to_pylist() == list(range(len(texts)))
    vectors = table["vector"].combine_chunks().flatten().to_numpy().reshape(len(texts), -1)
    for at in range(0, len(texts), 1000):
        np.testing.assert_allclose(vectors[at : at + 1000], server.vectors("m", texts[at : at + 1000]), atol=1e-6)


@pytest.mark.parametrize(("count", "kills"), [(3000, 3), pytest.param(200_000, 20, marks=pytest.mark.long)])
def test_killed_at_random(server: Server, count: int, kills: int) -> None:
    """The command, a worker and the whole server by turns: complete, each vector once, and equal to a fresh one.

    What is computed again is what was under way.
    """
    texts = texts_of(count)
    server.write_pool(fake("m", delay_ms_per_text=0.5))
    server.start()
    server.wait_ready()
    write(server, texts)
    job = server.folder / "out.parquet.job"
    begun = command(server, *FROM_PARQUET)
    for turn in range(kills):
        further = random.Random(turn).randrange(1, count // (kills + 1))
        until_it_is_further(job, begun, rows_done(job) + further)
        kill(server, turn)
        if turn % 3 == 0:
            begun.kill()
            begun.communicate()
            begun = command(server, *FROM_PARQUET, "--resume")
    said = begun.communicate(timeout=120)[1]
    assert begun.returncode == 0 or "its job is done" in said
    server.wait_ready()
    assert abs(texts_computed(server) - count) <= kills * AT_MOST_AGAIN
    require_all(server, texts, server.folder / "out.parquet")
    assert [path.name for path in server.folder.iterdir() if path.name.startswith("out")] == ["out.parquet"]
    server.stop()


@pytest.mark.parametrize(
    ("count", "compared", "chars"), [(2000, 200, 80), pytest.param(20_000, 2000, None, marks=pytest.mark.long)]
)
def test_a_real_model_killed(server: Server, count: int, compared: int, chars: int | None) -> None:
    """Texts of mixed lengths, up to so many `chars`, with MiniLM, three kills: complete, and equal to fresh ones."""
    texts = [" ".join(text.split())[:chars] for text in mixed(count)]
    model = {"model": MINILM, "alias": "m", "driver": {"type": "local_st", "config": {"path": str(model_folder())}}}
    server.write_pool(model)
    server.start()
    server.wait_ready()
    write(server, texts)
    job = server.folder / "out.parquet.job"
    begun = command(server, *FROM_PARQUET)
    for turn in range(3):
        until_it_is_further(job, begun, rows_done(job) + 3 * count // 20)
        kill(server, turn)
        if turn == 0:
            begun.kill()
            begun.communicate()
            begun = command(server, *FROM_PARQUET, "--resume")
    begun.communicate(timeout=600)
    assert begun.returncode == 0
    server.wait_ready()
    table = parquet.read_table(server.folder / "out.parquet")
    assert table["id"].to_pylist() == list(range(len(texts)))
    vectors = table["vector"].combine_chunks().flatten().to_numpy().reshape(len(texts), -1)
    chosen = random.Random(21).sample(range(len(texts)), compared)
    for at in range(0, len(chosen), 250):
        some = chosen[at : at + 250]
        np.testing.assert_allclose(vectors[some], server.vectors("m", [texts[i] for i in some]), atol=1e-4)
    server.stop()


def kill(server: Server, turn: int) -> None:
    """Nothing of it, a worker, or all of it, which is started again, by turns."""
    if turn % 3 == 1:
        server.process.children()[0].kill()
    elif turn % 3:
        family = [server.process, *server.process.children(recursive=True)]
        for process in family:
            process.kill()
        psutil.wait_procs(family, timeout=20)
        port = str(urlsplit(server.url).port)
        server.pid_file.unlink(missing_ok=True)
        server.cli("pool", "start", "--detach", "--port", port)


def until_it_is_further(job: Path, begun: subprocess.Popen[str], rows: int) -> None:
    """Or at its end."""
    wait_until(lambda: rows_done(job) >= rows or begun.poll() is not None, 60)


def texts_computed(server: Server) -> int:
    """Since the server was first started, by its log."""
    lines = [line for line in server.log.read_text().splitlines() if "path=/embed " in line and "status=200" in line]
    return sum(int(line.partition(" texts=")[2].split()[0]) for line in lines)


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
    write(server, TEXTS)
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
    """Forty times the texts: the command and the server grow together by less than the vectors would take."""
    server.write_pool(fake("m", dim=384))
    server.start()
    server.wait_ready()
    program = (
        "import resource, sys; from embedpool.cli import main; code = main(sys.argv[1:]); "
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss); sys.exit(code)"
    )
    peaks_mb = []
    for count in (5_000, 200_000):
        write(server, texts_of(count))
        done = subprocess.run(
            [os.fspath(COMMAND.with_name("python")), "-c", program, "embed", "--model", "m", "--in", "in.parquet",
             "--column", "body", "--out", f"{count}.parquet"],
            cwd=server.folder, env=server.environment, capture_output=True, text=True, timeout=600, check=True,
        )  # fmt: skip
        family = (server.process, *server.process.children(recursive=True))
        peaks_mb.append(int(done.stdout.split()[-1]) / 1000 + sum(map(peak_mb, family)))
    assert parquet.read_metadata(server.folder / "200000.parquet").num_rows == 200_000
    assert peaks_mb[1] - peaks_mb[0] < MOST_GROWTH_MB, peaks_mb  # the vectors are 307 MB
    server.stop()


def peak_mb(process: psutil.Process) -> float:
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1000
