"""`embedpool rerank` without `--model`."""

from __future__ import annotations

import pytest

from embedpool.cli.common import UsageError
from embedpool.cli.rerank import only_reranker

EMBEDDER, RERANKER = {"model": "em", "kinds": ["embed"]}, {"model": "rr", "kinds": ["rerank"]}
ASLEEP = {"model": "asleep", "kinds": []}  # nobody has asked it yet, or there is no server


def test_the_only_model_that_can_is_meant() -> None:
    """One that is known to, else one of which nothing is known yet; of several none."""
    assert only_reranker([EMBEDDER, RERANKER, ASLEEP]) == "rr"
    assert only_reranker([EMBEDDER, ASLEEP]) == "asleep"
    for models, says in (
        ([EMBEDDER], "no reranker is registered"),
        ([RERANKER, {**RERANKER, "model": "other"}], "rr, other"),
        ([ASLEEP, {**ASLEEP, "model": "other"}], "asleep, other"),
    ):
        with pytest.raises(UsageError, match=f"needs --model: {says}"):
            only_reranker(models)
