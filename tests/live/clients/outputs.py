"""Sparse rows and chunks in context, in the hands of real clients: outputs.py URL < JSON.

Reads the rows of documents and of queries, and chunks; writes what the clients found.
"""

from __future__ import annotations

import json
import sys
import warnings
from typing import Any

warnings.simplefilter("ignore")

import voyageai  # noqa: E402
from chromadb.utils.embedding_functions import JinaEmbeddingFunction  # noqa: E402
from qdrant_client import QdrantClient, models  # noqa: E402

url = sys.argv[1]
given: dict[str, Any] = json.load(sys.stdin)
documents, queries, chunks = given["documents"], given["queries"], given["chunks"]


def qdrant() -> list[dict[str, list[int]]]:
    """Points with a row of each kind; for each query the order by each of them, and by two of them fused."""
    client = QdrantClient(":memory:")
    params = {"distance": models.Distance.DOT}
    maxsim = models.MultiVectorConfig(comparator=models.MultiVectorComparator.MAX_SIM)
    width, wide = len(documents[0]["dense"]), len(documents[0]["multivector"][0])
    client.create_collection(
        "c",
        vectors_config={
            "dense": models.VectorParams(size=width, **params),
            "multivector": models.VectorParams(size=wide, multivector_config=maxsim, **params),
        },
        sparse_vectors_config={"sparse": models.SparseVectorParams()},
    )

    def named(row: dict[str, Any]) -> dict[str, Any]:
        return {**row, "sparse": models.SparseVector(**row["sparse"])}

    client.upsert("c", [models.PointStruct(id=i, vector=named(row)) for i, row in enumerate(documents)])
    found = []
    for query in map(named, queries):
        order = {
            name: [point.id for point in client.query_points("c", query=query[name], using=name, limit=99).points]
            for name in ("dense", "sparse", "multivector")
        }
        prefetch = [models.Prefetch(query=query[name], using=name) for name in ("dense", "sparse")]
        fused = client.query_points(
            "c", prefetch=prefetch, query=models.FusionQuery(fusion=models.Fusion.RRF), limit=99
        )
        found.append({**order, "fused": [point.id for point in fused.points]})
    return found


def voyage() -> dict[str, Any]:
    """Its own shapes: results with embeddings, and with the texts that the server has split."""
    client = voyageai.Client(api_key="none", base_url=f"{url}/v1", max_retries=0)
    whole = client.contextualized_embed(chunks, model="m", input_type="document")
    query = client.contextualized_embed([["a query"]], model="m", input_type="query", output_dimension=64)
    split = client.contextualized_embed(
        [" ".join(chunks[0])], model="m", input_type="document", enable_auto_chunking=True, chunk_size=8
    )
    try:
        client.contextualized_embed([["a"]], model="nobody")
        error = ""
    except Exception as raised:
        error = type(raised).__name__
    return {
        "documents": [result.embeddings for result in whole.results],
        "query": query.results[0].embeddings,
        "split": split.results[0].chunk_texts,
        "split_vectors": len(split.results[0].embeddings),
        "tokens": whole.total_tokens,
        "error": error,
    }


def jina() -> list[list[float]]:
    """Chroma's function for Jina, as it is sent there."""
    function = JinaEmbeddingFunction(api_key="none", model_name="m", late_chunking=True, normalized=True)
    function._api_url = f"{url}/v1/embeddings"
    return [[float(number) for number in vector] for vector in function(chunks[0])]


json.dump({"qdrant": qdrant(), "voyage": voyage(), "jina": jina()}, sys.stdout)
