"""What the pool is asked and what it answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from numpy.typing import NDArray

from embedpool.errors import EmbedpoolError
from embedpool.tracing import Trace

Vectors = NDArray[Any]  # shape (texts, dim)


# What a text is for, in the words of OpenAI-like services, Cohere, Voyage and Jina; those of a line mean the same.
QUERY = ("query", "search_query", "retrieval.query")
DOCUMENT = ("document", "passage", "search_document", "retrieval.passage")
INPUT_TYPES = (*QUERY, *DOCUMENT, "classification", "clustering", "separation", "text-matching")


@dataclasses.dataclass(frozen=True, slots=True)
class EmbedOptions:
    """Options of one request; None means the model's own setting. `extra` is passed on to remote services."""

    normalize: bool | None = None
    max_seq_length: int | None = None
    dtype: str | None = None
    dimensions: int | None = None
    prompt: str | None = None
    prompt_name: str | None = None
    input_type: str | None = None
    truncate: str | None = None
    precision: str = "float32"
    on_error: str = "fail"  # partial: a text that fails takes no other with it
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, slots=True)
class EmbedRequest:
    """Texts for a model. `client_gone()` tells, from any thread, that nobody waits for the answer any more."""

    model: str
    texts: Sequence[str]
    options: EmbedOptions = EmbedOptions()
    timeout_s: float | None = None
    weight: float = 1.0
    client_gone: Callable[[], bool] = lambda: False
    asks_again: bool = False  # a caller that is told of a full queue will wait: it is not refused
    hops: int = 0  # servers of this kind that it has come through
    trace: Trace = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, slots=True)
class EmbedResult:
    """`vectors` has shape (texts, dim) in the order of the request; times are in milliseconds.

    `errors` holds, by their indices, the texts that failed where on_error is partial; their vectors are zeros.
    """

    model: str
    vectors: Vectors
    dim: int
    tokens: int
    truncated: list[int]
    measure_ms: float  # spent at the door, on token counts
    queue_ms: float
    compute_ms: float
    total_ms: float
    replicas: list[str]
    errors: Mapping[int, EmbedpoolError] = dataclasses.field(default_factory=dict)
