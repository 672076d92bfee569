"""Endpoints that show the server: health, readiness, status, models, metrics."""

from __future__ import annotations

import os
from typing import Any

from flask import Blueprint, Response, request

from embedpool import __version__
from embedpool.config.pool_yml import as_document
from embedpool.pool.pool import Pool
from embedpool.pool.served_model import ServedModel
from embedpool.reconcile import Reconciler
from embedpool.web.access import Access
from embedpool.web.compat import known
from embedpool.web.encoding import json_response
from embedpool.web.http_request import here
from embedpool.web.metrics import Metrics, without_other_models

INFINITY = "infinity"  # the only owner that its client takes, which looks at /models


def blueprint(pool: Pool, reconciler: Reconciler, metrics: Metrics, access: Access) -> Blueprint:
    """The routes that only look."""
    routes = Blueprint("observe", __name__)

    @routes.get("/health")
    def health() -> Response:
        return json_response({"ok": True, "booted": pool.booted, "models": len(pool.models)})

    @routes.get("/ready")
    def ready() -> Response:
        names = request.args.get("models", "")
        named = [pool.find(known(pool, name)) for name in filter(None, names.split(","))]
        models = named or [m for m in pool.models if m.spec.enabled]
        loading = [m.spec.model for m in models if not m.settled]
        failed = [m.spec.model for m in models if m.settled and m.state == "failed"]
        ok = reconciler.has_applied and not loading and all(m.is_serving for m in named) and not pool.draining
        document = {"ready": ok, "stopping": pool.draining, "loading": loading, "failed": failed}
        return json_response(document, 200 if ok else 503)

    @routes.get("/ready/<path:name>")
    def ready_model(name: str) -> Response:
        served = pool.find(known(pool, name))
        ok = served.is_serving and not pool.draining
        document = {"ready": ok, "model": served.spec.model, "state": served.state}
        return json_response(document, 200 if ok else 503)

    @routes.get("/status")
    def status() -> Response:
        return json_response(
            {
                "version": __version__,
                "pid": os.getpid(),
                "stopping": pool.draining,
                "pool_file": str(reconciler.pool_file.path),
                "last_reload": reconciler.last_reload,
                "keys": {"asked_for": not access.is_open, "fault": access.fault},
                "cache": None if here().caller.is_limited else pool.cache.state(),
                "models": [served.snapshot() for served in here().caller.visible(pool)],
                "candidates": [
                    {"model": served.spec.model, "alias": served.spec.alias, **served.outlook()}
                    for served in here().caller.visible_of(pool.candidates)
                ],
            }
        )

    @routes.get("/models")
    def models() -> Response:
        return all_models(pool, owner=INFINITY)

    @routes.get("/models/<path:name>")
    def model(name: str) -> Response:
        return one_model(pool, name, owner=INFINITY)

    @routes.get("/metrics")
    def get_metrics() -> Response:
        body, content_type = metrics.render(pool, reconciler)
        if here().caller.is_limited:
            body = without_other_models(body, {served.spec.model for served in here().caller.visible(pool)})
        return Response(body, content_type=content_type)

    return routes


def all_models(pool: Pool, owner: str = "embedpool") -> Response:
    """OpenAI's list of those that the caller's key is for, each under its name and again under its alias.

    Beside it stands what Cohere's clients read; what infinity's and Mistral's read stands in each entry.
    """
    visible = [(served, name) for served in here().caller.visible(pool) for name in served.spec.names]
    return json_response(
        {
            "object": "list",
            "data": [model_document(served, name, owner) for served, name in visible],
            "models": [_as_cohere(served, name) for served, name in visible],
        }
    )


def _as_cohere(served: ServedModel, name: str) -> dict[str, Any]:
    context = served.known_max_tokens()
    endpoints = [kind for kind in served.kinds if kind in ("rerank", "classify")] or ["embed"]
    return {"name": name, "endpoints": endpoints, "finetuned": False, "context_length": context, "features": []}


def one_model(pool: Pool, name: str, owner: str = "embedpool") -> Response:
    """A model by its name or alias. Raises ModelNotFound, and Forbidden if the caller's key is not for it."""
    name = known(pool, name)
    here().caller.require(pool, name)
    return json_response(model_document(pool.find(name), name, owner))


def model_document(served: ServedModel, name: str, owner: str) -> dict[str, Any]:
    """OpenAI's shape of a model, with its spec and state beside."""
    return {
        "id": name,
        "object": "model",
        "created": 0,
        "owned_by": owner,
        "type": "base",
        "max_model_len": served.known_max_tokens(),
        "backend": served.spec.driver.type,
        "kinds": served.kinds,
        "capabilities": served.kinds,
        "stats": served.load(),
        "state": served.state,
        "spec": as_document(served.spec),
    }
