"""Sparse and multi-vector rows, several outputs at once, and chunks in context: how each path asks and is answered."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedpool.config.settings import Limits, Settings
from embedpool.drivers.fake import FakeDriver
from embedpool.pool.settings import PoolSettings
from embedpool.web.encoding import NPY, NPZ
from embedpool.web.ndjson import NDJSON
from tests.conftest import settle
from tests.web.conftest import MODEL, Web, serving

WIDTH = 8
SPARSE = "model: org/sparse, alias: s, driver: {type: fake, config: {task: sparse}}"
COLBERT = f"model: colbert, driver: {{type: fake, config: {{task: multivector, dim: {WIDTH}}}}}"
REMOTE = "model: of-another-server, driver: {type: http, config: {task: sparse, base_url: 'http://127.0.0.1:9'}}"
THREE = f"model: m3, driver: {{type: fake, config: {{task: hybrid, dim: {WIDTH}}}}}"
TEXTS = ["one two two", "three"]
B64 = {"encoding": "base64"}


@pytest.fixture
def web(tmp_path: Path, pool_settings: PoolSettings) -> Iterator[Web]:
    with serving(tmp_path, pool_settings, MODEL, SPARSE, COLBERT, THREE, REMOTE) as made:
        settle(made.pool)
        yield made


def floats(text: str, dtype: str = "<f4") -> list[Any]:
    found: list[Any] = np.frombuffer(base64.b64decode(text), dtype).tolist()
    return found


def arrays(answer: Any) -> Any:
    assert answer.status_code == 200, answer.text
    return np.load(io.BytesIO(answer.data), allow_pickle=False)


# --- POST /embed


def test_a_sparse_model_gives_indices_and_values(web: Web) -> None:
    """Ascending, without being asked; a token's string beside it if that is wanted; the largest values alone."""
    answer = web.embed(*TEXTS, model="s").json
    first, second = answer["vectors"]
    assert first["values"] == [1.0, 2.0] or first["values"] == [2.0, 1.0]
    assert first["indices"] == sorted(first["indices"])
    assert (len(second["indices"]), second["values"]) == (1, [1.0])
    assert answer["dim"] is None
    assert web.embed(*TEXTS, model="s", output="sparse").json["vectors"] == answer["vectors"]
    named = web.embed(*TEXTS, model="s", tokens=True).json["vectors"]
    assert named[0]["tokens"] == [str(i) for i in first["indices"]]
    (largest, _) = web.embed(*TEXTS, model="s", top_k=1).json["vectors"]
    assert largest["values"] == [2.0]


def test_a_multi_vector_model_gives_a_vector_for_each_token(web: Web) -> None:
    """What a text is for decides how many; fewer numbers of each, or packed ones, as of other vectors."""
    documents = web.embed(*TEXTS, model="colbert").json
    assert [np.shape(row) for row in documents["vectors"]] == [(5, WIDTH), (3, WIDTH)]
    assert documents["dim"] == WIDTH
    assert documents["vectors"] == web.embed(*TEXTS, model="colbert", input_type="document").json["vectors"]
    queries = web.embed(*TEXTS, model="colbert", input_type="query").json["vectors"]
    assert [np.shape(row) for row in queries] == [(8, WIDTH), (8, WIDTH)]
    few = web.embed(*TEXTS, model="colbert", dimensions=3).json["vectors"]
    assert np.linalg.norm(few[0], axis=1) == pytest.approx(1, abs=1e-5)
    packed = web.embed(*TEXTS, model="colbert", precision="ubinary").json["vectors"]
    assert np.shape(packed[0]) == (5, 1)


def test_several_outputs_of_one_pass(web: Web) -> None:
    """By their names, each as it is alone; without being asked a model that can all of them gives dense vectors."""
    alone = {name: web.embed(*TEXTS, model="m3", output=name).json["vectors"] for name in ("dense", "sparse")}
    assert web.embed(*TEXTS, model="m3").json["vectors"] == alone["dense"]
    answer = web.embed(*TEXTS, model="m3", output=["dense", "sparse"]).json
    assert answer["outputs"] == alone
    assert "vectors" not in answer
    assert answer["dim"] == WIDTH
    every = web.embed(*TEXTS, model="m3", output="sparse,multivector,dense").json["outputs"]
    assert set(every) == {"dense", "sparse", "multivector"}
    assert web.embed(*TEXTS, model="m3", output=["sparse"]).json["vectors"] == alone["sparse"]


def test_base64_packs_each_array(web: Web) -> None:
    """Indices as int32, values and vectors as float32, little-endian."""
    plain, packed = (web.embed(*TEXTS, model="s", **how).json["vectors"][0] for how in ({}, B64))
    assert floats(packed["indices"], "<i4") == plain["indices"]
    assert floats(packed["values"]) == plain["values"]
    plain, packed = (web.embed(*TEXTS, model="colbert", **how).json["vectors"][0] for how in ({}, B64))
    np.testing.assert_allclose([floats(vector) for vector in packed], plain, atol=1e-6)


@pytest.mark.parametrize("accept", [NPY, NPZ])
def test_arrays_of_rows_that_are_no_matrix_come_in_one_file(web: Web, accept: str) -> None:
    """`splits` says where the rows are; of several outputs each array's name begins with the output's."""
    headers = {"Accept": accept}
    found = arrays(web.embed(*TEXTS, model="s", headers=headers))
    assert (found["splits"].tolist(), found["indices"].dtype, found["values"].dtype) == ([0, 2, 3], "int32", "float32")
    found = arrays(web.embed(*TEXTS, model="colbert", headers=headers))
    assert (found["splits"].tolist(), found["values"].shape) == ([0, 5, 8], (8, WIDTH))
    answer = web.embed(*TEXTS, model="m3", output=["dense", "sparse"], headers=headers)
    assert answer.mimetype == NPZ
    found = arrays(answer)
    assert set(found) == {"dense.values", "sparse.values", "sparse.splits", "sparse.indices"}
    assert found["dense.values"].shape == (2, WIDTH)
    assert web.embed(*TEXTS, headers=headers).mimetype == NPY


def test_lines_are_answered_in_the_same_forms(web: Web) -> None:
    """Of a sparse model, of several outputs, by name, and packed."""

    def ask(query: str) -> list[Any]:
        body = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in TEXTS)
        answer = web.post(f"/embed?{query}", data=body, content_type=NDJSON)
        return [json.loads(line) for line in answer.data.splitlines()]

    plain = web.embed(*TEXTS, model="s").json["vectors"]
    assert [line["vector"] for line in ask("model=s")] == plain
    assert [line["vector"]["tokens"] for line in ask("model=s&tokens=true")] == [
        [str(i) for i in row["indices"]] for row in plain
    ]
    outputs = web.embed(*TEXTS, model="m3", output=["dense", "multivector"]).json["outputs"]
    lines = ask("model=m3&output=dense,multivector")
    assert [line["outputs"]["multivector"] for line in lines] == outputs["multivector"]
    assert [line["outputs"]["dense"] for line in lines] == outputs["dense"]
    assert isinstance(ask("model=s&encoding=base64")[0]["vector"]["values"], str)


def test_a_text_that_fails_has_no_row_of_any_output(web: Web) -> None:
    """Null in each, and its error beside them."""
    answer = web.embed("fine", "\ud800", model="m3", output=["dense", "sparse"], on_error="partial").json
    assert [rows[1] for rows in answer["outputs"].values()] == [None, None]
    assert [error["index"] for error in answer["errors"]] == [1]


@pytest.mark.parametrize(("model", "options"), [("s", {"top_k": 1}), ("m3", {"output": ["dense", "sparse"]})])
def test_where_all_texts_fail_the_form_is_the_same(web: Web, model: str, options: dict[str, Any]) -> None:
    """As where some do, also of lines."""
    options = {"truncate": "error", "max_seq_length": 3, **options}
    answer = web.embed("a b c d", model=model, on_error="partial", **options)
    assert answer.status_code == 200, answer.text
    assert [error["code"] for error in answer.json["errors"]] == ["text_too_long"]
    if model == "m3":
        assert answer.json["outputs"] == {"dense": [None], "sparse": [None]}
    else:
        assert answer.json["vectors"] == [None]
    query = {"model": model, **{k: ",".join(v) if isinstance(v, list) else str(v) for k, v in options.items()}}
    lines = web.app.test_client().post("/embed", query_string=query, data=b'{"text": "a b c d"}', content_type=NDJSON)
    assert json.loads(lines.data)["error"]["code"] == "text_too_long"


@pytest.mark.parametrize(
    ("model", "options", "says"),
    [
        ("m", {"output": "sparse"}, "cannot sparse; it can embed; models that can: org/sparse, m3"),
        ("s", {"output": "dense"}, "cannot embed; it can sparse"),
        ("s", {"output": ["dense", "sparse"]}, "cannot hybrid"),
        ("m", {"output": "late"}, "options.output: must be of dense, sparse, multivector"),
        ("m", {"output": []}, "options.output"),
        ("m", {"top_k": 3}, "options.top_k is not for embed rows"),
        ("m", {"tokens": True}, "options.tokens"),
        ("s", {"normalize": True}, "options.normalize is not for sparse rows"),
        ("s", {"dimensions": 3}, "options.dimensions is not for sparse rows"),
        ("colbert", {"dimensions": WIDTH + 1}, "options.dimensions"),
        ("s", {"top_k": 0}, "options.top_k"),
        ("of-another-server", {"tokens": True}, "its tokens are known only there"),
    ],
)
def test_what_cannot_be_had_is_said(web: Web, model: str, options: dict[str, Any], says: str) -> None:
    """Nothing is given in the place of what was asked for."""
    answer = web.embed(*TEXTS, model=model, **options)
    assert answer.status_code in (400, 422), answer.text
    assert says in answer.json["error"]["message"]


def test_an_answer_that_would_be_too_large_is_refused(
    tmp_path: Path, pool_settings: PoolSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By what the rows hold, of whatever kind; where they are as long as their texts, before they are computed."""
    settings = Settings(limits=Limits(max_answer_bytes=1 << 20))
    long = " ".join(["word"] * 400)
    with serving(tmp_path, pool_settings, MODEL, COLBERT, THREE, settings=settings) as web:
        settle(web.pool)
        small = {"model": "m", "inputs": [[long]], "enable_auto_chunking": True, "chunk_size": 100}
        assert web.post("/v1/contextualizedembeddings", small).status_code == 200
        monkeypatch.delattr(FakeDriver, "run")
        documents = {"model": "m", "inputs": [[long]] * 50, "enable_auto_chunking": True}
        answers = [
            web.embed(*[long] * 50, model="colbert"),
            web.embed(*[long] * 50, model="m3", output=["dense", "multivector"]),
            web.post("/tei/m/embed_all", {"inputs": [long] * 50}),
            web.post("/v1/contextualizedembeddings", documents),
        ]
    assert ["the limit is 1 MB" in answer.text for answer in answers] == [True] * 4, [answer.text for answer in answers]


def test_the_list_of_models_says_what_each_gives(web: Web) -> None:
    """As its tasks are called."""
    kinds = {entry["id"]: entry["kinds"] for entry in web.get("/models").json["data"]}
    assert kinds["org/sparse"] == ["sparse"]
    assert kinds["colbert"] == ["multivector"]
    assert kinds["m3"] == ["embed", "multivector", "sparse"]
    assert kinds["org/team/m"] == ["embed"]


def test_the_cache_keeps_rows_of_every_kind(tmp_path: Path, pool_settings: PoolSettings) -> None:
    """Each under what it was asked for: an output is never taken for another."""
    import dataclasses

    from embedpool.pool.cache import Cache

    with serving(tmp_path, dataclasses.replace(pool_settings, cache=Cache(1 << 20)), f"{THREE}, cache: 'on'") as web:
        settle(web.pool)
        for output in ("dense", "sparse", "multivector", ["dense", "sparse"], ["dense", "multivector"]):
            first, second = (web.embed(*TEXTS, model="m3", output=output) for _ in range(2))
            assert (first.headers["X-Embedpool-Cached"], second.headers["X-Embedpool-Cached"]) == ("0", "2")
            forms = [answer.json.get("vectors") or answer.json["outputs"] for answer in (first, second)]
            assert forms[0] == forms[1]
        for _ in range(2):  # but the vectors of a whole document's tokens
            answer = web.post("/v1/embeddings", {"model": "m3", "input": TEXTS, "late_chunking": True})
            assert answer.headers["X-Embedpool-Cached"] == "0"


# --- pairs


def test_pairs_are_scored_by_the_vectors_of_tokens(web: Web) -> None:
    """On each path; the sum over the query's vectors of the product with the document's nearest."""
    query, documents = "one two", ["three four", "one two", "two"]
    queries = np.array(web.embed(query, model="colbert", input_type="query").json["vectors"][0])
    rows = [np.array(row) for row in web.embed(*documents, model="colbert").json["vectors"]]
    wanted = [float((queries @ row.T).max(axis=1).sum()) for row in rows]
    scored = web.post("/score", {"model": "colbert", "queries": query, "documents": documents}).json
    assert [entry["score"] for entry in scored["data"]] == pytest.approx(wanted, abs=1e-4)
    assert scored["meta"]["scoring"] == "maxsim"
    order = sorted(range(3), key=lambda i: -wanted[i])
    ranked = web.post("/rerank", {"model": "colbert", "query": query, "documents": documents}).json["results"]
    assert [entry["index"] for entry in ranked] == order
    found = web.post("/v1/rerank", {"model": "colbert", "query": query, "documents": documents}).json["results"]
    assert [entry["relevance_score"] for entry in found] == pytest.approx([wanted[i] for i in order], abs=1e-4)
    at_tei = web.post("/tei/colbert/rerank", {"query": query, "texts": documents}).json
    assert [entry["index"] for entry in at_tei] == order
    body = {"model": "colbert", "query": query, "documents": documents, "options": {"long_documents": "chunk"}}
    refused = web.post("/rerank", body)
    assert (refused.status_code, "options.long_documents" in refused.text) == (422, True)


def test_a_pair_that_fails_takes_no_other_with_it(web: Web) -> None:
    """A broken document is named as the caller calls it; with on_error partial the others have their scores."""
    body = {"model": "colbert", "query": "one", "documents": ["two", "\ud800"]}
    answer = web.post("/rerank", body)
    assert (answer.status_code, "documents[1]" in answer.text) == (422, True)
    partial = web.post("/rerank", {**body, "options": {"on_error": "partial"}}).json
    assert [entry["index"] for entry in partial["results"]] == [0]
    assert [entry["index"] for entry in partial["errors"]] == [1]
    cut = web.post("/rerank", {**body, "documents": ["w " * 600], "options": {"truncate": "error"}})
    assert (cut.status_code, "documents[0]" in cut.text) == (422, True)


# --- the words of others


def test_tei(web: Web) -> None:
    """Sparse rows as lists of index and value; the vectors of tokens, of any embedder."""
    rows = web.embed(*TEXTS, model="s").json["vectors"]
    wanted = [[{"index": i, "value": v} for i, v in zip(row["indices"], row["values"], strict=True)] for row in rows]
    for path in ("/tei/s/embed_sparse", "/tei/org/sparse/embed_sparse", "/tei/s"):
        assert web.post(path, {"inputs": TEXTS, "normalize": True, "truncate": True}).json == wanted
    assert web.post("/tei/s/embed_sparse", {"inputs": TEXTS[0]}).json == wanted[:1]
    assert web.get("/tei/s/info").json["model_type"] == {"embedding": {"pooling": "splade"}}
    assert (
        web.post("/tei/colbert/embed_all", {"inputs": TEXTS}).json == web.embed(*TEXTS, model="colbert").json["vectors"]
    )
    assert [np.shape(row) for row in web.post("/tei/m/embed_all", {"inputs": TEXTS}).json] == [(5, 384), (3, 384)]
    refused = web.post("/tei/m/embed_sparse", {"inputs": TEXTS})
    assert (refused.status_code, set(refused.json)) == (424, {"error", "error_type"})


def test_jinas_multi_vectors(web: Web) -> None:
    """At its own path, and at that of vectors if they are asked for; the key is `embeddings`."""
    queries = web.embed(*TEXTS, model="colbert", input_type="query", dimensions=4).json["vectors"]
    body = {"model": "colbert", "input": TEXTS, "input_type": "query", "dimensions": 4, "embedding_type": "float"}
    answer = web.post("/v1/multi-vector", body).json
    assert [entry["embeddings"] for entry in answer["data"]] == queries
    assert {entry["object"] for entry in answer["data"]} == {"embeddings"}
    packed = web.post("/v1/multi-vector", {**body, "embedding_type": ["base64"]}).json["data"][0]["embeddings"]
    np.testing.assert_allclose([floats(vector) for vector in packed], queries[0], atol=1e-6)
    body = {"model": "colbert", "input": [{"text": text} for text in TEXTS], "return_multivector": True}
    documents = web.post("/v1/embeddings", body).json
    assert [entry["embeddings"] for entry in documents["data"]] == web.embed(*TEXTS, model="colbert").json["vectors"]
    refused = web.post("/v1/embeddings", {"model": "colbert", "input": TEXTS})
    assert (refused.status_code, "it can multivector" in refused.json["detail"]) == (400, True)


def test_late_chunks_in_jinas_words(web: Web) -> None:
    """All strings are chunks of one document: a vector for each, in order, the mean of its tokens'."""
    texts = ["one two", "three", "four five six"]
    body = {"model": "m", "input": texts, "late_chunking": True, "normalized": False}
    answer = web.post("/v1/embeddings", body).json
    (tokens,) = web.post("/tei/m/embed_all", {"inputs": " ".join(texts)}).json
    ends = [1, 3, 4, 7]
    for entry, start, stop in zip(answer["data"], ends, ends[1:], strict=False):
        np.testing.assert_allclose(entry["embedding"], np.mean(tokens[start:stop], axis=0), atol=1e-5)
    assert answer["usage"]["total_tokens"] == 8
    few = web.post("/v1/embeddings", {**body, "dimensions": 4, "normalized": True, "embedding_type": "base64"}).json
    assert np.linalg.norm(floats(few["data"][0]["embedding"])) == pytest.approx(1, abs=1e-5)
    for chunk, path in ((["one", " "], "input[1]"), (["", "one"], "input[0]")):
        refused = web.post("/v1/embeddings", {**body, "input": chunk})
        assert (refused.status_code, refused.json["error"]["param"]) == (400, path)
    refused = web.post("/v1/embeddings", {**body, "model": "s"})
    assert (refused.status_code, "cannot embed chunks late" in refused.json["detail"]) == (400, True)


def test_contextualised_chunks_in_voyages_words(web: Web) -> None:
    """Documents are lists of chunks; types of numbers, and texts that the server has split."""
    documents = [["one two", "three"], ["four"]]
    body = {"model": "m", "inputs": documents, "input_type": "document", "output_dimension": 4}
    answer = web.post("/v1/contextualizedembeddings", body).json
    assert [[chunk["index"] for chunk in document["data"]] for document in answer["data"]] == [[0, 1], [0]]
    late = web.post("/v1/embeddings", {"model": "m", "input": documents[0], "late_chunking": True, "dimensions": 4})
    assert [chunk["embedding"] for chunk in answer["data"][0]["data"]] == [
        entry["embedding"] for entry in late.json["data"]
    ]
    assert not any("text" in chunk for document in answer["data"] for chunk in document["data"])
    packed = web.post("/v1/contextualizedembeddings", {**body, "encoding_format": "base64", "output_dtype": "int8"})
    assert len(floats(packed.json["data"][0]["data"][0]["embedding"], "i1")) == 4
    split = {**body, "inputs": [["one two three four five"]], "enable_auto_chunking": True, "chunk_size": 2}
    chunks = web.post("/v1/contextualizedembeddings", split).json["data"][0]["data"]
    assert [chunk["text"].strip() for chunk in chunks] == ["one two", "three four", "five"]
    chunks = web.post("/v1/contextualizedembeddings", {**split, "chunk_overlap": 1}).json["data"][0]["data"]
    assert [chunk["text"].strip() for chunk in chunks] == ["one two", "two three", "three four", "four five"]


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"inputs": ["one"]}, "inputs[0]"),
        ({"inputs": []}, "inputs"),
        ({"inputs": [[]]}, None),
        ({"inputs": [["one", 3]]}, "inputs[0][1]"),
        ({"inputs": [["one"], [" "]]}, "inputs[1][0]"),
        ({"inputs": [["one", "two"]], "enable_auto_chunking": True}, "inputs[0]"),
        ({"enable_auto_chunking": True, "chunk_size": 4, "chunk_overlap": 3}, "chunk_overlap"),
        ({"inputs": [[" ".join(["one"] * 30_000)]], "enable_auto_chunking": True, "chunk_size": 1}, None),
        ({"inputs": [["one"]] * (Limits().max_texts_per_request + 1)}, None),
    ],
)
def test_chunks_that_cannot_be_read(web: Web, change: dict[str, Any], param: str | None) -> None:
    """The error names the chunk."""
    answer = web.post("/v1/contextualizedembeddings", {"model": "m", "inputs": [["one"]], **change})
    assert answer.status_code == 400, answer.text
    assert answer.json["error"]["param"] == param
