"""Does a pipeline give the vectors of the model's own library? Asked of each new one, with texts as requests send them.

The road of a request makes the ids: prompts, routes and cuts are compared, too.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import numpy as np

from embedpool.config.spec import LocalStConfig
from embedpool.drivers.layout import CLASSIFY, EMBED, MULTIVECTOR, SCORING, SPARSE
from embedpool.drivers.library import Array, Library
from embedpool.drivers.measure import cosine
from embedpool.drivers.pipeline import Pipeline
from embedpool.drivers.tokenizer import FolderTokenizer
from embedpool.tasks.driver import PROBE_TEXT
from embedpool.tasks.embed import Embed, EmbedOptions
from embedpool.tasks.item import Batch
from embedpool.tasks.multivector import MultiVector
from embedpool.tasks.rows import Rows
from embedpool.tasks.score import SCORES, ScoreOptions
from embedpool.tasks.sparse import Sparse
from embedpool.tasks.task import Task

TEXTS = (PROBE_TEXT, "Another text, rather longer than the first, so that one of them is padded. " * 3, "Short")
MOST_PROMPTS = 4
CUT_AT = 24  # tokens, or a shorter limit of the model's own

OF_TEXTS: Mapping[str, type[Embed]] = {EMBED: Embed, SPARSE: Sparse, MULTIVECTOR: MultiVector}
QUERY = "What jumps?"
SAME_LOGIT = {"float32": 1e-4, "bfloat16": 0.1, "float16": 0.1}  # of the greatest
SAME_VECTOR_COSINE = {"float32": 0.99999, "bfloat16": 0.995, "float16": 0.995}


class Probe(NamedTuple):
    """A request, and the rows that the library gives for it."""

    name: str
    request: Task
    expected: Rows


def probes(library: Library, tokenizer: FolderTokenizer) -> Iterator[Probe]:
    """Of one route: without a prompt, with each of some, and with texts that are cut."""
    if library.layout.kind in SCORING:
        yield from _of_scores(library, tokenizer)
        return
    task = OF_TEXTS[library.layout.kind]
    route, texts = tokenizer.route, [(text,) for text in TEXTS]
    prompts = {text: f"with the prompt {name!r}" for name, text in tokenizer.prompts.items() if text}
    for prompt, name in {"": "of plain texts", **dict(itertools.islice(prompts.items(), MOST_PROMPTS))}.items():
        request = task(TEXTS, EmbedOptions(prompt=prompt))
        yield Probe(name, request, library.compute(texts, prompt=prompt, route=route))
    limit = _short_limit(tokenizer)
    if limit and not tokenizer.expands:  # of a query that is filled up the length is the model's own
        options = EmbedOptions(prompt="", max_seq_length=limit, truncate="right")
        expected = library.compute(texts, route=route, limit=limit)
        yield Probe(f"of texts cut to {limit} tokens", task(TEXTS, options), expected)


def _of_scores(library: Library, tokenizer: FolderTokenizer) -> Iterator[Probe]:
    """Pairs, pairs whose document is cut, with the query the shorter part, and for a classifier texts."""
    task = SCORES[library.layout.kind]
    pairs = [(query, document) for query in (QUERY, "") for document in (*TEXTS, "")]
    yield Probe("of pairs", task(pairs, ScoreOptions(instruction="")), library.compute(pairs))
    for name, prompt in tokenizer.prompts.items():
        if prompt:
            options = ScoreOptions(instruction=prompt)
            yield Probe(f"with the prompt {name!r}", task(pairs, options), library.compute(pairs, prompt=prompt))
    (query,) = tokenizer.bare([QUERY])
    if limit := _short_limit(tokenizer, tokenizer.special_tokens + 3 * len(query)):
        options = ScoreOptions(instruction="", max_seq_length=limit)
        yield Probe(f"of pairs cut to {limit} tokens", task(pairs, options), library.compute(pairs, limit=limit))
    if library.layout.kind == CLASSIFY:
        texts = [(text,) for text in TEXTS]
        yield Probe("of texts", task(texts, ScoreOptions(instruction="")), library.compute(texts))


def _short_limit(tokenizer: FolderTokenizer, least: int = CUT_AT) -> int | None:
    limits = [limit for limit in (tokenizer.max_tokens, tokenizer.default_max_tokens) if limit is not None]
    return min(*limits, max(least, CUT_AT)) if limits else None


def difference(asked: Iterable[Probe], pipeline: Pipeline, dtype: str) -> str | None:
    """What differs, in a sentence; None if nothing does."""
    for probe in asked:
        got, expected = answer_to(pipeline, probe.request), probe.expected
        if _shape(got) != _shape(expected):
            return f"its rows {probe.name} have the shape {_shape(got)}, those of its library {_shape(expected)}"
        if probe.request.name in (EMBED, MULTIVECTOR):
            worst = min((cosine(a, b) for a, b in zip(got.values, expected.values, strict=True)), default=1.0)
            if not worst >= SAME_VECTOR_COSINE[dtype]:
                return f"its vectors {probe.name} are others than those of encode (cosine {worst:.6f})"
        else:
            off = most_apart(got, expected)
            if not off <= SAME_LOGIT[dtype] * max(1.0, float(np.abs(expected.values).max(initial=0))):
                return f"its numbers {probe.name} are others than those of its library (by up to {off:.6f})"
    return None


def _shape(rows: Rows) -> tuple[int, ...]:
    """How many rows there are, and of vectors how long each row and how wide they are."""
    if rows.indices is not None:
        return (len(rows),)
    return (*rows.values.shape, *([] if rows.splits is None else np.diff(rows.splits).tolist()))


def most_apart(got: Rows, expected: Rows) -> float:
    """The greatest difference of two numbers that stand in the same place, be it only in one of both."""
    if got.indices is None or expected.indices is None:
        return float(np.abs(got.values - expected.values).max(initial=0))
    both: dict[tuple[int, int], float] = {}
    for rows, sign in ((got, 1), (expected, -1)):
        assert rows.splits is not None
        assert rows.indices is not None
        owners = np.repeat(np.arange(len(rows)), np.diff(rows.splits)).tolist()
        for place, value in zip(zip(owners, rows.indices.tolist(), strict=True), rows.values.tolist(), strict=True):
            both[place] = both.get(place, 0.0) + sign * value
    return max(map(abs, both.values()), default=0.0)


def answer_to(pipeline: Pipeline, request: Task) -> Rows:
    """The rows of a request, as the pool would have them computed."""
    items = request.measure(LocalStConfig(), pipeline.tokenizer).items
    options = items[0].group.options
    return pipeline.run(Batch(request.name, items, json.loads(options) if options else {}))


def vector_of_nothing(library: Library, tokenizer: FolderTokenizer) -> Array | None:
    """The library's vector of a text without tokens beside another; None if it has none, or the model adds tokens."""
    if tokenizer.special_tokens or library.layout.kind != EMBED:
        return None
    try:
        vector: Array = library.compute([("",), (PROBE_TEXT,)], route=tokenizer.route).values[0]
    except Exception:  # whatever it raises for want of a token
        return None
    return vector if np.isfinite(vector).all() else None
