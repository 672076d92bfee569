"""Ask a server's reranker through clients that others wrote: rank.py CLIENT URL, query and documents as JSON on stdin.

Writes JSON: `ranked`, index and score of each document, the best first; `ranked_alone`, the same of the first document
alone; `errors`, the names of the exceptions that an unknown model and an embedder raise.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Callable
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

Ranked = list[tuple[int, float]]
Ask = Callable[[str], Ranked]  # the name of a model → its order
CLIENTS: dict[str, Callable[[str, str, list[str]], Ask]] = {}


def client(make: Callable[[str, str, list[str]], Ask]) -> Callable[[str, str, list[str]], Ask]:
    """Have it found by its name."""
    CLIENTS[make.__name__] = make
    return make


def of(results: Any) -> Ranked:
    return [(one.index, one.relevance_score) for one in results]


@client
def cohere_v1(url: str, query: str, documents: list[str]) -> Ask:
    import cohere

    sdk = cohere.Client(api_key="none", base_url=url)
    return lambda model: of(sdk.rerank(model=model, query=query, documents=documents, return_documents=True).results)


@client
def cohere_v2(url: str, query: str, documents: list[str]) -> Ask:
    import cohere

    sdk = cohere.ClientV2(api_key="none", base_url=url)
    return lambda model: of(sdk.rerank(model=model, query=query, documents=documents, max_tokens_per_doc=4096).results)


@client
def cohere_async(url: str, query: str, documents: list[str]) -> Ask:
    import cohere

    async def ask(model: str) -> Ranked:
        async with cohere.AsyncClientV2(api_key="none", base_url=url) as sdk:
            return of((await sdk.rerank(model=model, query=query, documents=documents)).results)

    return lambda model: asyncio.run(ask(model))


@client
def langchain_cohere(url: str, query: str, documents: list[str]) -> Ask:
    """Sends nulls."""
    from langchain_cohere import CohereRerank

    def ask(model: str) -> Ranked:
        reranker = CohereRerank(base_url=url, cohere_api_key="none", model=model, top_n=None)
        return [(one["index"], one["relevance_score"]) for one in reranker.rerank(documents, query, top_n=None)]

    return ask


def by_llama_index(reranker: Any, query: str, documents: list[str]) -> Ranked:
    from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode

    nodes = [NodeWithScore(node=TextNode(text=text, id_=str(i)), score=0.0) for i, text in enumerate(documents)]
    found = reranker.postprocess_nodes(nodes, query_bundle=QueryBundle(query))
    return [(int(one.node.node_id), one.score) for one in found]


@client
def llama_index_cohere(url: str, query: str, documents: list[str]) -> Ask:
    from llama_index.postprocessor.cohere_rerank import CohereRerank

    def ask(model: str) -> Ranked:
        reranker = CohereRerank(api_key="none", model=model, top_n=len(documents), base_url=url)
        return by_llama_index(reranker, query, documents)

    return ask


@client
def llama_index_tei(url: str, query: str, documents: list[str]) -> Ask:
    from llama_index.postprocessor.tei_rerank import TextEmbeddingInference

    def ask(model: str) -> Ranked:
        reranker = TextEmbeddingInference(top_n=len(documents), base_url=f"{url}/tei/{model}")
        return by_llama_index(reranker, query, documents)

    return ask


@client
def voyageai(url: str, query: str, documents: list[str]) -> Ask:
    import voyageai as voyage

    sdk = voyage.Client(api_key="none", base_url=f"{url}/v1", max_retries=0)
    return lambda model: of(sdk.rerank(query, documents, model=model).results)


@client
def infinity(url: str, query: str, documents: list[str]) -> Ask:
    from infinity_client import Client
    from infinity_client.api.default import rerank
    from infinity_client.models import RerankInput

    def ask(model: str) -> Ranked:
        with Client(base_url=url, raise_on_unexpected_status=True) as connected:
            body = RerankInput(query=query, documents=documents, model=model, return_documents=False)
            return of(rerank.sync(client=connected, body=body).results)

    return ask


def by_litellm(model_of: Callable[[str], str], base: str, query: str, documents: list[str], **more: Any) -> Ask:
    import litellm

    def ask(model: str) -> Ranked:
        given = {"query": query, "documents": documents, "top_n": len(documents), **more}
        found = litellm.rerank(model=model_of(model), api_base=base, api_key="none", **given)
        return [(one["index"], one["relevance_score"]) for one in found.results]

    return ask


@client
def litellm_cohere(url: str, query: str, documents: list[str]) -> Ask:
    return by_litellm(lambda model: f"cohere/{model}", url, query, documents)


@client
def litellm_infinity(url: str, query: str, documents: list[str]) -> Ask:
    """Reads a returned document as a string, where litellm_vllm, on the same path, reads an object."""
    return by_litellm(lambda model: f"infinity/{model}", url, query, documents, return_documents=False)


@client
def litellm_vllm(url: str, query: str, documents: list[str]) -> Ask:
    return by_litellm(lambda model: f"hosted_vllm/{model}", url, query, documents)


@client
def litellm_jina(url: str, query: str, documents: list[str]) -> Ask:
    return by_litellm(lambda model: f"jina_ai/{model}", url, query, documents)


@client
def litellm_huggingface(url: str, query: str, documents: list[str]) -> Ask:
    import litellm

    def ask(model: str) -> Ranked:
        found = litellm.rerank(
            model=f"huggingface/{model}",
            query=query,
            documents=documents,
            api_base=f"{url}/tei/{model}",
            api_key="none",
        )
        return [(one["index"], one["relevance_score"]) for one in found.results]

    return ask


def by_haystack(make: Callable[[str], Any], query: str, documents: list[str]) -> Ask:
    from haystack import Document

    def ask(model: str) -> Ranked:
        ranker = make(model)
        given = [Document(content=text, meta={"at": i}) for i, text in enumerate(documents)]
        return [(one.meta["at"], one.score) for one in ranker.run(query=query, documents=given)["documents"]]

    return ask


@client
def haystack_cohere(url: str, query: str, documents: list[str]) -> Ask:
    from haystack.utils import Secret
    from haystack_integrations.components.rankers.cohere import CohereRanker

    def make(model: str) -> Any:
        key = Secret.from_token("none")
        return CohereRanker(model=model, top_k=len(documents), api_key=key, api_base_url=url)

    return by_haystack(make, query, documents)


@client
def haystack_tei(url: str, query: str, documents: list[str]) -> Ask:
    from haystack_integrations.components.rankers.huggingface_api import HuggingFaceTEIRanker

    def make(model: str) -> Any:
        return HuggingFaceTEIRanker(url=f"{url}/tei/{model}", top_k=len(documents), raw_scores=False)

    return by_haystack(make, query, documents)


def raised(ask: Ask, model: str) -> str:
    try:
        ask(model)
    except Exception as error:
        return type(error).__name__
    return "none"


if __name__ == "__main__":
    given = json.load(sys.stdin)
    ask, ask_of_one = (
        CLIENTS[sys.argv[1]](sys.argv[2], given["query"], documents)
        for documents in (given["documents"], given["documents"][:1])
    )
    errors = [raised(ask, "nobody"), raised(ask, "embedder")]
    json.dump({"ranked": ask("m"), "ranked_alone": ask_of_one("m"), "errors": errors}, sys.stdout)
