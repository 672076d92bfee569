"""The innermost ring: a batch becomes vectors. The table of drivers; a new provider is one file and one line here."""

from __future__ import annotations

import importlib
from pathlib import Path

from embedpool.config.spec import ModelSpec
from embedpool.drivers.base import Driver, Meter

# Imported on use: torch and requests cost seconds and memory that other models need not pay for.
_MODULES = {
    "local_st": "embedpool.drivers.local_st",
    "http": "embedpool.drivers.http",
    "fake": "embedpool.drivers.fake",
}


def make_driver(spec: ModelSpec, cache_dir: Path) -> Driver:
    """A driver of the spec's type, not yet open."""
    driver: Driver = importlib.import_module(_MODULES[spec.driver.type]).make_driver(spec, cache_dir)
    return driver


def open_meter(spec: ModelSpec) -> Meter:
    """The meter of the spec's type. Raises ModelFailed if the model's tokenizer cannot be had."""
    meter: Meter = importlib.import_module(_MODULES[spec.driver.type]).open_meter(spec)
    return meter
