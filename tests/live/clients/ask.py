"""Ask a server through one of the clients of requirements.txt: ask.py CLIENT URL, texts as JSON on standard input.

Writes JSON: `one`, the vector of the first text; `all`, the vectors of all; `errors`, the names of the exceptions that
an unknown model and a bad request raise. `langchain_by_default` writes `error`, the name and text of what it raises.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any


def langchain(url: str, texts: list[str]) -> dict[str, Any]:
    from langchain_openai import OpenAIEmbeddings

    def client(model: str, **settings: Any) -> OpenAIEmbeddings:
        return OpenAIEmbeddings(model=model, base_url=f"{url}/v1", api_key="none", max_retries=0, **settings)

    embeddings = client("m", check_embedding_ctx_length=False)
    small = client("m", check_embedding_ctx_length=False, dimensions=10_000)
    return {
        "one": embeddings.embed_query(texts[0]),
        "all": embeddings.embed_documents(texts),
        "errors": raised(
            lambda: client("nobody", check_embedding_ctx_length=False).embed_query("a"), lambda: small.embed_query("a")
        ),
    }


def langchain_by_default(url: str, texts: list[str]) -> dict[str, Any]:
    """It sends token ids; llama-index brings the tokenizer's file, which tiktoken would fetch."""
    os.environ["TIKTOKEN_CACHE_DIR"] = str(Path(find_spec("llama_index.core").origin).parent / "_static/tiktoken_cache")
    from langchain_openai import OpenAIEmbeddings

    try:
        OpenAIEmbeddings(model="m", base_url=f"{url}/v1", api_key="none", max_retries=0).embed_documents(texts)
    except Exception as error:
        return {"error": [type(error).__name__, str(error)]}
    return {"error": ["none", ""]}


def llama_index(url: str, texts: list[str]) -> dict[str, Any]:
    from llama_index.embeddings.openai import OpenAIEmbedding

    def client(model: str, **settings: Any) -> OpenAIEmbedding:
        return OpenAIEmbedding(model_name=model, api_base=f"{url}/v1", api_key="none", max_retries=0, **settings)

    embeddings = client("m")
    return {
        "one": embeddings.get_query_embedding(texts[0]),
        "all": embeddings.get_text_embedding_batch(texts),
        "errors": raised(
            lambda: client("nobody").get_query_embedding("a"),
            lambda: client("m", dimensions=10_000).get_query_embedding("a"),
        ),
    }


def tei(url: str, texts: list[str]) -> dict[str, Any]:
    from llama_index.embeddings.text_embeddings_inference import TextEmbeddingsInference

    def client(model: str, **settings: Any) -> TextEmbeddingsInference:
        settings = {"query_instruction": "", "text_instruction": "", **settings}
        return TextEmbeddingsInference(model_name=model, base_url=f"{url}/tei/{model}", **settings)

    embeddings = client("m")
    return {
        "one": embeddings.get_query_embedding(texts[0]),
        "all": embeddings.get_text_embedding_batch(texts),
        "errors": raised(
            lambda: client("nobody").get_query_embedding("a"),
            lambda: client("m", truncate_text=False).get_query_embedding("word " * 600),
        ),
    }


def infinity(url: str, texts: list[str]) -> dict[str, Any]:
    from infinity_client import Client
    from infinity_client.api.default import embeddings
    from infinity_client.models import OpenAIEmbeddingInputText

    def vectors(given: Any, model: str = "m", **fields: Any) -> list[Any]:
        body = OpenAIEmbeddingInputText(input_=given, model=model, **fields)
        with Client(base_url=url, raise_on_unexpected_status=True) as client:
            return [entry.embedding for entry in embeddings.sync(client=client, body=body).data]

    return {
        "one": vectors(texts[0])[0],
        "all": vectors(texts),
        "errors": raised(lambda: vectors("a", "nobody"), lambda: vectors("a", dimensions=10_000)),
    }


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


if __name__ == "__main__":
    name, address = sys.argv[1:]
    json.dump(globals()[name](address, json.load(sys.stdin)), sys.stdout)
