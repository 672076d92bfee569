"""Reads config.yml, with what the environment overrides."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import marshmallow as ma
import yaml

from embedpool.config.checks import SECRET_PREFIX
from embedpool.config.fields import describe_faults, faults, schema_of, unknown_key, yaml_fault
from embedpool.config.settings import DEFAULT_CONFIG_YML, SECTIONS, Settings
from embedpool.errors import ConfigError

SETTING_PREFIX = "EMBEDPOOL_"
NO_SETTINGS = re.compile(  # what is set for other ends, some of it by Kubernetes for a service of this name
    r"EMBEDPOOL_(CONFIG\Z|SECRET_|SERVICE_(HOST|PORT)(_|\Z)|PORT(_|\Z))"
)
LEAST_LIKENESS = 0.85


def find_config_yml(named: str | None, environ: Mapping[str, str] = os.environ) -> Path:
    """The config file: the one named, else `EMBEDPOOL_CONFIG`, else `.config/config.yml`."""
    return Path(named or environ.get("EMBEDPOOL_CONFIG") or DEFAULT_CONFIG_YML).absolute()


def load_settings(file: Path, environ: Mapping[str, str] = os.environ) -> Settings:
    """Read, override from the environment and check config.yml.

    Raises ConfigError with file, line and key of each fault.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(
            f"{file} does not exist; name another with --config or EMBEDPOOL_CONFIG, or let `embedpool init` write it"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} cannot be read: {error}") from None
    settings = parse_settings(text, str(file), environ)
    object.__setattr__(settings, "base_dir", base_dir_of(file, settings.paths.config_yml))
    return settings


def parse_settings(text: str, name: str, environ: Mapping[str, str]) -> Settings:
    """Settings from the text of a config.yml called `name`. Raises ConfigError."""
    try:
        document = yaml.safe_load(text)
    except Exception as error:
        raise ConfigError(yaml_fault(name, error)) from None
    if document is None:
        document = {}
    schema = schema_of(Settings)()
    try:
        schema.load(document)  # faults of the file, with its lines, come before those of the environment
    except ma.ValidationError as error:
        raise ConfigError(describe_faults(name, text, error.messages)) from None
    overrides = _overrides(environ)
    for section, values in overrides.items():
        document[section] = {**(document.get(section) or {}), **values}
    try:
        settings: Settings = schema.load(document)
    except ma.ValidationError as error:
        raise ConfigError(
            "\n".join(f"environment variable {_variable(path)}: {says}" for path, says in faults(error.messages))
        ) from None
    return settings


def _variable(path: tuple[str | int, ...]) -> str:
    return SETTING_PREFIX + "__".join(str(p).upper() for p in path)


def _overrides(environ: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """EMBEDPOOL_<SECTION>__<KEY> → {section: {key: value}}; values are read as YAML."""
    found: dict[str, dict[str, Any]] = {}
    for variable, given in environ.items():
        if not variable.startswith(SETTING_PREFIX) or "__" not in variable or variable.startswith(SECRET_PREFIX):
            continue
        section, _, key = variable.removeprefix(SETTING_PREFIX).lower().partition("__")
        if section not in SECTIONS:
            raise ConfigError(f"environment variable {variable}: {unknown_key(section, SECTIONS)}")
        is_quoted = len(given) > 1 and given[0] in "'\"" and given[-1] == given[0]
        raw = given[1:-1] if is_quoted else given  # files of variables keep quotation marks
        kind = {f.name: f.type for f in dataclasses.fields(SECTIONS[section])}.get(key, "")
        try:
            value = raw if str(kind).startswith("str") else yaml.safe_load(raw)
        except Exception:
            raise ConfigError(f"environment variable {variable}: {raw!r} is not a YAML value") from None
        if value not in (None, ""):
            found.setdefault(section, {})[key] = value
    return found


def unknown_variables(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Variables that look like a setting and are none, each with the one that may be meant."""
    settings = [_variable((section, f.name)) for section, cls in SECTIONS.items() for f in dataclasses.fields(cls)]
    found = {}
    for variable in environ:
        if variable.startswith(SETTING_PREFIX) and "__" not in variable and not NO_SETTINGS.match(variable):
            for near in get_close_matches(variable, settings, 1, LEAST_LIKENESS):
                found[variable] = near
    return found


def base_dir_of(file: Path, config_yml: str) -> Path:
    """The folder that relative paths start from, so that a file means the same from any working directory.

    If the file's path ends in its own `paths.config_yml`, what precedes that; otherwise the file's folder.
    """
    file = file.absolute()
    tail = Path(config_yml).parts
    if not Path(config_yml).is_absolute() and file.parts[-len(tail) :] == tail:
        return Path(*file.parts[: -len(tail)])
    return file.parent
