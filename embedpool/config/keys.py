"""keys.yml: API keys as hashes, with their scopes and limits. `key create` shows a key once."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import re
import secrets
import time
from collections.abc import Callable
from pathlib import Path

import marshmallow as ma
import yaml
from marshmallow import fields

from embedpool.config import files
from embedpool.config.fields import StrictInteger, StrictSchema, describe_faults, option, schema_of, yaml_fault
from embedpool.config.guard import is_loopback
from embedpool.config.settings import Settings
from embedpool.errors import ConfigError, InvalidRequest, StorageError

logger = logging.getLogger(__name__)

EMBED, ADMIN = "embed", "admin"
PREFIX = "epk"
ONLY_OWNER = 0o600
LOOK_EVERY_S = 1.0
REMEMBERED = "keys-exist"  # in state_dir: keys were made, and are asked for until the last is revoked
HEAD = "# The keys of this server, as hashes. `embedpool key create` and `revoke` write this file anew.\n"


def _scopes(scopes: tuple[str, ...]) -> None:
    if not scopes or not set(scopes) <= {EMBED, ADMIN}:
        raise ma.ValidationError(f"must be one or both of {EMBED}, {ADMIN}")


@dataclasses.dataclass(frozen=True)
class ApiKey:
    """One key. `admin` may do everything, `embed` what concerns vectors."""

    id: str = option(dataclasses.MISSING, "first part of the key, by which it is known", pattern=r"[a-z0-9]{4,32}\Z")
    sha256: str = option(dataclasses.MISSING, "hash of the whole key", pattern=r"[0-9a-f]{64}\Z")
    name: str = option("", "whose it is")
    scopes: tuple[str, ...] = option((EMBED,), "embed, admin", check=_scopes)
    models: tuple[str, ...] = option((), "names or aliases it is for; none: all")
    weight: float = option(1, "share in the fair queue", minimum=0.001, maximum=1000)
    requests_per_s: float = option(0, "requests a second, in each server process; 0 = no limit", minimum=0)
    texts_per_s: float = option(0, "texts a second, in each server process; 0 = no limit", minimum=0)
    concurrent: int = option(0, "requests at once, in each server process; 0 = no limit", minimum=0)
    created: str = option("", "when it was made")


def hash_of(key: str) -> str:
    """SHA-256 of a key. Keys are random, so a slow hash would protect nothing."""
    return hashlib.sha256(key.encode()).hexdigest()


def make_key(name: str, **values: object) -> tuple[ApiKey, str]:
    """A new key: its entry, and the key itself. Raises InvalidRequest for values that are none."""
    key_id = secrets.token_hex(4)
    key = f"{PREFIX}_{key_id}_{secrets.token_urlsafe(32)}"
    created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    entry = {"id": key_id, "sha256": hash_of(key), "name": name, "created": created, **values}
    try:
        made: ApiKey = schema_of(ApiKey)().load(entry)
    except ma.ValidationError as error:
        raise InvalidRequest(str(error)) from None
    return made, key


def id_of(key: str) -> str:
    """The id that a key claims."""
    match = re.match(rf"{PREFIX}_([a-z0-9]+)_", key)
    return match[1] if match else ""


class KeysSchema(StrictSchema):
    """The document of keys.yml."""

    version = StrictInteger(load_default=1, validate=ma.validate.Equal(1))
    keys = fields.List(fields.Nested(schema_of(ApiKey)), required=True)

    @ma.validates_schema(skip_on_field_errors=True)
    def _ids_are_unique(self, data: dict[str, list[ApiKey]], **kwargs: object) -> None:
        ids = [key.id for key in data["keys"]]
        if len(set(ids)) < len(ids):
            raise ma.ValidationError("two keys have the same id", "keys")


class KeysFile:
    """keys.yml, followed while the server runs. Safe to use from several threads.

    `remembered` is a file that exists as long as keys should exist. A keys.yml that is gone, empty or broken does not
    remove it, so no process takes such a file for a server that needs no key.
    """

    def __init__(self, path: Path, remembered: Path | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.path = path
        self.fault: str | None = None  # why the keys that exist are not known; set by `current`
        self._remembered = remembered or path.with_name(REMEMBERED)
        self._clock = clock
        self._keys: tuple[ApiKey, ...] | None = None
        self._stamp: tuple[int, ...] | None = None
        self._next_look = -1.0

    def read(self) -> tuple[ApiKey, ...]:
        """Read the keys in the file; none if there is no file. Raises ConfigError."""
        try:
            text = self.path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return ()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{self.path} cannot be read: {error}") from None
        try:
            document = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(yaml_fault(str(self.path), error)) from None
        try:
            return tuple(KeysSchema().load(document if document is not None else {})["keys"])
        except ma.ValidationError as error:
            raise ConfigError(describe_faults(str(self.path), text, error.messages)) from None

    def current(self) -> tuple[ApiKey, ...]:
        """The keys, looked at again once a second. A file that is broken or gone leaves them as they were.

        Where keys exist and none is known there are none, and `fault` says why.
        """
        if self._keys is None or self._clock() >= self._next_look:
            self._next_look = self._clock() + LOOK_EVERY_S
            stamp = files.stamp(self.path)
            if self._keys is None or self.fault or stamp != self._stamp:
                self._stamp = stamp
                self._follow()
        return self._keys or ()

    def _follow(self) -> None:
        found: tuple[ApiKey, ...] = ()
        fault: str | None = None
        try:
            found = self.read()
        except ConfigError as error:
            fault = error.message
        is_whole = fault is None and self._stamp is not None
        if self._keys and not is_whole:
            logger.error("the keys stay as they were: %s", fault or f"{self.path} is gone")
            return
        if found:
            self._remember()
        elif fault is None and self.exist:
            fault = f"{self.path} holds no key, although keys were made and not revoked"
        if fault and fault != self.fault:
            logger.error("nobody's key is known: %s", fault)
        self._keys, self.fault = found, fault

    @property
    def exist(self) -> bool:
        """Whether keys were made, and the last of them was not revoked."""
        return self._remembered.exists()

    def _remember(self) -> None:
        if not self.exist:
            try:
                self._remembered.parent.mkdir(parents=True, exist_ok=True)
                self._remembered.touch()
            except OSError as error:
                logger.error("that keys exist cannot be remembered in %s: %s", self._remembered, error)

    def revoke_last(self) -> None:
        """From now on no key is asked for. Raises StorageError."""
        try:
            self._remembered.unlink(missing_ok=True)
        except OSError as error:
            raise StorageError(f"{self._remembered} cannot be removed, so keys are asked for: {error}") from None

    def edit(self, change: Callable[[tuple[ApiKey, ...]], tuple[ApiKey, ...]]) -> None:
        """Change the file under its lock. Raises ConfigError, StorageError and what `change` raises."""
        with files.locked(self.path):
            entries = [_entry(key) for key in change(self.read())]
            text = HEAD + yaml.safe_dump({"version": 1, "keys": entries}, sort_keys=False, allow_unicode=True)
            files.replace(self.path, text, new_mode=ONLY_OWNER)
            if entries:
                self._remember()


def keys_file(settings: Settings) -> KeysFile:
    """The keys.yml of the settings."""
    state_dir = settings.file(settings.paths.state_dir)
    return KeysFile(settings.file(settings.security.keys_file), state_dir / REMEMBERED)


def require_a_key(settings: Settings, host: str) -> None:
    """Raises ConfigError if a key should exist at this start and none does, or if keys.yml is broken.

    Beyond loopback one should, unless the settings say otherwise. Keys that existed once are asked for in any case.
    """
    security = settings.security
    file = keys_file(settings)
    has_key = bool(file.read() or file.exist or security.admin_key_env or security.embed_key_env)
    if has_key and security.keys != "off":
        return
    if security.keys == "required":
        raise ConfigError(f"security.keys is required and {file.path} holds none: `embedpool key create` makes one")
    if not (security.insecure or is_loopback(host)):
        raise ConfigError(
            f"{host} is reached from other machines and no key is asked for: make one with `embedpool key create`, or "
            "say --insecure"
        )


def _entry(key: ApiKey) -> dict[str, object]:
    """As it is written: what differs from its default."""
    found: dict[str, object] = {}
    for field in dataclasses.fields(ApiKey):
        value = getattr(key, field.name)
        if field.default is dataclasses.MISSING or value != field.default:
            found[field.name] = list(value) if isinstance(value, tuple) else value
    return found
