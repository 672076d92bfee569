"""What a caller sees of the cache, and may say to it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest

from embedpool.config.keys import keys_file, make_key
from embedpool.config.settings import Security, Settings
from embedpool.pool.cache import Cache
from embedpool.pool.settings import PoolSettings
from tests.conftest import settle
from tests.web.conftest import MODEL, MakeWeb, Web, serving

CACHED = f"{MODEL}, cache: on"


@pytest.fixture
def web(make_web: MakeWeb) -> Web:
    """One model, m, that is cached, and one, n, that is not."""
    return make_web(
        CACHED,
        "model: n, driver: {type: fake, config: {dim: 3}}",
        "model: r, cache: on, driver: {type: fake, config: {task: rerank}}",
        cache=Cache(1 << 20),
    )


def cached(web: Web, *texts: str, **given: Any) -> int:
    answer = web.embed(*texts, **given)
    assert answer.status_code == 200, answer.text
    return int(answer.headers["X-Embedpool-Cached"])


def test_a_header_says_how_many_were_known(web: Web) -> None:
    assert [cached(web, "a", "b"), cached(web, "b", "c", "b"), cached(web, "a", model="n")] == [0, 2, 0]
    assert cached(web, "a", model="n") == 0


def test_the_answer_is_the_same(web: Web) -> None:
    """But for times and who computed it."""
    first, second = (web.embed("a", "b " * 600).json for _ in range(2))
    for answer in (first, second):
        for name in ("queue_ms", "compute_ms", "total_ms", "replicas"):
            answer["meta"].pop(name)
    assert first == second
    assert first["meta"]["truncated"] == [1]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/embeddings", {"model": "m", "input": ["a"]}),
        ("/v2/embed", {"model": "m", "texts": ["a"], "input_type": "search_document", "embedding_types": ["int8"]}),
        ("/api/embed", {"model": "m", "input": ["a"]}),
        ("/rerank", {"model": "r", "query": "a", "documents": ["a", "b"]}),
        ("/v1/rerank", {"model": "r", "query": "a", "documents": ["a", "b"]}),
    ],
)
def test_every_api_uses_it(web: Web, path: str, body: dict[str, Any]) -> None:
    first, second = (web.post(path, body) for _ in range(2))
    assert [int(answer.headers["X-Embedpool-Cached"]) for answer in (first, second)] == [
        0,
        len(body.get("documents", "a")),
    ]
    assert first.json.get("usage") == second.json.get("usage")


def test_lines_use_it(web: Web) -> None:
    """And what they leave there is found."""
    lines = b"".join(orjson.dumps({"text": f"t{i}"}) + b"\n" for i in range(20))
    head = {"Content-Type": "application/x-ndjson"}
    first, second = (web.post("/embed?model=m", data=lines, headers=head).get_data() for _ in range(2))
    assert first == second
    assert cached(web, *(f"t{i}" for i in range(20))) == 20
    assert web.status("m")["counters"]["cache_hits"] == 40


@pytest.mark.parametrize(
    ("says", "then"), [("no-store", 0), ("no-cache", 1), ("max-age=0, x", 1), ("NO-STORE", 0), ("no-transform", 1)]
)
def test_a_caller_may_do_without(web: Web, says: str, then: int) -> None:
    """no-store is neither found nor kept, no-cache is computed."""
    assert cached(web, "a", headers={"Cache-Control": says}) == 0
    assert cached(web, "a") == then
    assert cached(web, "a", headers={"Cache-Control": says}) == (says == "no-transform")


def test_an_entry_is_of_the_key_that_made_it(tmp_path: Path, pool_settings: PoolSettings) -> None:
    settings = Settings(security=Security(keys_file=str(tmp_path / "keys.yml")))
    object.__setattr__(settings, "base_dir", tmp_path)
    (one, first), (other, second) = make_key("one"), make_key("other")
    keys_file(settings).edit(lambda keys: (*keys, one, other))
    given = dataclasses.replace(pool_settings, cache=Cache(1 << 20))
    with serving(tmp_path, given, CACHED, settings=settings) as web:
        settle(web.pool)
        found = [cached(web, "a", headers={"X-API-Key": key}) for key in (first, second, first, second)]
        assert found == [0, 0, 1, 1]
        assert web.get("/status", headers={"X-API-Key": first}).json["cache"]["memory"]["entries"] == 2


def test_it_is_seen_and_cleared(web: Web) -> None:
    """By model, or all of it; the metrics count."""
    cached(web, "a", "b")
    cached(web, "a")
    entry, state = web.status("m"), web.get("/status").json["cache"]
    assert (entry["cached"], web.status("n")["cached"]) == (True, False)
    assert (state["memory"]["entries"], state["disk"]) == (2, None)
    page = web.get("/metrics").text
    assert 'embedpool_cache_hits_total{model="org/team/m"} 1.0' in page
    assert 'embedpool_cache_misses_total{model="org/team/m"} 2.0' in page
    assert "embedpool_cache_memory_entries 2.0" in page
    assert web.post("/cache/clear", {"model": "nobody"}).status_code == 404
    assert web.post("/cache/clear", {"model": "n"}).json["cache"]["memory"]["entries"] == 2
    assert web.post("/cache/clear", {"model": "m"}).json["cache"]["memory"]["entries"] == 0
    cached(web, "a")
    assert web.post("/cache/clear", {}).json["cache"]["memory"]["entries"] == 0


def test_another_prompt_or_limit_of_the_model_finds_nothing_of_before(web: Web) -> None:
    """A changed default in pool.yml applies at once."""
    text = "a b c d e f"
    before = web.vectors(text)
    for config in ("{max_seq_length: 4}", "{prompts: {document: 'x '}}"):
        spec = f"version: 1\nmodels:\n- {{{CACHED}, driver: {{type: fake, config: {config}}}}}\n"
        web.pool_yml.write_text(spec)
        web.reconciler.reload("test")
        answer = web.embed(text, input_type="document")
        assert answer.headers["X-Embedpool-Cached"] == "0"
        assert not np.array_equal(answer.json["vectors"], before)
