"""How a multi-vector model treats queries and documents, from the files of its folder.

Three layouts say it: sentence-transformers' own, PyLate's before version 4, and that of Stanford's ColBERT. It is read
as `MultiVectorEncoder` reads it.
"""

from __future__ import annotations

import dataclasses
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from embedpool.drivers.model_files import read_json, transformer_settings
from embedpool.errors import ModelFailed

QUERY, DOCUMENT = "query", "document"
PYLATE = "ColBERT"  # model_type of its folders
PYLATE_KEYS = (
    "query_length", "document_length", "query_expansion", "do_query_expansion", "attend_to_expansion_tokens",
    "attend_to_mask_tokens", "query_prefix", "document_prefix", "skiplist_words",
)  # fmt: skip
USUAL_QUERY_TOKENS = 32
MASK = "MultiVectorMask"


def is_of_pylate(settings: Mapping[str, Any]) -> bool:
    """Whether PyLate before version 4 has saved it; its first versions name no type of model."""
    return settings.get("model_type", PYLATE) == PYLATE and bool({"query_prefix", "document_prefix"} & settings.keys())


@dataclasses.dataclass(frozen=True)
class Expansion:
    """Queries are filled up to `length` tokens with `token`, which the model's tokenizer names if this is None.

    A `fixed` length is also the longest. `attends`: the query's own tokens read the others.
    """

    length: int
    fixed: bool
    attends: bool
    token: str | None


@dataclasses.dataclass(frozen=True)
class LateInteraction:
    """`marks` are prefixes that are one token where the vocabulary has them, `skipped` words whose vectors are left out
    for texts of `skips`; of texts that are no queries the vectors of `only` (token ids) are kept, if it has any.
    """

    query_length: int | None
    document_length: int | None
    expansion: Expansion | None
    marks: Sequence[str]
    prompts: Mapping[str, str]
    skipped: Sequence[str]
    skips: Sequence[str]
    only: Sequence[int]
    averages_queries: bool


def read_late_interaction(
    folder: Path, settings: Mapping[str, Any], transformer: Path, mask: Path | None, *, of_stanford: bool
) -> LateInteraction:
    """`mask` is the folder of its MultiVectorMask, if it has one. Raises ModelFailed for what cannot be read."""
    own = transformer_settings(transformer)
    prompts = {name: text for name, text in (settings.get("prompts") or {}).items() if isinstance(text, str)}
    masked = read_json(mask / "config.json") if mask else {}
    marks: list[str] = []
    skipped, skips, only = masked.get("skiplist_words"), masked.get("skiplist_tasks"), masked.get("keep_only_token_ids")
    if of_stanford:
        metadata = read_json(folder / "artifact.metadata")
        known = {
            "document_length": metadata.get("doc_maxlen"),
            "query_expansion": {
                "strategy": "fixed",
                "attend": bool(metadata.get("attend_to_mask_tokens")),
                "length": metadata.get("query_maxlen") or USUAL_QUERY_TOKENS,
            },
        }
        found = {
            QUERY: (metadata.get("query_token_id") or "[unused0]") + " ",
            DOCUMENT: (metadata.get("doc_token_id") or "[unused1]") + " ",
        }
        prompts, marks = {**found, **prompts}, list(found.values())
        skipped = string.punctuation if metadata.get("mask_punctuation", True) else []
    else:
        known = {name: settings[name] for name in ("query_length", "document_length") if settings.get(name) is not None}
        for name in (QUERY, DOCUMENT):
            if f"{name}_prefix" in settings:
                prefix = settings[f"{name}_prefix"] or ""
                marks.append(prefix)
                prompts[name] = prefix + prompts.get(name, "").removeprefix(prefix)
        if any(name in settings for name in PYLATE_KEYS):
            known["query_expansion"] = _of_pylate(settings, known)
        if is_of_pylate(settings) and mask is None:
            skipped = settings.get("skiplist_words")
            skipped = string.punctuation if skipped is None else skipped
    known |= own
    return LateInteraction(
        known.get("query_length"),
        known.get("document_length"),
        _expansion(known.get("query_expansion"), folder),
        marks,
        prompts,
        list(skipped or ()),
        [DOCUMENT] if skips is None else [skips] if isinstance(skips, str) else list(skips),
        list(only or ()),
        settings.get("similarity_fn_name") == "meanmaxsim",
    )


def _of_pylate(settings: Mapping[str, Any], known: dict[str, Any]) -> Any:
    """The expansion of a folder that says it in PyLate's words; the length of queries is then said by it."""
    if "query_expansion" in settings:
        return settings["query_expansion"]
    if settings.get("do_query_expansion") is False:
        return None
    attends = settings.get("attend_to_expansion_tokens", settings.get("attend_to_mask_tokens"))
    length = known.pop("query_length", None) or USUAL_QUERY_TOKENS
    return {"strategy": "fixed", "attend": bool(attends), "length": length}


def _expansion(found: Any, folder: Path) -> Expansion | None:
    if not found:
        return None
    try:
        strategy, length = found["strategy"], int(found["length"])
        if strategy not in ("fixed", "min") or length < 1:
            raise ValueError
    except (KeyError, TypeError, ValueError):
        raise ModelFailed(f"{folder}: query_expansion {found!r} is none that embedpool knows") from None
    return Expansion(length, strategy == "fixed", bool(found.get("attend")), found.get("token"))
