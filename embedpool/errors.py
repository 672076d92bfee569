"""Every error a user can meet: one tree, each class with its HTTP `status` and stable `code`. Imports nothing."""

from __future__ import annotations

import copy
import re
import traceback
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, Self

LONGEST_NAME = 200  # characters of a name that are compared and quoted
MOST_NAMED = 20  # texts at fault, in an error
FAILED_INPUTS_HEADER = "X-Embedpool-Failed"  # of an answer of any API: the inputs at fault, by index


class EmbedpoolError(Exception):
    """Base of all errors. `fields` maps a path in the input to what is wrong there; `retry_after_s` is in seconds.

    `inputs` are the indices of the inputs of a request that are at fault, as far as they are known.
    """

    status = 500
    code = "internal_error"
    retry_helps = True  # the same request may succeed when it is sent again, as its status says elsewhere
    default_retry_after_s: float | None = None

    def __init__(
        self,
        message: str,
        *,
        fields: Mapping[str, str] | None = None,
        inputs: Iterable[int] = (),
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = self.for_the_log = message
        self.fields = dict(fields or {})
        self.inputs = tuple(inputs)
        self.retry_after_s = self.default_retry_after_s if retry_after_s is None else retry_after_s

    def of_input(self, index: int, where: str | None) -> Self:
        """The same for a request of which one input is at fault; the message names it by its path, if that is given."""
        found = copy.copy(self)
        found.inputs = (index,)
        if where is not None:
            found.message, found.for_the_log = f"{where}: {self.message}", f"{where}: {self.for_the_log}"
            found.args, found.fields = (found.message,), {where: self.message}
        return found


# --- 4xx: the caller can do something about it


class BadRequest(EmbedpoolError):
    """The request is not valid HTTP."""

    status, code = 400, "bad_request"


class BadJson(EmbedpoolError):
    """The body is not JSON, or not a JSON object."""

    status, code = 400, "bad_json"


class EmptyInput(EmbedpoolError):
    """The list of texts is empty."""

    status, code = 400, "empty_input"


class Unauthorized(EmbedpoolError):
    """The request has no key, or an unknown one."""

    status, code = 401, "unauthorized"


class Forbidden(EmbedpoolError):
    """The caller may not do this, or not from this address."""

    status, code = 403, "forbidden"


class ModelDisabled(EmbedpoolError):
    """The model is registered but disabled."""

    status, code = 403, "model_disabled"


class ModelNotFound(EmbedpoolError):
    """No model has this name or alias; the message lists near names."""

    status, code = 404, "model_not_found"

    def __init__(self, name: str, known: Iterable[str] = ()) -> None:
        name, known = name[:LONGEST_NAME], sorted(known)
        near = near_names(name, known)
        if near:
            hint = f"; did you mean {' or '.join(near)}?"
        elif known:
            hint = f"; known: {', '.join(known[:10])}"
        else:
            hint = "; no model is registered"
        super().__init__(f"no model has the name or alias {name!r}{hint}")


class NotFound(EmbedpoolError):
    """The server has no such path."""

    status, code = 404, "not_found"


class MethodNotAllowed(EmbedpoolError):
    """The path does not support this method."""

    status, code = 405, "method_not_allowed"


class AliasConflict(EmbedpoolError):
    """The alias is already a name or alias of another model."""

    status, code = 409, "alias_conflict"


class ModelChanged(EmbedpoolError):
    """Another model took over the name while the server answered lines; its vectors would not fit the earlier ones."""

    status, code, retry_helps = 409, "model_changed", False


class ModelExistsDifferently(EmbedpoolError):
    """A model of this name is registered with a different spec."""

    status, code = 409, "model_exists_differently"


class PoolFileInvalid(EmbedpoolError):
    """pool.yml does not parse or validate; the models stay as they were. Correct the file."""

    status, code = 409, "pool_file_invalid"


class BodyTooLarge(EmbedpoolError):
    """The body is larger than `limits.max_body_bytes`."""

    status, code = 413, "body_too_large"


class TooManyTexts(EmbedpoolError):
    """The request has more texts than `limits.max_texts_per_request`."""

    status, code = 413, "too_many_texts"


class AnswerTooLarge(EmbedpoolError):
    """The answer would be larger than `limits.max_answer_bytes`; the message says what to do instead."""

    status, code = 413, "answer_too_large"


class UnsupportedMediaType(EmbedpoolError):
    """The path does not accept this content type."""

    status, code = 415, "unsupported_media_type"


class InvalidRequest(EmbedpoolError):
    """A field has the wrong type or value; `fields` says which."""

    status, code = 422, "validation_error"


class TextTooLong(EmbedpoolError):
    """A text exceeds the limit and the caller asked for an error instead of truncation."""

    status, code = 422, "text_too_long"


class UnsupportedOption(EmbedpoolError):
    """The model cannot honour this option."""

    status, code = 422, "unsupported_option"


class UnsupportedTask(EmbedpoolError):
    """The model cannot do what is asked of it; the message says what it can."""

    status, code = 422, "unsupported_task"


class Overloaded(EmbedpoolError):
    """The queue or the pool is full; `retry_after_s` comes from the measured drain rate."""

    status, code = 429, "overloaded"
    default_retry_after_s = 1.0


# --- 5xx: it is the server's, or the remote's


class LoopDetected(EmbedpoolError):
    """The request has passed too many embedpool servers; one of them is a remote model of itself."""

    status, code, retry_helps = 508, "loop_detected", False


class InferenceFailed(EmbedpoolError):
    """The model failed on a text; `fields` names it."""

    status, code, retry_helps = 500, "inference_failed", False


NO_TEXTS_FAULT = (401, 402, 407, 429)  # the key, the account, the proxy, the load
REFUSALS = (400, 413, 422)  # of a remote service: it takes this call from nobody


class UpstreamError(EmbedpoolError):
    """A remote service failed. Its own 400, 413, 422 and 429 keep their status: those the caller can act on.

    `said` holds the service's own words, which may quote any text of the call: they are for the caller of all of them,
    never for another one or the log. `content_may_cause` says whether a text of the batch, and not the service, may be
    at fault, and `rows` which ones are, where the service has named them; `passing` says whether the same call may
    succeed when it is made again, `is_busy` that the service asks for a pause.
    """

    status, code = 502, "upstream_error"

    def __init__(
        self,
        message: str,
        *,
        said: str = "",
        remote_status: int | None = None,
        retry_after_s: float | None = None,
        passing: bool = False,
        content_may_cause: bool = False,
        rows: Iterable[int] = (),
    ) -> None:
        super().__init__(f"{message}: {said}" if said else message, retry_after_s=retry_after_s)
        self.for_the_log = message
        self.passing = passing
        self.rows = tuple(rows)
        self.is_busy = remote_status == 429
        self.remote_status = remote_status
        self.content_may_cause = (
            content_may_cause
            or bool(self.rows)
            or (remote_status is not None and remote_status >= 400 and remote_status not in NO_TEXTS_FAULT)
        )
        if remote_status in (*REFUSALS, 429):
            self.status = remote_status

    def without_words(self) -> Self:
        """The same for whoever must not see the service's words."""
        found = copy.copy(self)
        found.message = self.for_the_log
        found.args = (found.message,)
        return found

    def after_s(self, retry_after_s: float) -> Self:
        """The same with another time to ask again."""
        found = copy.copy(self)
        found.retry_after_s = retry_after_s
        return found


class ModelLoading(EmbedpoolError):
    """The model is in its first load."""

    status, code = 503, "model_loading"
    default_retry_after_s = 2.0


class ModelFailed(EmbedpoolError):
    """The model failed to load, or its replicas failed repeatedly; embedpool retries with back-off."""

    status, code = 503, "model_failed"
    default_retry_after_s = 5.0


class KeysUnknown(EmbedpoolError):
    """Keys exist and the server cannot read them at present; its log says why."""

    status, code = 503, "keys_unknown"
    default_retry_after_s = 5.0


class ShuttingDown(EmbedpoolError):
    """The server is stopping."""

    status, code = 503, "shutting_down"
    default_retry_after_s = 5.0


class DeadlineExceeded(EmbedpoolError):
    """The request's deadline passed before its vectors were ready."""

    status, code = 504, "deadline_exceeded"


class StorageError(EmbedpoolError):
    """The disk is full or read-only; the server changed and computed nothing."""

    status, code = 507, "storage_error"


class RateLimited(EmbedpoolError):
    """The key is over its rate limit; retry after `Retry-After` seconds."""

    status, code = 429, "rate_limited"


def _status_of() -> dict[str, int]:
    classes = [EmbedpoolError]
    for known in classes:
        classes += known.__subclasses__()
    return {known.code: known.status for known in classes}


STATUS_OF: Mapping[str, int] = _status_of()  # of each code


# --- not answered over HTTP


class ConfigError(EmbedpoolError):
    """config.yml does not parse or validate; the message names file, line and key."""


class ServerUnreachable(EmbedpoolError):
    """No server answers at the address."""


class ClientGone(EmbedpoolError):
    """The client closed its connection while its items waited."""

    status, code = 499, "client_gone"


def for_the_log(error: BaseException) -> str:
    """What may be logged of an error: of a remote service's never its words."""
    return error.for_the_log if isinstance(error, EmbedpoolError) else str(error)


HALF_A_CHARACTER = "it holds half a character (a lone surrogate): somebody has cut the text inside an emoji or the like"
_HALF = re.compile("[\ud800-\udfff]")


def with_half_a_character(texts: Iterable[str]) -> list[int]:
    """The indices of the texts that no encoding can hold."""
    return [i for i, text in enumerate(texts) if not text.isascii() and _HALF.search(text)]


def half_a_character(indices: Sequence[int], path: str = "texts") -> InvalidRequest:
    """The error of a list of texts of which these hold half a character; `path` is the list in the request."""
    named = indices[:MOST_NAMED]
    fields = {f"{path}[{i}]": HALF_A_CHARACTER for i in named}
    return InvalidRequest(f"{path}[{named[0]}]: {HALF_A_CHARACTER}", fields=fields, inputs=named)


def forget_frames(error: BaseException) -> None:
    """Let go of what the frames hold that this error, and those behind it, came through: a request, its vectors.

    An error that is kept by what its frames hold would keep all of it until garbage is collected. Not for one that a
    generator has caught and outlived: it would be ended.
    """
    behind: BaseException | None = error
    while behind is not None:
        traceback.clear_frames(behind.__traceback__)
        behind.__traceback__ = None
        behind = behind.__context__


def near_names(name: str, known: Iterable[str], count: int = 3) -> list[str]:
    """Up to `count` of the `known` names that resemble `name`, nearest first."""
    by_lower = {k.lower(): k for k in known}
    tails = [k for low, k in by_lower.items() if low.rpartition("/")[2] == name.lower().rpartition("/")[2]]
    close = [by_lower[m] for m in get_close_matches(name.lower(), by_lower, n=count, cutoff=0.6)]
    return list(dict.fromkeys(tails + close))[:count]


def as_document(error: EmbedpoolError, request_id: str) -> dict[str, Any]:
    """The one shape of an error over HTTP."""
    body: dict[str, Any] = {"code": error.code, "message": error.message, "request_id": request_id}
    if error.fields:
        body["fields"] = error.fields
    return {"error": body}
