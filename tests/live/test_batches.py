"""OpenAI's batches with real SDKs on real servers, killed and started again."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
from base64 import b64decode
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import openai
import psutil
import pytest

from tests.live.conftest import Server, fake, wait_until

APART = Path(sys.prefix) / "clients"
FINISHED = ("completed", "failed", "expired", "cancelled")
OF_NPM = """
import fs from "node:fs";
import { createRequire } from "node:module";
const require = createRequire(process.argv[2] + "/package.json");
const OpenAI = require("openai").OpenAI ?? require("openai");
const client = new OpenAI({ baseURL: process.argv[3] + "/v1", apiKey: "none" });
async function begun(path, endpoint) {
  const file = await client.files.create({ file: fs.createReadStream(path), purpose: "batch" });
  return await client.batches.create({ input_file_id: file.id, endpoint, completion_window: "24h" });
}
async function ended(batch) {
  while (!["completed", "failed", "cancelled", "expired"].includes(batch.status)) {
    await new Promise((done) => setTimeout(done, 100));
    batch = await client.batches.retrieve(batch.id);
  }
  return batch;
}
async function linesOf(file) {
  return (await (await client.files.content(file)).text()).trim().split("\\n").map((line) => JSON.parse(line));
}
const [good, pairs, slow] = process.argv.slice(4);
const batches = await Promise.all([[good, "/v1/embeddings"], [pairs, "/v1/rerank"]].map((one) => begun(...one)));
const [batch, ranked] = await Promise.all(batches.map(ended));
const stopped = await begun(slow, "/v1/embeddings");
const cancelling = await client.batches.cancel(stopped.id);
const unrun = await linesOf((await ended(cancelling)).error_file_id);
const ids = [];
for await (const one of client.batches.list({ limit: 1 })) ids.push(one.id);
const refused = [() => client.batches.retrieve("batch_unknown"), () => client.batches.cancel(batch.id),
  () => begun(good, "/v1/nothing"), () => client.files.create({ file: fs.createReadStream(good), purpose: "vision" })];
const errors = await Promise.all(refused.map((ask) => ask().then(() => "none", (error) => error.status)));
console.log(JSON.stringify({
  status: batch.status, ids: new Set(ids).size, lines: (await linesOf(batch.output_file_id)).length, errors,
  scores: (await linesOf(ranked.output_file_id)).map((line) => line.response.body.results.length),
  cancelling: cancelling.status, unrun: [...new Set(unrun.map((line) => line.error.code))],
}));
"""
OF_LITELLM = """
import json, sys, time, litellm
told = {"custom_llm_provider": "openai", "api_base": sys.argv[1] + "/v1", "api_key": "none"}
file = litellm.create_file(file=open(sys.argv[2], "rb"), purpose="batch", **told)
batch = litellm.create_batch(input_file_id=file.id, endpoint="/v1/embeddings", completion_window="24h", **told)
while batch.status not in ("completed", "failed"):
    time.sleep(0.1)
    batch = litellm.retrieve_batch(batch_id=batch.id, **told)
text = litellm.file_content(file_id=batch.output_file_id, **told).text
file = litellm.create_file(file=open(sys.argv[3], "rb"), purpose="batch", **told)
slow = litellm.create_batch(input_file_id=file.id, endpoint="/v1/embeddings", completion_window="24h", **told)
cancelled = litellm.cancel_batch(batch_id=slow.id, **told)
while cancelled.status not in ("completed", "cancelled"):
    time.sleep(0.1)
    cancelled = litellm.retrieve_batch(batch_id=slow.id, **told)
listed = litellm.list_batches(limit=10, **told)
print(json.dumps({
    "status": batch.status, "lines": len(text.splitlines()), "cancelled": cancelled.status,
    "listed": sorted(one.id for one in listed.data) == sorted((batch.id, slow.id)),
}))
"""


def lines(count: int, **body: Any) -> bytes:
    return requests_of("/v1/embeddings", [{"model": "m", "input": f"text {i}", **body} for i in range(count)])


def requests_of(url: str, bodies: list[dict[str, Any]]) -> bytes:
    found = ({"custom_id": f"id-{i}", "method": "POST", "url": url, "body": body} for i, body in enumerate(bodies))
    return "".join(json.dumps(one) + "\n" for one in found).encode()


PAIRS = requests_of("/v1/rerank", [{"model": "r", "query": "red fox", "documents": ["a red fox", "blue"]}])
SLOW = lines(2000, model="slow")


@pytest.fixture
def served(server: Server) -> Iterator[Server]:
    server.write_pool(
        fake("m", alias="text-embedding-3-small"), fake("r", task="rerank"), fake("slow", delay_ms_per_text=100)
    )
    server.start(EMBEDPOOL_LIMITS__MAX_FILES_BYTES=str(100 << 20))
    server.wait_ready()
    yield server
    server.stop()


@pytest.fixture
def client_of() -> Iterator[Callable[[Server], openai.OpenAI]]:
    """Makes a client of a server as it runs now; all are closed at the end."""
    with contextlib.ExitStack() as opened:
        yield lambda server: opened.enter_context(
            openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        )


def begun(client: openai.OpenAI, content: bytes, endpoint: Any = "/v1/embeddings") -> str:
    file = client.files.create(file=("requests.jsonl", content), purpose="batch")
    return client.batches.create(input_file_id=file.id, endpoint=endpoint, completion_window="24h").id


def results_of(client: openai.OpenAI, batch_id: str) -> tuple[list[Any], list[Any]]:
    """What has succeeded, and what has not, of a batch that is waited for."""
    wait_until(lambda: client.batches.retrieve(batch_id).status in FINISHED)
    batch = client.batches.retrieve(batch_id)
    files = batch.output_file_id, batch.error_file_id
    good, bad = ([json.loads(one) for one in client.files.content(file).iter_lines()] if file else [] for file in files)
    return good, bad


def require_whole(client: openai.OpenAI, server: Server, batch_id: str, count: int) -> None:
    batch = client.batches.retrieve(batch_id)
    assert batch.status == "completed"
    assert batch.request_counts is not None
    assert batch.output_file_id is not None
    assert (batch.request_counts.completed, batch.error_file_id) == (count, None)
    found = [json.loads(line) for line in client.files.content(batch.output_file_id).iter_lines()]
    assert [one["custom_id"] for one in found] == [f"id-{i}" for i in range(count)]
    vectors = [one["response"]["body"]["data"][0]["embedding"] for one in found]
    np.testing.assert_allclose(vectors, server.vectors("m", [f"text {i}" for i in range(count)]), atol=1e-6)


def require_other_kinds(client: openai.OpenAI, served: Server) -> None:
    """One that is cancelled while it runs, one that reranks, and one as it was made for OpenAI's own service."""
    of_openai = requests_of(
        "/v1/embeddings",
        [
            {"model": "text-embedding-3-small", "input": "one", "encoding_format": "float", "user": "somebody"},
            {"model": "text-embedding-3-small", "input": ["one", "two"], "dimensions": 8},
            {"model": "text-embedding-3-small", "input": [[606], [20375]], "encoding_format": "base64"},
            {"model": "text-embedding-3-small", "input": [606]},
        ],
    )
    good, bad = results_of(client, begun(client, of_openai))
    assert bad == []
    float32, short, base64, ids = ([row["embedding"] for row in one["response"]["body"]["data"]] for one in good)
    decoded = [np.frombuffer(b64decode(row), "<f4") for row in base64]
    np.testing.assert_allclose(float32, served.vectors("m", ["one"]), atol=1e-6)
    np.testing.assert_allclose(short, served.vectors("m", ["one", "two"], dimensions=8), atol=1e-6)
    np.testing.assert_allclose(decoded, served.vectors("m", ["one", "two"]), atol=1e-6)
    np.testing.assert_allclose(ids, float32, atol=1e-6)
    ((found,), _) = results_of(client, begun(client, PAIRS, "/v1/rerank"))
    body = json.loads(PAIRS)["body"]
    assert found["response"]["body"]["results"] == served.post("/v1/rerank", body).json()["results"]
    slow = begun(client, SLOW)
    wait_until(lambda: client.batches.retrieve(slow).status == "in_progress")
    assert client.batches.cancel(slow).status == "cancelling"
    good, bad = results_of(client, slow)
    assert client.batches.retrieve(slow).status == "cancelled"
    assert sorted(one["custom_id"] for one in good + bad) == sorted(f"id-{i}" for i in range(2000))
    assert {one["error"]["code"] for one in bad} == {"batch_cancelled"}


def test_openais_sdk(served: Server, client_of: Callable[[Server], openai.OpenAI]) -> None:
    """Unmodified: upload, create, poll, list with paging, content, cancel, and errors of each kind."""
    client = client_of(served)
    batches = [begun(client, lines(20)) for _ in range(3)]
    wait_until(lambda: all(client.batches.retrieve(one).status in FINISHED for one in batches))
    for one in batches:
        require_whole(client, served, one, 20)
    assert sorted(one.id for one in client.batches.list(limit=1)) == sorted(batches)
    assert len(list(client.files.list(limit=2))) == 6
    broken = begun(client, b"{no json\n")
    wait_until(lambda: client.batches.retrieve(broken).status == "failed")
    errors = client.batches.retrieve(broken).errors
    assert errors is not None
    assert errors.data is not None
    assert (errors.data[0].line, errors.data[0].code) == (1, "invalid_json_line")
    with pytest.raises(openai.BadRequestError):
        client.batches.cancel(broken)
    with pytest.raises(openai.NotFoundError):
        client.batches.retrieve("batch_unknown")
    with pytest.raises(openai.BadRequestError):
        client.files.create(file=("a.txt", b"x"), purpose="batch")
    given: dict[str, Any] = {"input_file_id": client.files.list().data[0].id, "completion_window": "24h"}
    for change in ({"endpoint": "/v1/models"}, {"endpoint": "/v1/embeddings", "completion_window": "soon"}):
        with pytest.raises(openai.BadRequestError):
            client.batches.create(**{**given, **change})
    with pytest.raises(openai.PermissionDeniedError):  # a page that has misled a browser
        client.files.list(extra_headers={"Host": "evil.example"})
    with pytest.raises(openai.InternalServerError, match="max_files_bytes"):
        client.files.create(file=("requests.jsonl", bytes(101 << 20)), purpose="batch")
    require_other_kinds(client, served)
    for file in client.files.list():
        assert client.files.delete(file.id).deleted
    served.cli("key", "create")
    wait_until(lambda: served.get("/v1/files").status_code == 401)
    with pytest.raises(openai.AuthenticationError):
        client.files.list()


def test_killed_and_started_again(server: Server, client_of: Callable[[Server], openai.OpenAI]) -> None:
    """By turns: it goes on, and every line is answered once."""
    server.write_pool(fake("m", delay_ms_per_text=2))
    server.start()
    server.wait_ready()
    client = client_of(server)
    port = str(urlsplit(server.url).port)
    batch_id = begun(client, lines(3000))

    def done() -> int:
        counts = client.batches.retrieve(batch_id).request_counts
        return counts.completed if counts else 0

    for _ in range(3):
        before = done()
        wait_until(lambda before=before: done() > before, 60)
        family = [server.process, *server.process.children(recursive=True)]
        for process in family:
            process.kill()
        psutil.wait_procs(family, timeout=20)
        server.pid_file.unlink(missing_ok=True)
        server.cli("pool", "start", "--detach", "--port", port)
        server.wait_ready()
        assert done() >= before
    wait_until(lambda: client.batches.retrieve(batch_id).status in FINISHED, 60)
    require_whole(client, server, batch_id, 3000)
    server.stop()


@pytest.mark.long
def test_one_of_several_workers_runs_them(server: Server, client_of: Callable[[Server], openai.OpenAI]) -> None:
    """Whichever is asked; a stop does not wait for the end of a batch."""
    server.write_pool(fake("m", delay_ms_per_text=5))
    server.start(EMBEDPOOL_SERVER__WORKERS="2")
    server.wait_ready()
    client = client_of(server)
    batch_id = begun(client, lines(2000))
    wait_until(lambda: (client.batches.retrieve(batch_id).request_counts or None).completed > 0)  # type: ignore[union-attr]
    server.stop()
    server.write_pool(fake("m"))
    server.start(EMBEDPOOL_SERVER__WORKERS="2")
    server.wait_ready()
    client = client_of(server)
    wait_until(lambda: client.batches.retrieve(batch_id).status in FINISHED, 60)
    require_whole(client, server, batch_id, 2000)
    server.stop()


def test_a_large_upload_costs_no_memory(served: Server, client_of: Callable[[Server], openai.OpenAI]) -> None:
    """It goes to the disk as it comes; also one that is larger than any other body may be."""
    client = client_of(served)
    worker = served.process.children()[0]
    before = worker.memory_info().rss
    content = lines(1000, user="x" * 80_000)
    assert len(content) > 70 << 20
    file = client.files.create(file=("large.jsonl", content), purpose="batch")
    assert file.bytes == len(content)
    assert worker.memory_info().rss - before < 40 << 20
    assert client.files.content(file.id).content == content


@pytest.mark.skipif(shutil.which("npm") is None, reason="needs node and npm")
def test_openais_sdk_for_javascript(served: Server, tmp_path: Path) -> None:
    """Likewise."""
    (tmp_path / "batch.mjs").write_text(OF_NPM)
    command = ["node", tmp_path / "batch.mjs", APART, served.url]
    for name, content in (("in", lines(5)), ("pairs", PAIRS), ("slow", SLOW)):
        (tmp_path / f"{name}.jsonl").write_bytes(content)
        command.append(tmp_path / f"{name}.jsonl")
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found == {
        "status": "completed", "ids": 3, "lines": 5, "errors": [404, 400, 400, 400], "scores": [2],
        "cancelling": "cancelling", "unrun": ["batch_cancelled"],
    }  # fmt: skip


def test_litellm(served: Server, tmp_path: Path) -> None:
    """Its batch calls, which go by way of OpenAI's."""
    (tmp_path / "in.jsonl").write_bytes(lines(5))
    (tmp_path / "slow.jsonl").write_bytes(SLOW)
    files = (tmp_path / "in.jsonl", tmp_path / "slow.jsonl")
    command = [APART / "litellm" / "bin" / "python", "-c", OF_LITELLM, served.url, *files]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found == {"status": "completed", "lines": 5, "cancelled": "cancelled", "listed": True}


def test_the_command(served: Server) -> None:
    """Create, list, show, cancel, fetch: the file of results appears when it is whole."""
    requests = lines(3).decode() + lines(1, model="nobody").decode().replace("id-0", "bad")
    (served.folder / "in.jsonl").write_text(requests)
    batch_id = served.cli("batch", "create", "in.jsonl").strip()
    wait_until(lambda: "completed" in served.cli("batch", "show", batch_id))
    assert "4 of 4, 1 failed" in served.cli("batch", "list")
    said = served.cli("batch", "fetch", batch_id, "--out", "out.jsonl", code=1)
    assert "3 results in out.jsonl, 1 failures in out.jsonl.errors.jsonl" in said
    found = [json.loads(line)["custom_id"] for line in (served.folder / "out.jsonl").read_text().splitlines()]
    assert found == ["id-0", "id-1", "id-2"]
    assert "exists" in served.cli("batch", "fetch", batch_id, "--out", "out.jsonl", code=2)
    assert "cannot be cancelled" in served.cli("batch", "cancel", batch_id, code=1)
    (served.folder / "broken.jsonl").write_text("{no json\n")
    broken = served.cli("batch", "create", "broken.jsonl").strip()
    wait_until(lambda: "failed" in served.cli("batch", "show", broken))
    assert "line 1: this line is not parseable" in served.cli("batch", "show", broken)
    assert "has no results" in served.cli("batch", "fetch", broken, code=1)
