"""The web ring's one way into the pool: it makes the task for the model and the call, which says for whom."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from embedpool.errors import AnswerTooLarge, UnsupportedOption
from embedpool.pool.pool import Pool
from embedpool.pool.request import Call, Result
from embedpool.tasks.by_vectors import ByVectors, MaxSim
from embedpool.tasks.embed import EmbedOptions
from embedpool.tasks.hybrid import output_of, task_for
from embedpool.tasks.late_chunking import LateChunking, Tokens
from embedpool.tasks.score import Rerank, Score
from embedpool.tasks.task import Task
from embedpool.web.encoding import NUMBER_BYTES, Names
from embedpool.web.http_request import OWNER, HttpRequest
from embedpool.web.schemas import timeout_s

BULK_WEIGHT = 0.25  # of a key's own, for all lines of its batches that are under way


def require(http: HttpRequest, what: str, numbers: float, forms: Sequence[str]) -> None:
    """Raises AnswerTooLarge where so many numbers make too large an answer."""
    size = numbers * sum(NUMBER_BYTES[form] for form in forms)
    if size > http.max_answer_bytes:
        raise AnswerTooLarge(
            f"{what} make an answer of about {size / 1e6:.0f} MB, the limit is "
            f"{http.max_answer_bytes / 1e6:.0f} MB; ask for fewer at once or in base64, or send lines (NDJSON) to "
            "/embed, or accept application/x-npy there"
        )


def embed(
    http: HttpRequest,
    pool: Pool,
    model: str,
    texts: Sequence[str],
    options: EmbedOptions,
    *,
    forms: Sequence[str] = ("float",),
    wanted: Sequence[str] = ("dense",),
) -> Result:
    """The texts' rows, which the answer will hold in these forms, see NUMBER_BYTES; `wanted` are the outputs."""

    def require_room(numbers: int, width: int) -> None:
        kept = options.dimensions / width if options.dimensions and width else 1.0
        require(http, f"{len(texts)} texts", numbers * kept, forms)

    task = task_for(wanted, texts, options)
    return submit(http, pool, model, task, call_of(http, pool, require_room=require_room))


def tokens(http: HttpRequest, pool: Pool, model: str, texts: Sequence[str], options: EmbedOptions) -> Result:
    """The vectors that a dense model's tokens have before it pools them."""

    def require_room(numbers: int, width: int) -> None:
        require(http, f"the tokens of {len(texts)} texts", numbers, ("float",))

    return submit(http, pool, model, Tokens(texts, options), call_of(http, pool, require_room=require_room))


def outputs_of(http: HttpRequest, pool: Pool, model: str) -> Sequence[str]:
    """The outputs of a model where a request names none: that of its kind, dense if it has several."""
    http.model = model
    http.caller.require(pool, model)
    return [output_of(pool.find(model).kinds_at_all())]


def names_of(http: HttpRequest, pool: Pool, model: str, wanted: Sequence[str]) -> Names:
    """What names the tokens of sparse rows. Raises UnsupportedOption where there are none."""
    http.model = model
    http.caller.require(pool, model)
    tokenizer = pool.find(model).tokenizer()
    if "sparse" not in wanted or not tokenizer.indices_are_tokens:
        says = "is for sparse rows whose indices are tokens"
        raise UnsupportedOption(f"options.tokens: {says}", fields={"options.tokens": says})
    return tokenizer.names


def score(
    http: HttpRequest, pool: Pool, model: str, task: Score, *, also: Sequence[type[ByVectors]] = (MaxSim,)
) -> Result:
    """Scores of pairs or texts; where a model gives vectors alone, by them if that is one of the ways in `also`."""
    http.words.setdefault("documents", task.path)
    if isinstance(task, Rerank):
        http.caller.require(pool, model)
        if way := way_of(pool, model, also):
            task = way(task.parts, task.options, task.path)
    return submit(http, pool, model, task, call_of(http, pool))


def way_of(pool: Pool, model: str, ways: Sequence[type[ByVectors]] = (MaxSim,)) -> type[ByVectors] | None:
    """The first of these ways in which the model can score pairs by vectors; None of one that reads pairs."""
    kinds = pool.find(model).kinds_at_all()
    return None if Rerank.name in kinds else next((way for way in ways if way.name in kinds), None)


def late_chunks(
    http: HttpRequest, pool: Pool, model: str, task: LateChunking, *, forms: Sequence[str] = ("float",)
) -> Result:
    """A vector for each chunk of documents that are read as a whole."""
    chunks = sum(map(len, task.documents))

    def require_room(numbers: int, width: int) -> None:
        count = sum(len(plan.chunks) for plan in task.plans) or chunks
        require(http, f"{count} chunks", count * (task.options.dimensions or width), forms)
        if 4 * numbers > http.max_answer_bytes:
            raise AnswerTooLarge(
                f"the vectors of all tokens take {4 * numbers / 1e6:.0f} MB before they become those of chunks, the "
                f"limit is {http.max_answer_bytes / 1e6:.0f} MB; send fewer documents at once"
            )

    http.words.setdefault("texts", task.path)
    return submit(http, pool, model, task, call_of(http, pool, require_room=require_room), texts=chunks)


def submit(http: HttpRequest, pool: Pool, model: str, task: Task, call: Call, *, texts: int | None = None) -> Result:
    """Serve a whole request: within the client's deadline, while it listens, and as far as its key may go.

    `texts` are how many it counts for, where it has not one for each input.
    """
    texts = len(task) if texts is None else texts
    http.model, http.task, http.texts = model, task.name, texts
    http.caller.require(pool, model)
    with http.caller.admitted():
        http.caller.spend(texts)
        result = pool.submit(model, task, call)
    http.add(result)
    return result


def call_of(
    http: HttpRequest,
    pool: Pool,
    *,
    within_s: float = math.inf,
    share: float = 1.0,
    client_gone: Callable[[], bool] | None = None,
    is_patient: bool = False,
    require_room: Callable[[int, int], None] = lambda numbers, width: None,
) -> Call:
    """For whom a request to the pool is. One of several that serve a request of lines has a `share` of a whole one.

    A deadline `within_s` is counted from now, the others from the request's first byte.
    """
    says, is_bulk = http.says_of_caches, OWNER in http.environ
    return Call(
        arrived_at=pool.clock(),
        age_s=0.0 if math.isfinite(within_s) else http.age_s,
        timeout_s=min(timeout_s(http) or math.inf, within_s, pool.request_timeout_s),
        caller=http.caller.key.id if http.caller.key else "",
        weight=http.caller.weight * (BULK_WEIGHT if is_bulk else 1.0),
        share=share,
        is_bulk=is_bulk,
        require=http.caller.require_spec,
        client_gone=client_gone or http.client_gone,
        is_patient=is_patient,
        require_room=require_room,
        hops=http.hops,
        reads_cache=not says & {"no-store", "no-cache", "max-age=0"},
        writes_cache="no-store" not in says,
        trace=http.trace,
    )
