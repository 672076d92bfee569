"""OpenAI's files and batches: uploads are streamed to the disk, batches are entered for jobs/batches.py to run."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import orjson
from flask import Blueprint, Flask, Response, current_app, request
from marshmallow import fields, validate
from typing_extensions import override
from werkzeug.datastructures import Headers
from werkzeug.formparser import FormDataParser
from werkzeug.test import EnvironBuilder

from embedpool.config.fields import StrictInteger
from embedpool.config.settings import FORM_BYTES, Limits, Settings
from embedpool.errors import BodyTooLarge, InvalidRequest, StorageError
from embedpool.jobs.batch_run import Executed
from embedpool.jobs.store import FINISHED, Document, Store
from embedpool.pool.pool import Pool
from embedpool.web.body import OWN_HOSTS, read_document
from embedpool.web.compat import CompatSchema
from embedpool.web.dialects.openai import openai_shape
from embedpool.web.encoding import json_response
from embedpool.web.http_request import OWNER, here
from embedpool.web.manage import refuse_strangers, require_own_host
from embedpool.web.schemas import load

STORE = "embedpool.store"  # of an app's extensions
ENDPOINTS = (
    "/v1/embeddings", "/v1/rerank", "/v1/score", "/v1/classify", "/embed", "/v1/multi-vector",
    "/v1/contextualizedembeddings",
)  # fmt: skip
DAY_S = 86400
LONGEST_LIVES_S = 30 * DAY_S
MOST_PARTS = 20
ANCHOR = "created_at"
WINDOW = re.compile(r"([1-9][0-9]{0,3})([hd])\Z")
JSONL = "application/jsonl"


def _short(most: int) -> fields.String:
    return fields.String(validate=validate.Length(max=most))


class BatchSchema(CompatSchema):
    """Body of POST /v1/batches."""

    input_file_id = fields.String(required=True)
    endpoint = fields.String(required=True)
    completion_window = fields.String(load_default="24h")
    metadata = fields.Dict(keys=_short(64), values=_short(512))
    output_expires_after = fields.Dict()


class ListSchema(CompatSchema):
    """Query string of the lists."""

    limit = StrictInteger(validate=validate.Range(min=1, max=10_000))
    after = fields.String()
    order = fields.String(validate=validate.OneOf(("asc", "desc")))
    purpose = fields.String()


def blueprint(pool: Pool, settings: Settings) -> Blueprint:
    """The routes. A form is what any web page may send, so the guard of the management stands before them."""
    routes = Blueprint("batches", __name__)
    _add_files(routes, settings.limits)
    _add_batches(routes, settings.limits)

    @routes.before_request
    def let_in() -> None:
        own_hosts = current_app.extensions[OWN_HOSTS]
        if request.method in ("GET", "HEAD"):  # after DNS rebinding a page of another name would read texts
            require_own_host(request, own_hosts, "files and batches are")
        elif request.method != "OPTIONS":
            refuse_strangers(request, own_hosts, has_key=True)

    return routes


def _add_files(routes: Blueprint, limits: Limits) -> None:
    @routes.post("/v1/files")
    def upload() -> Response:
        length = request.content_length or 0
        if length > limits.max_file_bytes + FORM_BYTES:
            raise BodyTooLarge(f"the file has about {length} bytes, the limit is {limits.max_file_bytes}")
        if request.mimetype != "multipart/form-data":
            raise InvalidRequest("file: send multipart/form-data with a file and a purpose", fields={"file": "no form"})
        store = _store()
        file_id = store.new_file_id()
        with store.receiving(file_id, length) as path:
            form, filename = _received(path)
            purpose = form.get("purpose", "")
            if purpose != "batch":
                raise InvalidRequest(
                    f"purpose: must be batch, not {purpose!r:.40}", fields={"purpose": "must be batch"}
                )
            if not filename.lower().endswith(".jsonl"):
                says = "Invalid file format for Batch API. Must be .jsonl"
                raise InvalidRequest(f"file: {says}", fields={"file": says})
            if path.stat().st_size > limits.max_file_bytes:
                raise BodyTooLarge(f"the file is over the limit of {limits.max_file_bytes} bytes")
            asked = {key: form.get(f"expires_after[{key}]") for key in ("anchor", "seconds")}
            expires_at = store.now() + _lives_s("expires_after", asked)
            found = store.enter(file_id, _owner(), filename=filename[:512], purpose=purpose, expires_at=expires_at)
        return json_response(found)

    @routes.get("/v1/files")
    def files() -> Response:
        asked = load(ListSchema, _numbers(request.args))
        found = [one for one in _store().files(_owner()) if asked.get("purpose") in (None, one["purpose"])]
        return _page(found, asked, most=10_000)

    @routes.get("/v1/files/<name>")
    def file(name: str) -> Response:
        return json_response(_store().file(name, _owner()))

    @routes.delete("/v1/files/<name>")
    def delete(name: str) -> Response:
        _store().delete_file(name, _owner())
        return json_response({"id": name, "object": "file", "deleted": True})

    @routes.get("/v1/files/<name>/content")
    def content(name: str) -> Response:
        found = _store().file(name, _owner())
        stream = _store().content(name).open("rb")
        response = Response(_pieces(stream), mimetype=JSONL)
        response.headers["Content-Length"] = str(found["bytes"])
        response.call_on_close(stream.close)
        return response


def _add_batches(routes: Blueprint, limits: Limits) -> None:
    @routes.post("/v1/batches")
    def create() -> Response:
        body = load(BatchSchema, read_document(here(), limits, whatever_type=False))
        store = _store()
        if store.file(body["input_file_id"], _owner())["purpose"] != "batch":
            says = "is of results, not of requests"
            raise InvalidRequest(f"input_file_id: {says}", fields={"input_file_id": says})
        if body["endpoint"] not in ENDPOINTS:
            says = f"must be one of {', '.join(ENDPOINTS)}"
            raise InvalidRequest(f"endpoint: {says}", fields={"endpoint": says})
        if len(body.get("metadata") or {}) > 16:
            raise InvalidRequest("metadata: at most 16 pairs", fields={"metadata": "at most 16 pairs"})
        now = store.now()
        lives_s = _lives_s("output_expires_after", body.get("output_expires_after") or {})
        return json_response(store.new_batch(_owner(), _fresh(body, now), lives_s=lives_s))

    @routes.get("/v1/batches")
    def batches() -> Response:
        asked = load(ListSchema, _numbers(request.args))
        return _page(_store().batches(_owner()), {"limit": 20, **asked}, most=100)

    @routes.get("/v1/batches/<name>")
    def batch(name: str) -> Response:
        return json_response(_store().batch(name, _owner()))

    @routes.post("/v1/batches/<name>/cancel")
    def cancel(name: str) -> Response:
        found = _store().batch(name, _owner())
        if found["status"] in FINISHED:
            raise InvalidRequest(f"a batch that is {found['status']} cannot be cancelled")
        return json_response(_store().cancel(name, _owner()))


def _store() -> Store:
    store: Store = current_app.extensions[STORE]
    return store


def _owner() -> str:
    """Whose files and batches are seen: those of the key, or of all without one."""
    key = here().caller.key
    return key.id if key else ""


class _Counting(io.BufferedRandom):
    """A file over what has its place; `written` bytes are its content."""

    written = 0

    @override
    def write(self, content: Any) -> int:
        self.written += len(content)
        return super().write(content)


def _received(path: Path) -> tuple[Mapping[str, str], str]:
    """The form's fields and the name of its file, whose content goes there piece by piece. Raises InvalidRequest."""
    opened: list[_Counting] = []

    def into(
        total_content_length: int | None,
        content_type: str | None,
        filename: str | None,
        content_length: int | None = None,
    ) -> IO[bytes]:
        if opened:
            raise InvalidRequest("file: one is enough", fields={"file": "one is enough"})
        opened.append(_Counting(io.FileIO(path, "r+")))
        return opened[0]

    parser = FormDataParser(
        stream_factory=into, max_form_memory_size=FORM_BYTES, max_form_parts=MOST_PARTS, silent=False
    )
    try:
        _, form, files = parser.parse(request.stream, request.mimetype, request.content_length, request.mimetype_params)
        for stream in opened:
            stream.truncate(stream.written)
    except ValueError as error:
        raise InvalidRequest(f"file: the form cannot be read: {error}", fields={"file": str(error)}) from None
    except OSError as error:
        raise StorageError(f"there is no room for the file: {error.strerror or error}") from None
    finally:
        for stream in opened:
            with contextlib.suppress(OSError):
                stream.close()
    given = files.get("file")
    if given is None or not opened:
        raise InvalidRequest("file: missing", fields={"file": "missing"})
    return form, given.filename or ""


def _lives_s(name: str, asked: Mapping[str, Any]) -> int:
    """How long a file is kept. Raises InvalidRequest."""
    given, anchor = (asked.get(key) for key in ("seconds", "anchor"))
    says = f"seconds must be 3600 to {LONGEST_LIVES_S}"
    if anchor not in (None, "", ANCHOR):
        says = f"anchor must be {ANCHOR}"
    elif given in (None, ""):
        return LONGEST_LIVES_S
    else:
        with contextlib.suppress(TypeError, ValueError, OverflowError):
            if 3600 <= int(given) <= LONGEST_LIVES_S:
                return int(given)
    raise InvalidRequest(f"{name}: {says}", fields={name: says})


def _fresh(body: Mapping[str, Any], now: int) -> Document:
    """A batch that has not begun. Raises InvalidRequest."""
    window = WINDOW.match(body["completion_window"])
    if window is None:
        says = "must be 24h, or another number of hours or days"
        raise InvalidRequest(f"completion_window: {says}", fields={"completion_window": says})
    seconds = int(window[1]) * (3600 if window[2] == "h" else DAY_S)
    unknown = dict.fromkeys(
        ("output_file_id", "error_file_id", "errors", "in_progress_at", "finalizing_at", "completed_at", "failed_at",
         "expired_at", "cancelling_at", "cancelled_at", "usage", "model", "paused", "requests_s", "seconds_left"),
    )  # fmt: skip
    return {
        **unknown, "object": "batch", "endpoint": body["endpoint"], "input_file_id": body["input_file_id"],
        "completion_window": body["completion_window"], "status": "validating", "created_at": now,
        "expires_at": now + seconds, "request_counts": {"total": 0, "completed": 0, "failed": 0},
        "metadata": body.get("metadata"),
    }  # fmt: skip


def _numbers(arguments: Mapping[str, str]) -> dict[str, Any]:
    return {name: int(text) if name == "limit" and text.isdecimal() else text for name, text in arguments.items()}


def _page(found: list[Document], asked: Mapping[str, Any], *, most: int) -> Response:
    """From behind `after` on; newest first unless asked otherwise."""
    if asked.get("order") != "asc":
        found = found[::-1]
    if after := asked.get("after"):
        place = next((i for i, one in enumerate(found) if one["id"] == after), len(found))
        found = found[place + 1 :]
    shown = found[: min(asked.get("limit", most), most)]
    return json_response(
        {
            "object": "list", "data": shown, "first_id": shown[0]["id"] if shown else None,
            "last_id": shown[-1]["id"] if shown else None, "has_more": len(shown) < len(found),
        }
    )  # fmt: skip


def _pieces(stream: IO[bytes]) -> Any:
    while piece := stream.read(1 << 16):
        yield piece


# --- a line of a batch


def executed(app: Flask, url: str, body: bytes, owner: str) -> Executed:
    """A line goes the road of every request, for the key that made the batch, as that key is now."""
    builder = EnvironBuilder(
        method="POST", path=url, data=body, content_type="application/json", environ_overrides={OWNER: owner}
    )
    with contextlib.closing(builder), app.request_context(builder.get_environ()):
        with app.full_dispatch_request() as response:
            content, headers = response.get_data(), response.headers
        told = headers.get("Retry-After", "")
        return Executed(
            response.status_code, content, headers.get("X-Request-Id", ""),
            _tokens_in(content, headers) if response.status_code == 200 else 0,
            float(told) if told.isdecimal() else 1.0, here().error_code,
        )  # fmt: skip


def _tokens_in(content: bytes, headers: Headers) -> int:
    """How many a request took: each of ENDPOINTS says it in `usage`, but for our own, and TEI's in a header."""
    if told := headers.get("x-compute-tokens"):
        return int(told)
    answer = orjson.loads(content)
    found: int = answer["usage"]["total_tokens"] if "usage" in answer else answer["meta"]["tokens"]
    return found


SHAPES = dict.fromkeys(("/v1/files", "/v1/batches"), openai_shape)
