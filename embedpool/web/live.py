"""What the page asks for: GET /live, the pool as it is, and GET /log, the last requests.

A document is made once a sample for each set of models that a key may see, however many pages ask for it.
"""

from __future__ import annotations

import os
import platform
import secrets
import threading
from typing import Any

from flask import Blueprint, Response, current_app, request

from embedpool import __version__
from embedpool.errors import Forbidden
from embedpool.pool.pool import Pool
from embedpool.pool.served_model import ServedModel
from embedpool.reconcile import Reconciler
from embedpool.web.access import Access, Caller
from embedpool.web.body import OWN_HOSTS
from embedpool.web.encoding import json_response
from embedpool.web.history import KEPT, STEP_S, History
from embedpool.web.http_request import here
from embedpool.web.manage import refuse_strangers
from embedpool.web.request_log import Recent

TOLD = (  # of a model's entry in /status, to every key
    "model", "alias", "enabled", "state", "kinds", "queue_len", "queue_max", "progress", "space", "replicas",
    "replicas_idle", "replicas_busy", "scaling", "counters", "cached",
)  # fmt: skip
STILL_KNOWN = 5  # samples that a page may be behind, and be told what is new alone
FACTS = ("kind", "dim", "device", "backend", "compute_dtype", "labels", "routes", "protocol")  # told to every key


def blueprint(pool: Pool, reconciler: Reconciler, history: History, recent: Recent, access: Access) -> Blueprint:
    """The routes of the page's data."""
    routes = Blueprint("live", __name__)
    made = _Made(pool, reconciler, history)

    @routes.get("/live")
    def live() -> Response:
        history.sample_if_due()
        since = _number("since")
        if not history.number - STILL_KNOWN <= since <= history.number:
            since = 0
        caller = here().caller
        return Response(made.document(caller, since, is_admin=may_manage(caller, access)), mimetype="application/json")

    @routes.get("/log")
    def log() -> Response:
        if not may_manage(here().caller, access):
            raise Forbidden("the log asks for a key of scope admin")
        since = _number("since")
        return json_response({"requests": recent.after(since), "number": recent.number})

    return routes


def may_manage(caller: Caller, access: Access) -> bool:
    """Whether who asks could change the pool: by an admin key or, where none is asked for, from this machine."""
    if not access.is_open:
        return caller.is_admin
    try:
        refuse_strangers(request, current_app.extensions[OWN_HOSTS], has_key=False)
    except Forbidden:
        return False
    return True


class _Made:
    """The documents of the current sample, by who may see what."""

    def __init__(self, pool: Pool, reconciler: Reconciler, history: History) -> None:
        self._pool = pool
        self._reconciler = reconciler
        self._history = history
        self._process = secrets.token_hex(3)  # tells the processes of a server apart, and nothing else
        self._number = -1
        self._documents: dict[tuple[Any, ...], bytes] = {}
        self._lock = threading.Lock()

    def document(self, caller: Caller, since: int, *, is_admin: bool) -> bytes:
        """Made by the first who asks after a sample; the others wait for it, which takes milliseconds."""
        visible = caller.visible(self._pool)
        key = (is_admin, since, tuple(served.spec.model for served in visible))
        with self._lock:
            if self._number != self._history.number:
                self._documents, self._number = {}, self._history.number
            if key not in self._documents:
                self._documents[key] = json_response(self._make(visible, since, is_admin=is_admin)).get_data()
            return self._documents[key]

    def _make(self, visible: list[ServedModel], since: int, *, is_admin: bool) -> dict[str, Any]:
        reload = self._reconciler.last_reload or {}
        found = {
            "number": self._history.number,
            "since": since,
            "step_s": STEP_S,
            "kept": KEPT,
            "version": __version__,
            "process": self._process,
            "admin": is_admin,
            "stopping": self._pool.draining,
            "reload_ok": reload.get("ok"),
            "models": [self._model(served, since, is_admin=is_admin) for served in visible],
        }
        if is_admin:
            found |= {"pid": os.getpid(), "host": platform.node(), "reload": reload}
            found["cache"] = self._pool.cache.state()
            found["candidates"] = [
                {"model": served.spec.model, "alias": served.spec.alias, **served.outlook()}
                for served in self._pool.candidates
            ]
        return found

    def _model(self, served: ServedModel, since: int, *, is_admin: bool) -> dict[str, Any]:
        entry = served.snapshot()
        spec, runs_on, tokenizer = served.spec, entry["runs_on"], served.opened_tokenizer
        found = {name: entry[name] for name in TOLD} | {
            "driver": spec.driver.type,
            "place": spec.place,
            "runs_on": {name: runs_on[name] for name in FACTS if name in runs_on},
            "is_remote": spec.driver.config.is_remote,
            "prompts": {**(tokenizer.prompts if tokenizer else {}), **spec.driver.config.prompts},
            "truncation_side": tokenizer.truncation_side if tokenizer else None,
            "max_tokens": served.known_max_tokens(),
            "in_trouble": entry["last_error"] is not None,
            "last_minute": self._history.last_minute(served),
            "series": self._history.series(served, since),
        }
        if "successor" in entry:
            found["successor"] = entry["successor"] if is_admin else {**entry["successor"], "last_error": None}
        if is_admin:
            found |= {name: entry[name] for name in ("last_error", "runs_on", "replicas_on")}
        return found


def _number(name: str) -> int:
    """A number of the query string; 0 for anything else."""
    given = request.args.get(name, "")
    return int(given) if given.isascii() and given.isdecimal() and len(given) < 12 else 0
