"""What the page asks for: GET /live, the pool as it is, and GET /log, the last requests.

A document is made once a sample for each set of models that a key may see, however many pages ask for it. The pages
differ in how much of the lines they know; what is new to each is put in.
"""

from __future__ import annotations

import os
import platform
import secrets
import threading
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import orjson
from flask import Blueprint, Response, current_app, request

from embedpool import __version__
from embedpool.errors import Forbidden
from embedpool.pool.pool import Pool
from embedpool.pool.served_model import ServedModel
from embedpool.pool.stats import SECONDS
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
    process = secrets.token_hex(3)  # tells the processes of a server apart, and nothing else
    made = _Made(pool, reconciler, history, process)

    def since() -> int:
        """What the page has of this process; of another's numbers it has nothing."""
        return _number("since") if request.args.get("process") == process else 0

    @routes.get("/live")
    def live() -> Response:
        history.sample_if_due()
        caller = here().caller
        document = made.document(caller, since(), is_admin=may_manage(caller, access))
        return Response(document, mimetype="application/json")

    @routes.get("/log")
    def log() -> Response:
        if not may_manage(here().caller, access):
            raise Forbidden("the log asks for a key of scope admin")
        found = recent.after(since())
        return json_response({"requests": found, "number": recent.number, "process": process})

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


class _Document(NamedTuple):
    """What stands before the models, each of them without its lines, and whose lines these are."""

    head: bytes
    models: Sequence[tuple[bytes, ServedModel]]


class _Made:
    """The documents of the current sample, by who may see what."""

    def __init__(self, pool: Pool, reconciler: Reconciler, history: History, process: str) -> None:
        self._pool = pool
        self._reconciler = reconciler
        self._history = history
        self._process = process
        self._began = time.monotonic()
        self._number = -1
        self._documents: dict[tuple[Any, ...], _Document] = {}
        self._whole: dict[tuple[Any, ...], bytes] = {}  # with the lines after a sample
        self._lock = threading.Lock()

    def document(self, caller: Caller, since: int, *, is_admin: bool) -> bytes:
        """Made by the first who asks after a sample; the others wait for it, which takes milliseconds."""
        visible, candidates = caller.visible(self._pool), caller.visible_of(self._pool.candidates)
        names = (tuple(served.spec.model for served in some) for some in (visible, candidates))
        key = (is_admin, caller.is_limited, *names)
        with self._lock:
            if self._number != self._history.number:
                self._documents, self._whole, self._number = {}, {}, self._history.number
            if not self._number - STILL_KNOWN <= since <= self._number:
                since = 0
            if (found := self._whole.get((since, *key))) is None:
                if key not in self._documents:
                    has_cache = is_admin and not caller.is_limited
                    head = self._head(candidates, is_admin=is_admin, has_cache=has_cache)
                    models = [(_rendered(self._model(served, is_admin=is_admin)), served) for served in visible]
                    self._documents[key] = _Document(_rendered(head), models)
                found = self._whole[(since, *key)] = self._with_lines(self._documents[key], since)
            return found

    def _with_lines(self, document: _Document, since: int) -> bytes:
        """Two objects are joined by leaving out the brackets between them."""
        models = (
            model[:-1] + b',"series":' + _rendered(self._history.series(served, since)) + b"}"
            for model, served in document.models
        )
        return document.head[:-1] + b',"since":%d,"models":[' % since + b",".join(models) + b"]}"

    def _head(self, candidates: Sequence[ServedModel], *, is_admin: bool, has_cache: bool) -> dict[str, Any]:
        reload = self._reconciler.last_reload or {}
        found = {
            "number": self._history.number,
            "step_s": STEP_S,
            "kept": KEPT,
            "longest_ms": 1000 * SECONDS[-1],
            "version": __version__,
            "process": self._process,
            "uptime_s": round(time.monotonic() - self._began),
            "admin": is_admin,
            "stopping": self._pool.draining,
            "reload_ok": reload.get("ok"),
        }
        if is_admin:
            found |= {"pid": os.getpid(), "host": platform.node(), "reload": reload}
            found["cache"] = self._pool.cache.state() if has_cache else None
            found["candidates"] = [
                {"model": served.spec.model, "alias": served.spec.alias, **served.outlook()} for served in candidates
            ]
        return found

    def _model(self, served: ServedModel, *, is_admin: bool) -> dict[str, Any]:
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
            "error_age_s": None if (age_s := served.replicas.last_error_age_s) is None else round(age_s),
            "retry_s": round(served.replicas.retry_after_s) if entry["state"] == "failed" else None,
            "last_minute": self._history.last_minute(served),
        }
        if "successor" in entry:
            found["successor"] = entry["successor"] if is_admin else {**entry["successor"], "last_error": None}
        if is_admin:
            found |= {name: entry[name] for name in ("last_error", "runs_on", "replicas_on")}
        return found


def _rendered(document: Any) -> bytes:
    return orjson.dumps(document)


def _number(name: str) -> int:
    """A number of the query string; 0 for anything else."""
    given = request.args.get(name, "")
    return int(given) if given.isascii() and given.isdecimal() and len(given) < 12 else 0
