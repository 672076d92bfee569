"""The tree of errors."""

from __future__ import annotations

import pytest

from embedpool import errors
from embedpool.errors import EmbedpoolError, ModelNotFound, Overloaded, UpstreamError, as_document, near_names

# The table of the contract.
CODES = {
    400: ["bad_json", "empty_input"],
    401: ["unauthorized"],
    403: ["forbidden", "model_disabled"],
    404: ["model_not_found", "not_found"],
    405: ["method_not_allowed"],
    409: ["alias_conflict", "model_exists_differently", "pool_file_invalid"],
    413: ["body_too_large", "too_many_texts"],
    415: ["unsupported_media_type"],
    422: ["validation_error", "text_too_long", "unsupported_option"],
    429: ["overloaded"],
    500: ["inference_failed", "internal_error"],
    502: ["upstream_error"],
    503: ["model_loading", "model_failed", "shutting_down"],
    504: ["deadline_exceeded"],
    507: ["storage_error"],
}
CLASSES = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, EmbedpoolError)]


@pytest.mark.parametrize(("status", "code"), [(s, code) for s, codes in CODES.items() for code in codes])
def test_each_code_of_the_contract_has_one_class_and_status(status: int, code: str) -> None:
    """A code is stable: one class, always of the status that the contract gives it."""
    found = [c for c in CLASSES if c.code == code and (code != "internal_error" or c is EmbedpoolError)]
    assert [c.status for c in found] == [status]


@pytest.mark.parametrize("error", CLASSES)
def test_each_class_says_when_it_happens(error: type[EmbedpoolError]) -> None:
    """Every error explains itself, and is a plain exception with its message."""
    assert (error.__doc__ or "").strip()
    assert str(error("what happened")).count("what happened") == 1


def test_the_document_of_an_error() -> None:
    """An error has one shape over HTTP; `fields` is there only if there are any."""
    plain = Overloaded("full", retry_after_s=2)
    assert as_document(plain, "id-1") == {"error": {"code": "overloaded", "message": "full", "request_id": "id-1"}}
    with_fields = errors.InvalidRequest("bad", fields={"a.b": "must be c"})
    assert as_document(with_fields, "id-2") == {
        "error": {"code": "validation_error", "message": "bad", "request_id": "id-2", "fields": {"a.b": "must be c"}}
    }


@pytest.mark.parametrize(
    ("remote", "status", "content"),
    [(None, 502, False), (400, 400, True), (413, 413, True), (422, 422, True), (429, 429, False), (401, 502, False),
     (404, 502, True), (424, 502, True), (500, 502, True), (503, 502, True), (200, 502, False)],
)  # fmt: skip
def test_the_status_of_a_remote(remote: int | None, status: int, content: bool) -> None:
    """The remote's own 400, 413, 422 and 429 keep their class; all but 429, and 424 and 5xx, may be a text's fault."""
    error = UpstreamError("no", remote_status=remote)
    assert (error.status, error.code, error.content_may_cause) == (status, "upstream_error", content)
    assert UpstreamError.status == 502  # the class is left as it was


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("all-minilm-l6-v2", "sentence-transformers/all-MiniLM-L6-v2"),
        ("Sentence-Transformers/All-MiniLM-L6-V2", "sentence-transformers/all-MiniLM-L6-v2"),
        ("minilm-16", "minilm-l6"),
        ("other/bge-small", "BAAI/bge-small"),
    ],
)
def test_near_names(name: str, near: str) -> None:
    """A name in another case, without its organisation or with a slip is recognised."""
    known = ["sentence-transformers/all-MiniLM-L6-v2", "minilm-l6", "BAAI/bge-small"]
    assert near_names(name, known)[0] == near


def test_near_names_are_few_and_different() -> None:
    """At most three, none twice, and none that resembles nothing."""
    known = [f"model-{i}" for i in range(9)]
    found = near_names("model-x", known)
    assert len(found) == len(set(found)) == 3
    assert near_names("qqqq", known) == []


@pytest.mark.parametrize(
    ("known", "hint"),
    [(["minilm"], "did you mean minilm?"), (["bge", "e5"], "known: bge, e5"), ([], "no model is registered")],
)
def test_an_unknown_model_is_answered_with_a_hint(known: list[str], hint: str) -> None:
    """The message names what was asked and what there is instead."""
    message = ModelNotFound("minilmm", known).message
    assert "'minilmm'" in message
    assert hint in message
