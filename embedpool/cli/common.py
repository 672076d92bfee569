"""Shared parts of the commands: exit codes, settings, a client of the running server, progress on the terminal."""

from __future__ import annotations

import itertools
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from embedpool.errors import EmbedpoolError

if TYPE_CHECKING:
    from embedpool.client import Client
    from embedpool.config.pool_yml import PoolFile
    from embedpool.config.settings import Settings

OK, FAILED, USAGE, NOT_RUNNING, NO_SUCH_MODEL = 0, 1, 2, 3, 4

Arguments = dict[str, Any]


class UsageError(EmbedpoolError):
    """The command line asks for something that does not go together."""


def read_settings(arguments: Arguments) -> Settings:
    """The settings of --config, EMBEDPOOL_CONFIG or .config/config.yml."""
    from embedpool.config.config_yml import find_config_yml, load_settings

    return load_settings(find_config_yml(arguments["--config"]))


def pool_file(settings: Settings) -> PoolFile:
    """The pool.yml of the settings."""
    from embedpool.config.pool_yml import PoolFile

    return PoolFile(settings.file(settings.paths.pool_yml))


def client_of(settings: Settings) -> Client | None:
    """A client of the server of the pid file, else of the one at client.base_url; None if none answers."""
    from embedpool.client import Client
    from embedpool.config.settings import secret_value
    from embedpool.errors import ServerUnreachable
    from embedpool.serve.address import UNIX
    from embedpool.serve.process import PidFile

    running = PidFile(settings).read()
    key = secret_value(settings.client.api_key_env) if settings.client.api_key_env else None
    has_a_port = running is not None and not running.address.startswith(UNIX)
    address = running.address if running and has_a_port else settings.base_url
    try:
        with Client(address, timeout_s=30) as stranger:  # who answers there is not given the key before he is known
            stranger.health()
    except ServerUnreachable:
        if running:
            raise  # it lives and does not answer: editing its file behind its back would hide that
        return None
    client = Client(address, api_key=key, timeout_s=30)
    if not running and settings.client.base_url is None:
        _require_ours(client, settings, address)
    return client


def _require_ours(client: Client, settings: Settings, address: str) -> None:
    """Of two folders with the same port one has the server. Raises ConfigError for the other."""
    from embedpool.errors import ConfigError, EmbedpoolError

    try:
        theirs = str(client.status()["pool_file"])
    except EmbedpoolError:
        return  # it asks for a key, and will do so again
    if os.path.realpath(theirs) != os.path.realpath(settings.file(settings.paths.pool_yml)):
        raise ConfigError(f"the server at {address} serves {theirs}; to manage that one, set client.base_url")


@contextmanager
def progress(what: str | None) -> Iterator[None]:
    """A line on the terminal while something takes its time."""
    if what is None or not sys.stderr.isatty():
        yield
        return
    done = threading.Event()

    def spin() -> None:
        for frame in itertools.cycle("|/-\\"):
            sys.stderr.write(f"\r{frame} {what} ")
            sys.stderr.flush()
            if done.wait(0.2):
                break
        sys.stderr.write("\r\x1b[K")
        sys.stderr.flush()

    thread = threading.Thread(target=spin, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def converted(option: str, text: str, convert: Callable[[str], Any]) -> Any:
    """The value of an option as a number. Raises UsageError."""
    try:
        return convert(text)
    except ValueError:
        raise UsageError(f"{option} must be a number, not {text!r}") from None


def assignments(arguments: Arguments) -> dict[str, Any]:
    """What --set KEY=VALUE says: numbers, true, false, null, YAML in brackets, else a text. Raises UsageError."""
    import yaml

    found: dict[str, Any] = {}
    for text in arguments["--set"]:
        key, equals, value = text.partition("=")
        if not equals:
            raise UsageError(f"--set takes KEY=VALUE, not {text!r}")
        is_text = not value.lstrip().startswith(("{", "[", '"', "'"))
        try:
            read = yaml.safe_load(value)
        except yaml.YAMLError:
            if not is_text:
                raise UsageError(f"--set {key}: {value!r} is not a YAML value") from None
            read = value
        is_plain = isinstance(read, bool | int | float) or value.strip() in ("", "null", "~")
        found[key] = value if is_text and not is_plain else read
    return found
