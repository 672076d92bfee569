"""The innermost ring: a batch becomes vectors. The table of drivers; a new provider is one file and one line here."""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable
from pathlib import Path

from embedpool.config.spec import Isolation, ModelSpec
from embedpool.drivers.base import Driver, Meter
from embedpool.drivers.child import ChildDriver

# Imported on use: torch and requests cost seconds and memory that other models need not pay for.
_MODULES = {
    "local_st": "embedpool.drivers.local_st",
    "http": "embedpool.drivers.http",
    "fake": "embedpool.drivers.fake",
}


def make_driver(
    spec: ModelSpec,
    cache_dir: Path,
    prepare_child: Callable[[], None] | None = None,
    longest_batch_s: float = math.inf,
) -> Driver:
    """A driver of the spec's type, not yet open, placed as the spec says.

    In a process of its own `prepare_child` is called first, and a batch there is ended after `longest_batch_s`.
    """
    module = importlib.import_module(_MODULES[spec.driver.type])
    make: Callable[[], Driver] = functools.partial(module.make_driver, spec, cache_dir)
    if isinstance(spec.driver.config, Isolation) and spec.driver.config.isolation == "process":
        return ChildDriver(spec, make, prepare_child, longest_batch_s)
    return make()


def open_meter(spec: ModelSpec) -> Meter:
    """The meter of the spec's type. Raises ModelFailed if the model's tokenizer cannot be had."""
    meter: Meter = importlib.import_module(_MODULES[spec.driver.type]).open_meter(spec)
    return meter
