"""Rerank, score and classify: our own answers, and those that the clients of others read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from embedpool.client import Client
from embedpool.config.settings import Limits, Settings
from tests.web.conftest import MakeWeb, Web

RERANKER = "model: rr, alias: r, driver: {type: fake, config: {task: rerank}}"
CLASSIFIER = "model: cl, driver: {type: fake, config: {task: classify}}"
EMBEDDER = "model: em"
KINDS = {"rr": "rerank", "cl": "classify", "em": "embed"}
QUERY = "red fox"
DOCUMENTS = ["blue", "a red fox", "the fox", "", "a red fox"]
BEST_FIRST = [1, 4, 2, 3, 0]


@pytest.fixture
def web(make_web: MakeWeb) -> Web:
    return make_web(RERANKER, CLASSIFIER, EMBEDDER)


def refused(answer: Any, status: int, code: str) -> dict[str, Any]:
    assert (answer.status_code, answer.json["error"]["code"]) == (status, code)
    found: dict[str, Any] = answer.json["error"]
    return found


def order(results: list[dict[str, Any]]) -> list[int]:
    return [entry["index"] for entry in results]


def body(**more: Any) -> dict[str, Any]:
    return {"model": "rr", "query": QUERY, "documents": DOCUMENTS, **more}


def test_rerank(web: Web) -> None:
    """The best first, those alike in the order of the request, with what is known of the work."""
    answer = web.post("/rerank", body())
    assert answer.status_code == 200
    document = answer.json
    assert order(document["results"])[2:] == BEST_FIRST[2:]
    assert set(order(document["results"])[:2]) == {1, 4}
    assert order(document["results"])[:2] == [1, 4]  # equal pairs
    for entry in document["results"]:
        assert 0 <= entry["score"] == entry["relevance_score"] <= 1
        assert set(entry) == {"index", "score", "relevance_score"}
    assert (document["model"], document["object"]) == ("rr", "rerank")
    tokens = sum(3 + 2 + len(text.split()) for text in DOCUMENTS)
    assert document["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}
    assert document["meta"]["count"] == 5
    assert document["meta"]["tokens"] == {"input_tokens": tokens, "output_tokens": 0}
    assert answer.headers["X-Embedpool-Space"] == web.status("rr")["space"]


@pytest.mark.parametrize(
    ("top", "count"), [({}, 5), ({"top_n": None}, 5), ({"top_n": 0}, 5), ({"top_n": 2}, 2), ({"top_n": 99}, 5)], ids=str
)
def test_as_many_as_were_asked_for(web: Web, top: dict[str, Any], count: int) -> None:
    """All of them for none, null, 0, and more than there are."""
    assert order(web.post("/rerank", body(**top)).json["results"]) == BEST_FIRST[:count]
    refused(web.post("/rerank", body(top_n=-1)), 422, "validation_error")


def test_documents_in_all_forms(web: Web) -> None:
    """Texts and objects mixed: text, content, parts, chosen fields, or whatever texts there are. They come back."""
    given = [
        "a red fox",
        {"text": "a red fox"},
        {"content": "a red fox"},
        {"content": [{"type": "text", "text": "a red fox"}]},
        {"title": "a red", "n": 1, "body": "fox"},
    ]
    results = web.post("/rerank", body(documents=given, return_documents="true", raw_scores=True)).json["results"]
    assert max(entry["score"] for entry in results) - min(entry["score"] for entry in results) < 0.1
    by_index = {entry["index"]: entry["document"] for entry in results}
    assert by_index == dict(enumerate([{"text": "a red fox"}, *given[1:]]))
    fields = web.post("/v1/rerank", body(documents=[{"a": "blue", "b": QUERY}], rank_fields=["a"])).json["results"]
    assert fields[0]["relevance_score"] < 0.1
    error = refused(web.post("/rerank", body(documents=["a", 7])), 422, "validation_error")
    assert list(error["fields"]) == ["documents[1]"]


@pytest.mark.parametrize("path", ["/rerank", "/v1/rerank", "/v2/rerank", "/reranking", "/v1/reranking", "/v3/rerank"])
def test_every_path_gives_the_same_order(web: Web, path: str) -> None:
    """With nulls as clients send them, and fields that it does not know, which are named."""
    answer = web.post(path, body(top_n=None, max_tokens_per_doc=None, max_chunks_per_doc=10))
    assert order(answer.json["results"]) == BEST_FIRST
    assert answer.headers["X-Embedpool-Ignored"] == "max_chunks_per_doc"
    assert "document" not in answer.json["results"][0]


def test_cohere(web: Web) -> None:
    """What its SDK reads: a meta with search units, and errors as a message."""
    for path, version in (("/v1/rerank", "1"), ("/v2/rerank", "2")):
        meta = web.post(path, body(documents=DOCUMENTS * 30)).json["meta"]
        assert meta["api_version"] == {"version": version}
        assert meta["billed_units"] == {"search_units": 2}
    answer = web.post("/v2/rerank", body(model="nobody"))
    assert (answer.status_code, set(answer.json)) == (404, {"id", "message"})


def test_voyage(web: Web) -> None:
    """It is told by `top_k`, even null: `data` stands for `results`, and documents are texts."""
    answer = web.post("/v1/rerank", body(top_k=None, truncation=True)).json
    assert order(answer["data"]) == BEST_FIRST
    assert "results" not in answer
    assert web.post("/v1/rerank", body(top_k=1, return_documents=True)).json["data"][0]["document"] == DOCUMENTS[1]
    both = web.post("/v1/rerank", body(truncation=True)).json
    assert both["data"] == both["results"]


def test_errors_have_what_each_client_reads(web: Web) -> None:
    """`error`, `message` and `detail` together."""
    answer = web.post("/v1/rerank", body(model="em"))
    assert answer.status_code == 400
    says = "'em' cannot rerank; it can embed; models that can: rr"
    assert answer.json["detail"] == answer.json["message"] == answer.json["error"]["message"] == says
    for path in ("/rerank", "/score", "/classify"):
        answer = web.post(path, {"model": "nobody", "query": "a", "documents": ["a"], "queries": "a", "input": "a"})
        assert answer.status_code == 404
        assert answer.json["detail"] == answer.json["message"] == answer.json["error"]["message"]


def test_tei(web: Web) -> None:
    """Below the model's URL, at it, and at the root of the host: a bare list, the best first."""
    given = {"query": QUERY, "texts": DOCUMENTS}
    for path in ("/tei/rr/rerank", "/tei/r", "/rerank"):
        assert order(web.post(path, given).json) == BEST_FIRST
    answer = web.post(
        "/tei/rr/rerank", {**given, "return_text": True, "raw_scores": True, "truncation_direction": "Left"}
    )
    assert answer.json[0]["text"] == DOCUMENTS[1]
    assert answer.json[0]["score"] > 1
    assert "x-compute-tokens" in answer.headers
    answer = web.post("/tei/em/rerank", given)
    assert (answer.status_code, answer.json["error_type"]) == (424, "Backend")
    assert "models that can: rr" in answer.json["error"]
    assert web.post("/tei/rr/rerank", {**given, "texts": []}).json["error_type"] == "Empty"
    assert list(web.get("/tei/rr/info").json["model_type"]) == ["reranker"]
    assert web.get("/tei/cl/info").json["model_type"]["classifier"]["id2label"]["2"] == "label 2"


@pytest.mark.parametrize(
    ("inputs", "count"),
    [("a", None), (["a"], None), (["a", "b"], None), ([["a"], ["a", "b"]], 2), ([["a"]], 1)],
    ids=str,
)
def test_tei_predict(web: Web, inputs: Any, count: int | None) -> None:
    """A text, a pair, or a list of such: all labels, the best first."""
    found = web.post("/tei/cl/predict", {"inputs": inputs}).json
    for row in [found] if count is None else found:
        assert len(row) == 3
        assert [entry["score"] for entry in row] == sorted((entry["score"] for entry in row), reverse=True)
        assert sum(entry["score"] for entry in row) == pytest.approx(1, abs=1e-5)
    assert count is None or len(found) == count
    assert web.post("/tei/cl/predict", {"inputs": ["a", "b", "c"]}).status_code == 422
    assert web.post("/tei/rr/predict", {"inputs": ["a", "b"]}).json[0]["label"] == "label 0"


def test_score(web: Web) -> None:
    """In the order of the request, one to one or one to many, in each of vLLM's words."""
    ranked = {entry["index"]: entry["score"] for entry in web.post("/rerank", body()).json["results"]}
    for first, second in (("queries", "documents"), ("queries", "items"), ("text_1", "text_2"), ("data_1", "data_2")):
        for path in ("/score", "/v1/score"):
            for queries in (QUERY, [QUERY], [QUERY] * len(DOCUMENTS)):
                data = web.post(path, {"model": "rr", first: queries, second: DOCUMENTS}).json["data"]
                assert {entry["index"]: entry["score"] for entry in data} == ranked
                assert order(data) == list(range(len(DOCUMENTS)))
    refused(web.post("/score", {"model": "rr", "queries": ["a", "b"], "documents": ["a"] * 3}), 422, "validation_error")
    refused(web.post("/score", {"model": "rr", "queries": "a"}), 422, "validation_error")


def test_the_first_text_has_the_limit_of_all(make_web: MakeWeb) -> None:
    """On every route that compares one text with others."""
    web = make_web(RERANKER, EMBEDDER, settings=Settings(limits=Limits(max_chars_per_text=20)))
    long = "a" * 21
    for model in ("rr", "em"):
        asked = {"model": model, "text_1": ["a", long], "text_2": ["a", "b"]}
        assert list(refused(web.post("/score", asked), 422, "validation_error")["fields"]) == ["text_1[1]"]
    refused(web.post("/rerank", {"model": "rr", "query": long, "documents": ["a"]}), 422, "validation_error")
    compared = {"inputs": {"source_sentence": long, "sentences": ["a"]}}
    assert "source_sentence" in web.post("/tei/em/similarity", compared).json["error"]
    assert web.post("/tei/rr/rerank", {"query": long, "texts": ["a"]}).status_code == 422


def test_an_embedder_scores_by_the_cosine(web: Web) -> None:
    """And says so."""
    answer = web.post("/score", {"model": "em", "queries": "a", "documents": ["a", "b"]}).json
    assert answer["meta"]["scoring"] == "cosine"
    expected = web.vectors("a", "b", model="em", normalize=True)
    np.testing.assert_allclose([entry["score"] for entry in answer["data"]], expected @ expected[0], atol=1e-5)


def test_an_embedder_scores_with_options_of_its_own(web: Web) -> None:
    """Those of pairs are refused: nobody is given other numbers than were asked for."""
    given = {"model": "em", "queries": "a", "documents": ["a", "w " * 600]}
    refused(web.post("/score", {**given, "options": {"truncate": "error"}}), 422, "text_too_long")
    asked = {"model": "em", "input": "a", "labels": ["x", "w " * 600], "options": {"truncate": "error"}}
    refused(web.post("/v1/classify", asked), 400, "text_too_long")
    for option in ({"long_documents": "chunk"}, {"instruction": "find: "}, {"max_tokens_per_doc": 9}):
        for body in ({"options": option}, *([] if "long_documents" in option else [option])):
            error = refused(web.post("/score", {**given, **body}), 422, "unsupported_option")
            assert list(error["fields"]) == [f"options.{name}" for name in option]
    refused(web.post("/score", {**given, "truncation": False}), 422, "text_too_long")


def test_an_embedder_names_the_pairs_that_were_cut(web: Web) -> None:
    """By their own numbers: the second document, or each pair of a query that is too long."""
    long = "w " * 600
    for queries, documents, cut in (
        ("a", ["a", long], [1]),
        (["a", long, "b"], ["a"] * 3, [1]),
        (long, ["a", "b"], [0, 1]),
    ):
        answer = web.post("/score", {"model": "em", "queries": queries, "documents": documents})
        assert answer.json["meta"]["truncated"] == cut
        assert answer.headers["X-Embedpool-Truncated-Texts"] == ",".join(map(str, cut))
    options = {"truncate": "error", "on_error": "partial"}
    answer = web.post("/score", {"model": "em", "queries": "a", "documents": ["a", long], "options": options}).json
    assert [entry["score"] is None for entry in answer["data"]] == [False, True]
    assert [(error["index"], error["code"]) for error in answer["errors"]] == [(1, "text_too_long")]


def test_what_a_model_can_do_is_found_out(make_web: MakeWeb) -> None:
    """Of one that nobody has asked yet, and that is loaded on demand."""
    asleep = "driver: {{type: fake, config: {{task: {}}}}}, scaling: {{min: 0}}"

    def fresh() -> Web:
        return make_web(*(f"model: {name}, {asleep.format(task)}" for name, task in KINDS.items()))

    given = {"query": QUERY, "documents": DOCUMENTS}
    assert order(fresh().post("/rerank", given).json["results"]) == BEST_FIRST
    assert order(fresh().post("/rerank", {"query": QUERY, "texts": DOCUMENTS}).json) == BEST_FIRST
    assert list(fresh().get("/tei/rr/info").json["model_type"]) == ["reranker"]
    assert list(fresh().get("/tei/cl/info").json["model_type"]) == ["classifier"]
    assert len(fresh().post("/tei/rr/predict", {"inputs": ["a", "b"]}).json) == 1
    assert len(fresh().post("/tei/cl", {"inputs": "a"}).json) == 3
    assert "scoring" not in fresh().post("/score", {"model": "rr", "queries": "a", "documents": "a"}).json["meta"]
    error = refused(fresh().post("/embed", {"model": "rr", "texts": ["a"]}), 422, "unsupported_task")
    assert error["message"].endswith("models that may, which nobody has asked yet: cl, em")


def test_a_document_that_fails_may_leave_the_others(make_web: MakeWeb) -> None:
    """With `on_error: partial` it is not among the results, or null where every input has a place, and is named."""
    web = make_web("model: rr, driver: {type: fake, config: {task: rerank, fault: raise, fault_text: bad}}")
    options = {"on_error": "partial", "max_seq_length": 8, "truncate": "error"}
    documents = ["a", "bad", "w " * 9, QUERY]
    for path in ("/rerank", "/v1/rerank", "/v2/rerank"):
        answer = web.post(path, body(documents=documents, options=options)).json
        assert order(answer["results"]) == [3, 0]
        assert [(e["index"], e["code"], e["at_fault"]) for e in answer["errors"]] == [
            (1, "inference_failed", True), (2, "text_too_long", True),
        ]  # fmt: skip
        assert order(web.post(path, body(documents=documents, options=options, top_n=1)).json["results"]) == [3]
        assert "errors" not in web.post(path, body(documents=["a"])).json
    answer = web.post("/score", {"model": "rr", "queries": [QUERY], "documents": documents, "options": options}).json
    assert [entry["score"] is None for entry in answer["data"]] == [False, True, True, False]
    assert [error["index"] for error in answer["errors"]] == [1, 2]
    answer = web.post("/rerank", body(documents=["bad"], options=options)).json
    assert (answer["results"], len(answer["errors"])) == ([], 1)
    refused(web.post("/rerank", body(documents=documents)), 500, "inference_failed")


def test_a_text_without_labels_may_leave_the_others(make_web: MakeWeb) -> None:
    """It has null in the place of its labels."""
    web = make_web("model: cl, driver: {type: fake, config: {task: classify, fault: raise, fault_text: bad}}")
    asked = {"model": "cl", "input": ["a", "bad"], "options": {"on_error": "partial"}}
    answer = web.post("/classify", asked).json
    assert (len(answer["data"][0]), answer["data"][1], [e["index"] for e in answer["errors"]]) == (3, None, [1])
    answer = web.post("/v1/classify", asked).json
    assert [entry["label"] is None for entry in answer["data"]] == [False, True]
    assert answer["data"][1] == {"index": 1, "label": None, "probs": None, "num_classes": 3}
    assert [error["index"] for error in answer["errors"]] == [1]


def test_classify(web: Web) -> None:
    """infinity's answer at the root, vLLM's below /v1: the same numbers."""
    texts = ["a", "b"]
    answer = web.post("/classify", {"model": "cl", "input": texts}).json
    assert (answer["meta"]["count"], answer["meta"]["tokens"]) == (2, answer["usage"]["total_tokens"])
    infinitys = answer["data"]
    vllms = web.post("/v1/classify", {"model": "cl", "input": texts}).json["data"]
    assert web.post("/v1/classify", {"model": "cl", "input": "a"}).json["data"][0]["probs"] == vllms[0]["probs"]
    for one, other in zip(infinitys, vllms, strict=True):
        assert one[0]["label"] == other["label"]
        assert sorted(other["probs"]) == sorted(entry["score"] for entry in one)
        assert (other["num_classes"], len(one)) == (3, 3)
    raw = web.post("/classify", {"model": "cl", "input": texts, "options": {"raw_scores": True}}).json["data"]
    assert sum(entry["score"] for entry in raw[0]) != pytest.approx(1, abs=0.01)


def test_no_part_of_a_text_has_all_labels(web: Web) -> None:
    """So there is no best one."""
    asked = {"model": "cl", "input": ["a"], "options": {"long_documents": "chunk"}}
    error = refused(web.post("/classify", asked), 422, "unsupported_option")
    assert list(error["fields"]) == ["options.long_documents"]


def test_classify_among_labels(web: Web) -> None:
    """Jina's: an embedder chooses the nearest of the labels."""
    answer = web.post("/v1/classify", {"model": "em", "input": ["b"], "labels": ["a", "b"]}).json["data"][0]
    assert (answer["prediction"], answer["index"]) == ("b", 0)
    assert sum(entry["score"] for entry in answer["predictions"]) == pytest.approx(1, abs=1e-5)


def test_where_no_model_is_named(make_web: MakeWeb, web: Web) -> None:
    """It is the only one that can do it; else they are named."""
    given = {"query": QUERY, "documents": DOCUMENTS}
    for named in ({}, {"model": None}, {"model": "default/not-specified"}):
        assert web.post("/rerank", {**given, **named}).json["model"] == "rr"
    two = make_web(RERANKER, "model: other, driver: {type: fake, config: {task: rerank}}")
    error = refused(two.post("/rerank", given), 422, "validation_error")
    assert "name one of rr, other" in error["message"]
    none = make_web(EMBEDDER)
    assert "no registered model can rerank" in refused(none.post("/rerank", given), 422, "validation_error")["message"]


def test_options_are_checked_strictly(web: Web) -> None:
    """In `options` nothing is ignored; elsewhere the words of others mean the same."""
    refused(web.post("/rerank", body(options={"truncat": "left"})), 422, "validation_error")
    long = ["w " * 600]
    for said in ({"options": {"truncate": "error"}}, {"truncation": False}):
        refused(web.post("/rerank", body(documents=long, **said)), 422, "text_too_long")
    answer = web.post("/rerank", body(documents=["a", *long]))
    assert answer.json["meta"]["truncated"] == [1]
    assert answer.headers["X-Embedpool-Truncated-Texts"] == "1"
    refused(web.post("/rerank", body(prompt_name="none")), 422, "validation_error")
    for word in ("instruction", "instruct", "prompt"):
        asked = web.post("/rerank", body(**{word: "blue "})).json["usage"]["total_tokens"]
        assert asked == web.post("/rerank", body()).json["usage"]["total_tokens"] + len(DOCUMENTS)


def test_what_a_model_can_do_is_told(web: Web) -> None:
    """In the lists of models, also in infinity's word for it."""
    for path in ("/models", "/v1/models"):
        found = {entry["id"]: (entry["kinds"], entry["capabilities"]) for entry in web.get(path).json["data"]}
        assert found["rr"] == found["r"] == (["rerank"], ["rerank"])
        assert found["cl"] == (["classify"], ["classify"])
    error = refused(web.post("/embed", {"model": "rr", "texts": ["a"]}), 422, "unsupported_task")
    assert error["message"] == "'rr' cannot embed; it can rerank; models that can: em"


def test_the_client(web: Web) -> None:
    """`Client.rerank`, `score` and `classify` give what the routes give."""
    client = Client("http://nowhere")
    client._call = lambda method, path, body=None, **_: web.post(path, body).json  # type: ignore[method-assign]
    ranked = client.rerank(QUERY, DOCUMENTS, model="rr", top_n=2)
    assert [entry.index for entry in ranked] == BEST_FIRST[:2]
    scores = client.score([QUERY], DOCUMENTS, model="rr")
    assert scores[1] == np.float32(ranked[0].score)
    assert [max(found, key=found.__getitem__) for found in client.classify(["a"], model="cl")] == ["label 1"]
    cut = {"max_seq_length": 8, "truncate": "error", "on_error": "partial"}
    assert [len(found) for found in client.classify(["a", "w " * 9], model="cl", **cut)] == [3, 0]


@pytest.fixture
def counted(web: Web) -> Callable[[], int]:
    return lambda: web.status("rr")["counters"]["requests"]


def test_a_rerank_is_a_request_like_any_other(web: Web, counted: Callable[[], int]) -> None:
    """It is counted, and its pairs are."""
    before = counted()
    web.post("/rerank", body())
    assert counted() == before + 1
