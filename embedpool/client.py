"""The Python client of a running server, built on requests. The CLI uses it, too."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote, urlsplit

import numpy as np
import requests
from numpy.typing import NDArray

from embedpool.each import TOO_MUCH, Each, asked_in_parts
from embedpool.errors import (
    EmbedpoolError,
    ModelChanged,
    ServerUnreachable,
    half_a_character,
    with_half_a_character,
)
from embedpool.outputs import DENSE, MULTIVECTOR, SPARSE, SparseRow, forms_in, rows_of_arrays, rows_of_json
from embedpool.upload import PIECE_BYTES, Form

logger = logging.getLogger(__name__)

Answer = TypeVar("Answer")

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")
TEXTS_PER_CALL = 1000
LEAST_WAIT_S = 0.25  # before a busy server is asked again, whatever it says
DEADLINE_MARGIN_S = 5.0  # in which the answer that a deadline has passed arrives
CHARS_PER_CALL = 4_000_000
BUSY = (429, 503)
NPY, NPZ = "application/x-npy", "application/x-npz"


@dataclasses.dataclass(frozen=True, slots=True)
class Ranked:
    """A document of a rerank, by its place in the request, with its score."""

    index: int
    score: float


class Client:
    """Speaks to the server at `base_url`. Raises EmbedpoolError with the server's status and code.

    For one thread at a time. `timeout_s` is the longest wait for one answer. A server that is busy or still loading
    (429, 503) is asked again when it says, for up to `retry_s` seconds for one call.
    """

    def __init__(
        self, base_url: str, *, api_key: str | None = None, timeout_s: float = 120.0, retry_s: float = 60.0
    ) -> None:
        self._base_url = base_url.rstrip("/")
        self._api_key = api_key
        self._timeout_s = timeout_s
        self._retry_s = retry_s
        self.space: str | None = None  # whose numbers the vectors are that it got last
        self._told_space = ""  # of the last answer in JSON
        self._session = requests.Session()
        # A proxy has no way to this machine's loopback, and management refuses what came through one.
        local = urlsplit(self._base_url).hostname in LOOPBACK_NAMES
        self._proxies = {"http": "", "https": ""} if local else None
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}

    def again(self, *, timeout_s: float | None = None, retry_s: float | None = None) -> Client:
        """One more of the same, for another thread; more patient, if need be."""
        times = {"timeout_s": timeout_s or self._timeout_s, "retry_s": retry_s or self._retry_s}
        return Client(self._base_url, api_key=self._api_key, **times)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._session.close()

    def embed(self, texts: Sequence[str], *, model: str, **options: Any) -> NDArray[Any]:
        """The vectors of the texts, of shape (texts, dim), in order; `options` are those of POST /embed.

        Any number of texts, which go in calls of up to 1,000, or 4 million characters. How many the server had to
        truncate is logged as a warning. Raises ModelChanged if `model` became another one between two calls, and before
        anything is sent InvalidRequest for a text with half a character.
        """
        parts = self._answers(texts, model, {**options, "output": DENSE}, NPY)
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def embed_sparse(self, texts: Sequence[str], *, model: str, **options: Any) -> list[SparseRow]:
        """The sparse row of each text; as `embed` in all else."""
        parts = self._answers(texts, model, {**options, "output": SPARSE}, NPZ)
        return [row for part in parts for row in rows_of_arrays(part)]

    def embed_multivector(self, texts: Sequence[str], *, model: str, **options: Any) -> list[NDArray[Any]]:
        """The vectors of each text, of shape (vectors, dim); as `embed` in all else.

        What the texts are for (`input_type="query"`, else documents) decides how many there are.
        """
        parts = self._answers(texts, model, {**options, "output": MULTIVECTOR}, NPZ)
        return [row for part in parts for row in rows_of_arrays(part)]

    def embed_hybrid(
        self, texts: Sequence[str], *, model: str, outputs: Sequence[str] = (DENSE, SPARSE), **options: Any
    ) -> dict[str, Any]:
        """Several outputs of one pass, by name, each as `embed`, `embed_sparse` and `embed_multivector` give it."""
        parts = [rows_of_arrays(part) for part in self._answers(texts, model, {**options, "output": outputs}, NPZ)]
        return {
            output: np.concatenate([part[output] for part in parts])
            if output == DENSE
            else [row for part in parts for row in part[output]]
            for output in outputs
        }

    def embed_json(self, texts: Sequence[str], *, model: str, **options: Any) -> list[Any]:
        """What POST /embed answers for each of up to 1,000 texts, whatever output is asked for."""
        found = self._asked_again("/embed", {"model": model, "texts": list(texts), "options": options})
        self.space = self._told_space
        return forms_in(found)

    def _answers(self, texts: Sequence[str], model: str, options: dict[str, Any], accept: str) -> list[Any]:
        """What numpy reads of the answer to each call."""
        if isinstance(texts, str):
            raise TypeError("texts must be a list of strings, not one string")
        if broken := with_half_a_character(texts):
            raise half_a_character(broken)
        self.space = None
        return [found for i, j in _parts(texts) for found in self._answer(texts[i:j], model, options, i, accept)]

    def _answer(self, texts: Sequence[str], model: str, options: dict[str, Any], first: int, accept: str) -> list[Any]:
        """Of texts number `first` and those that follow, of the same space as those before; in halves, if need be."""
        body = {"model": model, "texts": list(texts), "options": options}
        try:
            response = self._when_not_busy(
                lambda: self._send("POST", "/embed", body, accept=accept, deadline_s=self._timeout_s)
            )
        except EmbedpoolError as error:
            if error.status in TOO_MUCH and len(texts) > 1:
                middle = len(texts) // 2
                halves = ((texts[:middle], first), (texts[middle:], first + middle))
                return [found for half, at in halves for found in self._answer(half, model, options, at, accept)]
            if first:
                error.args = (f"{error.message} (of the texts from number {first})",)
                error.message = error.args[0]
            raise
        before, self.space = self.space, response.headers.get("X-Embedpool-Space")
        if before not in (None, self.space):
            raise ModelChanged(f"{model!r} has become another model; texts from number {first} have vectors of that")
        if truncated := int(response.headers["X-Embedpool-Truncated"]):
            logger.warning("%d of %d texts were truncated; truncate='error' refuses them", truncated, len(texts))
        return [np.load(io.BytesIO(response.content), allow_pickle=False)]

    def embed_each(self, texts: Sequence[str], *, model: str, **options: Any) -> Each:
        """As `embed`, of up to 1,000 texts, but one that fails takes no other with it; its row means nothing.

        Of another output than dense vectors the rows are a list, see outputs.py.
        """
        wanted = {**options, "on_error": "partial", "encoding": "base64"}

        def ask(some: Sequence[str]) -> Each:
            found = self._asked_again("/embed", {"model": model, "texts": list(some), "options": wanted})
            return self._each(rows_of_json(found, options.get("precision")), found)

        return asked_in_parts(texts, ask)

    def score_each(self, pairs: Sequence[tuple[str, str]], *, model: str, **options: Any) -> Each:
        """The scores of up to 1,000 pairs, of shape (pairs, 1); a pair that fails takes no other with it."""
        wanted = {**options, "on_error": "partial"}

        def ask(some: Sequence[tuple[str, str]]) -> Each:
            queries, documents = [query for query, _ in some], [document for _, document in some]
            body = {"model": model, "queries": queries, "documents": documents, "options": wanted}
            found = self._asked_again("/score", body)
            return self._each(np.array([[entry["score"] or 0.0] for entry in found["data"]], np.float32), found)

        return asked_in_parts(pairs, ask)

    def _each(self, values: NDArray[Any] | list[Any], found: dict[str, Any]) -> Each:
        errors = {entry["index"]: (entry["code"], entry["message"]) for entry in found["errors"]}
        return Each(values, errors, self._told_space, found["meta"]["tokens"], found["meta"]["truncated"])

    def rerank(
        self, query: str, documents: Sequence[str], *, model: str, top_n: int | None = None, **options: Any
    ) -> list[Ranked]:
        """The documents in the order of their relevance to the query, the best first; `options` of POST /rerank."""
        body = {"model": model, "query": query, "documents": list(documents), "top_n": top_n, "options": options}
        results = self._asked_again("/rerank", body)["results"]
        return [Ranked(entry["index"], entry["score"]) for entry in results]

    def score(self, queries: Sequence[str], documents: Sequence[str], *, model: str, **options: Any) -> NDArray[Any]:
        """float32 scores of pairs, of shape (pairs,): of each query with its document, or of one with all of them."""
        body = {"model": model, "queries": list(queries), "documents": list(documents), "options": options}
        return np.array([entry["score"] for entry in self._asked_again("/score", body)["data"]], np.float32)

    def classify(self, texts: Sequence[str], *, model: str, **options: Any) -> list[dict[str, float]]:
        """For each text the score of each label, the best first; nothing of one that failed."""
        body = {"model": model, "input": list(texts), "options": options}
        data = self._asked_again("/classify", body)["data"]
        return [{entry["label"]: entry["score"] for entry in of_text or ()} for of_text in data]

    def _asked_again(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """The answer, also of a server that is busy at first."""
        return self._when_not_busy(lambda: self._call("POST", path, body))

    def _when_not_busy(self, ask: Callable[[], Answer]) -> Answer:
        """What is answered; a server that is busy or loading is asked again when it says, for up to `retry_s`."""
        patience_s = self._retry_s
        while True:
            try:
                return ask()
            except EmbedpoolError as error:
                wait_s = error.retry_after_s
                if error.status not in BUSY or wait_s is None or wait_s > patience_s:
                    raise
                wait_s = max(wait_s, LEAST_WAIT_S)
                patience_s -= wait_s
                time.sleep(wait_s)

    def create_batch(self, path: Path, *, endpoint: str, window: str = "24h") -> dict[str, Any]:
        """Upload a file of requests, piece by piece, and have them run; the batch, as OpenAI's API has it."""
        with path.open("rb") as file:
            form = Form(path.name, file, path.stat().st_size)
            response = self._asked("POST", "/v1/files", {"Content-Type": form.content_type}, data=form)
        if response.status_code >= 300:
            raise _as_error(self._document(response), response)
        body = {"input_file_id": self._document(response)["id"], "endpoint": endpoint, "completion_window": window}
        return self._call("POST", "/v1/batches", body)

    def batches(self) -> Iterator[dict[str, Any]]:
        """The caller's, newest first."""
        after, has_more = "", True
        while has_more:
            page = self._call("GET", f"/v1/batches?limit=100{after}")
            yield from page["data"]
            after, has_more = f"&after={page['last_id']}", page["has_more"]

    def batch(self, batch_id: str) -> dict[str, Any]:
        """One of them."""
        return self._call("GET", f"/v1/batches/{quote(batch_id, safe='')}")

    def cancel_batch(self, batch_id: str) -> dict[str, Any]:
        """Have it end; what is finished is kept."""
        return self._call("POST", f"/v1/batches/{quote(batch_id, safe='')}/cancel")

    def fetch_file(self, file_id: str, path: Path) -> None:
        """Write what a file of the server holds, piece by piece; `path` appears when all is there."""
        part = path.with_name(path.name + ".part")
        with self._asked("GET", f"/v1/files/{quote(file_id, safe='')}/content", {}, stream=True) as response:
            if response.status_code >= 300:
                raise _as_error(self._document(response), response)
            with part.open("wb") as file, self._reached():
                for piece in response.iter_content(PIECE_BYTES):
                    file.write(piece)
        part.replace(path)

    def health(self) -> dict[str, Any]:
        """GET /health. Raises ServerUnreachable if the answer is not that of embedpool, whoever else is there."""
        found = self._call("GET", "/health")
        if not {"ok", "booted", "models"} <= set(found):
            raise ServerUnreachable(f"what answers at {self._base_url} is not embedpool")
        return found

    def status(self) -> dict[str, Any]:
        """GET /status."""
        return self._call("GET", "/status")

    def progress(self, model: str) -> dict[str, Any] | None:
        """How far a model is that is being opened, from /status: step, done_bytes and total_bytes; None if none is."""
        status = self.status()
        for entry in (*status.get("candidates", ()), *status["models"]):
            if model in (entry["model"], entry["alias"]):
                found: dict[str, Any] | None = (entry.get("successor") or entry)["progress"]
                if found:
                    return found
        return None

    def register(
        self, registration: dict[str, Any], *, replace: bool = False, timeout_s: float | None = None
    ) -> dict[str, Any]:
        """POST /models/register; returns when the model is ready."""
        path = f"/models/register?replace={str(replace).lower()}"
        return self._call("POST", path, registration, timeout_s=timeout_s)

    def set_alias(self, model: str, alias: str | None) -> dict[str, Any]:
        """POST /models/alias."""
        return self._call("POST", "/models/alias", {"model": model, "alias": alias})

    def set_enabled(self, model: str, enabled: bool, *, timeout_s: float | None = None) -> dict[str, Any]:
        """POST /models/enable; returns when the model is ready."""
        return self._call("POST", "/models/enable", {"model": model, "enabled": enabled}, timeout_s=timeout_s)

    def unregister(self, model: str) -> dict[str, Any]:
        """DELETE /models/<name or alias>."""
        return self._call("DELETE", f"/models/{quote(model, safe='')}")

    def clear_cache(self, model: str | None = None) -> dict[str, Any]:
        """POST /cache/clear: what is known of a model's rows is forgotten, or of all."""
        return self._call("POST", "/cache/clear", {"model": model} if model else {})

    def _call(
        self, method: str, path: str, body: dict[str, Any] | None = None, *, timeout_s: float | None = None
    ) -> dict[str, Any]:
        response = self._send(method, path, body, timeout_s=timeout_s)
        self._told_space = response.headers.get("X-Embedpool-Space", "")
        document = self._document(response)
        if not isinstance(document, dict):
            raise ServerUnreachable("the answer is not one of embedpool")
        return document

    def _send(
        self,
        method: str,
        path: str,
        body: dict[str, Any] | None,
        *,
        accept: str = "application/json",
        timeout_s: float | None = None,
        deadline_s: float | None = None,
    ) -> requests.Response:
        """The answer, if it is a good one. With `deadline_s` the server itself is told by when it is wanted."""
        headers = {"Accept": accept}
        if deadline_s:
            headers["X-Request-Timeout-Ms"] = str(max(int(deadline_s * 1000), 1))
            timeout_s = deadline_s + DEADLINE_MARGIN_S
        response = self._asked(method, path, headers, timeout_s, json=body)
        if response.status_code < 300 and response.headers.get("Content-Type") == accept:
            return response
        raise _as_error(self._document(response), response)

    def _asked(
        self, method: str, path: str, headers: dict[str, str], timeout_s: float | None = None, **more: Any
    ) -> requests.Response:
        """Whatever is answered. Raises ServerUnreachable."""
        with self._reached():
            return self._session.request(
                method,
                self._base_url + path,
                headers={**self._headers, **headers},
                timeout=timeout_s or self._timeout_s,
                allow_redirects=False,
                proxies=self._proxies,
                **more,
            )

    @contextlib.contextmanager
    def _reached(self) -> Iterator[None]:
        """While something is sent or read."""
        try:
            yield
        except requests.RequestException as error:
            raise ServerUnreachable(f"no answer from {self._base_url} ({type(error).__name__})") from None

    def _document(self, response: requests.Response) -> Any:
        try:
            return response.json()
        except requests.JSONDecodeError:
            raise ServerUnreachable(f"what answers at {self._base_url} is not embedpool") from None


def _parts(texts: Sequence[str]) -> Iterator[tuple[int, int]]:
    """From where to where the texts of each call are; one call where there is no text."""
    start = size = 0
    for i, text in enumerate(texts):
        if i > start and (i - start == TEXTS_PER_CALL or size + len(text) > CHARS_PER_CALL):
            yield start, i
            start, size = i, 0
        size += len(text)
    yield start, len(texts)


def _as_error(document: Any, response: requests.Response) -> EmbedpoolError:
    """The server's error, with its status and code."""
    error = document.get("error") if isinstance(document, dict) else None
    if not isinstance(error, dict):
        return ServerUnreachable("the answer is not one of embedpool")
    told = response.headers.get("Retry-After", "")
    wait_s = float(told) if told.isascii() and told.isdigit() else None
    found = EmbedpoolError(str(error.get("message")), fields=error.get("fields"), retry_after_s=wait_s)
    found.status, found.code = response.status_code, str(error.get("code"))
    return found
