"""A real server gives sparse, multi-vector and contextual rows: to its own tools, to real clients, after a kill."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow.parquet
import pytest
import requests

from embedpool import Client
from tests.live.conftest import MINILM, Server, wait_until
from tests.zoo import make

sentence_transformers = pytest.importorskip("sentence_transformers")
HERE = Path(__file__).parent / "clients"
APART = Path(sys.prefix) / "clients"
TEXTS = [
    "The quick brown fox jumps over the lazy dog.",
    "what is the capital of France?",
    "pool embed server model token vector",
    "Der schnelle braune Fuchs springt über den faulen Hund.",
    *(f"text number {i} of {'long ' * (i % 9)}texts for programs" for i in range(40)),
]
CHUNKS = [
    ["Berlin is the capital of Germany.", "Its more than 3 million people make it the largest city.", "It is old."],
    ["An embedding is a vector.", "It stands for a text."],
]


def local(model: str, folder: Path, **entry: Any) -> dict[str, Any]:
    return {"model": model, "driver": {"type": "local_st", "config": {"path": str(folder)}}, **entry}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny models of each kind."""
    if not hasattr(sentence_transformers, "MultiVectorEncoder"):
        pytest.skip("this sentence-transformers has no multi-vector models")
    root = tmp_path_factory.mktemp("zoo")
    names = {"splade": "splade", "colbert": "colbert", "m3": "bge-m3"}
    return {model: make(name, root) for model, name in names.items()}


@pytest.fixture
def served(server: Server, folders: dict[str, Path]) -> Iterator[Server]:
    server.write_pool(
        {"model": MINILM, "alias": "m", "driver": {"type": "local_st"}},
        local("splade", folders["splade"]),
        local("colbert", folders["colbert"], place="process"),
        local("m3", folders["m3"]),
    )
    server.start()
    server.wait_ready()
    yield server
    server.stop()


def test_rows_are_the_librarys(served: Server, folders: dict[str, Path]) -> None:
    """Over HTTP, in one large request and many small ones at once, by lines, and after the server was killed."""
    from concurrent.futures import ThreadPoolExecutor

    sparse = sentence_transformers.SparseEncoder(str(folders["splade"]), device="cpu", local_files_only=True)
    wanted = sparse.encode(TEXTS, convert_to_sparse_tensor=False, show_progress_bar=False).numpy()

    def require(rows: list[Any], expected: Any) -> None:
        for row, dense in zip(rows, expected, strict=True):
            assert row["indices"] == np.flatnonzero(dense).tolist()
            np.testing.assert_allclose(row["values"], dense[row["indices"]], atol=1e-5, rtol=1e-5)

    require(served.vectors("splade", TEXTS), wanted)
    with ThreadPoolExecutor(8) as several:
        alone = list(several.map(lambda text: served.vectors("splade", [text])[0], TEXTS))
    require(alone, wanted)
    body = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
    lines = served.post("/embed?model=splade", data=body, headers={"Content-Type": "application/x-ndjson"})
    require([json.loads(line)["vector"] for line in lines.text.splitlines()], wanted)
    colbert = sentence_transformers.MultiVectorEncoder(str(folders["colbert"]), device="cpu", local_files_only=True)
    for type_ in ("query", "document"):
        encode = getattr(colbert, f"encode_{type_}")
        expected = encode(TEXTS, show_progress_bar=False, convert_to_numpy=True)
        for got, vectors in zip(served.vectors("colbert", TEXTS, input_type=type_), expected, strict=True):
            np.testing.assert_allclose(got, vectors, atol=1e-5)
    family = [served.process, *served.process.children(recursive=True)]
    for process in family:
        process.kill()
    psutil.wait_procs(family, timeout=20)
    served.start()
    served.wait_ready()
    require(served.vectors("splade", TEXTS), wanted)


def test_the_road_from_a_file_to_a_table(served: Server, folders: dict[str, Path]) -> None:
    """`embedpool embed --output`, on the server and without it; a batch of the same requests; the same rows."""
    (served.folder / "in.txt").write_text("".join(text + "\n" for text in TEXTS))
    client = Client(served.url)
    wanted = client.embed_hybrid(TEXTS, model="m3", outputs=["dense", "sparse", "multivector"])
    for local_ in ((), ("--local",)):
        out = f"out{len(local_)}.parquet"
        command = ("embed", "--in", "in.txt", "--out", out, "--model", "m3", "--output", "dense,sparse,multivector")
        served.cli(*command, *local_)
        table = pyarrow.parquet.read_table(served.folder / out).to_pydict()
        np.testing.assert_allclose(table["dense"], wanted["dense"], atol=1e-5)
        assert table["sparse_indices"] == [row.indices.tolist() for row in wanted["sparse"]]
        for got, vectors in zip(table["multivector"], wanted["multivector"], strict=True):
            np.testing.assert_allclose(got, vectors, atol=1e-5)
    printed = served.cli(
        "embed", "--model", "splade", "--set", "tokens=true", "--set", "top_k=2", "--output", "sparse", "fox"
    )
    assert len(json.loads(printed)["tokens"]) <= 2
    line = {"method": "POST", "url": "/embed", "body": {"model": "splade", "texts": TEXTS[:2]}}
    batch_in = served.folder / "batch.jsonl"
    batch_in.write_text(json.dumps({"custom_id": "a", **line}) + "\n")
    batch = client.create_batch(batch_in, endpoint="/embed")
    wait_until(lambda: client.batch(batch["id"])["status"] == "completed")
    client.fetch_file(client.batch(batch["id"])["output_file_id"], served.folder / "batch.out")
    found = json.loads((served.folder / "batch.out").read_text())["response"]["body"]["vectors"]
    assert found == served.vectors("splade", TEXTS[:2])


def test_one_server_behind_another(served: Server, make_server: Any) -> None:
    """A pool of remote names gives the same rows, and scores pairs by them."""
    front = make_server("front")
    config = {"base_url": f"{served.url}/embed"}
    front.write_pool(
        {"model": "s", "driver": {"type": "http", "config": {**config, "remote_model": "splade", "task": "sparse"}}},
        {
            "model": "c",
            "driver": {"type": "http", "config": {**config, "remote_model": "colbert", "task": "multivector"}},
        },
    )
    front.start()
    front.wait_ready()
    assert front.vectors("s", TEXTS) == served.vectors("splade", TEXTS)
    body = {"query": TEXTS[1], "documents": TEXTS[:5]}
    here, there = (
        server.post("/rerank", {"model": model, **body}).json()["results"]
        for server, model in ((front, "c"), (served, "colbert"))
    )
    assert [one["index"] for one in here] == [one["index"] for one in there]
    front.stop()


def test_metrics_and_status_know_the_tasks(served: Server) -> None:
    """A label for each."""
    served.vectors("splade", TEXTS[:3])
    served.embed("m3", TEXTS[:3], output=["dense", "sparse"])
    text = requests.get(f"{served.url}/metrics", timeout=20).text
    assert 'task="sparse"' in text
    assert 'task="hybrid"' in text
    assert served.status("m3")["kinds"] == ["embed", "multivector", "sparse"]


@pytest.mark.skipif(not (APART / "others").exists(), reason="needs the clients' environments")
def test_real_clients(served: Server) -> None:
    """qdrant-client finds by rows of each kind, Voyage's SDK and Chroma's function for Jina embed chunks in context."""
    outputs = ["dense", "sparse", "multivector"]

    def rows(texts: list[str], **options: Any) -> list[dict[str, Any]]:
        found = served.embed("m3", texts, output=outputs, **options).json()["outputs"]
        return [{name: found[name][i] for name in outputs} for i in range(len(texts))]

    documents, queries = rows(TEXTS), rows(TEXTS[:4])
    given = {"documents": documents, "queries": queries, "chunks": CHUNKS}
    done = subprocess.run(
        [APART / "others" / "bin" / "python", HERE / "outputs.py", served.url],
        input=json.dumps(given), capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    for i, order in enumerate(found["qdrant"]):  # each text finds itself first
        assert order["dense"][0] == i
        assert order["fused"][0] == i
        weights = dict(zip(queries[i]["sparse"]["indices"], queries[i]["sparse"]["values"], strict=True))
        scores = [
            sum(weights.get(token, 0) * value for token, value in zip(row["indices"], row["values"], strict=True))
            for row in (document["sparse"] for document in documents)
        ]
        assert scores[order["sparse"][0]] == pytest.approx(max(scores))
        by_tokens = [
            float((np.array(queries[i]["multivector"]) @ np.array(document["multivector"]).T).max(axis=1).sum())
            for document in documents
        ]
        assert by_tokens[order["multivector"][0]] == pytest.approx(max(by_tokens))
    body = {"model": "m", "inputs": CHUNKS, "input_type": "document"}
    answer = served.post("/v1/contextualizedembeddings", body).json()
    voyage = found["voyage"]
    for vectors, document in zip(voyage["documents"], answer["data"], strict=True):
        np.testing.assert_allclose(vectors, [chunk["embedding"] for chunk in document["data"]], atol=1e-6)
    assert voyage["tokens"] == answer["usage"]["total_tokens"]
    assert np.shape(voyage["query"]) == (1, 64)
    assert len(voyage["split"]) == voyage["split_vectors"] > 1
    assert "".join(voyage["split"]) == " ".join(CHUNKS[0])
    assert voyage["error"] == "APIError"  # its own
    np.testing.assert_allclose(found["jina"], voyage["documents"][0], atol=1e-6)


def test_late_chunks_are_the_means_of_the_librarys_tokens(served: Server) -> None:
    """Of the real MiniLM, in a script of each kind."""
    from embedpool.config.spec import LocalStConfig
    from embedpool.drivers.model_folder import find_model_folder
    from tests.conftest import NOWHERE

    folder = find_model_folder(MINILM, LocalStConfig(), NOWHERE.state)
    model = sentence_transformers.SentenceTransformer(str(folder), device="cpu", local_files_only=True)
    chunks = [*CHUNKS[0], "日本語の文章を埋め込む。", "Привет, мир!", "مرحبا بالعالم", "naïve café 🙂"]
    text = " ".join(chunks)
    tokens = model.encode(text, output_value="token_embeddings").numpy()
    offsets = model.tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    answer = served.post("/v1/embeddings", {"model": "m", "input": chunks, "late_chunking": True}).json()
    at = 0
    for chunk, entry in zip(chunks, answer["data"], strict=True):
        own = [i for i, (start, stop) in enumerate(offsets) if stop > start and at <= start < at + len(chunk)]
        mean = tokens[own].mean(axis=0)
        np.testing.assert_allclose(entry["embedding"], mean / np.linalg.norm(mean), atol=1e-5)
        at += len(chunk) + 1
