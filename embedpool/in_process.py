"""A model of pool.yml in this process, for files that are to be embedded where no server runs."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from embedpool.config.pool_yml import PoolFile
from embedpool.config.settings import Settings
from embedpool.config.spec import PoolSpec, Resources
from embedpool.errors import ModelNotFound
from embedpool.jobs.file_job import Compute, Computed
from embedpool.jobs.sources import Row
from embedpool.outputs import rows_each
from embedpool.pool.cache import Cache
from embedpool.pool.request import Call
from embedpool.server import make_pool
from embedpool.tasks.hybrid import output_of, task_for
from embedpool.tasks.score import Rerank, ScoreOptions, scores_of
from embedpool.tasks.task import Task
from embedpool.web.encoding import arrays_of
from embedpool.web.metrics import Metrics
from embedpool.web.schemas import OptionsSchema, embed_options, load
from embedpool.web.score import ScoreOptionsSchema
from embedpool.web.submit import way_of

LONGEST_WINDOW_S = 3600.0


@contextlib.contextmanager
def computing(
    settings: Settings, name: str, options: Mapping[str, Any], *, pairs: bool, in_threads: bool = False
) -> Iterator[Compute]:
    """What computes windows with this model, which is loaded for it. Raises ModelNotFound, and why it does not load.

    With `in_threads` it runs in this process, whatever its place is.
    """
    spec = PoolFile(settings.file(settings.paths.pool_yml)).read()
    found = spec.find(name)
    if found is None:
        raise ModelNotFound(name, [other for model in spec.models for other in model.names])
    on_demand = dataclasses.replace(found.scaling, min=0, idle_ttl_s=LONGEST_WINDOW_S)
    wanted = dataclasses.replace(found, enabled=True, scaling=on_demand)  # the first window waits for it
    if in_threads:
        wanted = dataclasses.replace(wanted, place="thread", resources=Resources())
    given = {**options, "on_error": "partial"}
    raw = bool(given.get("raw_scores"))
    if pairs:
        loaded = load(ScoreOptionsSchema, given)
        loaded.pop("raw_scores", None)
    else:
        loaded = load(OptionsSchema, given)
    pool = make_pool(settings, Metrics(), Cache())

    def compute(rows: Sequence[Row]) -> Computed:
        task: Task
        if pairs:
            makes = way_of(pool, name) or Rerank
            task = makes([row.parts for row in rows], ScoreOptions(**loaded))
        else:
            outputs = loaded.get("output") or [output_of(pool.find(name).kinds_at_all())]
            task = task_for(outputs, [row.parts[0] for row in rows], embed_options(loaded))
        result = pool.submit(name, task, Call(arrived_at=pool.clock(), timeout_s=LONGEST_WINDOW_S))
        values = scores_of(result.vectors, raw=raw) if pairs else rows_each(arrays_of(result.rows))
        errors = {i: (error.code, error.message) for i, error in result.errors.items()}
        return Computed(values, errors, result.space, result.tokens, len(result.truncated))

    try:
        pool.apply(PoolSpec((wanted,)))
        yield compute
    finally:
        pool.stop()
