"""Ask a server through clients that others wrote: ask.py CLIENT URL, texts as JSON on standard input.

Writes JSON: `one`, the vector of the first text; `all`, the vectors of all; `errors`, the names of the exceptions that
an unknown model and, where the client can be made to send one, a bad request raise.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # none of them needs to look there, and some do

Found = dict[str, Any]

CLIENTS: dict[str, Callable[[str, list[str]], Found]] = {}


def client(function: Callable[[str, list[str]], Found]) -> Callable[[str, list[str]], Found]:
    """Have it found by its name."""
    CLIENTS[function.__name__] = function
    return function


def raised(*calls: Callable[[], object]) -> list[str]:
    """The name of the exception that each call raises."""
    found = []
    for call in calls:
        try:
            call()
        except Exception as error:
            found.append(type(error).__name__)
        else:
            found.append("none")
    return found


def by_interface(one: str, many: str, many_async: str) -> Callable[..., Found]:
    """Of a framework that has one interface for all its clients, blocking and asynchronous: its methods' names."""

    def ask(make: Callable[..., Any], texts: list[str], *bad: Callable[[], object]) -> Found:
        embeddings = make("m")
        return {
            "one": getattr(embeddings, one)(texts[0]),
            "all": getattr(embeddings, many)(texts),
            "more": asyncio.run(getattr(make("m"), many_async)(texts)),
            "errors": raised(lambda: getattr(make("nobody"), one)("a"), *bad),
        }

    return ask


# --- LangChain


by_langchain = by_interface("embed_query", "embed_documents", "aembed_documents")


@client
def langchain_openai(url: str, texts: list[str]) -> Found:
    from langchain_openai import OpenAIEmbeddings

    def make(model: str, **settings: Any) -> OpenAIEmbeddings:
        settings = {"check_embedding_ctx_length": False, "max_retries": 0, **settings}
        return OpenAIEmbeddings(model=model, base_url=f"{url}/v1", api_key="none", **settings)

    return by_langchain(make, texts, lambda: make("m", dimensions=10_000).embed_query("a"))


@client
def langchain_openai_as_it_comes(url: str, texts: list[str]) -> Found:
    """It sends token ids; llama-index brings the tokenizer's file, which tiktoken would fetch."""
    os.environ["TIKTOKEN_CACHE_DIR"] = str(Path(find_spec("llama_index.core").origin).parent / "_static/tiktoken_cache")
    from langchain_openai import OpenAIEmbeddings

    return by_langchain(lambda model: OpenAIEmbeddings(model=model, base_url=f"{url}/v1", api_key="none"), texts)


@client
def langchain_azure(url: str, texts: list[str]) -> Found:
    from langchain_openai import AzureOpenAIEmbeddings

    def make(model: str) -> AzureOpenAIEmbeddings:
        return AzureOpenAIEmbeddings(
            model=model, azure_endpoint=url, api_version="2024-10-21", api_key="none", max_retries=0,
            check_embedding_ctx_length=False,
        )  # fmt: skip

    return by_langchain(make, texts)


@client
def langchain_ollama(url: str, texts: list[str]) -> Found:
    from langchain_ollama import OllamaEmbeddings

    def make(model: str) -> OllamaEmbeddings:
        return OllamaEmbeddings(model=model, base_url=url, validate_model_on_init=model == "m")

    assert make("m").embed_documents([]) == []
    return by_langchain(make, texts)


@client
def langchain_cohere(url: str, texts: list[str]) -> Found:
    from langchain_cohere import CohereEmbeddings

    return by_langchain(lambda model: CohereEmbeddings(model=model, base_url=url, cohere_api_key="none"), texts)


@client
def langchain_mistralai(url: str, texts: list[str]) -> Found:
    from langchain_mistralai import MistralAIEmbeddings

    def make(model: str) -> MistralAIEmbeddings:
        return MistralAIEmbeddings(model=model, endpoint=f"{url}/v1/", api_key="none", max_retries=1)

    return by_langchain(make, texts)


@client
def langchain_nvidia(url: str, texts: list[str]) -> Found:
    from langchain_nvidia_ai_endpoints import NVIDIAEmbeddings

    def make(model: str) -> NVIDIAEmbeddings:
        return NVIDIAEmbeddings(model=model, base_url=f"{url}/v1", api_key="none")

    return by_langchain(make, texts)


@client
def langchain_infinity(url: str, texts: list[str]) -> Found:
    from langchain_community.embeddings import InfinityEmbeddings

    def make(model: str) -> InfinityEmbeddings:
        return InfinityEmbeddings(model=model, infinity_api_url=url)

    make("m").embed_documents([f"{text} {i}" for i, text in enumerate((texts * 7)[:2000])])  # at once, in parts
    return by_langchain(make, texts)


@client
def langchain_standard(url: str, texts: list[str]) -> Found:
    """langchain-tests' own suites for embeddings, on three integrations."""
    import subprocess

    suites = []
    for name, arguments in (
        ("langchain_openai.OpenAIEmbeddings", {"base_url": f"{url}/v1", "api_key": "none"}),
        ("langchain_ollama.OllamaEmbeddings", {"base_url": url}),
        ("langchain_cohere.CohereEmbeddings", {"base_url": url, "cohere_api_key": "none"}),
    ):
        module, _, cls = name.rpartition(".")
        given = {"model": "m", **arguments, **({"check_embedding_ctx_length": False} if "OpenAI" in cls else {})}
        suites.append(
            f"from {module} import {cls}\n"
            f"class Test{cls}(EmbeddingsIntegrationTests):\n"
            f"    embeddings_class = {cls}\n    embedding_model_params = {given!r}\n"
            f"class TestUnit{cls}(EmbeddingsUnitTests):\n"
            f"    embeddings_class = {cls}\n    embedding_model_params = {given!r}\n"
        )
    head = "from langchain_tests.integration_tests import EmbeddingsIntegrationTests\n"
    head += "from langchain_tests.unit_tests import EmbeddingsUnitTests\n"
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "test_standard.py").write_text(head + "\n".join(suites))
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--asyncio-mode=auto", folder]
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)
    return {"errors": [done.stdout[-2000:]] if done.returncode else []}


# --- LlamaIndex


by_llama_index = by_interface("get_query_embedding", "get_text_embedding_batch", "aget_text_embedding_batch")


@client
def llama_index_openai(url: str, texts: list[str]) -> Found:
    from llama_index.embeddings.openai import OpenAIEmbedding

    def make(model: str, **settings: Any) -> OpenAIEmbedding:
        return OpenAIEmbedding(model_name=model, api_base=f"{url}/v1", api_key="none", max_retries=0, **settings)

    return by_llama_index(make, texts, lambda: make("m", dimensions=10_000).get_query_embedding("a"))


@client
def llama_index_openai_like(url: str, texts: list[str]) -> Found:
    from llama_index.embeddings.openai_like import OpenAILikeEmbedding

    def make(model: str) -> OpenAILikeEmbedding:
        return OpenAILikeEmbedding(model_name=model, api_base=f"{url}/v1", api_key="none", max_retries=0)

    return by_llama_index(make, texts)


@client
def llama_index_tei(url: str, texts: list[str]) -> Found:
    from llama_index.embeddings.text_embeddings_inference import TextEmbeddingsInference

    def make(model: str, **settings: Any) -> TextEmbeddingsInference:
        settings = {"query_instruction": "", "text_instruction": "", **settings}
        return TextEmbeddingsInference(model_name=model, base_url=f"{url}/tei/{model}", **settings)

    many = [f"{text} {i}" for i, text in enumerate((texts * 7)[:2000])]  # sent at once, in parts of ten
    assert len(asyncio.run(make("m").aget_text_embedding_batch(many))) == len(many)
    return by_llama_index(
        make, texts, lambda: make("m", truncate_text=False).get_query_embedding("word " * 600)
    )  # it does not look at the status


@client
def llama_index_ollama(url: str, texts: list[str]) -> Found:
    from llama_index.embeddings.ollama import OllamaEmbedding

    return by_llama_index(lambda model: OllamaEmbedding(model_name=model, base_url=url), texts)


# --- LiteLLM


def by_litellm(texts: list[str], prefix: str, model: str = "m", **settings: Any) -> Found:
    import litellm

    litellm.suppress_debug_info = True

    def vectors(given: Any, name: str = model, **more: Any) -> list[Any]:
        answer = litellm.embedding(
            model=f"{prefix}/{name}", input=given, api_key="none", max_retries=0, **{**settings, **more}
        )
        return [entry["embedding"] for entry in answer.data]

    return {"one": vectors(texts[:1])[0], "all": vectors(texts), "errors": raised(lambda: vectors(["a"], "nobody"))}


@client
def litellm_openai(url: str, texts: list[str]) -> Found:
    return by_litellm(texts, "openai", api_base=f"{url}/v1")


@client
def litellm_cohere(url: str, texts: list[str]) -> Found:
    return by_litellm(texts, "cohere", api_base=f"{url}/v2/embed")


@client
def litellm_ollama(url: str, texts: list[str]) -> Found:
    return by_litellm(texts, "ollama", api_base=url)


@client
def litellm_infinity(url: str, texts: list[str]) -> Found:
    return by_litellm(texts, "infinity", api_base=url)


@client
def litellm_hosted_vllm(url: str, texts: list[str]) -> Found:
    return by_litellm(texts, "hosted_vllm", api_base=f"{url}/v1")


@client
def litellm_huggingface(url: str, texts: list[str]) -> Found:
    return by_litellm(texts, "huggingface", api_base=f"{url}/tei/m", input_type="embed")


@client
def litellm_voyage(url: str, texts: list[str]) -> Found:
    return by_litellm(texts, "voyage", api_base=f"{url}/v1/embeddings")


@client
def litellm_azure(url: str, texts: list[str]) -> Found:
    return by_litellm(texts, "azure", api_base=url, api_version="2024-10-21")


# --- Haystack


def by_haystack(text: Callable[..., Any], documents: Callable[..., Any], texts: list[str]) -> Found:
    from haystack import Document

    def all_of(given: list[str]) -> list[Any]:
        return [d.embedding for d in documents("m").run([Document(content=t) for t in given])["documents"]]

    errors = raised(lambda: text("nobody").run("a"))
    return {"one": text("m").run(texts[0])["embedding"], "all": all_of(texts), "errors": errors}


@client
def haystack_openai(url: str, texts: list[str]) -> Found:
    from haystack.components.embedders import OpenAIDocumentEmbedder, OpenAITextEmbedder
    from haystack.utils import Secret

    def of(kind: Any) -> Callable[[str], Any]:
        settings = {"api_base_url": f"{url}/v1", "api_key": Secret.from_token("none"), "max_retries": 0}
        return lambda model: kind(model=model, **settings)

    return by_haystack(of(OpenAITextEmbedder), of(OpenAIDocumentEmbedder), texts)


@client
def haystack_tei(url: str, texts: list[str]) -> Found:
    os.environ["HF_HUB_OFFLINE"] = "0"  # else it speaks to nobody
    from haystack_integrations.components.embedders.huggingface_api import (
        HuggingFaceAPIDocumentEmbedder,
        HuggingFaceAPITextEmbedder,
    )

    def of(kind: Any) -> Callable[[str], Any]:
        return lambda model: kind(
            api_type="text_embeddings_inference", api_params={"url": f"{url}/tei/{model}"}, token=None
        )

    return by_haystack(of(HuggingFaceAPITextEmbedder), of(HuggingFaceAPIDocumentEmbedder), texts)


@client
def haystack_cohere(url: str, texts: list[str]) -> Found:
    from haystack.utils import Secret
    from haystack_integrations.components.embedders.cohere import CohereDocumentEmbedder, CohereTextEmbedder

    def of(kind: Any) -> Callable[[str], Any]:
        return lambda model: kind(model=model, api_base_url=url, api_key=Secret.from_token("none"))

    return by_haystack(of(CohereTextEmbedder), of(CohereDocumentEmbedder), texts)


@client
def haystack_ollama(url: str, texts: list[str]) -> Found:
    from haystack_integrations.components.embedders.ollama import OllamaDocumentEmbedder, OllamaTextEmbedder

    def of(kind: Any) -> Callable[[str], Any]:
        return lambda model: kind(model=model, url=url)

    return by_haystack(of(OllamaTextEmbedder), of(OllamaDocumentEmbedder), texts)


# --- Chroma


def by_chroma(make: Callable[[str], Any], texts: list[str]) -> Found:
    """Also through a collection that is added to and queried."""
    import chromadb

    function = make("m")
    collection = chromadb.EphemeralClient().create_collection("texts", embedding_function=function)
    collection.add(ids=[str(i) for i in range(20)], documents=texts[:20])
    assert collection.query(query_texts=[texts[3]], n_results=1)["ids"] == [["3"]]
    found = [[float(x) for x in vector] for vector in function(texts)]
    return {
        "one": [float(x) for x in function(texts[:1])[0]],
        "all": found,
        "errors": raised(lambda: make("no")(["a"])),
    }


@client
def chroma_openai(url: str, texts: list[str]) -> Found:
    from chromadb.utils.embedding_functions import OpenAIEmbeddingFunction

    return by_chroma(
        lambda model: OpenAIEmbeddingFunction(api_key="none", api_base=f"{url}/v1", model_name=model), texts
    )


@client
def chroma_ollama(url: str, texts: list[str]) -> Found:
    from chromadb.utils.embedding_functions import OllamaEmbeddingFunction

    return by_chroma(lambda model: OllamaEmbeddingFunction(url=url, model_name=model), texts)


@client
def chroma_huggingface_server(url: str, texts: list[str]) -> Found:
    from chromadb.utils.embedding_functions import HuggingFaceEmbeddingServer

    return by_chroma(lambda model: HuggingFaceEmbeddingServer(url=f"{url}/tei/{model}"), texts)


@client
def chroma_cohere(url: str, texts: list[str]) -> Found:
    os.environ["CO_API_URL"] = url
    from chromadb.utils.embedding_functions import CohereEmbeddingFunction

    return by_chroma(lambda model: CohereEmbeddingFunction(api_key="none", model_name=model), texts)


# --- others


@client
def infinity(url: str, texts: list[str]) -> Found:
    from infinity_client import Client
    from infinity_client.api.default import embeddings, models
    from infinity_client.models import OpenAIEmbeddingInputText

    def vectors(given: Any, model: str = "m", **fields: Any) -> list[Any]:
        body = OpenAIEmbeddingInputText(input_=given, model=model, **fields)
        with Client(base_url=url, raise_on_unexpected_status=True) as connected:
            return [entry.embedding for entry in embeddings.sync(client=connected, body=body).data]

    with Client(base_url=url, raise_on_unexpected_status=True) as connected:
        assert "m" in [model.id for model in models.sync(client=connected).data]
    return {
        "one": vectors(texts[0])[0],
        "all": vectors(texts),
        "errors": raised(lambda: vectors("a", "nobody"), lambda: vectors("a", dimensions=10_000)),
    }


@client
def voyageai(url: str, texts: list[str]) -> Found:
    """Its errors are its own, by `detail`."""
    import voyageai as voyage

    sdk = voyage.Client(api_key="none", base_url=f"{url}/v1", max_retries=0)

    def vectors(given: list[str], model: str = "m", **fields: Any) -> list[Any]:
        return sdk.embed(given, model=model, **fields).embeddings

    return {
        "one": vectors(texts[:1], input_type="query")[0],
        "all": vectors(texts),
        "errors": raised(lambda: vectors(["a"], "nobody"), lambda: vectors(["a"], output_dimension=100_000)),
    }


@client
def azure(url: str, texts: list[str]) -> Found:
    from openai import AzureOpenAI

    sdk = AzureOpenAI(azure_endpoint=url, api_key="none", api_version="2024-10-21", max_retries=0)

    def vectors(given: list[str], model: str = "m") -> list[Any]:
        return [entry.embedding for entry in sdk.embeddings.create(model=model, input=given).data]

    return {"one": vectors(texts[:1])[0], "all": vectors(texts), "errors": raised(lambda: vectors(["a"], "nobody"))}


@client
def cohere_many(url: str, texts: list[str]) -> Found:
    """Its first version splits and sends at once: 5,000 texts by 64 threads."""
    import cohere

    sdk = cohere.Client(api_key="none", base_url=url)
    many = [f"{text} {i}" for i, text in enumerate((texts * 17)[:5000])]
    found = sdk.embed(texts=many, model="m", input_type="search_document").embeddings
    assert len(found) == len(many)
    names = [model.name for model in cohere.ClientV2(api_key="none", base_url=url).models.list().models]
    assert "m" in names
    one = sdk.embed(texts=texts, model="m").embeddings
    return {"one": one[0], "all": one, "errors": raised(lambda: sdk.embed(texts=["a"], model="nobody"))}


@client
def agno(url: str, texts: list[str]) -> Found:
    from agno.knowledge.embedder.ollama import OllamaEmbedder
    from agno.knowledge.embedder.openai import OpenAIEmbedder

    def make(model: str) -> OpenAIEmbedder:
        return OpenAIEmbedder(id=model, base_url=f"{url}/v1", api_key="none", dimensions=384)

    ollamas = OllamaEmbedder(id="m", host=url, dimensions=384).get_embedding(texts[0])
    return {"one": ollamas, "all": [make("m").get_embedding(text) for text in texts], "errors": []}


@client
def llm_ollama(url: str, texts: list[str]) -> Found:
    """It lists models that can embed; names of one model are one."""
    os.environ["OLLAMA_HOST"] = url
    os.environ["LLM_USER_PATH"] = tempfile.mkdtemp()
    import llm

    model = next(m.model for m in llm.get_embedding_models_with_aliases() if "Ollama" in type(m.model).__name__)
    return {"one": model.embed(texts[0]), "all": list(model.embed_multi(texts)), "errors": []}


@client
def semantic_kernel(url: str, texts: list[str]) -> Found:
    from openai import AsyncOpenAI
    from semantic_kernel.connectors.ai.open_ai import OpenAITextEmbedding

    async def vectors(given: list[str], model: str = "m") -> list[Any]:
        sdk = AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        found = await OpenAITextEmbedding(ai_model_id=model, async_client=sdk).generate_embeddings(given)
        return found.tolist()

    errors = raised(lambda: asyncio.run(vectors(["a"], "nobody")))
    return {"one": asyncio.run(vectors(texts[:1]))[0], "all": asyncio.run(vectors(texts)), "errors": errors}


@client
def mistralai(url: str, texts: list[str]) -> Found:
    try:
        from mistralai.client import Mistral
    except ImportError:
        from mistralai import Mistral

    sdk = Mistral(api_key="none", server_url=url)

    def vectors(given: list[str], model: str = "m") -> list[Any]:
        return [entry.embedding for entry in sdk.embeddings.create(model=model, inputs=given).data]

    return {"one": vectors(texts[:1])[0], "all": vectors(texts), "errors": raised(lambda: vectors(["a"], "nobody"))}


@client
def together(url: str, texts: list[str]) -> Found:
    from together import Together

    sdk = Together(api_key="none", base_url=url, max_retries=0)

    def vectors(given: list[str], model: str = "m") -> list[Any]:
        return [entry.embedding for entry in sdk.embeddings.create(model=model, input=given).data]

    return {"one": vectors(texts[:1])[0], "all": vectors(texts), "errors": raised(lambda: vectors(["a"], "nobody"))}


@client
def baseten(url: str, texts: list[str]) -> Found:
    from baseten_performance_client import PerformanceClient

    sdk = PerformanceClient(base_url=url, api_key="none")

    def vectors(given: list[str], model: str = "m") -> list[Any]:
        return sdk.embed(input=given, model=model).numpy().tolist()

    return {"one": vectors(texts[:1])[0], "all": vectors(texts), "errors": raised(lambda: vectors(["a"], "nobody"))}


if __name__ == "__main__":
    name, address = sys.argv[1:]
    asked = json.load(sys.stdin)
    out, sys.stdout = sys.stdout, sys.stderr  # some clients print
    found = CLIENTS[name](address, asked)
    json.dump(found, out)
