"""Does a pipeline give the vectors of the model's own library? Asked of each new one, with texts as requests send them.

The road of a request makes the ids: prompts, routes and cuts are compared, too.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from embedpool.config.spec import LocalStConfig
from embedpool.drivers.library import Array, Library
from embedpool.drivers.measure import cosine
from embedpool.drivers.pipeline import Pipeline
from embedpool.drivers.tokenizer import FolderTokenizer
from embedpool.tasks.driver import PROBE_TEXT
from embedpool.tasks.embed import Embed, EmbedOptions
from embedpool.tasks.item import Batch

TEXTS = (PROBE_TEXT, "Another text, rather longer than the first, so that one of them is padded. " * 3, "Short")
MOST_PROMPTS = 4
CUT_AT = 24  # tokens, or a shorter limit of the model's own

SAME_VECTOR_COSINE = {"float32": 0.99999, "bfloat16": 0.995, "float16": 0.995}


class Probe(NamedTuple):
    """A request, and the vectors that the library gives for it."""

    name: str
    request: Embed
    expected: Array


def probes(library: Library, tokenizer: FolderTokenizer) -> Iterator[Probe]:
    """Of one route: without a prompt, with each of some, and with texts that are cut."""
    route = tokenizer.route
    prompts = {text: f"with the prompt {name!r}" for name, text in tokenizer.prompts.items() if text}
    for prompt, name in {"": "of plain texts", **dict(itertools.islice(prompts.items(), MOST_PROMPTS))}.items():
        request = Embed(TEXTS, EmbedOptions(prompt=prompt))
        yield Probe(name, request, library.encode(TEXTS, prompt=prompt, route=route))
    limit = min(tokenizer.default_max_tokens or CUT_AT, CUT_AT)
    if tokenizer.max_tokens is not None or tokenizer.default_max_tokens is not None:
        options = EmbedOptions(prompt="", max_seq_length=limit, truncate="right")
        expected = library.encode(TEXTS, route=route, limit=limit)
        yield Probe(f"of texts cut to {limit} tokens", Embed(TEXTS, options), expected)


def difference(asked: Iterable[Probe], pipeline: Pipeline, dtype: str) -> str | None:
    """What differs, in a sentence; None if nothing does."""
    for probe in asked:
        got = answer_to(pipeline, probe.request)
        if got.shape != probe.expected.shape:
            return f"its vectors {probe.name} have the shape {got.shape}, those of encode {probe.expected.shape}"
        worst = min(cosine(a, b) for a, b in zip(got, probe.expected, strict=True))
        if not worst >= SAME_VECTOR_COSINE[dtype]:
            return f"its vectors {probe.name} are others than those of encode (cosine {worst:.6f})"
    return None


def answer_to(pipeline: Pipeline, request: Embed) -> Array:
    """The vectors of a request, as the pool would have them computed."""
    items = request.measure(LocalStConfig(), pipeline.tokenizer).items
    options = items[0].group.options
    return pipeline.run(Batch(request.name, items, json.loads(options) if options else {}))


def vector_of_nothing(library: Library, tokenizer: FolderTokenizer) -> Array | None:
    """The library's vector of a text without tokens beside another; None if it has none, or the model adds tokens."""
    if tokenizer.special_tokens:
        return None
    try:
        vector: Array = library.encode(["", PROBE_TEXT], route=tokenizer.route)[0]
    except Exception:  # whatever it raises for want of a token
        return None
    return vector if np.isfinite(vector).all() else None
