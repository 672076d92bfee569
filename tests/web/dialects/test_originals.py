"""Bodies as the schemas of the originals allow them: taken, or refused with a sentence in the original's shape."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from embedpool.pool.settings import PoolSettings
from tests.conftest import open_fake, open_fake_tokenizer, settle
from tests.web.conftest import Web, serving

WORDS = st.lists(st.sampled_from(["a", "bb", "c", "d\u00e9", "\U0001f642", "w"]), max_size=20).map(" ".join)
TEXTS = st.lists(WORDS, min_size=1, max_size=3)
YES_OR_NO = st.booleans()
SIZES = st.sampled_from([1, 8, 64, 256, 384])
# What clients send beside, none of it known to any of these.
BESIDE = st.dictionaries(
    st.sampled_from(["drop_params", "metadata", "timeout", "request_id", "parameters", "images", "x", "stream"]),
    st.one_of(st.none(), st.booleans(), st.integers(-5, 5), st.text(max_size=3), st.just({}), st.just([])),
    max_size=2,
)


class Original(NamedTuple):
    """An API: where it is, its texts' field, its other fields; the keys of its errors."""

    path: str
    texts: str
    fields: Mapping[str, st.SearchStrategy[Any]]
    error: frozenset[str]
    required: Mapping[str, Any] = {"model": "m"}
    takes_one: bool = True


OPENAI_ERROR = frozenset({"error", "detail"})
ORIGINALS = {
    "OpenAI": Original("/v1/embeddings", "input", {
        "encoding_format": st.just("float"), "dimensions": SIZES, "user": st.text(max_size=5),
    }, OPENAI_ERROR),
    "Azure": Original("/openai/deployments/m/embeddings", "input", {
        "dimensions": SIZES, "user": st.text(max_size=5), "input_type": st.sampled_from(["query", "document"]),
    }, OPENAI_ERROR, {}),
    "Jina": Original("/v1/embeddings", "input", {
        "task": st.sampled_from(
            ["retrieval.query", "retrieval.passage", "separation", "classification", "text-matching"]
        ),
        "dimensions": SIZES, "normalized": YES_OR_NO, "embedding_type": st.just("float"),
        "late_chunking": st.just(False),
        "truncate": YES_OR_NO,
    }, OPENAI_ERROR),
    "Voyage": Original("/v1/embeddings", "input", {
        "input_type": st.sampled_from(["query", "document"]), "truncation": YES_OR_NO, "output_dimension": SIZES,
        "output_dtype": st.just("float"),
    }, OPENAI_ERROR),
    "vLLM": Original("/v1/embeddings", "input", {
        "dimensions": SIZES, "truncate_prompt_tokens": st.integers(-1, 30), "add_special_tokens": YES_OR_NO,
        "priority": st.integers(0, 3), "normalize": YES_OR_NO,
    }, OPENAI_ERROR),
    "NIM": Original("/v1/embeddings", "input", {
        "input_type": st.sampled_from(["query", "passage"]), "truncate": st.sampled_from(["NONE", "START", "END"]),
        "modality": st.sampled_from(["text", ["text"], ["image"]]),
    }, OPENAI_ERROR),
    "infinity": Original("/embeddings", "input", {
        "encoding_format": st.just("float"), "dimensions": st.sampled_from([0, 8]), "modality": st.just("text"),
        "user": st.none(),
    }, OPENAI_ERROR),
    "TEI": Original("/tei/m/embed", "inputs", {
        "truncate": YES_OR_NO, "truncation_direction": st.sampled_from(["Left", "Right"]), "normalize": YES_OR_NO,
        "prompt_name": st.sampled_from(["query", "other"]), "dimensions": SIZES,
    }, frozenset({"error", "error_type"}), {}),
    "Cohere": Original("/v2/embed", "texts", {
        "input_type": st.sampled_from(["search_document", "search_query", "classification", "clustering", "image"]),
        "embedding_types": st.just(["float"]), "output_dimension": SIZES, "max_tokens": st.integers(1, 40),
        "truncate": st.sampled_from(["NONE", "START", "END"]), "priority": st.integers(0, 9),
    }, frozenset({"id", "message"}), takes_one=False),
    "Ollama": Original("/api/embed", "input", {
        "truncate": YES_OR_NO, "dimensions": st.sampled_from([1, 8, 384, 4096]),
        "options": st.just({"num_ctx": 512}), "keep_alive": st.sampled_from(["5m", 0, -1]),
    }, frozenset({"error"})),
}  # fmt: skip
REFUSED = {("add_special_tokens", False), ("prompt_name", "other"), ("input_type", "image")}


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Web]:
    """One model with a prompt for queries, for all examples."""
    folder: Path = tmp_path_factory.mktemp("originals")
    model = "model: m, driver: {type: fake, config: {prompts: {query: 'find: '}}}"
    with contextlib.ExitStack() as stack:
        made = stack.enter_context(serving(folder, PoolSettings(open_fake, open_fake_tokenizer), model))
        settle(made.pool)
        yield made


def expected(web: Web, texts: list[str], fields: Mapping[str, Any], name: str) -> np.ndarray:
    """The vectors that POST /embed gives for the same request in its words."""
    sizes = [fields[key] for key in ("dimensions", "output_dimension") if fields.get(key)]
    options: dict[str, Any] = {"dimensions": sizes[0]} if sizes and sizes[0] <= 384 else {}
    for key in ("normalize", "normalized"):
        if fields.get(key) is not None:
            options["normalize"] = fields[key]
    limit = fields.get("truncate_prompt_tokens") or fields.get("max_tokens")
    if limit and limit > 0:
        options["max_seq_length"] = limit
    if fields.get("truncate") == "START" or (
        name == "TEI" and fields.get("truncation_direction") == "Left" and fields.get("truncate") is not False
    ):
        options["truncate"] = "left"
    said = fields.get("input_type") or fields.get("task") or fields.get("prompt_name")
    if said in ("query", "search_query", "retrieval.query"):
        options["prompt_name"] = "query"
    return web.vectors(*texts, **options)


def vectors_in(found: Any) -> list[Any]:
    if isinstance(found, list):
        return found
    if "data" in found:
        return [row["embedding"] for row in found["data"]]
    rows: Any = found["embeddings"]
    return list(rows["float"] if isinstance(rows, dict) else rows)


@pytest.mark.parametrize("name", ORIGINALS)
def test_what_the_original_takes_is_taken_or_refused_with_a_sentence(
    name: str, web: Web, pytestconfig: pytest.Config
) -> None:
    """And nothing that changes numbers is ignored unseen. With `--long` 2,000 bodies of each."""
    examples = 2000 if pytestconfig.getoption("--long") else 300

    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def run(data: st.DataObject) -> None:
        send_one(name, web, data)

    run()


def send_one(name: str, web: Web, data: st.DataObject) -> None:
    """A body, and what it must come to."""
    original = ORIGINALS[name]
    texts = data.draw(TEXTS)
    fields = data.draw(st.fixed_dictionaries({}, optional={k: v | st.none() for k, v in original.fields.items()}))
    beside = data.draw(BESIDE)
    alone = original.takes_one and len(texts) == 1 and data.draw(st.booleans())
    body = {**original.required, original.texts: texts[0] if alone else texts, **fields, **beside}
    answer = web.post(original.path, body)
    given_ = {key: value for key, value in fields.items() if value is not None}
    if answer.status_code == 200:
        assert not {(key, value) for key, value in given_.items() if isinstance(value, str | bool)} & REFUSED
        found = vectors_in(answer.json)
        np.testing.assert_allclose(found, expected(web, texts, given_, name), atol=1e-5)
        told = set(filter(None, answer.headers.get("X-Embedpool-Ignored", "").split(", ")))
        ollamas = {"dimensions"} if name == "Ollama" and given_.get("dimensions", 0) > 384 else set()
        unknown = {"priority"} if name == "vLLM" and "priority" in fields else set()
        assert told == set(beside) | ollamas | unknown
    else:
        assert answer.status_code in (400, 422), answer.text
        assert set(answer.json) == original.error, answer.text
        sentence = re.sub(r"[{}\"]", "", answer.text)
        assert len(sentence.split()) > 3
        reasons = [key for key in given_ if key in answer.text]
        assert reasons or "tokens" in answer.text, answer.text
