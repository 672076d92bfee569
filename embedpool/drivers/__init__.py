"""The drivers, which turn a batch into rows, and their table.

A new driver is a file here with `make_driver` and `open_tokenizer`, a line in the table, its configuration in
config/spec.py, and what it needs on the command line in cli/models.py. tasks/driver.py says what it has to be.
"""

from __future__ import annotations

import importlib
from typing import Any

from embedpool.config.spec import ModelSpec
from embedpool.tasks.driver import Driver, Folders, Report, unheard
from embedpool.tasks.tokenizer import Tokenizer

# Imported on use: torch and requests cost seconds and memory that other models need not pay for.
_MODULES = {
    "local_st": "embedpool.drivers.local_st",
    "http": "embedpool.drivers.http",
    "fake": "embedpool.drivers.fake",
}


def make_driver(spec: ModelSpec, folders: Folders, shared: dict[str, Any]) -> Driver:
    """A driver of the spec's type, not yet open; `shared` is what all drivers of a served model share."""
    driver: Driver = importlib.import_module(_MODULES[spec.driver.type]).make_driver(spec, folders, shared)
    return driver


def open_tokenizer(spec: ModelSpec, folders: Folders, report: Report = unheard) -> Tokenizer:
    """The tokenizer of the spec's model. Raises ModelFailed if it cannot be had."""
    tokenizer: Tokenizer = importlib.import_module(_MODULES[spec.driver.type]).open_tokenizer(spec, folders, report)
    return tokenizer
