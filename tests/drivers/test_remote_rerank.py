"""A reranker of another service behind a name here, with the guards that remote embedders have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import marshmallow as ma
import numpy as np
import pytest

from embedpool.config.spec import HttpConfig
from embedpool.drivers.http import HttpDriver
from embedpool.errors import UnsupportedOption, UpstreamError
from embedpool.tasks.item import Batch, Item
from tests.drivers.remote import Remote, Reply, Seen

DOCUMENTS = ["three", "a", "four!"]
PROTOCOLS = {"embedpool": "/", "cohere": "/v2/rerank", "jina": "/rerank", "tei": "/rerank"}


def score(document: str) -> float:
    return 1 / (1 + len(document))


def ranks(seen: Seen) -> Reply:
    """The best first, in the form of the protocol that the body is of."""
    documents = seen.body.get("documents") or seen.body["texts"]
    order = sorted(range(len(documents)), key=lambda i: -score(documents[i]))
    if "texts" in seen.body:
        return Reply([{"index": i, "score": score(documents[i])} for i in order])
    results = [{"index": i, "relevance_score": score(documents[i])} for i in order]
    return Reply({"results": results, "usage": {"total_tokens": 9}, "meta": {"truncated": [0]}})


@pytest.fixture
def opened(remote: Remote, opened: Callable[..., HttpDriver]) -> Callable[..., HttpDriver]:
    remote.answer = ranks
    return lambda **config: opened(**{"task": "rerank", **config})


def run(driver: HttpDriver, *documents: str, query: str = "q", **options: Any) -> Any:
    items = [Item((query, document), 0) for document in documents]
    return driver.run(Batch("rerank", items, {"query": query, **options}))


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_scores_come_back_in_the_order_of_the_documents(
    remote: Remote, opened: Callable[..., HttpDriver], protocol: str
) -> None:
    """Whatever order the service gives them in; the query and the documents go as its API has them."""
    driver = opened(protocol=protocol)
    answer = run(driver, *DOCUMENTS)
    np.testing.assert_allclose(answer.rows.values, [[score(document)] for document in DOCUMENTS], rtol=1e-6)
    (seen,) = remote.seen
    assert seen.path == PROTOCOLS[protocol]
    assert seen.body["query"] == "q"
    assert (seen.body.get("documents") or seen.body["texts"]) == DOCUMENTS
    assert driver.facts.tasks == {"rerank": 1}
    assert (answer.tokens, list(answer.truncated)) == ((None, []) if protocol == "tei" else (9, [0]))
    driver.probe()


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_an_instruction_is_for_services_that_know_it(
    remote: Remote, opened: Callable[..., HttpDriver], protocol: str
) -> None:
    """Another embedpool puts it where its model has it, in the place of its default prompt; others get it as text."""
    run(opened(protocol=protocol), "a", instruction="find: ")
    (seen,) = remote.seen
    if protocol == "embedpool":
        assert (seen.body["query"], seen.body["options"]["instruction"]) == ("q", "find: ")
    else:
        assert seen.body["query"] == "find: q"
        assert "instruction" not in seen.body


@pytest.mark.parametrize(
    "results",
    [
        [{"index": 0, "relevance_score": 0.5}],
        [{"index": 0, "relevance_score": 0.5}, {"index": 0, "relevance_score": 0.4}],
        [{"index": 0, "relevance_score": 0.5}, {"index": 2, "relevance_score": 0.4}],
        [{"index": 0}, {"index": 1, "relevance_score": 0.4}, {"index": 2, "relevance_score": 0.4}],
        "nonsense",
        [],
    ],
    ids=str,
)
def test_an_answer_that_is_none_is_an_error_or_costs_one_document(
    remote: Remote, opened: Callable[..., HttpDriver], results: Any
) -> None:
    """One with too few scores, two for one document, or none for it."""
    driver = opened(protocol="cohere", retries=0)
    remote.answer = lambda seen: Reply({"results": results})
    if isinstance(results, list) and len(results) == 3:
        assert run(driver, *DOCUMENTS[:3]).rows.finite().tolist() == [False, True, True]
    else:
        with pytest.raises(UpstreamError):
            run(driver, *DOCUMENTS[:2])


def test_another_model_behind_the_address_is_noticed(remote: Remote, opened: Callable[..., HttpDriver]) -> None:
    """By the scores of known documents."""
    driver = opened(protocol="jina")

    def others(seen: Seen) -> Reply:
        count = len(seen.body["documents"])
        return Reply({"results": [{"index": i, "relevance_score": 0.9 - 0.3 * (i % 2)} for i in range(count)]})

    remote.answer = others
    with pytest.raises(UpstreamError, match="it gives other vectors than"):
        driver.probe()


def test_what_a_service_is_told_of_long_documents(remote: Remote, opened: Callable[..., HttpDriver]) -> None:
    """Where it can be told."""
    for protocol, name in (("jina", "truncation"), ("tei", "truncate")):
        driver = opened(protocol=protocol)
        for options, cuts in (({}, True), ({"truncate": "error"}, False)):
            remote.seen.clear()
            run(driver, "a", **options)
            assert remote.seen[0].body[name] is cuts
    with pytest.raises(UnsupportedOption, match="truncate"):
        run(opened(protocol="cohere"), "a", truncate="error")
    for protocol in ("cohere", "jina", "tei"):
        with pytest.raises(UnsupportedOption, match="truncate"):
            run(opened(protocol=protocol), "a", truncate="left")
    driver = opened(protocol="embedpool")
    run(driver, "a", truncate="error")
    assert remote.seen[-1].body["options"] == {"truncate": "error", "on_error": "partial"}
    for protocol, name in (("cohere", "max_tokens_per_doc"), ("jina", "max_doc_length")):
        run(opened(protocol=protocol), "a", max_tokens_per_doc=7)
        assert remote.seen[-1].body[name] == 7
    with pytest.raises(UnsupportedOption, match="max_tokens_per_doc"):
        run(opened(protocol="tei"), "a", max_tokens_per_doc=7)


def test_a_document_that_fails_there_fails_alone(remote: Remote, opened: Callable[..., HttpDriver]) -> None:
    """Another embedpool names it; where no document is at fault the call fails, and others may serve it."""
    error = {"index": 1, "code": "inference_failed", "message": "no", "at_fault": True}
    results = [{"index": 2, "relevance_score": 0.5}, {"index": 0, "relevance_score": 0.4}]
    driver = opened(protocol="embedpool", retries=0)
    remote.answer = lambda seen: Reply({"results": results, "errors": [error]})
    answer = run(driver, *DOCUMENTS)
    np.testing.assert_allclose(answer.rows.values[[0, 2]], [[0.4], [0.5]], rtol=1e-6)
    assert list(answer.errors) == [1]
    remote.answer = lambda seen: Reply({"results": results, "errors": [{**error, "at_fault": False}]})
    with pytest.raises(UpstreamError, match="inference_failed"):
        run(driver, *DOCUMENTS)


def test_a_protocol_without_reranking_is_refused() -> None:
    """When it is registered."""
    with pytest.raises(ma.ValidationError, match="of task rerank is one of embedpool, cohere, jina, tei"):
        HttpConfig(base_url="http://h", task="rerank", protocol="openai")
