"""Authentication and authorisation: keys from keys.yml and the environment, their scopes, models and limits.

With no key anywhere embedding is open, and management is open to this machine alone (see manage.py). The first key of
any scope closes both. Keys that exist and cannot be read leave everything closed. Whether the process is up and the
API's document are everybody's.
"""

from __future__ import annotations

import contextlib
import hmac
import threading
from collections.abc import Iterator, Sequence

from flask import Request

from embedpool.config.keys import ADMIN, EMBED, ApiKey, KeysFile, hash_of, id_of
from embedpool.config.settings import Security, secret_value
from embedpool.config.spec import ModelSpec
from embedpool.errors import Forbidden, KeysUnknown, ModelNotFound, RateLimited, Unauthorized
from embedpool.pool.pool import Pool
from embedpool.pool.served_model import ServedModel
from embedpool.web.rate_limit import RateLimit

OPEN = "open"
FROM_ENVIRONMENT = "env-"  # begins an id that none in keys.yml can have
SCOPES = {
    "observe": EMBED,
    "manage": ADMIN,
    "openapi": OPEN,
    "root": OPEN,
    "ui": OPEN,
}  # of a blueprint's routes; of the others: embed
ADMIN_ENDPOINTS = ("live.log",)
OPEN_ENDPOINTS = ("observe.health", "observe.ready", "observe.ready_model")


class Caller:
    """Whoever sends a request; limits are counted over all requests of a key."""

    def __init__(self, key: ApiKey | None) -> None:
        self.key = key
        self.weight = key.weight if key else 1.0
        self._requests = RateLimit(key.requests_per_s) if key and key.requests_per_s else None
        self._texts = RateLimit(key.texts_per_s) if key and key.texts_per_s else None
        self._room = threading.BoundedSemaphore(key.concurrent) if key and key.concurrent else None

    def require(self, pool: Pool, name: str) -> None:
        """Raises Forbidden if the key is not for this model, and ModelNotFound, which names those it is for."""
        if self.key and self.key.models:
            try:
                spec = pool.find(name).spec
            except ModelNotFound:
                raise ModelNotFound(name, [n for served in self.visible(pool) for n in served.spec.names]) from None
            self.require_spec(spec)

    def require_spec(self, spec: ModelSpec) -> None:
        """Raises Forbidden if the key is not for this model."""
        if not self._is_for(spec):
            raise Forbidden(f"this key is not for {spec.model!r}")

    def visible(self, pool: Pool) -> list[ServedModel]:
        """The models that the key is for."""
        return self.visible_of(pool.models)

    def visible_of(self, models: Sequence[ServedModel]) -> list[ServedModel]:
        """Those of these that the key is for."""
        return [served for served in models if self._is_for(served.spec)]

    @property
    def is_admin(self) -> bool:
        """Whether it has shown a key of scope admin."""
        return self.key is not None and ADMIN in self.key.scopes

    @property
    def is_limited(self) -> bool:
        """Whether there are models that the key is not for."""
        return bool(self.key and self.key.models)

    def _is_for(self, spec: ModelSpec) -> bool:
        return not (self.key and self.key.models) or bool(set(spec.names) & set(self.key.models))

    @contextlib.contextmanager
    def admitted(self) -> Iterator[None]:
        """While a request is served, however many texts it has. Raises RateLimited."""
        if self._room and not self._room.acquire(blocking=False):
            raise RateLimited("this key has as many requests at once as it may", retry_after_s=1.0)
        try:
            _take(self._requests, 1, "requests")
            yield
        finally:
            if self._room:
                self._room.release()

    def spend(self, texts: int) -> None:
        """Before so many texts are computed. Raises RateLimited."""
        _take(self._texts, texts, "texts")


def _take(limit: RateLimit | None, amount: int, what: str) -> None:
    if limit is not None and (wait_s := limit.take(amount)):
        raise RateLimited(f"this key's {what} a second are used up", retry_after_s=wait_s)


NOBODY = Caller(None)


class Access:
    """Tells callers apart, by `Authorization: Bearer`, `X-API-Key` or `api-key`."""

    def __init__(self, security: Security, keys: KeysFile) -> None:
        self._keys = keys
        self._policy = security.keys
        self._insecure = security.insecure
        self._is_public = False  # other machines reach a listener
        named = {EMBED: security.embed_key_env, ADMIN: security.admin_key_env}
        self._variables = {scope: variable for scope, variable in named.items() if variable}
        self._from_environment = tuple(
            ApiKey(id=f"{FROM_ENVIRONMENT}{scope}", sha256=hash_of(key), scopes=(scope,))
            for scope, variable in self._variables.items()
            if (key := secret_value(variable))
        )
        self._callers: dict[ApiKey, Caller] = {}
        self._lock = threading.Lock()

    def serves_other_machines(self) -> None:
        """A listener is reached from other machines, so a key is asked for even while none exists."""
        self._is_public = not self._insecure

    @property
    def is_open(self) -> bool:
        """Whether requests need no key, because none exists and none should."""
        if self._policy != "auto":
            return self._policy == "off"
        return not (self._variables or self._all() or self._keys.fault or self._is_public)

    @property
    def fault(self) -> str | None:
        """Why the keys in keys.yml are not known, without its path; None if they are."""
        return self._keys.fault and "keys.yml is missing, broken or without keys; the log has the details"

    def caller(self, of: Request) -> Caller:
        """Who sends the request, if they may. Raises Unauthorized and Forbidden.

        A key that is not asked for means nothing: SDKs want a value for one.
        """
        scope = _scope_of(of)
        if scope == OPEN or self.is_open:
            return NOBODY
        known = self._all()
        key = _find(_given(of), known)
        if key and {scope, ADMIN} & set(key.scopes):
            return self._caller_of(key, known)
        if key:
            raise Forbidden(f"this asks for a key of scope {scope}")
        if self._keys.fault:
            raise KeysUnknown("the server cannot check keys at present")
        if not any({scope, ADMIN} & set(other.scopes) for other in known):
            unset = [self._variables[s] for s in (scope, ADMIN) if s in self._variables]
            why = f"the variable {unset[0]} is not set in the server's process" if unset else f"no key of scope {scope}"
            raise Forbidden(f"this is closed: {why}" + ("" if unset else " exists; `embedpool key create` makes one"))
        raise Unauthorized(f"this asks for {'the admin' if scope == ADMIN else 'a'} key: Authorization: Bearer …")

    def owner(self, key_id: str) -> Caller:
        """The caller whose key has this id, as it is now; nobody, where none was asked for. Raises Unauthorized."""
        if self.is_open:
            return NOBODY
        known = self._all()
        key = next((key for key in known if key.id == key_id), None)
        if key is None:
            raise Unauthorized("the key that made this is revoked" if key_id else "this asks for a key by now")
        return self._caller_of(key, known)

    def _all(self) -> tuple[ApiKey, ...]:
        return (*self._keys.current(), *self._from_environment)

    def _caller_of(self, key: ApiKey, known: tuple[ApiKey, ...]) -> Caller:
        """The same for all requests of a key, as long as its entry stays as it is."""
        caller = self._callers.get(key)
        if caller is None:
            with self._lock:
                self._callers = {k: c for k, c in self._callers.items() if k in known}
                caller = self._callers.setdefault(key, Caller(key))
        return caller


def _scope_of(of: Request) -> str:
    if of.endpoint is None or of.blueprint is None or of.endpoint in OPEN_ENDPOINTS:
        return OPEN
    if of.endpoint in ADMIN_ENDPOINTS:
        return ADMIN
    return SCOPES.get(of.blueprint, EMBED)


def _given(of: Request) -> str:
    scheme, _, bearer = of.headers.get("Authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return bearer.strip()
    return (of.headers.get("X-API-Key") or of.headers.get("Api-Key") or "").strip()  # the second is Azure's


def _find(given: str, known: tuple[ApiKey, ...]) -> ApiKey | None:
    """The key that this is. A hash is compared in constant time."""
    if not given:
        return None
    digest, claimed = hash_of(given), id_of(given)
    candidates = [key for key in known if key.id == claimed or key.id.startswith(FROM_ENVIRONMENT)]
    return next((key for key in candidates if hmac.compare_digest(key.sha256, digest)), None)
