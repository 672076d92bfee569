"""The web ring's one way into the pool: it makes the task for the model and the call, which says for whom."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from embedpool.errors import AnswerTooLarge
from embedpool.pool.pool import Pool
from embedpool.pool.request import Call, Result
from embedpool.tasks.embed import Embed, EmbedOptions
from embedpool.tasks.score import Score
from embedpool.tasks.task import Task
from embedpool.web.encoding import NUMBER_BYTES
from embedpool.web.http_request import HttpRequest
from embedpool.web.schemas import timeout_s


def embed(
    http: HttpRequest,
    pool: Pool,
    model: str,
    texts: Sequence[str],
    options: EmbedOptions,
    *,
    forms: Sequence[str] = ("float",),
) -> Result:
    """The texts' vectors, which the answer will hold in these forms, see NUMBER_BYTES."""

    def require_room(numbers: int, width: int) -> None:
        kept = options.dimensions / width if options.dimensions and width else 1.0
        size = numbers * kept * sum(NUMBER_BYTES[form] for form in forms)
        if size > http.max_answer_bytes:
            raise AnswerTooLarge(
                f"{len(texts)} vectors make an answer of about {size / 1e6:.0f} MB, the limit is "
                f"{http.max_answer_bytes / 1e6:.0f} MB; ask for fewer at once or in base64, or send lines (NDJSON) to "
                "/embed, or accept application/x-npy there"
            )

    return submit(http, pool, model, Embed(texts, options), call_of(http, pool, require_room=require_room))


def score(http: HttpRequest, pool: Pool, model: str, task: Score) -> Result:
    """Scores of pairs or texts."""
    http.words.setdefault("documents", task.path)
    return submit(http, pool, model, task, call_of(http, pool))


def submit(http: HttpRequest, pool: Pool, model: str, task: Task, call: Call) -> Result:
    """Serve a whole request: within the client's deadline, while it listens, and as far as its key may go."""
    http.model, http.task, http.texts = model, task.name, len(task)
    http.caller.require(pool, model)
    with http.caller.admitted():
        http.caller.spend(len(task))
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
    says = http.says_of_caches
    return Call(
        arrived_at=pool.clock(),
        age_s=0.0 if math.isfinite(within_s) else http.age_s,
        timeout_s=min(timeout_s(http) or math.inf, within_s, pool.request_timeout_s),
        caller=http.caller.key.id if http.caller.key else "",
        weight=http.caller.weight,
        share=share * http.share,
        require=http.caller.require_spec,
        client_gone=client_gone or http.client_gone,
        is_patient=is_patient,
        require_room=require_room,
        hops=http.hops,
        reads_cache=not says & {"no-store", "no-cache", "max-age=0"},
        writes_cache="no-store" not in says,
        trace=http.trace,
    )
