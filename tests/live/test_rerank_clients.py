"""Real clients of rerankers, given another base URL: the order and the scores of POST /rerank, and their own errors."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests
from sentence_transformers import CrossEncoder

from benchmarks.reranker import TRAINED_ON, passages, query_of, reranker_folder
from tests.live.conftest import AT_ONCE, Server, fake

RANK = Path(__file__).parent / "clients" / "rank.py"
APART = Path(sys.prefix) / "clients"
QUERY = "red fox by the river"
DOCUMENTS = [
    *(
        f"Document {i} of a {'red ' * (i % 2)}{'fox ' * (i % 3 == 0)}by {'the river ' * (i % 5 == 0)}"
        for i in range(98)
    ),
    "",
    "word " * 700,
]
# What an unknown model raises, and an embedder that is asked to rerank; None: any exception.
COHERE = ["NotFoundError", "BadRequestError"]
CLIENTS = {
    "langchain": {
        "cohere_v1": COHERE,
        "langchain_cohere": COHERE,
        "llama_index_cohere": COHERE,
        "llama_index_tei": None,
    },
    "litellm": {
        **dict.fromkeys(("litellm_cohere", "litellm_infinity", "litellm_vllm", "litellm_jina"), None),
        "litellm_huggingface": None,
    },
    "others": {
        "cohere_v1": COHERE,
        "cohere_v2": COHERE,
        "cohere_async": COHERE,
        "voyageai": None,
        "infinity": ["UnexpectedStatus", "AttributeError"],  # it returns a 422 as an answer of another kind
        "haystack_cohere": COHERE,
        "haystack_tei": ["none", "none"],  # it reads an error's body as an empty order
    },
}


@pytest.fixture
def served(server: Server) -> Iterator[Server]:
    """A reranker as `m`, whose scores are told apart by the words of the query."""
    server.write_pool(fake("m", task="rerank"), fake("embedder"))
    server.start()
    server.wait_ready()
    yield server
    server.stop()


def ranked(server: Server, documents: list[str]) -> list[tuple[int, float]]:
    answer = server.post("/rerank", {"model": "m", "query": QUERY, "documents": documents})
    return [(entry["index"], entry["score"]) for entry in answer.json()["results"]]


@pytest.mark.parametrize("family", CLIENTS)
def test_clients_that_live_apart(served: Server, family: str) -> None:
    """Unmodified: one document, a hundred with an empty one and one that is too long; and their own exceptions."""

    def answers(client: str) -> dict[str, Any]:
        done = subprocess.run(
            [APART / family / "bin" / "python", RANK, client, served.url],
            input=json.dumps({"query": QUERY, "documents": DOCUMENTS}),
            capture_output=True,
            text=True,
            timeout=180,
            check=False,
        )
        assert done.returncode == 0, f"{client}: {done.stderr[-2000:]}"
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found

    with ThreadPoolExecutor(AT_ONCE) as threads:
        each = [*threads.map(answers, CLIENTS[family])]
    wrong = {}
    for (client, errors), found in zip(CLIENTS[family].items(), each, strict=True):
        for name, documents in {"ranked": DOCUMENTS, "ranked_alone": DOCUMENTS[:1]}.items():
            by_index = dict(ranked(served, documents))
            order = [index for index, _ in found[name]]
            assert sorted(order) == sorted(by_index), client
            scores = [by_index[index] for index in order]
            assert scores == sorted(scores, reverse=True), client
            assert [score for _, score in found[name]] == pytest.approx(scores, abs=1e-6), client
        if found["errors"] != errors if errors else "none" in found["errors"]:
            wrong[client] = found["errors"]
    assert wrong == {}


def body(**more: Any) -> dict[str, Any]:
    return {"model": "m", "query": QUERY, "documents": DOCUMENTS, **more}


def test_those_that_cannot_be_run_here(served: Server) -> None:
    """As they send it: open-webui, which sorts by index itself; Dify, which filters at 0.8; RAGFlow, with booleans as
    words, and in eights to text-embeddings-inference."""
    expected = ranked(served, DOCUMENTS)
    url = f"{served.url}/v1/rerank"  # open-webui is given all of it
    key = {"Authorization": "Bearer "}
    answer = requests.post(url, json=body(top_n=len(DOCUMENTS)), headers=key, timeout=20).json()
    by_index = sorted(answer["results"], key=lambda entry: entry["index"])
    assert [entry["relevance_score"] for entry in by_index] == [score for _, score in sorted(expected)]
    dify = requests.post(
        f"{served.url}/rerank",
        json={"model": "m", "query": "What is the capital?", "documents": ["the capital is here", "no"], "top_n": 2},
        timeout=20,
    ).json()
    assert 0 <= dify["results"][-1]["relevance_score"] < dify["results"][0]["relevance_score"] <= 1
    ragflow = body(return_documents="true", return_len="true", max_chunks_per_doc=1024, overlap_tokens=80)
    answer = served.post("/v1/rerank", ragflow)
    assert answer.headers["X-Embedpool-Ignored"] == "return_len, max_chunks_per_doc, overlap_tokens"
    first = answer.json()["results"][0]
    assert first["document"] == {"text": DOCUMENTS[first["index"]]}
    assert answer.json()["usage"]["total_tokens"] > 0
    eights = []
    for start in range(0, len(DOCUMENTS), 8):
        part = {"query": QUERY, "texts": DOCUMENTS[start : start + 8], "raw_scores": False, "truncate": True}
        eights += [(start + entry["index"], entry["score"]) for entry in served.post("/rerank", part).json()]
    assert dict(eights) == pytest.approx(dict(expected), abs=1e-6)


def test_a_thousand_documents(served: Server) -> None:
    """In one request, each with its score."""
    documents = [f"{document} {i}" for i, document in enumerate(DOCUMENTS * 10)]
    found = ranked(served, documents)
    assert sorted(index for index, _ in found) == list(range(1000))


def test_on_the_command_line(served: Server, tmp_path: Path) -> None:
    """`embedpool rerank` prints lines in their order, of a file or of standard input."""
    file = tmp_path / "documents.txt"
    file.write_text("\n".join(DOCUMENTS[:10]))
    expected = [DOCUMENTS[index] for index, _ in ranked(served, DOCUMENTS[:10])]
    lines = served.cli("rerank", QUERY, str(file)).splitlines()
    assert [line.partition("\t")[2] for line in lines] == expected
    lines = served.cli("rerank", "--model", "m", "--top", "3", "--json", QUERY, stdin=file.read_text()).splitlines()
    assert [json.loads(line)["document"] for line in lines] == expected[:3]


@pytest.mark.long
def test_a_reranker_with_meaning(server: Server, tmp_path: Path) -> None:
    """A trained MiniLM, as its files lie: the passage that a few words were taken from comes first, and scores and
    order are those of CrossEncoder."""
    folder = reranker_folder(tmp_path)
    server.write_pool({"model": "rr", "driver": {"type": "local_st", "config": {"path": str(folder)}}})
    server.start()
    server.wait_ready()
    library = CrossEncoder(str(folder), device="cpu", local_files_only=True)
    unseen = passages(TRAINED_ON + 60)[TRAINED_ON:]
    chance = random.Random(3)
    first = 0
    for i in range(10):
        documents = unseen[i : i + 20]
        query = query_of(documents[7], chance)
        body = {"model": "rr", "query": query, "documents": documents}
        results = server.post("/rerank", body).json()["results"]
        scores = library.predict([(query, document) for document in documents])
        assert [entry["score"] for entry in results] == pytest.approx([scores[e["index"]] for e in results], abs=1e-5)
        assert [entry["score"] for entry in results] == pytest.approx(sorted(scores, reverse=True), abs=1e-5)
        first += results[0]["index"] == 7
    assert first >= 8
