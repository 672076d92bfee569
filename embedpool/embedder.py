"""Embeds columns of data in the process that asks: for tools that bring their own workers, such as Ray Data."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Mapping
from typing import Any

from embedpool.config.config_yml import find_config_yml, load_settings
from embedpool.errors import EmbedpoolError
from embedpool.in_process import computing
from embedpool.jobs.sources import Row
from embedpool.places.cores import limit_cores


class Embedder:
    """A model of pool.yml, called with batches: `dataset.map_batches(Embedder, fn_constructor_kwargs={"model": …})`.

    It gives the vectors that a server gives for `options`, those of POST /embed. `config` is the path of config.yml,
    which must be there on every node; default: as everywhere. The model runs in this process, whatever its `place` is:
    the tool has placed it already. In a Ray worker it uses the CPUs that Ray has given it.
    Raises what loading the model raises.
    """

    def __init__(
        self, model: str, *, column: str = "text", into: str = "vector", config: str | None = None, **options: Any
    ) -> None:
        self._column = column
        self._into = into
        self._stack = contextlib.ExitStack()
        if cpus := _cpus_of_ray():
            limit_cores(math.ceil(cpus))
        settings = load_settings(find_config_yml(config))
        self._compute = self._stack.enter_context(computing(settings, model, options, pairs=False, in_threads=True))

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The batch with its vectors, of shape (rows, dimensions). Raises EmbedpoolError for a text that fails."""
        rows = [Row(i, i, (str(text),), 0) for i, text in enumerate(batch[self._column])]
        found = self._compute(rows)
        for i, (code, message) in found.errors.items():
            raise EmbedpoolError(f"{self._column} {rows[i].parts[0][:80]!r}: {code}: {message}")
        return {**batch, self._into: found.values}

    def close(self) -> None:
        """Unload the model."""
        self._stack.close()


def _cpus_of_ray() -> float:
    """0 outside of Ray's workers."""
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return 0.0
    return float(ray.get_runtime_context().get_assigned_resources().get("CPU", 0))
