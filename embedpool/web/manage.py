"""The management endpoints: change pool.yml and let the pool follow. Guarded against web pages and proxies."""

from __future__ import annotations

import ipaddress
from typing import Any

from flask import Blueprint, Request, Response, current_app, request

from embedpool.config import edit, guard
from embedpool.config.settings import Settings
from embedpool.errors import Forbidden, InvalidRequest, ModelNotFound
from embedpool.pool.pool import Pool
from embedpool.reconcile import Reconciler
from embedpool.web.access import Access
from embedpool.web.body import OWN_HOSTS, host_of, read_json
from embedpool.web.encoding import json_response
from embedpool.web.http_request import here
from embedpool.web.schemas import AliasSchema, ClearCacheSchema, EnableSchema, RegisterSchema, ReloadSchema

PROXY_HEADERS = ("Forwarded", "X-Forwarded-For", "X-Forwarded-Host", "X-Forwarded-Proto", "X-Real-Ip", "Via")
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")


def own_hosts(settings: Settings) -> set[str]:
    """Names under which this server is meant."""
    return {*LOOPBACK_NAMES, settings.server.host.lower(), *(h.lower() for h in settings.security.allowed_hosts)}


def blueprint(pool: Pool, reconciler: Reconciler, settings: Settings, access: Access) -> Blueprint:
    """The routes that change the pool. Those of models answer with the model's entry of /status."""
    routes = Blueprint("manage", __name__)

    def read(schema: type[Any]) -> dict[str, Any]:
        return read_json(here(), schema, settings.limits)

    @routes.before_request
    def let_in() -> None:
        if request.method not in ("GET", "HEAD", "OPTIONS"):
            refuse_strangers(request, current_app.extensions[OWN_HOSTS], has_key=not access.is_open)

    @routes.post("/models/register")
    def register() -> Response:
        flat = read(RegisterSchema)
        if (flat.get("driver_config") or {}).get("trust_remote_code"):
            says = "may only be set in pool.yml on the server's disk"
            raise InvalidRequest(
                f"driver_config.trust_remote_code: {says}", fields={"driver_config.trust_remote_code": says}
            )
        spec = edit.parse_registration(flat)
        guard.check(spec, settings)
        wait = flag("wait", True)
        return answer(reconciler.register(spec, replace=flag("replace", False), wait=wait), 200 if wait else 202)

    @routes.post("/models/alias")
    def alias() -> Response:
        body = read(AliasSchema)
        return answer(reconciler.set_alias(body["model"], body.get("alias")))

    @routes.post("/models/enable")
    def enable() -> Response:
        body = read(EnableSchema)
        return answer(reconciler.set_enabled(body["model"], body["enabled"]))

    @routes.delete("/models/<path:name>")
    def unregister(name: str) -> Response:
        return json_response({"ok": True, "model": reconciler.unregister(name), "removed": True})

    @routes.post("/reload")
    def reload() -> Response:
        body = read(ReloadSchema)
        reconciler.reload(body["reason"])
        return json_response({"ok": True, "last_reload": reconciler.last_reload})

    @routes.post("/cache/clear")
    def clear_cache() -> Response:
        body = read(ClearCacheSchema)
        pool.clear_cache(body.get("model"))
        return json_response({"ok": True, "cache": pool.cache.state()})

    def answer(model: str, status: int = 200) -> Response:
        try:
            entry = pool.find(model).snapshot()
        except ModelNotFound:  # it was done, and somebody else has removed the model since
            entry = {"model": model, "removed": True}
        return json_response({"ok": True, **entry}, status)

    return routes


def flag(name: str, default: bool) -> bool:
    """A boolean of the query string. Raises InvalidRequest."""
    given = request.args.get(name)
    if given is None:
        return default
    if given not in ("true", "false"):
        raise InvalidRequest(f"{name}: must be true or false", fields={name: "must be true or false"})
    return given == "true"


def refuse_strangers(of: Request, own_hosts: set[str], *, has_key: bool) -> None:
    """Let in only a program on this machine, or one that has shown the admin key, that means this server.

    Raises Forbidden. A web page can make a browser send requests to loopback: its Origin or, after DNS
    rebinding, its Host tells it apart. What came through a proxy is not a loopback request, whoever connected last.
    """
    require_own_host(of, own_hosts)
    origin = of.headers.get("Origin")
    if origin is not None and origin.partition("://")[2].lower() != of.host.lower():  # another port is another origin
        raise Forbidden("management is closed to other origins")
    if has_key:
        return
    if any(header in of.headers for header in PROXY_HEADERS):
        raise Forbidden("management is closed to requests that came through a proxy")
    if not _is_loopback(of.remote_addr):
        raise Forbidden("management is closed to other machines; see security.admin_key_env")


def require_own_host(of: Request, own_hosts: set[str], what: str = "management is") -> None:
    """Raises Forbidden for a request that a browser was misled to send here, by a name that is not ours."""
    if host_of(f"//{of.host}") not in own_hosts:
        raise Forbidden(f"{what} not answered under the Host {of.host!r}; see security.allowed_hosts")


def _is_loopback(address: str | None) -> bool:
    try:
        found = ipaddress.ip_address((address or "").split("%")[0])
        return (getattr(found, "ipv4_mapped", None) or found).is_loopback
    except ValueError:
        return address == "localhost"  # a unix socket
